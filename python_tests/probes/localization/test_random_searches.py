"""Searches in random small networks, at sites that lie behind and beside each other."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from localizing import confirm
from random_networks import RandomNetwork, blocks
from torch import nn

from memloc_ext.probes.localization import localize


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.data(),
    st.lists(blocks, min_size=1, max_size=5),
    st.sampled_from([None, "exact"]),
    st.sampled_from(["zero", "mean"]),
)
def test_flips_are_confirmed(
    data: st.DataObject, drawn: list[tuple[str, int, int]], population: str | None, how: str
) -> None:
    torch.manual_seed(0)
    model = RandomNetwork(drawn).double().eval()
    nn.init.normal_(model.head.weight)
    x = torch.randn(3, 2, 5, 4).double()
    y = model(x).argmax(1)
    names = [name for name, _ in model.layers.named_modules() if name]
    chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=4, unique=True))
    chosen = [name for name in chosen if not any(other.startswith(name + ".") for other in chosen)]
    verify = data.draw(st.sampled_from([1, 3, "all"]))
    found = localize(
        model, x, y, reference=(x, y), sites=[f"layers.{name}" for name in chosen], population=population, how=how,
        verify=verify, max_units=6,
    )  # fmt: skip
    confirm(model, x, y, found, found.baselines)
