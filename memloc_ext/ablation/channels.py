"""Where the channels of a tensor are: one rule, for what is measured and for what is edited."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from memloc_ext.ablation.recording import leaves

RESHAPES = frozenset(("view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze"))
_REDUCTIONS = frozenset(("mean", "sum", "amax", "amin", "var", "std", "prod", "logsumexp", "all", "any"))


class Channels:
    """Follows the channels of tensors through the operators that compute them.

    Convolutions, batch and group norms put them at dimension 1; linear layers, embeddings and layer norms of one
    dimension at the last; whatever moves dimensions moves them along. Where they come from nothing of that kind, they
    are at dimension 1 of images and volumes, else at the last.
    """

    def __init__(self) -> None:
        self._dims: dict[Any, int] = {}  # of tensors by the memory they show

    def dim(self, t: Tensor) -> int:
        """Return the dimension of a tensor's channels."""
        dim = self.known(t)
        return dim if dim is not None else 1 if t.dim() in (4, 5) else t.dim() - 1

    def known(self, t: Tensor) -> int | None:
        """Return the same if some operator put them there, else None."""
        return self._dims.get(_key(t))

    def follow(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Note where the channels of an operator's results are."""
        known = []
        for t in leaves((args, kwargs)):
            dim = self._dims.get(_key(t)) if isinstance(t, Tensor) else None
            if dim is not None:
                known.append((t.shape, dim))
        name = func._opname.removesuffix("_")
        if name == "bmm" and self._dims.get(_key(args[1])) is None:
            name = "mm"  # a linear layer's, whose weight is expanded
        for t in leaves([result]):
            if isinstance(t, Tensor):
                key, dim = _key(t), _dim(name, args, known, t.shape)
                self._dims.pop(key, None)
                if key is not None and dim is not None:
                    self._dims[key] = dim


class FollowingChannels(TorchDispatchMode):
    """Tells its ``channels`` what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = Channels()

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator."""
        return func(*args, **kwargs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self.run(func, args, kwargs or {})
        self.channels.follow(func, args, kwargs or {}, result)
        return result


def _key(t: Tensor) -> Any:
    """Return what a tensor has in common with others of the same elements alone; autograd may return another object."""
    try:
        return t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride()
    except (NotImplementedError, RuntimeError):
        return None


def _dim(name: str, args: Any, known: Sequence[tuple[torch.Size, int]], shape: torch.Size) -> int | None:
    """Return where an operator puts the channels of a result, given shape and channels of arguments where known."""
    rank = len(shape)
    if "convolution" in name or "batch_norm" in name or "group_norm" in name:
        return 1 if rank > 1 else None
    if name in ("addmm", "mm", "embedding") or (name == "native_layer_norm" and len(args[1]) == 1):
        return rank - 1
    if not known or not rank or name.startswith("_scaled_dot_product") or name in ("bmm", "baddbmm"):
        return None
    old, dim = next((k for k in known if len(k[0]) == rank and k[0][k[1]] == shape[k[1]]), known[0])
    if name in ("permute", "transpose", "t"):
        return permutation(name, args, rank).index(dim)
    if name in RESHAPES:
        return _reshaped(old, dim, shape)
    if "pool" in name and dim != 1:
        return None
    if len(old) == rank:
        return dim
    if name == "expand":
        return dim + rank - len(old)
    if name in _REDUCTIONS and len(args) > 1:
        gone = args[1] if isinstance(args[1], list | tuple) else [args[1]]
    elif name in ("select", "unbind"):
        gone = [args[1] if len(args) > 1 else 0]
    else:
        return None
    gone = {d % len(old) for d in gone}
    return None if dim in gone or len(old) - len(gone) != rank else dim - sum(d < dim for d in gone)


def permutation(name: str, args: Any, rank: int) -> list[int]:
    """Return which dimension each dimension of the result was."""
    if name == "permute":
        return [d % rank for d in args[1]]
    order = list(range(rank))
    if rank > 1:
        a, b = (d % rank for d in (args[1:3] if name == "transpose" else (0, 1)))
        order[a], order[b] = order[b], order[a]
    return order


def _reshaped(old: torch.Size, dim: int, new: torch.Size) -> int | None:
    """Return which dimension of another shape of the same elements holds the channels; never the first, the batch."""
    if dim == 0 or not math.prod(old):
        return None
    outer, inner = math.prod(old[:dim]), math.prod(old[dim + 1 :])
    begins = [i for i in range(1, len(new)) if math.prod(new[:i]) == outer]
    same = [i for i in begins if new[i] == old[dim]]
    within = [i for i in range(1, len(new)) if math.prod(new[i + 1 :]) <= inner < math.prod(new[i:])]
    ends = [i for i in range(1, len(new)) if math.prod(new[i + 1 :]) == inner]
    return next(iter(same[::-1] or begins[::-1] or within or ends), None)
