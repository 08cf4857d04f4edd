"""Switch units of a model off by hooks: for as long as a ``with`` lasts, or in a copy for good."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from memloc_ext.ablation.channels import FollowingChannels
from memloc_ext.ablation.sites import HEADS
from memloc_ext.borrowing import in_parts, uncompiled, without_fast_path

Unit = tuple[str, int]


class AppliedAblation:
    """Units of a model that are switched off by edits at its sites; see `apply_ablation`."""

    def __init__(self, model: nn.Module, edits: Sequence[_Edit]) -> None:
        self.model, self.edits, self._watch = model, edits, _Watch(model, edits)
        self._entered: list[tuple[list[RemovableHandle], int, list[int]]] = []

    def __enter__(self) -> nn.Module:
        """Switch the units off and return the model."""
        counts = self._watch.runs, [edit.runs for edit in self.edits]
        self._entered.append((hooked(self.model, self.edits, self._watch), *counts))
        return self.model

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Switch them on again.

        Raises:
            ValueError: If the model ran without calling a site.
        """
        handles, runs, calls = self._entered.pop()
        for handle in handles:
            handle.remove()
        if error is None and self._watch.runs > runs:
            missed = [edit.site for edit, before in zip(self.edits, calls, strict=True) if edit.runs == before]
            if missed:
                raise ValueError(
                    f"apply_ablation: sites must be called when the model is, {', '.join(missed)} was not and nothing "
                    "was switched off there; name a module that is called, such as one before or behind it"
                )

    def copy(self) -> nn.Module:
        """Return a copy of the model in which the units are switched off for good.

        To compile it where the model was compiled before, call `torch._dynamo.reset` first: compiled code is found
        again without a look at hooks.
        """
        both = copy.deepcopy((self.model, self.edits))
        AppliedAblation(*both).__enter__()
        return both[0]


def apply_ablation(
    model: nn.Module,
    units: Iterable[Unit],
    *,
    baselines: Mapping[str, Tensor] | None = None,
    channel_dims: Mapping[str, int] | None = None,
) -> AppliedAblation:
    """Switch units of a model off, for as long as a ``with`` lasts or in a copy for good.

    ```python
    with apply_ablation(model, units):
        ...
    edited = apply_ablation(model, units).copy()
    ```

    Nothing happens before the ``with`` or the `AppliedAblation.copy`. Weights are not changed: hooks replace what the
    sites return, also where gradients are computed. What was compiled runs uncompiled.

    Args:
        model: To edit.
        units: ``(site, unit)`` pairs as `localize` returns them.
        baselines: Site to what its units are replaced by, ``[units]``; zero for sites that are not in it.
        channel_dims: Site to the dimension of its units, as `localize` and `ablation_losses` return them. For sites
            that are not in it, the first run of the model is followed, and gives the same dimensions by the same rule.

    Raises:
        ValueError: If there is no module of a site's name, or a unit is negative; when the model runs, if a unit is
            not below the number of channels, or a baseline has not one value for each; at the end of the ``with``, if
            the model ran and a site was not called.
    """
    by_site: dict[str, list[int]] = {}
    for site, unit in units:
        if unit < 0:
            raise ValueError(f"apply_ablation: units must be at least 0, got {unit} in {site}")
        by_site.setdefault(site, []).append(int(unit))
    modules, edits = dict(model.named_modules()), []
    for site, chosen in by_site.items():
        if site.removesuffix(HEADS) not in modules:
            raise ValueError(f"apply_ablation: units must name modules of the model, got {site!r}")
        baseline = None if baselines is None else baselines.get(site)
        dim = None if channel_dims is None else channel_dims.get(site)
        edits.append(_Edit(site, sorted(set(chosen)), baseline, dim))
    return AppliedAblation(model, edits)


