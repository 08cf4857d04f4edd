import copy
import io
import pickle

import pytest
import torch
from ablating import Model, replaced
from torch import Tensor, nn

from memloc_ext import apply_ablation
from memloc_ext.models.vit import ViT

B = 3


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def small() -> nn.Sequential:
    layers = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU()
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, 3)).eval()


def images() -> Tensor:
    return torch.randn(B, 2, 6, 6)


UNITS = [("2", 1), ("7", 4), ("2", 3), ("2", 1)]


def expected(model: nn.Module, x: Tensor, values: dict[str, Tensor] | None = None) -> Tensor:
    values = values or {}
    two, seven = values.get("2", torch.zeros(4)), values.get("7", torch.zeros(6))
    with replaced(model, "2", 1, 1, two[1]), replaced(model, "2", 3, 1, two[3]), replaced(model, "7", 4, 1, seven[4]):
        return model(x)


def hooks(model: nn.Module) -> int:
    return sum(len(h) for m in model.modules() for name, h in vars(m).items() if name.endswith("_hooks"))


def test_context_manager() -> None:
    model, x = small(), images()
    before, count = model(x), hooks(model)
    applied = apply_ablation(model, UNITS)
    assert hooks(model) == count
    with applied as same:
        assert same is model
        assert torch.equal(model(x), expected(model, x))
        assert not torch.equal(model(x), before)
    assert hooks(model) == count
    assert torch.equal(model(x), before)
    with applied:  # again
        assert torch.equal(model(x), expected(model, x))


def test_no_units() -> None:
    model = small()
    with apply_ablation(model, []):
        assert hooks(model) == 0


def test_baselines() -> None:
    model, x = small(), images()
    baselines = {"2": torch.randn(4), "7": torch.randn(6).double()}
    with apply_ablation(model, UNITS, baselines=baselines):
        torch.testing.assert_close(model(x), expected(model, x, {k: v.float() for k, v in baselines.items()}))
    with apply_ablation(model, UNITS, baselines={"2": baselines["2"]}):
        assert torch.equal(model(x), expected(model, x, {"2": baselines["2"]}))


def test_copy() -> None:
    model, x = small(), images()
    before = model(x)
    edited = apply_ablation(model, UNITS).copy()
    assert hooks(model) == 0
    assert torch.equal(model(x), before)
    assert torch.equal(edited(x), expected(model, x))
    for again in (copy.deepcopy(edited), pickle.loads(pickle.dumps(edited))):
        assert torch.equal(again(x), edited(x))
    file = io.BytesIO()
    torch.save(edited, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), edited(x))
    with torch.no_grad():
        edited[0].weight.zero_()
    assert torch.equal(model(x), before)


def test_nested() -> None:
    model, x = small(), images()
    first, second = apply_ablation(model, UNITS[:2]), apply_ablation(model, UNITS[2:])
    with first:
        alone = model(x)
        with second:
            assert torch.equal(model(x), expected(model, x))
        assert torch.equal(model(x), alone)
        with first:
            assert torch.equal(model(x), alone)
        assert torch.equal(model(x), alone)
    assert hooks(model) == 0


def test_one_copy_of_another() -> None:
    model, x = small(), images()
    edited = apply_ablation(apply_ablation(model, UNITS[:2]).copy(), UNITS[2:]).copy()
    assert torch.equal(edited(x), expected(model, x))


def test_gradients_flow_around_the_units() -> None:
    model, x = small(), images().requires_grad_()
    with apply_ablation(model, UNITS):
        model(x).sum().backward()
    actual = [p.grad.clone() for p in model.parameters()]
    assert x.grad is not None
    assert not model[0].weight.grad[[1, 3]].any()
    assert model[0].weight.grad[[0, 2]].any()
    model.zero_grad()
    expected(model, x).sum().backward()
    for p, grad in zip(model.parameters(), actual, strict=True):
        assert torch.equal(p.grad, grad)


def test_errors_leave_nothing_behind() -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("in the middle")

    model, vit = nn.Sequential(nn.Conv2d(2, 4, 3), Failing()), ViT(3, 3, 8, dim=16, heads=2, depth=1, mlp=12, patch=4)
    for whole, site, x in (
        (model, "0", images()),
        (model, "1", images()),
        (vit, "blocks.0.attention.heads", images()[:, :1]),
    ):
        with pytest.raises((KeyError, RuntimeError)), apply_ablation(whole, [(site, 0)]):
            whole(x)
        assert hooks(whole) == 0
        assert torch._C._len_torch_function_stack() == 0


