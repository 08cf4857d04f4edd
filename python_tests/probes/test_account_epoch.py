import math
from dataclasses import astuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memloc_ext.data import Split
from memloc_ext.marks import marked
from memloc_ext.models import lenet
from memloc_ext.nn import insert_example_tied_dropout
from memloc_ext.probes import EpochAccount, GradientAccounting, account_epoch, roc_auc


def make_split(num: int = 10, noisy: tuple[int, ...] = (1, 4, 5)) -> Split:
    """Random images whose numbers in the data set are not their rows."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (num,), generator=generator)
    memorized = torch.zeros(num, dtype=torch.bool)
    memorized[list(noisy)] = True
    given = torch.where(memorized, (labels + 1) % 10, labels)
    numbers = torch.arange(num) * 3 + 100
    return Split(torch.rand(num, 1, 8, 8, generator=generator), given, labels, memorized, numbers)


def build() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 10))


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def paper(model: nn.Module, split: Split, batch_size: int) -> dict[str, Tensor]:
    """The paper's sums over the batches: parameter to g_clean and g_memorized, ``[2, *shape]``."""
    sums = {name: torch.zeros(2, *value.shape) for name, value in model.named_parameters()}
    for rows in torch.arange(len(split)).split(batch_size):
        for kind in (0, 1):
            chosen = rows[split.memorized[rows] == bool(kind)]
            if len(chosen):
                inputs, labels, _ = split.batch(chosen)
                mean = gradients(model, F.cross_entropy(model(inputs), labels))
                for name, value in mean.items():
                    sums[name][kind] += len(chosen) / len(rows) * value
    return sums


def single_gradients(model: nn.Module, split: Split, names: list[str]) -> Tensor:
    """The gradient of each example's own loss, ``[N, elements]``."""
    rows = []
    for row in range(len(split)):
        inputs, labels, _ = split.batch(torch.tensor([row]))
        own = gradients(model, F.cross_entropy(model(inputs), labels))
        rows.append(torch.cat([own[name].flatten() for name in names]))
    return torch.stack(rows)


def single_norms(model: nn.Module, split: Split, names: list[str]) -> Tensor:
    return single_gradients(model, split, names).norm(dim=1)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_is_the_papers_account_and_that_of_every_example(batch_size: int) -> None:
    model, split = build(), make_split()
    account = account_epoch(model, split, batch_size=batch_size)
    groups = {"0": ["0.weight", "0.bias"], "3": ["3.weight", "3.bias"]}
    assert list(account.groups) == list(groups)
    for name, (clean, noisy) in paper(model, split, batch_size).items():
        size, row = math.sqrt(clean.numel()), account.parameters[name]
        expected = torch.stack([clean.norm(), noisy.norm(), (clean + noisy).norm()]) / size
        torch.testing.assert_close(torch.tensor([row.clean, row.memorized, row.total]), expected)
        cosine = F.cosine_similarity(clean.flatten(), noisy.flatten(), dim=0)
        torch.testing.assert_close(torch.tensor(row.cosine), cosine)
    for column, (group, names) in enumerate(groups.items()):
        norms = single_norms(model, split, names)
        torch.testing.assert_close(account.example_norms[:, column], norms)
        assert_sums_up(account, account.groups[group], names, account.example_norms[:, column], split)
    torch.testing.assert_close(account.total_norms, single_norms(model, split, list(account.parameters)))
    assert_sums_up(account, account.model, list(account.parameters), account.total_norms, split)
    assert torch.equal(account.indices, split.indices)
    assert torch.equal(account.memorized, split.memorized)
    assert account.rows() == [{"group": group, **vars(row)} for group, row in account.groups.items()]


GROUPS = {"0": ["0.weight", "0.bias"], "3": ["3.weight", "3.bias"], "": ["0.weight", "0.bias", "3.weight", "3.bias"]}


