"""The smaller model against mode ``drop`` of the model that it was made from."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_networks import RandomNetwork, blocks
from torch import Tensor, nn

from memloc_ext.models import LeNet, ResNet9, ViT, build, dropout_sites
from memloc_ext.nn import (
    RESCALES,
    ExampleTiedDropout,
    FixedDropout,
    dropout_mode,
    insert_after,
    insert_example_tied_dropout,
    without_memorization,
)


def lively(model: nn.Module) -> nn.Module:
    """Give normalisations statistics and weights as of a training, and all biases values; in float64."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.3, 2, generator=generator)
            module.weight.data.normal_(generator=generator)
        if isinstance(getattr(module, "bias", None), Tensor):
            module.bias.data.normal_(generator=generator)
    return model.double()


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=20, n_positions=8, use_cache=False, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config)


def image(channels: int, size: int) -> Tensor:
    return torch.randn(3, channels, size, size, dtype=torch.float64)


def tokens() -> Tensor:
    return torch.randint(20, (3, 7))


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def output(model: nn.Module, x: Any) -> Tensor:
    y = model(x)
    return getattr(y, "logits", y)


def dropped(model: nn.Module, x: Any) -> Tensor:
    model.eval()
    with dropout_mode(model, "drop"):
        return output(model, x)


