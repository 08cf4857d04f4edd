"""Cut a model: slices of its parameters, and something of PyTorch's own in the place of a dropout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from memloc_ext.nn.insert import DROPOUT, apply_dropout
from memloc_ext.nn.removal.recording import Value

_SIZES = {
    "out_features": 0,
    "in_features": 1,
    "num_features": 0,
    "out_channels": 0,
    "in_channels": 1,
    "groups": 0,
    "nx": 0,
    "nf": 1,
}
"""Attribute of a layer to the dimension of its weight that has this size, where several have; see `_resize`."""


def slice_parameters(model: nn.Module, values: dict[int, Value]) -> dict[str, dict[str, list[int]]]:
    """Take from parameters and buffers what may go; return the shapes of those that changed."""
    made: dict[int, Tensor] = {}
    changed: dict[str, dict[str, list[int]]] = {}
    for prefix, module in model.named_modules():
        shapes = {}
        held: dict[str, Any]
        for held in (module._parameters, module._buffers):
            for name, old in held.items():
                value = None if old is None else values.get(id(old))
                if old is None or value is None or all(keep.all() for keep in value.keep):
                    continue
                if id(old) not in made:
                    new = old.detach()
                    for dim, keep in enumerate(value.keep):
                        new = new.index_select(dim, torch.from_numpy(keep).nonzero()[:, 0].to(old.device))
                    parameter = isinstance(old, nn.Parameter)
                    made[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if parameter else new
                held[name] = made[id(old)]
                shapes[name] = {"before": list(old.shape), "after": list(made[id(old)].shape)}
        _resize(module, shapes)
        changed |= {f"{prefix}.{name}".lstrip("."): shape for name, shape in shapes.items()}
    return changed


def _resize(module: nn.Module, shapes: dict[str, dict[str, list[int]]]) -> None:
    """Set the attributes of a layer that say how large its parameters are."""
    sizes: dict[int, set[int]] = {}
    for shape in shapes.values():
        for before, after in zip(shape["before"], shape["after"], strict=True):
            sizes.setdefault(before, set()).add(after)
    for name, value in vars(module).items():
        if type(value) is not int or value not in sizes:
            continue
        after = sizes[value]
        if "weight" in shapes and name in _SIZES:
            dim = _SIZES[name]
            if getattr(module, "transposed", False) and dim < 2 and name != "groups":
                dim = 1 - dim
            if shapes["weight"]["before"][dim] == value:
                after = {shapes["weight"]["after"][dim]}
        if len(after) == 1:
            setattr(module, name, *after)


def swap(model: nn.Module, old: nn.Module, new: nn.Module | None) -> None:
    """Put a module in the place of another, wherever that is, or take it away."""
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child is old:
                if new is None:
                    del module._modules[name]
                else:
                    module._modules[name] = new


def remove(model: nn.Module, old: nn.Module, factor: Tensor | None) -> None:
    """Take a dropout away, or put a multiplication in its place."""
    holders = [module for module in model.modules() if module._modules.get(DROPOUT) is old]
    if not holders:  # it is called by the user's code
        swap(model, old, _multiplication(factor, "x", "example_ids"))
        return
    hooked = any(apply_dropout in module._forward_hooks.values() for module in holders)
    if factor is None:
        swap(model, old, None)
        return
    new = _multiplication(factor, *(("module", "args", "x") if hooked else ("x",)))
    swap(model, old, new)
    for module in holders if hooked else ():
        module.register_forward_hook(new)


def _multiplication(factor: Tensor | None, *inputs: str) -> fx.GraphModule:
    """Return a module of PyTorch alone that multiplies its input ``x``, if there is a factor."""
    graph, root = fx.Graph(), nn.Module()
    places = {
        name: graph.placeholder(name, **({"default_value": None} if name == "example_ids" else {})) for name in inputs
    }
    result = places["x"]
    if factor is not None:
        root.factor = nn.Buffer(factor)
        result = graph.call_function(torch.mul, (result, graph.get_attr("factor")))
    graph.output(result)
    return fx.GraphModule(root, graph, "Scale")


def forget(model: nn.Module) -> None:
    """Take off hooks and attributes of this library, such as a layout, so that the copy can be pickled for others."""
    library = __name__.partition(".")[0]
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if str(getattr(hook, "__module__", "")).partition(".")[0] == library:
                    del hooks[key]
                    module._forward_hooks_always_called.pop(key, None)
        for name, value in list(vars(module).items()):
            if type(value).__module__.partition(".")[0] == library:
                delattr(module, name)
