"""An audit in a study: with what a page shows of the most suspect examples."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from memloc_ext.batches import tensors_of
from memloc_ext.examples import Examples
from memloc_ext.probes import Audit

PICTURE = "data:image/png;base64,"
_TOKENS = 40
"""Largest number of tokens that are shown of an example."""


@dataclass(frozen=True)
class AuditedExamples:
    """An audit; what is shown of its most suspect examples, by rank, see `shown_examples`; and its table."""

    found: Audit
    shown: list[str]
    table: Path = field(compare=False)


def shown_examples(data: Examples, indices: Sequence[int]) -> list[str]:
    """Return what a page shows of the examples with these numbers.

    An input ``[channels, height, width]`` is a PNG, as an address that begins with `PICTURE`; of tokens it is their
    first numbers; of anything else nothing.
    """
    numbers, order = data.indices.cpu().sort()
    rows = order[torch.searchsorted(numbers, torch.tensor(indices))]
    return [_shown(x) for x in tensors_of(data.batch(rows).x)[0].cpu()]


def _shown(x: Tensor) -> str:
    if x.dim() == 1 and not x.is_floating_point():
        return " ".join(map(str, x[:_TOKENS].tolist()))
    return PICTURE + base64.b64encode(_png(x)).decode() if x.dim() == 3 else ""


def _png(x: Tensor) -> bytes:
    """Return an image, whose smallest value is black and whose largest is white, as a file."""
    from PIL import Image

    colors = (x[:3] if len(x) >= 3 else x[:1].expand(3, -1, -1)).double()
    low, high = colors.aminmax()
    scaled = (colors - low) / (high - low).clamp(min=1e-12) * 255
    buffer = io.BytesIO()
    Image.fromarray(scaled.round().byte().permute(1, 2, 0).contiguous().numpy()).save(buffer, "PNG")
    return buffer.getvalue()
