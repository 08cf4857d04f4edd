import copy
import io
import pickle

import pytest
import torch
from ablating import Model
from switching import UNITS, B, expected, hooks, images, small, without_head
from torch import Tensor, nn

from memloc_ext import apply_ablation
from memloc_ext.models.vit import ViT


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


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
