from collections.abc import Callable

import pytest
import torch
from ablating import Model, check, settled
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from memloc_ext.ablation.rows import trimmed

B = 3


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def conv(inputs: int, outputs: int, kernel: int = 3, **settings: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **settings)


def head(channels: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3))


def images(*shape: int) -> Tensor:
    return torch.randn(B, 2, *(shape or (6, 6)))


Layers = Callable[[], list[nn.Module]]
AFTER: dict[str, Layers] = {
    "grouped": lambda: [conv(4, 8, groups=4), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 4, 1, groups=2)],
    "depthwise": lambda: [conv(4, 4, groups=4), nn.Hardswish(inplace=True)],
    "transposed": lambda: [nn.ConvTranspose2d(4, 5, 3, stride=2), nn.ReLU(), conv(5, 4)],
    "dilated": lambda: [nn.Conv2d(4, 4, 3, stride=2, padding=2, dilation=2)],
    "oblong": lambda: [nn.Conv2d(4, 4, (3, 1), padding=(1, 0), stride=(1, 2), dilation=(1, 2))],
    "reflected": lambda: [nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")],
    "same": lambda: [nn.Conv2d(4, 4, 3, padding="same")],
    "group norm": lambda: [nn.GroupNorm(2, 4), nn.ReLU(), conv(4, 4), nn.GroupNorm(4, 4), nn.ReLU()],
    "plain batch norm": lambda: [nn.BatchNorm2d(4, affine=False), conv(4, 4), nn.BatchNorm2d(4, affine=False)],
    "two batch norms": lambda: [nn.BatchNorm2d(4), nn.BatchNorm2d(4), conv(4, 4), nn.BatchNorm2d(4), nn.BatchNorm2d(4)],
    "layer norm": lambda: [nn.LayerNorm([4, 6, 6]), conv(4, 4)],
    "activations": lambda: [nn.PReLU(4), conv(4, 4), nn.ELU(inplace=True), nn.Softmax(1), nn.SiLU(), conv(4, 4)],
    "response norm": lambda: [nn.LocalResponseNorm(3), conv(4, 4)],
    "pooling": lambda: [nn.MaxPool2d(2), conv(4, 4), nn.AvgPool2d(2), nn.AdaptiveMaxPool2d(1)],
    "fractional": lambda: [nn.AdaptiveAvgPool2d((4, 3)), nn.LPPool2d(2, 2)],
    "scaling": lambda: [nn.Upsample(scale_factor=2), conv(4, 4), nn.Upsample(scale_factor=0.5, mode="bilinear")],
    "shuffling": lambda: [nn.PixelShuffle(2), conv(1, 1), nn.PixelUnshuffle(2), nn.ChannelShuffle(2), conv(4, 4)],
    "padding": lambda: [nn.ZeroPad2d(1), conv(4, 4), nn.ReflectionPad2d(1), conv(4, 4)],
    "dropout": lambda: [nn.Dropout2d(), conv(4, 4), nn.Dropout(inplace=True)],
    "wide filters": lambda: [nn.MaxPool2d(4), conv(4, 4, 5, groups=4), nn.ReLU(), conv(4, 4, 7, stride=2), nn.ReLU()],
    "folding": lambda: [nn.Unfold(3), nn.Fold((6, 6), 3), conv(4, 4)],
}


@pytest.mark.parametrize("name", AFTER)
def test_what_follows_the_site(name: str) -> None:
    model = nn.Sequential(conv(2, 4), nn.ReLU(), *AFTER[name](), head(4))
    check(settled(model).train(), images(), ["0", "1", "2"], dims={})


geometry = st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(1, 3), st.integers(0, 6), st.integers(1, 3))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(geometry, geometry)
def test_filters_are_trimmed_where_they_meet_padding_alone(rows: tuple[int, ...], columns: tuple[int, ...]) -> None:
    (height, kh, *_), (width, kw, *_) = rows, columns
    stride, padding, dilation = ([rows[i], columns[i]] for i in (2, 3, 4))
    assume(all(n + 2 * p > d * (k - 1) for n, k, _, p, d in (rows, columns)))
    x, weight = torch.randn(2, 3, height, width).double(), torch.randn(4, 3, kh, kw).double()
    expected = F.conv2d(x, weight, None, stride, padding, dilation)
    weight, left = trimmed(x, weight, stride, padding, dilation)
    torch.testing.assert_close(F.conv2d(x, weight, None, stride, left, dilation), expected)


