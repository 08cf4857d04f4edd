"""What an account is held against: each example alone, in float64."""

import copy
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from accuracy import assert_stable, moved
from torch import Tensor, nn

from memloc_ext import GradientAccountant, Projection
from memloc_ext.accounting import Account
from memloc_ext.reference.accounting import per_example_gradients, squared_norms

Inputs = Tensor | tuple[Tensor, ...]
LossOf = Callable[[Any, Tensor], Tensor]


class Model(nn.Module):
    """A module whose forward pass is a function of it and of its inputs; tensors among its parts become buffers."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


class Uncovered(nn.Module):
    """An activation that no rule knows; ``size``: of the weight."""

    def __init__(self, size: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        return torch.logaddexp(x, self.weight)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def weighted(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean over examples of the sum of each one's outputs, each with a weight of its own."""
    flat = output.reshape(len(target), -1)
    weights = torch.linspace(-1, 1.5, flat.shape[1], dtype=flat.dtype)
    return ((flat - target[:, None]).square() * weights).sum(1).mean()


def targets(batch: int) -> Tensor:
    return torch.linspace(-1, 1, batch)


def wide(value: Any) -> Any:
    """Return a copy in float64 of what is floating point."""
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).double()
    if isinstance(value, tuple):
        return tuple(wide(item) for item in value)
    return value.double() if value.is_floating_point() else value


