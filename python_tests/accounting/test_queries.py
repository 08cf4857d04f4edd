"""Answers to what else a backward pass is asked; `accounted.check` holds most of them for every kind of layer."""

import copy
import importlib.util
import math

import pytest
import torch
from accounted import Model, Uncovered, account_of, grads, held, parameter, small, sums, targets, total, weighted
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memloc_ext import GradientAccountant, Projection
from memloc_ext.reference.accounting import per_example_gradients, squared_norms

B = 4


def tiny() -> nn.Module:
    """Return a convolution, normalisation and a linear layer, in float64."""
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 3, 2), nn.GroupNorm(1, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)
    return nn.Sequential(*layers).double()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, 2, 3, 3, generator=generator).double(), torch.arange(B) % 3


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten(1) for g in gradients.values()], 1)


def own_gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    return per_example_gradients(model, F.cross_entropy, x, y)


def clipped(gradients: dict[str, Tensor], bound: float) -> dict[str, Tensor]:
    """Return each example's gradients times its factor."""
    factors = (bound / flat(gradients).norm(dim=1)).clamp(max=1)
    assert 0 < int((factors < 1).sum()) < len(factors)
    return {name: g * factors.reshape(-1, *[1] * (g.dim() - 1)) for name, g in gradients.items()}