def test_a_filter_of_one_pixel_is_left_of_a_wide_one() -> None:
    weight, padding = trimmed(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 5, 5), [1, 1], [2, 2], [1, 1])
    assert (list(weight.shape[2:]), padding) == ([1, 3], [0, 1])


def test_one_dimension() -> None:
    layers = nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(4, 5, 3), nn.GroupNorm(1, 5)
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(5, 3))
    check(settled(model), images(16), ["0", "2", "3", "5", "7"], dims=dict.fromkeys("0235", 1))


def test_three_dimensions() -> None:
    layers = nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(4, 5, 2)
    check(settled(nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(5, 3))), images(6, 6, 6))


def test_pooling_over_the_channels_of_a_sequence() -> None:
    model = Model(
        lambda m, x: m.head(F.max_pool2d(F.relu(m.conv(x)), 2).mean(2)), conv=nn.Conv1d(2, 6, 3), head=nn.Linear(3, 3)
    )
    check(model, images(8), ["conv"], dims={"conv": 1})


def test_vectors() -> None:
    layers = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6, bias=False), nn.Tanh(), nn.LayerNorm(6)
    model = nn.Sequential(nn.Flatten(), *layers, nn.Linear(6, 5), nn.RMSNorm(5), nn.Linear(5, 3))
    check(settled(model), images(3), [str(i) for i in range(1, 9)])


def test_a_norm_of_whole_images() -> None:
    model = nn.Sequential(conv(2, 4), nn.LayerNorm([4, 6, 6]), nn.Flatten(), nn.Linear(144, 3))
    check(model, images(), ["0", "1"])


def test_tokens() -> None:
    tokens = torch.randint(0, 9, (B, 5))
    parts = {"embed": nn.Embedding(9, 4), "hidden": nn.Linear(4, 6), "head": nn.Linear(6, 3)}
    check(Model(lambda m, x: m.head(F.relu(m.hidden(m.embed(x))).mean(1)), **parts), tokens, ["embed", "hidden"])


def test_nested_containers() -> None:
    first = nn.Sequential(nn.Sequential(conv(2, 4), nn.ReLU(inplace=True)), nn.MaxPool2d(2))
    model = nn.Sequential(first, nn.Sequential(conv(4, 5), nn.BatchNorm2d(5), nn.ReLU()), head(5))
    check(settled(model), images(), ["0", "0.0", "0.0.0", "0.0.1", "0.1", "1", "1.0", "1.1"])


def test_a_module_that_is_called_twice() -> None:
    parts = {"stem": conv(2, 4), "conv": conv(4, 4), "relu": nn.ReLU(inplace=True), "head": head(4)}
    model = Model(lambda m, x: m.head(m.relu(m.conv(m.relu(m.conv(m.stem(x)))))), **parts)
    check(model, images(), ["stem", "conv", "relu"])
    check(model, images(), ["stem", "conv", "relu"], "mean")


def test_a_module_that_is_called_side_by_side() -> None:
    parts = {"conv": conv(2, 4), "second": conv(4, 4), "head": head(4)}
    check(Model(lambda m, x: m.head(m.conv(x) + m.second(m.conv(x.flip(2)))), **parts), images(), ["conv"])


def test_a_module_that_is_called_twice_and_returns_its_input() -> None:
    def function(m: nn.Module, x: Tensor) -> Tensor:
        x = m.second(m.same(m.conv(x)))
        return m.head(m.same(x).relu() + x.sigmoid())

    check(Model(function, conv=conv(2, 4), second=conv(4, 4), same=nn.Identity(), head=head(4)), images(), ["same"])


def test_a_residual_of_another_type() -> None:
    def function(m: nn.Module, x: Tensor) -> Tensor:
        return m.head(F.relu(m.second(m.conv(x)) + x.double().repeat(1, 2, 1, 1)).to(x.dtype))

    check(Model(function, conv=conv(2, 4), second=conv(4, 4), head=head(4)), images(), ["conv", "second"])


def test_an_operator_that_returns_two_tensors() -> None:
    model = Model(lambda m, x: m.head(torch.frexp(m.conv(x))[0] * 2), conv=conv(2, 4), head=head(4))
    check(model, images(), ["conv"])


def test_a_shared_weight() -> None:
    parts = {"stem": conv(2, 4), "conv": conv(4, 4), "head": head(4)}
    model = Model(lambda m, x: m.head(F.conv2d(F.relu(m.conv(m.stem(x))), m.conv.weight, padding=1)), **parts)
    check(model, images(), ["stem", "conv"])
    check(model, images(), ["stem"], "filter")
    with pytest.raises(ValueError, match="weights that serve one call alone; those that compute conv do not"):
        check(model, images(), ["conv"], "filter")


