"""Models that several processes share, whole ones or, after `fully_shard`, parts of each parameter."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from memloc_ext.accounting.graph import Reached
from memloc_ext.accounting.members import Members
from memloc_ext.accounting.tracer import Tracer
from memloc_ext.borrowing import any_parts, any_sharded, flattened, fully_sharded, is_part


def gathering(model: nn.Module, members: Members) -> dict[str, nn.Module]:
    """Return the modules that gather their parameters, by name.

    ``members``: Of the model.

    Raises:
        ValueError: If the model keeps parts of its parameters in another way than `fully_shard`.
    """
    sharded = any_sharded(members.modules)
    if sharded and flattened(model):
        raise ValueError(
            "GradientAccountant: model must not contain FullyShardedDataParallel, which makes one tensor of many "
            "parameters; use torch.distributed.fsdp.fully_shard"
        )
    found = fully_sharded(model) if sharded else {}
    if any_parts(members.parameters.values()):
        _refuse_parts([name for name, p in members.parameters.items() if is_part(p) and not _inside(name, found)])
    return found


def watch(tracer: Tracer, name: str, module: nn.Module, others: Collection[str]) -> RemovableHandle:
    """Have the tracer told of the parameters that a fully sharded module runs with.

    Args:
        tracer: To be told.
        name: Of the module in the model.
        module: Its own hook gathers its parameters before this one is called.
        others: Names of all fully sharded modules; each gathers what is in it and in no smaller one.
    """
    prefix = f"{name}." if name else ""
    smaller = [other.removeprefix(prefix) for other in others if other != name and other.startswith(prefix)]
    own = [parameter for parameter, _ in module.named_parameters() if not _inside(parameter, smaller)]

    def gathered(module: nn.Module, _: object) -> None:
        parameters = {prefix + parameter: module.get_parameter(parameter) for parameter in own}
        _refuse_parts([parameter for parameter, t in parameters.items() if is_part(t)])
        tracer.use_gathered(parameters)

    return module.register_forward_pre_hook(gathered)


def _refuse_parts(names: list[str]) -> None:
    if names:
        raise ValueError(
            "GradientAccountant: layers must run with whole parameters, as those of fully_shard do, but there is only "
            f"a DTensor of {', '.join(names)}; tensor parallelism is not supported"
        )


def _inside(name: str, modules: Collection[str]) -> bool:
    return any(not module or name.startswith(f"{module}.") for module in modules)


def check_parallel(model: nn.Module, weight_grads: bool, exact_groups: bool) -> None:
    """Refuse what `DistributedDataParallel` would wait for in vain."""
    if isinstance(model, DistributedDataParallel) and model.require_backward_grad_sync:
        for name, wrong, rule in (("weight_grads", not weight_grads, True), ("exact_groups", exact_groups, False)):
            if wrong:
                raise ValueError(
                    f"GradientAccountant: {name} must be {rule} while DistributedDataParallel synchronises "
                    f"gradients, got {not rule}; call forward and backward inside model.no_sync()"
                )


def check_sharded(tracer: Tracer, found: Reached, exact_groups: bool, max_norm: float | None) -> None:
    """Refuse what takes several backward passes: processes with fewer would leave the others waiting."""
    if not tracer.gathered:
        return
    for name, wrong, rule in (("exact_groups", exact_groups, False), ("max_norm", max_norm, None)):
        if wrong:
            raise ValueError(f"GradientAccountant: {name} must be {rule} after fully_shard, got {wrong}")
    names = [name for name, p in tracer.named_parameters() if id(p) in found.unseen]
    if names:
        raise ValueError(
            f"GradientAccountant: the layers of {', '.join(names)} are not covered, and fully_shard allows no "
            "backward pass per example; freeze them, or use DistributedDataParallel"
        )
