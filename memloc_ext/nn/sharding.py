"""Models of which each process keeps a part."""

from __future__ import annotations

import sys

from torch import Tensor, nn


def fully_sharded(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that `torch.distributed.fsdp.fully_shard` was called for, by name."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # what nobody has imported, nobody uses
    if fsdp is None:
        return {}
    return {name: module for name, module in model.named_modules() if isinstance(module, fsdp.FSDPModule)}


def flattened(model: nn.Module) -> bool:
    """Return whether a `torch.distributed.fsdp.FullyShardedDataParallel` is in a model."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(m, fsdp.FullyShardedDataParallel) for m in model.modules())


def is_part(t: Tensor) -> bool:
    """Return whether a tensor stands for one of which each process has a part."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def check_whole(model: nn.Module) -> None:
    """Raise ValueError if a process has not all of a model."""
    if flattened(model) or fully_sharded(model) or any(map(is_part, model.parameters())):
        raise ValueError(
            "model must be whole in every process, but it keeps parts of its parameters; load its full state dict into "
            "a model that was not sharded"
        )
