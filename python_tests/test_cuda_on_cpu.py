"""The stand-in for a CUDA device that the kernels are tested on without one: what it runs, and what it refuses."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tools.cuda_on_cpu.build import HERE, translated  # noqa: E402

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a compiler")
THREADS, BLOCKS = 96, 4


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    source, compiled = folder / "kernels.cpp", folder / "kernels"
    source.write_text(translated((ROOT / "python_tests" / "data" / "cuda_on_cpu.cu").read_text()))
    files = [str(source), str(HERE / "launch.cpp"), str(HERE / "tensor_core.cpp")]
    includes = [f"-I{path}" for path in (HERE / "include", ROOT / "csrc", *include_paths())]
    subprocess.run(["c++", "-std=c++17", *includes, *files, "-o", str(compiled)], check=True)
    return compiled


def run(program: Path, kernel: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, kernel], capture_output=True, text=True, check=False, timeout=60)


def numbers(program: Path, kernel: str) -> list[int]:
    done = run(program, kernel)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


def test_threads_meet_at_a_barrier(program: Path) -> None:
    assert numbers(program, "reversed") == BLOCKS * list(range(THREADS))[::-1]


def test_a_missing_barrier_shows_in_every_block(program: Path) -> None:
    raced = numbers(program, "raced")
    for block in range(BLOCKS):
        values = raced[block * THREADS : (block + 1) * THREADS]
        assert values != list(range(THREADS))[::-1]
        assert -1 in values  # what nobody had written


def test_shuffles_stay_in_their_group_of_lanes(program: Path) -> None:
    lanes = range(32)
    expected = [100 * (lane + 3 if lane % 8 < 5 else lane) + lane // 8 * 8 + 35 % 8 for lane in lanes]
    assert numbers(program, "shuffled") == BLOCKS * 3 * expected


def test_shared_memory_that_the_launch_asks_for(program: Path) -> None:
    for kernel in ("dynamic", "asked", "asked for all"):
        assert numbers(program, kernel) == BLOCKS * [*range(1, THREADS), 0]


@pytest.mark.parametrize("kernel", ["divergent", "some_lanes"])
def test_threads_that_do_not_come_are_waited_for_in_vain(program: Path, kernel: str) -> None:
    done = run(program, kernel)
    assert done.returncode < 0
    assert "waits for threads that do not come" in done.stderr


def test_more_threads_than_a_kernel_was_compiled_for(program: Path) -> None:
    done = run(program, "bounded")
    assert done.returncode < 0
    assert "more threads than the launch bounds" in done.stderr


@pytest.mark.parametrize("kernel", ["large", "greedy", "asked for less", "asked for more"])
def test_a_launch_that_no_device_takes_fails(program: Path, kernel: str) -> None:
    assert run(program, kernel).returncode == 1
