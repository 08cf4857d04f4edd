"""Tables of rows that are looked up by index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memloc_ext.nn.gradient_accountant.layer import Rule
from memloc_ext.nn.gradient_accountant.run import Weight
from memloc_ext.nn.gradient_accountant.session import Session, examples_first
from memloc_ext.nn.gradient_accountant.uses import EmbeddingUse


class Embedding(Rule):
    """``table[indices]``.

    Args:
        session: See `Rule`.
        weight: The table ``[num, dim]``.
        padding_idx: A row that gets no gradient, or -1.
    """

    def __init__(self, session: Session, weight: Weight, padding_idx: int) -> None:
        super().__init__(session, [None, weight])
        self.padding_idx = padding_idx

    def forward(self, indices: Tensor, table: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """See `Rule`."""
        return torch.embedding(table, indices, self.padding_idx), (indices,)

    def backward(self, saved: Any, needs: Sequence[bool], grad: Tensor) -> tuple[Tensor | None, ...]:
        """See `Rule`."""
        (indices,), run = saved, self.session.run
        if run is None:
            indices, grad = indices[None], grad[None]
        else:
            indices = examples_first(indices, run.batch, self.batch_dim, 0, self.name(1))
            grad = examples_first(grad, run.batch, self.batch_dim, 1, self.name(1))
        weight = self.weights[1]
        assert weight is not None
        return None, self.record(1, EmbeddingUse(indices, grad, weight.tensor.shape[0], self.padding_idx))


def embedding(session: Session, func: Any, args: Any, kwargs: Any) -> Any:
    """Handle `torch.nn.functional.embedding`."""
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    given = dict(zip(names, args, strict=False)) | kwargs
    if given.get("max_norm") is not None or given.get("scale_grad_by_freq") or given.get("sparse"):
        return NotImplemented
    padding_idx = given.get("padding_idx")
    table = given["weight"]
    padding_idx = -1 if padding_idx is None else padding_idx % max(1, table.shape[0])
    return _look_up(session, given["input"], table, padding_idx)


def getitem(session: Session, func: Any, args: Any, kwargs: Any) -> Any:
    """Handle ``table[indices]`` with one tensor of indices."""
    table, indices = args
    integers = isinstance(indices, Tensor) and indices.dtype in (torch.int64, torch.int32)
    if not integers or table.dim() != 2:
        return NotImplemented
    return _look_up(session, indices % table.shape[0], table, -1)


def _look_up(session: Session, indices: Tensor, table: Tensor, padding_idx: int) -> Any:
    weight = session.weight(table)
    if weight is None:
        return NotImplemented
    session_dim, batch = session.batch_dim, session.batch
    fixed = indices.dim() <= session_dim or (session.constant(indices) and indices.dim() < session_dim + 2)
    fixed |= indices.dim() > session_dim and indices.dim() > 1 and indices.shape[session_dim] == 1 and batch != 1
    if fixed:  # the same for every example, as positions are: it counts where it meets activations
        rows = torch.embedding(table, indices, padding_idx)
        if rows.requires_grad:
            session.lookups[rows] = (weight, indices, padding_idx)
        return rows
    session.see(indices)
    return Embedding(session, weight, padding_idx)(indices, table)
