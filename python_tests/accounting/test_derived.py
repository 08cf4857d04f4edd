"""Tensors that are computed from parameters alone, and meet examples like a parameter."""

import gc
import weakref

import pytest
import torch
from accounted import Model, account_of, assert_same, check, grads, held, parameter, targets, weighted
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from memloc_ext import GradientAccountant
from memloc_ext.reference.accounting import per_example_gradients

B = 4  # many sizes below are equal to it
APART = torch.arange(B) - torch.arange(B)[:, None] + 3


class Doubled(torch.autograd.Function):
    """Cannot be batched by `torch.vmap`."""

    @staticmethod
    def forward(ctx, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        return w.square()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (w,) = ctx.saved_tensors
        return torch.from_numpy(2 * grad.detach().numpy() * w.numpy())


class Adapted(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w + 0.5 * self.b @ self.a

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.a, self.b = parameter(2, inputs), parameter(outputs, 2)


def adapted() -> nn.Module:
    layer = nn.Linear(3, 5)
    layer.weight.requires_grad_(False)
    parametrize.register_parametrization(layer, "weight", Adapted(5, 3))
    return layer


def dora(m: nn.Module, x: Tensor) -> Tensor:
    w = m.l.weight + m.b @ m.a
    scale = m.magnitude / w.norm(dim=1).detach()
    return F.linear(x, scale[:, None] * w, m.l.bias)


def attention_with_table(m: nn.Module, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
    bias = m.table[m.index.view(-1)].view(B, B, 2).permute(2, 0, 1).contiguous()
    return (q @ k.transpose(-1, -2) + bias.unsqueeze(0)).softmax(-1) @ v


def mamba(m: nn.Module, x: Tensor) -> Tensor:
    delta = F.softplus(m.l(x))
    state, outs = x.new_zeros(len(x), 3, 2), []
    decay = torch.exp(-torch.exp(m.a_log)[None, None] * delta[..., None])
    for t in range(x.shape[1]):
        state = decay[:, t] * state + (delta[:, t] * x[:, t])[..., None]
        outs.append(state.sum(-1) + x[:, t] * m.d)
    return torch.stack(outs, 1)


def _linear(**more: nn.Parameter) -> dict:
    return {"l": nn.Linear(3, 3), **more}


DERIVED = {
    "weight norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 5)), nn.Linear(5, 2)), (B, 3)),
    "spectral norm": (
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(2, 3, 2, bias=False)), nn.BatchNorm2d(3)),
        (B, 2, 3, 3),
    ),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(3, 3)), (B, 3)),
    "standardised weight": (
        lambda: Model(lambda m, x: F.conv2d(x, F.layer_norm(m.c.weight, (2, 3, 3))), c=nn.Conv2d(2, 3, 3, bias=False)),
        (B, 2, 4, 4),
    ),
    "complex view": (
        lambda: Model(
            lambda m, x: torch.view_as_real(torch.fft.rfft(x) * torch.view_as_complex(m.w)).flatten(1),
            w=parameter(3, 2),
        ),
        (B, B),
    ),
    "product of parameters": (lambda: Model(lambda m, x: x * (m.a * m.b), a=parameter(3), b=parameter(3)), (B, 3)),
    "merged adapter": (adapted, (B, 5, 3)),
    "dora": (lambda: Model(dora, **_linear(a=parameter(2, 3), b=parameter(3, 2), magnitude=parameter(3))), (B, 3)),
    "scaled rows": (lambda: Model(lambda m, x: F.linear(x, m.w * m.s), w=parameter(3, 3), s=parameter(3)), (B, 3)),
    "a bias of a bias": (lambda: Model(lambda m, x: F.linear(x, m.l.weight, 2 * m.l.bias), **_linear()), (B, 3)),
    "relative positions": (
        lambda: Model(attention_with_table, qkv=nn.Linear(3, 12), table=parameter(7, 2), index=APART),
        (B, B, 3),
    ),
    "relative positions, an embedding": (
        lambda: Model(lambda m, x: x[:, None] + m.e(APART).permute(2, 0, 1)[None, :, :, :3], e=nn.Embedding(7, 2)),
        (B, B, 3),
    ),
    "positions of every example": (
        lambda: Model(lambda m, x: x + m.e(torch.arange(5).expand(len(x), -1) + 2), e=nn.Embedding(9, 3)),
        (B, 5, 3),
    ),
    "interpolated positions": (
        lambda: Model(lambda m, x: x + F.interpolate(m.p, 5, mode="linear").mT, p=parameter(1, 3, 3)), (B, 5, 3)
    ),
    "selective state space": (lambda: Model(mamba, **_linear(a_log=parameter(3, 2), d=parameter(3))), (B, B, 3)),
    "a network of a parameter": (
        lambda: Model(lambda m, x: x * m.l(m.code).tanh(), **_linear(code=parameter(1, 3))), (B, 3)
    ),
    "a network of constants": (lambda: Model(lambda m, x: x @ m.l(m.c).T, **_linear(c=torch.randn(B, 3))), (B, 3)),
    "one step at a time": (
        lambda: Model(lambda m, x: F.linear(F.linear(x, m.w * m.g), m.w * m.g), w=parameter(3, 3), g=parameter(3, 1)),
        (B, 3),
    ),
    "derived and plain": (
        lambda: Model(lambda m, x: F.linear(m.l(x), m.l.weight.tanh()) + m.l.weight[0], **_linear()), (B, 3)
    ),
    "a loop, not a batch": (lambda: Model(lambda m, x: x * Doubled.apply(m.w), w=parameter(3)), (B, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", DERIVED)
def test_derived(name: str) -> None:
    torch.manual_seed(0)
    factory, shape = DERIVED[name]
    check(factory().eval(), torch.randn(shape))


def test_weight_norm_by_hooks() -> None:
    torch.manual_seed(0)
    held(nn.utils.weight_norm(nn.Conv1d(3, 2, 2), dim=None).double(), torch.randn(B, 3, 5).double())


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 3),
    width=st.integers(1, 3),
    rank=st.integers(1, 2),
    groups=st.integers(1, 3),
    seed=st.integers(0, 999),
)
def test_sizes_that_coincide(batch: int, tokens: int, width: int, rank: int, groups: int, seed: int) -> None:
    torch.manual_seed(seed)

    def run(m: nn.Module, x: Tensor) -> Tensor:
        h = F.linear(x, m.w + m.b @ m.a) * m.scale.exp() + m.positions[m.index] * m.scale
        return torch.cat([(m.token * m.scale).tile(len(x), 1, 1), h], 1)

    parts = {"w": parameter(width, width), "a": parameter(rank, width), "b": parameter(width, rank)}
    more = {"scale": parameter(width), "positions": parameter(3, width), "token": parameter(1, 1, width)}
    model = Model(run, **parts, **more, index=torch.randint(3, (tokens,))).double()
    ids = torch.randint(groups, (batch,))
    x = torch.randn(batch, tokens, width).double()
    account = held(model, x, group_ids=ids, num_groups=groups)
    exact = per_example_gradients(model, weighted, x, targets(batch).double())
    for name, g in exact.items():
        for k in range(groups):
            torch.testing.assert_close(account.group_grad[name][k], g[ids == k].sum(0) / batch)


