"""Recordings that are kept for the next call: per model, shapes and way to call it."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from memloc_ext.ablation.interpreter import Graph
from memloc_ext.ablation.network import Network, Query
from memloc_ext.ablation.recorder import record
from memloc_ext.ablation.recording import UnsupportedError
from memloc_ext.ablation.signature import Signature
from memloc_ext.tasks import Classification, Tokens

T = TypeVar("T")
_MOST = 16  # graphs and networks that are kept of a model
_LARGEST = 100_000  # of a model that holds more objects nothing is kept

# model to its state and to what is kept of it
_cache: weakref.WeakKeyDictionary[nn.Module, tuple[list[Any], dict[Any, Any]]] = weakref.WeakKeyDictionary()


def with_network(
    model: nn.Module, given: Sequence[Tensor], signature: Signature, query: Query, use: Callable[[Network], T]
) -> T:
    """Return what ``use`` returns for the recorded network of a model that is called with the tensors of a batch.

    A network that is kept is used if the model is what it was, all but the values of its tensors. If it turns out to
    disagree with the model, it is made anew and ``use`` called again. UnsupportedError says that the model cannot be
    recorded, or comes from ``use``.
    """
    network = _network(model, given, signature, query)
    if network.graph.cached:
        network.graph.recording.refresh()
        try:
            return use(network)
        except UnsupportedError:
            _cache.pop(model, None)
            network = _network(model, given, signature, query)
    result = use(network)
    network.graph.cached = True
    return result


def _network(model: nn.Module, given: Sequence[Tensor], signature: Signature, query: Query) -> Network:
    state = _state(model, given[0].device)
    if model not in _cache or _cache[model][0] != state or len(_cache[model][1]) > _MOST:
        _cache[model] = state, {}
    found = _cache[model][1]
    task = query.task
    key = (
        *((t.shape[1:], t.dtype, t.device) for t in given),
        signature.key,
        type(task) if isinstance(task, Classification | Tokens) else id(task),
    )
    sites = None if query.sites is None else tuple(query.sites)
    asked = (key, sites, *astuple(query)[2:])
    if asked not in found:
        graph = found.get(key)
        if graph is None:
            graph = Graph(record(model, given, signature, task))
        network = Network(model, graph, given, signature, query)
        if not state or not graph.recording.repeatable:
            return network
        found[key], found[asked] = graph, network
    return found[asked]


def _state(model: nn.Module, device: torch.device) -> list[Any]:
    """Return what a recording depends on, but for the values of tensors; empty if that is not known.

    That is where all tensors are that can be reached from the model, all plain values, and which objects hold them.
    """
    hooks = [held for name, held in vars(nn.modules.module).items() if name.startswith("_global_")]
    kind = device.type
    found: list[Any] = [torch.get_default_dtype(), torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)]
    todo: list[Any] = [model, *hooks]
    seen = set[int]()
    while todo:
        held = todo.pop()
        if held is None or isinstance(held, _PLAIN):
            found.append(held)
            continue
        found.append(id(held))
        if id(held) in seen:
            continue
        seen.add(id(held))
        if isinstance(held, Tensor):
            if held.layout != torch.strided or type(held) not in (Tensor, nn.Parameter):
                return []
            found += held.data_ptr(), held.shape, held.stride(), held.dtype
        elif isinstance(held, Mapping):
            found += held
            todo += held.values()
        elif isinstance(held, list | tuple | set):
            todo += held
        elif isinstance(held, types.FunctionType):
            todo += (held.__defaults__, *map(_content, held.__closure__ or ()))
        elif isinstance(held, types.MethodType):
            todo += held.__self__, held.__func__
        elif isinstance(held, functools.partial):
            todo += held.func, held.args, held.keywords
        elif not isinstance(held, type | types.ModuleType) and hasattr(held, "__dict__"):
            found += vars(held)
            todo += (value for name, value in vars(held).items() if name != "training")
        if len(seen) > _LARGEST:
            return []
    return found


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is still empty
        return None


_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