@pytest.mark.parametrize(("batch_size", "asked"), [(1, (1, 3, 5, 7, 9)), (4, (1,)), (100, ())])
def test_cosines_are_with_the_clean_gradient_of_the_batches_before(batch_size: int, asked: tuple[int, ...]) -> None:
    model, split = build(), make_split()
    account = account_epoch(model, split, batch_size=batch_size)
    for column, (group, names) in enumerate(GROUPS.items()):
        own = single_gradients(model, split, names)
        expected, clean = torch.full((10,), math.nan), torch.zeros_like(own[0])
        for number, rows in enumerate(torch.arange(10).split(batch_size)):
            if number in asked:
                expected[rows] = F.cosine_similarity(own[rows], clean[None])
            clean += own[rows[~split.memorized[rows]]].sum(0) / len(rows)
        torch.testing.assert_close(account.example_cosines[:, column], expected, equal_nan=True)
        row = account.groups.get(group, account.model)
        told = {kind: expected[(split.memorized == kind) & ~expected.isnan()].numpy() for kind in (False, True)}
        quartiles = (row.memorized_cosine_q25, row.memorized_cosine_q50, row.memorized_cosine_q75)
        if not asked:
            assert {row.memorized_cosine, row.memorized_against, row.clean_against, *quartiles} == {None}
            continue
        assert row.memorized_cosine == pytest.approx(told[True].mean(), rel=1e-4)
        assert quartiles == pytest.approx(np.quantile(told[True], [0.25, 0.5, 0.75]), rel=1e-4)
        assert row.memorized_against == pytest.approx((told[True] < 0).mean())
        assert row.clean_against == pytest.approx((told[False] < 0).mean())


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_the_noise_scale_is_of_the_pooled_variance(batch_size: int) -> None:
    model, split = build(), make_split()
    account = account_epoch(model, split, batch_size=batch_size)
    for group, names in GROUPS.items():
        own, variance, square = single_gradients(model, split, names).double(), 0.0, 0.0
        for rows in own.split(batch_size):
            if len(rows) > 1:
                spread = rows.var(0).sum()
                variance += (len(rows) - 1) * spread
                square += (len(rows) - 1) * (rows.mean(0).square().sum() - spread / len(rows))
        found = account.groups.get(group, account.model).noise_scale
        assert found == (None if batch_size == 1 else pytest.approx(float(variance / square), rel=1e-3))


def assert_sums_up(account: EpochAccount, row, names: list[str], norms: Tensor, split: Split) -> None:
    parameters = [account.parameters[name] for name in names]
    for field in ("clean", "memorized", "total"):
        assert getattr(row, field) == pytest.approx(sum(getattr(parameter, field) for parameter in parameters))
    assert row.cosine == pytest.approx(sum(parameter.cosine for parameter in parameters) / len(names))
    assert row.auc == pytest.approx(roc_auc(norms, split.memorized))
    assert row.clean_example_norm == pytest.approx(norms[~split.memorized].mean().item())
    assert row.memorized_example_norm == pytest.approx(norms[split.memorized].mean().item())


@pytest.mark.parametrize(
    ("noisy", "absent", "present"), [((), "memorized", "clean"), (range(10), "clean", "memorized")]
)
def test_an_empty_kind_counts_nothing_and_never_nan(noisy: tuple[int, ...], absent: str, present: str) -> None:
    account = account_epoch(build(), make_split(noisy=tuple(noisy)), batch_size=4)
    for row in (account.model, *account.groups.values()):
        assert getattr(row, absent) == row.cosine == 0
        assert getattr(row, present) == row.total > 0
        assert row.auc is None
        assert getattr(row, f"{absent}_example_norm") is None
        assert getattr(row, f"{present}_example_norm") > 0
    for row in account.parameters.values():
        assert (getattr(row, absent), row.cosine) == (0, 0)


def test_leaves_the_model_as_it_was() -> None:
    model, split = build().train(), make_split()
    model[1].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model[0].weight.grad = kept = torch.ones_like(model[0].weight)
    with torch.no_grad():
        account_epoch(model, split)
    assert [module.training for module in model.modules()] == [True, True, False, True, True]
    assert model[0].weight.grad is kept
    assert torch.equal(kept, torch.ones_like(kept))
    assert model[3].weight.grad is None
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    broken = nn.Sequential(model, nn.Linear(3, 3))
    with pytest.raises(RuntimeError):
        account_epoch(broken, split)
    assert broken.training
    assert model[0].weight.grad is kept


def test_dropout_is_told_the_examples() -> None:
    split = make_split()
    model = insert_example_tied_dropout(build(), ["1"], p_gen=0.3, p_mem=0.5)
    model.get_submodule("1.dropout_after").mode = "train"
    whole = account_epoch(model, split).example_norms
    part = account_epoch(model, split.subset(torch.tensor([7, 2])))
    assert part.indices.tolist() == split.indices[[2, 7]].tolist()
    torch.testing.assert_close(part.example_norms, whole[[2, 7]])


def test_other_layer_groups_share_out_the_same_norms() -> None:
    model, split = lenet(10, 1, 8), make_split()
    names = [name for name, _ in model.named_parameters()]
    halves = {"first": names[:3], "second": names[3:]}
    account, own = account_epoch(model, split, groups=halves), account_epoch(model, split)
    assert list(account.groups) == ["first", "second"]
    torch.testing.assert_close(account.total_norms, own.total_norms)
    assert account.parameters == own.parameters
    assert account.model.total == pytest.approx(own.model.total)


def test_frozen_parameters_are_left_out() -> None:
    model = build()
    model[0].requires_grad_(False)
    account = account_epoch(model, make_split())
    assert list(account.groups) == ["3"]
    assert list(account.parameters) == ["3.weight", "3.bias"]
    assert model[0].weight.grad is None


