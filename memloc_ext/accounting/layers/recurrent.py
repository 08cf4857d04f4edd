"""Recurrent layers and cells: linear layers over time, whose gates' gradients take a loop."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memloc_ext.accounting.contributions import LinearContribution, Rows
from memloc_ext.accounting.example_axis import ExampleAxis
from memloc_ext.accounting.layers.elementwise import spread
from memloc_ext.accounting.layers.layer_function import Gradients, LayerFunction
from memloc_ext.accounting.tracer import Tracer
from memloc_ext.accounting.uses import ParameterView


@dataclass(eq=False, repr=False)
class Recurrent(LayerFunction):
    """One layer in one direction, of ``[tokens, batch, features]``.

    Its tensors are the input, the state ``[batch, hidden]``, the state of the cells or None, and the parameters.

    Attributes:
        weights: Of the tensors.
        axis: Of input and output.
        kind: ``lstm``, ``gru``, ``rnn_tanh`` or ``rnn_relu``.
    """

    kind: str

    def forward(self, x: Tensor, h: Tensor, c: Tensor | None, *weights: Tensor | None) -> Any:
        """Return the output, and the last state of the cells if there is one."""
        given = [w for w in weights if w is not None]
        state = h[None] if c is None else (h[None], c[None])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")
            settings = (weights[2] is not None, 1, 0.0, False, False, False)
            out, *last = getattr(torch._VF, self.kind)(x, state, given, *settings)
        out = out if c is None else (out, last[1][0])
        return out, (x, h, c, out if c is None else out[0], *weights)

    def backward(self, saved: Any, needs: Sequence[bool], grad: Tensor, *last: Tensor) -> Gradients:
        x, h, c, out, *weights = saved
        w_ih, w_hh, b_ih, b_hh, w_hr = weights
        before = torch.cat([h[None], out[:-1]])
        given, own = F.linear(x, w_ih, b_ih), F.linear(before, w_hh, b_hh)
        grad_c = projected = None
        if c is not None:
            gates, grad_h, grad_c, *projected = _lstm(given + own, c, grad, last[0], w_hh, w_hr)
            recurrent = gates
        elif self.kind == "gru":
            gates, recurrent, grad_h = _gru(given, own, before, grad, w_hh)
        else:
            slope = 1 - out.square() if self.kind == "rnn_tanh" else (out > 0).to(out.dtype)
            gates, grad_h = _simple(slope, grad, w_hh)
            recurrent = gates
        inputs = (x, before, None, None, projected[1] if projected else None)
        grads = (gates, recurrent, gates, recurrent, projected[0] if projected else None)
        recorded = [
            self._recorded(i + 3, source, g) if needed and g is not None else None
            for i, (needed, source, g) in enumerate(zip(needs[3:], inputs, grads, strict=True))
        ]
        return gates @ w_ih if needs[0] else None, grad_h, grad_c, *recorded

    def _recorded(self, index: int, source: Tensor | None, grad: Tensor) -> Tensor | None:
        g = self.examples(grad)
        if source is None:
            return self.record(index, Rows.of_positions(g))
        return self.record(index, LinearContribution(self.examples(source), g))


def _lstm(
    gates: Tensor, c: Tensor, grad: Tensor, grad_c: Tensor, w_hh: Tensor, w_hr: Tensor | None
) -> tuple[Tensor, ...]:
    """Return the gradients of gates, state and cells; of a projection its output's gradient and its input too."""
    i, f, g, o = gates.chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cells = [c]
    for gain, keep in zip(i * g, f, strict=True):
        cells.append(torch.addcmul(gain, keep, cells[-1]))
    before, tanh = torch.stack(cells[:-1]), torch.stack(cells[1:]).tanh()
    slopes = torch.stack([g * i * (1 - i), before * f * (1 - f), i * (1 - g * g), tanh * o * (1 - o)], 2)
    through, projected = o * (1 - tanh * tanh), torch.empty_like(grad) if w_hr is not None else None
    result, carried = torch.empty_like(slopes), torch.zeros_like(grad[0])
    for t in range(len(grad) - 1, -1, -1):
        dh = grad[t] + carried
        if w_hr is not None and projected is not None:
            projected[t] = dh
            dh = dh @ w_hr
        grad_c = torch.addcmul(grad_c, dh, through[t])
        torch.mul(slopes[t, :, :3], grad_c[:, None], out=result[t, :, :3])
        torch.mul(slopes[t, :, 3], dh, out=result[t, :, 3])
        carried, grad_c = result[t].flatten(1) @ w_hh, grad_c * f[t]
    more = () if projected is None else (projected, o * tanh)
    return result.flatten(2), carried, grad_c, *more