def test_an_error_inside_attention() -> None:
    vit = ViT(3, 3, 8, dim=16, heads=2, depth=1, mlp=12, patch=4)
    vit.blocks[0].attention.proj = nn.Linear(7, 16)
    with apply_ablation(vit, [("blocks.0.attention.heads", 1)]):
        for _ in range(2):
            with pytest.raises(RuntimeError):
                vit(torch.randn(B, 3, 8, 8))
            assert torch._C._len_torch_function_stack() == 0


def without_head(project: nn.Linear, head: int, width: int) -> None:
    with torch.no_grad():
        project.weight[:, head * width : (head + 1) * width] = 0


def test_heads() -> None:
    model, x = ViT(3, 3, 8, dim=16, heads=4, depth=2, mlp=12, patch=4).eval(), torch.randn(B, 3, 8, 8)
    plain = copy.deepcopy(model)
    without_head(plain.blocks[1].attention.proj, 2, 4)
    with apply_ablation(model, [("blocks.1.attention.heads", 2)]):
        torch.testing.assert_close(model(x), plain(x))
    torch.testing.assert_close(apply_ablation(model, [("blocks.1.attention.heads", 2)]).copy()(x), plain(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_heads_of_an_encoder_layer(training: bool, batch_first: bool) -> None:
    model, x = nn.TransformerEncoderLayer(8, 4, 12, dropout=0.0, batch_first=batch_first), torch.randn(B, 5, 8)
    model.train(training)
    plain = copy.deepcopy(model)
    without_head(plain.self_attn.out_proj, 3, 2)
    with apply_ablation(model, [("self_attn.heads", 3)]), torch.no_grad():
        torch.testing.assert_close(model(x), plain(x))


def test_channel_dims() -> None:
    model = Model(lambda m, x: m.last(m.conv(x).permute(0, 2, 3, 1)), conv=nn.Conv2d(2, 4, 3), last=nn.Identity())
    x = images()
    with apply_ablation(model, [("last", 2)], channel_dims={"last": 3}):
        assert not model(x)[..., 2].any()
    with apply_ablation(model, [("last", 2)], channel_dims={"last": -1}):
        assert not model(x)[..., 2].any()
    with apply_ablation(model, [("last", 2)]):  # the convolution's channels, wherever they are by then
        assert not model(x)[..., 2].any()


def test_arguments() -> None:
    model, x = small(), images()
    with pytest.raises(ValueError, match="units must name modules of the model, got '9'"):
        apply_ablation(model, [("9", 0)])
    with pytest.raises(ValueError, match="units must name modules"):
        apply_ablation(model, [("9.heads", 0)])
    with pytest.raises(ValueError, match="units must be at least 0, got -1 in 2"):
        apply_ablation(model, [("2", -1)])
    with pytest.raises(ValueError, match="units of 2 must be below 4, got 4"), apply_ablation(model, [("2", 4)]):
        model(x)
    assert hooks(model) == 0
    pair = Model(lambda m, x: m.inner(x)[0], inner=Model(lambda m, x: (x, x)))
    with pytest.raises(ValueError, match="inner must return a tensor, got tuple"), apply_ablation(pair, [("inner", 0)]):
        pair(x)
    with (
        pytest.raises(ValueError, match=r"apply_ablation: the baseline of 2 must have shape \[4\], got \[3\]"),
        apply_ablation(model, [("2", 1)], baselines={"2": torch.zeros(3)}),
    ):
        model(x)


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
    with pytest.raises(RuntimeError), apply_ablation(model, [("self_attn.out_proj", 1)]):
        model(x[..., 1:])  # is not hidden by another error


def test_parts_of_a_model() -> None:
    model, x = nn.Sequential(small()[:5], nn.Flatten(), small()[6:]).eval(), images()
    with apply_ablation(model, [("0.4", 1)]):
        assert not model[0](x)[:, 1].any()
    relu = model[0][2]
    with (
        pytest.raises(ValueError, match=r"0\.2 runs apart from its model; pass its channel_dims"),
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
