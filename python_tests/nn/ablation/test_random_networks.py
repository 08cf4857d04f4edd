"""Random small networks with residuals and concatenations, switched off at random sites: the scan equals naive."""

import torch
from ablating import check, settled
from hypothesis import given, settings
from hypothesis import strategies as st
from random_networks import RandomNetwork, blocks

from memloc_ext.nn.ablation.network import HOWS


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data(), st.lists(blocks, min_size=1, max_size=6), st.integers(1, 3), st.sampled_from(HOWS[:2]))
def test_the_scan_equals_naive(data: st.DataObject, drawn: list[tuple[str, int, int]], batch: int, how: str) -> None:
    torch.manual_seed(0)
    model = settled(RandomNetwork(drawn)).double()
    names = [name for name, _ in model.layers.named_modules() if name]
    chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
    sites = [f"layers.{name}" for name in chosen]
    budget = data.draw(st.sampled_from([1 << 30, 1 << 17]))
    check(model, torch.randn(batch, 2, 5, 4).double(), sites, how, count=2, memory_budget=budget, must_matter=False)
