import contextlib
import copy
import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accounting import Model, account_of, assert_as_accurate, check, grads, parameter, targets, weighted, wide
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from memloc_ext import GradientAccountant
from memloc_ext.nn.gradient_accountant import Account
from memloc_ext.reference.gradient_accountant import per_example_gradients, squared_norms

B = 4


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 2))


def total(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum()


def sums(accountant: GradientAccountant, loss: Tensor, **arguments) -> Account:
    return accountant.backward(loss, loss_reduction="sum", **arguments)


def assert_same(a: Account, b: Account) -> None:
    assert a.sqnorm.keys() == b.sqnorm.keys()
    for name, norm in a.sqnorm.items():
        torch.testing.assert_close(norm, b.sqnorm[name])


# autocast


@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast(backward_inside: bool) -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4)
    head = nn.Linear(36, 8), nn.LayerNorm(8), nn.RMSNorm(8, eps=1e-5), nn.Linear(8, 3)
    model, x, y = nn.Sequential(*layers, nn.Flatten(), *head).eval(), torch.randn(B, 2, 5, 5), targets(B)

    def cast(model: nn.Module) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return model(x)

        return run

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return cast(self.inner)(x).float()

    eager = per_example_gradients(Cast(), weighted, x, y)
    exact = per_example_gradients(wide(model), weighted, x.double(), y.double())
    plain = copy.deepcopy(model)
    weighted(cast(plain)(x).float(), y).backward()
    with GradientAccountant(model) as accountant:
        output = cast(model)(x)
        assert output.dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16, enabled=backward_inside):
            account = accountant.backward(weighted(output.float(), y), group_ids=torch.tensor([0, 1, 0, 1]))
    for name, p in model.named_parameters():
        assert account.sqnorm[name].dtype == account.group_grad[name].dtype == torch.float32
        exact_norms, eager_norms = squared_norms({"": exact[name]})[""], squared_norms({"": eager[f"inner.{name}"]})[""]
        assert_as_accurate(account.sqnorm[name].bfloat16(), eager_norms, exact_norms)
        assert p.grad is not None
        plain_grad = grads(plain)[name]
        assert plain_grad is not None
        assert_as_accurate(p.grad.bfloat16(), plain_grad, exact[name].mean(0))


# gradient checkpointing


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    torch.manual_seed(0)

    def block(m: nn.Module, x: Tensor) -> Tensor:
        return m.norm(m.dropout(m.linear(x + m.position + m.table(torch.arange(5)))).relu())

    def checkpointed(m: nn.Module, x: Tensor) -> Tensor:
        return m.head(checkpoint(block, m, m.stem(x), use_reentrant=reentrant))

    model = Model(
        checkpointed,
        stem=nn.Linear(3, 3),
        position=parameter(5, 3),
        table=nn.Embedding(5, 3),
        linear=nn.Linear(3, 3),
        dropout=nn.Dropout(0.4),
        norm=nn.LayerNorm(3),
        head=nn.Linear(3, 2),
    )
    plain = copy.deepcopy(model)
    plain.function = lambda m, x: m.head(block(m, m.stem(x)))
    x, ids = torch.randn(B, 5, 3), torch.tensor([0, 1, 1, 0])
    torch.manual_seed(1)
    expected, _ = account_of(plain, weighted, x, targets(B), group_ids=ids)
    torch.manual_seed(1)
    account, warned = account_of(model, weighted, x, targets(B), group_ids=ids)
    assert not warned
    assert_same(account, expected)
    for name, p in plain.named_parameters():
        torch.testing.assert_close(account.group_grad[name], expected.group_grad[name])
        torch.testing.assert_close(grads(model)[name], p.grad)


