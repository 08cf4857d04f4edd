"""Multi-head attention as PyTorch writes it: one function, whose projections are handled one by one."""

from __future__ import annotations

from typing import Any

from torch.nn import functional as F

from memloc_ext.accounting.in_parts import in_parts
from memloc_ext.accounting.session import Session

_attention = in_parts(F.multi_head_attention_forward)


def attention(session: Session, func: Any, args: Any, kwargs: Any) -> Any:
    """Handle `torch.nn.functional.multi_head_attention_forward`."""
    with session:
        return _attention(*args, **kwargs)
