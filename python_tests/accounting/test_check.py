"""Sizes that coincide: a dimension of the batch's size is not taken for the examples."""

import gc
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from accounted import Model, parameter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from memloc_ext import GradientAccountant
from memloc_ext.accounting.check import _known


def cross_entropy(logits: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(logits, y, reduction=reduction)


def own_sqnorms(model: nn.Module, inputs: Sequence[Tensor], y: Tensor, shared: Sequence[int] = ()) -> dict[str, Tensor]:
    """Return the squared norms of each example's own gradient, one example at a time."""
    named = dict(model.named_parameters())
    rows: list[list[Tensor]] = []
    for b in range(len(y)):
        own = [t if i in shared else t[b : b + 1] for i, t in enumerate(inputs)]
        loss = cross_entropy(model(*own), y[b : b + 1])
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        rows.append([loss.new_zeros(()) if g is None else g.square().sum() for g in gradients])
    return {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(named)}


def check(
    model: nn.Module, inputs: Sequence[Tensor], shared: Sequence[int] = (), reduction: str = "mean", **arguments: Any
) -> list[str]:
    """Hold an account against single examples, and return its warnings."""
    model, inputs = model.double(), [t.double() if t.is_floating_point() else t for t in inputs]
    batch = len(inputs[next(i for i in range(len(inputs)) if i not in shared)])
    y = torch.arange(batch) % 4
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with GradientAccountant(model, **arguments) as accountant:
            loss = cross_entropy(model(*inputs), y, reduction)
            account = accountant.backward(loss, loss_reduction=reduction)
    for name, norms in own_sqnorms(model, inputs, y, shared).items():
        torch.testing.assert_close(account.sqnorm[name], norms, msg=lambda text, name=name: f"{name}: {text}")
    return [str(w.message) for w in caught]


# constants of any origin, of as many rows as there are examples


def attended(make: Callable[[Tensor, int], Tensor]) -> Callable[[nn.Module, Tensor], Tensor]:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        keys = torch.tanh(m.f(make(x, m.n)[:, None]))
        return m.h(torch.softmax(m.l(x) @ keys.t(), -1) @ keys)

    return run


CONSTANTS = {
    "to": lambda x, n: torch.linspace(0, 1, n).to(x),
    "new_tensor": lambda x, n: x.new_tensor(range(n)),
    "new_zeros": lambda x, n: x.new_zeros(n) + torch.arange(n),
    "new_full": lambda x, n: x.new_full((n,), 0.5) * torch.arange(n),
    "type_as": lambda x, n: torch.arange(n).type_as(x),
    "drawn": lambda x, n: torch.rand(n, generator=torch.Generator().manual_seed(0)).to(x.dtype),
    "written": lambda x, n: torch.empty(n, dtype=x.dtype).copy_(torch.arange(n)),
}


@pytest.mark.parametrize("checks", ["first", "never"])
@pytest.mark.parametrize("name", CONSTANTS)
def test_as_many_constants_as_examples(name: str, checks: str) -> None:
    torch.manual_seed(0)
    parts = {"f": nn.Linear(1, 6), "l": nn.Linear(5, 6), "h": nn.Linear(6, 4)}
    model = Model(attended(CONSTANTS[name]), **parts)
    model.n = 4
    told = check(model, [torch.randn(4, 5)], check=checks)
    assert not any("two examples" in message for message in told)  # known to be constant, not found out


# steps that are collected with time first


def collected(make: Callable[..., Tensor]) -> Callable[[nn.Module, Tensor], Tensor]:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        out = make(x, x.shape[1], len(x), 6)
        for t in range(x.shape[1]):
            out[t] = torch.tanh(m.c(x[:, t]))
        return m.h(out).square().sum(0)

    return run


PREALLOCATED = {
    "new_zeros": lambda x, *size: x.new_zeros(size),
    "new_empty": lambda x, *size: x.new_empty(size),
    "new_full": lambda x, *size: x.new_full(size, 7.0),
    "empty": lambda x, *size: torch.empty(size, dtype=x.dtype),
    "zeros": lambda x, *size: torch.zeros(*size, dtype=x.dtype),
}


@pytest.mark.parametrize("steps", [3, 5])
@pytest.mark.parametrize("name", PREALLOCATED)
def test_steps_written_into_a_tensor_with_time_first(name: str, steps: int) -> None:
    torch.manual_seed(0)
    model = Model(collected(PREALLOCATED[name]), c=nn.Linear(5, 6), h=nn.Linear(6, 4))
    assert check(model, [torch.randn(3, steps, 5)], check="never") == []  # where the examples are is followed


def test_steps_copied_into_slices() -> None:
    torch.manual_seed(0)

    def run(m: nn.Module, x: Tensor) -> Tensor:
        out = x.new_empty(3, len(x), 6)
        for t in range(3):
            out[t].copy_(m.c(x[:, t]))
        return m.h(out).square().sum(0)

    check(Model(run, c=nn.Linear(5, 6), h=nn.Linear(6, 4)), [torch.randn(3, 3, 5)])


# functions whose first argument is not of the examples


FIRST = {
    "cdist": lambda m, x: torch.cdist(m.c, m.l(x)).t(),
    "inner": lambda m, x: torch.inner(m.c, m.l(x)).t(),
    "linear": lambda m, x: F.linear(m.c, m.l(x)).t().relu(),
    "matmul": lambda m, x: (m.c @ m.l(x).t()).t(),
    "outer": lambda m, x: torch.outer(m.c[:, 0], m.l(x)[:, 0]).t(),
    "einsum": lambda m, x: torch.einsum("kd,bd->kb", m.c, m.l(x)).t(),
    "tensordot": lambda m, x: torch.tensordot(m.c, m.l(x), ([1], [1])).t(),
    "index of the examples": lambda m, x: m.c.sin()[x.argmax(1)] * m.l(x)[:, :1],
}


@pytest.mark.parametrize("checks", ["first", "never"])
@pytest.mark.parametrize("rows", [5, 6])
@pytest.mark.parametrize("name", FIRST)
def test_as_many_centres_first_as_examples(name: str, rows: int, checks: str) -> None:
    torch.manual_seed(0)
    last = 6 if name.startswith("index") else rows
    model = Model(lambda m, x: m.h(FIRST[name](m, x)), l=nn.Linear(5, 6), c=parameter(rows, 6), h=nn.Linear(last, 4))
    check(model, [torch.randn(5, 5)], check=checks)


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(2, 4), tokens=st.integers(2, 4), width=st.integers(2, 4), seed=st.integers(0, 99))
def test_sizes_that_coincide_in_any_way(batch: int, tokens: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)

    def run(m: nn.Module, x: Tensor) -> Tensor:
        state, steps = x.new_zeros(len(x), width), x.new_zeros(tokens, len(x), width)
        for t in range(tokens):
            state = torch.tanh(m.i(x[:, t]) + m.r(state))
            steps[t] = state
        keys = m.k(x.new_ones(tokens, width)) + m.p
        mixed = torch.softmax(m.q(steps.transpose(0, 1)) @ keys.t(), -1) @ keys
        return m.h(torch.cat([mixed, m.n(steps).transpose(0, 1)], -1)).mean(1)

    model = Model(
        run,
        **{name: nn.Linear(width, width) for name in "irkq"},
        p=parameter(tokens, width),
        n=nn.LayerNorm(width),
        h=nn.Linear(2 * width, 4),
    )
    check(model, [torch.randn(batch, tokens, width)], check="never")


