import pytest
import torch
from accounted import Model, Uncovered, account_of, check, parameter, targets, weighted
from accuracy import assert_stable
from torch import Tensor, nn
from torch.nn import functional as F

from memloc_ext import GradientAccountant

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

    def run(m: nn.Module, i: Tensor) -> Tensor:
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


@pytest.mark.parametrize("second", ["einsum", "lookup", "norm"])
def test_a_covered_and_an_uncovered_use(second: str) -> None:
    torch.manual_seed(0)
    if second == "einsum":
        model = Model(lambda m, x: torch.einsum("bti,oi->bto", F.linear(x, m.w), m.w), w=parameter(3, 3))
    elif second == "norm":
        model = Model(lambda m, x: F.linear(x, m.w) / m.w.norm(dim=1), w=parameter(7, 3))
    else:
        model = Model(lambda m, x: x + m.e(torch.arange(5)) + m.e(torch.arange(5)).cumsum(0), e=nn.Embedding(5, 3))
    check(model, torch.randn(B, 5, 3), uncovered=None)


@pytest.mark.parametrize("kind", ["channels last", "transposed"])
def test_a_parameter_with_other_strides_used_twice(kind: str) -> None:
    torch.manual_seed(0)
    conv, linear = nn.Conv2d(3, 3, 3, padding=1).to(memory_format=torch.channels_last), nn.Linear(3, 3)
    linear.weight = nn.Parameter(torch.randn(3, 3).t())
    layer, shape = (conv, (B, 3, 5, 5)) if kind == "channels last" else (linear, (B, 3))
    check(Model(lambda m, x: m.layer(m.layer(x).relu()), layer=layer), torch.randn(shape))


def test_views_that_overlap_themselves() -> None:
    torch.manual_seed(0)
    check(Model(lambda m, x: F.linear(x, m.w.unfold(0, 3, 1)), w=parameter(6)), torch.randn(B, 3), uncovered=None)
    check(
        Model(lambda m, x: F.linear(x, m.w.as_strided((2, 2), (1, 1))), w=parameter(4)),
        torch.randn(B, 2),
        uncovered=None,
        tell_batch=True,
    )


def test_a_use_in_float32_between_two_in_bfloat16() -> None:
    torch.manual_seed(0)

    def run(m: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            first = m.l(x).float() / 1000
        middle = m.l(x)
        with torch.autocast("cpu", torch.bfloat16):
            return torch.cat([first, middle, m.l(x).float() / 1000], 1)

    model, x, y = Model(run, l=nn.Linear(33, 17, bias=False)), torch.randn(B, 33), targets(B)
    exact = torch.stack(
        [
            torch.autograd.grad(weighted(model(x[b : b + 1]), y[b : b + 1]), [model.l.weight])[0].square().sum()
            for b in range(B)
        ]
    )
    account, _ = account_of(model, weighted, x, y)
    assert_stable(account.sqnorm["l.weight"], exact, exact.double())


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
        assert_stable(p.grad, plain[name], exact[name])


# what examples share


def test_batch_norm_in_training_mode_counts_what_flows_through_an_examples_own_activations() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)).double()
    x, y = torch.randn(B, 3).double(), targets(B).double()
    own = {name: p.detach().expand(B, *p.shape).clone().requires_grad_() for name, p in model.named_parameters()}
    h = torch.einsum("boi,bi->bo", own["0.weight"], x)
    h = F.batch_norm(h, None, None, training=True) * own["1.weight"] + own["1.bias"]
    weighted(torch.einsum("boi,bi->bo", own["3.weight"], h.relu()) + own["3.bias"], y).backward()
    account, _ = account_of(model, weighted, x, y)
    for name, p in own.items():
        assert p.grad is not None
        exact = (p.grad * B).flatten(1).square().sum(1)
        assert_stable(account.sqnorm[name], exact, exact)


@pytest.mark.parametrize("covered", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_exact_groups_are_the_gradients_of_the_groups_losses(reduction: str, covered: bool) -> None:
    torch.manual_seed(0)
    layers = (
        nn.BatchNorm2d(3),
        nn.ReLU() if covered else Uncovered(),
        nn.Conv2d(3, 2, 2, bias=False),
        nn.BatchNorm2d(2),
        nn.Flatten(),
    )
    model = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), *layers).double()
    x, ids = torch.randn(6, 2, 5, 5).double(), torch.tensor([0, 2, 2, 0, 0, 3])

    def losses(output: Tensor) -> Tensor:
        return (output * torch.linspace(-1, 2, output.shape[1])).sum(1).square()

    parameters = dict(model.named_parameters())
    exact = {name: [] for name in parameters}
    for k in range(5):
        loss = losses(model(x))[ids == k].sum() / (6 if reduction == "mean" else 1)
        for name, g in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            exact[name].append(g)

    def loss_of(output: Tensor, _: Tensor) -> Tensor:
        loss = losses(output)
        return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()

    arguments = {"group_ids": ids, "num_groups": 5, "loss_reduction": reduction, "exact_groups": True}
    account, uncovered = account_of(model, loss_of, x, x, **arguments)
    assert uncovered == (set() if covered else {"2.weight"})
    for name, p in parameters.items():
        truth = torch.stack(exact[name])
        assert_stable(account.group_grad[name], truth, truth)
        assert p.grad is not None
        assert_stable(p.grad, truth.sum(0), truth.sum(0))


def test_exact_groups_of_chunks() -> None:
    torch.manual_seed(0)
    model, x = Model(lambda m, x: m.l(x).chunk(2, -1), l=nn.Linear(3, 6)), torch.randn(B, 3)
    with GradientAccountant(model) as accountant:
        a, b = model(x)
        arguments = {"group_ids": torch.tensor([0, 1, 1, 0]), "loss_reduction": "sum"}
        account = accountant.backward(a.square().sum() + b.sum(), exact_groups=True, **arguments)
    a, b = model(x)
    (plain,) = torch.autograd.grad(a.square().sum() + b.sum(), [model.l.weight])
    torch.testing.assert_close(account.group_grad["l.weight"].sum(0), plain)