def residual(m: nn.Module, x: Tensor) -> Tensor:
    x = F.relu(m.a(x))
    y = m.b(x)
    y += x
    return m.head(F.relu_(m.c(F.relu_(y))).add_(y).mul(2))


def concatenated(m: nn.Module, x: Tensor) -> Tensor:
    x = F.relu(m.a(x))
    y = torch.cat([m.b(x), x, m.c(x)], 1)
    return m.head(F.relu(y[:, 2:6] * y[:, 8:].sigmoid() - y[:, 1:5], inplace=True))


def gated(m: nn.Module, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.head(m.c(x * m.b(x).mean((2, 3), keepdim=True).sigmoid()) + torch.einsum("bchw,bdhw->bchw", x, m.b(x)))


def transposed(m: nn.Module, x: Tensor) -> Tensor:
    x = m.b(m.a(x).transpose(2, 3)).permute(0, 2, 3, 1)
    y = m.c(x.reshape(len(x), -1, 4).view(len(x), 6, 6, 4).permute(0, 3, 1, 2))
    return m.head(y.contiguous(memory_format=torch.channels_last))


def rearranged(m: nn.Module, x: Tensor) -> Tensor:
    x = m.b(m.a(x))
    y = torch.roll(x, 1, 1) + F.pad(x, (0, 0, 0, 0, 1, 0))[:, :4] + x[:, [3, 2, 1, 0]] + x.flip(1) + x.cumsum(1)
    y = y + torch.stack([*x.chunk(2, 1)]).sum(0).repeat(1, 2, 1, 1) + x.sort(1)[0] * x.unbind(1)[0][:, None]
    return m.head(m.c(y + torch.cat(x.split([1, 3], 1)[::-1], 1)))


def normalised(m: nn.Module, x: Tensor) -> Tensor:
    x = m.b(m.a(x))
    y = (x - x.mean(1, True)) / x.std(1, keepdim=True) + F.normalize(x) - x.mean((1, 2, 3), keepdim=True)
    return m.head(m.c(y + x.amax((2, 3), keepdim=True) * x.flatten(2).softmax(2).unflatten(2, (6, 6))))


@pytest.mark.parametrize("function", [residual, concatenated, gated, transposed, rearranged, normalised])
def test_what_branches_do(function: Callable[..., Tensor]) -> None:
    model = Model(function, a=conv(2, 4), b=conv(4, 4), c=conv(4, 4), head=head(4))
    check(model, images(), ["a", "c"] if function is gated else ["a", "b", "c"])


# a hook replaces what a module returns, and nothing else that reads the same tensor


def passed_on(m: nn.Module, x: Tensor) -> Tensor:
    x = m.conv(x)
    return m.head(F.relu(m.second(m.same(x))) + x)


@pytest.mark.parametrize("same", [nn.Identity(), nn.Sequential(), nn.Dropout(), nn.ReLU(inplace=True)])
def test_a_module_that_returns_its_input(same: nn.Module) -> None:
    model = Model(passed_on, conv=conv(2, 4), second=conv(4, 4), same=same, head=head(4))
    check(model, images(), ["conv", "same"])


def test_a_module_that_keeps_what_it_returns() -> None:
    def keep(m: Model, x: Tensor) -> Tensor:
        m.kept = m.conv(x)
        m.double = m.kept * 2
        return m.kept

    inner = Model(keep, conv=conv(2, 4))
    model = Model(lambda m, x: m.head(m.inner(x) * m.inner.kept.sigmoid() + m.inner.double), inner=inner, head=head(4))
    check(model, images(), ["inner", "inner.conv"])


def test_what_is_written_keeps_its_type() -> None:
    def write(m: Model, x: Tensor) -> Tensor:
        x = m.conv(x)
        return m.head(m.second(x.clone().gt_(0).add_(x.double()).relu_()))

    check(Model(write, conv=conv(2, 4), second=conv(4, 4), head=head(4)), images(), ["conv"])


def test_weights_that_depend_on_the_example() -> None:
    def hyper(m: Model, x: Tensor) -> Tensor:
        return m.head(F.conv2d(m.ones, m.conv(x).mean((2, 3)).reshape(4, 1, 1, 1)).relu())

    model = Model(hyper, conv=conv(2, 4), head=head(4))
    model.register_buffer("ones", torch.ones(1, 1, 5, 5))
    check(model, images()[:1], ["conv"])
