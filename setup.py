"""Build memloc_ext's extension modules; docs/wheels.md describes the variables that it reads."""

import glob
import importlib
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # pip runs this file without its folder on the path
try:
    import torch
    from torch.utils import cpp_extension

    pybind11 = importlib.import_module("pybind11") if os.environ.get("MEMLOC_HOST") != "0" else None
except ImportError as error:
    sys.exit(
        f"memloc_ext: {error}; it compiles against the PyTorch you already have, so run: "
        "pip install 'torch>=2.10' pybind11 ninja 'setuptools>=77' && pip install --no-build-isolation ."
    )
from setuptools import Extension, setup

from tools.cuda_toolkit import choose_cuda, gencode

ROOT = os.path.dirname(os.path.abspath(__file__))
toolkit, archs = choose_cuda(torch.version.cuda)
print(f"memloc_ext: torch {torch.__version__}, CUDA kernels: {archs if toolkit else 'no'}", file=sys.stderr)

# Oldest torch that the binaries load in: 2.10. Source paths are cut from messages, so that a build tells no folder.
COMMON = ["-O3", "-std=c++17", f"-I{ROOT}/csrc", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
PREFIXES = [f"-fmacro-prefix-map={path}/=" for path in (ROOT, os.path.dirname(torch.__file__))]
HOST = ["-g0", "-fvisibility=hidden", "-Wall", *PREFIXES]
STRIP = ["-Wl,-s"] if sys.platform == "linux" else []
if os.environ.get("MEMLOC_SANITIZE") == "1":  # for `make sanitize`, which also loads the runtime before Python
    SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    COMMON[0], HOST[0], STRIP = "-O1", "-g1", SANITIZE
    HOST += [*SANITIZE, "-fno-omit-frame-pointer"]

extensions = [
    cpp_extension.CppExtension(
        "memloc_ext._C",
        ["csrc/library.cpp", *sorted(glob.glob("csrc/cpu/*.cpp"))],
        py_limited_api=True,
        extra_compile_args={"cxx": [*COMMON, *HOST, "-fopenmp-simd"]},
        extra_link_args=STRIP,
    )
]
if toolkit:
    cpp_extension.CUDA_HOME = toolkit  # torch leaves it unset in a CPU build; BuildExtension needs it to find nvcc
    nvcc = [*COMMON, "-DUSE_CUDA", *gencode(archs)]
    extensions.append(
        cpp_extension.CppExtension(  # not CUDAExtension: it links libraries that a CPU build of torch does not have
            "memloc_ext._C_cuda",
            sorted(glob.glob("csrc/cuda/*.cpp") + glob.glob("csrc/cuda/*.cu")),
            py_limited_api=True,
            include_dirs=[f"{toolkit}/include"],
            library_dirs=[f"{toolkit}/lib64"],
            libraries=["cudart_static", "dl", "rt"],
            extra_compile_args={
                "cxx": [*COMMON, *HOST, "-DUSE_CUDA", f'-DMEMLOC_CUDA_ARCHS="{archs}"'],
                "nvcc": nvcc,
            },
            # pulls in libtorch_cuda where there is one; csrc/cuda/library.cpp lists the kernels
            extra_link_args=["-Wl,--no-as-needed", "-ltorch", "-Wl,--wrap=__cudaRegisterFunction", *STRIP],
        )
    )
if pybind11:
    host = Extension("memloc_ext._host", sorted(glob.glob("csrc/host/*.cpp")), language="c++")
    host.define_macros = [("MEMLOC_CUDA_ARCHS", f'"{archs if toolkit else ""}"')]
    host.include_dirs.append(pybind11.get_include())
    host.extra_compile_args = [*COMMON, *HOST]
    host.extra_link_args = STRIP
    extensions.append(host)
if os.environ.get("MEMLOC_EXTENSIONS") == "0":  # for `make`, which has built them in their places
    extensions = []

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": cpp_extension.BuildExtension},
    options={} if pybind11 else {"bdist_wheel": {"py_limited_api": "cp310"}},  # pybind11 pins the Python version
)