# tokens that are the same for all examples


TOKENS = {
    "expand": lambda m, x: torch.cat([(m.token + m.row).expand(len(x), -1, -1), x], 1),
    "repeat": lambda m, x: torch.cat([(m.token + m.row).repeat(len(x), 1, 1), x], 1),
    "tile": lambda m, x: torch.cat([m.token.tile(len(x), 1, 1), x * m.row], 1),
    "tile, fewer dimensions": lambda m, x: torch.cat([m.row.tile((len(x), B, 1)), m.token * x], 1),
    "repeat_interleave": lambda m, x: torch.cat([m.token.repeat_interleave(len(x), 0), x + m.row], 1),
    "stack": lambda m, x: torch.stack([m.row.expand(len(x), -1), x[:, 0] * m.token[0]], 1),
    "stack of copies": lambda m, x: torch.cat([torch.stack([m.token[0]] * len(x)), x * m.row], 1),
    "last": lambda m, x: torch.cat([x * m.row, m.token.expand(len(x), 1, 3)], dim=-2),
    "added to zeros": lambda m, x: x + (x.new_zeros(len(x), 1, 3) + m.token + m.row),
    "with positions of their own": lambda m, x: torch.cat([m.token.repeat(len(x), 1, 1) * m.row, x], 1),
}


@pytest.mark.parametrize("batch", [1, B])
@pytest.mark.parametrize("name", TOKENS)
def test_tokens(name: str, batch: int) -> None:
    torch.manual_seed(0)
    model = Model(TOKENS[name], token=parameter(1, 1, 3), row=parameter(3)).double()
    held(model, torch.randn(batch, B, 3).double(), batch_size=batch)


