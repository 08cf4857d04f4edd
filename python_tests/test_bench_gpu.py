"""What `bench/gpu.py` does with its time: every step on the CPU, and steps that fail, hang, or end their process."""

import importlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench import gpu, gpu_goals, gpu_summary, gpu_time  # noqa: E402
from bench.gpu_goals import Goal  # noqa: E402
from bench.workloads import Step, Workload  # noqa: E402

OPERATORS = ("channel_saliency", "conv2d_ablation", "example_tied_dropout", "example_tied_mlp", "grad_sqnorm")
FILES = sorted(file.stem for file in (ROOT / "bench").glob("bench_*.py") if "def gpu_cases" in file.read_text())


def test_a_dry_run_executes_every_step(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "bench" / "gpu.py", "--dry-run", "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["failures"] == {}, (tmp_path / "log.txt").read_text()[-5000:]
    assert done.returncode == 0, done.stderr
    assert result["not_run"] == {}
    assert result["seconds"].keys() == {"smoke", "goals", "operators", "tests"}
    assert len(result["ceilings"]) == 5
    names = [goal["name"] for goal in result["goals"]]
    for name in gpu_goals.MODELS:
        for precision in gpu_goals.PRECISIONS:
            assert sum(one.startswith(f"{name}, 4 examples, {precision}: norms") for one in names) == 3
    assert "scan of 336 channels, 2 examples: time over its arithmetic" in names
    searched = next(one for one in names if one.startswith("seconds to search 20 examples, "))
    assert int(searched.split()[5]) > 0  # flipped
    assert all(goal["measured"] > 0 for goal in result["goals"])
    for operator in OPERATORS:
        assert any(case["case"].startswith(operator) for case in result["cases"]), operator
    assert result["tests"].keys() == {"passed"}
    text = (tmp_path / "summary.txt").read_text()
    assert len(text) <= gpu_summary.MOST_CHARACTERS
    assert done.stdout.endswith(f"{text}written: {tmp_path}\n")


WORKER = """
import json, os, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from bench.gpu_worker import teller, work
state = []
def write(): yield {{"case": "fine", "pid": os.getpid()}}
def look():
    while not (cases := json.loads(Path({result!r}).read_text())["cases"]):
        time.sleep(0.01)
    yield {{"case": "on disk", "cases": cases}}
def fail():
    yield {{"case": "before it failed"}}
    raise ValueError("wrong on purpose")
def poison():
    state.append(1)
    raise RuntimeError("an illegal memory access was encountered")
def last(): yield {{"case": "last", "poisoned": len(state), "pid": os.getpid()}}
steps = {{"fine": (9, write), "look": (9, look), "fails": (9, fail), "hangs": (0.3, lambda: time.sleep(99)),
         "poisons": (9, poison), "dies": (9, lambda: os._exit(7)), "last": (9, last)}}
steps = {{name: steps[name] for name in {names!r}}}
work(steps, set(json.load(sys.stdin)), teller(int(sys.argv[1])), lambda: bool(state))
"""


def run_steps(folder: Path, *names: str, seconds: float = 60) -> dict[str, Any]:
    """Run steps of `WORKER` as a group, and return what was written."""
    script = folder / "worker.py"
    script.write_text(WORKER.format(root=str(ROOT), result=str(folder / "gpu.json"), names=names))
    run = gpu.Run(folder, command="test")
    run.write()
    run.group("group", [sys.executable, str(script), "{}"], time.monotonic() + seconds)
    return json.loads((folder / "gpu.json").read_text())


def test_steps_that_fail_leave_the_others_their_time(tmp_path: Path) -> None:
    result = run_steps(tmp_path, "fine", "look", "fails", "hangs", "poisons", "dies", "last")
    fine, on_disk, before, last = result["cases"]
    assert on_disk["cases"] == [fine]  # written while the next step runs
    assert before == {"case": "before it failed"}
    assert last["poisoned"] == 0
    assert last["pid"] != fine["pid"]
    failures = result["failures"]
    assert failures.keys() == {"fails", "hangs", "poisons", "dies"}
    assert "wrong on purpose" in failures["fails"]
    assert failures["hangs"] == "stopped after its limit of 0.3 s"
    assert "illegal memory access" in failures["poisons"]
    assert failures["dies"] == "its process ended with 7; see log.txt"
    assert result["not_run"] == {}
    assert result["step_seconds"].keys() == {"fine", "look", "fails", "last"}


def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    script = WORKER.replace('"hangs": (0.3', '"hangs": (99')
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "WORKER", script)
        result = run_steps(tmp_path, "fine", "hangs", "last", seconds=3)
    assert [case["case"] for case in result["cases"]] == ["fine"]
    assert result["failures"] == {"hangs": "stopped: no time was left"}
    assert result["not_run"] == {"group": ["last"]}
    assert "NOT RUN in group: 1" in (tmp_path / "summary.txt").read_text()


def test_a_process_that_cannot_start_is_told_of_once(tmp_path: Path) -> None:
    run = gpu.Run(tmp_path, command="test")
    run.group("group", [sys.executable, "-c", "raise SystemExit(5)", "{}"], time.monotonic() + 60)
    assert run.result["failures"] == {"group": "its process ended with 5; see log.txt"}


