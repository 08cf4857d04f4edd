"""Where the examples are in an activation: in which dimension, in what order, or nowhere."""

import warnings
from typing import Any

import pytest
import torch
from accounted import Model, account_of, check, parameter, targets, weighted
from torch import Tensor, nn
from torch.nn import functional as F

from memloc_ext import GradientAccountant

B, T = 4, 8  # as many tokens as examples, or twice as many, are not told from examples by their number
KEEP = torch.tensor([[1, 0, 0], [1, 1, 1], [1, 1, 0], [1, 1, 0]]).bool()  # 8 tokens of 4 examples


# what does not depend on the input: right, whether or not its size is that of the batch


class PlainPositions(nn.Module):
    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.table, self.indices = nn.Embedding(tokens, 3), torch.arange(tokens)  # no buffer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table(self.indices)


def distances(n: int) -> Tensor:
    return (torch.arange(n)[:, None] - torch.arange(n)).abs()


def _masked(n: int) -> nn.Module:
    mask = torch.rand(n, 3) > 0.5
    return Model(lambda m, x: F.linear(x, m.w * mask), w=parameter(1, 3))


def _noisy(n: int) -> nn.Module:
    noise = torch.randn(n, 3)
    return Model(lambda m, x: m.l(x) + noise.to(x.dtype) * m.c, l=nn.Linear(3, 3), c=parameter(3))


CONSTANT = {
    "linear of a buffer": lambda n: (
        Model(lambda m, x: m.l(x) + m.p(m.c), l=nn.Linear(3, 5), p=nn.Linear(2, 5), c=torch.randn(n, 2)),
        (B, n, 3),
    ),
    "linear of a parameter": lambda n: (
        Model(lambda m, x: m.l(x) + m.p(m.q.relu()), l=nn.Linear(3, 5), p=nn.Linear(2, 5), q=parameter(n, 2)),
        (B, n, 3),
    ),
    "layer norm of positions": lambda n: (
        Model(lambda m, x: x + m.n(m.e(torch.arange(n))), e=nn.Embedding(n, 3), n=nn.LayerNorm(3)),
        (B, n, 3),
    ),
    "relative positions": lambda n: (
        Model(lambda m, x: x + m.e(m.i).permute(2, 0, 1), e=nn.Embedding(9, 2), i=distances(n)),
        (B, 2, n, n),
    ),
    "relative positions, flat": lambda n: (
        Model(lambda m, x: x + m.t[m.i.view(-1)].view(n, n, 2).permute(2, 0, 1), t=parameter(9, 2), i=distances(n)),
        (B, 2, n, n),
    ),
    "positions from a plain attribute": lambda n: (PlainPositions(n), (B, n, 3)),
    "a number times a function of a parameter": lambda n: (
        Model(lambda m, x: x * (m.t * torch.softmax(m.v, 0)), t=parameter(1), v=parameter(n)),
        (B, n),
    ),
    "expanded over tokens": lambda n: (
        Model(lambda m, x: m.l(x) + m.c.expand(x.shape[1], 3).cumsum(0), l=nn.Linear(3, 3), c=parameter(1, 3)),
        (B, n, 3),
    ),
    "expanded over tokens, first": lambda n: (
        Model(lambda m, x: m.c.expand(x.shape[1], 3).cumsum(0) + m.l(x), l=nn.Linear(3, 3), c=parameter(1, 3)),
        (B, n, 3),
    ),
    "a layer's weight from a network": lambda n: (
        Model(lambda m, x: F.linear(x, m.h(m.z.relu())), h=nn.Linear(4, 3), z=parameter(n, 4)),
        (B, 3),
    ),
    "a product of matrices": lambda n: (
        Model(lambda m, x: F.linear(x, m.a.relu() @ m.b), a=parameter(n, 2), b=parameter(2, 3)),
        (B, 3),
    ),
    "normalised and scaled weight": lambda n: (
        Model(lambda m, x: F.linear(x, F.normalize(m.w) * m.s), w=parameter(n, 3), s=parameter(1)),
        (B, 3),
    ),
    "masked weight": lambda n: (_masked(n), (B, 3)),
    "a scaled plain tensor": lambda n: (_noisy(n), (B, n, 3)),
}