# inputs


def prompted() -> nn.Module:
    torch.manual_seed(0)
    return Model(lambda m, x, p: m.l(x) @ torch.tanh(m.q(p)).t(), l=nn.Linear(5, 6), q=nn.Linear(3, 6))


def test_an_input_that_is_the_same_for_all_is_found_out_by_the_check() -> None:
    model, inputs = prompted(), [torch.randn(4, 5), torch.randn(4, 3)]
    (message,) = check(model, inputs, [1])
    assert "q.weight, q.bias" in message
    assert check(model, inputs, [1]) == []  # known from then on, and still right


def test_an_input_that_is_declared_to_be_the_same_for_all() -> None:
    told = check(prompted(), [torch.randn(4, 5), torch.randn(4, 3)], [1], shared_inputs=[1], check="never")
    assert not any("two examples" in message for message in told)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_adjacency_matrix_before_the_features(reduction: str) -> None:
    torch.manual_seed(0)
    model = Model(lambda m, adj, x: m.b(torch.relu(adj @ m.a(x))).mean(1), a=nn.Linear(5, 6), b=nn.Linear(6, 4))
    inputs = [torch.rand(7, 7), torch.randn(5, 7, 5)]
    told = check(model, inputs, [0], reduction)
    assert len([message for message in told if "shared_inputs" in message]) == 1
    assert check(model, inputs, [0], reduction) == []  # the input with the examples is known now
    assert check(model, inputs, [0], reduction, shared_inputs=[0]) == []


def test_an_adjacency_matrix_of_the_size_of_the_batch() -> None:
    torch.manual_seed(0)
    model = Model(lambda m, adj, x: m.b(torch.relu(adj @ m.a(x))).mean(1), a=nn.Linear(5, 6), b=nn.Linear(6, 4))
    check(model, [torch.rand(5, 5), torch.randn(5, 5, 5)], [0])


