"""Models that are edited: which parts of them run, and how."""

import copy

import pytest
import torch
from switching import UNITS, B, expected, hooks, images, small, without_head
from torch import Tensor, nn

from memloc_ext import apply_ablation


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_a_site_that_is_not_called() -> None:
    model, x = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True).eval(), torch.randn(B, 5, 8)
    for site in ("self_attn.out_proj", "self_attn.out_proj.heads", "linear1.heads"):
        with (
            pytest.raises(ValueError, match=f"sites must be called when the model is, {site} was not"),
            apply_ablation(model, [("linear1", 0), (site, 1)]),
        ):
            model(x)
        assert hooks(model) == 0
    with apply_ablation(model, [("self_attn.out_proj", 1)]):
        pass  # the model does not run
    with pytest.raises(AssertionError, match="embedding"), apply_ablation(model, [("self_attn.out_proj", 1)]):
        model(x[..., 1:])  # is not hidden by another error


def test_parts_of_a_model() -> None:
    model, x = nn.Sequential(small()[:5], nn.Flatten(), small()[6:]).eval(), images()
    with apply_ablation(model, [("0.4", 1)]):
        assert not model[0](x)[:, 1].any()
    relu = model[0][2]
    with (
        pytest.raises(ValueError, match=r"0\.2 runs apart from its model, .*; pass channel_dims"),
        apply_ablation(model, [("0.2", 1)]),
    ):
        relu(x)
    with apply_ablation(model, [("0.2", 1)], channel_dims={"0.2": 1}):
        assert not relu(x)[:, 1].any()
    with apply_ablation(model, [("2.7", 1)]):
        assert not model[2][1](torch.ones(B, 6))[:, 1].any()  # there is but one dimension


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 8, padding_idx=0), nn.Linear(8, 4)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x), src_key_padding_mask=x == 0)[:, 0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_transformers_with_a_padding_mask() -> None:
    model, x = Encoder().eval(), torch.tensor([[1, 2, 3, 0, 0], [4, 5, 0, 0, 0], [6, 7, 8, 1, 0]])
    units = [("encoder.layers.0.linear1", 3), ("encoder.layers.1.self_attn.heads", 1)]
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for weight in (plain.encoder.layers[0].linear1.weight, plain.encoder.layers[0].linear1.bias):
            weight[3] = 0
    without_head(plain.encoder.layers[1].self_attn.out_proj, 1, 4)
    first, second = apply_ablation(model, units[:1]), apply_ablation(model, units[1:])
    with torch.no_grad():
        expected = plain(x)
        with first, second:
            torch.testing.assert_close(model(x), expected)
            torch.testing.assert_close(model(x), expected)  # now that it is known where the channels are
        torch.testing.assert_close(apply_ablation(model, units).copy()(x), expected)
        assert torch.backends.mha.get_fastpath_enabled()
        with pytest.raises(ValueError, match="must be below 12"), apply_ablation(model, [(units[0][0], 12)]):
            model(x)
        assert torch.backends.mha.get_fastpath_enabled()
        assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_gradients_through_a_transformer() -> None:
    model, x = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True), torch.randn(B, 5, 8)
    for training in (True, False):
        model.train(training).zero_grad()
        with apply_ablation(model, [("linear1", 3)]):
            model(x).square().sum().backward()
        grad = model.linear1.weight.grad
        assert grad is not None
        assert not grad[3].any()
        assert grad[[0, 1, 2, 4]].any(1).all()


def test_other_inputs_and_outputs_than_one_tensor() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act = nn.Conv1d(2, 4, 3), nn.ReLU()

        def forward(self, x: Tensor, *, scale: float) -> dict[str, Tensor]:
            return {"out": self.act(self.conv(x)) * scale}

    model, x = Two(), torch.randn(4, 2, 6)
    before = model(x, scale=2.0)["out"]
    with apply_ablation(model, [("act", 1)]):
        after = model(x, scale=2.0)["out"]
    assert not after[:, 1].any()
    assert torch.equal(after[:, [0, 2, 3]], before[:, [0, 2, 3]])


def test_ranks_that_change() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with apply_ablation(model, [("1", 2)]):
        assert not model(torch.randn(3, 4))[..., 2].any()
        with pytest.raises(ValueError, match="1 returned a tensor of 2 dimensions before and of 3 now"):
            model(torch.randn(3, 5, 4))
    with apply_ablation(model, [("1", 2)], channel_dims={"1": -1}):
        assert not model(torch.randn(3, 5, 4))[..., 2].any()
        assert not model(torch.randn(3, 4))[..., 2].any()


@pytest.mark.parametrize("after", [True, False])
def test_compiled_models_run_as_they_were_written(after: bool) -> None:
    model, x = small(), images()
    compiled = torch.compile(model, backend="eager")
    if after:
        compiled(x)
    with apply_ablation(compiled, [(f"_orig_mod.{site}", unit) for site, unit in UNITS]):
        assert torch.equal(compiled(x), expected(model, x))
    assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize("known", ["dims", "run"])
def test_copies_that_are_compiled(known: str) -> None:
    model, x = small(), images()
    edited = apply_ablation(model, UNITS, channel_dims={"2": 1, "7": 1} if known == "dims" else None).copy()
    if known == "run":
        edited(x)
    torch._dynamo.reset()
    compiled = torch.compile(edited, backend="eager", fullgraph=True)
    for _ in range(3):
        assert torch.equal(compiled(x), expected(model, x))


def test_models_that_are_transformed() -> None:
    model, x = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 3, 3)), torch.randn(B, 2, 8)
    run = torch.vmap(lambda one: model(one[None])[0])
    applied = apply_ablation(model, [("1", 2)])
    with pytest.raises(ValueError, match="compiled or transformed; pass channel_dims"), applied:
        run(x)
    assert hooks(model) == 0
    with applied:
        torch.testing.assert_close(model(x), run(x))  # which knows by then where the channels are
    with apply_ablation(model, [("1", 2)], channel_dims={"1": 1}):
        torch.testing.assert_close(model(x), run(x))
