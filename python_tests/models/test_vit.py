import pytest
import torch
from torch import nn

from memloc_ext.models import ViT, dropout_sites, layer_groups
from memloc_ext.models.vit import Attention


def small(**options):
    return ViT(image_size=8, **{"dim": 8, "heads": 2, "mlp": 4, **options})


def test_groups_and_sites_follow_the_depth():
    model = small(depth=11)
    groups = layer_groups(model)
    assert list(groups) == ["embedding", *(f"blocks.{i}" for i in range(11)), "head"]
    assert groups["embedding"] == [
        f"embedding.{name}" for name in ("class_token", "position", "patches.weight", "patches.bias")
    ]
    assert groups["head"] == ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    assert dropout_sites(model) == [f"blocks.{i}.mlp.act" for i in range(11)]


def test_attention_is_pytorchs():
    ours = Attention(dim=8, heads=2, dropout=0.0)
    theirs = nn.MultiheadAttention(8, 2, batch_first=True)
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.qkv.weight,
            "in_proj_bias": ours.qkv.bias,
            "out_proj.weight": ours.proj.weight,
            "out_proj.bias": ours.proj.bias,
        }
    )
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0])


def test_the_result_depends_on_where_a_patch_is():
    model = small().eval()
    x = torch.randn(1, 3, 8, 8)
    with torch.inference_mode():
        assert not torch.allclose(model(x), model(x.roll(2, dims=-1)))  # by one patch
        model.embedding.position.zero_()
        torch.testing.assert_close(model(x), model(x.roll(2, dims=-1)))


def test_dropout_acts_in_training_only():
    model = small(dropout=0.5)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert not torch.equal(model(x), model(x))
        model.eval()
        assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("image_size", [0, 7])
def test_refuses_an_image_that_is_not_whole_patches(image_size):
    with pytest.raises(ValueError, match=f"ViT: image_size must be a positive multiple of patch = 2, got {image_size}"):
        ViT(image_size=image_size)


def test_refuses_heads_that_do_not_divide_the_channels():
    with pytest.raises(ValueError, match="ViT: dim must be a positive multiple of heads = 3, got 8"):
        small(heads=3)
