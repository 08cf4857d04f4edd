"""How a model is cut into layer groups, and where example-tied dropout goes in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

ROOT_GROUP = "(root)"


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


def layer_groups(model: nn.Module) -> dict[str, list[str]]:
    """Partition the parameters of a model into its layer groups.

    A model without a ``layout`` gets one group per direct child, and ``"(root)"`` for parameters of its own. A tied
    parameter has the one name that ``named_parameters`` gives it. Groups without parameters are left out.

    Args:
        model: Any module.

    Returns:
        Group to parameter names, groups in the order of the layout, names in the order of ``named_parameters``.

    Raises:
        ValueError: If the layout puts a parameter in no group or in several.
    """
    layout = _layout(model)
    groups: dict[str, list[str]] = {group: [] for group in layout.groups} if layout else {}
    for name, _ in model.named_parameters():
        if layout:
            owners = [group for group, prefixes in layout.groups.items() if any(_within(name, p) for p in prefixes)]
            if len(owners) != 1:
                where = ", ".join(owners) or "none"
                raise ValueError(
                    f"layer_groups: layout must put every parameter in exactly one group, got {name} in {where}"
                )
            groups[owners[0]].append(name)
        else:
            child, dot, _ = name.partition(".")
            groups.setdefault(child if dot else ROOT_GROUP, []).append(name)
    return {group: names for group, names in groups.items() if names}


def dropout_sites(model: nn.Module) -> list[str]:
    """Name the modules after which example-tied dropout goes unless told otherwise.

    Args:
        model: A model with a ``layout`` that has sites.

    Returns:
        Module names as in ``named_modules``, from input to output.

    Raises:
        ValueError: If the model has no such layout.
    """
    layout = _layout(model)
    if layout is None or not layout.sites:
        raise ValueError(
            f"dropout_sites: model must have a layout with sites, got {type(model).__name__} without; "
            "name the sites yourself"
        )
    return list(layout.sites)


def channel_dim(model: nn.Module) -> int:
    """Dimension of the channels in the output of the model's dropout sites.

    Args:
        model: Any module; one without a ``layout`` is taken to follow PyTorch's ``[batch, channels, ...]``.

    Returns:
        1 for ``[batch, channels, ...]``, -1 for ``[batch, tokens, channels]``.
    """
    layout = _layout(model)
    return layout.channel_dim if layout else 1


def _layout(model: nn.Module) -> Layout | None:
    layout = getattr(model, "layout", None)  # a foreign model may use the word for something else
    return layout if isinstance(layout, Layout) else None


def _within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")
