"""Where a network can be switched off: which values of its recording hold the units of a site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memloc_ext.nn.ablation.recording import Call, Recording
from memloc_ext.nn.ablation.rows import BATCH_NORMS

HEADS = ".heads"  # ends the name of a site whose units are the attention heads of a module
_ATTENTION = "_scaled_dot_product"
_LOCAL = frozenset(("clone", "_to_copy", "alias", "detach"))
_POOLING = ("max_pool", "avg_pool", "_adaptive_avg_pool", "adaptive_max_pool", "squeeze", "unsqueeze")  # channels stay


@dataclass(frozen=True)
class Site:
    """The units of a module.

    Attributes:
        name: Of the module; of the module and ``.heads`` for its attention heads.
        values: Of the recording, one per call of the module.
        dim: Of the values, that holds the units.
        units: How many.
    """

    name: str
    values: tuple[int, ...]
    dim: int
    units: int


def find_sites(model: nn.Module, recording: Recording, names: Sequence[str] | None) -> list[Site]:
    """Return the sites of these names, or all that `default_sites` names, in the order in which they are computed.

    Raises:
        ValueError: If there is no such module, it was not called, or it does not return one tensor of channels.
    """
    if names is None:
        names = default_sites(model, recording)
        if not names:
            raise ValueError("sites: the model has no convolution or hidden linear layer to switch off")
    if isinstance(names, str) or len(set(names)) != len(names):
        raise ValueError(f"sites must be a list of different module names, got {names!r}")
    if not names:
        raise ValueError("sites must name at least one module, got none")
    return sorted((_site(model, recording, name) for name in names), key=lambda site: site.values[0])


def default_sites(model: nn.Module, recording: Recording) -> list[str]:
    """Name every convolution block's output, every linear layer that feeds another, and all attention heads.

    A block is a layer and the normalisation and activations that only it goes through; its site is named by the
    outermost module that returns that value and is called once.
    """
    names: dict[int, str] = {}
    for name, values in recording.returned.items():
        if len(values) == 1 and values[0] is not None and name:
            names.setdefault(values[0], name)
            if len(name) < len(names[values[0]]):
                names[values[0]] = name
    readers, found = recording.readers(), []
    for call in recording.calls:
        if call.name.startswith(_ATTENTION) or not call.outputs or call.outputs[0] < 0:
            if call.name.startswith(_ATTENTION):
                found.append(call.module + HEADS)
            continue
        convolution = call.name == "convolution"
        if not convolution and call.name not in ("addmm", "mm"):
            continue
        value, best = call.outputs[0], names.get(call.outputs[0])
        while len(readers[value]) == 1:
            reader = recording.calls[readers[value][0]]
            if not (_is_local(reader) or (not convolution and reader.name in ("view", "_unsafe_view"))):
                break
            value = reader.outputs[0]
            best = names.get(value, best)
        feeds_linear = {recording.calls[i].name for i in readers[value]} <= {"addmm", "mm"} and readers[value]
        if best is not None and value != recording.output and (convolution or feeds_linear):
            found.append(best)
    return list(dict.fromkeys(found))


def producer(recording: Recording, site: Site) -> Call:
    """Return the convolution or matrix product that alone computes a site, through operators on its channels only.

    Raises:
        ValueError: If there is none.
    """
    writer, value = recording.writer(), site.values[0]
    while len(site.values) == 1 and value in writer:
        call = recording.calls[writer[value]]
        if call.name in ("convolution", "addmm", "mm"):
            return call
        if not (_is_local(call) or call.name in ("view", "_unsafe_view")):
            break
        value = call.refs[0]
    raise ValueError(
        f"how='filter' and changes of weights need sites that one convolution or linear layer computes; "
        f"{site.name} is computed by several"
    )


def is_alone(recording: Recording, call: Call) -> bool:
    """Return whether no other call than this convolution or matrix product uses its weight."""
    places = {"convolution": 1, "addmm": 2, "mm": 1}
    weight = call.args[places[call.name]]
    return sum(any(_same(t, weight) for t in other.leaves) for other in recording.calls) == 1


def _same(t: object, weight: object) -> bool:
    return isinstance(t, Tensor) and isinstance(weight, Tensor) and t.data_ptr() == weight.data_ptr()


def _is_local(call: Call) -> bool:
    """Return whether a call keeps channels apart and reads nothing else that depends on the example."""
    pointwise = torch.Tag.pointwise in getattr(call.function, "tags", ())
    return len(call.refs) == 1 and (pointwise or call.name in BATCH_NORMS or call.name in _LOCAL)


def _site(model: nn.Module, recording: Recording, name: str) -> Site:
    if name.endswith(HEADS):
        module = name.removesuffix(HEADS)
        heads = [c for c in recording.calls if c.module == module and c.name.startswith(_ATTENTION)]
        if not heads:
            raise ValueError(f"sites: {module} calls no scaled_dot_product_attention, got {name}")
        values = tuple(call.outputs[0] for call in heads)
        return Site(name, values, 1, recording.shapes[values[0]][1])
    modules = dict(model.named_modules())
    if name not in modules or not name:
        raise ValueError(f"sites must be names of the model's modules, got {name!r}")
    returned = recording.returned.get(name)
    if not returned:
        raise ValueError(f"sites: {name} is not called when the model is")
    if any(value is None for value in returned):
        raise ValueError(f"sites: {name} must return one tensor that depends on the input")
    values = tuple(value for value in returned if value is not None)
    shapes = {recording.shapes[value] for value in values}
    if len(shapes) > 1:
        raise ValueError(f"sites: {name} must return the same shape whenever it is called, got {sorted(shapes)}")
    shape = shapes.pop()
    if len(shape) < 2:
        raise ValueError(f"sites: {name} must return [batch, channels, *] or [batch, *, channels], got {list(shape)}")
    dim = _channel_dim(recording, values[0])
    return Site(name, values, dim, shape[dim])


def _is_of_last(call: Call) -> bool:
    """Return whether a layer norm is of the last dimension alone."""
    shape: Any = call.args[1]
    return len(shape) == 1


def _channel_dim(recording: Recording, value: int) -> int:
    """Return the dimension of the channels: where the layer that computes a value puts them, else 1 of images."""
    writer, rank, pooled = recording.writer(), len(recording.shapes[value]), False
    while value in writer:
        call = recording.calls[writer[value]]
        if call.name in ("convolution", "native_group_norm") or call.name in BATCH_NORMS:
            return 1
        if not pooled and (call.name in ("addmm", "mm") or (call.name == "native_layer_norm" and _is_of_last(call))):
            return rank - 1
        pooled = pooled or call.name.startswith(_POOLING)
        if not (_is_local(call) or call.name in ("view", "_unsafe_view") or call.name.startswith(_POOLING)):
            break
        value = call.refs[0]
    return 1 if rank in (4, 5) else rank - 1
