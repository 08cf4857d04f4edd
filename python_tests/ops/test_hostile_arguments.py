"""Every operator called directly, below all Python checks, with arguments that nobody should pass.

Either it returns tensors (``plan``: numbers) or it raises an error with a message; it neither crashes nor changes what
it was given. Under ``make sanitize`` the same calls also show every access out of bounds.
"""

import math
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from valid_arguments import VALID, call, ids

import memloc_ext  # noqa: F401

CALLS = 500
"""Of each operator."""
LARGEST, SMALLEST = 2**63 - 1, -(2**63)
NUMBERS = (SMALLEST, -(2**40), -2, -1, 0, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**40, LARGEST - 1, LARGEST)
FLOATS = (math.nan, math.inf, -math.inf, -1.0, -0.0, 0.3, 1.0, 1.0 + 2**-52, 1e308)
DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool,
    torch.complex64, torch.float8_e4m3fn,
)  # fmt: skip


OPERATORS = sorted(
    {s.name.partition("::")[2] for s in torch._C._jit_get_all_schemas() if s.name.startswith("memloc_ext::")}
)


def spoilt_tensor(draw: Random, like: Tensor) -> Any:
    """Another tensor in the place of one: of other sizes, strides, dtype, values, layout or device."""
    how = draw.choice(("sizes", "empty", "view", "dtype", "values", "kind"))
    if how == "sizes":
        sizes = draw.choices((0, 1, 2, 3, 4, 5, 9), k=draw.randint(0, 6))
        return torch.zeros(sizes, dtype=like.dtype)
    if how == "empty":  # huge, but for a 0
        sizes = [0, 2**40, 2**20, 1, 1][: max(1, like.dim())]
        draw.shuffle(sizes)
        return torch.empty_strided(sizes, [1] * len(sizes), dtype=like.dtype)
    if how == "view":
        views: list[Callable[[Tensor], Tensor]] = [
            lambda t: t.reshape(-1)[:1].expand(t.shape) if t.numel() else t,  # every element the same memory
            lambda t: torch.stack([t, t], -1)[..., 1],
            lambda t: t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() else t,
            lambda t: t.as_strided(t.shape, [1] * t.dim()) if t.numel() >= sum(t.shape) else t,  # overlapping
            lambda t: t[1:] if t.dim() and len(t) else t,
            lambda t: t.unsqueeze(0),
            lambda t: t.to(torch.complex64).conj().imag if t.is_floating_point() else t,  # negative bit
        ]
        return draw.choice(views)(like)
    if how == "dtype":
        return like.to(draw.choice(DTYPES))
    if how == "values":
        if like.dtype == torch.int64:
            return torch.full_like(like, draw.choice(NUMBERS))
        return like.flip(0) if not like.is_floating_point() else torch.full_like(like, draw.choice(FLOATS[:-1]))
    kinds: list[Callable[[Tensor], Any]] = [
        lambda t: t.to("meta"), lambda t: t.to_sparse(), lambda t: t.requires_grad_() if t.is_floating_point() else t,
        lambda t: None, lambda t: [t], lambda t: 3,
    ]  # fmt: skip
    return draw.choice(kinds)(like)


def spoilt(draw: Random, value: Any) -> Any:
    """Another argument in the place of one."""
    if isinstance(value, Tensor):
        return spoilt_tensor(draw, value)
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        place = draw.randrange(len(value))
        others = (value[:place], value[place + 1 :])
        return draw.choice(([*others[0], spoilt_tensor(draw, value[place]), *others[1]], value[1:], []))
    if isinstance(value, list) and len(value) > 9:
        place = draw.randrange(len(value))
        return [*value[:place], draw.choice(NUMBERS), *value[place + 1 :]]
    if isinstance(value, list):
        return draw.choices(NUMBERS, k=draw.randint(0, 3))
    if isinstance(value, dict):
        key = draw.choice(list(value))
        return {**value, key: spoilt(draw, value[key])}
    if isinstance(value, bool):
        return not value
    if value is None:
        return draw.choice((None, ids(draw.choice(NUMBERS)), torch.randn(2, 3)))
    return draw.choice(FLOATS if isinstance(value, float) else NUMBERS)


def arguments(draw: Random, name: str) -> list[Any]:
    values = VALID[name]()
    for place in draw.sample(range(len(values)), min(len(values), draw.randint(1, 3))):
        values[place] = spoilt(draw, values[place])
    return values


def test_every_operator_is_tried() -> None:
    assert sorted(VALID) == OPERATORS
    for name, make in VALID.items():
        call(name, make())


@pytest.mark.parametrize("name", OPERATORS)
def test_only_errors_with_a_message_come_out(name: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # which share the work
    try:
        for seed in range(CALLS):
            torch.manual_seed(seed)
            print(f"seed {seed}")  # the last one is shown where a call fails
            check(name, arguments(Random(seed), name))
    finally:
        torch.set_num_threads(threads)


def check(name: str, values: list[Any]) -> None:
    read = [v for v in flat(values[1 if name.endswith("_") else 0 :]) if isinstance(v, Tensor) and is_readable(v)]
    before = [v.detach().clone() for v in read]
    try:
        result = call(name, values)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        if isinstance(error, AttributeError):  # PyTorch hands None on where the schema has a tensor
            assert None in values
        message, result = str(error), None
    else:
        message = "none"
    assert message.strip()
    for t in flat(result if isinstance(result, tuple) else () if result is None else (result,)):
        assert isinstance(t, int | float if name == "plan" else Tensor)
        if isinstance(t, Tensor) and is_readable(t):
            t.detach().clone()  # all of it can be read
    for t, own in zip(read, before, strict=True):
        assert same(t.detach(), own)


@pytest.mark.parametrize("method", ["", "bogus", "AUTO", "a" * 10_000, "\0"])
def test_an_unknown_method_is_refused(method: str) -> None:
    for name in ("linear_grad_sqnorm", "conv2d_grad_sqnorm"):
        with pytest.raises(RuntimeError, match="method must be"):
            getattr(torch.ops.memloc_ext, name)(*VALID[name](), method=method)


def test_no_groups_of_channels_are_refused_on_the_meta_device_too() -> None:
    arguments = VALID["conv2d_grad_sqnorm_groups"]()
    for device in ("cpu", "meta"):
        moved = [value.to(device) if isinstance(value, Tensor) else value for value in arguments]
        with pytest.raises(
            (ValueError, RuntimeError), match="groups must divide the 4 input and 2 output channels, got 0"
        ):
            torch.ops.memloc_ext.conv2d_grad_sqnorm_groups(*moved[:-1], 0)


def flat(values: Sequence[Any]) -> list[Any]:
    """Return values, and those of lists among them."""
    return [inner for v in values for inner in (v if isinstance(v, list) else [v])]


def is_readable(t: Tensor) -> bool:
    return t.layout == torch.strided and t.device.type == "cpu" and t.numel() < 2**20


def same(t: Tensor, other: Tensor) -> bool:
    return not t.numel() or bool(((t == other) | ((t != t) & (other != other))).all())
