"""How far a result may be from the truth, by bounds that are the same on every machine."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

CHAIN = 256  # products that the kernels add up one by one: csrc/summation.h


def assert_accurate(actual: Tensor, exact: Tensor, magnitude: Tensor, terms: int) -> None:
    """Allow the rounding of a sum of ``terms`` products in chains; ``magnitude``: the same sum of absolute values.

    Sums of 16-bit elements are those of float32, rounded once. ``exact`` is in float64, and so no better than a result
    in that.
    """
    assert actual.shape == exact.shape, f"{list(actual.shape)} instead of {list(exact.shape)}"
    computed = torch.promote_types(actual.dtype, torch.float32)
    # the root of the longest chains' lengths, with probability near 1 (Higham and Mary, SISC 41(5), 2019)
    growth = 6 * math.sqrt(min(terms, CHAIN) + terms / CHAIN) * (2 if computed == torch.float64 else 1)
    allowed = growth * torch.finfo(computed).eps / 2 * magnitude + torch.finfo(computed).tiny
    if actual.dtype != computed:
        allowed = allowed + torch.finfo(actual.dtype).eps * (exact.abs() + torch.finfo(actual.dtype).tiny)
    error = (actual.double() - exact).abs()
    assert (error <= allowed).all(), f"{(error / allowed).max():.1f} x the bound of {terms} terms ({actual.dtype})"


def moved(value: Any, dtype: torch.dtype = torch.float32, noise: torch.Generator | None = None) -> Any:
    """Return a copy in float64 of a tensor, or of what is in a tuple, as far off as ``dtype`` rounds.

    Of a module the parameters are, and what each module in it returns, and the gradient of that.
    """
    unit, generator = torch.finfo(dtype).eps / 2, noise or torch.Generator().manual_seed(0)
    if isinstance(value, tuple):
        return tuple(moved(item, dtype, generator) for item in value)
    if isinstance(value, nn.Module):
        value = copy.deepcopy(value).double()
        with torch.no_grad():
            for parameter in value.parameters():
                parameter.copy_(moved(parameter, dtype, generator))
        for module in value.modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # takes no hooks
            module.register_forward_hook(lambda *call: _rounded(call[-1], unit, generator))
        return value
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return _Rounded.apply(value.detach().double(), unit, generator) if is_float else value


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, unit: float, generator: torch.Generator) -> Tensor:
        ctx.rest = unit, generator
        return x * (1 + unit * torch.randn(x.shape, dtype=x.dtype, generator=generator))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Rounded.forward(ctx, grad, *ctx.rest), None, None


def _rounded(output: Any, unit: float, generator: torch.Generator) -> Any:
    if isinstance(output, tuple):
        return tuple(_rounded(item, unit, generator) for item in output)
    is_float = isinstance(output, Tensor) and output.is_floating_point()
    return _Rounded.apply(output, unit, generator) if is_float else output


def assert_stable(actual: Tensor, off: Tensor, exact: Tensor) -> None:
    """Allow the result of many layers a few times the error that comes of rounding what each of them returns.

    ``off``: the truth for what `moved` returns, and so the same on every machine. Some units of the last place of the
    largest value are allowed anyway, more in float64, where ``exact`` is no better.
    """
    assert actual.shape == exact.shape, f"{list(actual.shape)} instead of {list(exact.shape)}"
    if exact.numel() == 0:
        return
    units = 64 if actual.dtype == torch.float64 else 16
    allowed = 12 * (off - exact).abs().max() + units * torch.finfo(actual.dtype).eps * exact.abs().max()
    error = (actual.double() - exact).abs().max()
    assert error <= allowed, f"max error {error:.2e}, allowed {allowed:.2e} ({actual.dtype})"