def test_tests_are_steps_too(tmp_path: Path) -> None:
    (tmp_path / "test_made.py").write_text(
        "import os, time, pytest\n"
        "def test_passes(): pass\n"
        "def test_hangs(): time.sleep(99)\n"
        "def test_fails(): assert 1 == 2\n"
        "@pytest.mark.skip\ndef test_left_out(): pass\n"
        "def test_dies(): os._exit(7)\n"
        "def test_passes_last(): pass\n"
    )
    (tmp_path / "worker.py").write_text(
        f"import os, sys, json, pytest; os.chdir({str(tmp_path)!r}); sys.path.insert(0, {str(ROOT)!r})\n"
        "os.environ['PYTEST_DISABLE_PLUGIN_AUTOLOAD'] = '1'\n"
        "from bench.gpu_worker import Tests, teller\n"
        "plugin = Tests(json.load(sys.stdin), teller(int(sys.argv[1])), lambda: False, 2)\n"
        "arguments = ['-p', 'no:cacheprovider', '-c', '/dev/null', '--rootdir', '.', 'test_made.py']\n"
        "pytest.main(arguments, plugins=[plugin])\n"
    )
    run = gpu.Run(tmp_path / "out", command="test")
    run.group("tests", [sys.executable, str(tmp_path / "worker.py"), "{}"], time.monotonic() + 60)
    assert run.result["tests"] == {"passed": 2, "failed": 1, "skipped": 1}
    reasons = {name.rpartition("::")[2]: why for name, why in run.result["failures"].items()}
    assert reasons.keys() == {"test_hangs", "test_fails", "test_dies"}
    assert "assert 1 == 2" in reasons["test_fails"]
    assert run.result["not_run"] == {}


def test_a_run_that_is_stopped_prints_what_it_has(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "bench" / "gpu.py", "--dry-run", "--output", tmp_path]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    first = json.loads(process.stdout.readline())
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode != 0
    assert json.loads((tmp_path / "gpu.json").read_text())["ceilings"][0] == first
    assert out.endswith(f"{(tmp_path / 'summary.txt').read_text()}written: {tmp_path}\n")


def test_a_summary_is_short_and_names_goals_and_failures_first() -> None:
    goal = Goal("a network: norms only over a plain step", 3.14159, 0.9).record()
    case = {"case": "an_operator " + 60 * "x", "device_us": 1.0, "host_us": 2.0, "time_over_peer": 1.5}
    case |= {"share_of_peer_bandwidth": 0.7, "at_least": 0.85, "met": False}
    result = {"machine": {"gpu": "a card"}, "ceilings": [], "goals": [goal] * 40, "cases": [case] * 400}
    result |= {"tests": {"passed": 7, "failed": 2}, "failures": {f"step {i}": "why\n" * 999 for i in range(99)}}
    result |= {"not_run": {"tests 1 of 4": ["a", "b"]}, "seconds": {"smoke": 12.3}}
    text = gpu_summary.summary(result)
    assert len(text) <= 8000
    assert "! 3.142 (<= 0.9) a network: norms only over a plain step" in text
    assert "-- FAILED: 99" in text
    assert "NOT RUN in tests 1 of 4: 2" in text
    assert "7 passed" in text
    assert "an_operator" in text
    assert text.index("goals") < text.index("FAILED") < text.index("an_operator")


@pytest.mark.parametrize("file", FILES)
def test_cases_are_told_apart_and_beyond_a_gpus_cache(file: str) -> None:
    names = [case.name for case in importlib.import_module(f"bench.{file}").gpu_cases(False)]
    assert names
    assert len(set(names)) == len(names)


def test_a_case_counts_bytes_and_operations_and_raises_last() -> None:
    def case(check: Any = lambda *_: None) -> gpu_time.GpuCase:
        return gpu_time.GpuCase(
            "case",
            lambda device: (torch.ones(4, device=device),),
            check,
            lambda x: time.sleep(0.004),
            lambda x: time.sleep(0.001),
            lambda x: (4.0 * x.nbytes, 1.0 * x.nbytes),
            operations=lambda x: 1e9,
            at_least=0.5,
        )

    (record,) = case().records("cpu")
    assert record["time_over_peer"] == pytest.approx(4, rel=0.4)
    assert record["share_of_peer_bandwidth"] == pytest.approx(4 / record["time_over_peer"], rel=1e-2)
    assert record["TFLOP_per_s"] == pytest.approx(1e9 / (1e-6 * record["device_us"]) / 1e12, rel=0.05)
    assert record["met"]

    def wrong(x: torch.Tensor) -> None:
        raise AssertionError("wrong result")

    records: Iterator[dict[str, Any]] = case(wrong).records("cpu")
    assert next(records)["case"] == "case"
    with pytest.raises(AssertionError, match="wrong result"):
        next(records)


def test_a_goal_is_met_on_the_right_side_of_its_bound() -> None:
    assert [Goal("", measured, 1.1).met for measured in (1.0, 1.1, 1.2)] == [True, True, False]
    assert [Goal("", measured, 2, at_most=False).met for measured in (1.9, 2.0)] == [False, True]
    assert Goal("", 9.0).met
    record = {"name": "x", "measured": 0.123, "bound": 1, "at_most": True, "met": True, "host": 2}
    assert Goal("x", 0.12345, 1, details={"host": 2}).record() == record


def test_norms_that_are_wrong_fail_behind_their_times(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, precision = gpu_goals.functorch, torch.get_float32_matmul_precision()

    def doubled(workload: Workload) -> Step:
        return lambda: {name: 2 * norms for name, norms in exact(workload)().items()}

    monkeypatch.setattr(gpu_goals, "functorch", doubled)
    monkeypatch.setattr(gpu_goals, "opacus_ghost", lambda workload: None)
    goals = gpu_goals.accounting("cpu", "ResNet-9", "TF32", tiny=True)
    assert [next(goals).bound for _ in range(3)] == [1.1, 0.8, None]
    with pytest.raises(AssertionError, match=r"the squared norms of .* are wrong by"):
        next(goals)
    assert torch.get_float32_matmul_precision() == precision
