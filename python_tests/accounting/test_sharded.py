"""What `fully_shard` has split over two processes is accounted as a whole model is, or refused."""

import copy
import gc
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accounted import (
    Model,
    account_of,
    assert_all_stable,
    assert_equal,
    by_group,
    grads,
    parameter,
    targets,
    weighted,
    wide,
)
from accuracy import moved
from processes import start_two
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.utils.checkpoint import checkpoint

import memloc_ext
from memloc_ext import GradientAccountant
from memloc_ext.reference.accounting import per_example_gradients, squared_norms

B = 4
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


class Scale(torch.autograd.Function):
    """Not seen by the accountant, as any function of somebody's own."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        return grad * scale, (grad * x).sum(0)


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Tanh(), nn.Linear(3, 3))


def nested() -> nn.Module:
    return Model(lambda m, x: m.block(m.stem(x)), stem=nn.Linear(3, 3), block=block(), unused=nn.Linear(2, 2))


def turned() -> nn.Module:
    """As many tokens as examples, which are not in the first dimension of what the block is given."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        return m.block(m.stem(x).transpose(0, 1)).transpose(0, 1).contiguous()

    return Model(run, stem=nn.Linear(3, 3), block=block())


def checkpointed() -> nn.Module:
    return Model(lambda m, x: checkpoint(m.block, m.stem(x), use_reentrant=False), stem=nn.Linear(3, 3), block=block())


def tied() -> nn.Module:
    model = Model(lambda m, x: m.head(m.block(m.table(x))), table=nn.Embedding(7, 3), block=block())
    model.head = nn.Linear(3, 7)
    model.head.weight = model.table.weight
    return model


def uncovered() -> nn.Module:
    inner = Model(lambda m, x: Scale.apply(x, m.scale), scale=parameter(3))
    return Model(lambda m, x: m.block(m.stem(x)), stem=nn.Linear(3, 3), block=inner)


def sharded(model: nn.Module, **options: bool) -> nn.Module:
    whole, mesh = copy.deepcopy(model), init_device_mesh("cpu", (2,))
    fully_shard(whole.block, mesh=mesh, **options)
    return fully_shard(whole, mesh=mesh, **options)


def full_grads(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.full_tensor() for name, p in model.named_parameters()}


def check(rank: int, model: nn.Module, x: Tensor, **options: bool) -> None:
    mine, target, ids = slice(rank * B, (rank + 1) * B), targets(2 * B), torch.tensor([0, 1, 3, 0])
    off = per_example_gradients(*moved((model, weighted, x, target)))
    exact = per_example_gradients(wide(model), weighted, wide(x), wide(target))
    split = sharded(model, **options)
    for steps in (1, 2):  # gradients add up
        weighted(model(x), target).backward()
        account, warned = account_of(split, weighted, x[mine], target[mine], group_ids=ids, num_groups=4)
        own, exact_own = ({name: g[mine] for name, g in gradients.items()} for gradients in (off, exact))
        assert not warned
        assert_all_stable("squared norm", account.sqnorm, squared_norms(own), squared_norms(exact_own))
        assert_all_stable("group gradients", account.group_grad, by_group(own, ids), by_group(exact_own, ids))
        sums_off, sums = ({name: steps * g.mean(0) for name, g in truth.items()} for truth in (off, exact))
        sums_off = {name: None if g is None else sums_off[name] for name, g in grads(model).items()}
        assert_all_stable("gradient", full_grads(split), sums_off, sums)
    before = full_grads(split)
    norms, _ = account_of(split, weighted, x[mine], target[mine], weight_grads=False)
    assert_all_stable("squared norm alone", norms.sqnorm, squared_norms(own), squared_norms(exact_own))
    assert_equal(full_grads(split), before)
    with GradientAccountant(split) as accountant, pytest.raises(ValueError, match="exact_groups must be False"):
        accountant.backward(weighted(split(x[mine]), target[mine]), group_ids=ids, exact_groups=True)


def refused(rank: int) -> None:
    x = torch.randn(B, 3)
    split = sharded(uncovered())
    with GradientAccountant(split) as accountant, pytest.raises(ValueError, match=r"layers of block\.scale are not"):
        accountant.backward(weighted(split(x), targets(B)))
    y = torch.zeros(B, dtype=torch.int64)
    for probe in (partial(memloc_ext.localize, reference=(x, y)), memloc_ext.ablation_losses):
        with pytest.raises(ValueError, match="model must be whole in every process"):
            probe(split, x, y)
    mesh = init_device_mesh("cpu", (2,))
    flat = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # its __init__ wants a GPU
    nn.Module.__init__(flat)
    with pytest.raises(ValueError, match=r"FullyShardedDataParallel.*use torch\.distributed\.fsdp\.fully_shard"):
        GradientAccountant(nn.Sequential(flat)).__enter__()
    parallel = nn.Linear(3, 2)
    parallel.weight = nn.Parameter(distribute_tensor(parallel.weight.detach(), mesh))
    with pytest.raises(ValueError, match="only a DTensor of weight; tensor parallelism is not supported"):
        GradientAccountant(parallel).__enter__()


def join(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    try:
        for build in (nested, turned, checkpointed, tied):
            torch.manual_seed(0)
            model = build()
            x = torch.randint(7, (2 * B, 5)) if build is tied else torch.randn(2 * B, B, 3)
            check(rank, model, x)
            model.zero_grad()
            check(rank, model, x, reshard_after_forward=False)
        refused(rank)
        dist.barrier()  # a process that leaves early takes the connection from one that still sends
    finally:
        gc.collect()  # a wrapped model that is collected later, without its group, ends the process
        dist.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    start_two(join, str(tmp_path / "store"))