def call(model: nn.Module, inputs: Inputs) -> Any:
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def account_of(
    model: nn.Module, loss_of: LossOf, inputs: Inputs, target: Tensor, *, batch_dim: int = 0, **arguments: Any
) -> tuple[Account, set[str]]:
    """Return the account of a batch and the names of the parameters that the accountant warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        accountant = GradientAccountant(model, batch_dim=batch_dim)
        with accountant:
            account = accountant.backward(loss_of(call(model, inputs), target), **arguments)
    told = [str(w.message) for w in caught if str(w.message).startswith("GradientAccountant")]
    assert not any("check of two examples" in message for message in told), told
    names = [name for message in told for name in message.split("a pass per example, of ")[1].split(", ")]
    assert len(names) == len(set(names)), f"warned more than once: {names}"
    return account, set(names)


def grads(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.to_dense().clone() for name, p in model.named_parameters()}


def check(
    model: nn.Module,
    inputs: Inputs,
    target: Tensor | None = None,
    loss_of: LossOf = weighted,
    *,
    uncovered: Collection[str] | None = (),
    batch_dim: int = 0,
    tell_batch: bool = False,
    steps: int = 2,
) -> Account:
    """Hold norms, group gradients and gradients of a mean loss against the truth, and return the account.

    ``uncovered``: parameters that are to be warned of; None if it does not matter which. ``tell_batch``: no layer's
    input tells the number of examples. ``steps``: with groups; the second need not be traced.
    """
    if target is None:
        first = inputs[0] if isinstance(inputs, tuple) else inputs
        target = targets(first.shape[batch_dim]).to(next(model.parameters()).dtype)
    batch = len(target)
    model.zero_grad()
    state = copy.deepcopy(model.state_dict())
    exact = per_example_gradients(wide(model), loss_of, wide(inputs), wide(target), batch_dim=batch_dim)
    off = moved((model, loss_of, inputs, target), next(model.parameters()).dtype)
    off = per_example_gradients(*off, batch_dim=batch_dim)
    plain = copy.deepcopy(model)
    loss_of(call(plain, inputs), target).backward()

    ids = torch.arange(batch) * 2 % 3  # of four groups one is empty
    means = {name: None if g is None else off[name].mean(0) for name, g in grads(plain).items()}
    account, written = Account({}, {}), {}
    for _ in range(steps):
        model.zero_grad()
        account, warned = account_of(model, loss_of, inputs, target, batch_dim=batch_dim, group_ids=ids, num_groups=4)
        assert uncovered is None or warned == set(uncovered), f"warned of {warned}"
        written = grads(model)
        assert_all_stable("squared norm", account.sqnorm, squared_norms(off), squared_norms(exact))
        assert_all_stable("group gradients", account.group_grad, by_group(off, ids), by_group(exact, ids))
        assert_all_stable("gradient", written, means, {name: g.mean(0) for name, g in exact.items()})

    size = batch if tell_batch else None
    norms, _ = account_of(model, loss_of, inputs, target, batch_dim=batch_dim, weight_grads=False, batch_size=size)
    assert norms.group_grad == {}
    assert_all_stable("squared norm alone", norms.sqnorm, squared_norms(off), squared_norms(exact))
    assert_equal(grads(model), written)
    assert_equal(model.state_dict(), state)
    hold_queries(wide(model), wide(inputs), wide(target), loss_of, exact, batch_dim=batch_dim)
    return account


def hold_queries(
    model: nn.Module, inputs: Inputs, target: Tensor, loss_of: LossOf, exact: dict[str, Tensor], **settings: Any
) -> None:
    """Ask everything of one backward pass of a mean loss in float64, and hold the answers against exact gradients."""
    batch, real = len(target), {name: _real(g) for name, g in exact.items()}
    directions = {
        "first": {name: g[:1].mean(0) if batch else g.sum(0) for name, g in exact.items()},
        "some": {name: torch.ones_like(g.sum(0)) for name, g in list(exact.items())[::2]},
    }
    norms = torch.stack([g.square().sum(1) for g in real.values()]).sum(0)
    bound, project = float(norms.mean().sqrt()) + 1e-3, Projection(2, seed=3)
    model.zero_grad()
    account, _ = account_of(
        model, loss_of, inputs, target, **settings, directions=directions, pairwise=True, max_norm=bound,
        project=project, by_row=set(exact), per_position=True,
    )  # fmt: skip
    torch.testing.assert_close(account.sqnorm, squared_norms(exact))
    for direction, tensors in directions.items():
        dots = {n: g @ _real(tensors[n][None])[0] if n in tensors else g.sum(1) * 0 for n, g in real.items()}
        torch.testing.assert_close(account.dot[direction], dots, rtol=1e-7, atol=1e-7 * float(norms.mean()))
        length = sum(_real(t[None]).square().sum() for t in tensors.values())
        cosine = sum(dots.values()) / (norms * length).sqrt()
        torch.testing.assert_close(account.cosine(direction), cosine.nan_to_num(0))
    inner = sum(g @ g.t() for g in real.values())
    torch.testing.assert_close(account.inner, inner, rtol=1e-7, atol=1e-7 * float(norms.mean()))
    clipped = (bound / norms.sqrt()).clamp(max=1)
    written = {name: 0 if p.grad is None else p.grad.to_dense() for name, p in model.named_parameters()}
    for name, g in exact.items():
        torch.testing.assert_close(written[name] + 0 * g[0], torch.tensordot(clipped.to(g.dtype), g, 1) / batch)
        rows = g.reshape(batch, len(g[0]) if g.dim() > 1 else 1, -1)
        sides = zip(("left", "right"), rows.shape[1:], strict=True)
        left, right = (project.matrix(name, side, n, g).to(g.dtype) for side, n in sides)
        torch.testing.assert_close(account.projected[name], left @ rows @ right.t(), msg=name)
        torch.testing.assert_close(account.row_sqnorm[name], rows.abs().square().sum(2), msg=name)
    model.zero_grad()
    ids, mean = torch.arange(batch) % 2, {name: g.mean(0) for name, g in exact.items()}
    for grads_too in (True, False):  # answers that are given on the way
        arguments = {"directions": directions, "project": project, "by_row": set(exact), "weight_grads": grads_too}
        other, _ = account_of(model, loss_of, inputs, target, **settings, **arguments, group_ids=ids, num_groups=2)
        torch.testing.assert_close(other.sqnorm, account.sqnorm)
        torch.testing.assert_close(other.projected, account.projected)
        torch.testing.assert_close(other.row_sqnorm, account.row_sqnorm)
        for direction in directions:
            off = 1e-7 * float(norms.mean())
            torch.testing.assert_close(other.dot[direction], account.dot[direction], rtol=1e-7, atol=off)
        if grads_too:
            squares = {name: _real(g[None]).square().sum() for name, g in mean.items()}
            torch.testing.assert_close(other.mean_sqnorm, squares, rtol=1e-6, atol=1e-9 * float(norms.mean()))
    if batch > 1:
        variance = (norms.mean() - inner.mean()) * batch / (batch - 1)
        off, inverse = 1e-7 * float((norms.mean() / variance).abs()), (inner.mean() - variance / batch) / variance
        torch.testing.assert_close(1 / account.noise_scale, inverse, rtol=0, atol=off, equal_nan=True)


def _real(g: Tensor) -> Tensor:
    """Return gradients ``[batch, *]`` as a matrix of real numbers."""
    return torch.view_as_real(g).flatten(1) if g.is_complex() else g.unsqueeze(-1).flatten(1)


def held(model: nn.Module, x: Tensor, **arguments) -> Account:
    """Hold norms and gradients of a model of float64 against the truth, and return the account."""
    y = targets(len(x)).double()
    exact = per_example_gradients(model, weighted, x, y)
    model.zero_grad()
    account, warned = account_of(model, weighted, x, y, **arguments)
    assert not warned
    torch.testing.assert_close(account.sqnorm, squared_norms(exact))
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, exact[name].mean(0), msg=name)
    return account


def by_group(gradients: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """Return what each of four groups adds to the gradient of a mean loss."""
    members = torch.stack([ids == group for group in range(4)])
    return {name: torch.tensordot(members.to(g.dtype), g, 1) / len(ids) for name, g in gradients.items()}


def assert_all_stable(
    what: str, actual: Mapping[str, Tensor | None], off: Mapping[str, Tensor | None], exact: dict[str, Tensor]
) -> None:
    """Hold the tensors of every parameter against the truth; None is for parameters of which there is nothing."""
    missing = {name for name, t in off.items() if t is None}
    assert {name for name, t in actual.items() if t is None} == missing, f"{what}: only {missing} are None"
    assert actual.keys() == off.keys(), what
    for name in exact.keys() - missing:
        try:
            assert_stable(actual[name], off[name], exact[name])
        except AssertionError as error:  # noqa: PERF203
            raise AssertionError(f"{what} of {name}: {error}") from error


def assert_equal(actual: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]) -> None:
    """Hold that nothing was written, bit for bit."""
    assert actual.keys() == expected.keys()
    for name, t in expected.items():
        other = actual[name]
        assert t is other is None or torch.equal(t, other), f"{name} was written"


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 2))


def total(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum()


def sums(accountant: GradientAccountant, loss: Tensor, **arguments) -> Account:
    return accountant.backward(loss, loss_reduction="sum", **arguments)


def assert_same(a: Account, b: Account) -> None:
    assert a.sqnorm.keys() == b.sqnorm.keys()
    for name, norm in a.sqnorm.items():
        torch.testing.assert_close(norm, b.sqnorm[name])
