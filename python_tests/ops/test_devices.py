"""Every operator where a user of GPUs may call it: on another stream, on a second device, in a graph."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from valid_arguments import VALID
from valid_arguments import call as call_operator

import memloc_ext  # noqa: F401

CPU_ONLY = {f"{layer}_{name}" for layer in ("linear", "conv2d") for name in ("grad_dot", "grad_inner")} | {
    "plan",
    "turned",
}
NAMES = sorted(set(VALID) - CPU_ONLY)
pytestmark = pytest.mark.cuda


def arguments(name: str, device: str) -> tuple[list[Any], list[Any]]:
    """Return the same arguments on the CPU and on a device."""
    torch.manual_seed(0)
    values = VALID[name]()
    return values, tree_map_only(Tensor, lambda value: value.to(device, copy=True), values)


def call(name: str, values: list[Any]) -> list[Tensor]:
    """Return the results, or what was written to."""
    result = call_operator(name, values)
    if name.endswith("_"):
        return [values[0]]
    return tree_leaves(result)


def check(name: str, actual: list[Tensor], values: list[Any], device: str) -> None:
    for ours, expected in zip(actual, call(name, values), strict=True):
        assert ours.device == torch.empty(0, device=device).device
        torch.testing.assert_close(ours.cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_same_as_on_the_cpu(name: str) -> None:
    values, moved = arguments(name, "cuda")
    check(name, call(name, moved), values, "cuda")


@pytest.mark.parametrize("name", NAMES)
def test_on_another_stream_right_after_what_it_needs(name: str) -> None:
    values, moved = arguments(name, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # cycles: on any other stream the operator would be done before this
        actual = call(name, tree_map_only(Tensor, Tensor.clone, moved))
    torch.cuda.current_stream().wait_stream(stream)
    check(name, actual, values, "cuda")


@pytest.mark.parametrize("name", NAMES)
def test_on_a_second_device_that_is_not_the_current_one(name: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    values, moved = arguments(name, "cuda:1")
    with torch.cuda.device(0):
        actual = call(name, moved)
        assert torch.cuda.current_device() == 0
    check(name, actual, values, "cuda:1")


@pytest.mark.parametrize("name", NAMES)
def test_in_a_graph_that_is_replayed_on_other_values(name: str) -> None:
    values, moved = arguments(name, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(name, tree_map_only(Tensor, Tensor.clone, moved))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            actual = call(name, moved)
    torch.cuda.current_stream().wait_stream(stream)
    for value, own in zip(tree_leaves(moved), tree_leaves(values), strict=True):
        if isinstance(value, Tensor) and value.is_floating_point():
            own.mul_(0.5)
            value.copy_(own)
    graph.replay()
    torch.cuda.synchronize()
    check(name, actual, values, "cuda")
