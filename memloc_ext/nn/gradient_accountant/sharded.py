"""Models that keep a part of each parameter: while a module of them runs, it has the whole ones in their place."""

from __future__ import annotations

import sys
from collections.abc import Collection

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from memloc_ext.nn.gradient_accountant.session import Session


def fully_sharded(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that `torch.distributed.fsdp.fully_shard` was called for, by name.

    Raises:
        ValueError: If the model keeps parts of its parameters in another way.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # what nobody has imported, nobody uses
    modules = dict(model.named_modules())
    if fsdp is not None and any(isinstance(module, fsdp.FullyShardedDataParallel) for module in modules.values()):
        raise ValueError(
            "GradientAccountant: model must not contain FullyShardedDataParallel, which makes one tensor of many "
            "parameters; use torch.distributed.fsdp.fully_shard"
        )
    found = {name: m for name, m in modules.items() if fsdp is not None and isinstance(m, fsdp.FSDPModule)}
    outside = [name for name, p in model.named_parameters() if _is_part(p) and not _inside(name, found)]
    _refuse_parts(outside)
    return found


def watch(session: Session, name: str, module: nn.Module, others: Collection[str]) -> RemovableHandle:
    """Have the session told of the parameters that a fully sharded module runs with.

    Args:
        session: To be told.
        name: Of the module in the model.
        module: Its own hook gathers its parameters before this one is called.
        others: Names of all fully sharded modules; each gathers what is in it and in no smaller one.
    """
    prefix = f"{name}." if name else ""
    smaller = [other.removeprefix(prefix) for other in others if other != name and other.startswith(prefix)]
    own = [parameter for parameter, _ in module.named_parameters() if not _inside(parameter, smaller)]

    def gathered(module: nn.Module, _: object) -> None:
        whole = {prefix + parameter: module.get_parameter(parameter) for parameter in own}
        _refuse_parts([parameter for parameter, t in whole.items() if _is_part(t)])
        session.use_whole(whole)

    return module.register_forward_pre_hook(gathered)


def _refuse_parts(names: list[str]) -> None:
    if names:
        raise ValueError(
            "GradientAccountant: layers must run with whole parameters, as those of fully_shard do, but there is only "
            f"a DTensor of {', '.join(names)}; tensor parallelism is not supported"
        )


def _inside(name: str, modules: Collection[str]) -> bool:
    return any(not module or name.startswith(f"{module}.") for module in modules)


def _is_part(t: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)