@pytest.mark.parametrize("tokens", [B, T, 7])
@pytest.mark.parametrize("name", CONSTANT)
def test_what_does_not_depend_on_the_input(name: str, tokens: int) -> None:
    torch.manual_seed(0)
    model, shape = CONSTANT[name](tokens)
    check(model, torch.randn(shape), uncovered=None, tell_batch=True)


ONE_ROW = {
    "linear": Model(lambda m, x: m.l(x) + m.p(m.q.relu()), l=nn.Linear(3, 5), p=nn.Linear(2, 5), q=parameter(1, 2)),
    "rounded": Model(lambda m, x: x * (m.w + (m.w.round() - m.w).detach()), w=parameter(1, 3)),
}


@pytest.mark.parametrize("name", ONE_ROW)
def test_a_layer_of_a_learned_constant_of_one_row(name: str) -> None:
    torch.manual_seed(0)
    check(ONE_ROW[name], torch.randn(B, 3), uncovered=None, tell_batch=True)


def test_a_first_layer_of_constants_does_not_tell_the_batch() -> None:
    torch.manual_seed(0)
    model = Model(lambda m, x: m.p(m.c).mean() + m.l(x), l=nn.Linear(3, 5), p=nn.Linear(2, 5), c=torch.randn(T, 2))
    account, _ = account_of(model, weighted, torch.randn(B, 3), targets(B))
    assert account.sqnorm["l.weight"].shape == (B,)


# rows that are not the examples in their order: right or refused


def chosen_by_value(m: nn.Module, x: Tensor) -> Tensor:
    keep = x[..., 0] > 0
    h = m.l(x)
    return torch.zeros_like(h).index_put((keep,), m.h(h[keep]))


def experts(m: nn.Module, x: Tensor) -> Tensor:
    tokens = x.flatten(0, 1)
    out = torch.zeros_like(tokens)
    for expert, here in ((m.l, tokens[:, 0] > 0), (m.h, tokens[:, 0] <= 0)):
        i = here.nonzero().flatten()
        out = out.index_add(0, i, expert(tokens[i]))
    return out.view_as(x)


def siamese(m: nn.Module, x: Tensor) -> Tensor:
    first, second = m.l(torch.cat([x[:, 0], x[:, 1]])).chunk(2)
    return first * second


