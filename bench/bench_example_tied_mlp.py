"""An MLP with example-tied dropout: time and saved activations, forward and backward, over dense products and a mask.

Bound: the multiply-adds of the channels that are kept over those of all. Peers: dense products and the dropout's
operator; dense products and a table of masks, a row for each example, as in the code of MemSinks; and no dropout.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.gpu_time import GpuCase
from bench.measure import interleaved, ratios
from memloc_ext.ops import example_tied_dropout, example_tied_mlp
from memloc_ext.reference import example_tied_mlp as reference
from memloc_ext.reference.example_tied_dropout import keep_mask

EXAMPLES = 4096  # rows of the table of masks


@dataclass(frozen=True)
class Case:
    """Sizes of an MLP and its input, and what an example keeps."""

    d: int
    h: int
    tokens: int
    batch: int
    p_gen: float
    p_mem: float

    def __str__(self) -> str:
        return f"{self.d}-{self.h}-{self.batch}x{self.tokens}-gen{self.p_gen}-mem{self.p_mem}"

    @property
    def settings(self) -> dict[str, Any]:
        """The operator's arguments by name."""
        kept = int(self.p_gen * self.h)
        return {"activation": "gelu", "num_generalization": kept, "p_mem": self.p_mem, "seed": 0}

    @property
    def draw(self) -> tuple[int, float, int]:
        """The arguments that say what is kept, in the order of `keep_mask`."""
        return self.settings["num_generalization"], self.p_mem, 0

    def inputs(self, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """Return x, ids, the four parameters, and a gradient of the output."""

        def tensor(*sizes: int) -> Tensor:
            return (torch.randn(sizes, device=device) / sizes[-1] ** 0.5).to(dtype).requires_grad_()

        x, ids = tensor(self.batch, self.tokens, self.d), torch.randperm(EXAMPLES, device=device)[: self.batch]
        weights = tensor(self.h, self.d), tensor(self.h), tensor(self.d, self.h), tensor(self.d)
        return x, ids, *weights, torch.randn_like(x)


CASES = [
    Case(768, 3072, 256, 8, 0.2, 0.1),
    Case(768, 3072, 256, 8, 0.07, 0.0),
    Case(768, 3072, 256, 8, 0.0, 0.07),
    Case(512, 2048, 64, 32, 0.2, 0.1),
    Case(768, 3072, 1, 256, 0.2, 0.1),  # an id each: dense products are taken
    Case(768, 3072, 256, 8, 0.2, 0.95),
]


def _mlp(x: Tensor, weights: Sequence[Tensor], drop: Callable[[Tensor], Tensor]) -> Tensor:
    return F.linear(drop(F.gelu(F.linear(x, *weights[:2]))), *weights[2:])


def dense(case: Case, x: Tensor, ids: Tensor, *weights: Tensor) -> Tensor:
    """Run dense products and the dropout's operator; the last of the weights is the gradient of the output."""
    return _mlp(x, weights[:4], lambda t: example_tied_dropout(t, ids, *case.draw, channel_dim=-1))


def check(case: Case, x: Tensor, ids: Tensor, *weights: Tensor) -> None:
    """Fail unless the operator gives what the reference gives in float64, to the rounding of its type."""
    wide = [t.detach().double() for t in (x, *weights[:4])]
    expected = reference.example_tied_mlp(wide[0], ids, *wide[1:], **case.settings)
    actual = example_tied_mlp(x, ids, *weights[:4], **case.settings).double()
    rounding = 1e-5 if x.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual, expected, rtol=10 * rounding, atol=rounding)


def saved(function: Callable[[], Tensor], leaves: list[Tensor]) -> int:
    """Return how many elements autograd saves beside the leaves."""
    storages = {t.untyped_storage().data_ptr() for t in leaves}
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in storages and t.is_floating_point():
            sizes[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function()
    total = sum(sizes.values())  # while y keeps them, so that no two have the same address
    del y
    return total


@pytest.mark.parametrize("case", CASES, ids=str)
def test_example_tied_mlp(case: Case, benchmark: Any) -> None:
    torch.manual_seed(0)
    given = case.inputs("cpu")
    x, ids, *weights, grad = given
    draw = case.draw
    table = keep_mask(torch.arange(EXAMPLES), case.h, *draw).float()
    outputs: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: example_tied_mlp(x, ids, *weights, **case.settings),
        "dense products and the dropout": lambda: dense(case, *given),
        "dense products and a table of masks": lambda: _mlp(x, weights, lambda t: t * table[ids].unsqueeze(1)),
        "without dropout": lambda: _mlp(x, weights, lambda t: t),
    }
    check(case, *given)
    leaves = [x, *weights]
    times = interleaved({name: lambda f=f: torch.autograd.grad(f(), leaves, grad) for name, f in outputs.items()})
    benchmark.extra_info["time over"] = ratios(times, "ours")
    benchmark.extra_info["multiply-adds over dense ones"] = round(table[ids].mean().item(), 3)
    elements = {name: saved(f, leaves) for name, f in outputs.items()}
    benchmark.extra_info["saved elements over"] = {
        name: round(elements["ours"] / count, 3) for name, count in elements.items() if name != "ours"
    }
    benchmark.pedantic(outputs["ours"], rounds=5)


def gpu_cases(tiny: bool) -> Iterator[GpuCase]:
    """Yield for `bench.gpu` forward and backward pass beside dense products and the dropout's operator."""
    for case, dtype in itertools.product(CASES, (torch.bfloat16, torch.float32)):
        large = Case(16, 32, 4, 3, case.p_gen, case.p_mem) if tiny else replace(case, batch=4 * case.batch)

        def passes(run: Callable[..., Tensor], *given: Tensor) -> object:
            with torch.enable_grad():
                return torch.autograd.grad(run(*given), [t for t in given[:-1] if t.requires_grad], given[-1])

        def ours(*given: Tensor, case: Case = large) -> Tensor:
            return example_tied_mlp(*given[:6], **case.settings)

        yield GpuCase(
            f"example_tied_mlp {large}-{str(dtype).removeprefix('torch.')}",
            lambda device, case=large, dtype=dtype: case.inputs(device, dtype),
            functools.partial(check, large),
            functools.partial(passes, ours),
            functools.partial(passes, functools.partial(dense, large)),
            lambda *given: (
                bytes := 2.0 * sum(t.nbytes for t in given),
                bytes,
            ),  # each is read, and most have a gradient
        )
