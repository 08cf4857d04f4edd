"""The errors of sums grow with the root of their length at most, in every way of every operator."""

import math
from collections.abc import Callable

import pytest
import torch
from accuracy import assert_accurate
from torch import Tensor

from memloc_ext import ops
from memloc_ext.ops import ablation as ablation_ops

Make = Callable[..., Tensor]
Result = tuple[Tensor, Tensor, Tensor]  # of an operator, in float64, and that of the absolute values
LENGTHS = [64, 256, 1024, 4096, 16384]
NUMBERS: dict[str, Make] = {
    "equal": lambda *shape: torch.full(shape, 0.37),  # the roundings of a chain all go the same way
    "positive": lambda *shape: torch.rand(*shape) + 0.5,
    "signed": torch.randn,
}


def squared(sums: Tensor, magnitudes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squared norms ``[batch]`` of gradients, and twice those of them and of their magnitudes."""
    return sums.square().flatten(1).sum(1), 2 * (sums.abs() * magnitudes).flatten(1).sum(1)


def outer(g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return each example's gradient ``[batch, out, in]``, and that of the absolute values."""
    g, x = g.double().transpose(1, 2), x.double()
    return g @ x, g.abs() @ x.abs()


def ablation(n: int, make: Make, device: torch.device) -> Result:
    side = math.isqrt(n)
    change, weight = make(1, 2, side, side).to(device), make(3, 1, side, side).to(device)
    output = torch.zeros(2, 3, 1, 1, device=device)
    actual = ablation_ops.conv2d_ablation(output, change, weight, torch.zeros(1, dtype=torch.long, device=device))
    exact, magnitude = outer(weight.reshape(1, 3, n).transpose(1, 2), change.reshape(1, 2, n).transpose(1, 2))
    return actual[0, :, :, 0, 0], exact[0].t(), magnitude[0].t()


def positions(n: int, make: Make, device: torch.device, method: str = "direct") -> Result:
    x, g = make(2, n, 5).to(device), make(2, n, 70).to(device)
    return ops.linear_grad_sqnorm(x, g, method=method), *squared(*outer(g, x))


def image(n: int, make: Make, device: torch.device) -> Result:
    rows = math.isqrt(n)
    x, g = make(1, 3, rows, rows).to(device), make(1, 2, rows, rows).to(device)
    actual = ops.conv2d_grad_sqnorm(x, g, (1, 1), (1, 1), (0, 0), (1, 1), 1, method="direct")
    return actual, *squared(*outer(g.flatten(2).transpose(1, 2), x.flatten(2).transpose(1, 2)))


def gram(n: int, make: Make, device: torch.device, rows: int, width: int) -> Result:
    x, g = make(2, rows, width).to(device), make(2, rows, 3).to(device)
    actual = ops.linear_grad_sqnorm(x, g, method="gram")
    return actual, outer(g, x)[0].square().sum((1, 2)), outer(g, x)[1].square().sum((1, 2))


def gram_of_offsets(n: int, make: Make, device: torch.device) -> Result:
    side = math.isqrt(n)
    x, g = make(1, 1, side + 1, side + 1).to(device), make(1, 1, 2, 2).to(device)
    actual = ops.conv2d_grad_sqnorm(x, g, (side, side), (1, 1), (0, 0), (1, 1), 1, method="shifted_gram")
    patches = torch.nn.functional.unfold(x.double(), (side, side)).transpose(1, 2)
    sums, magnitudes = outer(g.flatten(2).transpose(1, 2), patches)
    return actual, sums.square().sum((1, 2)), magnitudes.square().sum((1, 2))


def single(n: int, make: Make, device: torch.device) -> Result:
    x, g = make(2, n).to(device), make(2, 3).to(device)
    exact = x.double().square().sum(1) * g.double().square().sum(1)
    return ops.linear_grad_sqnorm(x, g, method="outer"), exact, exact


def examples(n: int, make: Make, device: torch.device, each: int = 1) -> Result:
    x, g = make(n // each, each, 3).to(device), make(n // each, each, 2).to(device)
    ids = torch.zeros(n // each, dtype=torch.long, device=device)
    sums = torch.ops.memloc_ext.linear_grad_sqnorm_groups(x, g, ids, 1)[1]
    return sums, *outer(g.reshape(1, n, 2), x.reshape(1, n, 3))


def images(n: int, make: Make, device: torch.device) -> Result:
    x, g = make(n, 2, 1, 1).to(device), make(n, 3, 1, 1).to(device)
    ids = torch.zeros(n, dtype=torch.long, device=device)
    sums = torch.ops.memloc_ext.conv2d_grad_sqnorm_groups(x, g, ids, 1, (1, 1), (1, 1), (0, 0), (1, 1), 1)[1]
    return sums[..., 0, 0], *outer(g.reshape(1, n, 3), x.reshape(1, n, 2))


def saliency(n: int, make: Make, device: torch.device, channel_dim: int = 1) -> Result:
    a, g = (make(1, 3, n).movedim(1, channel_dim).contiguous().to(device) for _ in range(2))
    products = (a.double() * g.double()).movedim(channel_dim, 1)
    return ops.channel_saliency(a, g, channel_dim), products.sum(2), products.abs().sum(2)


def normalization(n: int, make: Make, device: torch.device, inside: bool = False) -> Result:
    x, g = (make(1, 3, n).to(device) for _ in range(2))
    if inside:
        x, g = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, g))
    zero, one = torch.zeros(1, 3, 1, device=device), torch.ones(1, 3, 1, device=device)
    products = g.double() * x.double()
    exact, magnitude = ([t.sum(2), u.sum(2)] for t, u in ((products, g.double()), (products.abs(), g.double().abs())))
    return torch.stack(ops.normalization_grads(x, g, zero, one)), torch.stack(exact), torch.stack(magnitude)


def classes(n: int, make: Make, device: torch.device) -> Result:
    features, weight, zero = make(2, 2).to(device), 0.1 * make(n, 2).to(device), torch.zeros(2, device=device)
    targets = torch.tensor([0, n - 1], device=device)
    actual, _ = ablation_ops.linear_ablation_loss(features, weight, None, targets, zero)
    logits = (
        features.double().flip(1).t()[..., None] * weight.double().flip(1).t()[:, None]
    )  # [features, batch, classes]
    exact = logits.logsumexp(2) - logits[:, torch.arange(2), targets]
    return actual, exact, 1 + 2 * logits.abs().amax(2) + exact


WAYS: dict[str, Callable[[int, Make, torch.device], Result]] = {
    "conv2d_ablation": ablation,
    "direct, positions": positions,
    "direct, pixels": image,
    "gram, positions": lambda n, *rest: gram(n, *rest, rows=min(n, 1024), width=3),
    "gram, inputs": lambda n, *rest: gram(n, *rest, rows=5, width=n),
    "gram, kernel offsets": lambda n, *rest: gram_of_offsets(min(n, 3600), *rest),
    "outer": single,
    "groups, examples": examples,
    "groups, examples of some positions": lambda n, *rest: examples(n, *rest, each=32),
    "groups, positions": lambda n, *rest: examples(n, *rest, each=n),
    "groups, images": images,
    "channel_saliency": saliency,
    "channel_saliency, channels inside": lambda *rest: saliency(*rest, channel_dim=-1),
    "normalization_grads": normalization,
    "normalization_grads, channels inside": lambda *rest: normalization(*rest, inside=True),
    "linear_ablation_loss": classes,
}


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("way", WAYS)
def test_errors_grow_with_the_root_of_the_length(way: str, numbers: str, device: torch.device) -> None:
    if torch.empty(0, device=device).is_cuda and (way.startswith("groups") or way == "gram, inputs"):
        pytest.skip("PyTorch's own products there")
    for n in LENGTHS:
        torch.manual_seed(n)
        actual, exact, magnitude = WAYS[way](n, NUMBERS[numbers], device)
        assert_accurate(actual.cpu(), exact.cpu(), magnitude.cpu(), n)