def test_a_parameter_that_is_not_covered_under_checkpointing() -> None:
    torch.manual_seed(0)

    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m.head(checkpoint(m.block, m.stem(x), use_reentrant=False))

    block = nn.Sequential(nn.Linear(3, 3), nn.PReLU(3))
    model = Model(run, stem=nn.Linear(3, 3), block=block, head=nn.Linear(3, 2))
    check(model, torch.randn(B, 3), uncovered={"block.1.weight"})


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("settings", [{}, {"momentum": None}, {"track_running_stats": False}, {"affine": False}])
def test_running_statistics_are_those_of_plain_training(settings: dict, reentrant: bool | None) -> None:
    torch.manual_seed(0)

    def run(m: nn.Module, x: Tensor) -> Tensor:
        h = m.stem(x)
        return m.head(m.norm(h) if reentrant is None else checkpoint(m.norm, h, use_reentrant=reentrant))

    model = Model(run, stem=nn.Linear(3, 3), norm=nn.BatchNorm1d(3, **settings), head=nn.Linear(3, 2))
    plain = copy.deepcopy(model)
    for _ in range(2):
        x = torch.randn(B, 3)
        total(plain, x).backward()
        with GradientAccountant(model) as accountant:
            sums(accountant, total(model, x))
    for name, buffer in plain.named_buffers():
        assert torch.equal(dict(model.named_buffers())[name], buffer), name
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


# torch.compile


def test_compiled_models_are_compiled_as_before_outside() -> None:
    torch._dynamo.reset()
    compilations = 0

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable:
        nonlocal compilations
        compilations += 1
        return graph.forward

    model, x = torch.compile(small(), backend=backend), torch.randn(B, 3)
    total(model, x).backward()
    model.zero_grad()
    before = compilations
    with GradientAccountant(model) as accountant:
        account = sums(accountant, total(model, x))
    assert compilations == before
    plain = small()
    with GradientAccountant(plain) as accountant:
        expected = sums(accountant, total(plain, x))
    for name, norm in expected.sqnorm.items():
        assert torch.equal(account.sqnorm[f"_orig_mod.{name}"], norm)
    model(x)
    total(model, x).backward()
    assert compilations == before
    torch._dynamo.reset()


# DistributedDataParallel


def _in_group(rank: int, world: int, store: str, check_: Callable[[int], None]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    try:
        check_(rank)
    finally:
        dist.destroy_process_group()


def _distributed(rank: int) -> None:
    world = dist.get_world_size()
    model = DistributedDataParallel(small())
    plain, x = small(), torch.randn(world * B, 3, generator=torch.Generator().manual_seed(1))
    mine, ids = x[rank * B : (rank + 1) * B], torch.tensor([0, 1, 1, 0])
    for _ in range(2):  # gradients add up
        weighted(plain(x), targets(world * B)).backward()
        with GradientAccountant(model) as accountant:
            account = accountant.backward(
                weighted(model(mine), targets(world * B)[rank * B : (rank + 1) * B]), group_ids=ids
            )
    exact = per_example_gradients(plain, weighted, x, targets(world * B))
    for name, p in plain.named_parameters():
        torch.testing.assert_close(grads(model)[f"module.{name}"], p.grad)
        own = exact[name][rank * B : (rank + 1) * B]
        torch.testing.assert_close(account.sqnorm[f"module.{name}"], squared_norms({"": own})[""])
        torch.testing.assert_close(account.group_grad[f"module.{name}"].sum(0), own.mean(0))
    before = grads(model)
    with GradientAccountant(model) as accountant:
        for wrong in ({"weight_grads": False}, {"exact_groups": True, "group_ids": ids}):
            with pytest.raises(ValueError, match=r"no_sync"):
                accountant.backward(total(model, mine), loss_reduction="sum", **wrong)
        with model.no_sync():
            sums(accountant, total(model, mine), weight_grads=False)
    after = grads(model)
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0)


def test_one_distributed_process(tmp_path: Path) -> None:
    _in_group(0, 1, str(tmp_path / "store"), _distributed)


def _join(rank: int, store: str) -> None:
    _in_group(rank, 2, store, _distributed)


def test_two_distributed_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_join, (str(tmp_path / "store"),), nprocs=2)


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


# what is left behind


def test_nothing_is_left_behind() -> None:
    model, x = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.PReLU(), nn.Linear(5, 2)), torch.randn(B, 3)
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
