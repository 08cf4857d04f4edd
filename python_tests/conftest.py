import os
from collections.abc import Callable

import pytest
import torch

import memloc_ext

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

LONG = [
    "test_examples",
    "test_integrations",
    "test_distributed",
    "test_study",
    "test_accounted_models",
    "test_torchrun",
    "test_ablated_models",
    "test_hostile_files",
    "test_stages",
    "test_torchvision",
    "test_rewinding",
    "test_channels",
    "test_accounting_figures",
    "test_chunks",
    "test_bench_gpu",
    "test_models",
    "test_instruction_sets",
    "test_surroundings",
    "test_conv2d_ablation",
    "test_any_model",
    "test_resume",
    "test_hostile_arguments",
    "test_authors",
]
"""Files of long tests, which come first: the last to be done should not be one that takes minutes."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    if os.environ.get("ATEN_CPU_CAPABILITY") == "default":
        broken = pytest.mark.skip(reason="torch 2.13 compiles no C++ for the CPU capability 'default'")
        for item in items:
            if "compile_fullgraph" in item.name:
                item.add_marker(broken)
    if torch.cuda.is_available() and memloc_ext.has_cuda_kernels:
        return
    if config.pluginmanager.has_plugin("tools.cuda_on_cpu.plugin"):
        return
    if os.environ.get("MEMLOC_REQUIRE_CUDA"):
        pytest.exit("make cuda-test: no CUDA device, or a build without CUDA kernels; see `memloc info`", returncode=1)
    skip = pytest.mark.skip(reason="needs a CUDA device and a build with CUDA kernels")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def bank_conflicts(request: pytest.FixtureRequest) -> Callable[[], tuple[int, int]]:
    """Return what counts accesses to shared memory, and their repeats, since its last call."""
    plugin = request.config.pluginmanager.get_plugin("tools.cuda_on_cpu.plugin")
    if plugin is None:
        pytest.skip("counted by the stand-in for a device alone")
    plugin.bank_conflicts()
    return plugin.bank_conflicts
