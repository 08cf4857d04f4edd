"""Models that keep a part of each parameter: while a module of them runs, it has the whole ones in their place."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from torch.utils.hooks import RemovableHandle

from memloc_ext.accounting.session import Session
from memloc_ext.borrowing import flattened, fully_sharded, is_part


def gathering(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that gather their parameters, by name.

    Raises:
        ValueError: If the model keeps parts of its parameters in another way than `fully_shard`.
    """
    if flattened(model):
        raise ValueError(
            "GradientAccountant: model must not contain FullyShardedDataParallel, which makes one tensor of many "
            "parameters; use torch.distributed.fsdp.fully_shard"
        )
    found = fully_sharded(model)
    _refuse_parts([name for name, p in model.named_parameters() if is_part(p) and not _inside(name, found)])
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
        _refuse_parts([parameter for parameter, t in whole.items() if is_part(t)])
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
