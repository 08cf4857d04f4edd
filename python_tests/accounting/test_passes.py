import contextlib
import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accounted import Model, Uncovered, account_of, assert_same, check, grads, small, sums, total
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memloc_ext import GradientAccountant
from memloc_ext.accounting import Account
from memloc_ext.accounting import accountant as accountant_module

B = 4


# several passes, models and threads


def test_two_accountants_at_once() -> None:
    student, teacher, x = small(), small(), torch.randn(B, 3)
    student[0].weight.data.mul_(2)
    with GradientAccountant(student) as first, GradientAccountant(teacher) as second:
        with torch.no_grad():
            truth = teacher(x)
        account = sums(first, (student(x) - truth).square().sum())
        other = sums(second, total(teacher, x))
    with GradientAccountant(student) as accountant:
        assert_same(account, sums(accountant, (student(x) - truth).square().sum()))
    with GradientAccountant(teacher) as accountant:
        assert_same(other, sums(accountant, total(teacher, x)))


def test_two_accountants_of_two_parts_of_one_loss() -> None:
    first, second, x = nn.Linear(3, 4), nn.Linear(4, 2), torch.randn(B, 3)
    both = nn.Sequential(first, second)
    with GradientAccountant(first) as a, GradientAccountant(second) as b:
        loss = total(both, x)
        parts = {f"0.{k}": v for k, v in sums(a, loss, retain_graph=True).sqnorm.items()}
        parts |= {f"1.{k}": v for k, v in sums(b, loss).sqnorm.items()}
    with GradientAccountant(both) as accountant:
        assert_same(Account(parts, {}), sums(accountant, total(both, x)))


def test_sum_of_losses_and_a_retained_graph() -> None:
    torch.manual_seed(0)
    model, x, y = small(), torch.randn(B, 3), torch.randn(B, 3)
    check(Model(lambda m, x, y: torch.stack([m.f(x), m.f(y)], 1), f=model), (x, y))
    with GradientAccountant(model) as accountant:
        loss = total(model, x) + total(model, y)
        first = sums(accountant, loss, retain_graph=True)
        assert_same(first, sums(accountant, loss))


def test_a_pass_without_gradients_between_forward_and_backward() -> None:
    model, x = small(), torch.randn(B, 3)
    with GradientAccountant(model) as accountant:
        loss = total(model, x)
        with torch.no_grad():
            model(torch.randn(B + 1, 3))
        account = sums(accountant, loss)
    with GradientAccountant(model) as accountant:
        assert_same(account, sums(accountant, total(model, x)))


@pytest.mark.parametrize("layer", ["covered", "uncovered"])
@pytest.mark.filterwarnings("ignore:GradientAccountant")
def test_two_forward_then_two_backward_passes(layer: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), Uncovered() if layer == "uncovered" else nn.ReLU())
    inputs = torch.randn(B, 3), torch.randn(B, 3)
    with GradientAccountant(model) as accountant:
        losses = [model(x).square().sum() for x in inputs]
        together = [accountant.backward(loss, loss_reduction="sum") for loss in losses]
        for x, account in zip(inputs, together, strict=True):
            alone = accountant.backward(model(x).square().sum(), loss_reduction="sum")
            for name, norm in alone.sqnorm.items():
                torch.testing.assert_close(account.sqnorm[name], norm)


# Right or refused.
@pytest.mark.parametrize("how", ["an earlier with", "an inner accountant", "an accountant of a part"])
def test_layers_that_ran_in_another_with(how: str) -> None:
    torch.manual_seed(0)
    model, x, ids = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), torch.randn(B, 3), torch.tensor([0, 1, 1, 0])
    outer = GradientAccountant(model)
    inner = {"an inner accountant": GradientAccountant(model), "an accountant of a part": GradientAccountant(model[1])}
    with contextlib.ExitStack() as stack:
        if how == "an earlier with":
            with outer:
                loss = model(x).square().sum()
            stack.enter_context(outer)
        else:
            stack.enter_context(outer)
            stack.enter_context(inner[how])
            loss = model(x).square().sum()
        try:
            account = outer.backward(loss, loss_reduction="sum", group_ids=ids)
        except ValueError as error:
            assert str(error).startswith("GradientAccountant")  # noqa: PT017
            return
    assert account.sqnorm["1.weight"].all(), "zeros"


