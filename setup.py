"""Build memloc_ext's extension modules; the environment switches are described in the README."""

import glob
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # pip runs this file without its folder on the path
try:
    import pybind11
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    sys.exit(
        f"memloc_ext: {error}; it compiles against the PyTorch you already have, so run: pip install 'torch>=2.10' "
        "pybind11 ninja setuptools && pip install --no-build-isolation ."
    )
from setuptools import Extension, setup

from tools.cuda_toolkit import cuda_home, gencode

mode = os.environ.get("MEMLOC_CUDA", "auto")
if mode not in ("auto", "0", "1"):
    sys.exit(f"memloc_ext: MEMLOC_CUDA must be 0, 1 or unset, got {mode!r}")
toolkit = cuda_home()
if mode == "1" and toolkit is None:
    sys.exit("MEMLOC_CUDA=1 but no CUDA toolkit was found; set CUDA_HOME or unset MEMLOC_CUDA")
with_cuda = mode == "1" or (mode == "auto" and torch.version.cuda is not None and toolkit is not None)
with_host = os.environ.get("MEMLOC_HOST", "1") != "0"
archs = os.environ.get("MEMLOC_CUDA_ARCHS") or os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0+PTX;9.0a"
print(f"memloc_ext: torch {torch.__version__}, CUDA kernels: {archs if with_cuda else 'no'}", file=sys.stderr)

OLDEST_TORCH = (
    "-DTORCH_TARGET_VERSION=0x020a000000000000"  # 2.10: the binaries load in this release and every later one
)
CSRC = os.path.abspath("csrc")
CXX = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-fopenmp-simd", "-Wall", f"-I{CSRC}", OLDEST_TORCH]
STRIP = ["-Wl,-s"] if sys.platform == "linux" else []

extensions = [
    cpp_extension.CppExtension(
        "memloc_ext._C",
        ["csrc/library.cpp", *sorted(glob.glob("csrc/cpu/*.cpp"))],
        py_limited_api=True,
        extra_compile_args={"cxx": CXX},
        extra_link_args=STRIP,
    )
]
if with_cuda:
    cpp_extension.CUDA_HOME = toolkit  # torch leaves it unset in a CPU build; BuildExtension needs it to find nvcc
    nvcc = ["-O3", "-std=c++17", "-lineinfo", "-Xptxas", "-v", f"-I{CSRC}", OLDEST_TORCH, "-DUSE_CUDA", *gencode(archs)]
    extensions.append(
        cpp_extension.CppExtension(  # not CUDAExtension: it links libraries that a CPU build of torch does not have
            "memloc_ext._C_cuda",
            sorted(glob.glob("csrc/cuda/*.cpp") + glob.glob("csrc/cuda/*.cu")),
            py_limited_api=True,
            include_dirs=[f"{toolkit}/include"],
            library_dirs=[f"{toolkit}/lib64"],
            libraries=["cudart"],
            extra_compile_args={"cxx": [*CXX, "-DUSE_CUDA"], "nvcc": nvcc},
            extra_link_args=[
                "-Wl,--no-as-needed",
                "-ltorch",
                *STRIP,
            ],  # libtorch pulls in libtorch_cuda where there is one
        )
    )
if with_host:
    host_args = [
        "-O2",
        "-g0",
        "-std=c++17",
        "-fvisibility=hidden",
        f'-DMEMLOC_CUDA_ARCHS="{archs if with_cuda else ""}"',
    ]
    extensions.append(
        Extension(
            "memloc_ext._host",
            sorted(glob.glob("csrc/host/*.cpp")),
            include_dirs=[pybind11.get_include()],
            extra_compile_args=host_args,
            extra_link_args=STRIP,
            language="c++",
        )
    )

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": cpp_extension.BuildExtension},
    options={} if with_host else {"bdist_wheel": {"py_limited_api": "cp310"}},  # pybind11 pins the Python version
)
