"""Switch units of a model off by hooks: for as long as a ``with`` lasts, or in a copy for good."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from memloc_ext.nn.ablation.sites import HEADS
from memloc_ext.nn.gradient_accountant.in_parts import in_parts

Unit = tuple[str, int]


class AppliedAblation:
    """Units that are switched off; see `apply_ablation`.

    Args:
        model: That it is about.
        hooks: To install.
    """

    def __init__(self, model: nn.Module, hooks: Mapping[nn.Module, list[Any]]) -> None:
        self.model, self._hooks = model, hooks
        self._entered: list[list[RemovableHandle]] = []

    def __enter__(self) -> nn.Module:
        """Switch the units off and return the model."""
        handles: list[RemovableHandle] = []
        self._entered.append(handles)
        for module, hooks in self._hooks.items():
            for hook in hooks:
                handles.append(module.register_forward_pre_hook(hook.before))
                handles.append(module.register_forward_hook(hook, always_call=True))
        return self.model

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Switch them on again."""
        for handle in self._entered.pop():
            handle.remove()

    def copy(self) -> nn.Module:
        """Return a copy of the model in which the units are switched off for good."""
        both = copy.deepcopy((self.model, self._hooks))
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
    sites return, also where gradients are computed.

    Args:
        model: To edit.
        units: ``(site, unit)`` pairs as `localize` returns them.
        baselines: Site to what its units are replaced by, ``[units]``; zero for sites that are not in it.
        channel_dims: Site to the dimension of its units, for modules that return images with the channels last; by
            default 1 for images (``[batch, channels, height, width]``), else the last.

    Raises:
        ValueError: If there is no module of a site's name, or a unit is negative; when the model runs, if a unit is
            not below the number of channels, or a baseline has not one value for each.
    """
    by_site: dict[str, list[int]] = {}
    for site, unit in units:
        if unit < 0:
            raise ValueError(f"apply_ablation: units must be at least 0, got {unit} in {site}")
        by_site.setdefault(site, []).append(int(unit))
    modules, hooks = dict(model.named_modules()), {}
    for site, chosen in by_site.items():
        name = site.removesuffix(HEADS)
        if name not in modules:
            raise ValueError(f"apply_ablation: units must name modules of the model, got {site!r}")
        baseline = None if baselines is None else baselines.get(site)
        dim = None if channel_dims is None else channel_dims.get(site)
        kind = _Heads if site != name else _Channels
        hooks.setdefault(modules[name], []).append(kind(site, sorted(set(chosen)), baseline, dim))
    return AppliedAblation(model, hooks)


class _Channels:
    """A forward hook that replaces channels of what a module returns."""

    def __init__(self, site: str, units: list[int], baseline: Tensor | None, dim: int | None) -> None:
        self.site, self.units, self.baseline, self.dim = site, units, baseline, dim

    def before(self, module: nn.Module, args: Any) -> None:
        """Do nothing before the module runs."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Return the output with the units replaced."""
        if output is None:  # the module raised
            return None
        if not isinstance(output, Tensor):
            raise ValueError(f"apply_ablation: {self.site} must return a tensor, got {type(output).__name__}")
        return self.replace(output, channel_dim(module, output) if self.dim is None else self.dim % output.dim())

    def replace(self, t: Tensor, dim: int) -> Tensor:
        """Return a tensor with the units of a dimension replaced."""
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


class _Heads(_Channels):
    """The same for the attention heads of a module: a function mode sees its attention while it runs."""

    def __init__(self, *settings: Any) -> None:
        super().__init__(*settings)
        self._modes: list[_HeadMode] = []

    def before(self, module: nn.Module, args: Any) -> None:
        """Start to look."""
        self._modes.append(_HeadMode(self))
        self._modes[-1].__enter__()

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Stop looking."""
        self._modes.pop().__exit__(None, None, None)
        return output


class _HeadMode(TorchFunctionMode):
    def __init__(self, hook: _Heads) -> None:
        super().__init__()
        self._hook = hook

    def __enter__(self) -> Self:
        return super().__enter__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.multi_head_attention_forward:
            with self:
                return in_parts(func)(*args, **(kwargs or {}))
        output = func(*args, **(kwargs or {}))
        return self._hook.replace(output, output.dim() - 3) if func is F.scaled_dot_product_attention else output


def channel_dim(module: nn.Module, output: Tensor) -> int:
    """Return the dimension of the channels in what a module returns, from what it is."""
    leaves = [m for m in module.modules() if any(True for _ in m.parameters(recurse=False))]
    if leaves and isinstance(leaves[-1], nn.Linear | nn.LayerNorm):
        return output.dim() - 1
    convolutional = leaves and isinstance(leaves[-1], nn.modules.conv._ConvNd | nn.modules.batchnorm._BatchNorm)
    return 1 if convolutional or output.dim() in (4, 5) else output.dim() - 1