def shipped(model: nn.Module, x: Any) -> nn.Module:
    """Return the smaller model, which computes the same on another input and has nothing of this library in it."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small = without_memorization(model, x[:2])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(output(small, x), dropped(model, x), rtol=1e-11, atol=1e-11)
    assert not any(isinstance(m, ExampleTiedDropout | FixedDropout) for m in small.modules())
    assert type(small) is type(model)
    names = {name for name, _ in small.named_parameters()}
    assert names == {name for name, _ in model.named_parameters()}
    return small


def sites(small: nn.Module) -> list[tuple[int, int, int]]:
    return [tuple(site.values()) for site in small.memorization_removed["sites"].values()]


CASES: dict[str, tuple[Callable[[], nn.Module], list[str] | None, int | None, Callable[[], Tensor], int]] = {
    "resnet9": (lambda: ResNet9(10, 1, 8, 0.25), None, 1, lambda: image(1, 8), 123_565),
    "lenet": (
        lambda: LeNet(10, 1, 8),
        None,
        None,
        lambda: image(1, 8),
        96 * 65 + (120 * 84 + 84 - 24 * 16 - 16) + 68 * 10,
    ),
    "vit": (lambda: ViT(5, 3, 8, dim=16, depth=2, heads=2, mlp=32), None, -1, lambda: image(3, 8), 2 * 26 * 33),
    "gpt2": (gpt2, ["transformer.h.0.mlp.act", "transformer.h.1.mlp.act"], -1, tokens, 2 * 52 * 33),
}


@pytest.mark.parametrize("rescale", RESCALES)
@pytest.mark.parametrize("name", CASES)
def test_models_of_all_kinds(name: str, rescale: str) -> None:
    make, after, dim, x, gone = CASES[name]
    torch.manual_seed(0)
    model = lively(make())
    insert_example_tied_dropout(model, after or dropout_sites(model), channel_dim=dim, rescale=rescale)
    small = shipped(model, x())
    assert not any(m._forward_hooks for m in small.modules())
    assert count(model) - count(small) == gone
    for channels, removed, masked in sites(small):
        assert (removed, masked) == (channels - int(0.2 * channels), 0)


def test_nothing_is_left_of_a_model_that_skipped() -> None:
    model = lively(nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 2)))
    insert_example_tied_dropout(
        model, ["1"], p_gen=0.25, skip=True, mask=lambda ids: ids[:, None] % 12 > torch.arange(12)
    )
    small = shipped(model, rows())
    assert sites(small) == [(12, 9, 0)]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in small.modules())
    assert torch.equal(pickle.loads(pickle.dumps(small))(rows()[:0]), small(rows()[:0]))


def test_what_is_left_are_slices_of_the_weights() -> None:
    model = lively(ResNet9(10, 1, 8, 0.25))
    insert_example_tied_dropout(model, dropout_sites(model), p_gen=0.25)
    small = shipped(model, image(1, 8))
    own = {"conv1": 16, "conv2": 32, "res1": 32, "conv3": 64, "res2": 64, "conv4": 32}
    for name, before in model.named_parameters():
        layer, inner = name.split(".")[:2]
        after = dict(small.named_parameters())[name]
        inside = layer.startswith("res") and inner == "conv1"  # whose output no site masks
        rows = own[layer] // 4 if layer in own and not inside else before.shape[0]
        if before.dim() == 1:
            expected = before[:rows]
        else:
            columns = before.shape[1] if before.shape[1] == 1 else before.shape[1] // 4
            expected = before[:rows, : before.shape[1] if layer.startswith("res") and inner == "conv2" else columns]
        assert torch.equal(after, expected), name
    assert small.conv2[1].num_features == 8
    assert (small.conv2[0].in_channels, small.conv2[0].out_channels) == (4, 8)
    changed = small.memorization_removed["parameters"]
    assert changed["conv2.0.weight"] == {"before": [32, 16, 5, 5], "after": [8, 4, 5, 5]}
    assert changed["conv2.1.running_var"] == {"before": [32], "after": [8]}
    assert "res1.conv1.1.weight" not in changed


@settings(deadline=None)
@given(
    drawn=st.lists(blocks, min_size=1, max_size=6),
    masked=st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True),
    rescale=st.sampled_from(RESCALES),
    p_gen=st.sampled_from([0.4, 0.5, 0.8]),
)
def test_random_networks(drawn: list[tuple[str, int, int]], masked: list[int], rescale: str, p_gen: float) -> None:
    torch.manual_seed(0)
    model = lively(RandomNetwork([(kind, width + 1, back) for kind, width, back in drawn]))
    after = [f"layers.{i}" for i in sorted({i % len(drawn) for i in masked})]
    insert_example_tied_dropout(model, after, p_gen=p_gen, rescale=rescale)
    shipped(model, image(2, 5))


class Residual(nn.Module):
    """A masked branch on a trunk of other channels."""

    def __init__(self, activation: nn.Module, normalised: bool = False) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 10)
        self.branch = nn.Sequential(nn.Linear(10, 10), activation, *([nn.LayerNorm(10)] if normalised else []))
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.branch(x)).tanh())


def rows(size: int = 4) -> Tensor:
    return torch.randn(5, size, dtype=torch.float64)


@pytest.mark.parametrize(("activation", "rescale"), [(nn.ReLU(), "authors"), (nn.GELU(), "none")])
def test_channels_of_a_branch_are_zeros_of_its_weights(activation: nn.Module, rescale: str) -> None:
    model = insert_example_tied_dropout(lively(Residual(activation)), ["branch"], p_gen=0.35, rescale=rescale)
    small = shipped(model, rows())
    assert sites(small) == [(10, 0, 7)]
    assert small.memorization_removed["parameters"] == {}
    assert len(small.branch) == 2
    assert not small.branch[0].weight[3:].any()
    assert not small.branch[0].bias[3:].any()
    factor = 0.45 / 0.35 if rescale == "authors" else 1.0
    torch.testing.assert_close(small.branch[0].weight[:3], factor * model.branch[0].weight[:3])


LOADED = """
import sys
sys.modules["memloc_ext"] = None  # importing it is an error
import torch
model, x, expected = torch.load(sys.argv[1], weights_only=False)
torch.testing.assert_close(model(x), expected)
program = torch.export.load(sys.argv[2])
torch.testing.assert_close(program.module()(x), expected)
torch.testing.assert_close(program.module()(x[:3]), expected[:3])
assert not any(name.startswith("memloc_ext.") for name in sys.modules)
"""


def test_a_saved_file_needs_torch_alone(tmp_path: Path) -> None:
    """Also where a multiplication is left: of a residual sum, in a sequence, and behind a module of the user's."""
    inner = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=True)
    sequence = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Sigmoid())
    layers = nn.Sequential(nn.Linear(4, 8), inner, sequence, nn.LayerNorm(8))
    model = lively(nn.Sequential(layers, nn.Flatten(), nn.Linear(40, 3)))
    dropout: dict[str, Any] = {"p_gen": 0.5, "rescale": "expectation", "channel_dim": -1}
    insert_example_tied_dropout(model, ["0.1.linear1", "0.1", "0.2"], **dropout)
    x = torch.randn(4, 5, 4, dtype=torch.float64)
    small = shipped(model, x)
    assert sites(small) == [(12, 6, 0), (8, 0, 4), (8, 0, 4)]
    multiplications = [name for name, m in small.named_modules() if isinstance(m, torch.fx.GraphModule)]
    assert multiplications == ["0.1.dropout_after", "0.2.dropout_after"]
    assert torch.equal(output(copy.deepcopy(small), x), output(small, x))
    torch.save((small, x, small(x).detach()), tmp_path / "model.pt")
    program = torch.export.export(small, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.export.save(program, tmp_path / "model.pt2")
    command = [sys.executable, "-c", LOADED, str(tmp_path / "model.pt"), str(tmp_path / "model.pt2")]
    subprocess.run(command, check=True, cwd=tmp_path)


@pytest.mark.parametrize("hard_coded", [False, True])
def test_a_site_that_the_code_cannot_do_without_stays(hard_coded: bool) -> None:
    class Reshaped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).relu()
            return self.head(self.second(x.reshape(-1, 8) if hard_coded else x.reshape(len(x), -1)).relu())

    model = insert_example_tied_dropout(lively(Reshaped()), ["first", "second"], p_gen=0.5)
    small = shipped(model, rows())
    assert sites(small) == ([(8, 0, 4), (8, 4, 0)] if hard_coded else [(8, 4, 0), (8, 4, 0)])
    assert small.first.weight.shape == ((8, 4) if hard_coded else (4, 4))


