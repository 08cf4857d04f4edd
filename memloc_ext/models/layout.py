"""How a model is cut into layer groups, and where example-tied dropout goes in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from memloc_ext.nn.insert import DROPOUT

ROOT_GROUP = "(root)"
_PARAMETRIZED = "parametrizations"
"""The child that `torch.nn.utils.parametrize` adds to a module."""


@dataclass(frozen=True)
class Layout:
    """What a model says about itself: set as ``model.layout``, it is read by the functions below.

    Names rather than modules, so that it survives copies, pickling and child modules that are added later.

    Attributes:
        groups: Layer group to the modules or parameters it owns, by their dotted names, from input to output.
        sites: Names of the modules whose output example-tied dropout masks, from input to output; may be empty.
        channel_dim: Dimension of the channels in the output of every site.
    """

    groups: Mapping[str, Sequence[str]]
    sites: Sequence[str] = ()
    channel_dim: int = 1


def layer_groups(model: nn.Module, groups: Mapping[str, Sequence[str]] | None = None) -> dict[str, list[str]]:
    """Name the parameters of each layer group of a model.

    Without ``groups`` they are those of the model's ``layout``. A model without a layout has a group per child with
    parameters, and ``"(root)"`` for parameters of its own. Blocks are groups of their own, by their dotted names, at
    any depth: the children of a ``ModuleList``, and those of a ``Sequential`` one of which holds modules in turn. What
    lies beside the blocks stays in the child's group. A tied parameter has the one name that ``named_parameters`` gives
    it. Groups without parameters are left out.

    Args:
        model: Any module.
        groups: Group to a name, or names, of parameters, or of modules with all parameters inside. May leave parameters
            out.

    Returns:
        Group to parameter names, in the order of ``groups``, the layout or the model; names in that of
        ``named_parameters``.

    Raises:
        ValueError: If a name in ``groups`` is not the model's, or a parameter is in several groups or in none of a
            layout.
    """
    names = [name for name, _ in model.named_parameters()]
    layout = layout_of(model)
    if groups is None and layout is None:
        owner, found = _block_of(model), dict[str, list[str]]()
        for name in names:
            found.setdefault(owner(name), []).append(name)
        return found
    given = groups if groups is not None else layout.groups if layout is not None else {}
    given = {group: (told,) if isinstance(told, str) else told for group, told in given.items()}
    where = "groups" if groups is not None else "layout"
    found = {group: [] for group in given}
    for name in names:
        owners = [group for group, prefixes in given.items() if any(_within(name, p) for p in prefixes)]
        if len(owners) > 1 or (not owners and groups is None):
            rule = "at most one group" if groups is not None else "exactly one group"
            got = ", ".join(owners) or "none"
            raise ValueError(f"layer_groups: {where} must put every parameter in {rule}, got {name} in {got}")
        for group in owners:
            found[group].append(name)
    if groups is None:
        return {group: members for group, members in found.items() if members}
    for group, prefixes in given.items():
        for prefix in prefixes:
            if not any(_within(name, prefix) for name in names):
                rule = "names of parameters of the model, or of modules that have some"
                raise ValueError(f"layer_groups: groups must hold {rule}, got {prefix!r} in {group!r}")
        if not found[group]:
            raise ValueError(f"layer_groups: groups must hold parameters, got {group!r} without")
    return found


def _block_of(model: nn.Module) -> Callable[[str], str]:
    """Return what tells the layer group of a parameter by its name."""
    blocks = {""}  # names of the modules that are groups
    for name, module in model.named_modules():
        if _PARAMETRIZED not in name.split("."):
            is_split = name == "" or _holds_blocks(module)
            blocks.update(f"{name}.{child}".lstrip(".") for child, _ in module.named_children() if is_split)

    def owner(name: str) -> str:
        while name not in blocks:
            name = name.rpartition(".")[0]
        return name or ROOT_GROUP

    return lambda name: owner(name.rpartition(".")[0])


def _holds_blocks(module: nn.Module) -> bool:
    if isinstance(module, nn.ModuleList):
        return True
    added = (_PARAMETRIZED, DROPOUT)  # of a leaf layer
    inner = (name for child in module.children() for name, _ in child.named_children())
    return isinstance(module, nn.Sequential) and any(name not in added for name in inner)


def dropout_sites(model: nn.Module) -> list[str]:
    """Name the modules after which example-tied dropout goes unless told otherwise.

    Returns:
        Module names as in ``named_modules``, from input to output.

    Raises:
        ValueError: If the model has no ``layout`` with sites.
    """
    layout = layout_of(model)
    if layout is None or not layout.sites:
        got = f"{type(model).__name__} without; name the sites yourself"
        raise ValueError(f"dropout_sites: model must have a layout with sites, got {got}")
    return list(layout.sites)


def channel_dim(model: nn.Module) -> int:
    """Return the dimension of the channels in the output of the model's dropout sites.

    1 for ``[batch, channels, ...]``, also of a model without a ``layout``; -1 for ``[batch, tokens, channels]``.
    """
    layout = layout_of(model)
    return layout.channel_dim if layout else 1


def layout_of(model: nn.Module) -> Layout | None:
    """Return what a model says about itself, if it does."""
    layout = getattr(model, "layout", None)  # a foreign model may use the word for something else
    return layout if isinstance(layout, Layout) else None


def _within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix.removesuffix(".") + ".")