@pytest.mark.parametrize("wrong", ["x", [3], ["y"], [1.5]])
def test_shared_inputs_must_be_inputs(wrong: Any) -> None:
    model = nn.Linear(3, 4)
    with pytest.raises((TypeError, ValueError), match="shared_inputs"), GradientAccountant(model, shared_inputs=wrong):
        model(torch.randn(2, 3))


def test_graphs_of_unequal_size_in_one_batch() -> None:
    torch.manual_seed(1)
    graph, y = torch.tensor([0, 0, 1, 1, 1, 1, 2, 2, 2]), torch.arange(3)
    x = torch.randn(9, 5).double()

    def run(m: nn.Module, x: Tensor, graph: Tensor, n: int) -> Tensor:
        nodes = torch.tanh(m.a(x))
        return m.h(nodes.new_zeros(n, 6).index_add_(0, graph, nodes))

    model = Model(run, a=nn.Linear(5, 6), h=nn.Linear(6, 4)).double()
    with GradientAccountant(model) as accountant:
        losses = cross_entropy(model(x, graph, 3), y, "none")
        with pytest.warns(UserWarning, match=r"two examples .* a\.weight, a\.bias"):
            account = accountant.backward(losses, loss_reduction="none", batch_size=3)
    for b in range(3):
        loss = cross_entropy(model(x[graph == b], graph[graph == b] * 0, 1), y[b : b + 1])
        for (name, _), g in zip(
            model.named_parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            torch.testing.assert_close(account.sqnorm[name][b], g.square().sum())


def own_norms(model: nn.Module, losses: Tensor) -> dict[str, Tensor]:
    """Return the squared norms of the gradients of losses by example, which keep their graph."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    alone = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    norms = [[g.square().sum() for g in gradients] for gradients in zip(*alone, strict=True)]
    return dict(zip(names, map(torch.stack, norms), strict=True))


def test_graphs_that_are_of_equal_size_only_at_first() -> None:
    torch.manual_seed(1)

    def run(m: nn.Module, x: Tensor, graph: Tensor) -> Tensor:
        return m.h(x.new_zeros(3, 6).index_add_(0, graph, torch.tanh(m.a(x))))

    model = Model(run, a=nn.Linear(5, 6), h=nn.Linear(6, 4)).double()
    for sizes in ([3, 3, 3], [2, 3, 4], [5, 3, 2]):  # the last cannot be divided by three at all
        graph = torch.arange(3).repeat_interleave(torch.tensor(sizes))
        with GradientAccountant(model) as accountant, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            losses = cross_entropy(model(torch.randn(len(graph), 5).double(), graph), torch.arange(3), "none")
            exact = own_norms(model, losses)
            account = accountant.backward(losses.mean(), batch_size=3)
        torch.testing.assert_close(account.sqnorm, exact)


def test_more_prompts_than_examples() -> None:
    torch.manual_seed(0)
    model = Model(lambda m, p, x: m.x(x) @ torch.tanh(m.p(p)).t(), p=nn.Linear(3, 5), x=nn.Linear(3, 5)).double()
    for _ in range(2):
        with GradientAccountant(model) as accountant, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = model(torch.randn(4, 3).double(), torch.randn(2, 3).double())
            losses = cross_entropy(out, torch.arange(2), "none")
            exact = own_norms(model, losses)
            account = accountant.backward(losses.mean(), batch_size=2)
        torch.testing.assert_close(account.sqnorm, exact)


# losses in which examples meet


def test_the_own_loss_of_an_example_that_meets_others() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), torch.randn(4, 3).double()

    def losses() -> Tensor:
        z = F.normalize(model(x), dim=1)
        return cross_entropy(z @ z.t() / 0.5, torch.arange(4).roll(1), "none")

    with pytest.warns(UserWarning, match="contrastive"), GradientAccountant(model) as accountant:
        account = accountant.backward(losses(), loss_reduction="none")
    torch.testing.assert_close(account.sqnorm, own_norms(model, losses()))


# the check itself


def passes(model: nn.Module, x: Tensor, times: int = 1, **arguments: Any) -> list[int]:
    """Return how often the last layer's gradient was computed in each accounted backward pass."""
    counts = []
    for _ in range(times):
        calls = []
        with GradientAccountant(model, **arguments) as accountant:
            out = model(x)
            out.register_hook(calls.append)
            accountant.backward(out.square().sum(), loss_reduction="sum")
        counts.append(len(calls))
    return counts


def test_a_pass_is_checked_once_for_a_model_and_its_sizes() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    first, then = passes(model, torch.randn(4, 3), 2)
    assert first > then == passes(model, torch.randn(4, 3))[0] == 1  # also of another accountant
    assert passes(model, torch.randn(3, 3), 2) == [first, 1]  # a smaller last batch
    assert passes(model.eval(), torch.randn(4, 3), 2) == [first, 1]
    assert passes(model, torch.randn(4, 3), 2, check="always") == [first, first]
    assert passes(nn.Linear(3, 2), torch.randn(4, 3), check="never") == [1]
    assert passes(nn.Linear(3, 2), torch.randn(1, 3)) == [1]  # nothing to be told apart


def test_what_is_known_of_a_model_goes_with_it() -> None:
    model = nn.Linear(3, 2)
    passes(model, torch.randn(4, 3))
    (known,) = _known[model].values()
    assert known.signatures
    gc.collect()
    before = len(_known)
    del model, known
    gc.collect()
    assert len(_known) == before - 1


def test_what_is_told_of_the_inputs_is_checked_anew() -> None:
    """So that an accountant which is told of an input that is the same for all is fast."""
    model, inputs = prompted(), [torch.randn(4, 5), torch.randn(4, 3)]

    def passes(**arguments: Any) -> int:
        calls: list[Tensor] = []
        with GradientAccountant(model, **arguments) as accountant:
            out = model(*inputs)
            out.register_hook(calls.append)
            accountant.backward(out.square().sum(), loss_reduction="sum")
        return len(calls)

    with pytest.warns(UserWarning, match=r"q\.weight, q\.bias"):
        passes()
    assert passes() > 1
    assert [passes(shared_inputs=[1]) for _ in range(2)][1] == 1


@pytest.mark.parametrize("wrong", ["second", None, True])
def test_check_must_be_known(wrong: Any) -> None:
    with pytest.raises(ValueError, match="check must be first, always or never"):
        GradientAccountant(nn.Linear(2, 2), check=wrong)


def test_the_check_leaves_model_gradients_and_generators_alone() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)), torch.randn(8, 3)
    states = []
    for checks in ("first", "never"):
        torch.manual_seed(1)
        model[1].reset_running_stats()
        model.zero_grad()
        with GradientAccountant(model, check=checks) as accountant:
            account = accountant.backward(model(x).square().sum(), loss_reduction="sum")
        states.append(
            [*account.sqnorm.values(), *(p.grad for p in model.parameters()), *model.buffers(), torch.rand(1)]
        )
    for one, other in zip(*states, strict=True):
        assert torch.equal(one, other)


