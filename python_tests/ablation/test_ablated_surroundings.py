import contextlib
import copy
import warnings
from typing import Any

import pytest
import torch
from ablating import Model, check, labels, plain_losses, settled
from torch import Tensor, nn
from torch.nn import functional as F

import memloc_ext
from memloc_ext import ablation_losses
from memloc_ext.ops import _checks

B = 3


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def small(channels: int = 4) -> nn.Module:
    layers = nn.Conv2d(2, channels, 3), nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 4, 3), nn.ReLU()
    return settled(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)))


def images() -> Tensor:
    return torch.randn(B, 2, 6, 6)


def check_against_itself(model: nn.Module, x: Tensor, sites: list[str], tolerance: float) -> None:
    """Hold all losses against the model in its own type."""
    losses = ablation_losses(model, x, labels(B), sites)
    for site, found in losses.items():
        expected = plain_losses(model, x, labels(B), site, range(len(found.loss)), "zero", None, None)
        torch.testing.assert_close(found.loss, expected, rtol=tolerance, atol=tolerance)


# types and layouts


def test_float64() -> None:
    assert check(small().double(), images().double())["2"].loss.dtype == torch.float64


def test_float64_of_tokens() -> None:
    parts = {"embed": nn.Embedding(9, 4), "hidden": nn.Linear(4, 6), "head": nn.Linear(6, 3)}
    model = Model(lambda m, x: m.head(F.relu(m.hidden(m.embed(x))).mean(1)), **parts).double()
    check(model, torch.randint(0, 9, (B, 5)), ["embed", "hidden"])


@pytest.mark.filterwarnings("error:ablation_losses")
def test_bfloat16() -> None:
    layers = nn.Conv2d(2, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten()
    model = nn.Sequential(*layers, nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3)).bfloat16()
    for _ in range(8):  # some rounds otherwise in a batch
        check_against_itself(model, images().bfloat16(), ["1", "3", "6"], 0.05)


