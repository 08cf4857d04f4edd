"""Build the CUDA kernels without a GPU and read them: fail on a spill, narrow loads, or tensor cores that are not used.

``--report`` does so for every architecture that the report is on, and writes it to bench/results.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.check_wheel import check_library  # noqa: E402
from tools.cuda_kernels import Kernel, read_kernels  # noqa: E402
from tools.cuda_toolkit import cuda_home, toolkit_version  # noqa: E402

ARCHS = ("80", "90a")
REPORTED = ("80", "90a", "100", "120")
REPORT = ROOT / "bench" / "results" / "kernels.json"
TABLE = REPORT.with_suffix(".md")

# Kernels that move 16 bytes at a time, and what of them: loads, stores. Of a kernel that is told how many elements to
# take at a time, this is the variant for 16 bytes.
WIDE = {
    ("ablate_channels_kernel", "fill_kernel"): ("stores",),
    ("channel_saliency_kernel", "channels_kernel"): ("loads",),
    ("channel_saliency_kernel", "planes_kernel"): ("loads",),
    ("conv2d_ablation_kernel", "conv2d_kernel"): ("loads", "stores"),
    ("example_tied_dropout_kernel", "channels_kernel"): ("loads", "stores"),
    ("example_tied_dropout_kernel", "planes_kernel"): ("loads", "stores"),
    ("grad_sqnorm_outer", "outer_kernel"): ("loads",),
    ("linear_ablation_kernel", "linear_kernel"): ("loads", "stores"),
    ("normalization_grads_kernel", "channels_kernel"): ("loads",),
    ("normalization_grads_kernel", "positions_kernel"): ("loads",),
}
SIZES = {"__half": 2, "__nv_bfloat16": 2, "unsigned short": 2, "float": 4, "unsigned int": 4}  # 8 of all others
# Kernels that multiply on tensor cores what was copied to shared memory meanwhile, by the beginning of their name, and
# which of the instructions for it they have.
TENSOR_CORE: dict[tuple[str, str], tuple[str, ...]] = {
    ("grad_sqnorm_tensor", "tensor_kernel"): ("hmma", "ldgsts"),
    ("kept_linear_kernel", "dense_kernel<__"): ("hmma", "ldgsts"),
    ("kept_linear_kernel", "values_kernel<__"): ("hmma", "ldgsts"),
    ("kept_linear_kernel", "weight_kernel<__"): ("hmma", "ldgsts"),
}


def build(archs: tuple[str, ...], home: str) -> tuple[list[Kernel], list[str]]:
    """Build the extension as a user would, out of the way of the one in use; return its kernels and what is wrong."""
    numbers = ";".join(f"{arch.rstrip('a')[:-1]}.{arch[len(arch.rstrip('a')) - 1 :]}" for arch in archs)
    environment = {**os.environ, "MEMLOC_CUDA": "1", "MEMLOC_CUDA_ARCHS": numbers, "CUDA_HOME": home}
    environment["NVCC_APPEND_FLAGS"] = "-Xptxas=-v"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "setup.py", "build_ext", "--build-temp", f"{folder}/temp", "--build-lib", folder]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        libraries = list(Path(folder, "memloc_ext").glob("_C_cuda*"))
        if done.returncode != 0 or not libraries:
            sys.exit(f"the extension does not build with CUDA kernels:\n{done.stdout}\n{done.stderr}")
        return read_kernels(done.stdout + done.stderr, libraries[0], home), check_library(libraries[0])


def is_wide(kernel: Kernel) -> bool:
    """Whether a kernel, of those that move 16 bytes at a time, is the variant that does."""
    lanes = re.search(r"<(.+), (\d+)>$", kernel.name)
    return lanes is None or SIZES.get(lanes[1], 8) * int(lanes[2]) == 16


def problems(kernels: list[Kernel]) -> list[str]:
    """Return a sentence for everything that has to be mended."""
    found = [f"{k.source}: {k.name} spills on sm_{k.arch}" for k in kernels if k.spilled and k.arch in ARCHS]
    for (source, name), kinds in WIDE.items():
        those = [k for k in kernels if k.source == source and k.name.split("<")[0] == name and is_wide(k)]
        if not those:
            found.append(f"{source}: there is no {name}, which was expected to move 16 bytes at a time")
        found += [
            f"{source}: {kernel.name} has no {kind} of 16 bytes on sm_{kernel.arch}"
            for kernel in those
            for kind in kinds
            if max(getattr(kernel, kind), default=0) < 16
        ]
    for (source, name), needed in TENSOR_CORE.items():
        those = [k for k in kernels if k.source == source and k.name.startswith(name)]
        if not those:
            found.append(f"{source}: there is no {name}, which was expected to multiply on tensor cores")
        found += [
            f"{source}: {kernel.name} has no {instruction.upper()} on sm_{kernel.arch}"
            for kernel in those
            for instruction in needed
            if not getattr(kernel, instruction)
        ]
    return found


def widths(accesses: Counter[int]) -> str:
    """Return ``"16 x 4, 4 x 2"``: four of 16 bytes, two of 4."""
    return ", ".join(f"{width} x {count}" for width, count in sorted(accesses.items(), reverse=True))


def write_report(kernels: list[Kernel], home: str) -> None:
    """Write all figures as JSON, a line per kernel and architecture, and a table of what a reader looks for."""
    in_order = sorted(kernels, key=lambda k: (k.source, k.name, REPORTED.index(k.arch)))
    body = ",\n".join(f" {json.dumps(vars(k))}" for k in in_order)
    REPORT.write_text(f'{{"toolkit": "{toolkit_version(home)}", "kernels": [\n{body}\n]}}\n', encoding="utf-8")
    by_key = {(k.source, k.name, k.arch): k for k in kernels}
    head = " | ".join(f"sm_{arch}" for arch in REPORTED)
    lines = [f"| kernel | {head} | loads | stores |", f"| --- |{' ---: |' * len(REPORTED)} --- | --- |"]
    for source in sorted({k.source for k in kernels}):
        lines.append(f"| **{source}** |{' |' * (len(REPORTED) + 2)}")
        for name in sorted({k.name for k in kernels if k.source == source}):
            own = [by_key[source, name, arch] for arch in REPORTED]
            cells = " | ".join(f"{k.registers}, {100 * k.warps // k.most_warps} %" for k in own)
            hopper = by_key[source, name, "90a"]
            lines.append(f"| `{name}` | {cells} | {widths(hopper.loads)} | {widths(hopper.stores)} |")
    spilling = [f"`{k.name}` of {k.source}, {k.spilled} B on sm_{k.arch}" for k in in_order if k.spilled]
    lines += ["", f"Spills, in bytes of code that stores and loads: {'; '.join(spilling) or 'none'}."]
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Print a line per kernel, and exit with 1 if one has to be mended."""
    home = cuda_home()
    if home is None:
        sys.exit("cuda-check: no CUDA toolkit was found; set CUDA_HOME")
    full = sys.argv[1:] == ["--report"]
    kernels, found = build(REPORTED if full else ARCHS, home)
    found += problems(kernels)
    for k in kernels:
        memory = f"{k.stack} B stack, {k.spilled} B spilled, {k.shared:5} B shared"
        occupancy = f"{k.warps:2}/{k.most_warps} warps"
        accesses = f"loads {widths(k.loads) or '-'}; stores {widths(k.stores) or '-'}; {k.hmma} HMMA, {k.ldgsts} LDGSTS"
        print(f"sm_{k.arch:4} {k.registers:3} registers, {memory}, {occupancy}  {k.source}: {k.name}  {accesses}")
    if full and not found:
        write_report(kernels, home)
    print(*found, f"{len(kernels)} kernels compiled and linked, {len(found)} to mend", sep="\n")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