def batch_account(split: Split, names: list[str], scale: float) -> SimpleNamespace:
    """What an accountant would return for all examples of a split, each with gradient (1, 1), times ``scale``."""
    share = torch.tensor([(~split.memorized).sum(), split.memorized.sum()]) / len(split)
    clean = 2 * float(share[0])  # its product with the clean gradient of a batch before
    return SimpleNamespace(
        dot={"clean": {name: torch.full((len(split),), clean * scale) for name in names}},
        sqnorm={name: torch.full((len(split),), 2 * scale**2) for name in names},
        group_grad={name: share[:, None].expand(2, 2) * scale for name in names},
    )


def pair() -> nn.ParameterDict:
    return nn.ParameterDict({"a": nn.Parameter(torch.zeros(2)), "b": nn.Parameter(torch.zeros(2))})


@pytest.mark.parametrize("scale", [2.0, torch.tensor(2.0**16)])
def test_the_scale_of_the_loss_is_divided_out(scale: float | Tensor) -> None:
    split = make_split()
    scaled, plain = (
        GradientAccounting(pair(), marked("probe", None, split)),
        GradientAccounting(pair(), marked("probe", None, split)),
    )
    for _ in range(2):
        scaled.add(batch_account(split, ["a"], float(scale)), split.indices, scale)
        plain.add(batch_account(split, ["a"], 1), split.indices)
    assert scaled.result().model == plain.result().model
    assert torch.equal(scaled.result().example_norms, plain.result().example_norms)
    assert scaled.result().model.total == pytest.approx(2)
    assert scaled.result().model.memorized_cosine == pytest.approx(1)
    assert scaled.result().parameters["b"].total == 0  # had no gradient


def test_a_batch_that_overflowed_counts_nothing() -> None:
    split = make_split()
    first, second = split.subset(torch.arange(5)), split.subset(torch.arange(5, 10))
    accounting = GradientAccounting(pair(), marked("probe", None, split))
    accounting.add(batch_account(first, ["a", "b"], 8.0), first.indices, torch.tensor(8.0))
    alone = accounting.result()
    accounting.add(batch_account(second, ["a", "b"], float("inf")), second.indices, torch.tensor(8.0))
    account = accounting.result()
    assert account.parameters == alone.parameters
    assert account.model == alone.model
    assert account.example_norms.isnan().flatten().tolist() == [False] * 5 + [True] * 5
    assert account.example_cosines[5:].isnan().all()
    assert None not in (account.model.clean_example_norm, account.model.memorized_example_norm)


def test_sums_of_tiny_gradients_have_a_cosine() -> None:
    split = make_split()
    accounting = GradientAccounting(pair(), marked("probe", None, split))
    accounting.add(batch_account(split, ["a"], 1e-30), split.indices)
    assert accounting.result().parameters["a"].cosine == pytest.approx(1)
    assert accounting.result().parameters["b"].cosine == 0


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"all": ["a", "b"], "more": ["a"]}, "at most one group, got a in all, more"),
        ({"all": ["a", "b", "c"]}, "parameters of the model, .* got 'c' in 'all'"),
    ],
)
def test_groups_must_be_parts_of_the_model(groups: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientAccounting(pair(), None, groups=groups)


def test_groups_may_leave_parameters_out() -> None:
    model, split = build(), make_split()
    account = account_epoch(model, split, groups={"head": ["3"]})
    assert list(account.groups) == ["head"]
    assert account.groups["head"] == account.model == account_epoch(model, split).groups["3"]


def test_refuses_an_example_of_another_split() -> None:
    split = make_split()
    accounting = GradientAccounting(build(), marked("probe", None, split))
    with pytest.raises(ValueError, match=r"memorized must have a value for each example, got none for number 7$"):
        accounting.kinds(torch.tensor([int(split.indices[0]), 7]))


def test_refuses_what_cannot_be_accounted() -> None:
    split = make_split()
    with pytest.raises(ValueError, match="data must hold at least one example"):
        account_epoch(build(), split.subset(torch.arange(0)))
    with pytest.raises(ValueError, match="must have a parameter that requires a gradient"):
        account_epoch(build().requires_grad_(False), split)


@pytest.mark.cuda
def test_on_cuda() -> None:
    model, split = build(), make_split()
    expected = account_epoch(model, split, batch_size=4)
    with torch.backends.cudnn.flags(allow_tf32=False):
        account = account_epoch(model.cuda(), split.to("cuda"), batch_size=4)
    torch.testing.assert_close(account.example_norms, expected.example_norms)
    for name, row in account.parameters.items():
        torch.testing.assert_close(torch.tensor(astuple(row)), torch.tensor(astuple(expected.parameters[name])))
    assert torch.equal(account.memorized, split.memorized)