REDUCTIONS = {
    "mean": (lambda losses: losses.mean(), {}, torch.full((B,), 1 / B)),
    "sum": (lambda losses: losses.sum(), {"loss_reduction": "sum"}, torch.ones(B)),
    "none": (lambda losses: losses, {"loss_reduction": "none"}, torch.ones(B)),
    "weights": (
        lambda losses: (losses * torch.tensor([0.5, 0.0, 2.0, 0.25])).sum(),
        {"loss_reduction": "sum", "example_weights": torch.tensor([0.5, 0.0, 2.0, 0.25])},
        torch.tensor([0.5, 0.0, 2.0, 0.25]),
    ),
    "equal weights": (
        lambda losses: losses.sum() * 0.3,
        {"loss_reduction": "sum", "example_weights": torch.full((B,), 0.3)},
        torch.full((B,), 0.3),
    ),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_answers_are_of_own_gradients_whatever_the_loss(name: str) -> None:
    reduce, arguments, weights = REDUCTIONS[name]
    model, (x, y) = tiny(), batch()
    own = own_gradients(model, x, y)
    seen = {n: g * (weights > 0).reshape(-1, *[1] * (g.dim() - 1)) for n, g in own.items()}
    project, direction = Projection(2, 0), {n: torch.randn_like(p) for n, p in model.named_parameters()}
    with GradientAccountant(model) as accountant:
        account = accountant.backward(
            reduce(F.cross_entropy(model(x), y, reduction="none")),
            **arguments,
            directions={"d": direction},
            pairwise=True,
            project=project,
            by_row={"4.weight"},
            per_position=True,
        )
    torch.testing.assert_close(account.sqnorm, squared_norms(seen), rtol=1e-6, atol=1e-9)
    line = torch.cat([t.flatten() for t in direction.values()])
    torch.testing.assert_close(account.cosine("d"), F.cosine_similarity(flat(seen), line), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(account.inner, flat(seen) @ flat(seen).t(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(account.row_sqnorm["4.weight"], seen["4.weight"].square().sum(2), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(account.position_sqnorm["4.weight"][:, 0], account.sqnorm["4.weight"])
    left, right = project.matrix("4.weight", "left", 3, x), project.matrix("4.weight", "right", 12, x)
    torch.testing.assert_close(account.projected["4.weight"], left @ seen["4.weight"] @ right.t(), rtol=1e-6, atol=1e-9)
    for n, g in own.items():
        torch.testing.assert_close(
            model.get_parameter(n).grad, torch.tensordot(weights.double(), g, 1), rtol=1e-6, atol=1e-9
        )


@pytest.mark.parametrize("name", REDUCTIONS)
def test_clipping_is_of_own_gradients_in_the_loss_as_given(name: str) -> None:
    reduce, arguments, weights = REDUCTIONS[name]
    model, (x, y) = tiny(), batch()
    own = own_gradients(model, x, y)
    bound = float(flat(own)[2].norm()) * 0.999
    expected = clipped(own, bound)
    before = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    for n, p in model.named_parameters():
        p.grad = before[n].clone()
    with GradientAccountant(model) as accountant:
        losses = F.cross_entropy(model(x), y, reduction="none")
        accountant.backward(reduce(losses), **arguments, max_norm=bound)
    for n, p in model.named_parameters():
        torch.testing.assert_close(
            p.grad, before[n] + torch.tensordot(weights.double(), expected[n], 1), rtol=1e-6, atol=1e-9
        )


@pytest.mark.parametrize("clipping", ["flat", "per_parameter"])
@pytest.mark.parametrize("covered", [True, False])
def test_clipping_of_layers_that_are_not_covered(clipping: str, covered: bool) -> None:
    torch.manual_seed(0)
    middle = nn.Tanh() if covered else Uncovered(5).double()
    model, x = nn.Sequential(nn.Linear(3, 5).double(), middle, nn.Linear(5, 2).double()), torch.randn(B, 3).double()
    y = targets(B).double()
    exact = per_example_gradients(model, weighted, x, y)
    bound = float(flat(exact).norm(dim=1).median())
    account, _ = account_of(model, weighted, x, y, max_norm=bound, clipping=clipping)
    torch.testing.assert_close(account.sqnorm, squared_norms(exact))
    norms = {n: g.flatten(1).norm(dim=1) for n, g in exact.items()}
    for n, g in exact.items():
        own = norms[n] * math.sqrt(len(exact)) if clipping == "per_parameter" else flat(exact).norm(dim=1)
        factors = (bound / own).clamp(max=1)
        torch.testing.assert_close(model.get_parameter(n).grad, torch.tensordot(factors, g, 1) / B)


def test_clipping_adds_to_gradients_by_hooks_and_leaves_other_leaves_theirs() -> None:
    model, x, seen = small(), torch.randn(B, 3, requires_grad=True), {}
    exact = per_example_gradients(model, lambda out, _: out.square().sum(), x.detach(), torch.zeros(B))
    bound = float(flat(exact).norm(dim=1).median())
    total(model, x).backward()
    plain, x.grad = x.grad, None
    model.zero_grad()
    model[0].weight.register_hook(lambda g: seen.update(weight=g) or 2 * g)
    model[3].bias.register_post_accumulate_grad_hook(lambda p: seen.update(bias=p.grad))
    with GradientAccountant(model) as accountant:
        sums(accountant, total(model, x), max_norm=bound)
    factors = (bound / flat(exact).norm(dim=1)).clamp(max=1)
    expected = {n: torch.tensordot(factors, g, 1) for n, g in exact.items()}
    torch.testing.assert_close(seen["weight"], expected["0.weight"])
    torch.testing.assert_close(model[0].weight.grad, 2 * expected["0.weight"])
    torch.testing.assert_close(seen["bias"], expected["3.bias"])
    torch.testing.assert_close(x.grad, plain)


def test_clipping_with_groups_and_checkpointing() -> None:
    model, (x, y) = tiny(), batch()
    own = own_gradients(model, x, y)
    bound, ids = float(flat(own).norm(dim=1).median()), torch.tensor([0, 1, 1, 0])

    for exact in (False, True):
        model.zero_grad()
        with GradientAccountant(model) as accountant:
            out = model[3:](checkpoint(model[:3], x, use_reentrant=False))
            loss = F.cross_entropy(out if not exact else model(x), y)
            account = accountant.backward(loss, max_norm=bound, group_ids=ids, exact_groups=exact)
        factors = (bound / flat(own).norm(dim=1)).clamp(max=1)
        for n, g in own.items():
            members = torch.stack([ids == 0, ids == 1]).double()
            torch.testing.assert_close(account.group_grad[n], torch.tensordot(members, g, 1) / B)
            torch.testing.assert_close(model.get_parameter(n).grad, torch.tensordot(factors, g, 1) / B)

    with GradientAccountant(model) as accountant:
        loss = F.cross_entropy(model[3:](checkpoint(model[:3], x.requires_grad_(), use_reentrant=True)), y)
        with pytest.raises(ValueError, match=r"max_norm.*use_reentrant=False"):
            accountant.backward(loss, max_norm=bound)


@pytest.mark.parametrize("kind", ["convolutions", "tokens"])
def test_clipping_is_that_of_opacus(kind: str) -> None:
    if importlib.util.find_spec("opacus") is None:
        pytest.skip("needs opacus")
    from opacus import PrivacyEngine

    torch.manual_seed(0)
    if kind == "convolutions":
        model, x = (
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)),
            (torch.randn(16, 1, 8, 8)),
        )
    else:
        model = nn.Sequential(
            nn.Embedding(11, 6), nn.LayerNorm(6), nn.Linear(6, 8), nn.Tanh(), nn.Flatten(), nn.Linear(40, 3)
        )
        x = torch.randint(11, (16, 5))
    y, bound, ours = torch.arange(16) % 3, 1.5, copy.deepcopy(model)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    private, optimizer, _ = PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=0.0,
        max_grad_norm=bound,
        poisson_sampling=False,
    )
    F.cross_entropy(private(x), y).backward()
    norms = torch.cat([p.grad_sample.flatten(1) for p in model.parameters()], 1).norm(dim=1)
    optimizer.pre_step()
    with GradientAccountant(ours) as accountant:
        account = accountant.backward(F.cross_entropy(ours(x), y), max_norm=bound)
    assert (norms > bound).any()
    torch.testing.assert_close(account.norms, norms)
    for theirs, p in zip(model.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(p.grad, theirs.grad)


def test_noise_scale_without_pairs() -> None:
    model, (x, y) = tiny(), batch()
    model[0].bias.requires_grad_(False)
    own = own_gradients(model, x, y)
    for arguments in ({}, {"group_ids": torch.arange(B) % 2}, {"group_ids": torch.arange(B) % 2, "exact_groups": True}):
        for reduction in ("mean", "sum"):
            with GradientAccountant(model) as accountant:
                loss = F.cross_entropy(model(x), y, reduction=reduction)
                account = accountant.backward(loss, loss_reduction=reduction, **arguments)
            torch.testing.assert_close(account.noise_scale, noise_scale(flat(own)))
            for name, g in own.items():
                torch.testing.assert_close(account.parameter_noise_scale[name], noise_scale(g.flatten(1)))
            assert account.noise_scale.shape == ()


def noise_scale(g: Tensor) -> Tensor:
    mean, batch = g.mean(0).square().sum(), len(g)
    variance = (g.square().sum(1).mean() - mean) * batch / (batch - 1)
    return variance / (mean - variance / batch)


def test_noise_scale_of_parameters_used_twice_and_not_covered() -> None:
    model = Model(
        lambda m, x: torch.tanh(m.act(x @ m.w) @ m.w.t()) @ m.w[:, :2], w=parameter(3, 3), act=Uncovered()
    ).double()
    x = torch.randn(B, 3).double()
    exact = per_example_gradients(model, weighted, x, targets(B).double())
    account, _ = account_of(model, weighted, x, targets(B).double())
    torch.testing.assert_close(account.noise_scale, noise_scale(flat(exact)))


@pytest.mark.parametrize(
    "arguments", [{"weight_grads": False}, {"max_norm": 1.0}, {"example_weights": torch.arange(1.0, B + 1)}]
)
def test_noise_scale_that_is_not_known_says_what_it_takes(arguments: dict) -> None:
    model, (x, y) = tiny(), batch()
    for pairwise in (False, True):
        with GradientAccountant(model) as accountant:
            losses = F.cross_entropy(model(x), y, reduction="none")
            loss = (losses * arguments.get("example_weights", torch.ones(B))).sum()
            account = accountant.backward(loss, loss_reduction="sum", pairwise=pairwise, **arguments)
        if pairwise:
            torch.testing.assert_close(account.noise_scale, noise_scale(flat(own_gradients(model, x, y))))
        else:
            with pytest.raises(ValueError, match=r"noise_scale needs .* weight_grads=True.*pairwise=True"):
                _ = account.noise_scale


class Tied(nn.Module):
    """A language model whose table of tokens is its last layer, too, and whose positions are looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places, self.middle = nn.Embedding(7, 4, padding_idx=0), nn.Embedding(5, 4), nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens) + self.places(torch.arange(tokens.shape[1]))
        return F.linear(torch.tanh(self.middle(x)), self.table.weight)


def test_positions() -> None:
    torch.manual_seed(0)
    model, tokens = Tied().double(), torch.randint(7, (B, 5))
    tokens[1, 2] = 0
    names = ["table.weight", "places.weight", "middle.weight", "middle.bias"]
    account, _ = account_of(model, weighted, tokens, targets(B).double(), per_position=True)
    assert set(account.position_sqnorm) == set(names)
    for b in range(B):
        copies = [copy.deepcopy(model) for _ in range(5)]  # position t goes through the parameters of copy t alone
        x = torch.stack([m.table(tokens[b, t]) + m.places(torch.tensor(t)) for t, m in enumerate(copies)])
        out = torch.stack(
            [F.linear(torch.tanh(m.middle(row)), m.table.weight) for row, m in zip(x, copies, strict=True)]
        )
        weighted(out[None], targets(B)[b : b + 1].double()).backward()
        for name in names:
            each = torch.stack([m.get_parameter(name).grad.square().sum() for m in copies])
            torch.testing.assert_close(account.position_sqnorm[name][b], each, msg=name)


def test_positions_that_differ_are_left_out() -> None:
    model = Model(lambda m, x: m.a(m.a(x).mean(1)), a=nn.Linear(3, 3)).double()
    account = held(model, torch.randn(B, 5, 3).double(), per_position=True)
    assert account.position_sqnorm == {}


def test_pairs_of_some_parameters() -> None:
    model, (x, y) = tiny(), batch()
    own = own_gradients(model, x, y)
    with GradientAccountant(model) as accountant:
        account = accountant.backward(F.cross_entropy(model(x), y), pairwise={"0.weight", "4.bias"})
    assert account.inner is None
    for name in ("0.weight", "4.bias"):
        torch.testing.assert_close(account.parameter_inner[name], own[name].flatten(1) @ own[name].flatten(1).t())
    assert set(account.parameter_inner) == {"0.weight", "4.bias"}


def test_inner_products_of_projections_are_right_on_average() -> None:
    torch.manual_seed(0)
    dim, draws, model = 8, 400, nn.Linear(40, 30, bias=False).double()
    x = torch.randn(2, 40).double()
    own = per_example_gradients(model, weighted, x, targets(2).double())["weight"]
    found = []
    for seed in range(draws):
        account, _ = account_of(model, weighted, x, targets(2).double(), project=Projection(dim, seed))
        p = account.projected["weight"]
        assert p.shape == (2, dim, dim)
        found.append(torch.stack([(p[0] * p[1]).sum(), p[0].square().sum()]))
    found, square, exact = torch.stack(found), own[0].square().sum(), (own[0] * own[1]).sum()
    spread = found.std(0) / math.sqrt(draws)
    assert abs(found[:, 0].mean() - exact) < 5 * spread[0]
    assert abs(found[:, 1].mean() - square) < 5 * spread[1]
    relative = found[:, 1].var() / square**2  # the gradient of one position has rank one
    assert relative < (2 / dim + 2 / dim + 4 / dim**2) * (1 + 5 * math.sqrt(8 / draws))


def test_projections_are_the_same_everywhere_and_leave_short_sides() -> None:
    project, like = Projection(5, seed=-3), torch.zeros(0)
    signs = project.matrix("a", "left", 9, like) * math.sqrt(5)
    assert torch.equal(signs.abs(), torch.ones(5, 9))
    assert torch.equal(project.matrix("a", "left", 9, like.double()) * math.sqrt(5), signs.double())
    assert torch.equal(project.matrix("a", "left", 4, like), torch.eye(4))
    assert project.matrix("a", "left", 5, like).shape == (5, 5)
    for other in (Projection(5, 0).matrix("a", "left", 9, like), project.matrix("a", "right", 9, like)):
        assert not torch.equal(other * math.sqrt(5), signs)
    assert not torch.equal(project.matrix("b", "left", 9, like) * math.sqrt(5), signs)


def test_answers_under_autocast() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(B, 16), torch.arange(B)
    own = own_gradients(model, x, y)
    direction, bound = {n: g[0] for n, g in own.items()}, float(flat(own).norm(dim=1).median())
    with GradientAccountant(model) as accountant:
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        account = accountant.backward(
            loss,
            directions={"d": direction},
            pairwise=True,
            max_norm=bound,
            project=Projection(4, 0),
            per_position=True,
        )
    inner = flat(own) @ flat(own).t()
    torch.testing.assert_close(account.inner, inner, rtol=0.05, atol=0.02 * float(inner.max()))
    cosine = F.cosine_similarity(flat(own), flat(own)[:1])
    torch.testing.assert_close(account.cosine("d"), cosine, rtol=0.05, atol=0.02)
    for n, g in clipped(own, bound).items():
        assert model.get_parameter(n).grad.dtype == torch.float32
        torch.testing.assert_close(model.get_parameter(n).grad, g.mean(0), rtol=0.1, atol=0.02 * bound)
    assert {t.dtype for t in (account.inner, *account.projected.values(), *account.dot["d"].values())} == {
        torch.float32
    }


FIVE = torch.zeros(5)
WRONG = {
    "shape": (
        {"directions": {"d": {"0.weight": torch.zeros(3)}}},
        ValueError,
        r"directions\['d'\]\['0.weight'\].*\[5, 3\]",
    ),
    "dtype": (
        {"directions": {"d": {"0.bias": torch.zeros(5).double()}}},
        ValueError,
        r"torch\.float32.*torch\.float64",
    ),
    "device": ({"directions": {"d": {"0.bias": FIVE.to("meta")}}}, ValueError, r"on cpu.*meta"),
    "layout": ({"directions": {"d": {"0.bias": FIVE.to_sparse()}}}, ValueError, r"got \[5\] of .*sparse_coo"),
    "no tensor": ({"directions": {"d": {"0.bias": 1.0}}}, ValueError, r"got float"),
    "unknown": ({"directions": {"d": {"no": FIVE}}}, ValueError, r"directions\['d'\].*0\.weight.*'no'"),
    "one direction": ({"directions": {"0.bias": FIVE}}, TypeError, r"directions\['0.bias'\].*Tensor"),
    "no mapping": ({"directions": [1]}, TypeError, r"directions must be a mapping, got list"),
    "zero": ({"max_norm": 0.0}, ValueError, r"max_norm must be greater than 0, got 0"),
    "negative": ({"max_norm": -1}, ValueError, r"max_norm"),
    "not a number": ({"max_norm": math.nan}, ValueError, r"max_norm.*nan"),
    "text": ({"max_norm": "1"}, TypeError, r"max_norm must be a number, got '1'"),
    "no gradients": ({"max_norm": 1, "weight_grads": False}, ValueError, r"max_norm needs weight_grads=True"),
    "clipping": (
        {"max_norm": 1, "clipping": "layer"},
        ValueError,
        r"clipping must be flat or per_parameter, got 'layer'",
    ),
    "clipping alone": ({"clipping": "per_parameter"}, ValueError, r"needs max_norm"),
    "pairs": ({"pairwise": {"no"}}, ValueError, r"pairwise must name parameters.*'no'"),
    "pairs by text": ({"pairwise": "0.weight"}, TypeError, r"pairwise must be a collection of names"),
    "rows": ({"by_row": ["no"]}, ValueError, r"by_row.*'no'"),
    "project": ({"project": 16}, TypeError, r"project must be a Projection, got int"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_write_nothing(name: str) -> None:
    arguments, error, message = WRONG[name]
    model, x = small(), torch.randn(B, 3)
    with GradientAccountant(model) as accountant:
        loss = total(model, x)
        with pytest.raises(error, match=message):
            sums(accountant, loss, **arguments)
    assert set(grads(model).values()) == {None}


def test_wrong_projections() -> None:
    for error, arguments in (
        (ValueError, (0, 1)),
        (TypeError, (2.0, 1)),
        (ValueError, (2, 2**63)),
        (TypeError, (2, None)),
    ):
        with pytest.raises(error, match=r"Projection: (dim|seed) must be"):
            Projection(*arguments)
    model = small()
    account, _ = account_of(model, weighted, torch.randn(B, 3), targets(B))
    with pytest.raises(ValueError, match=r"direction must be one of \[\], got 'd'"):
        account.cosine("d")


def test_a_direction_of_zeros_and_parameters_that_a_loss_does_not_depend_on() -> None:
    model = Model(lambda m, x: m.used(x), used=nn.Linear(3, 2), idle=nn.Linear(4, 5)).double()
    zeros = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    account, _ = account_of(
        model,
        weighted,
        torch.randn(B, 3).double(),
        targets(B).double(),
        directions={"zero": zeros, "none": {}},
        pairwise={"idle.weight"},
        project=Projection(3, 0),
        by_row={"idle.weight"},
    )
    for name in ("zero", "none"):
        assert torch.equal(account.cosine(name), torch.zeros(B).double())
        assert set(account.dot[name]) == set(zeros)
    assert torch.equal(account.projected["idle.weight"], torch.zeros(B, 3, 3).double())
    assert torch.equal(account.row_sqnorm["idle.weight"], torch.zeros(B, 5).double())
    assert torch.equal(account.parameter_inner["idle.weight"], torch.zeros(B, B).double())


def test_no_examples() -> None:
    model = tiny()
    with GradientAccountant(model) as accountant:
        account = sums(
            accountant,
            total(model, torch.zeros(0, 2, 3, 3).double()),
            pairwise=True,
            project=Projection(2, 0),
            directions={"d": {"0.weight": model[0].weight.detach()}},
            by_row={"0.weight"},
            per_position=True,
            max_norm=1,
        )
    assert account.inner.shape == (0, 0)
    assert account.cosine("d").shape == (0,)
    assert account.projected["0.weight"].shape == (0, 2, 2)
    assert account.row_sqnorm["0.weight"].shape == (0, 3)


def test_no_examples_of_a_computed_weight() -> None:
    model = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    direction = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    with GradientAccountant(model) as accountant:
        account = sums(
            accountant, total(model, torch.zeros(0, 3)), directions={"d": direction}, pairwise=True, per_position=True
        )
    assert account.cosine("d").shape == (0,)


def test_computed_weights_have_positions() -> None:
    torch.manual_seed(0)
    model, x = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)).double(), torch.randn(B, 5, 3).double()
    account = held(model, x, per_position=True)
    for t in range(5):
        own = per_example_gradients(model, lambda out, y, t=t: weighted_part(out, y, t), x, targets(B).double())
        for name, g in own.items():
            torch.testing.assert_close(account.position_sqnorm[name][:, t], g.flatten(1).square().sum(1), msg=name)


def weighted_part(out: Tensor, y: Tensor, t: int) -> Tensor:
    """Return the part of `weighted` that depends on one position; others are constants."""
    return weighted(torch.cat([out[:, :t].detach(), out[:, t : t + 1], out[:, t + 1 :].detach()], 1), y)


def test_group_ids_without_weight_gradients_of_a_computed_weight() -> None:
    model = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)).double()
    x, y = torch.randn(B, 3).double(), targets(B).double()
    exact = squared_norms(per_example_gradients(model, weighted, x, y))
    account, _ = account_of(model, weighted, x, y, weight_grads=False, group_ids=torch.arange(B) % 2)
    torch.testing.assert_close(account.sqnorm, exact)
    assert account.group_grad == {}


def test_a_direction_may_be_the_gradients_that_are_there() -> None:
    model, (x, y) = tiny(), batch()
    own = own_gradients(model, x, y)
    F.cross_entropy(model(x), y).backward()
    with GradientAccountant(model) as accountant:
        direction = {n: p.grad for n, p in model.named_parameters()}
        account = accountant.backward(F.cross_entropy(model(x), y), directions={"own": direction})
    expected = F.cosine_similarity(flat(own), flat(own).mean(0, keepdim=True))
    torch.testing.assert_close(account.cosine("own"), expected)


def test_complex_answers_are_of_own_gradients() -> None:
    torch.manual_seed(0)
    model = Model(lambda m, x: torch.view_as_real(x.to(m.w.dtype) @ m.w).flatten(1), w=parameter(3, 4)).double()
    model.w = nn.Parameter(torch.randn(3, 4, dtype=torch.complex128))
    x, weights, project = torch.randn(B, 3).double(), torch.tensor([0.5, 1.0, 2.0, 0.25]), Projection(2, 0)
    own = per_example_gradients(model, weighted, x, targets(B).double())["w"]
    with GradientAccountant(model) as accountant:
        each = ((model(x) - targets(B)[:, None]).square() * torch.linspace(-1, 1.5, 8).double()).sum(1)
        account = accountant.backward(
            (each * weights).sum(), loss_reduction="sum", example_weights=weights, project=project
        )
    left, right = (project.matrix("w", side, n, x).to(own.dtype) for side, n in (("left", 3), ("right", 4)))
    torch.testing.assert_close(account.projected["w"], left @ own @ right.t())


@pytest.mark.parametrize("clipping", ["flat", "per_parameter"])
def test_clipping_with_checkpointing_and_layers_that_are_not_covered(clipping: str) -> None:
    torch.manual_seed(0)
    before, inside = Uncovered(3).double(), Uncovered(4).double()
    body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), inside).double().eval()

    def forward(m: Model, x: Tensor) -> Tensor:
        return m.head(checkpoint(m.body, m.before(x), use_reentrant=False))

    model = Model(forward, before=before, body=body, head=nn.Linear(4, 2)).double()
    x, y = torch.randn(B, 3).double(), targets(B).double()
    exact = per_example_gradients(model, weighted, x, y)
    bound, state = float(flat(exact).norm(dim=1).median()), copy.deepcopy(model.state_dict())
    account_of(model, weighted, x, y, max_norm=bound, clipping=clipping)
    for n, g in exact.items():
        own = (
            g.flatten(1).norm(dim=1) * math.sqrt(len(exact)) if clipping == "per_parameter" else flat(exact).norm(dim=1)
        )
        expected = torch.tensordot((bound / own).clamp(max=1), g, 1) / B
        torch.testing.assert_close(model.get_parameter(n).grad, expected, msg=n)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def test_clipping_keeps_no_graph() -> None:
    model = nn.Sequential(nn.Linear(3, 5), Uncovered(5), nn.Linear(5, 2))
    with GradientAccountant(model) as accountant:
        loss = weighted(model(torch.randn(B, 3)), targets(B))
        with pytest.warns(UserWarning, match="not covered"):
            accountant.backward(loss, max_norm=1.0)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()


def test_noise_scales_of_parameters_from_pairs() -> None:
    model, (x, y) = tiny(), batch()
    own = own_gradients(model, x, y)
    with GradientAccountant(model) as accountant:
        account = accountant.backward(F.cross_entropy(model(x), y), max_norm=1.0, pairwise={"0.weight"})
    found = account.parameter_noise_scale
    torch.testing.assert_close(found, {"0.weight": noise_scale(own["0.weight"].flatten(1))})
    with pytest.raises(ValueError, match=r"pairwise=True"):
        _ = account.noise_scale
    with GradientAccountant(model) as accountant:
        account = accountant.backward(F.cross_entropy(model(x), y), max_norm=1.0, pairwise=True)
    with pytest.raises(ValueError, match=r"names of parameters in pairwise"):
        _ = account.parameter_noise_scale
