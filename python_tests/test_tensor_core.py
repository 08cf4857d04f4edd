"""Products on tensor cores and asynchronous copies, one function per instruction: on a device, and on its stand-in."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tools.cuda_on_cpu.build import HERE, translated  # noqa: E402
from tools.cuda_toolkit import cuda_home  # noqa: E402

SOURCE = ROOT / "python_tests" / "data" / "tensor_core.cu"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "tf32": torch.float32}


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("c++") is None:
        pytest.skip("needs a compiler")
    folder = tmp_path_factory.mktemp("tensor_core")
    source, compiled = folder / "kernels.cpp", folder / "kernels"
    source.write_text(translated(SOURCE.read_text()))
    files = [str(source), str(HERE / "launch.cpp"), str(HERE / "tensor_core.cpp")]
    includes = [f"-I{path}" for path in (HERE / "include", ROOT / "csrc", *include_paths())]
    subprocess.run(["c++", "-std=c++17", *includes, *files, "-o", str(compiled)], check=True)
    return compiled


@pytest.fixture(scope="module")
def on_device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = cuda_home()
    if home is None or not torch.cuda.is_available():
        pytest.skip("needs a CUDA device and a toolkit")
    compiled = tmp_path_factory.mktemp("tensor_core") / "kernels"
    flags = ["-std=c++17", "-arch=native", f"-I{ROOT / 'csrc'}"]
    subprocess.run([f"{home}/bin/nvcc", *flags, str(SOURCE), "-o", str(compiled)], check=True)
    return compiled


@pytest.fixture(params=["stand_in", pytest.param("on_device", marks=pytest.mark.cuda)])
def program(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def operands() -> tuple[torch.Tensor, torch.Tensor]:
    """Return a and b, ``[16, 16]``; no two elements alike."""
    make = torch.Generator().manual_seed(0)
    return torch.randn(16, 16, generator=make), torch.randn(16, 16, generator=make)


def run(program: Path, kernel: str) -> subprocess.CompletedProcess[str]:
    numbers = " ".join(f"{value:.9g}" for operand in operands() for value in operand.flatten().tolist())
    return subprocess.run([program, kernel], input=numbers, capture_output=True, text=True, check=False, timeout=60)


def lines(program: Path, kernel: str) -> list[list[float]]:
    done = run(program, kernel)
    assert done.returncode == 0, done.stderr
    return [[float(word) for word in line.split()] for line in done.stdout.splitlines()]


@pytest.mark.parametrize("kernel", ["float16", "float16 turned", "bfloat16", "bfloat16 turned", "tf32"])
def test_products(kernel: str, program: Path) -> None:
    result = torch.tensor(lines(program, kernel)[0]).view(16, 16)
    dtype = DTYPES[kernel.split()[0]]
    a, b = (operand.to(dtype).double() for operand in operands())
    if dtype == torch.float32:
        # 13 fewer bits, halves rounded up
        a, b = (((t.float().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).double() for t in (a, b))
    exact, magnitude = 1 + a @ b, 1 + a.abs() @ b.abs()
    # tensor cores may cut a term off where the largest one of a sum ends
    assert ((result - exact).abs() <= 17 * 2**-23 * magnitude).all()


def test_copies_arrive_and_fill_with_zeros(program: Path) -> None:
    first, second = torch.tensor(lines(program, "copied 0")[0]).view(2, 32, 4)
    expected = operands()[0].view(2, 32, 4).clone()
    expected[1, ::2] = 0
    assert torch.equal(torch.stack([first, second]), expected)


@pytest.mark.parametrize(("pending", "arrived"), [(1, 1), (2, 0), (3, 0)])
def test_what_is_not_waited_for_shows(pending: int, arrived: int, stand_in: Path) -> None:
    groups = torch.tensor(lines(stand_in, f"copied {pending}")[0]).view(2, 128)
    assert torch.equal(groups[:arrived], operands()[0].view(2, 128)[:arrived])
    assert groups[arrived:].isnan().all()


@pytest.mark.parametrize(("kernel", "repeats"), [("16", 0), ("32", 8), ("128", 56), ("144", 0)])
def test_bank_conflicts_are_counted(kernel: str, repeats: int, stand_in: Path) -> None:
    # of four accesses of eight lanes that copy, and four that load
    assert lines(stand_in, f"rows {kernel}")[1] == [8, repeats]


def test_lanes_that_read_the_same_do_not_conflict(stand_in: Path) -> None:
    assert lines(stand_in, "same row")[1] == [4, 0]


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("some lanes", "waits for threads that do not come"),
        ("different instructions", "lanes of a warp meet in different instructions"),
        ("misaligned", "an address that is no multiple of 16"),
        ("elsewhere", "an address outside of shared memory"),
    ],
)
def test_what_no_device_does_stops(kernel: str, message: str, stand_in: Path) -> None:
    done = run(stand_in, kernel)
    assert done.returncode < 0
    assert message in done.stderr
