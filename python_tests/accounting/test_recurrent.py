"""Recurrent layers and cells."""

from typing import Any

import pytest
import torch
from accounted import Model, check, held, parameter, targets
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from memloc_ext import GradientAccountant

B = 2
KINDS: dict[str, Any] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "tanh": nn.RNN,
    "relu": lambda *sizes, **settings: nn.RNN(*sizes, nonlinearity="relu", **settings),
}
CELLS: dict[str, Any] = {
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
    "tanh": nn.RNNCell,
    "relu": lambda *sizes, **settings: nn.RNNCell(*sizes, nonlinearity="relu", **settings),
}


def everything(m: nn.Module, x: Tensor, state: Any = None) -> Tensor:
    """Return a part of all that a layer returns, by example."""
    out, last = m.r(x, state)
    out = out if m.r.batch_first else out.transpose(0, 1)
    ends = [t.transpose(0, 1).flatten(1) for t in (last if isinstance(last, tuple) else (last,))]
    return torch.cat([m.head(out[..., :1]).flatten(1), *ends], 1)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_layers(kind: str, batch_first: bool) -> None:
    torch.manual_seed(0)
    layer = KINDS[kind](3, 4, 2, batch_first=batch_first, bidirectional=batch_first, bias=not batch_first)
    x = torch.randn(B, 5, 3) if batch_first else torch.randn(5, B, 3)
    check(Model(everything, r=layer, head=nn.Linear(1, 2)), x, targets(B), batch_dim=0 if batch_first else 1)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_projected_states(bidirectional: bool) -> None:
    torch.manual_seed(0)
    layer = nn.LSTM(3, 4, 2, batch_first=True, bidirectional=bidirectional, proj_size=2)
    check(Model(everything, r=layer, head=nn.Linear(1, 2)), torch.randn(B, 3, 3))


def test_a_cell_with_biases_by_name_is_left_to_pytorch() -> None:
    torch.manual_seed(0)

    def run(m: nn.Module, x: Tensor) -> Tensor:
        r = m.r
        return torch.gru_cell(x, x.new_zeros(len(x), 4), r.weight_ih, r.weight_hh, b_ih=r.bias_ih, b_hh=r.bias_hh)

    names = {f"r.{name}" for name, _ in nn.GRUCell(3, 4).named_parameters()}
    check(Model(run, r=nn.GRUCell(3, 4)), torch.randn(B, 3), uncovered=names)


@settings(max_examples=20, deadline=None)
@given(
    kind=st.sampled_from([*KINDS]),
    layers=st.integers(1, 2),
    both=st.booleans(),
    batch=st.integers(1, 4),
    tokens=st.integers(1, 4),
    hidden=st.integers(1, 3),
    seed=st.integers(0, 999),
)
def test_sizes_that_coincide(
    kind: str, layers: int, both: bool, batch: int, tokens: int, hidden: int, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = KINDS[kind](2, hidden, layers, batch_first=True, bidirectional=both)
    model = Model(everything, r=layer, head=nn.Linear(1, 2)).double()
    check(model, torch.randn(batch, tokens, 2).double())


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_the_last_state_of_as_many_layers_as_examples(kind: str) -> None:
    torch.manual_seed(0)
    model = Model(
        lambda m, x: m.head(_state(m.r(x)[1])).sum(0), r=KINDS[kind](3, 4, B, batch_first=True), head=nn.Linear(4, 2)
    )
    check(model, torch.randn(B, 5, 3))


def _state(last: Tensor | tuple[Tensor, ...]) -> Tensor:
    return last[0] if isinstance(last, tuple) else last


@pytest.mark.parametrize("way", ["learned", "computed", "constant"])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_initial_states(kind: str, way: str) -> None:
    torch.manual_seed(0)

    def run(m: nn.Module, x: Tensor) -> Tensor:
        start = {
            "learned": lambda: m.start.expand(-1, len(x), -1).contiguous(),
            "computed": lambda: m.l(x[:, 0])[None].repeat(2, 1, 1),
            "constant": lambda: torch.ones(2, len(x), 4, dtype=x.dtype),
        }[way]()
        return everything(m, x, (start, start * 2) if kind == "lstm" else start)

    parts = {"start": parameter(2, 1, 4), "l": nn.Linear(3, 4), "head": nn.Linear(1, 2)}
    check(Model(run, r=KINDS[kind](3, 4, 2, batch_first=True), **parts), torch.randn(B, 5, 3))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind: str, bias: bool) -> None:
    torch.manual_seed(0)

    def run(m: nn.Module, x: Tensor) -> Tensor:
        state, outs = None if bias else m.start.expand(len(x), -1), []
        if state is not None and kind == "lstm":
            state = (state, state)
        for t in range(x.shape[1]):
            state = m.cell(x[:, t], state)
            outs.append(_state(state))
        return m.l(torch.stack(outs))[-1] + _state(state)[:, :2]

    model = Model(run, cell=CELLS[kind](3, 4, bias=bias), l=nn.Linear(4, 2), start=parameter(1, 4))
    check(model, torch.randn(B, 3, 3))


def test_dropout_between_layers_and_frozen_or_derived_weights() -> None:
    torch.manual_seed(0)
    layer = nn.LSTM(3, 4, 2, batch_first=True, dropout=0.5)
    layer.weight_ih_l1.requires_grad_(False)
    layer = parametrizations.weight_norm(layer, "weight_hh_l0")
    held(Model(everything, r=layer, head=nn.Linear(1, 2)).double().eval(), torch.randn(B, 5, 3).double())


@pytest.mark.parametrize("kind", KINDS)
def test_the_forward_pass_computes_the_same(kind: str) -> None:
    torch.manual_seed(0)
    layer, x = KINDS[kind](3, 4, 2, dropout=0.5, bidirectional=True), torch.randn(5, B, 3)
    for training in (False, True):
        layer.train(training)
        torch.manual_seed(1)
        eager = layer(x)
        torch.manual_seed(1)
        with GradientAccountant(layer, batch_dim=1):
            actual = layer(x)
        torch.testing.assert_close(actual, eager)
