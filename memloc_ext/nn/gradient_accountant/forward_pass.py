"""One call of the model: what it was given and returned, and the same call for one example alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from memloc_ext.nn.gradient_accountant.layout import Layout

_PLAIN = frozenset((type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size, slice, type(...)))
_AGREEMENT = {torch.float64: 1e-9, torch.float32: 1e-4}  # of outputs, relative to the largest; else 0.05


class ForwardPass:
    """One call of the model.

    Args:
        model: That is called.
        args: Arguments.
        kwargs: Arguments by name.
        batch_dim: Dimension of the examples in ``args`` and ``kwargs``.
        shared: Inputs, by their ``id``, that are the same for all examples.

    Attributes:
        inputs: Tensors that may have a row, or several, for each example.
        sizes: Their numbers of rows.
        rows: The number that was taken for that of the examples.
        outputs: What it returned that depends on a parameter, but for single numbers.
        numbers: Single numbers that it returned and that depend on a parameter, as losses.
    """

    def __init__(self, model: nn.Module, args: Any, kwargs: Any, batch_dim: int, shared: set[int]) -> None:
        self.model, self.args, self.kwargs, self.batch_dim = model, args, kwargs, batch_dim
        self.inputs = [t for t in tensors((args, kwargs)) if t.dim() > batch_dim and id(t) not in shared]
        self.sizes = [t.shape[batch_dim] for t in self.inputs]
        self.rows: int | None = None
        self.outputs: list[Tensor] = []
        self.numbers: list[Tensor] = []
        device = self.inputs[0].device.type if self.inputs else "cpu"
        self.autocast = (device, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None

    def returned(self, output: object) -> None:
        """Take note of what the model returned."""
        self.outputs, self.numbers = _returned(output)

    def alone(self, example: int, batch: int) -> tuple[list[Tensor], list[Tensor]] | None:
        """Run the model on one example; return its outputs and numbers, or None if that cannot be done."""
        if any(t.grad_fn is not None for t in tensors((self.args, self.kwargs))):
            return None  # what was computed with parameters before is part of the gradient
        sizes = {id(t): size for t, size in zip(self.inputs, self.sizes, strict=True)}

        def part(t: Tensor) -> Tensor:
            rows, left = divmod(sizes.get(id(t), 1), batch)
            return t if left or not rows else t.detach().narrow(self.batch_dim, example * rows, rows)

        model = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
        try:
            with ExitStack() as stack:
                stack.enter_context(torch.enable_grad())
                if self.autocast is not None:
                    stack.enter_context(torch.autocast(self.autocast[0], self.autocast[1]))
                args, kwargs = mapped((self.args, self.kwargs), part)
                return _returned(model(*args, **kwargs))
        except Exception:  # a model that takes whole batches only
            return None

    def agrees(self, index: int, alone: Tensor, layout: Layout, example: int) -> bool:
        """Return whether an output of an example alone is its part of the batch's."""
        own = layout.alone()
        if alone.dim() != self.outputs[index].dim() or alone.shape[layout.dim] != own.size:
            return False
        expected, actual = layout.first(self.outputs[index].detach())[example], own.first(alone.detach())[0]
        if expected.shape != actual.shape:
            return False
        scale = expected.abs().nan_to_num(0, 0, 0).amax() if expected.numel() else 0
        allowed = _AGREEMENT.get(alone.dtype, 0.05) if self.autocast is None else 0.05
        return torch.allclose(actual, expected, rtol=allowed, atol=float(allowed * scale), equal_nan=True)


def tensors(value: object) -> list[Tensor]:
    """Return the tensors in nested tuples, lists, mappings and dataclasses."""
    found: list[Tensor] = []
    collect(value, found)
    return found


def collect(value: object, found: list[Tensor]) -> None:
    """Append the tensors in nested tuples, lists, mappings and dataclasses to a list."""
    if isinstance(value, Tensor):
        found.append(value)
    elif type(value) in _PLAIN:
        return
    elif isinstance(value, tuple | list):
        for item in value:
            collect(item, found)
    elif isinstance(value, Mapping):
        for item in value.values():
            collect(item, found)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for item in vars(value).values():
            collect(item, found)


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return nested tuples, lists, mappings and dataclasses with other tensors.

    Raises:
        TypeError: If one of them cannot be made anew.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(item, function) for item in value))
    if isinstance(value, tuple | list):
        return type(value)([mapped(item, function) for item in value])
    if isinstance(value, Mapping):
        return type(value)({name: mapped(item, function) for name, item in value.items()})  # pyright: ignore[reportCallIssue]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        return dataclasses.replace(value, **{name: mapped(getattr(value, name), function) for name in fields})
    return value


def _returned(output: object) -> tuple[list[Tensor], list[Tensor]]:
    found = [t for t in tensors(output) if t.requires_grad]
    return [t for t in found if t.dim() > 0], [t for t in found if t.dim() == 0]