def test_threads_share_an_accountant() -> None:
    model, inputs = small(), [torch.randn(B, 3) * i for i in range(4)]
    accountant, results = GradientAccountant(model), {}

    def work(i: int) -> None:
        for _ in range(10):
            with accountant:
                results[i] = sums(accountant, total(model, inputs[i]), weight_grads=False)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, x in enumerate(inputs):
        with accountant:
            assert_same(results[i], sums(accountant, total(model, x), weight_grads=False))
    assert not model._forward_hooks


def in_a_thread(run: Callable[[], Any]) -> Any:
    """Return what a function returns in another thread."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(run()))
    thread.start()
    thread.join()
    assert found, "raised"
    return found[0]


def test_the_model_is_recomputed_in_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on autograd's own thread for CUDA: there, what is traced must be traced again."""
    run = accountant_module._run
    model, x = small(), torch.randn(B, 3, requires_grad=True)
    with GradientAccountant(model) as plain:
        expected = sums(plain, total(model, x))
    exact = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for _ in range(2):
        model.zero_grad()
        with GradientAccountant(model, check="never") as accountant, monkeypatch.context() as patch:
            patch.setattr(accountant_module, "_run", lambda *arguments: in_a_thread(lambda: run(*arguments)))
            loss = checkpoint(model, x, use_reentrant=False).square().sum()
            assert_same(sums(accountant, loss), expected)
        torch.testing.assert_close({name: p.grad for name, p in model.named_parameters()}, exact)
    model.zero_grad()
    with GradientAccountant(model):
        loss = checkpoint(model, x, use_reentrant=False).square().sum()
        in_a_thread(loss.backward)
    torch.testing.assert_close({name: p.grad for name, p in model.named_parameters()}, exact)


def test_a_backward_pass_of_another_thread_stays_apart() -> None:
    """It recomputes the same model on other inputs while an accountant is open here."""
    model, x, other = small(), torch.randn(B, 3), torch.randn(2 * B, 3, requires_grad=True)
    with GradientAccountant(model) as plain:
        expected = sums(plain, total(model, x), weight_grads=False)
    aside = checkpoint(model, other, use_reentrant=False).square().sum()
    exact = torch.autograd.grad(total(model, other), other)[0]
    with GradientAccountant(model) as accountant:
        loss = total(model, x)
        (found,) = in_a_thread(lambda: torch.autograd.grad(aside, other))
        assert_same(sums(accountant, loss, weight_grads=False), expected)
    torch.testing.assert_close(found, exact)


# what is left behind


def test_nothing_is_left_behind() -> None:
    model, x = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), Uncovered(), nn.Linear(5, 2)), torch.randn(B, 3)
    model[0].bias.requires_grad_(False)
    plain = copy.deepcopy(model)
    total(plain, x).backward()
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    account, _ = account_of(model, lambda output, _: output.square().sum(), x, x, loss_reduction="sum")
    assert model[0].bias.grad is None
    assert "0.bias" not in account.sqnorm
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert p.requires_grad == q.requires_grad
        torch.testing.assert_close(p.grad, q.grad, msg=name)
        assert not p._backward_hooks
    for name, module in model.named_modules():
        assert set(vars(module)) == attributes[name]
        assert not module._forward_hooks
        assert not module._backward_hooks
    assert torch.overrides._len_torch_function_stack() == 0
    assert torch.equal(model.eval()(x), plain.eval()(x))


# An optimizer may step in such a hook.
@pytest.mark.filterwarnings("ignore:GradientAccountant")
def test_hooks_after_accumulation_without_weight_gradients() -> None:
    model, calls = nn.Sequential(nn.Linear(3, 2), Uncovered()), []
    model[1].weight.register_post_accumulate_grad_hook(calls.append)
    with GradientAccountant(model) as accountant:
        accountant.backward(model(torch.randn(B, 3)).square().sum(), loss_reduction="sum", weight_grads=False)
    assert not calls


def test_an_exception_inside_leaves_nothing_behind() -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            raise KeyError("broken")

    model, x = small(), torch.randn(B, 3)
    accountant = GradientAccountant(model)
    with contextlib.suppress(KeyError), accountant:
        model(x)
        raise KeyError
    assert not model._forward_hooks
    assert torch.overrides._len_torch_function_stack() == 0
    with accountant:
        with pytest.raises(KeyError, match="broken"):
            sums(accountant, Broken.apply(model(x)).sum(), weight_grads=False)
        assert all(p.grad is None for p in model.parameters())
        assert len(sums(accountant, total(model, torch.randn(7, 3))).sqnorm["0.weight"]) == 7