ROWS = {
    "tokens chosen by value": chosen_by_value,
    "mixture of experts": experts,
    "two views in one batch": siamese,
    "reversed": lambda m, x: m.l(x.flip(0)).flip(0),
    "shuffled": lambda m, x: m.l(x.roll(1, 0)).roll(-1, 0),
    "tokens first, flat": lambda m, x: m.l(x.transpose(0, 1).flatten(0, 1)).view(x.shape[1], len(x), 3).transpose(0, 1),
    "tokens first, scale": lambda m, x: (x.repeat(1, 3, 1)[:, :T].transpose(0, 1) * m.g).transpose(0, 1),
    "features first, one number": lambda m, x: (x.repeat(1, 1, T)[:, 0, :T].t() * m.one).t(),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_that_are_not_the_examples(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(B, 3, 3)
    x[..., 0] = x[..., 0].abs() * (KEEP * 2 - 1)
    model = Model(ROWS[name], l=nn.Linear(3, 3), h=nn.Linear(3, 3), g=parameter(3), one=parameter(1))
    try:
        check(model, x, uncovered=None, tell_batch=True)
    except ValueError as error:
        assert str(error).startswith("GradientAccountant")  # noqa: PT017


# windows, repeats, batch_dim


def test_windows_of_as_many_tokens_as_examples() -> None:
    torch.manual_seed(0)

    def run(m: nn.Module, x: Tensor) -> Tensor:
        windows = x.unflatten(1, (2, B)).flatten(0, 1)
        return m.n(m.l(windows)).unflatten(0, (len(x), 2)).flatten(1, 2)

    check(Model(run, l=nn.Linear(3, 3), n=nn.LayerNorm(3)), torch.randn(B, 2 * B, 3), uncovered=None, tell_batch=True)


def test_repeat_copies() -> None:
    torch.manual_seed(0)

    def written(m: nn.Module, x: Tensor) -> Tensor:
        token = m.c.repeat(len(x), 1, 1)
        token += x
        return token

    check(Model(written, c=parameter(1, 2, 3)), torch.randn(B, 2, 3), uncovered=None, tell_batch=True)


def test_repeat_is_contiguous() -> None:
    torch.manual_seed(0)

    def viewed(m: nn.Module, x: Tensor) -> Tensor:
        return m.l(m.c.repeat(len(x), 1, 1).view(-1, 3)).view(len(x), -1) * x

    model = Model(viewed, c=parameter(1, 2, 3), l=nn.Linear(3, 1))
    check(model, torch.randn(B, 2), uncovered=None, tell_batch=True)


# [batch, features] behind the mean: the examples are in dimension 0, whatever batch_dim says of the inputs
def test_batch_dim_one_behind_a_mean_over_tokens() -> None:
    torch.manual_seed(0)
    model = Model(lambda m, x: m.h(m.l(x).mean(0)) * m.t, l=nn.Linear(3, 3), h=nn.Linear(3, T), t=parameter(1))
    check(model, torch.randn(5, B, 3), targets(B), batch_dim=1, uncovered=None)


def test_batch_dim_one_and_a_first_layer_behind_a_mean_over_tokens() -> None:
    torch.manual_seed(0)
    model = Model(lambda m, x: m.h(x.mean(0)), h=nn.Linear(3, T))
    check(model, torch.randn(5, B, 3), targets(B), batch_dim=1, uncovered=None)


@pytest.mark.parametrize("arguments", [{}, {"shared_inputs": ["at"]}, {"shared_inputs": [1], "check": "never"}])
def test_positions_among_the_inputs_of_as_many_tokens_as_examples(arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)

    class Positioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.p = nn.Embedding(9, 3), nn.Embedding(9, 3)

        def forward(self, ids: Tensor, at: Tensor) -> Tensor:
            return (self.e(ids) + self.p(at)).square()

    model, ids, at = Positioned(), torch.randint(9, (B, B)), torch.arange(B)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with GradientAccountant(model, **arguments) as accountant:
            account = accountant.backward(model(ids, at).sum(), loss_reduction="sum")
    own = [torch.autograd.grad(model(ids[b : b + 1], at).sum(), model.p.weight)[0].square().sum() for b in range(B)]
    torch.testing.assert_close(account.sqnorm["p.weight"], torch.stack(own))
    assert bool(caught) == (not arguments), "declared inputs need no pass per example"


def test_an_input_of_one_row_does_not_tell_the_batch() -> None:
    torch.manual_seed(0)
    model = Model(lambda m, at, x: m.l(x) + m.p(at), l=nn.Linear(3, 3), p=nn.Embedding(9, 3))
    with GradientAccountant(model) as accountant:
        account = accountant.backward(model(torch.arange(5)[None], torch.randn(B, 5, 3)).square().mean())
    assert account.sqnorm["p.weight"].shape == (B,)


@pytest.mark.parametrize("tokens", [B, 7])
def test_einsum_that_moves_the_examples(tokens: int) -> None:
    torch.manual_seed(0)
    model = Model(lambda m, x: m.l(torch.einsum("btd->tbd", x)).transpose(0, 1), l=nn.Linear(3, 2))
    check(model, torch.randn(B, tokens, 3))


def test_expanded_positions_are_covered() -> None:
    torch.manual_seed(0)
    model = Model(lambda m, x: x + m.p(torch.arange(5).expand(len(x), -1)), p=nn.Embedding(5, 3))
    check(model, torch.randn(B, 5, 3))


def test_several_rows_of_an_example_are_told_by_batch_size() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2), torch.randn(2 * B, 3)
    with GradientAccountant(model) as accountant:
        losses = model(x).square().sum(1).view(B, 2).sum(1)
        with pytest.raises(ValueError, match="batch_size"):
            accountant.backward(losses, loss_reduction="none", retain_graph=True)
        model.zero_grad()
        account = accountant.backward(losses, loss_reduction="none", batch_size=B)
    pairs = [torch.autograd.grad(model(x[2 * b : 2 * b + 2]).square().sum(), [model.weight])[0] for b in range(B)]
    torch.testing.assert_close(account.sqnorm["weight"], torch.stack(pairs).square().sum((1, 2)))
