import warnings
from collections.abc import Callable

import pytest
import torch
from accounted import Model, parameter, targets
from torch import Tensor, nn

from memloc_ext import GradientAccountant
from memloc_ext.accounting import Account

B = 4
X, IDS = torch.randn(B, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2, 0, 1])


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))


def account(losses_to_loss, **arguments) -> tuple[Account, nn.Module]:
    net = model()
    with GradientAccountant(net) as accountant:
        losses = net(X).square().sum(1) * targets(B)
        result = accountant.backward(losses_to_loss(losses), **arguments)
    return result, net


def test_reductions_differ_in_group_gradients_only() -> None:
    ways = {"mean": Tensor.mean, "sum": Tensor.sum, "none": lambda losses: losses}
    results = {name: account(way, loss_reduction=name, group_ids=IDS, num_groups=4) for name, way in ways.items()}
    for name, (result, net) in results.items():
        scale = B if name == "mean" else 1
        for key, p in net.named_parameters():
            torch.testing.assert_close(result.sqnorm[key], results["none"][0].sqnorm[key])
            torch.testing.assert_close(result.group_grad[key] * scale, results["none"][0].group_grad[key])
            torch.testing.assert_close(result.group_grad[key].sum(0), p.grad)
            assert not result.group_grad[key][3].any()


def test_a_none_loss_may_have_more_dimensions() -> None:
    net, x = model(), torch.randn(B, 7, 3)
    with GradientAccountant(net) as accountant:
        a = accountant.backward(net(x).square(), loss_reduction="none")
        b = accountant.backward(net(x).square().sum(), loss_reduction="sum")
    for name, norm in a.sqnorm.items():
        torch.testing.assert_close(norm, b.sqnorm[name])


def test_batch_size_and_num_groups_by_default() -> None:
    result, _ = account(Tensor.mean, group_ids=IDS)
    assert result.group_grad["0.weight"].shape == (3, 5, 3)
    net, x = model(), torch.randn(B * 2, 3)
    with GradientAccountant(net) as accountant:  # flattened [batch * 2, 3]
        result = accountant.backward(net(x).sum(), loss_reduction="sum", batch_size=B)
    (expected,) = torch.autograd.grad(net(x[:2]).sum(), [net[0].weight])
    assert result.sqnorm["0.weight"].shape == (B,)
    torch.testing.assert_close(result.sqnorm["0.weight"][0], expected.square().sum())


def test_the_last_smaller_batch() -> None:
    net = model()
    with GradientAccountant(net) as accountant:
        for batch in (B, 3, 1):
            result = accountant.backward(net(X[:batch]).square().sum(), loss_reduction="sum")
            assert result.sqnorm["0.bias"].shape == (batch,)


@pytest.mark.parametrize("before", ["without gradient", "plain backward"])
def test_a_smaller_batch_before(before: str) -> None:
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    with GradientAccountant(net) as accountant:
        if before == "plain backward":
            net(torch.randn(4, 3)).sum().backward()
        else:
            with torch.no_grad():
                net(torch.randn(4, 3))
        result = accountant.backward(net(torch.randn(8, 3)).square().sum(), loss_reduction="sum")
    assert result.sqnorm["weight"].shape == (8,)


def test_parameters_that_the_loss_does_not_depend_on_have_zeros() -> None:
    net = model()
    with GradientAccountant(net) as accountant:
        result = accountant.backward(net[0](X).sum(), loss_reduction="sum", group_ids=IDS)
    assert result.sqnorm["0.weight"].all()
    for name in ("2.weight", "2.bias"):
        assert torch.equal(result.sqnorm[name], torch.zeros(B))
        assert not result.group_grad[name].any()
    assert net[2].weight.grad is None


def test_norms_over_all_parameters() -> None:
    net = model()
    with GradientAccountant(net) as accountant:
        account = accountant.backward(net(X).square().mean())
    expected = torch.stack(list(account.sqnorm.values())).sum(0)
    torch.testing.assert_close(account.total_sqnorm, expected)
    torch.testing.assert_close(account.norms, expected.sqrt())


