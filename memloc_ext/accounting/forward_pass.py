"""One call of the model: what it was given and returned, and the same call with other inputs."""

from __future__ import annotations

import copy
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from memloc_ext.batches import tensors_of, with_each_tensor

if TYPE_CHECKING:
    from memloc_ext.accounting.pattern import Pattern

_HOOKS = frozenset(name for name in vars(nn.Module()) if name.endswith("_hooks"))


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
        key: Of the call, see `untraced.key_of`; None if it must be traced.
        pattern: Of the graph, if it ran untraced.
    """

    def __init__(self, model: nn.Module, args: Any, kwargs: Any, batch_dim: int, shared: set[int]) -> None:
        self.model, self.args, self.kwargs, self.batch_dim = model, args, kwargs, batch_dim
        self.inputs = [t for t in tensors_of((args, kwargs)) if t.dim() > batch_dim and id(t) not in shared]
        self.sizes = [t.shape[batch_dim] for t in self.inputs]
        self.rows: int | None = None
        self._returned: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.numbers: list[Tensor] = []
        self.key: object = None
        self.pattern: Pattern | None = None
        device = self.inputs[0].device.type if self.inputs else "cpu"
        self.autocast = (device, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
        self._random = _random_state(self.inputs[0].device if self.inputs else torch.device("cpu"))

    @property
    def unread(self) -> str:
        """The classes of what the model was given, if there is no tensor in it that may have a row for each example."""
        given = () if self.inputs else (*self.args, *self.kwargs.values())
        return ", ".join(type(value).__name__ for value in given)

    def returned(self, output: object) -> None:
        """Take note of what the model returned."""
        self._returned = tensors_of(output)
        self.outputs = [t for t in self._returned if t.requires_grad and t.dim() > 0]
        self.numbers = [t for t in self._returned if t.requires_grad and t.dim() == 0]

    @property
    def closed(self) -> bool:
        """Whether no input was computed with gradients, which would go on below the model."""
        return all(t.grad_fn is None for t in tensors_of((self.args, self.kwargs)))

    def returned_rows(self, batch: int) -> bool:
        """Return whether something that it returned has so many rows."""
        return any(t.dim() > self.batch_dim and t.shape[self.batch_dim] == batch for t in self.outputs)

    def parts(self, batch: int) -> list[Tensor]:
        """Return the inputs that have rows for each of so many examples."""
        return [t for t, size in zip(self.inputs, self.sizes, strict=True) if size and size % batch == 0]

    def examples(self, batch: int) -> list[Tensor]:
        """Return the same as ``[batch, *]``, each example as if it were alone."""
        parts, dim = self.parts(batch), self.batch_dim
        return [t.detach().unflatten(dim, (batch, t.shape[dim] // batch)).movedim(dim, 0) for t in parts]

    def rearranged(self, places: Tensor) -> list[Tensor]:
        """Return those inputs with the rows of example ``places[b]`` in the place of those of example ``b``."""
        batch, dim = len(places), self.batch_dim
        rows = [t.detach().unflatten(dim, (batch, -1)) for t in self.parts(batch)]
        return [t.index_select(dim, places.to(t.device)).flatten(dim, dim + 1) for t in rows]

    def again(
        self,
        wanted: Sequence[Tensor],
        parts: Sequence[Tensor],
        batch: int,
        parameters: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> list[Tensor]:
        """Run the model on other values of `parts` and with other parameters; return what is now in place of outputs.

        Raises:
            ValueError: If the model returns another number of tensors.
        """
        new = {id(old): part for old, part in zip(self.parts(batch), parts, strict=True)}
        args, kwargs = with_each_tensor((self.args, self.kwargs), lambda t: new.get(id(t), t))
        with torch.autocast(*self.autocast) if self.autocast is not None else nullcontext():
            everything = tensors_of(functional_call(copied(unwrapped(self.model)), dict(parameters), args, kwargs))
        places = {id(old): t for old, t in zip(self._returned, everything, strict=True)}
        return [places[id(t)] for t in wanted]

    @contextmanager
    def same_random_numbers(self) -> Iterator[None]:
        """Draw the random numbers that the model drew."""
        cpu, device, state = self._random
        with torch.random.fork_rng([] if state is None else [device]):
            torch.set_rng_state(cpu)
            if state is not None:
                torch.cuda.set_rng_state(state, device)
            yield


def _random_state(device: torch.device) -> tuple[Tensor, torch.device, Tensor | None]:
    """Return the states of the generators of the CPU and of a device, if it is another."""
    other = device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
    return torch.get_rng_state(), device, torch.cuda.get_rng_state(device) if other else None


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model that a `DistributedDataParallel` wraps; any other as it is."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def copied(model: nn.Module) -> nn.Module:
    """Return a copy with the same parameters and buffers, to be run in the model's place.

    A replay would overwrite what a module stores in its attributes or in a list or dictionary of its own, and call the
    user's hooks, which may store something too.
    """
    copies: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        copies[module] = replica = object.__new__(type(module))
        for name, value in vars(module).items():
            if name in _HOOKS:
                value = OrderedDict((key, hook) for key, hook in value.items() if _runs_a_layer(hook))
            elif isinstance(value, list | dict | set | deque):
                value = copy.copy(value)
            replica.__dict__[name] = value
    for replica in copies.values():
        children = {name: child if child is None else copies[child] for name, child in replica._modules.items()}
        replica.__dict__["_modules"] = children
    return copies[model]


def has_own_hooks(model: nn.Module) -> bool:
    """Return whether a module has a hook of forward or backward passes that a copy goes without."""
    names = [name for name in _HOOKS if "forward" in name or "backward" in name]
    hooks = (hook for module in model.modules() for name in names for hook in getattr(module, name).values())
    return any(not _runs_a_layer(hook) for hook in hooks)


def _runs_a_layer(hook: object) -> bool:
    """Return whether a hook is PyTorch's, as that of weight normalisation is, or this package's."""
    return (getattr(hook, "__module__", None) or "").startswith(("torch.", "memloc_ext."))
