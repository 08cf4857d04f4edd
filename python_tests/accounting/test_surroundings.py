import copy
import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accounted import (
    Model,
    Uncovered,
    account_of,
    assert_same,
    check,
    grads,
    parameter,
    small,
    sums,
    targets,
    total,
    weighted,
    wide,
)
from accuracy import assert_stable, moved
from processes import start_two
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from memloc_ext import GradientAccountant, Projection
from memloc_ext.reference.accounting import per_example_gradients, squared_norms

B = 4


# autocast


@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast(backward_inside: bool) -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.PReLU(4), nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4)
    head = nn.Linear(36, 8), nn.LayerNorm(8), nn.RMSNorm(8, eps=1e-5), nn.Linear(8, 3)
    model, x, y = nn.Sequential(*layers, nn.Flatten(), *head).eval(), torch.randn(B, 2, 5, 5), targets(B)

    def cast(model: nn.Module) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return model(x)

        return run

    off = per_example_gradients(*moved((model, weighted, x, y), torch.bfloat16))
    exact = per_example_gradients(wide(model), weighted, x.double(), y.double())
    with GradientAccountant(model) as accountant:
        output = cast(model)(x)
        assert output.dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16, enabled=backward_inside):
            account = accountant.backward(weighted(output.float(), y), group_ids=torch.tensor([0, 1, 0, 1]))
    for name, p in model.named_parameters():
        assert account.sqnorm[name].dtype == account.group_grad[name].dtype == torch.float32
        norms_off, exact_norms = squared_norms(off)[name], squared_norms(exact)[name]
        assert_stable(account.sqnorm[name].bfloat16(), norms_off, exact_norms)
        assert p.grad is not None
        assert_stable(p.grad.bfloat16(), off[name].mean(0), exact[name].mean(0))


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

    block = nn.Sequential(nn.Linear(3, 3), Uncovered(3))
    model = Model(run, stem=nn.Linear(3, 3), block=block, head=nn.Linear(3, 2))
    check(model, torch.randn(B, 3), uncovered={"block.1.weight"})


# Right or refused.
def test_an_uncovered_parameter_under_reentrant_checkpointing() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(3, 3), Uncovered(3))
    model = Model(lambda m, x: checkpoint(m.block, m.stem(x), use_reentrant=True), stem=nn.Linear(3, 3), block=block)
    try:
        account, warned = account_of(model, weighted, torch.randn(B, 3), targets(B), weight_grads=False)
    except (ValueError, RuntimeError):
        return
    assert all(grad is None for grad in grads(model).values()), "a gradient was written"
    assert warned == {"block.1.weight"}
    assert account.sqnorm["block.1.weight"].all(), "zeros"


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


# copies


def test_a_model_that_holds_its_accountant_is_copied_with_it() -> None:
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small()
            self.accountant = GradientAccountant(self.inner)

    held, x = Held(), torch.randn(B, 3)
    with held.accountant:
        twin = copy.deepcopy(held)
        expected = sums(held.accountant, total(held.inner, x))
    with pytest.raises(RuntimeError, match="inside the with"):
        twin.accountant.backward(total(twin.inner, x))
    with twin.accountant as accountant:
        account = sums(accountant, total(twin.inner, x))
    for name, norm in expected.sqnorm.items():
        assert torch.equal(account.sqnorm[name], norm)


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


def test_an_accountant_inside_of_what_is_compiled_is_an_error_and_leaves_nothing_behind() -> None:
    torch._dynamo.reset()
    model, x = small(), torch.randn(B, 3)

    def step(x: Tensor) -> None:
        with GradientAccountant(model) as accountant:
            sums(accountant, total(model, x))

    with pytest.raises(RuntimeError, match=r"open it outside of what torch\.compile compiles"):
        torch.compile(step, backend="eager")(x)
    with GradientAccountant(model) as accountant:
        account = sums(accountant, total(torch.compile(model, backend="eager"), x))
    assert all(norm.all() for norm in account.sqnorm.values())
    torch._dynamo.reset()


# DistributedDataParallel


def _in_group(rank: int, world: int, store: str, check_: Callable[[int], None]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    try:
        check_(rank)
        dist.barrier()  # a process that leaves early takes the connection from one that still sends
    finally:
        gc.collect()  # a wrapped model that is collected later, without its group, ends the process
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
    bound, direction = 3.0, {f"module.{n}": torch.ones_like(p) for n, p in plain.named_parameters()}
    factors = (bound / sum(squared_norms(exact).values()).sqrt()).clamp(max=1)
    assert (factors < 1).any()
    model.zero_grad()
    with GradientAccountant(model) as accountant:
        part = slice(rank * B, (rank + 1) * B)
        account = accountant.backward(
            weighted(model(mine), targets(world * B)[part]),
            max_norm=bound,
            directions={"ones": direction},
            project=Projection(2, 0),
        )
    with GradientAccountant(plain, check="never") as accountant:
        bare = accountant.backward(weighted(plain(mine), targets(world * B)[part]), project=Projection(2, 0))
    for name, t in bare.projected.items():
        torch.testing.assert_close(account.projected[f"module.{name}"], t)
    for name in exact:
        clipped = torch.tensordot(factors, exact[name], 1) / len(x)
        torch.testing.assert_close(model.get_parameter(f"module.{name}").grad, clipped)
        own = exact[name][part].reshape(B, -1).sum(1)
        torch.testing.assert_close(account.dot["ones"][f"module.{name}"], own)
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


def _alone(rank: int) -> None:
    passes: list[Tensor] = []
    body = nn.Sequential(nn.Linear(3, 4), Uncovered(), nn.Linear(4, 2))
    model, x = DistributedDataParallel(body), torch.randn(B, 3)
    with GradientAccountant(model, check="never") as accountant:
        output = model(x)
        output.register_hook(passes.append)
        with pytest.warns(UserWarning, match="not covered"):
            account = accountant.backward(weighted(output, targets(B)))
    exact = squared_norms(per_example_gradients(body, weighted, x, targets(B)))
    torch.testing.assert_close({name.removeprefix("module."): n for name, n in account.sqnorm.items()}, exact)
    assert len(passes) <= 2  # and not one through the whole batch for each example


def test_examples_run_alone_in_a_distributed_process(tmp_path: Path) -> None:
    _in_group(0, 1, str(tmp_path / "store"), _alone)


def test_one_distributed_process(tmp_path: Path) -> None:
    _in_group(0, 1, str(tmp_path / "store"), _distributed)


def _join(rank: int, store: str) -> None:
    _in_group(rank, 2, store, _distributed)


def test_two_distributed_processes(tmp_path: Path) -> None:
    start_two(_join, str(tmp_path / "store"))
