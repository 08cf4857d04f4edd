import sys
from collections.abc import Callable
from math import inf

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from memloc_ext.ops import conv2d_grad_sqnorm_groups, grad_sqnorm, plan_conv2d, plan_linear

op = torch.ops.memloc_ext.plan.default
axes = st.tuples(st.integers(0, 70), st.integers(0, 8), st.integers(0, 9), st.integers(0, 4), st.integers(0, 4))


def result_of(model: Callable, *arguments: object) -> object:
    try:
        return tuple(model(*arguments))
    except ValueError as error:
        return str(error)


@settings(deadline=None, max_examples=1000)
@given(
    groups=st.integers(0, 3),
    inputs=st.integers(0, 300),
    outputs=st.integers(0, 300),
    y=axes,
    x=axes,
    n=st.integers(-1, 9),
)
def test_the_operator_and_the_host_module_are_one_cost_model(groups, inputs, outputs, y, x, n) -> None:
    host = pytest.importorskip("memloc_ext._host")
    shape = (groups, inputs, outputs, y, x, n)
    assert result_of(op, *shape) == result_of(host.grad_sqnorm_plan, *shape)


def test_the_operator_counts_multiply_adds() -> None:
    direct = 6 * 6 * 3 * 3 * 16 * 8.0
    pairs = (6 * 6) ** 2 * (16 + 8) + 0.5 * 9 * 36 * 6 * 8
    assert op(1, 16, 8, (6, 3, 1, 1, 1), (6, 3, 1, 1, 1))[1:4] == (inf, direct, pairs)
    assert op(1, 784, 512, (1, 1, 1, 0, 1), (1, 1, 1, 0, 1))[:2] == (0, 784 + 512)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 0}, "groups must divide the channels"),
        ({"inputs": -1}, "plan: "),
        ({"y": (4, 9, 1, 0, 1)}, "the kernel must fit into the padded image"),
        ({"x": (4, 3)}, "x must be size, kernel, stride, padding and dilation, got 2 numbers"),
    ],
)
def test_the_operator_refuses_what_is_no_layer(change: dict, message: str) -> None:
    arguments = {"groups": 1, "inputs": 3, "outputs": 4, "y": (4, 3, 1, 0, 1), "x": (4, 3, 1, 0, 1), **change}
    with pytest.raises((RuntimeError, ValueError), match=message):
        op(**arguments)


def test_a_build_without_the_host_module_plans_all_the_same(monkeypatch) -> None:
    expected = plan_linear(64, 256, 768), plan_conv2d(16, 8, (6, 6), (3, 3), padding=(1, 1))
    monkeypatch.setitem(sys.modules, "memloc_ext._host", None)
    grad_sqnorm._planned.cache_clear()
    assert (plan_linear(64, 256, 768), plan_conv2d(16, 8, (6, 6), (3, 3), padding=(1, 1))) == expected
    with pytest.raises(ValueError, match="plan: "):
        plan_conv2d(3, 4, (4, 4), (9, 9))
    grad_sqnorm._planned.cache_clear()
    x, ids = torch.randn(2, 16, 6, 6), torch.tensor([1, 0])
    settings = (x, torch.randn(2, 8, 6, 6), ids, 2, (3, 3), (1, 1), (1, 1), (1, 1), 1)
    traced = make_fx(lambda t: conv2d_grad_sqnorm_groups(t, *settings[1:])[0])(x)
    assert torch.equal(traced(x), conv2d_grad_sqnorm_groups(*settings)[0])
    grad_sqnorm._planned.cache_clear()


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