def test_batch_norm_without_an_affine_part_passes_the_check() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False), nn.ReLU(), nn.Linear(4, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with GradientAccountant(model) as accountant:
            accountant.backward(model(torch.randn(8, 3)).square().sum(), loss_reduction="sum")


# a loss that the model returns itself


class Tagger(nn.Module):
    """Returns a mean over the tokens that count, as language models do, out of functions that are not watched."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.h = nn.Embedding(9, 6), nn.Linear(6, 4)

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.h(torch.tanh(self.e(ids)))
        picked = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        counted = labels >= 0
        return {"loss": -(picked * counted).sum() / counted.sum(), "logits": logits}


def test_a_loss_of_the_models_own_that_is_a_mean_over_tokens() -> None:
    torch.manual_seed(0)
    model, ids, labels = Tagger(), torch.randint(9, (3, 5)), torch.randint(4, (3, 5))
    with GradientAccountant(model) as accountant:
        accountant.backward(model(ids, labels)["loss"])  # as many tokens in each: a mean over examples
    labels[0, 1:] = -1
    for p in model.parameters():
        p.grad = None
    with GradientAccountant(model) as accountant, pytest.raises(ValueError, match="example_weights"):
        accountant.backward(model(ids, labels)["loss"])
    assert all(p.grad is None for p in model.parameters())
    shares = (labels >= 0).sum(1) / (labels >= 0).sum()
    with GradientAccountant(model, check="always") as accountant:
        account = accountant.backward(model(ids, labels)["loss"], example_weights=shares)
    for b in range(3):
        loss = model(ids[b : b + 1], labels[b : b + 1])["loss"]
        for (name, _), g in zip(
            model.named_parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            torch.testing.assert_close(account.sqnorm[name][b], g.square().sum())


def test_a_load_balancing_term_is_told_of_once() -> None:
    torch.manual_seed(0)

    def run(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        shares = m.gate(x).softmax(-1)
        return (torch.stack([m.a(x), m.b(x)], -1) * shares[:, None]).sum(-1), shares.mean(0).square().sum()

    model = Model(run, gate=nn.Linear(3, 2), a=nn.Linear(3, 4), b=nn.Linear(3, 4))
    x, y, told = torch.randn(4, 3), torch.arange(4), []
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with GradientAccountant(model) as accountant:
                logits, balance = model(x)
                accountant.backward(cross_entropy(logits, y) + balance)
        told.append([str(w.message) for w in caught])
    assert len(told[0]) == 1
    assert "without that term" in told[0][0]
    assert told[1] == []