@pytest.mark.parametrize("call", [torch.Tensor.backward, torch.autograd.backward])
def test_a_plain_backward_pass_is_told_of(call: Callable[[torch.Tensor], None]) -> None:
    net = model()
    accountant = GradientAccountant(net)
    with pytest.warns(UserWarning, match=r"accountant\.backward"), accountant:
        call(net(X).mean())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with accountant:  # one is accounted too
            accountant.backward(net(X).square().mean())
            call(net(X).mean())


def test_results_take_no_part_in_autograd() -> None:
    result, _ = account(Tensor.mean, group_ids=IDS)
    assert not any(t.requires_grad for t in (*result.sqnorm.values(), *result.group_grad.values()))
    assert account(Tensor.mean, group_ids=IDS, weight_grads=False)[0].group_grad == {}
    assert account(Tensor.mean)[0].group_grad == {}


@pytest.mark.parametrize("net", [nn.Linear(3, 2), Model(lambda m, x: x + m.row, row=parameter(3))])
def test_an_account_does_not_change_with_the_gradients(net: nn.Module) -> None:
    net.zero_grad()
    ids = torch.zeros(B, dtype=torch.int64)
    with GradientAccountant(net) as accountant:
        result = accountant.backward(net(torch.randn(B, 3)).square().sum(), loss_reduction="sum", group_ids=ids)
        before = {name: group.clone() for name, group in result.group_grad.items()}
        accountant.backward(net(torch.randn(B, 3)).square().sum(), loss_reduction="sum", group_ids=ids)
    for name, group in result.group_grad.items():
        assert torch.equal(group, before[name]), name


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"loss_reduction": "max"}, ValueError, "loss_reduction must be mean, sum or none, got 'max'"),
        ({"loss_reduction": "none"}, ValueError, r"one loss per example, \[batch, \*\],"),
        ({"group_ids": IDS.int()}, TypeError, "group_ids must have dtype int64, got torch.int32"),
        ({"group_ids": IDS[:, None]}, ValueError, r"group_ids must be \[4\] on cpu, got \[4, 1\]"),
        ({"group_ids": IDS, "num_groups": 2}, ValueError, r"group_ids must be in \[0, 2\), got 2"),
        ({"group_ids": IDS - 1}, ValueError, r"group_ids must be in \[0, 2\), got -1"),
        ({"group_ids": IDS * 0, "num_groups": 0}, ValueError, "num_groups must be at least 1, got 0"),
        ({"num_groups": 2}, ValueError, "num_groups needs group_ids"),
        ({"exact_groups": True}, ValueError, "exact_groups needs group_ids"),
        ({"group_ids": IDS, "batch_size": 3}, ValueError, "sizes of the batch must agree"),
        ({"batch_size": 3}, ValueError, "batch_size|a row per example"),
        ({"batch_size": -1}, ValueError, "batch_size|examples"),
        ({"batch_size": 0}, ValueError, "batch_size|examples"),
    ],
)
def test_refused(arguments: dict, error: type[Exception], message: str) -> None:
    net = model()
    with GradientAccountant(net) as accountant, pytest.raises(error, match=message):
        accountant.backward(net(X).mean(), **arguments)


def test_refused_losses_and_models() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        GradientAccountant(model)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="batch_dim must be at least 0, got -1"):
        GradientAccountant(model(), batch_dim=-1)
    net = model()
    accountant = GradientAccountant(net)
    with pytest.raises(RuntimeError, match="must be called inside the with"):
        accountant.backward(net(X).mean())
    with accountant:
        with pytest.raises(ValueError, match="loss must be a tensor that depends"):
            accountant.backward(net(X).mean().detach())
        with pytest.raises(ValueError, match="loss must be a scalar"):
            accountant.backward(net(X).mean(1))
    outside = net(X).mean()
    with accountant, pytest.raises(ValueError, match="inside the with"):
        accountant.backward(outside)
    with accountant, pytest.raises(ValueError, match="inside the with"):
        accountant.backward(outside, group_ids=IDS)
    assert all(p.grad is None for p in net.parameters())
