"""The cost model of csrc/grad_sqnorm.h once more, for a build without the module that exposes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

_MOST_SCRATCH = 16 << 20  # elements


@dataclass(frozen=True)
class _Axis:
    size: int
    kernel: int
    stride: int
    padding: int
    dilation: int

    def valid(self) -> bool:
        numbers = (self.size, self.kernel, self.stride, self.padding, self.dilation)
        if any(not 0 <= n < 2**31 for n in numbers) or 0 in (self.kernel, self.stride, self.dilation):
            return False
        return self.dilation * (self.kernel - 1) < self.size + 2 * self.padding

    @property
    def positions(self) -> int:
        return (self.size + 2 * self.padding - self.dilation * (self.kernel - 1) - 1) // self.stride + 1

    @property
    def extent(self) -> int:
        return self.positions + (self.kernel - 1) * self.dilation // self.stride

    def pixel_pairs(self) -> int:
        total = 0
        for offset in range(min(self.kernel, self.stride // gcd(self.stride, self.dilation))):
            before = self.padding - offset * self.dilation % self.stride + self.stride - 1
            first = max(0, before // self.stride)
            total += max(0, min(self.extent, (before + self.size) // self.stride) - first) ** 2
        return total


def grad_sqnorm_plan(
    groups: int, inputs: int, outputs: int, y: Sequence[int], x: Sequence[int]
) -> tuple[str, dict[str, float], bool]:
    """Return the way that is taken, the multiply-adds of each, and whether sums over groups come from the same pass.

    Raises:
        ValueError: If there is no such layer.
    """
    rows, columns = _Axis(*y), _Axis(*x)
    if groups < 1 or inputs < 0 or outputs < 0 or not rows.valid() or not columns.valid():
        raise ValueError(
            "plan: kernel_size, stride and dilation must be at least 1, padding at least 0, groups must divide the "
            "channels, and the kernel must fit into the padded image"
        )
    positions, offsets = rows.positions * columns.positions, rows.kernel * columns.kernel
    direct = float(positions * offsets * inputs * outputs * groups)
    pairs = rows.pixel_pairs() * columns.pixel_pairs()
    products = groups * (float(pairs) * inputs + float(positions * positions) * outputs)
    sums = 0.5 * groups * offsets * positions * rows.positions * columns.extent
    counts = {"direct": direct, "gram": products + sums}
    pads = rows.size + 2 * rows.padding, columns.size + 2 * columns.padding
    if positions == groups == offsets == 1 and pads == (1, 1):
        return "outer", {**counts, "outer": float(inputs + outputs)}, False
    elements = groups * (rows.size * columns.size * inputs + positions * outputs)
    direct_time, gram_time = direct + 30 * elements, 0.55 * products + 4 * sums + 40 * elements
    places = rows.extent * columns.extent + 64
    pixels = min(places, rows.size * columns.size)
    scratch = (pixels + positions + inputs + outputs + 256) * (places + 64)
    if gram_time >= direct_time or scratch > _MOST_SCRATCH:
        return "direct", counts, True
    return "gram", counts, direct_time + 3 * direct / positions < gram_time + 1.2 * direct
