"""Steps after the first run on PyTorch's own layers: the same numbers, and what does not fit is noticed."""

import contextlib
import copy
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accounted import Model, check, parameter
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from memloc_ext import GradientAccountant, Projection
from memloc_ext.accounting import Account
from memloc_ext.accounting.check import known_of
from memloc_ext.accounting.contributions import Contribution, LinearContribution
from memloc_ext.accounting.layers.convolution import ConvolutionContribution
from memloc_ext.accounting.tracer import Tracer
from memloc_ext.models import ResNet9, ViT
from memloc_ext.ops import Groups
from memloc_ext.ops import account as ops_account

B = 4


class Counted(TorchDispatchMode):
    """Counts the operators that are dispatched."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def vit() -> Any:
    torch.manual_seed(0)
    return ViT(image_size=16, patch=8, mlp=32, dropout=0.0, dim=16, depth=6, heads=2)


def resnet() -> Any:
    torch.manual_seed(0)
    return ResNet9(width=0.06)


def patterns(model: nn.Module) -> list[Any]:
    return [pattern for pattern in known_of(model, (0, ())).patterns.values() if pattern is not None]


def mlp() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 2)).double()


def step(model: Any, x: Tensor, y: Tensor | None = None, **arguments: Any) -> tuple[Account, dict[str, Tensor]]:
    """Return the account of a step, and the gradients."""
    model.zero_grad()
    with GradientAccountant(model) as accountant:
        output = model(x)
        target = torch.arange(len(x)) % output.shape[-1] if y is None else y
        account = accountant.backward(F.cross_entropy(output, target), **arguments)
    return account, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def functions_seen(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> list[str]:
    """Return the names of the functions that an accountant sees."""
    seen: list[str] = []
    plain = Tracer.__torch_function__

    def watched(self: Tracer, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        seen.append(getattr(func, "__name__", ""))
        return plain(self, func, types, args, kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Tracer, "__torch_function__", watched)
        run()
    return seen


def assert_same(one: tuple[Account, dict[str, Tensor]], other: tuple[Account, dict[str, Tensor]]) -> None:
    for a, b in ((one[0].sqnorm, other[0].sqnorm), (one[0].group_grad, other[0].group_grad), (one[1], other[1])):
        assert a.keys() == b.keys()
        for name, t in a.items():
            scale = float(t.abs().max())
            torch.testing.assert_close(
                b[name], t, rtol=1e-4, atol=1e-5 * scale, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.parametrize("make", [vit, resnet])
@pytest.mark.parametrize("training", [True, False])
def test_later_steps_tell_the_same_and_watch_no_layer(
    make: Callable[[], nn.Module], training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, ids = make().train(training).double(), torch.randn(3, 3, 16, 16).double(), torch.tensor([1, 0, 1])
    first = step(model, x, group_ids=ids)
    (pattern,) = patterns(model)
    assert len(pattern.places) > 10
    for _ in range(2):
        assert_same(first, step(model, x, group_ids=ids))
    single, norms = step(model, x), step(model, x, weight_grads=False)
    torch.testing.assert_close(single[0].sqnorm, first[0].sqnorm)
    torch.testing.assert_close(single[1], first[1])
    torch.testing.assert_close(norms[0].sqnorm, first[0].sqnorm)
    assert not norms[1]
    torch.testing.assert_close(single[0].mean_sqnorm, first[0].mean_sqnorm)
    torch.testing.assert_close(
        single[0].mean_sqnorm, {name: g.square().sum() for name, g in single[1].items()}, rtol=1e-6, atol=1e-12
    )
    seen = functions_seen(monkeypatch, lambda: step(model, x))
    assert not {"linear", "conv2d", "layer_norm", "batch_norm"} & set(seen)
    assert patterns(model) == [pattern]


@pytest.mark.parametrize("make", [vit, resnet])
@pytest.mark.parametrize("arguments", [{}, {"weight_grads": False}])
def test_operators_of_a_later_step(make: Callable[[], nn.Module], arguments: dict[str, Any]) -> None:
    model, x = make(), torch.randn(2, 3, 32 if make is resnet else 16, 32 if make is resnet else 16)
    step(model, x)
    with Counted() as plain:
        F.cross_entropy(model(x), torch.arange(2)).backward()
    accountant = GradientAccountant(model)
    model.zero_grad()
    with Counted() as accounted, accountant:
        accountant.backward(F.cross_entropy(model(x), torch.arange(2)), **arguments)
    assert accounted.count <= 1.6 * plain.count


class Unread(TorchDispatchMode):
    """Refuses operators that read values back, or whose results have a size that follows from values."""

    REFUSED = ("_local_scalar_dense", "nonzero", "unique", "_unique2", "unique_dim", "masked_select", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._schema.name.removeprefix("aten::") not in self.REFUSED, func
        indices = args[1] if func._schema.name == "aten::index" else ()
        assert not any(t is not None and t.dtype == torch.bool for t in indices), func
        return func(*args, **(kwargs or {}))


def text() -> Any:
    torch.manual_seed(0)
    layers = nn.Embedding(7, 6), nn.Flatten(), nn.LayerNorm(18), nn.Linear(18, 5), nn.ReLU(), nn.Linear(5, 4)
    return nn.Sequential(*layers)


@pytest.mark.parametrize("make", [vit, resnet, text])
@pytest.mark.parametrize("composed", [False, True])
def test_nothing_is_read_back(make: Callable[[], Any], composed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a CUDA graph can be captured; composed: as on CUDA."""
    model, ids = make(), torch.tensor([1, 0, 1])
    x = torch.tensor([[1, 1, 3], [2, 0, 2], [6, 5, 4]]) if make is text else torch.randn(3, 3, 16, 16)
    first = step(model, x, group_ids=ids, num_groups=2)
    assert patterns(model)
    if composed:
        monkeypatch.setattr(ops_account, "_op", ops_account.compose)
        monkeypatch.setattr(Groups, "split", Groups._masked)
    accountant = GradientAccountant(model)
    model.zero_grad()
    with Unread(), accountant:
        loss = F.cross_entropy(model(x), torch.arange(3))
        account = accountant.backward(loss, group_ids=ids, num_groups=2)
    assert_same(first, (account, {name: p.grad for name, p in model.named_parameters()}))