# surroundings


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    def block(m: nn.Module, x: Tensor) -> Tensor:
        return F.dropout(m.a(m.norm(x)), 0.4).relu() * (m.row * 2)

    def model(*, checkpointed: bool) -> nn.Module:
        def run(m: nn.Module, x: Tensor) -> Tensor:
            h = m.stem(x)
            return m.head(checkpoint(block, m, h, use_reentrant=reentrant) if checkpointed else block(m, h))

        torch.manual_seed(0)
        parts = {"stem": nn.Linear(3, 3), "norm": nn.LayerNorm(3), "row": parameter(3), "head": nn.Linear(5, 2)}
        return Model(run, a=parametrizations.weight_norm(nn.Linear(3, 3)), **parts | {"head": nn.Linear(3, 2)})

    x, accounts = torch.randn(B, 5, 3), []
    plain, saved = model(checkpointed=False), model(checkpointed=True)
    for m in (plain, saved):
        torch.manual_seed(1)
        account, warned = account_of(m, weighted, x, targets(B), group_ids=torch.tensor([0, 1, 1, 0]))
        assert not warned
        accounts.append(account)
    assert_same(*accounts)
    for name, p in plain.named_parameters():
        torch.testing.assert_close(accounts[1].group_grad[name], accounts[0].group_grad[name])
        torch.testing.assert_close(grads(saved)[name], p.grad)


def test_a_second_use_that_reentrant_checkpointing_hides_is_refused() -> None:
    torch.manual_seed(0)

    def run(m: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(lambda h: m.n(h * (2 * m.n.weight)), m.l(x), use_reentrant=True)

    model = Model(run, l=nn.Linear(3, 3), n=nn.LayerNorm(3))
    with pytest.raises(ValueError, match="use_reentrant=False"):
        account_of(model, weighted, torch.randn(B, 3), targets(B))


def test_exact_groups_and_uncovered_uses() -> None:
    torch.manual_seed(0)

    def run(m: nn.Module, x: Tensor) -> Tensor:
        return F.linear(x, m.w * m.g) + torch.hypot(x, m.w[0])

    model, x, ids = Model(run, w=parameter(3, 3), g=parameter(3)), torch.randn(B, 3), torch.tensor([0, 1, 1, 2])
    check(model, x, uncovered={"w"})
    expected, _ = account_of(model, weighted, x, targets(B), group_ids=ids)
    account, _ = account_of(model, weighted, x, targets(B), group_ids=ids, exact_groups=True)
    torch.testing.assert_close(account.group_grad, expected.group_grad)


def test_backward_passes_that_nobody_accounts_and_those_of_a_graph_that_is_kept() -> None:
    torch.manual_seed(0)
    model, x = adapted(), torch.randn(B, 3)
    with GradientAccountant(model) as accountant:
        loss = model(x).square().sum()
        loss.backward(retain_graph=True)
        plain = grads(model)
        accounts = [accountant.backward(loss, loss_reduction="sum", retain_graph=True) for _ in range(2)]
    assert_same(*accounts)
    model.zero_grad()
    model(x).square().sum().backward()
    expected = grads(model)
    for name, g in plain.items():
        torch.testing.assert_close(g, expected[name])


def test_hooks_see_the_gradient_of_the_batch_alone() -> None:
    torch.manual_seed(0)
    model, x, seen = adapted(), torch.randn(B, 3), []
    a = next(p for p in model.parameters() if p.requires_grad and p.shape == (2, 3))
    a.register_hook(lambda grad: seen.append(grad.clone()))
    account_of(model, weighted, x, targets(B))
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], a.grad)


def test_other_tensors_that_want_a_gradient() -> None:
    torch.manual_seed(0)
    model, x, code = Model(lambda m, x, c: x * (m.w * c), w=parameter(3)), torch.randn(B, 3), torch.randn(3)
    code.requires_grad_()
    (expected,) = torch.autograd.grad(model(x, code).square().sum(), [code])
    for weight_grads in (False, True):
        code.grad = None
        with GradientAccountant(model) as accountant:
            accountant.backward(model(x, code).square().sum(), loss_reduction="sum", weight_grads=weight_grads)
        torch.testing.assert_close(code.grad, expected)


def test_a_tensor_that_is_changed_in_place_between_its_uses() -> None:
    torch.manual_seed(0)

    def run(m: nn.Module, x: Tensor) -> Tensor:
        w = m.w * 2
        first = x + w
        w.mul_(m.w)
        return first * w

    check(Model(run, w=parameter(3)), torch.randn(B, 3))


def test_nothing_is_kept_after_a_backward_pass() -> None:
    model, x, made = adapted(), torch.randn(B, 3), []

    class Noted(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            w = w * 2
            made.append(weakref.ref(w))
            return w

    parametrize.register_parametrization(model, "weight", Noted())
    with GradientAccountant(model) as accountant:
        accountant.backward(model(x).square().sum(), loss_reduction="sum")
        gc.collect()
        assert made[-1]() is None
