import math
import warnings

import pytest
import torch
from accounted import Model, Uncovered, account_of, check, grads, parameter, targets
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memloc_ext import GradientAccountant
from memloc_ext.accounting import Account

B = 4


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return 2 * x * w

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return 2 * grad * w, (2 * grad * x).sum(0)


UNCOVERED = {
    "einsum, a size of one": (
        lambda: Model(lambda m, x: torch.einsum("bij,ij->bi", x, m.w), w=parameter(1, 3)),
        (B, 5, 3),
        {"w"},
    ),
    "einsum, a size of one in the input": (
        lambda: Model(lambda m, x: torch.einsum("bij,ijk->bik", x, m.w), w=parameter(5, 3, 2)),
        (B, 1, 3),
        {"w"},
    ),
    "einsum, a diagonal": (
        lambda: Model(lambda m, x: torch.einsum("bij,jj->bi", x, m.w), w=parameter(3, 3)),
        (B, 5, 3),
        {"w"},
    ),
    "activation": (lambda: nn.Sequential(nn.Linear(3, 5), Uncovered(), nn.Linear(5, 2)), (B, 3), {"1.weight"}),
    "embedding by frequency": (
        lambda: nn.Sequential(nn.Embedding(9, 3, max_norm=9.0), nn.Linear(3, 2)),
        "indices",
        {"0.weight"},
    ),
    "function": (lambda: Model(lambda m, x: Doubled.apply(x, m.w), w=parameter(3)), (B, 3), {"w"}),
    "a parameter per example's place": (
        lambda: Model(lambda m, x: x + m.w[: len(x)] * torch.ones_like(x), w=parameter(1, 3)),
        (B, 3),
        None,
    ),
    "tracked instance norm": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 1), nn.InstanceNorm1d(3, affine=True, track_running_stats=True)),
        (B, 2, 5),
        {"1.weight", "1.bias"},
    ),
    "one image at a time": (
        lambda: Model(lambda m, x: torch.stack([m.c(image) for image in x]), c=nn.Conv2d(2, 3, 2)),
        (B, 2, 3, 3),
        {"c.weight", "c.bias"},
    ),
}


def data(shape: tuple[int, ...] | str) -> Tensor:
    return torch.randint(9, (B, 5)) if isinstance(shape, str) else torch.randn(shape)


@pytest.mark.parametrize("name", UNCOVERED)
def test_what_is_not_covered_is_right_and_named(name: str) -> None:
    torch.manual_seed(0)
    factory, shape, uncovered = UNCOVERED[name]
    check(factory().eval(), data(shape), uncovered=uncovered, tell_batch=True)


def test_sparse_gradients() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 3, sparse=True), nn.Linear(3, 2))
    check(model, torch.randint(9, (B, 5)), uncovered={"0.weight"}, tell_batch=True)


def test_a_complex_parameter() -> None:
    torch.manual_seed(0)

    def loss_of(output: Tensor, target: Tensor) -> Tensor:
        return (output.sum(1) * target).mean()

    model = Model(lambda m, x: torch.fft.rfft(x).mul(m.w).abs(), w=nn.Parameter(torch.randn(3, dtype=torch.cfloat)))
    x, y = torch.randn(B, B), targets(B)
    account, _ = account_of(model, loss_of, x, y, batch_size=B)
    for b in range(B):
        (g,) = torch.autograd.grad(loss_of(model(x[b : b + 1]), y[b : b + 1]), [model.w])
        torch.testing.assert_close(account.sqnorm["w"][b], g.abs().square().sum())


def test_outputs_may_be_nested() -> None:
    torch.manual_seed(0)
    model = Model(lambda m, x: {"a": {"b": [m.p(m.l(x)), 3]}}, l=nn.Linear(3, 2), p=Uncovered())

    def loss_of(output: dict, target: Tensor) -> Tensor:
        return (output["a"]["b"][0].square().sum(1) * target).mean()

    check(model, torch.randn(B, 3), loss_of=loss_of, uncovered={"p.weight"})