@pytest.mark.parametrize("clamp", [nn.ReLU6(), nn.Hardtanh(-30, 30)], ids=str)
def test_a_factor_does_not_go_through_a_clamp(clamp: nn.Module) -> None:
    model = lively(nn.Sequential(nn.Linear(4, 12), clamp, nn.Linear(12, 3)))
    model[0].weight.data *= 200
    insert_example_tied_dropout(model, ["0"], p_gen=0.25, rescale="authors")
    assert sites(shipped(model, rows())) == [(12, 9, 0)]
    model = lively(nn.Sequential(nn.Linear(4, 12), clamp, nn.ReLU(), nn.Linear(12, 3)))
    model[0].weight.data *= 200
    insert_example_tied_dropout(model, ["1"], p_gen=0.25, rescale="authors")
    assert sites(shipped(model, rows())) == [(12, 9, 0)]


def test_recurrent_layers_around_a_site_stay() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.GRU(4, 8, batch_first=True), nn.LSTM(8, 6, batch_first=True)
            self.site, self.head = nn.Identity(), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.site(self.first(x)[0]))[0])

    model = insert_example_tied_dropout(lively(Recurrent()), ["site"], p_gen=0.5, channel_dim=-1, rescale="authors")
    assert sites(shipped(model, torch.randn(3, 5, 4, dtype=torch.float64))) == [(8, 0, 4)]


