import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import memloc_ext

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tools import cuda_toolkit  # noqa: E402


def test_architectures_become_flags() -> None:
    assert cuda_toolkit.gencode("8.0+PTX;9.0a;") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=compute_80",
        "-gencode=arch=compute_90a,code=sm_90a",
    ]
    assert len(cuda_toolkit.gencode("8.0 8.6")) == 2
    with pytest.raises(SystemExit, match=r"must be numbers such as .* got 'Hopper'"):
        cuda_toolkit.gencode("8.0;Hopper")


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "bin").mkdir()
    (tmp_path / "include").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    (tmp_path / "include" / "cuda_runtime.h").touch()
    (tmp_path / "include" / "cuda.h").write_text("#define CUDA_VERSION 12080")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    for name in ("MEMLOC_CUDA", "MEMLOC_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_cuda_follows_torch_the_toolkit_and_the_switch(toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda_toolkit.toolkit_version(str(toolkit)) == "12.8"
    assert cuda_toolkit.choose_cuda("12.6") == (str(toolkit), "8.0+PTX;9.0a")
    assert cuda_toolkit.choose_cuda(None)[0] is None
    with pytest.raises(SystemExit, match=r"torch is built for CUDA 13.0 but the toolkit in .* is 12.8"):
        cuda_toolkit.choose_cuda("13.0")
    monkeypatch.setenv("MEMLOC_CUDA", "0")
    assert cuda_toolkit.choose_cuda("13.0")[0] is None
    monkeypatch.setenv("MEMLOC_CUDA", "1")
    monkeypatch.setenv("MEMLOC_CUDA_ARCHS", "9.0a")
    assert cuda_toolkit.choose_cuda(None) == (str(toolkit), "9.0a")
    monkeypatch.setenv("MEMLOC_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be 0, 1 or unset, got 'yes'"):
        cuda_toolkit.choose_cuda(None)


RUNTIME = """
#pragma once
#include <cstring>
enum cudaError_t { cudaSuccess, cudaErrorNoKernelImageForDevice = 209, cudaErrorUnsupportedPtxVersion = 222, other };
struct cudaDeviceProp { char name[256]; int major, minor; };
inline const char* cudaGetErrorString(cudaError_t) { return "no kernel image is available"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 3, cudaSuccess; }
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* card, int device) {
  std::strcpy(card->name, device == 3 ? "NVIDIA H900" : "another");
  card->major = MAJOR;
  card->minor = 0;
  return cudaSuccess;
}
"""
PROGRAM = """
#include "cuda/no_code.h"
#include <cstdio>
int main() {
  using namespace memloc;
  if (is_no_code(cudaSuccess) || is_no_code(other) || !is_no_code(cudaErrorUnsupportedPtxVersion)) return 1;
  std::puts(no_code(cudaErrorNoKernelImageForDevice, "channel_saliency").c_str());
}
"""


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a compiler")
@pytest.mark.parametrize(("major", "arch"), [(9, "9.0a"), (12, "12.0")])
def test_a_card_without_code_is_named_with_what_to_build_for(major: int, arch: str, tmp_path: Path) -> None:
    (tmp_path / "cuda_runtime_api.h").write_text(RUNTIME)
    (tmp_path / "main.cpp").write_text(PROGRAM)
    defined = [f"-DMAJOR={major}", '-DMEMLOC_CUDA_ARCHS="8.0;8.6"']
    command = ["c++", "-std=c++17", f"-I{tmp_path}", f"-I{ROOT / 'csrc'}", *defined, tmp_path / "main.cpp"]
    subprocess.run([*command, "-o", tmp_path / "main"], check=True)
    done = subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=True)
    assert done.stdout == (
        "CUDA error in channel_saliency: no kernel image is available: NVIDIA H900 has no code in this build of "
        f"memloc_ext, which is for 8.0;8.6; build it with MEMLOC_CUDA_ARCHS={arch}\n"
    )


@pytest.mark.skipif(torch.cuda.is_available() and memloc_ext.has_cuda_kernels, reason="the GPU is there")
def test_asking_for_the_gpu_tests_without_a_gpu_fails() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "python_tests/ops/test_devices.py"]
    environment = {**os.environ, "MEMLOC_REQUIRE_CUDA": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no CUDA device" in done.stdout + done.stderr


def test_without_torch_the_build_says_what_to_run(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('No module named torch')")
    command = [sys.executable, "setup.py", "--version"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "pip install --no-build-isolation ." in done.stderr
