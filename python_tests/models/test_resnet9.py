import pytest
import torch

from memloc_ext.models import ResNet9, build, layer_groups


@pytest.mark.parametrize("image_size", [8, 32])
def test_has_the_parameters_of_the_paper(image_size):
    assert sum(p.numel() for p in ResNet9(image_size=image_size).parameters()) == 2_274_880


def test_groups_are_eight_convolutions_with_their_norm_and_the_head():
    groups = layer_groups(ResNet9(width=0.1))
    assert [len(names) for names in groups.values()] == [3] * 8 + [1]
    assert groups["res1.conv2"] == ["res1.conv2.0.weight", "res1.conv2.1.weight", "res1.conv2.1.bias"]


@pytest.mark.parametrize(("image_size", "stride"), [(6, 1), (10, 1), (11, 2), (32, 2)])
def test_keeps_the_stride_of_the_paper_where_the_image_allows(image_size, stride):
    model = ResNet9(image_size=image_size, width=0.1)
    assert model.conv2[0].stride == (stride, stride)
    assert model(torch.randn(2, 3, image_size, image_size)).shape == (2, 10)


def test_the_bounds_on_the_image_size_are_sharp():
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        ResNet9(image_size=11, width=0.1)(torch.randn(2, 3, 10, 10))
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        ResNet9(image_size=6, width=0.1)(torch.randn(2, 3, 5, 5))


@pytest.mark.parametrize(("width", "channels"), [(0.5, [32, 64, 128]), (1e-9, [1, 1, 1]), (1.02, [65, 131, 261])])
def test_width_scales_the_channels(width, channels):
    model = build("resnet9", width=width)
    assert [model.conv1[0].out_channels, model.conv2[0].out_channels, model.conv3[0].out_channels] == channels
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_is_the_network_of_the_paper():
    model = ResNet9(image_size=16, width=0.1).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        y = model.conv2(model.conv1(x))
        y = y + model.res1.conv2(model.res1.conv1(y))
        y = torch.nn.functional.max_pool2d(model.conv3(y), 2)
        y = y + model.res2.conv2(model.res2.conv1(y))
        y = torch.nn.functional.adaptive_max_pool2d(model.conv4(y), 1).flatten(1)
        torch.testing.assert_close(model(x), 0.2 * y @ model.head.weight.T)


def test_refuses_an_image_or_a_width_that_leaves_nothing():
    with pytest.raises(ValueError, match="ResNet9: image_size must be at least 6, got 5"):
        ResNet9(image_size=5)
    with pytest.raises(ValueError, match=r"ResNet9: width must be positive and finite, got 0\.0"):
        ResNet9(width=0.0)
