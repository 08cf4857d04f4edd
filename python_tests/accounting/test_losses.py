"""Losses that are no mean over examples, and losses that cannot be accounted."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from accounted import Model, small
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memloc_ext import GradientAccountant
from memloc_ext.accounting import Account
from memloc_ext.reference.accounting import per_example_gradients, squared_norms

B, C = 4, 2
X = torch.randn(B, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
WEIGHT = torch.tensor([0.5, 3.0], dtype=torch.float64)
LABELS = torch.tensor([0, 1, 1, 0])
TOKENS = torch.tensor([[0, 1, -100], [1, 1, 0], [-100, -100, 1], [0, 0, 1]])  # 2, 3, 1 and 3 count
Loss = Callable[[Tensor, Tensor], Tensor]


def net() -> nn.Sequential:
    return small().double()


def tokens(seed: int, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Return inputs ``[batch, length, 3]`` and targets of which some are ignored."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, 3, generator=generator, dtype=torch.float64)
    return x, torch.randint(-1, C, (batch, length), generator=generator)


def flat(logits: Tensor, target: Tensor, **arguments: Any) -> Tensor:
    """Return the mean over all tokens, as models of Hugging Face compute it."""
    return F.cross_entropy(logits.reshape(-1, C), target.reshape(-1), **arguments)


def assert_norms(account: Account, model: nn.Module, own: Loss, x: Tensor, y: Tensor, prefix: str = "") -> None:
    """Hold the norms against each example alone; one of ignored targets alone has a loss of NaN, and a norm of 0."""
    expected = squared_norms(per_example_gradients(model, own, x, y))
    assert account.sqnorm.keys() == {prefix + name for name in expected}
    for name, norm in expected.items():
        torch.testing.assert_close(account.sqnorm[prefix + name], norm.nan_to_num())


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 1000), batch=st.integers(1, 6), reduction=st.sampled_from(["mean", "sum", "none"]))
def test_class_weights(seed: int, batch: int, reduction: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(C, (batch,), generator=generator)
    weight = torch.rand(C, generator=generator, dtype=torch.float64) * 10 + 0.1
    factors = weight[y] / weight[y].sum() if reduction == "mean" else weight[y]
    model = net()
    with GradientAccountant(model) as accountant:
        loss = F.cross_entropy(model(x), y, weight, reduction=reduction)
        account = accountant.backward(
            loss, example_weights=factors, loss_reduction=reduction, group_ids=torch.arange(batch) % 2, num_groups=2
        )
    assert_norms(account, model, F.cross_entropy, x, y)
    for name, p in model.named_parameters():
        torch.testing.assert_close(account.group_grad[name].sum(0), p.grad)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), batch=st.integers(1, 4), length=st.integers(1, 4))
def test_ignored_tokens(seed: int, batch: int, length: int) -> None:
    x, y = tokens(seed, batch, length)
    counts = (y != -1).sum(1)
    model = net()
    with GradientAccountant(model) as accountant:
        if len(counts.unique()) > 1:
            with pytest.raises(ValueError, match=rf"add from {counts.min()} to {counts.max()}; give example_weights"):
                accountant.backward(flat(model(x), y, ignore_index=-1))
            assert all(p.grad is None for p in model.parameters())
        elif counts.any():
            account = accountant.backward(flat(model(x), y, ignore_index=-1))
            assert_norms(account, model, lambda z, t: flat(z, t, ignore_index=-1), x, y)
        if counts.any():
            account = accountant.backward(flat(model(x), y, ignore_index=-1), example_weights=counts / counts.sum())
            assert_norms(account, model, lambda z, t: flat(z, t, ignore_index=-1), x, y)


def test_an_example_without_weight_has_no_norm() -> None:
    x = X.clone()
    x[1] = torch.nan
    factors = torch.tensor([0.5, 0, 1e-30, 1])
    model = nn.Linear(3, C).double()
    with GradientAccountant(model) as accountant:
        losses = F.cross_entropy(model(x), LABELS, reduction="none") * factors
        sqnorm = accountant.backward(losses, example_weights=factors, loss_reduction="none").sqnorm["bias"]
    assert sqnorm[1] == 0
    expected = squared_norms(per_example_gradients(model, F.cross_entropy, X, LABELS))["bias"]
    torch.testing.assert_close(sqnorm[[0, 2, 3]], expected[[0, 2, 3]])


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ([0.25] * B, TypeError, "must be a tensor of a floating dtype, got list"),
        (torch.ones(B, dtype=torch.int64), TypeError, r"must be .* got torch\.int64"),
        (torch.ones(B + 1), ValueError, r"must be \[4\] on cpu, got \[5\] on cpu"),
        (torch.ones(B, 1), ValueError, r"must be \[4\] on cpu, got \[4, 1\] on cpu"),
        (torch.ones(B, device="meta"), ValueError, r"must be \[4\] on cpu, got \[4\] on meta"),
        (torch.tensor([1, 1, -0.5, 1]), ValueError, r"must be finite and at least 0, got -0\.5"),
        (torch.tensor([1, torch.nan, 1, 1]), ValueError, "must be finite and at least 0, got nan"),
        (torch.tensor([1, torch.inf, 1, 1]), ValueError, "must be finite and at least 0, got inf"),
    ],
)
def test_refused_example_weights(weights: Any, error: type[Exception], message: str) -> None:
    model = net()
    with GradientAccountant(model) as accountant, pytest.raises(error, match=f"example_weights {message}"):
        accountant.backward(model(X).mean(), example_weights=weights)
    assert all(p.grad is None for p in model.parameters())


@dataclass
class Case:
    """A mean loss of logits ``[4, 2]``, or ``[4, 3, 2]`` for three tokens each, and the weights of examples in it."""

    loss: Loss
    target: Tensor
    w: Tensor | None = None
    own: Loss | None = None  # of one example, if another function computes it


def inputs(case: Case) -> Tensor:
    """Return inputs of the rank of the logits."""
    return torch.stack([X, X * 2, X - 1], dim=1) if case.target.shape == (B, 3) else X


CLASSES = WEIGHT[LABELS]
COUNTS = (TOKENS >= 0).sum(1).double()
BOTH = (WEIGHT[TOKENS.clamp(min=0)] * (TOKENS >= 0)).sum(1)
NEXT = F.pad(TOKENS[:, 1:], (0, 1), value=-100)
UNEQUAL = {
    "weights": Case(lambda z, y: F.cross_entropy(z, y, WEIGHT), LABELS, CLASSES),
    "module": Case(nn.CrossEntropyLoss(WEIGHT), LABELS, CLASSES),
    "weights and smoothing": Case(lambda z, y: F.cross_entropy(z, y, WEIGHT, label_smoothing=0.1), LABELS, CLASSES),
    "nll": Case(lambda z, y: nn.NLLLoss(WEIGHT)(z.log_softmax(1), y), LABELS, CLASSES),
    "mse": Case(
        lambda z, y: F.mse_loss(z[:, 0], y.double(), weight=CLASSES),
        LABELS,
        CLASSES,
        own=lambda z, y: F.mse_loss(z[:, 0], y.double()),
    ),
    "part of a loss": Case(lambda z, y: 2 * F.cross_entropy(z, y, WEIGHT) + 1, LABELS, CLASSES),
    "in place": Case(lambda z, y: F.cross_entropy(z, y, WEIGHT).add_(1), LABELS, CLASSES),
    "checkpoint": Case(lambda z, y: checkpoint(flat, z, y, use_reentrant=False), TOKENS, COUNTS),
    "ignored": Case(F.cross_entropy, LABELS.where(LABELS > 0, -100), LABELS.double()),
    "tokens": Case(flat, TOKENS, COUNTS),
    "next tokens": Case(flat, NEXT, (NEXT >= 0).sum(1).double()),
    "tokens and smoothing": Case(lambda z, y: flat(z, y, label_smoothing=0.2), TOKENS, COUNTS),
    "tokens and weights": Case(lambda z, y: flat(z, y, weight=WEIGHT), TOKENS, BOTH),
    "tokens behind classes": Case(lambda z, y: F.cross_entropy(z.transpose(1, 2), y), TOKENS, COUNTS),
    "tokens first": Case(lambda z, y: flat(z.transpose(0, 1), y.T), TOKENS, COUNTS),
}
if hasattr(F, "linear_cross_entropy"):
    UNEQUAL["linear"] = Case(
        lambda z, y: F.linear_cross_entropy(z, torch.eye(C, dtype=torch.float64), y, weight=WEIGHT), LABELS, CLASSES
    )


@pytest.mark.parametrize("case", UNEQUAL.values(), ids=UNEQUAL.keys())
@pytest.mark.parametrize("inside", [False, True], ids=["beside the model", "inside the model"])
def test_a_mean_with_unequal_weights_is_refused(case: Case, inside: bool) -> None:
    assert case.w is not None
    x, body = inputs(case), net()
    model = Model(lambda m, x, y: case.loss(m.body(x), y) if inside else m.body(x), body=body)
    with GradientAccountant(model) as accountant:

        def loss() -> Tensor:
            out = model(x, case.target)
            return out if inside else case.loss(out, case.target)

        with pytest.raises(ValueError, match=r"needs a mean over the examples, and .* give example_weights=w"):
            accountant.backward(loss())
        assert all(p.grad is None for p in model.parameters())
        account = accountant.backward(loss(), example_weights=case.w / case.w.sum())
    assert_norms(account, body, case.own or case.loss, x, case.target, prefix="body.")


def test_ignored_rows_of_examples_one_behind_the_other() -> None:
    model, x = net(), torch.stack([X, X * 2, X - 1], dim=1)
    with GradientAccountant(model) as accountant:
        with pytest.raises(ValueError, match="to which examples add from 1 to 3"):
            accountant.backward(flat(model(x.flatten(0, 1)), TOKENS), batch_size=B)
        loss = flat(model(x.flatten(0, 1)), TOKENS)
        account = accountant.backward(loss, batch_size=B, example_weights=COUNTS / COUNTS.sum())
    assert_norms(account, model, flat, x, TOKENS)


def test_a_mean_with_unequal_weights_names_them() -> None:
    model = net()
    with GradientAccountant(model) as accountant:
        with pytest.raises(ValueError, match=r"divides by the batch's sum of weight\[target\] \* \(target != "):
            accountant.backward(F.cross_entropy(model(X), LABELS, WEIGHT))
        with pytest.raises(ValueError, match=r"sum of \(target != 0\), to which examples add from 0 to 1; give"):
            accountant.backward(F.cross_entropy(model(X), LABELS, ignore_index=0))


EQUAL = {
    "smoothing": Case(lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1), LABELS),
    "one class": Case(lambda z, y: F.cross_entropy(z, y, WEIGHT), LABELS * 0),
    "probabilities": Case(lambda z, y: F.cross_entropy(z, y, WEIGHT), X[:, :2].softmax(1)),
    "as many ignored": Case(flat, torch.tensor([[0, 1, -100], [-100, 1, 0], [1, -100, 1], [0, 0, -100]])),
    "other orders": Case(
        lambda z, y: flat(z, y, weight=torch.tensor([0.1, 0.4], dtype=torch.float64)),
        torch.tensor([[0, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0, 1]]),
    ),
    "a metric beside": Case(lambda z, y: F.cross_entropy(z, y) + 0 * F.cross_entropy(z, y, WEIGHT).item(), LABELS),
}


@pytest.mark.parametrize("case", EQUAL.values(), ids=EQUAL.keys())
def test_a_mean_with_equal_weights_is_one(case: Case) -> None:
    x, model = inputs(case), net()
    with GradientAccountant(model) as accountant:
        account = accountant.backward(case.loss(model(x), case.target))
    assert_norms(account, model, case.loss, x, case.target)


def test_sums_and_losses_by_example_may_have_unequal_weights() -> None:
    model, x = net(), torch.stack([X, X * 2, X - 1], dim=1)
    with GradientAccountant(model) as accountant:
        total = accountant.backward(flat(model(x), TOKENS, reduction="sum"), loss_reduction="sum")
        losses = flat(model(x), TOKENS, reduction="none").reshape(B, -1)
        by_example = accountant.backward(losses, loss_reduction="none")
    for account in (total, by_example):
        assert_norms(account, model, lambda z, y: flat(z, y, reduction="sum"), x, TOKENS)


@pytest.mark.parametrize("divided", [1, 4])
def test_a_models_own_mean_over_unequal_numbers_of_tokens_is_refused(divided: int) -> None:
    """As language models return it; written out, so that no function of PyTorch's tells."""

    def run(m: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits, there = m.l(x), (y >= 0).double()
        right = logits.log_softmax(-1).gather(-1, y.clamp(min=0)[..., None])[..., 0]
        return -(right * there).sum() / there.sum(), logits

    model = Model(run, l=nn.Linear(3, 2)).double()
    x, whole = torch.stack([X, X * 2, X - 1], dim=1), TOKENS.clamp(min=0)
    with GradientAccountant(model) as accountant:
        with pytest.raises(ValueError, match="the model returned one that weights them in another way"):
            accountant.backward(model(x, TOKENS)[0] / divided)
        loss, logits = model(x, TOKENS)
        with pytest.raises(ValueError, match="the model returned one that weights them in another way"):
            accountant.backward(loss + logits.square().mean())  # with a term of one's own
        account = accountant.backward(model(x, whole)[0] / divided)
    assert_norms(account, model.l, lambda z, y: flat(z, y) / divided, x, whole, prefix="l.")


@pytest.mark.parametrize("model", [nn.Linear(3, 2), small()], ids=["linear", "layers"])
def test_a_gradient_penalty_by_autograd_is_refused(model: nn.Module) -> None:
    x = X.float().requires_grad_()
    with GradientAccountant(model) as accountant:
        out = model(x)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        penalty = slope.square().sum(1)
        for loss, reduction in ((out.sum() + penalty.sum(), "sum"), (out.sum(1) + penalty, "none")):
            with pytest.raises(ValueError, match=r"create_graph=True .* take them by torch\.func\.grad"):
                accountant.backward(loss, loss_reduction=reduction)
        with pytest.raises(RuntimeError, match=r"create_graph=True .* account the loss without the penalty"):
            penalty.sum().backward()
        assert all(p.grad is None for p in model.parameters())
        account = accountant.backward(out.sum(), loss_reduction="sum")
    assert_norms(account, model, lambda out, _: out.sum(), X.float(), LABELS)


@pytest.mark.filterwarnings("ignore:GradientAccountant. layers that are not covered")
@pytest.mark.parametrize("by_example", [False, True])
def test_a_gradient_penalty_by_functions_is_accounted(by_example: bool) -> None:
    body = net()

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        slope = torch.func.grad(lambda z: body(z).square().sum())
        slope = torch.func.vmap(slope)(x) if by_example else slope(x)
        return body(x).sum(1) + slope.square().sum(1)

    model = Model(forward, body=body)
    with GradientAccountant(model) as accountant:
        account = accountant.backward(model(X), loss_reduction="none")
    assert_norms(account, model, lambda out, _: out.sum(), X, LABELS)


class Inputs:
    """Holds tensors in a way that no accountant knows of."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


@pytest.mark.filterwarnings("ignore:GradientAccountant. layers that are not covered")
def test_inputs_of_an_unknown_class() -> None:
    body = net()
    model = Model(lambda m, inputs: m.body(inputs.x), body=body)
    with GradientAccountant(model) as accountant:
        with pytest.raises(ValueError, match=r"must be called with tensors, or tuples, lists, .* got Inputs; or give"):
            accountant.backward(F.cross_entropy(model(Inputs(X)), LABELS))
        assert all(p.grad is None for p in model.parameters())
        account = accountant.backward(F.cross_entropy(model(Inputs(X)), LABELS), batch_size=B)
        assert_norms(account, body, F.cross_entropy, X, LABELS, prefix="body.")
        losses = F.cross_entropy(model(Inputs(X)), LABELS, reduction="none")
        account = accountant.backward(losses, loss_reduction="none")
    assert_norms(account, body, F.cross_entropy, X, LABELS, prefix="body.")
