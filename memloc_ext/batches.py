"""What a batch is, in whatever form data yields it, and how a model is called on it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_PLAIN = frozenset((type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size, slice, type(...)))


class Batch(NamedTuple):
    """Some examples, on one device.

    Attributes:
        x: What the model is called with, see `call`.
        y: The targets: a tensor ``[batch, *]``, or nested tuples or mappings of such.
        ids: The examples' numbers, ``[batch]``, int64.
    """

    x: Any
    y: Any
    ids: Tensor


def call(model: Callable[..., Any], x: Any) -> Any:
    """Call a model: ``model(**x)`` for a mapping, ``model(*x)`` for a tuple, else ``model(x)``."""
    if isinstance(x, Mapping):
        return model(**x)
    return model(*x) if isinstance(x, tuple) else model(x)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter, or buffer; the CPU without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def read_batch(function: str, batch: Any) -> tuple[Any, Any, Tensor | None]:
    """Take a batch apart into x, y, and the examples' numbers, ``[batch]`` int64, or None without.

    It is ``(x, y)``, ``(x, y, index)``, or a mapping of which ``labels`` is y, ``index`` (if it is there) the numbers
    and the rest x. ValueError, which names ``function``, if it is none of these, or numbers are not integers, one per
    example.
    """
    if isinstance(batch, Mapping):
        x: Any = dict(batch)
        if "labels" not in x:
            raise ValueError(f"{function}: a batch that is a mapping must hold labels, got {', '.join(map(str, x))}")
        y, ids = x.pop("labels"), x.pop("index", None)
    elif isinstance(batch, tuple | list) and len(batch) in (2, 3):
        (x, y), ids = batch[:2], batch[2] if len(batch) == 3 else None
    else:
        got = f"{len(batch)} parts" if isinstance(batch, tuple | list) else type(batch).__name__
        raise ValueError(f"{function}: a batch must be (x, y), (x, y, index) or a mapping with labels, got {got}")
    x = tuple(x) if isinstance(x, list) else x  # which a DataLoader makes of a tuple
    if not tensors_of(x):
        raise ValueError(f"{function}: x must be a tensor, or a tuple or mapping of tensors, got {type(x).__name__}")
    target = next(iter(tensors_of(y)), None)
    if target is None or target.dim() == 0:
        raise ValueError(
            f"{function}: a batch must hold a tensor of targets, one per example, got {type(y).__name__}; where data "
            "yields single items, put a DataLoader around it"
        )
    if ids is None:
        return x, y, None
    ids = torch.as_tensor(ids)
    if ids.shape != target.shape[:1] or ids.is_floating_point() or ids.dtype == torch.bool:
        rule = f"integers [{len(target)}], one per example"
        raise ValueError(f"{function}: index must be {rule}, got {ids.dtype} {list(ids.shape)}")
    return x, y, ids.long()


def tensors_of(tree: object) -> list[Tensor]:
    """Return the tensors in nested tuples, lists, mappings and dataclasses."""
    found: list[Tensor] = []
    collect(tree, found)
    return found


def collect(tree: object, found: list[Tensor]) -> None:
    """Append the tensors in nested tuples, lists, mappings and dataclasses to a list."""
    if isinstance(tree, Tensor):
        found.append(tree)
    elif type(tree) in _PLAIN:
        return
    elif isinstance(tree, tuple | list):
        for inner in tree:
            collect(inner, found)
    elif isinstance(tree, Mapping):
        for inner in tree.values():
            collect(inner, found)
    else:
        for name in _fields(tree):
            collect(getattr(tree, name), found)


def with_each_tensor(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return nested tuples, lists, mappings and dataclasses with every tensor changed; what is no tensor stays.

    A mapping that cannot be made of its items becomes a dictionary.
    """
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, tuple | list):
        parts = [with_each_tensor(inner, change) for inner in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    if isinstance(tree, Mapping):
        items = {key: with_each_tensor(inner, change) for key, inner in tree.items()}
        with contextlib.suppress(Exception):
            made = type(tree)(items)  # pyright: ignore[reportCallIssue]
            if list(made) == list(items) and all(made[key] is items[key] for key in items):
                return made
        return items
    made = copy.copy(tree) if (names := _fields(tree)) else tree
    for name in names:
        object.__setattr__(made, name, with_each_tensor(getattr(tree, name), change))  # frozen or not
    return made


def _fields(tree: object) -> list[str]:
    """Return the names of a dataclass's fields that are set; none of anything else."""
    if isinstance(tree, type) or not dataclasses.is_dataclass(tree):
        return []
    return [field.name for field in dataclasses.fields(tree) if hasattr(tree, field.name)]
