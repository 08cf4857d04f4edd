"""The one rule of how far a reduction may be from the truth."""

import torch
from torch import Tensor


def assert_as_accurate(
    actual: Tensor, eager: Tensor, exact: Tensor, factor: float = 2.0, rounding: float | None = None
) -> None:
    """Allow ``actual`` at most ``factor`` times the error that plain PyTorch makes in the same dtype.

    ``rounding``: units of the last place of the largest value that are allowed anyway; 64 in float64, else 4.
    """
    assert actual.shape == exact.shape, f"{list(actual.shape)} instead of {list(exact.shape)}"
    if exact.numel() == 0:
        return
    # eager may be exact by luck; in float64 it is the measure itself, and a sum in another order differs by rounding
    if rounding is None:
        rounding = 64 if actual.dtype == torch.float64 else 4
    floor = rounding * torch.finfo(actual.dtype).eps * exact.abs().max()
    allowed = factor * (eager.double() - exact).abs().max() + floor
    error = (actual.double() - exact).abs().max()
    assert error <= allowed, f"max error {error:.2e} > {factor} x eager + rounding = {allowed:.2e} ({actual.dtype})"
