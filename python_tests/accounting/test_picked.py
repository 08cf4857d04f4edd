"""Rows that are picked by index, by a mask, or by an order, as tokens are for an expert."""

from collections.abc import Callable

import pytest
import torch
from accounted import Model, account_of, check, held, parameter, targets, weighted
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from memloc_ext.reference.accounting import per_example_gradients, squared_norms

B = 3


def experts(m: nn.Module, tokens: Tensor, pick: Tensor) -> Tensor:
    """Run each expert on its tokens, as Hugging Face's mixtures do."""
    result = torch.zeros_like(tokens)
    for expert in pick.unique():
        (rows,) = torch.where(pick == expert)
        hidden = F.linear(m.norm(tokens[rows]), m.up[expert]).relu() * m.scale
        result.index_add_(0, rows, F.linear(hidden, m.down[expert], m.bias[expert]))
    return result


def mixture(m: nn.Module, x: Tensor) -> Tensor:
    tokens = x.flatten(0, 1)
    return experts(m, tokens, tokens[:, :2].argmax(-1)).view(x.shape) + x


def by_order(m: nn.Module, x: Tensor) -> Tensor:
    tokens = x.flatten(0, 1)
    pick, order = tokens[:, :2].argmax(-1).sort()
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order))
    out = m.norm(tokens[order]) * m.scale[:3] + m.bias[pick]
    return out[inverse].view(x.shape)


def grouped(m: nn.Module, x: Tensor) -> Tensor:
    tokens = x.flatten(0, 1)
    order = tokens[:, :2].argmax(-1).argsort()
    ends = torch.bincount(tokens[:, :2].argmax(-1), minlength=2).cumsum(0).int()
    out = F.grouped_mm(m.norm(tokens)[order], m.up.mT, offs=ends)
    return (out[order.argsort()]).view(*x.shape[:2], -1)


def masked(m: nn.Module, x: Tensor) -> Tensor:
    keep = x[..., 0] > -0.5
    out = torch.zeros_like(x)
    out[keep] = m.norm(x[keep])
    return out


def shuffled(m: nn.Module, x: Tensor) -> Tensor:
    order = x[:, 0, 0].argsort()
    out = m.norm(x[order] * m.scale[:3]).index_select(0, order.argsort())
    return torch.stack([F.linear(row, m.up[0]) for row in out])


def parts() -> dict:
    up, down, bias = parameter(2, 4, 3), parameter(2, 3, 4), parameter(2, 3)
    return {"norm": nn.LayerNorm(3), "up": up, "down": down, "bias": bias, "scale": parameter(4)}


COVERED = {"mixture": mixture, "by order": by_order, "masked": masked, "shuffled": shuffled}


@pytest.mark.parametrize("batch", [1, B])
@pytest.mark.parametrize("name", COVERED)
def test_picked(name: str, batch: int) -> None:
    torch.manual_seed(0)
    check(Model(COVERED[name], **parts()), torch.randn(batch, 5, 3))


def test_grouped_products() -> None:
    torch.manual_seed(0)
    model, x, y = Model(grouped, norm=nn.LayerNorm(8), up=parameter(2, 8, 8)), torch.randn(B, 6, 8), targets(B)
    exact = squared_norms(per_example_gradients(model, weighted, x, y))  # PyTorch has no such product in float64
    account, warned = account_of(model, weighted, x, y)
    assert not warned
    torch.testing.assert_close(account.sqnorm, exact)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 999), st.sampled_from([mixture, by_order, shuffled]))
def test_sizes_that_coincide(batch: int, tokens: int, seed: int, function: Callable) -> None:
    torch.manual_seed(seed)
    used = {mixture: ("norm", "up", "down", "bias", "scale"), by_order: ("norm", "bias", "scale")}
    names = used.get(function, ("norm", "up", "scale"))
    model = Model(function, **{name: part for name, part in parts().items() if name in names}).double()
    held(model, torch.randn(batch, tokens, 3).double())