class Direct(nn.Module):
    """Dropouts that the user's code calls, one of them in two places, with ids and without, and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(4, 12), nn.Linear(4, 12), nn.Linear(12, 4)
        self.drop = ExampleTiedDropout(0.25, channel_dim=-1, rescale="authors")
        self.same = self.drop
        self.fixed = FixedDropout(0.5, 0.5, channel_dim=-1)

    def forward(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        y = self.down(self.drop(nn.functional.silu(self.gate(x)) * self.up(x), ids))
        y = y + self.down(self.same(self.up(y).relu()))
        return self.fixed(y)


def test_modules_that_the_code_calls() -> None:
    model = lively(Direct())
    small = shipped(model, rows())
    assert small.up.weight.shape == (3, 4)
    assert small.drop is small.same
    assert torch.equal(small(rows()[:0], torch.arange(0)), small(rows()[:0]))
    kept = int((model.fixed(torch.ones(1, 4)) != 0).sum())
    assert sites(small) == [(12, 9, 0), (4, 0, 4 - kept)]


def test_tied_weights_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    model[2].weight = model[0].weight
    model = insert_example_tied_dropout(lively(model), ["1", "3"], p_gen=0.5)
    small = shipped(model, rows(6))
    assert small[2].weight is small[0].weight
    assert sites(small) == [(6, 0, 3), (6, 0, 3)]  # the first one reads all of the input


def test_attributes_say_the_new_sizes() -> None:
    model = lively(
        nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1),
            nn.Conv2d(4, 4, 3, groups=4, bias=False),
            nn.ConvTranspose2d(4, 4, 2),
            nn.PReLU(4),
            nn.Flatten(),
            nn.Linear(16, 16),
            nn.BatchNorm1d(16),
            nn.Linear(16, 3, bias=False),
        )
    )
    insert_example_tied_dropout(model, ["1", "3", "6"], p_gen=0.5)
    small = shipped(model, image(4, 3))
    fields = ("in_channels", "out_channels", "groups", "in_features", "out_features", "num_features", "num_parameters")
    found = [{name: getattr(m, name) for name in fields if hasattr(m, name)} for m in small]
    assert found == [
        {"in_channels": 4, "out_channels": 2, "groups": 1},
        {"in_channels": 2, "out_channels": 2, "groups": 2},
        {"in_channels": 2, "out_channels": 2, "groups": 1},
        {"num_parameters": 2},
        {},
        {"in_features": 8, "out_features": 8},
        {"num_features": 8},
        {"in_features": 8, "out_features": 3},
    ]


def test_a_site_without_generalization_channels_stays() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    insert_example_tied_dropout(lively(model), ["1", "3"], p_gen=0.25)
    small = shipped(model, rows())
    assert sites(small) == [(3, 0, 3), (8, 6, 0)]


def test_unread_parts_and_unused_layers_stay() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position, self.unused = nn.Parameter(torch.randn(1, 9, 6)), nn.Linear(4, 5)
            self.mlp = nn.Sequential(nn.Linear(6, 8), nn.GELU())
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.mlp(x + self.position[:, : x.shape[1]]))

    model = insert_example_tied_dropout(lively(Positions()), ["mlp"], p_gen=0.5, channel_dim=-1)
    small = shipped(model, torch.randn(3, 4, 6, dtype=torch.float64))
    assert small.position.shape == (1, 9, 6)
    assert small.unused.weight.shape == (5, 4)
    x = torch.randn(3, 9, 6, dtype=torch.float64)
    torch.testing.assert_close(small(x), dropped(model, x))


def test_what_is_asked_of_a_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match="model must have an ExampleTiedDropout, got none"):
        without_memorization(model, torch.randn(2, 4))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        without_memorization([model], torch.randn(2, 4))
    insert_after(model, ["1"], lambda _: ExampleTiedDropout(0.5))
    model.train()
    by_name = without_memorization(model, {"input": torch.randn(2, 4)})
    assert model.training
    assert not by_name.training
    assert by_name[0].weight.requires_grad
    x = torch.randn(2, 4)
    assert torch.equal(by_name(x), without_memorization(model, (x,))(x))
    model.insert(0, nn.Dropout(0.5))
    model[0].forward = lambda x: nn.functional.dropout(x, 0.5, True)
    with pytest.raises(ValueError, match="must compute the same for the same input in evaluation mode"):
        without_memorization(model, torch.randn(64, 4))


def test_a_residual_network_of_torchvision() -> None:
    model = insert_example_tied_dropout(lively(build("resnet50", num_classes=4)), ["maxpool", "layer2.1.bn2", "layer3"])
    small = shipped(model, image(3, 32))
    assert sites(small) == [(64, 52, 0), (128, 103, 0), (1024, 0, 820)]
    assert small.conv1.out_channels == 12
    assert (small.layer2[1].conv2.out_channels, small.layer2[1].bn2.num_features) == (25, 25)
    assert not hasattr(small, "layout")
