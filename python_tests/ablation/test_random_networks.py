"""Random small networks with residuals and concatenations, recorded and switched off at random sites."""

import torch
from ablating import check, recorded, settled
from hypothesis import given, settings
from hypothesis import strategies as st
from random_networks import RandomNetwork, blocks

from memloc_ext.ablation.interpreter import Graph
from memloc_ext.ablation.network import HOWS


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


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(blocks, min_size=1, max_size=6))
def test_the_recorded_values_are_those_of_the_first_example(drawn: list[tuple[str, int, int]]) -> None:
    torch.manual_seed(0)
    model, x = settled(RandomNetwork(drawn)).double(), torch.randn(2, 2, 5, 4).double()
    recording, seen = recorded(model, x), dict[str, torch.Tensor]()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, args, output, name=name: seen.update({name: output.clone()}))
    with torch.no_grad():
        model.eval()(x[:1])
        values = Graph(recording).examples([x], range(len(recording.shapes)))
    for name, output in seen.items():
        (value,) = recording.returned[name]
        torch.testing.assert_close(values[value][0], output, rtol=1e-12, atol=1e-12, equal_nan=True)