class Casts(TorchDispatchMode):
    """Counts casts, and products by the types of their results."""

    PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")

    def __init__(self) -> None:
        super().__init__()
        self.seen = Counter[object]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if isinstance(result, Tensor) and result.is_meta:  # which is computed nowhere
            return result
        if name == "_to_copy" and args[0].is_floating_point() and args[0].dtype != result.dtype:
            self.seen[name, args[0].dtype, result.dtype] += 1
        elif name in self.PRODUCTS:
            first = next(t for t in (result if isinstance(result, tuple) else (result,)) if t is not None)
            self.seen[name, first.dtype] = 1
        return result


@pytest.mark.parametrize("make", [vit, resnet])
@pytest.mark.parametrize("arguments", [{}, {"weight_grads": False}])
@pytest.mark.parametrize("way", ["traced", "untraced", "composed"])
def test_no_casts_and_products_beside_those_of_a_plain_step(
    make: Callable[[], Any], arguments: dict[str, Any], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under autocast; composed: as on CUDA."""
    model, x = make(), torch.randn(3, 3, 16, 16)
    if way == "traced":  # as on CUDA, where no pass of the CPU's finds norms and sums
        monkeypatch.setattr(Contribution, "one_pass", False)
        monkeypatch.setattr(LinearContribution, "one_pass", False)
        monkeypatch.setattr(ConvolutionContribution, "one_pass", False)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            step(model, x)
        assert patterns(model)
    if way == "composed":
        monkeypatch.setattr(ops_account, "_op", ops_account.compose)
    known_of(model, (0, ())).traced_only = way == "traced"
    accountant = GradientAccountant(model, check="never" if way == "traced" else "first")
    seen = []
    for account in (False, True):
        model.zero_grad()
        with Casts() as casts, accountant if account else contextlib.nullcontext():
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(x), torch.arange(3))
            if account:
                accountant.backward(loss, **arguments)
            else:
                loss.backward()
        seen.append(casts.seen)
    more = seen[1] - seen[0]
    assert not more, more


def test_answers_to_queries_of_later_steps() -> None:
    model, x = vit().double(), torch.randn(3, 3, 16, 16).double()
    directions = {"ones": {name: torch.ones_like(p) for name, p in model.named_parameters()}}
    asked = {
        "directions": directions, "pairwise": True, "project": Projection(3, 0), "per_position": True,
        "by_row": ["head.weight", "norm.bias"], "max_norm": 0.5,
    }  # fmt: skip
    first, *others = (step(model, x, **asked) for _ in range(3))
    assert patterns(model)
    for other in others:
        assert_same(first, other)
        for name in ("dot", "inner", "projected", "position_sqnorm", "row_sqnorm"):
            torch.testing.assert_close(getattr(other[0], name), getattr(first[0], name))


def test_sizes_that_are_all_the_same() -> None:
    """Batch, tokens and channels: only the graph tells where the examples are."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.norm(m.a(x) + m.position).transpose(1, 2)
        return m.b(x).transpose(0, 1).mean(0)

    model = Model(run, a=nn.Linear(B, B), norm=nn.LayerNorm(B), b=nn.Linear(B, B), position=parameter(1, B, B))
    check(model, torch.randn(B, B, B))
    assert patterns(model)


def test_what_picks_rows_by_values_is_always_traced() -> None:
    """Before the first layer, where no graph tells of it: an account is in the order of the inputs."""
    model: Any = Model(lambda m, x: m.a(x[m.order]), a=nn.Linear(3, 4), order=torch.arange(B)).double()
    x = torch.randn(B, 3).double()
    step(model, x)
    model.order.copy_(torch.tensor([2, 0, 3, 1]))
    account, _ = step(model, x, y=model.order)
    for b in range(B):
        loss = F.cross_entropy(model.a(x[b : b + 1]), torch.tensor([b]))
        gradient = torch.autograd.grad(loss, model.a.weight)[0]
        torch.testing.assert_close(account.sqnorm["a.weight"][b], gradient.square().sum())


def test_checkpointed_blocks() -> None:
    torch.manual_seed(0)

    def run(m: Any, x: Tensor) -> Tensor:
        return m.c(checkpoint(lambda h: m.b(h).relu(), m.a(x).relu(), use_reentrant=False))

    model = Model(run, a=nn.Linear(3, 5), b=nn.Linear(5, 5), c=nn.Linear(5, 2)).double()
    x = torch.randn(B, 3).double()
    first, *others = (step(model, x) for _ in range(3))
    model.function = lambda m, x: m.c(m.b(m.a(x).relu()).relu())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = step(copy.deepcopy(model), x)
    for other in (*others, plain):
        assert_same(first, other)


# what is another graph


class Switched(nn.Module):
    """Takes another way for each value of ``way``, through layers of the same shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.way = nn.Linear(B, B), nn.Linear(B, B), 0

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        ways = [
            lambda: self.b(h),
            lambda: self.b(h.transpose(0, 1)).transpose(0, 1),
            lambda: self.b(self.b(h)),
            lambda: self.b(h[torch.tensor([2, 0, 3, 1])]),
            lambda: self.b(h.transpose(0, 0)),
            lambda: self.b(torch.logaddexp(h, self.a.bias)),
            lambda: self.a(h),
            lambda: self.b(h.transpose(1, 2)).transpose(1, 2),
        ]
        return ways[self.way]().mean(1) if x.dim() > 2 else ways[self.way]()


@pytest.mark.parametrize(("first", "way"), [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (0, 6), (1, 7)])
def test_another_way_through_the_model_takes_a_pass_per_example(first: int, way: int) -> None:
    torch.manual_seed(0)
    model, x = Switched().double(), torch.randn(B, B, B).double()
    model.way = first
    step(model, x)
    assert patterns(model)
    model.way = way
    other = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="something else than in earlier steps"):
        found = step(model, x)
    for b in range(B):
        loss = F.cross_entropy(other(x)[b : b + 1], torch.tensor([b]))
        named = {name: p for name, p in other.named_parameters() if p.requires_grad}
        exact = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
        for name, g in zip(named, exact, strict=True):
            torch.testing.assert_close(found[0].sqnorm[name][b], g.square().sum(), msg=f"{name} of {b}")
    with warnings.catch_warnings():
        warnings.simplefilter("error" if way in (2, 4, 6) else "ignore")
        again = step(model, x)  # and is traced from then on
    if way in (2, 4, 6):
        torch.testing.assert_close(again[0].sqnorm, found[0].sqnorm)
        torch.testing.assert_close(again[1], found[1])
    assert not patterns(model)


def test_a_penalty_outside_of_the_model_is_noticed() -> None:
    model, x = mlp(), torch.randn(B, 3).double()
    step(model, x)
    with GradientAccountant(model) as accountant:
        loss = F.cross_entropy(model(x), torch.zeros(B).long()) + model[0].weight.square().sum()
        with pytest.warns(UserWarning, match="something else"), pytest.raises(ValueError, match="nothing tells"):
            accountant.backward(loss)


def test_a_mean_with_ignored_targets_is_refused_in_a_later_step() -> None:
    model, x = mlp(), torch.randn(B, 3).double()
    step(model, x)
    assert patterns(model)
    with pytest.raises(ValueError, match="example_weights"):
        step(model, x, torch.tensor([0, 1, -100, 1]))


def test_a_frozen_parameter_a_hook_and_another_parameter_are_another_key() -> None:
    model, x, seen = mlp(), torch.randn(B, 3).double(), []
    step(model, x)
    model[0].weight.requires_grad_(False)
    account, grads = step(model, x)
    assert "0.weight" not in account.sqnorm.keys() | grads.keys()
    model[0].weight.requires_grad_(True)
    handle = model[0].weight.register_hook(lambda g: seen.append(g) or 2 * g)
    plain = copy.deepcopy(model)
    step(model, x)
    handle.remove()
    assert len(seen) == 1
    model[3].weight = nn.Parameter(torch.randn(2, 5).double())
    plain.load_state_dict(model.state_dict())
    for _ in range(2):
        account, grads = step(model, x)
        F.cross_entropy(plain(x), torch.arange(B) % 2).backward()
        for name, p in plain.named_parameters():
            torch.testing.assert_close(grads[name], p.grad)
            p.grad = None


# what stays as it was


def test_hooks_of_accumulation_are_called_once_with_the_gradient() -> None:
    model, x, seen = mlp(), torch.randn(B, 3).double(), []
    first = step(model, x)
    weight = model[0].weight
    node = weight.expand_as(weight).grad_fn.next_functions[0][0]
    handle = node.register_prehook(lambda grads: seen.append(grads[0].clone()))
    step(model, x)
    handle.remove()
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], first[1]["0.weight"])


def test_gradients_add_up_and_are_no_views_of_each_other() -> None:
    model, x = vit(), torch.randn(2, 3, 16, 16)
    first = step(model, x)
    for _ in range(2):
        with GradientAccountant(model) as accountant:
            accountant.backward(F.cross_entropy(model(x), torch.arange(2)))
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, 3 * first[1][name], rtol=1e-4, atol=1e-5)
    storages = [p.grad.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(storages)) == len(storages)


def test_inputs_get_their_gradients() -> None:
    model, x = mlp(), torch.randn(B, 3).double().requires_grad_()
    step(model, x)
    expected, x.grad = x.grad, None
    assert patterns(model)
    step(model, x)
    torch.testing.assert_close(x.grad, expected)


def test_a_graph_that_is_kept_is_accounted_again() -> None:
    model, x = mlp(), torch.randn(B, 3).double()
    first = step(model, x)
    model.zero_grad()
    with GradientAccountant(model) as accountant:
        loss = F.cross_entropy(model(x), torch.arange(B) % 2)
        accounts = [accountant.backward(loss, retain_graph=keep) for keep in (True, False)]
    for account in accounts:
        torch.testing.assert_close(account.sqnorm, first[0].sqnorm)
    torch.testing.assert_close(model[0].weight.grad, 2 * first[1]["0.weight"])


def test_exact_groups_of_a_later_step() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    x, ids = torch.randn(B, 3).double(), torch.tensor([0, 1, 1, 0])
    first = step(model, x, group_ids=ids, exact_groups=True)
    assert patterns(model)
    assert_same(first, step(model, x, group_ids=ids, exact_groups=True))


def test_a_plain_backward_pass_of_a_later_step_is_told_of() -> None:
    model, x = mlp(), torch.randn(B, 3).double()
    step(model, x)
    with pytest.warns(UserWarning, match="nothing was accounted"), GradientAccountant(model):
        F.cross_entropy(model(x), torch.arange(B) % 2).backward()


def test_modes_are_left_in_their_order_after_an_error_too() -> None:
    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    model, x = mlp(), torch.randn(B, 3).double()
    first = step(model, x)
    before = len(_get_current_function_mode_stack())
    with GradientAccountant(model) as accountant:
        with Mode():
            output = model(x)
        account = accountant.backward(F.cross_entropy(output, torch.arange(B) % 2))
    torch.testing.assert_close(account.sqnorm, first[0].sqnorm)
    assert len(_get_current_function_mode_stack()) == before
    model[3].forward = lambda _: 1 / 0
    with pytest.raises(ZeroDivisionError), GradientAccountant(model):
        model(x)
    assert len(_get_current_function_mode_stack()) == before


def test_autocast_and_other_training_flags_are_other_keys() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2)).eval()
    x = torch.randn(B, 3)
    plain = step(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        coarse = [step(model, x) for _ in range(3)][-1]
    for name, norms in plain[0].sqnorm.items():
        torch.testing.assert_close(coarse[0].sqnorm[name], norms, rtol=0.1, atol=1e-3)
        assert coarse[1][name].dtype == torch.float32
    model.train()
    step(model, x)
    assert_same(plain, step(model.eval(), x))