class Cast(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(x)


@pytest.mark.filterwarnings("error:ablation_losses")
@pytest.mark.parametrize("inside", [False, True])
def test_autocast(inside: bool) -> None:
    layers = nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten()
    model = nn.Sequential(*layers, nn.Linear(16, 3))
    if inside:
        check_against_itself(Cast(model), images().mul(0.1), ["inner.1", "inner.3"], 0.02)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            check_against_itself(model, images().mul(0.1), ["1", "3"], 0.02)


def test_channels_last() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = small()[:5], nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:  # a view for channels_last alone
            return self.head(self.inner(x).permute(0, 2, 3, 1).view(len(x), -1))

    model = Last().to(memory_format=torch.channels_last)
    check(model, images().to(memory_format=torch.channels_last), ["inner.0", "inner.2", "inner.4"])


def test_frozen_parameters_and_images_with_gradients() -> None:
    model, x = small().requires_grad_(False), images().requires_grad_()
    found = check(model, x)
    assert x.grad is None
    assert not any(site.loss.requires_grad for site in found.values())


def test_compiled() -> None:
    plain, x, y = small(), images(), labels(B)
    model = torch.compile(plain, backend="eager")
    model(x)
    found = ablation_losses(model, x, y, ["_orig_mod.0", "_orig_mod.2"])
    for name, expected in ablation_losses(plain, x, y, ["0", "2"]).items():
        torch.testing.assert_close(found[f"_orig_mod.{name}"].loss, expected.loss)
    with pytest.raises(ValueError, match="sites must be names of the model's modules, got '2'"):
        ablation_losses(model, x, y, ["2"])


@pytest.mark.parametrize("mode", [None, "train", "test", "drop", "drop_gen"])
def test_example_tied_dropout(mode: str | None) -> None:
    dropout = memloc_ext.nn.ExampleTiedDropout(0.3, 0.4)
    dropout.mode = mode
    layers = nn.Conv2d(2, 8, 3), nn.ReLU(), dropout, nn.Conv2d(8, 4, 3), nn.ReLU()
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    with memloc_ext.example_ids(torch.tensor([5, 1, 7])):
        check(model.train(), images(), ["0", "1", "2", "3", "4"], count=8)


def test_a_recording_does_not_read_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA `example_ids` reads the ids it is given, which a recording would refuse."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 4), memloc_ext.nn.ExampleTiedDropout(0.3, 0.4), nn.Linear(4, 3))
    monkeypatch.setattr(_checks, "readable", lambda ids: True)
    with memloc_ext.example_ids(torch.tensor([5, 1, 7])), warnings.catch_warnings():
        warnings.simplefilter("error")
        ablation_losses(model, images(), labels(B), ["1"])


# sizes


def test_one_example_and_one_unit() -> None:
    check(small(1), images()[:1])
    check(nn.Sequential(nn.Flatten(), nn.Linear(72, 1), nn.Linear(1, 3)), images())


def test_memory_budgets() -> None:
    model, x, y = small(), torch.randn(7, 2, 6, 6), labels(7)
    plenty = ablation_losses(model, x, y)
    with pytest.raises(ValueError, match=r"memory_budget must be at least \d+ bytes") as error:
        ablation_losses(model, x, y, memory_budget=1)
    least = int(str(error.value).split("at least ")[1].split()[0])
    for budget in (least, 2 * least, 7 * least):
        scarce = ablation_losses(model, x, y, memory_budget=budget)
        assert list(scarce) == list(plenty)
        for site in plenty:
            torch.testing.assert_close(scarce[site].loss, plenty[site].loss)
            assert torch.equal(scarce[site].predicted, plenty[site].predicted)
    with pytest.raises(ValueError, match="memory_budget"):
        ablation_losses(model, x, y, memory_budget=least - 1)


@pytest.mark.parametrize("slow", [False, True])
def test_progress_counts_the_units(slow: bool) -> None:
    model, x, y, done = small(), images(), labels(B), list[int]()
    if slow:
        model = Model(lambda m, x: m.inner(x) if x.sum() < 1e9 else x, inner=model)
    with pytest.warns(UserWarning, match="reads an activation") if slow else contextlib.nullcontext():
        found = ablation_losses(model, x, y, progress=done.append)
    assert sum(done) == sum(len(site.loss) for site in found.values()) == 8
    if not slow:
        scarce = list[int]()
        with pytest.raises(ValueError, match="memory_budget must be at least") as error:
            ablation_losses(model, x, y, memory_budget=1)
        least = int(str(error.value).split()[5])
        ablation_losses(model, x, y, memory_budget=least, progress=scarce.append)
        assert (sum(scarce), min(scarce)) == (8, 1)
        assert len(scarce) > 4


def test_the_mean_over_other_examples() -> None:
    model, x, y, other = small().eval(), images(), labels(B), torch.randn(5, 2, 6, 6)
    found = ablation_losses(model, x, y, ["2"], "mean", reference=other)["2"].loss
    with torch.no_grad():
        means = model[:3](other).mean((0, 2, 3))
        for unit, mean in enumerate(means):
            hidden = model[:3](x)
            hidden[:, unit] = mean
            expected = F.cross_entropy(model[3:](hidden), y, reduction="none")
            torch.testing.assert_close(found[unit], expected)


# the model is left as it was


def state(model: nn.Module) -> Any:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    hooks = [[len(h) for name, h in vars(m).items() if name.endswith("_hooks")] for m in model.modules()]
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return {
        "objects": {name: id(t) for name, t in tensors.items()},
        "values": copy.deepcopy({name: t.detach() for name, t in tensors.items()}),
        "grads": grads,
        "needs": {name: p.requires_grad for name, p in model.named_parameters()},
        "modes": [m.training for m in model.modules()],
        "hooks": hooks,
        "generator": torch.get_rng_state(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
    }


def assert_same_state(before: Any, after: Any) -> None:
    for part in ("objects", "needs", "modes", "hooks", "fast path"):
        assert before[part] == after[part], part
    for part in ("values", "grads"):
        for name, t in before[part].items():
            assert (t is None) == (after[part][name] is None), name
            assert t is None or torch.equal(t, after[part][name]), name
    assert torch.equal(before["generator"], after["generator"])


class Noisy(nn.Module):
    """Counts its calls, both ways, draws numbers, and fails when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.fail_after, self.calls = small(), 1 << 30, 0
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("other", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.other = self.other + 1
        torch.rand(3)
        self.calls += 1
        x = self.inner(x)
        if self.calls > self.fail_after:
            raise KeyError("in the middle")
        return x


@pytest.mark.parametrize("fail_after", [1 << 30, 0])
@pytest.mark.parametrize("how", ["zero", "mean"])
def test_the_model_is_left_as_it_was(fail_after: int, how: str) -> None:
    model, x, y = Noisy().train(), images(), labels(B)
    model.inner[1].eval()
    F.cross_entropy(model(x), y).backward()
    model.inner[0].weight.requires_grad_(False)
    model.calls, model.fail_after = 0, fail_after
    before = state(model)
    if fail_after > 9:
        ablation_losses(model, x, y, ["inner.2"], how)
    else:
        with pytest.raises(KeyError, match="in the middle"):
            ablation_losses(model, x, y, ["inner.2"], how)
    assert_same_state(before, state(model))


@pytest.mark.parametrize("fail_after", [1 << 30, 1, 3, 5])
@pytest.mark.filterwarnings("ignore:ablation_losses")
def test_so_is_a_model_that_runs_once_per_unit(fail_after: int) -> None:
    class Asking(Noisy):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            return x if x.sum() < 1e9 else x * 2

    model, x, y = Asking().train(), images(), labels(B)
    model.fail_after = fail_after
    before = state(model)
    if fail_after > 9:
        ablation_losses(model, x, y, ["inner.2"])
    else:
        with pytest.raises(KeyError, match="in the middle"):
            ablation_losses(model, x, y, ["inner.2"])
    assert_same_state(before, state(model))
