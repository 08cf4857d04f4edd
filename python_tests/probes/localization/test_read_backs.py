"""How often a step of the search waits for the device, with the edits of a GPU in the place of the CPU's."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from localizing import SITES, same, trained
from torch import Tensor
from torch.overrides import TorchFunctionMode

from memloc_ext import localize
from memloc_ext.ablation import unit_sets
from memloc_ext.probes.localization.greedy import NetworkSearch

READS = {
    "tolist",
    "item",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
    "nonzero",
    "cpu",
    "numpy",
    "equal",
    "unique",
}


class ReadBacks(TorchFunctionMode):
    """Counts what would wait for a GPU, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        indices = args[1] if name in ("__getitem__", "__setitem__") else ()
        indices = indices if isinstance(indices, tuple) else (indices,)
        by_mask = any(isinstance(i, Tensor) and i.dtype == torch.bool for i in indices)
        if name in READS or by_mask:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_steps() -> Iterator[list[list[str]]]:
    steps, step = list[list[str]](), NetworkSearch._step

    def counting(*args: Any) -> None:
        with ReadBacks() as reads:
            step(*args)
        steps.append(reads.found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NetworkSearch, "_step", counting)
        yield steps


@pytest.mark.parametrize("how", ["zero", "mean"])
def test_a_step_waits_for_the_device_a_few_times_whatever_the_sites(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = trained()
    settings: dict[str, Any] = {"how": how, "max_units": 4, "verify": 6, "reference": (x, y)}
    expected = localize(model, x, y, sites=list(SITES), **settings)
    monkeypatch.setattr(unit_sets, "_edit", unit_sets.masked_edit)
    with counted_steps() as steps:
        found = localize(model, x, y, sites=list(SITES), **settings)
    assert same(found, expected)
    assert len(steps) > 1
    # sets in the screen's and the exact pass, how many candidates each site has, and what was chosen
    assert steps == [["tolist"] * 4] * len(steps)