def test_no_examples_and_an_uncovered_layer() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), Uncovered(), nn.Flatten(), nn.Linear(27, 4)).eval()
    ids = torch.zeros(0, dtype=torch.int64)
    with GradientAccountant(model) as accountant, warnings.catch_warnings():
        warnings.simplefilter("error")  # no example takes no pass
        account = accountant.backward(
            model(torch.randn(0, 2, 5, 5)).sum(), loss_reduction="sum", group_ids=ids, num_groups=2
        )
    assert all(norm.shape == (0,) for norm in account.sqnorm.values())


class Remembering(nn.Module):
    """Keeps what it computed, as a module with an auxiliary loss does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.w = nn.Linear(3, 4), parameter(4)
        self.state: Tensor | None = None
        self.every: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x) if self.state is None else self.a(x) + self.state
        self.state = z.detach()
        self.every.append(z)
        return torch.hypot(z, self.w)


def test_what_a_model_and_its_users_hooks_keep_of_a_pass_stays() -> None:
    torch.manual_seed(0)
    model, seen = Remembering().double(), []
    model.a.register_forward_hook(lambda module, args, output: seen.append(output))
    accountant = GradientAccountant(model)
    for step in range(2):
        with accountant, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            losses = model(torch.randn(B, 3).double()).sin().sum(1)
            exact = torch.stack(
                [torch.autograd.grad(loss, model.w, retain_graph=True)[0].square().sum() for loss in losses]
            )
            account = accountant.backward(losses.mean())
        torch.testing.assert_close(account.sqnorm["w"], exact)
        assert model.state is not None
        assert [t.shape for t in (model.state, *model.every, *seen)] == [(B, 4)] * (1 + 2 * (step + 1))
        (model.state + model.every[-1] + seen[-1]).sum().item()  # of this pass, not of one that was run again


class Twice(nn.Module):
    """Uses a layer by its name, and once more in a way that a copy of the model may not see."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.l, self.u = nn.Linear(3, 4), Uncovered()
        self.ways = {
            "list": [self.u],
            "method": [self.u.forward],
            "function": [lambda x: self.u(x)],
        }[way]

    def forward(self, x: Tensor) -> Tensor:
        x = self.u(self.l(x))
        for function in self.ways:
            x = function(x)
        return x


def scaled(*after: nn.Module) -> nn.Module:
    model = Model(lambda m, x: m.h(m.u(m.l(x))), l=nn.Linear(3, 4), u=Uncovered(), h=nn.Sequential(*after))
    model.u.register_forward_hook(lambda module, args, output: output.register_hook(lambda grad: grad / 10) and None)
    return model


class Branch(nn.Module):
    """Mixes the examples in a branch that is not seen in the output."""

    def __init__(self) -> None:
        super().__init__()
        self.l, self.u, self.n, self.gate = nn.Linear(3, 4), Uncovered(), nn.BatchNorm1d(4), parameter(1)
        nn.init.zeros_(self.gate)

    def forward(self, x: Tensor) -> Tensor:
        x = self.l(x)
        return x + self.gate * self.n(self.u(x)).square()


ALONE = {
    "a list of modules": lambda: Twice("list"),
    "a bound method": lambda: Twice("method"),
    "a function": lambda: Twice("function"),
    "a hook that changes gradients": lambda: scaled(nn.Linear(4, 2)),
    "a hook that changes the output's gradient": scaled,
    "a closed gate behind batch norm": Branch,
}


@pytest.mark.parametrize("name", ALONE)
def test_examples_that_run_alone_have_the_gradients_that_they_have_in_the_batch(name: str) -> None:
    torch.manual_seed(0)
    model, x = ALONE[name]().double(), torch.randn(B, 3).double()
    with GradientAccountant(model) as accountant, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out, names = model(x), dict(model.named_parameters())
        exact = {}
        for b in range(B):
            mask = torch.zeros_like(out)
            mask[b] = 1
            gradients = torch.autograd.grad(out.sin(), list(names.values()), mask, retain_graph=True)
            for key, gradient in zip(names, gradients, strict=True):
                exact.setdefault(key, []).append(gradient.square().sum())
        for _ in range(2):  # what was found out is remembered
            account = accountant.backward(out.sin().sum(), loss_reduction="sum", retain_graph=True)
            uncovered = [key for key in names if key.startswith("u.")]
            for key in uncovered:
                torch.testing.assert_close(account.sqnorm[key], torch.stack(exact[key]))


