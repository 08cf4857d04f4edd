"""Put a dropout behind named modules of any model, without touching its code or its parameter names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from memloc_ext.nn.example_tied_dropout import ExampleTiedDropout, FixedDropout, Mask
from memloc_ext.nn.skipping import skip_in

DROPOUT = "dropout_after"
"""The child that a dropout becomes of the module it follows."""
_CHANNELS_FIRST = (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, nn.InstanceNorm1d)
"""Modules whose 3-d outputs are ``[batch, channels, length]``."""


def insert_example_tied_dropout(
    model: nn.Module,
    after: Sequence[str],
    *,
    p_gen: float = 0.2,
    p_mem: float = 0.1,
    seed: int = 0,
    channel_dim: int | None = None,
    rescale: str = "none",
    skip: bool | Literal["require"] = False,
    mask: Mask | None = None,
) -> nn.Module:
    """Put an `ExampleTiedDropout` on the output of each named module.

    Sites are numbered in the order of the names, from 0, or on from those that the model has.

    The model is changed in place. Parameter names stay as they were, and a state dict from before still loads.

    Args:
        model: Any model.
        after: Module names as in ``model.named_modules()``, in the order of their sites.
        p_gen: Share of generalization channels, in ``[0, 1]``.
        p_mem: Probability that a memorization channel is kept for an example, in ``[0, 1]``.
        seed: Names the assignment of channels to examples, any int64.
        channel_dim: Dimension of the channels in the outputs of those modules. By default as in `insert_after`.
        rescale: See `ExampleTiedDropout`.
        skip: Whether to skip, in mode ``train``, the work for channels that are not kept, where the dropout is between
            linear layers (`memloc_ext.ops.example_tied_mlp`) or in front of a convolution
            (`memloc_ext.ops.example_tied_conv2d`). Results are equal, to rounding, but for the draws of
            ordinary dropout. The first forward pass finds out where. ``require``: that pass raises ValueError, which
            says why, if a dropout cannot. Activations between those layers that the model holds are computed apart: no
            gradient of the output reaches them, unless ``retain_grad`` or ``register_hook`` asked for it. RuntimeError
            if one goes to a function of `torch.autograd.Function`.
        mask: See `ExampleTiedDropout`; the same for all sites.

    Returns:
        ``model``.

    Raises:
        ValueError: If a name is not in the model, is given twice, or names a module that cannot take one; the model is
            then as it was.
    """
    there = [module.site for module in model.modules() if isinstance(module, ExampleTiedDropout)]
    first = max(there, default=-1) + 1  # sites that shared a number would share their masks
    names = after if isinstance(after, str) else list(after)  # insert_after refuses a string
    if skip not in (False, True, "require"):
        raise ValueError(f"insert_example_tied_dropout: skip must be True, False or 'require', got {skip!r}")

    settings = {"seed": seed, "channel_dim": channel_dim, "rescale": rescale, "mask": mask}

    def make(n: int) -> ExampleTiedDropout:
        dropout = ExampleTiedDropout(p_gen, p_mem, site=first + n, **settings)
        dropout.skip = skip
        return dropout

    insert_after(model, names, make)
    if skip:
        skip_in(model)
    return model


def insert_after(model: nn.Module, after: Sequence[str], make: Callable[[int], nn.Module]) -> nn.Module:
    """Put ``make(n)`` on the output of the n-th named module, in place, and return ``model``.

    The new module becomes the child ``dropout_after`` of the one it follows; a plain ``nn.Sequential`` runs it as its
    last step, any other module through a forward hook.

    An `ExampleTiedDropout` or `FixedDropout` without ``channel_dim`` gets 1 behind a ``Conv1d``, ``ConvTranspose1d``,
    ``BatchNorm1d`` or ``InstanceNorm1d``. Behind other modules it refuses 3-d outputs, which can hold tokens.

    Raises:
        TypeError: If ``after`` is a single string.
        ValueError: As for `insert_example_tied_dropout`.
    """
    if isinstance(after, str):
        raise TypeError(f"insert: after must be a list of module names, got the string {after!r}")
    after = list(after)
    modules = dict(model.named_modules())
    taken: set[int] = set()
    for name in after:
        if name not in modules:
            raise ValueError(f"insert: after must name modules of the model; it has no {name!r}")
        module = modules[name]
        if id(module) in taken or hasattr(module, DROPOUT):
            raise ValueError(f"insert: {name!r} already has a dropout behind it")
        taken.add(id(module))
        if not _runs_children_in_order(module) and isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            got = f"{name!r} is a {type(module).__name__}"
            raise ValueError(f"insert: {got} that may run each of its children; name one of those")
    new = [make(site) for site in range(len(after))]
    for name, dropout in zip(after, new, strict=True):
        module = modules[name]
        if isinstance(dropout, ExampleTiedDropout | FixedDropout) and dropout.channel_dim is None:
            dropout.channel_dim = 1 if isinstance(module, _CHANNELS_FIRST) else None
        dropout.train(module.training)
        module.add_module(DROPOUT, dropout)
        if not _runs_children_in_order(module):
            module.register_forward_hook(apply_dropout)
    return model


def example_tied_sites(model: nn.Module) -> dict[str, ExampleTiedDropout]:
    """Return the modules whose output an `ExampleTiedDropout` ends, by name: those it was put behind, else itself."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, ExampleTiedDropout)}
    return {name.removesuffix(f".{DROPOUT}"): module for name, module in found.items()}


def _runs_children_in_order(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def apply_dropout(module: nn.Module, _: Any, output: Tensor) -> Tensor:
    """Give the output of a module, as a forward hook of it, to the dropout behind it."""
    # looks its module up at run time, so that a copied or unpickled model uses its own
    return getattr(module, DROPOUT)(output)