class SiteHook:
    """Changes what a module returns, or for a site of heads what its attention returns, each time it is called.

    ``runs`` counts the calls.
    """

    def __init__(self, site: str) -> None:
        self.site, self.runs = site, 0
        self._modes: list[_HeadMode] = []

    @property
    def is_of_heads(self) -> bool:
        """Whether its units are attention heads, which a function mode sees while the module runs."""
        return self.site.endswith(HEADS)

    def change(self, t: Tensor) -> Tensor:
        """Return what takes the place of a tensor."""
        raise NotImplementedError

    def before(self, module: nn.Module, args: Any) -> None:
        """Start to look for the attention."""
        if self.is_of_heads:
            self._modes.append(_HeadMode(self))
            self._modes[-1].__enter__()

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Return the changed output of a module."""
        if self.is_of_heads:
            self._modes.pop().__exit__(None, None, None)
            return output
        if output is None:  # the module raised
            return None
        if not isinstance(output, Tensor):
            raise ValueError(f"apply_ablation: {self.site} must return a tensor, got {type(output).__name__}")
        self.ran()
        return self.change(output)

    def ran(self) -> None:
        """Count a call, but not in code that is compiled, which would be compiled anew for each number."""
        if not torch.compiler.is_compiling():
            self.runs += 1


class _Edit(SiteHook):
    """Replaces units."""

    def __init__(self, site: str, units: list[int], baseline: Tensor | None, dim: int | None) -> None:
        super().__init__(site)
        self.units, self.baseline, self.dim = units, baseline, dim
        self.rank: int | None = None  # of the tensors that `dim` was seen in
        self.see: Callable[[Tensor], int | None] = _blind  # where the channels are, while the model runs

    def change(self, t: Tensor) -> Tensor:
        """Return a tensor with the units replaced."""
        dim = t.dim() - 3 if self.is_of_heads else self._dim(t)
        if self.units[-1] >= t.shape[dim]:
            raise ValueError(f"apply_ablation: units of {self.site} must be below {t.shape[dim]}, got {self.units[-1]}")
        index = torch.tensor(self.units, device=t.device)
        if self.baseline is None:
            return t.index_fill(dim, index, 0)
        if self.baseline.shape != (t.shape[dim],):
            got = list(self.baseline.shape)
            raise ValueError(f"apply_ablation: the baseline of {self.site} must have shape [{t.shape[dim]}], got {got}")
        values = self.baseline.to(t)[index].reshape(-1, *[1] * (t.dim() - dim - 1))
        shape = [*t.shape[:dim], len(index), *t.shape[dim + 1 :]]
        return t.index_copy(dim, index, values.expand(shape))

    @property
    def is_settled(self) -> bool:
        """Whether the dimension of the units need not be seen any more."""
        return self.is_of_heads or self.dim is not None

    def _dim(self, t: Tensor) -> int:
        if self.dim is None:
            wrapped = is_functorch_wrapped_tensor(t)  # as by vmap: operators are given another tensor
            dim = t.dim() - 1 if t.dim() < 3 else None if wrapped else self.see(t)
            if dim is None:
                raise ValueError(
                    f"apply_ablation: {self.site} runs apart from its model, compiled or transformed; pass channel_dims"
                )
            self.dim, self.rank, self.see = dim, t.dim(), _blind
        if self.rank not in (None, t.dim()):
            raise ValueError(
                f"apply_ablation: {self.site} returned a tensor of {self.rank} dimensions before and of {t.dim()} now; "
                "edit the model anew, or pass channel_dims"
            )
        return self.dim % t.dim()


def _blind(t: Tensor) -> None:
    """See nothing."""


class _Watch:
    """Sees to a model from outside while it runs: its channels are followed, until the edits know where theirs are.

    Transformer layers run as they are written, since PyTorch's operator for a whole layer calls no site.
    """

    def __init__(self, model: nn.Module, edits: Sequence[_Edit]) -> None:
        self.model, self.edits, self.runs = model, edits, 0
        self._open: dict[int, list[contextlib.ExitStack]] = defaultdict(list)  # by thread

    def before(self, module: nn.Module, args: Any) -> None:
        """Begin with the outermost module; not of a copy that the user compiles."""
        if torch.compiler.is_compiling():
            return
        stack = contextlib.ExitStack()
        mine = self._open[threading.get_ident()]
        mine.append(stack)
        if len(mine) == 1:
            self.runs += 1
            stack.enter_context(uncompiled())
            stack.enter_context(without_fast_path())
            unsettled = [edit for edit in self.edits if not edit.is_settled]
            if unsettled:
                channels = stack.enter_context(FollowingChannels()).channels
                for edit in unsettled:  # of a part of the model, what came before is not seen
                    edit.see = channels.dim if module is self.model else channels.known

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """End with it."""
        if torch.compiler.is_compiling():
            return
        mine = self._open[threading.get_ident()]
        mine.pop().close()
        if not mine:
            del self._open[threading.get_ident()]


def hooked(model: nn.Module, hooks: Sequence[SiteHook], watch: _Watch | None = None) -> list[RemovableHandle]:
    """Install a hook at each site; a watch sees every module of the model that has a site, or is one."""
    modules, handles = dict(model.named_modules()), []
    if watch is not None:
        parts = [hook.site.removesuffix(HEADS).split(".") for hook in hooks]
        for name in dict.fromkeys(".".join(names[:end]) for names in parts for end in range(len(names) + 1)):
            if not isinstance(modules[name], torch.jit.ScriptModule):
                handles.append(modules[name].register_forward_pre_hook(watch.before))
                handles.append(modules[name].register_forward_hook(watch.after, always_call=True, prepend=True))
    for hook in hooks:
        module = modules[hook.site.removesuffix(HEADS)]
        handles.append(module.register_forward_pre_hook(hook.before))
        handles.append(module.register_forward_hook(hook, always_call=True))
    return handles


class _HeadMode(TorchFunctionMode):
    def __init__(self, hook: SiteHook) -> None:
        super().__init__()
        self._hook = hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.multi_head_attention_forward:
            with self:
                return in_parts(func)(*args, **(kwargs or {}))
        output = func(*args, **(kwargs or {}))
        if func is not F.scaled_dot_product_attention:
            return output
        self._hook.ran()
        return self._hook.change(output)
