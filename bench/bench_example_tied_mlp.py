"""An MLP with example-tied dropout: time and saved activations, forward and backward, over dense products and a mask.

Bound: the multiply-adds of the channels that are kept over those of all. Peers: dense products and the dropout's
operator; dense products and a table of masks, a row for each example, as in the code of MemSinks; and no dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

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


CASES = [
    Case(768, 3072, 256, 8, 0.2, 0.1),
    Case(768, 3072, 256, 8, 0.07, 0.0),
    Case(768, 3072, 256, 8, 0.0, 0.07),
    Case(512, 2048, 64, 32, 0.2, 0.1),
    Case(768, 3072, 1, 256, 0.2, 0.1),  # an id each: dense products are taken
    Case(768, 3072, 256, 8, 0.2, 0.95),
]


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
    make = torch.Generator().manual_seed(0)

    def tensor(*sizes: int) -> Tensor:
        return (torch.randn(sizes, generator=make) / sizes[-1] ** 0.5).requires_grad_()

    x, ids = tensor(case.batch, case.tokens, case.d), torch.randperm(EXAMPLES, generator=make)[: case.batch]
    weights = (tensor(case.h, case.d), tensor(case.h), tensor(case.d, case.h), tensor(case.d))
    w_in, b_in, w_out, b_out = weights
    grad = torch.randn(x.shape, generator=make)
    draw = [case.settings[name] for name in ("num_generalization", "p_mem", "seed")]
    table = keep_mask(torch.arange(EXAMPLES), case.h, *draw).float()

    def with_dropout(drop: Callable[[Tensor], Tensor]) -> Tensor:
        return F.linear(drop(F.gelu(F.linear(x, w_in, b_in))), w_out, b_out)

    def own_dropout(hidden: Tensor) -> Tensor:
        return example_tied_dropout(hidden, ids, *draw, channel_dim=-1)

    outputs: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: example_tied_mlp(x, ids, *weights, **case.settings),
        "dense products and the dropout": lambda: with_dropout(
            lambda t: example_tied_dropout(t, ids, *draw, channel_dim=-1)
        ),
        "dense products and a table of masks": lambda: with_dropout(lambda t: t * table[ids].unsqueeze(1)),
        "without dropout": lambda: with_dropout(lambda t: t),
    }
    torch.testing.assert_close(
        outputs["ours"](), reference.example_tied_mlp(x, ids, *weights, **case.settings), rtol=1e-4, atol=1e-5
    )
    leaves = [x, *weights]
    times = interleaved({name: lambda f=f: torch.autograd.grad(f(), leaves, grad) for name, f in outputs.items()})
    benchmark.extra_info["time over"] = ratios(times, "ours")
    benchmark.extra_info["multiply-adds over dense ones"] = round(table[ids].mean().item(), 3)
    elements = {name: saved(f, leaves) for name, f in outputs.items()}
    benchmark.extra_info["saved elements over"] = {
        name: round(elements["ours"] / count, 3) for name, count in elements.items() if name != "ours"
    }
    benchmark.pedantic(outputs["ours"], rounds=5)
