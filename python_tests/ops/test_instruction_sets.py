"""The kernels that this machine does not choose by itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from memloc_ext.info import build_info

FILES = [
    f"test_{name}"
    for name in (
        *("conv2d_ablation", "grad_sqnorm", "grad_sqnorm_groups", "grad_dot", "grad_inner"),
        *("kept_conv2d", "kept_linear"),
    )
]
TESTS = "conv2d_shapes or test_linear or conv2d_geometries or test_sizes or test_geometries or cache"
OWN = {"AVX-512": "avx512", "AVX2": "avx2"}.get(build_info().get("cpu_capability", "").partition(" ")[0], "baseline")


@pytest.mark.parametrize("capability", ["avx2", "baseline"])
def test_every_instruction_set_computes_the_same(capability: str) -> None:
    if capability == os.environ.get("MEMLOC_CPU_CAPABILITY", OWN):
        pytest.skip("the tests themselves run it")
    files = [str(Path(__file__).with_name(f"{name}.py")) for name in FILES]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:benchmark", *files, "-k", TESTS]
    environment = {**os.environ, "MEMLOC_CPU_CAPABILITY": capability}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
