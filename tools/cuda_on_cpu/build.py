"""Build the CUDA operators for the CPU: their sources as they are but for what C++ has no grammar for."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from torch.utils import cpp_extension

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ASKS = r"cudaFuncSetAttribute\((\w+(?:<[^;{}()]*?>)?),"


def _launch(found: re.Match[str]) -> str:
    """Name the kernel, in the words in which its file asks for more shared memory for it, if it does."""
    kernel = found[1]
    asks = " ".join(kernel.split()) in (" ".join(words.split()) for words in re.findall(ASKS, found.string))
    function = f"reinterpret_cast<const void*>({kernel})" if asks else "nullptr"
    return f"cuda_on_cpu::launch({function}, {found[2]}, [&] {{ {kernel}{found[3]}; }});"


REWRITTEN = (
    (r"(\w+(?:<[^;{}()]*?>)?)<<<(.*?)>>>(\(.*?\));", _launch),  # kernel<<<grid, block, bytes, stream>>>(arguments);
    (r"extern __shared__ (?:__align__\(16\) )?unsigned char (\w+)\[\];",
     r"unsigned char* const \1 = static_cast<unsigned char*>(cuda_on_cpu::dynamic_shared_memory());"),
    (r"__shared__ ([^;]+?) (\w+)((?:\[[^\]]+\])*);", r"auto& \2 = cuda_on_cpu::shared<\1\3>([] {});"),
    # a kernel looks itself whether it was launched with more threads than it was compiled for
    (r"(__launch_bounds__\(([^,()]+)(?:,[^()]*)?\)\s+\w+\([^{}]*?\) \{)", r"\1 cuda_on_cpu::at_most(\2);"),
    # the operators take the CPU's place
    (r"STABLE_TORCH_LIBRARY_IMPL\(memloc_ext, CUDA, m\)", "STABLE_TORCH_LIBRARY_IMPL(memloc_ext, CPU, m)"),
    # blocks of kernels that take any number of items take several
    (r"int64_t\{1\} << 30", "int64_t{5}"),
)  # fmt: skip


def translated(source: str) -> str:
    """Return a CUDA source as C++."""
    for pattern, replacement in REWRITTEN:
        source = re.sub(pattern, replacement, source, flags=re.DOTALL)
    return source


def translate(folder: Path) -> list[Path]:
    """Write ``csrc/cuda`` to a folder, and return the files to compile."""
    files = {file: file.read_text(encoding="utf-8") for file in sorted((ROOT / "csrc" / "cuda").iterdir())}
    for pattern, _ in REWRITTEN:
        if not any(re.search(pattern, text, re.DOTALL) for text in files.values()):
            sys.exit(f"cuda_on_cpu: nothing in csrc/cuda matches {pattern}")
    sources = []
    for file, text in files.items():
        copy = folder / "cuda" / (f"{file.name}.cpp" if file.suffix == ".cu" else file.name)
        copy.parent.mkdir(parents=True, exist_ok=True)
        cpp = f'#line 1 "{file.relative_to(ROOT)}"\n{translated(text)}'
        if not copy.exists() or copy.read_text(encoding="utf-8") != cpp:  # a file that is as it was is not compiled
            copy.write_text(cpp, encoding="utf-8")
        if copy.suffix == ".cpp" and copy.name != "library.cpp":
            sources.append(copy)
    return sources


def build(sanitize: bool) -> None:
    """Compile what changed, and load the operators."""
    folder = ROOT / "build" / ("cuda-on-cpu-sanitized" if sanitize else "cuda-on-cpu")
    sources = translate(folder)
    flags = [
        "-std=c++17",
        "-g1",
        "-O1" if sanitize else "-O2",
        "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
    ]
    flags += [
        "-Wno-unknown-pragmas",
        "-fvisibility=hidden",
        f"-I{HERE / 'include'}",
        f"-I{folder}",
        f"-I{ROOT / 'csrc'}",
    ]
    links = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"] if sanitize else []
    cpp_extension.load(
        name="cuda_on_cpu",
        sources=[str(source) for source in (*sources, HERE / "launch.cpp", HERE / "tensor_core.cpp")],
        extra_cflags=[*flags, *links],
        extra_ldflags=links,
        build_directory=str(folder),
        is_python_module=False,
        verbose=True,
    )