def test_gradients_that_are_zero_take_no_other_way() -> None:
    passes: list[Tensor] = []
    model, x = nn.Sequential(nn.Linear(3, 4), Uncovered(), nn.Linear(4, 2)), torch.randn(B, 3)
    nn.init.zeros_(model[2].weight)
    with GradientAccountant(model, check="never") as accountant, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model(x)
        out.register_hook(passes.append)
        account = accountant.backward(out.sum(), loss_reduction="sum")
    assert not account.sqnorm["1.weight"].any()
    assert len(passes) <= 2


def test_complex_layers() -> None:
    torch.manual_seed(0)
    model = Model(
        lambda m, x: m.b(m.a(x) * m.a(x).conj()).abs(),
        a=nn.Linear(3, 4, dtype=torch.complex128),
        b=nn.Linear(4, 2, dtype=torch.complex128),
    )
    x = torch.randn(B, 3, dtype=torch.complex128)
    with GradientAccountant(model) as accountant, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        account = accountant.backward(model(x).square().sum(), loss_reduction="sum")
    given = grads(model)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    for (name, _), gradient in zip(model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(given[name], gradient)
    for b in range(B):
        alone = torch.autograd.grad(model(x[b : b + 1]).square().sum(), list(model.parameters()))
        for (name, _), gradient in zip(model.named_parameters(), alone, strict=True):
            torch.testing.assert_close(account.sqnorm[name][b], gradient.abs().square().sum())
    assert not account.norms.is_complex()


def test_arguments_by_name() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        token = torch.tile(input=m.token, dims=(len(x), 1))
        return m.l(torch.cat(tensors=[x, token], dim=1))

    check(Model(run, token=parameter(1, 2), l=nn.Linear(5, 2)), torch.randn(B, 3), uncovered=None)


def test_an_example_that_is_not_a_number_leaves_others_as_they_are() -> None:
    torch.manual_seed(0)
    model = Model(lambda m, x: Doubled.apply(m.l(x), m.w), l=nn.Linear(3, 3), w=parameter(3))
    x = torch.randn(B, 3)
    expected, _ = account_of(model, lambda out, y: out.square().sum(), x, targets(B), loss_reduction="sum")
    x[1] = math.nan
    account, _ = account_of(model, lambda out, y: out.square().sum(), x, targets(B), loss_reduction="sum")
    for name, norms in account.sqnorm.items():
        assert norms[1].isnan()
        assert torch.equal(norms[[0, 2, 3]], expected.sqnorm[name][[0, 2, 3]])


class Dropped(nn.Module):
    """Dropout, a layer that is not covered, and `own` of the module's between them."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.l, self.u, self.own, self.h = nn.Linear(3, 8), Uncovered(), own, nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(F.dropout(self.u(self.own(self.l(x))), 0.5))


class Recomputed(nn.Module):
    """What a layer returns, recomputed in the backward pass."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x, use_reentrant=False)


class Mean(nn.Module):
    """Adds the mean over the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.nan_to_num().mean(0)


OWN = {
    "nothing": nn.Identity,
    "saturated": nn.Tanh,  # of an infinite input: the output is finite, and its gradient is not
    "recomputed": lambda: Recomputed(nn.Linear(8, 8)),
}


@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("exact", [False, True], ids=["norms", "groups"])
def test_one_example_that_is_not_finite_spoils_no_other_where_dropout_is_active(exact: bool, own: str) -> None:
    torch.manual_seed(0)
    model, x = Dropped(OWN[own]()), torch.randn(B, 3)
    model.register_load_state_dict_post_hook(lambda *_: None)  # is no part of a pass
    groups = {"group_ids": torch.tensor([0, 1, 0, 2]), "num_groups": 3}

    def account() -> Account:
        torch.manual_seed(1)
        state = torch.get_rng_state()
        with GradientAccountant(model) as accountant:
            loss = model(x).square().sum()
            after = torch.get_rng_state()
            account = accountant.backward(loss, loss_reduction="sum", exact_groups=exact, **groups)
        assert not torch.equal(after, state)
        assert torch.equal(torch.get_rng_state(), after)
        return account

    expected = account()
    x[1] = math.inf
    found = account()
    for name, norms in found.sqnorm.items():
        assert not norms[1].isfinite()
        torch.testing.assert_close(norms[[0, 2, 3]], expected.sqnorm[name][[0, 2, 3]])
        assert not found.group_grad[name][1].isfinite().all()
        torch.testing.assert_close(found.group_grad[name][[0, 2]], expected.group_grad[name][[0, 2]])


@pytest.mark.parametrize("reason", ["a hook", "mixed examples"])
def test_gradients_are_not_taken_from_a_pass_that_may_be_another(reason: str) -> None:
    torch.manual_seed(0)
    model, x = Dropped(Mean() if reason == "mixed examples" else nn.Identity()), torch.randn(B, 3)
    if reason == "a hook":
        model.l.register_full_backward_hook(lambda module, inputs, outputs: None)
    x[1] = math.nan
    account, _ = account_of(model, lambda out, y: out.square().sum(), x, targets(B), loss_reduction="sum")
    assert model(x).isfinite().all(1).tolist() == [True, False, True, True]
    assert account.sqnorm["u.weight"].isnan().all()


def test_a_target_that_is_not_finite_leaves_the_pass_as_it_was() -> None:
    torch.manual_seed(0)
    model, x, y = (
        nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)),
        torch.randn(B, 3),
        torch.ones(B, 2),
    )
    ids, y[1] = torch.tensor([0, 1, 0, 2]), math.nan
    with torch.autocast("cpu", torch.bfloat16), GradientAccountant(model) as accountant:
        loss = (model(x) - y).square().sum()
        account = accountant.backward(loss, loss_reduction="sum", group_ids=ids, num_groups=3, exact_groups=True)
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.autograd.grad((model(x) - y)[[0, 2]].square().sum(), list(model.parameters()))
    for (name, _), gradient in zip(model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(account.group_grad[name][0], gradient, rtol=0.02, atol=0.02)


def test_outputs_that_are_chunks_of_one_tensor() -> None:
    torch.manual_seed(0)

    def loss_of(output: tuple[Tensor, ...], target: Tensor) -> Tensor:
        return (output[0].square().sum(1) * target + output[1].sum(1)).mean()

    model = Model(lambda m, x: m.a(m.l(x)).chunk(2, -1), l=nn.Linear(3, 6), a=Uncovered())
    check(model, torch.randn(B, 3), loss_of=loss_of, uncovered={"a.weight"})


def test_a_loss_of_logits_and_of_the_features_below_is_refused_and_leaves_no_gradients() -> None:
    torch.manual_seed(0)

    def run(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        features = m.a(m.l(x))
        return m.h(features), features

    model = Model(run, l=nn.Linear(3, 4), a=Uncovered(), h=nn.Linear(4, 2))
    with GradientAccountant(model) as accountant:
        logits, features = model(torch.randn(B, 3))
        loss = logits.square().sum() + features.square().sum()
        with pytest.raises(ValueError, match=r"a\.weight"):
            accountant.backward(loss, loss_reduction="sum")
    assert all(grad is None for grad in grads(model).values())


def test_each_parameter_is_named_once() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), Uncovered(), Uncovered(4)), torch.randn(B, 3)
    accountant = GradientAccountant(model)
    with pytest.warns(UserWarning) as caught:  # noqa: PT030, PT031
        for _ in range(2):
            with accountant:
                accountant.backward(model(x).sum(), loss_reduction="sum")
    (told,) = (str(w.message) for w in caught)
    assert told == "GradientAccountant: layers that are not covered take a pass per example, of 1.weight, 2.weight"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with accountant:
            accountant.backward(model(x).sum(), loss_reduction="sum")


def test_a_penalty_on_weights_is_refused_and_leaves_no_gradients() -> None:
    model, x = nn.Linear(3, 8), torch.randn(B, 3)
    for penalty in (lambda w: w.square().sum(), lambda w: (w.relu() @ w.t()).sum(), lambda w: (w - 1).norm()):
        with GradientAccountant(model) as accountant:
            loss = model(x).square().sum() + penalty(model.weight)
            with pytest.raises(ValueError, match=r"gradients of weight: .* without a penalty on weights"):
                accountant.backward(loss, loss_reduction="sum")
        assert model.weight.grad is None
        assert model.bias.grad is None


def test_a_learned_center_in_the_loss() -> None:
    torch.manual_seed(0)
    model = Model(lambda m, x: m.l(x), l=nn.Linear(3, 2), center=parameter(2), centers=parameter(3, 2))
    x, y = torch.randn(B, 3), torch.tensor([0, 2, 2, 1])

    def losses(rows: slice) -> Tensor:
        features = model(x[rows])
        return ((features - model.center).square() * (features - model.centers[y[rows]]).abs()).sum(1)

    with GradientAccountant(model) as accountant:
        account = accountant.backward(losses(slice(None)).mean())
    for b in range(B):
        gradients = torch.autograd.grad(losses(slice(b, b + 1)).sum(), list(model.parameters()))
        for (name, _), g in zip(model.named_parameters(), gradients, strict=True):
            torch.testing.assert_close(account.sqnorm[name][b], g.square().sum())


def test_losses_by_example_need_no_model_output() -> None:
    torch.manual_seed(0)
    model, x = Model(lambda m, x: m.act(m.l(x)), l=nn.Linear(3, 2), act=Uncovered(2)), torch.randn(B, 3)
    with pytest.warns(UserWarning, match=r"act\.weight"), GradientAccountant(model) as accountant:
        account = accountant.backward(model.act(model.l(x)).square().sum(1), loss_reduction="none")
    for b in range(B):
        g = torch.autograd.grad(model(x[b : b + 1]).square().sum(), list(model.parameters()))
        for (name, _), one in zip(model.named_parameters(), g, strict=True):
            torch.testing.assert_close(account.sqnorm[name][b], one.square().sum())


def test_ignored_targets() -> None:
    torch.manual_seed(0)
    model, tokens = nn.Sequential(nn.Embedding(9, 3), Uncovered(), nn.Linear(3, 9)), torch.randint(9, (B, 5))
    y = tokens.roll(-1, 1)
    y[0, 1:], y[1] = -100, -100

    def losses(rows: slice) -> Tensor:
        return F.cross_entropy(model(tokens[rows]).transpose(1, 2), y[rows], ignore_index=-100, reduction="none")

    with pytest.warns(UserWarning, match=r"1\.weight"), GradientAccountant(model) as accountant:
        account = accountant.backward(losses(slice(None)), loss_reduction="none")
    for b in range(B):
        g = torch.autograd.grad(losses(slice(b, b + 1)).sum(), list(model.parameters()))
        for (name, _), one in zip(model.named_parameters(), g, strict=True):
            torch.testing.assert_close(account.sqnorm[name][b], one.square().sum())
    assert all(norms[1] == 0 for norms in account.sqnorm.values())


@pytest.mark.parametrize("way", ["siamese", "recurrent"])
@pytest.mark.filterwarnings("ignore:GradientAccountant")
def test_a_model_that_is_called_twice(way: str) -> None:
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(3, 3), Uncovered(3)), torch.randn(B, 3), torch.randn(B, 3)

    def loss(rows: slice) -> Tensor:
        return ((model(x[rows]) * model(y[rows])) if way == "siamese" else model(model(x[rows])).square()).sum()

    with GradientAccountant(model) as accountant:
        account = accountant.backward(loss(slice(None)), loss_reduction="sum")
    for b in range(B):
        gradients = torch.autograd.grad(loss(slice(b, b + 1)), list(model.parameters()))
        for (name, _), g in zip(model.named_parameters(), gradients, strict=True):
            torch.testing.assert_close(account.sqnorm[name][b], g.square().sum())