def _gru(given: Tensor, own: Tensor, before: Tensor, grad: Tensor, w_hh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the gates by the input's and by the state's part, and of the state."""
    (given_r, given_z, given_n), (own_r, own_z, own_n) = given.chunk(3, -1), own.chunk(3, -1)
    r, z = (given_r + own_r).sigmoid(), (given_z + own_z).sigmoid()
    n = (given_n + r * own_n).tanh()
    through = (1 - z) * (1 - n * n)
    slopes = torch.stack([through * own_n * r * (1 - r), (before - n) * z * (1 - z), through * r], 2)
    states, carried = torch.empty_like(grad), torch.zeros_like(grad[0])
    for t in range(len(grad) - 1, -1, -1):
        dh = torch.add(grad[t], carried, out=states[t])
        carried = torch.addmm(dh * z[t], (slopes[t] * dh[:, None]).flatten(1), w_hh)
    recurrent = slopes * states[:, :, None]
    gates = torch.cat([recurrent[:, :, :2].flatten(2), through * states], -1)
    return gates, recurrent.flatten(2), carried


def _simple(slope: Tensor, grad: Tensor, w_hh: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of what the activation is given, and of the state."""
    gates, carried = torch.empty_like(grad), torch.zeros_like(grad[0])
    for t in range(len(grad) - 1, -1, -1):
        carried = torch.mul(grad[t] + carried, slope[t], out=gates[t]) @ w_hh
    return gates, carried


def recurrent(tracer: Tracer, func: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Handle what `torch.nn.LSTM`, ``GRU`` and ``RNN`` call, of sequences that are not packed."""
    if len(args) != 9 or kwargs or not isinstance(args[2], list) or not args[0].numel():
        return NotImplemented
    input, state, flat, biased, layers, dropout, training, both, batch_first = args
    axis = tracer.axis(input)
    axis = axis and axis.prefer_dim(0 if batch_first else 1, input)
    if axis is None or axis.dim != (0 if batch_first else 1):
        return NotImplemented
    x, axis, directions = input.transpose(0, 1) if batch_first else input, replace(axis, dim=1), 1 + both
    each = _each(tracer, flat, layers * directions, biased)
    states = _states(tracer, state, axis)
    if each is None or states is None:
        return NotImplemented
    last: list[list[Tensor]] = [[] for _ in states]
    for layer in range(layers):
        outs = []
        for reverse in range(directions):
            k = layer * directions + reverse
            start = [s[k] for s in states]
            out, *now = _run(tracer, func.__name__, axis, x.flip(0) if reverse else x, start, *each[k])
            for ends, end in zip(last, (out[-1], *now), strict=True):
                ends.append(end)
            outs.append(out.flip(0) if reverse else out)
        x = torch.cat(outs, -1) if both else outs[0]
        if layer + 1 < layers:
            x = F.dropout(x, dropout, training)
    result = [x.transpose(0, 1) if batch_first else x, *map(torch.stack, last)]
    for t, dim in zip(result, (0 if batch_first else 1, 1, 1), strict=False):
        tracer.remember(t, replace(axis, dim=dim))
    return tuple(result)


def cell(tracer: Tracer, func: Any, /, input: Tensor, state: Any, *weights: Tensor, **kwargs: Any) -> Any:
    """Handle what `torch.nn.LSTMCell`, ``GRUCell`` and ``RNNCell`` call: a layer of one token."""
    axis = tracer.axis(input)
    axis = axis and axis.prefer_dim(0, input)
    if axis is None or axis.dim or not input.numel() or kwargs:
        return NotImplemented
    each, states = _each(tracer, weights, 1, len(weights) == 4), _states(tracer, state, axis)
    if each is None or states is None:
        return NotImplemented
    kind = func.__name__.removesuffix("_cell")
    out, *now = _run(tracer, kind, replace(axis, dim=1), input[None], states, *each[0])
    result = (out[0], *now)
    for t in result:
        tracer.remember(t, axis)
    return result if now else result[0]


_Parameters = tuple[list[Tensor | None], list[ParameterView | None]]


def _each(tracer: Tracer, flat: Sequence[Tensor | None], count: int, biased: bool) -> list[_Parameters] | None:
    """Return the parameters of each layer and direction; None if they cannot be accounted."""
    size, result = len(flat) // count, []
    for begin in range(0, len(flat), size):
        own = list(flat[begin : begin + size])
        biases, projection = (own[2:4], own[4:]) if biased else ([None, None], own[2:])
        given = [*own[:2], *biases, *(projection or [None])]
        weights = tracer.weights(*given)
        if weights is None:
            return None
        result.append((given, weights))
    return result


def _states(tracer: Tracer, state: Any, axis: ExampleAxis) -> list[Tensor] | None:
    """Return the initial states, each example's its own; None if that cannot be told."""
    states = [spread(tracer, t, axis) for t in ((state,) if isinstance(state, Tensor) else state)]
    return None if any(t is None for t in states) else [t for t in states if t is not None]


def _run(
    tracer: Tracer,
    kind: str,
    axis: ExampleAxis,
    x: Tensor,
    states: Sequence[Tensor],
    given: Sequence[Tensor | None],
    weights: Sequence[ParameterView | None],
) -> tuple[Tensor, ...]:
    """Return the output ``[tokens, batch, hidden]``, and of an LSTM the last state of the cells."""
    h, c = states if len(states) == 2 else (*states, None)
    out = Recurrent(tracer, [None, None, None, *weights], axis, kind)(x, h, c, *given)
    return out if isinstance(out, tuple) else (out,)
