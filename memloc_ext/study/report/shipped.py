"""The model without its memorization channels beside the full one: what it costs."""

from __future__ import annotations

from memloc_ext.study.report.section import Number, Table, percent
from memloc_ext.study.shipped import Cost, Shipped


def answers(found: Shipped) -> list[str]:
    """Return what is saved, and where that is not possible."""
    small, full = found.shipped, found.full
    sentences = [
        f"Without those channels the network has {percent(small.parameters / full.parameters)} % of its parameters and "
        f"{percent(small.multiply_adds / full.multiply_adds)} % of its multiply-adds, and takes "
        f"{percent(found.time_ratio)} % of the time for {found.examples} examples. It is in shipped.pt2, which "
        "torch.export.load reads.",
    ]
    stay = [name for name, site in found.sites.items() if site.masked]
    if stay:
        sentences.append(f"Other parts of the network need the channels of {', '.join(stay)}, which are zero there.")
    return sentences


def table(found: Shipped) -> Table:
    """Return the costs of both models."""
    rows = [_row("memorization channels off", found.full), _row("without them", found.shipped)]
    seconds = f"ms for {found.examples} examples"
    return Table("What the network costs", ["", "parameters", "multiply-adds per example", seconds], rows)


def numbers(found: Shipped) -> list[Number]:
    """Return the costs of the smaller model as shares of the full one's."""
    name, small, full = "example-tied dropout: without the channels", found.shipped, found.full
    return [
        Number(f"{name}, parameters of the full network", small.parameters / full.parameters),
        Number(f"{name}, multiply-adds of the full network", small.multiply_adds / full.multiply_adds),
    ]


def _row(name: str, cost: Cost) -> list[str]:
    return [name, f"{cost.parameters:,}", f"{cost.multiply_adds:,.0f}", f"{1000 * cost.seconds:.2f}"]
