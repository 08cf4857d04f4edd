import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import memloc_ext
from memloc_ext.ops import Plan, conv2d_grad_sqnorm, grad_sqnorm, plan, plan_conv2d, plan_linear
from memloc_ext.ops._grad_sqnorm_plan import grad_sqnorm_plan

axes = st.tuples(st.integers(0, 70), st.integers(0, 8), st.integers(0, 9), st.integers(0, 4), st.integers(0, 4))


def result_of(model: Callable, *arguments: object) -> object:
    try:
        return model(*arguments)
    except ValueError as error:
        return str(error)


@settings(deadline=None, max_examples=1000)
@given(groups=st.integers(0, 3), inputs=st.integers(0, 300), outputs=st.integers(0, 300), y=axes, x=axes)
def test_the_copy_in_python_agrees(groups: int, inputs: int, outputs: int, y: tuple, x: tuple) -> None:
    host = pytest.importorskip("memloc_ext._host")
    shape = (groups, inputs, outputs, y, x)
    assert result_of(host.grad_sqnorm_plan, *shape) == result_of(grad_sqnorm_plan, *shape)


@settings(deadline=None, max_examples=300)
@given(positions=st.integers(0, 5000), inputs=st.integers(0, 4000), outputs=st.integers(0, 4000))
def test_the_copy_in_python_agrees_on_linear_layers(positions: int, inputs: int, outputs: int) -> None:
    host = pytest.importorskip("memloc_ext._host")
    shape = (1, inputs, outputs, (1, 1, 1, 0, 1), (positions, 1, 1, 0, 1))
    if positions > 0:
        assert host.grad_sqnorm_plan(*shape) == grad_sqnorm_plan(*shape)


def test_a_build_without_the_host_module_plans_all_the_same(monkeypatch) -> None:
    expected = plan_linear(64, 256, 768)
    monkeypatch.setitem(sys.modules, "memloc_ext._host", None)
    grad_sqnorm._cost_model.cache_clear()
    assert plan_linear(64, 256, 768) == expected
    with pytest.raises(ValueError, match="plan: "):
        plan_conv2d(3, 4, (4, 4), (9, 9))
    grad_sqnorm._cost_model.cache_clear()


def test_a_plan_that_is_changed_changes_no_other() -> None:
    plan_linear(64, 256, 768).multiply_adds.clear()
    assert plan_linear(64, 256, 768).multiply_adds


def test_groups_take_one_pass_but_for_few_positions() -> None:
    assert not plan_linear(1, 784, 512).fused
    assert not plan_linear(2, 512, 512).fused
    assert plan_linear(16, 512, 512).fused
    assert plan_conv2d(512, 512, (4, 4), (3, 3), padding=(1, 1)).fused
    assert plan_linear(64, 256, 768).fused
    assert plan_linear(256, 768, 3072).fused
    assert plan_conv2d(128, 128, (16, 16), (3, 3), padding=(1, 1)).fused
    assert plan_conv2d(3, 64, (32, 32), (3, 3), padding=(1, 1)).fused


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...], Plan]] = {
    "linear": (nn.Linear(6, 9), (5, 6), plan_linear(1, 6, 9)),
    "tokens": (nn.Linear(6, 9), (5, 4, 8, 6), plan_linear(32, 6, 9)),
    "conv2d": (
        nn.Conv2d(4, 6, (3, 5), (1, 2), (0, 2), (2, 1), groups=2),
        (1, 4, 9, 8),
        plan_conv2d(4, 6, (9, 8), (3, 5), (1, 2), (0, 2), (2, 1), 2),
    ),
    "same": (nn.Conv2d(4, 6, 3, padding="same"), (1, 4, 9, 8), plan_conv2d(4, 6, (9, 8), (3, 3), padding=(1, 1))),
    "uneven": (
        nn.Conv2d(4, 6, (4, 3), padding="same"),
        (1, 4, 9, 8),
        plan_conv2d(4, 6, (12, 8), (4, 3), padding=(0, 1)),
    ),
    "valid": (nn.Conv2d(4, 6, 3, padding="valid"), (1, 4, 9, 8), plan_conv2d(4, 6, (9, 8), (3, 3))),
    "reflect": (
        nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect"),
        (1, 4, 9, 8),
        plan_conv2d(4, 6, (11, 12), (3, 3)),
    ),
    "conv1d": (
        nn.Conv1d(4, 6, 5, 2, 3, dilation=2),
        (1, 4, 30),
        plan_conv2d(4, 6, (1, 30), (1, 5), (1, 2), (0, 3), (1, 2)),
    ),
    "circular": (
        nn.Conv1d(4, 6, 5, padding=2, padding_mode="circular"),
        (1, 4, 30),
        plan_conv2d(4, 6, (1, 34), (1, 5)),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_plan_of_a_layer(name: str) -> None:
    layer, shape, expected = LAYERS[name]
    assert plan(layer, shape) == expected
    assert memloc_ext.plan(layer, torch.Size(shape)) == expected


def test_plan_is_what_the_operator_takes() -> None:
    layer = nn.Conv2d(16, 8, 3, padding=1)
    x = torch.randn(2, 16, 6, 6)
    g = torch.randn(2, 8, 6, 6)
    settings = (layer.kernel_size, layer.stride, (1, 1), layer.dilation, layer.groups)
    method = plan(layer, x.shape).method
    assert torch.equal(conv2d_grad_sqnorm(x, g, *settings), conv2d_grad_sqnorm(x, g, *settings, method=method))


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (nn.Linear(6, 9), (6,), r"input_shape must be \[batch, \*, 6\], got \[6\]"),
        (nn.Linear(6, 9), (2, 5), r"got \[2, 5\]"),
        (nn.Conv2d(4, 6, 3), (4, 9, 8), r"input_shape must be \[batch, 4, height, width\], got \[4, 9, 8\]"),
        (nn.Conv1d(4, 6, 3), (1, 5, 8), r"input_shape must be \[batch, 4, length\], got \[1, 5, 8\]"),
        (nn.Conv2d(4, 6, 3), (1, 4, 2, 8), "plan: "),
        (nn.Conv3d(4, 6, 3), (1, 4, 8, 8, 8), "Conv3d is not covered"),
        (nn.ConvTranspose2d(4, 6, 3), (1, 4, 8, 8), "ConvTranspose2d is not covered"),
    ],
)
def test_plan_refuses(layer: nn.Module, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(layer, shape)
