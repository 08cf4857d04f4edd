"""Where a network can be switched off: which values of its recording hold the units of a site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from memloc_ext.ablation.recording import Call, Recording, Ref
from memloc_ext.ablation.rows import BATCH_NORMS, COPIES

HEADS = ".heads"  # ends the name of a site whose units are the attention heads of a module
_ATTENTION = "_scaled_dot_product"
_VIEWS = frozenset(("view", "_unsafe_view"))
_LINEAR = frozenset(("addmm", "mm"))
_LAYERS = _LINEAR | {"convolution", "bmm", "baddbmm"}
_TRANSPARENT = (nn.modules.dropout._DropoutNd, nn.Identity)  # return what they are given


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
            raise ValueError(
                "sites: the model has no convolution or hidden linear layer to switch off; name modules of it"
            )
    if isinstance(names, str) or len(set(names)) != len(names):
        raise ValueError(f"sites must be a list of different module names, got {names!r}")
    if not names:
        raise ValueError("sites must name at least one module, got none")
    return sorted((_site(model, recording, name) for name in names), key=lambda site: site.values[0])


def default_sites(model: nn.Module, recording: Recording) -> list[str]:
    """Name every convolution block's output, every hidden linear layer, and all attention heads.

    A block is a convolution and the normalisation and activations that only it goes through. A linear layer is hidden
    if another layer reads, directly or not, what it computes. Where linear layers compute what another is given,
    through operators on single elements, also gates, the site is that; else it is the layer with what only it goes
    through. It is named by the outermost module that returns it and is called once, dropouts apart; where no module
    does, by the last one that returned what it is computed from, or one of the factors.
    """
    modules, names = dict(model.named_modules()), dict[int, str]()
    for name, values in sorted(recording.returned.items(), key=lambda item: -len(item[0])):
        if len(values) == 1 and values[0] is not None and name and not isinstance(modules[name], _TRANSPARENT):
            names[values[0]] = name
    flow, found = _Flow(recording, names), list[str | None](attention(recording))
    covered = set[int]()
    for call in recording.calls:
        if call.name == "convolution":
            found.append(flow.last_name(call.outputs[0]))
        elif _is_linear(call):
            name, region = flow.hidden_units(call.refs[0])
            found.append(name)
            covered |= region if name is not None else set()
    for call in filter(_is_linear, recording.calls):
        if call.outputs[0] not in covered and flow.is_hidden(call.outputs[0]):
            found.append(flow.layer_name(call))
    return [name for name in dict.fromkeys(found) if name is not None]


class _Flow:
    """Follows values through operators on single elements; knows the names of modules that return some of them."""

    def __init__(self, recording: Recording, names: dict[int, str]) -> None:
        self.recording, self.names = recording, names
        self.readers, self.writer = recording.readers(), recording.writer()
        self._read_on = set[int]()  # values that layers depend on
        for call in reversed(recording.calls):
            if call.name in _LAYERS or call.name.startswith(_ATTENTION) or not self._read_on.isdisjoint(call.outputs):
                self._read_on.update(call.refs)

    def last_name(self, value: int) -> str | None:
        """Return the last name of what only one value goes through; None if that is the model's output."""
        best = self.names.get(value)
        while len(self.readers[value]) == 1:
            reader = self.recording.calls[self.readers[value][0]]
            if not _is_local(reader):
                break
            value = reader.outputs[0]
            best = self.names.get(value, best)
        return None if value in self.recording.outputs else best

    def is_hidden(self, value: int) -> bool:
        """Return whether a layer reads a value, or what is computed from it."""
        return value in self._read_on

    def layer_name(self, call: Call) -> str | None:
        """Return the last name of what only a linear layer's output goes through, or the name of a repeated layer."""
        value, best = call.outputs[0], None
        units = self.recording.shapes[value][-1]
        while self.recording.shapes[value][-1:] == (units,):
            repeated = value in self.recording.returned.get(call.module, ())
            best = self.names.get(value, best or (call.module if repeated else None))
            reader = self.recording.calls[self.readers[value][0]] if len(self.readers[value]) == 1 else None
            if reader is None or not (_is_local(reader) or reader.name in _VIEWS):
                break
            value = reader.outputs[0]
        return best

    def hidden_units(self, value: int) -> tuple[str | None, set[int]]:
        """Return the site of what a linear layer is given, and what it is computed from, back to linear layers.

        There is none if something else computes it, or reads it.
        """
        region, todo = set[int](), [value]
        while todo:
            v = todo.pop()
            if v in region:
                continue
            region.add(v)
            if v not in self.writer:
                return None, region
            call = self.recording.calls[self.writer[v]]
            if call.name not in _LINEAR:
                if not (_is_elementwise(call) or call.name in _VIEWS):
                    return None, region
                todo += call.refs
        for v in region:
            calls = [self.recording.calls[i] for i in self.readers[v]]
            inside = {call.name for call in calls} <= _LINEAR if v == value else self._results(calls) <= region
            if not inside or v in self.recording.outputs:
                return None, region
        return self._name(value), region

    def _results(self, calls: Sequence[Call]) -> set[int]:
        """Return what calls return that is read."""
        read = {*self.recording.outputs, *(v for v, readers in enumerate(self.readers) if readers)}
        return {v for call in calls for v in call.outputs if v in read}

    def _name(self, value: int) -> str | None:
        """Return the name of a value, else of the one it is computed from, else of a factor of it."""
        call = self.recording.calls[self.writer[value]]
        if value in self.names or call.name in _LINEAR:
            return self.names.get(value)
        refs = list(dict.fromkeys(call.refs))
        names = [self._name(ref) for ref in refs] if len(refs) == 1 or call.name == "mul" else []
        return next((name for name in names if name is not None), None)


def attention(recording: Recording) -> dict[str, list[int]]:
    """Return the sites of attention heads, with what each attention returns."""
    found: dict[str, list[int]] = {}
    for call in recording.calls:
        if call.name.startswith(_ATTENTION):
            found.setdefault(call.module + HEADS, []).append(call.outputs[0])
    return found


def producer(recording: Recording, site: Site) -> Call:
    """Return the convolution or matrix product that alone computes a site, through operators on its channels only.

    Raises:
        ValueError: If there is none.
    """
    writer, value = recording.writer(), site.values[0]
    while len(site.values) == 1 and value in writer:
        call = recording.calls[writer[value]]
        if call.name == "convolution" or call.name in _LINEAR:
            return call
        if not (_is_local(call) or call.name in _VIEWS):
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


def _is_linear(call: Call) -> bool:
    """Return whether a call multiplies activations by constant weights."""
    return call.name in _LINEAR and len(call.refs) == 1 and isinstance(call.args[-2], Ref)


def _is_elementwise(call: Call) -> bool:
    """Return whether a call keeps channels apart."""
    return call.is_pointwise or call.name in BATCH_NORMS or call.name in COPIES


def _is_local(call: Call) -> bool:
    """Return whether a call keeps channels apart and reads nothing else that depends on the example."""
    return len(call.refs) == 1 and _is_elementwise(call)


def _site(model: nn.Module, recording: Recording, name: str) -> Site:
    if name.endswith(HEADS):
        module = name.removesuffix(HEADS)
        values = tuple(attention(recording).get(name, ()))
        if not values:
            raise ValueError(f"sites: {module} calls no scaled_dot_product_attention, got {name}")
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
    dim = recording.dims[name]
    return Site(name, values, dim, shape[dim])
