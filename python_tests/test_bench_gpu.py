"""What `bench/gpu.py` measures on whole models runs, here on the CPU and on little of everything."""

import functools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import bench_ablation, gpu_goals, measure
from bench.gpu_goals import Goal
from bench.workloads import Step, Workload

SMALL = {
    "ResNet-9": (functools.partial(gpu_goals.ResNet9, width=0.25), 512),
    "ViT-small": (functools.partial(gpu_goals.VisionTransformer, dim=32), 256),
}


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SMALL.keys() == gpu_goals.MODELS.keys()
    monkeypatch.setattr(gpu_goals, "MODELS", SMALL)
    monkeypatch.setattr(gpu_goals, "seconds", lambda function, device, rounds=2: measure.seconds(function, device, 2))


def test_a_goal_is_met_on_the_right_side_of_its_bound() -> None:
    assert [Goal("", measured, 1.1).met for measured in (1.0, 1.1, 1.2)] == [True, True, False]
    assert [Goal("", measured, 2, at_most=False).met for measured in (1.9, 2.0)] == [False, True]
    assert Goal("x", 0.12345, 1).record() == {"name": "x", "measured": 0.123, "bound": 1, "at_most": True, "met": True}


@pytest.mark.parametrize("name", gpu_goals.MODELS)
@pytest.mark.parametrize("precision", gpu_goals.PRECISIONS)
def test_accounting(name: str, precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    goals = list(gpu_goals.accounting("cpu", name, precision, batch=4))
    assert torch.get_float32_matmul_precision() == before
    assert all(goal.name.startswith(f"{name}, 4 examples, {precision}: ") and goal.measured > 0 for goal in goals)
    assert [goal.bound for goal in goals][:2] == [1.1, 0.8]


def test_norms_that_are_wrong_stop_it(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = gpu_goals.functorch

    def doubled(workload: Workload) -> Step:
        return lambda: {name: 2 * norms for name, norms in wrong(workload)().items()}

    monkeypatch.setattr(gpu_goals, "functorch", doubled)
    with pytest.raises(AssertionError):
        next(gpu_goals.accounting("cpu", "ResNet-9", "TF32", batch=4))


def test_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_ablation, "ResNet9", functools.partial(gpu_goals.ResNet9, width=0.25))
    goal = gpu_goals.scan("cpu", batch=2, forward_batch=4)
    assert goal.name == "scan of 336 channels, 2 examples: time over its arithmetic"
    assert goal.measured > 0.5


def test_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_goals, "ResNet9", functools.partial(gpu_goals.ResNet9, width=0.125))
    goal = gpu_goals.search("cpu", examples=20, reference=16, trained_on=400, epochs=6)
    assert goal.name.startswith("seconds to search 20 examples, ")
    assert int(goal.name.split()[5]) > 0