@pytest.mark.parametrize("finished", [True, False])
def test_activations_and_model_are_freed(finished: bool) -> None:
    model, x = small(), torch.randn(B, 3)
    accountant = GradientAccountant(model)
    gc.collect()
    gc.disable()
    try:
        with accountant:
            output = model(x)
            alive = weakref.ref(output)
            if finished:
                sums(accountant, output.sum())
                del output
                assert alive() is None
        output = None
        assert alive() is None
        weight = weakref.ref(model[0].weight)
        del model, accountant
        assert weight() is None
    finally:
        gc.enable()


def test_inputs_that_require_grad_and_adding_up() -> None:
    torch.manual_seed(0)
    model, x = small(), torch.randn(B, 3, requires_grad=True)
    total(model, x).backward()
    plain, plain_x = grads(model), x.grad
    model.zero_grad()
    x.grad = None
    with GradientAccountant(model) as accountant:
        sums(accountant, total(model, x), weight_grads=False)
        assert all(p.grad is None for p in model.parameters())
        torch.testing.assert_close(x.grad, plain_x)
        for times in (1, 2):
            sums(accountant, total(model, x))
            for name, p in model.named_parameters():
                torch.testing.assert_close(p.grad, times * plain[name])


def test_a_plain_backward_pass_inside_is_as_ever() -> None:
    model, x = small(), torch.randn(B, 3, requires_grad=True)
    total(model, x).backward()
    plain = grads(model)
    model.zero_grad()
    with GradientAccountant(model):
        total(model, x).backward()
        assert not [name for name, g in grads(model).items() if not torch.allclose(g, plain[name])]
        (grad,) = torch.autograd.grad(total(model, x), [x])
    (expected,) = torch.autograd.grad(total(model, x), [x])
    torch.testing.assert_close(grad, expected)


def test_an_optimizer_inside() -> None:
    torch.manual_seed(0)
    for batch in (1, B):
        models = [small(), small()]
        x = torch.randn(batch, 3)
        for model, accounted in zip(models, (True, False), strict=True):
            optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
            accountant = GradientAccountant(model)
            for _ in range(3):
                if accounted:
                    with accountant:
                        sums(accountant, total(model, x))
                        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                        optimizer.step()
                        optimizer.zero_grad()
                else:
                    total(model, x).backward()
                    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_a_parameter_that_is_unfrozen_inside() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model[1].requires_grad_(False)
    with GradientAccountant(model) as accountant:
        model[1].requires_grad_(True)
        account = accountant.backward(model(torch.randn(B, 3)).square().sum(), loss_reduction="sum")
    assert account.sqnorm["1.weight"].all()


def test_two_forward_passes_of_which_one_was_accounted_before() -> None:
    torch.manual_seed(0)
    model, (a, b, c) = nn.Linear(3, 2), torch.randn(3, B, 3)
    with GradientAccountant(model) as accountant:
        first, second = total(model, a), total(model, b)
        sums(accountant, first)
        account = sums(accountant, second + total(model, c))
    with GradientAccountant(model) as accountant:
        assert_same(account, sums(accountant, total(model, b) + total(model, c)))


def test_an_account_of_a_tied_table_takes_no_part_in_autograd() -> None:
    table = nn.Embedding(5, 3)
    model = Model(lambda m, x: nn.functional.linear(m.e(x).tanh(), m.e.weight), e=table)
    with GradientAccountant(model) as accountant:
        account = sums(accountant, total(model, torch.randint(5, (B, 4))))
    assert not account.sqnorm["e.weight"].requires_grad


def test_outputs_that_no_loss_used_are_forgotten() -> None:
    model = Model(lambda m, x: (m.a(x), m.b(x)), a=nn.Linear(3, 2), b=nn.Linear(3, 2))
    with GradientAccountant(model) as accountant:
        used, unused = model(torch.randn(B, 3))
        node = weakref.ref(unused)
        sums(accountant, used.square().sum())
        del used, unused
        gc.collect()
        assert node() is None
