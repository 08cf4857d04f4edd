import pytest
import torch
from accounting import Model, account_of, assert_as_accurate, check, parameter, targets, weighted
from torch import nn
from torch.nn import functional as F

B = 4
SHARED = {
    "linear twice": (lambda m, x: m.linear(m.linear(x).relu()), (B, 3)),
    "linear with and without tokens": (lambda m, x: m.linear(m.linear(x).relu().mean(1)), (B, 5, 3)),
    "linear step by step": (lambda m, x: torch.stack([m.linear(x[:, t]) for t in range(5)], 1), (B, 5, 3)),
    "conv at two sizes": (lambda m, x: m.conv(F.avg_pool2d(m.conv(x), 2)), (B, 3, 6, 6)),
    "conv with two geometries": (
        lambda m, x: m.conv(x).sum((2, 3)) + F.conv2d(x, m.conv.weight, stride=2, dilation=2, padding=1).sum((2, 3)),
        (B, 3, 6, 6),
    ),
    "conv and transposed": (
        lambda m, x: F.conv_transpose2d(m.conv(x).relu(), m.conv.weight, padding=1),
        (B, 3, 4, 4),
    ),
    "layer norm twice": (lambda m, x: m.layer_norm(m.linear(m.layer_norm(x))), (B, 5, 3)),
    "batch norm twice": (lambda m, x: m.batch_norm(m.conv(m.batch_norm(x))), (B, 3, 4, 4)),
    "bias twice": (lambda m, x: (x + m.row).relu() * 2 + m.row, (B, 5, 3)),
    "bias of a linear layer and alone": (lambda m, x: m.linear(x) + m.linear.bias, (B, 5, 3)),
    "weight of a norm as a factor": (lambda m, x: m.layer_norm(x) * m.layer_norm.weight, (B, 5, 3)),
    "slices": (
        lambda m, x: F.linear(x, m.table[:3]).relu() @ m.table[2:5] + m.table[0] + m.table[5:6],
        (B, 5, 3),
    ),
    "chunks": (lambda m, x: sum(F.linear(x, w) for w in m.table.chunk(3)) * F.linear(x, m.table[1:3]), (B, 5, 3)),
    "a transposed view": (lambda m, x: F.linear(x, m.table) @ m.table, (B, 5, 3)),
    "both ways": (lambda m, x: (x @ m.table.t()).relu() @ m.table, (B, 3)),
    "one row of each": (lambda m, x: x * m.table[0] + m.table[0] * m.linear(x), (B, 3)),
    "with and without gradient": (
        lambda m, x: m.linear(m.linear(x).detach()) + F.linear(x, m.linear.weight.detach()),
        (B, 3),
    ),
    "a use that the loss does not depend on": (lambda m, x: (m.linear(x), m.linear(x * 2))[0], (B, 3)),
}


@pytest.mark.parametrize("name", SHARED)
def test_parameters_used_more_than_once(name: str) -> None:
    torch.manual_seed(0)
    function, shape = SHARED[name]
    model = Model(
        function,
        linear=nn.Linear(3, 3),
        conv=nn.Conv2d(3, 3, 3, padding=1),
        layer_norm=nn.LayerNorm(3),
        batch_norm=nn.BatchNorm2d(3),
        row=parameter(3),
        table=parameter(6, 3),
    )
    check(model.eval(), torch.randn(shape))


@pytest.mark.parametrize("vocabulary", [7, B])
def test_tied_embedding(vocabulary: int) -> None:
    torch.manual_seed(0)

    def run(m: nn.Module, i: torch.Tensor) -> torch.Tensor:
        h = m.words(i) + m.positions(torch.arange(i.shape[1]))
        return F.linear(m.norm(h), m.words.weight)

    model = Model(run, words=nn.Embedding(vocabulary, B), positions=nn.Embedding(9, B), norm=nn.LayerNorm(B))
    check(model, torch.randint(vocabulary, (B, 5)))


def test_one_module_under_two_names() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[2] = model[0]
    account = check(model, torch.randn(B, 3))
    assert set(account.sqnorm) == {"0.weight", "0.bias", "1.bias"}


def test_sharing_in_training_mode_with_dropout_is_what_plain_training_does() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)
    x, y = torch.randn(B, 5, 8), targets(B)
    torch.manual_seed(3)
    weighted(model(x), y).backward()
    plain = {name: p.grad for name, p in model.named_parameters()}
    exact = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.manual_seed(3)
    account_of(model, weighted, x, y)
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert plain[name] is not None
        assert_as_accurate(p.grad, plain[name], exact[name])
