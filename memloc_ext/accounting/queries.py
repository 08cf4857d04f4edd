"""Queries of the examples' gradients beyond norms and sums, and their answers."""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from memloc_ext import ops
from memloc_ext.accounting.contributions import Contribution, Rows, accumulated, squared_norm
from memloc_ext.accounting.uses import Use, by_position
from memloc_ext.borrowing import is_part

Directions = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Projection:
    """Random matrices that make each example's gradient small and leave inner products right on average.

    A parameter's gradient counts as a matrix: its first dimension by all others. Every element of the two matrices is
    1 / sqrt(dim) or its negative, drawn by the seed, the parameter's name in the model and its place: the same in every
    batch, process and device, also where `DistributedDataParallel` or `torch.compile` wraps the model. A side of the
    gradient that is shorter than ``dim`` is left as it is.

    Args:
        dim: Rows of each matrix, at least 1.
        seed: Names the matrices, any int64.

    Raises:
        ValueError: If ``dim`` or ``seed`` breaks the above.
        TypeError: If they are not integers.

    Source: Johnson and Lindenstrauss, 1984; Park et al., "TRAK: Attributing model behavior at scale", ICML 2023.
    """

    dim: int
    seed: int

    def __post_init__(self) -> None:
        for name, value, low, high in (("dim", self.dim, 1, 2**31), ("seed", self.seed, -(2**63), 2**63)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"Projection: {name} must be an int, got {value!r}")
            if not low <= value < high:
                raise ValueError(f"Projection: {name} must be in [{low}, {high}), got {value}")

    def matrix(self, name: str, side: str, size: int, like: Tensor) -> Tensor:
        """Return the matrix of a parameter's ``left`` or ``right`` side of so many elements, ``[k, size]``."""
        dtype = accumulated(like.dtype).to_real()
        if size < self.dim:
            return torch.eye(size, dtype=dtype, device=like.device)
        ones, rows = (torch.ones(self.dim, size, device=like.device), torch.arange(self.dim, device=like.device))
        site = zlib.crc32(f"{side} of {name.removeprefix('_orig_mod.')}".encode())
        kept = ops.example_tied_dropout(ones, rows, num_generalization=0, p_mem=0.5, seed=self.seed, site=site)
        return (2 * kept - 1).to(dtype) / math.sqrt(self.dim)


class Queries:
    """The queries of one backward pass and the answers, by the ``id`` of each parameter, of gradients as they flow.

    Attributes:
        names: Of the parameters, by their ``id``, as projections are drawn by.
        direction_sqnorm: Squared norm of each direction over all parameters, 0-d.

    Args:
        named: The model's parameters that require gradients, by name.
        batch: Number of examples.
        directions: See `GradientAccountant.backward`, as the other arguments.
        pairwise: See there.
        project: See there.
        per_position: See there.
        by_row: See there.

    Raises:
        ValueError: If a name is no parameter's, or a direction is not like its parameter.
        TypeError: If an argument is of another type.
    """

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        batch: int,
        directions: Directions | None = None,
        pairwise: bool | Collection[str] = False,
        project: Projection | None = None,
        per_position: bool = False,
        by_row: Collection[str] = (),
    ) -> None:
        if project is not None and not isinstance(project, Projection):
            raise TypeError(f"GradientAccountant: project must be a Projection, got {type(project).__name__}")
        self._batch, self._project, self._per_position = batch, project, per_position
        self._named = {id(p): p for p in named.values()}
        self.names = {id(p): name for name, p in named.items()}
        self.directions = _checked(directions or {}, named)
        self._stacked: dict[int, tuple[list[str], Tensor]] = {}
        for key, name in self.names.items():
            given = [direction for direction, tensors in self.directions.items() if name in tensors]
            if given:
                rows = [self.directions[direction][name].detach() for direction in given]
                rows = torch.stack(rows) if len(rows) > 1 else rows[0][None]  # one is not copied
                self._stacked[key] = given, rows.to(accumulated(rows.dtype))
        self.direction_sqnorm = {name: _sqnorm(list(tensors.values())) for name, tensors in self.directions.items()}
        self._all_pairs = pairwise is True
        self._pairs = _keys("pairwise", () if isinstance(pairwise, bool) else pairwise, named)
        self._by_row = _keys("by_row", by_row, named)
        self._rows: dict[int, list[Tensor]] = {}
        self._answered: set[int] = set()
        self.inner: Tensor | None = None
        self.parameter_inner: dict[int, Tensor] = {}
        self.dot: dict[str, dict[int, Tensor]] = {name: {} for name in self.directions}
        self.projected: dict[int, Tensor] = {}
        self.position_sqnorm: dict[int, Tensor] = {}
        self.row_sqnorm: dict[int, Tensor] = {}

    @property
    def any(self) -> bool:
        """Whether anything is asked."""
        return bool(self.directions or self._all_pairs or self._pairs or self._by_row or self._per_position) or (
            self._project is not None
        )

    def directions_of(self, key: int) -> Tensor | None:
        """Return the directions of a parameter, ``[n, *shape]``; None if there are none."""
        return self._stacked[key][1] if key in self._stacked else None

    def ask(self, key: int, uses: Sequence[Use], contribution: Contribution, dot: Tensor | None = None) -> None:
        """Answer for all examples.

        Args:
            key: The ``id`` of a parameter.
            uses: Every use of that parameter.
            contribution: All these uses as one contribution.
            dot: Inner products with its directions, ``[n, batch]``, if they are known.
        """
        self._answer(key, contribution, 0, dot)
        if self._pairwise(key):
            self._add_inner(key, contribution.inner())
        if self._per_position and (each := by_position(uses)) is not None:
            positions = each.batch // max(1, self._batch)
            self.position_sqnorm[key] = each.sqnorm().reshape(self._batch, positions)

    def ask_rows(self, key: int, begin: int, rows: Tensor) -> None:
        """Answer for examples from ``begin`` on, given their gradients ``[n, *shape]``."""
        self._answer(key, Rows(rows), begin)
        if self._pairwise(key):
            self._rows.setdefault(key, []).append(rows)

    def forget(self, key: int) -> None:
        """Forget gradients that were given by `ask_rows`; other answers are written over."""
        self._rows.pop(key, None)

    def finish(self) -> None:
        """Answer the queries that need all examples at once; zeros for parameters that the loss does not depend on."""
        for key, rows in self._rows.items():
            self._add_inner(key, Rows(torch.cat(rows)).inner())
        self._rows.clear()
        for key in self._named.keys() - self._answered:
            zeros = partial(self._named[key].new_zeros, dtype=accumulated(self._named[key].dtype).to_real())
            if self._pairwise(key):
                self._add_inner(key, zeros((self._batch, self._batch)))
            sides = _sides(self._named[key].shape)
            if self._project is not None:
                self.projected[key] = zeros((self._batch, *(min(self._project.dim, size) for size in sides)))
            if key in self._by_row:
                self.row_sqnorm[key] = zeros((self._batch, sides[0]))

    def _answer(self, key: int, contribution: Contribution, begin: int, dot: Tensor | None = None) -> None:
        self._answered.add(key)
        if key in self._stacked:
            names, directions = self._stacked[key]
            for name, values in zip(names, contribution.dot(directions) if dot is None else dot, strict=True):
                self._put(self.dot[name], key, begin, values)
        if self._project is not None:
            like = torch.empty(0, dtype=contribution.dtype, device=contribution.device)
            sides = zip(("left", "right"), _sides(contribution.shape), strict=True)
            left, right = (self._project.matrix(self.names[key], side, size, like) for side, size in sides)
            self._put(self.projected, key, begin, contribution.projected(left, right))
        if key in self._by_row:
            self._put(self.row_sqnorm, key, begin, contribution.row_sqnorm())

    def _pairwise(self, key: int) -> bool:
        return self._all_pairs or key in self._pairs

    def _add_inner(self, key: int, inner: Tensor) -> None:
        if key in self._pairs:
            self.parameter_inner[key] = inner
        if self._all_pairs:
            self.inner = inner if self.inner is None else self.inner + inner.to(self.inner)

    def _put(self, answers: dict[int, Tensor], key: int, begin: int, values: Tensor) -> None:
        """Write the answers for examples from ``begin`` on, ``[n, *]``."""
        if len(values) == self._batch:
            answers[key] = values
            return
        if key not in answers:
            answers[key] = values.new_zeros(self._batch, *values.shape[1:])
        answers[key][begin : begin + len(values)] = values


def _checked(directions: Directions, named: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Tensor]]:
    """Return the directions, checked against the parameters."""
    if not isinstance(directions, Mapping):
        raise TypeError(f"GradientAccountant: directions must be a mapping, got {type(directions).__name__}")
    for direction, tensors in directions.items():
        if not isinstance(tensors, Mapping):
            raise TypeError(
                f"GradientAccountant: directions[{direction!r}] must be a mapping from names of parameters to tensors, "
                f"got {type(tensors).__name__}"
            )
        _keys(f"directions[{direction!r}]", tensors, named)
        for name, t in tensors.items():
            p = named[name]
            got = _kind(t)
            if got != _kind(p.detach()):
                raise ValueError(
                    f"GradientAccountant: directions[{direction!r}][{name!r}] must be like the parameter, "
                    f"{_kind(p.detach())}, got {got}"
                )
    return {direction: dict(tensors) for direction, tensors in directions.items()}


def _kind(t: object) -> str:
    """Return in words what a direction must have in common with its parameter."""
    if not isinstance(t, Tensor):
        return type(t).__name__
    if is_part(t):
        return "a DTensor; give full_tensor()"
    layout = "" if t.layout == torch.strided else f", {t.layout}"
    return f"{list(t.shape)} of {t.dtype} on {t.device}{layout}"


def _sqnorm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the squared norm of all elements of some tensors, 0-d."""
    norms = [squared_norm(t.detach()) for t in tensors] or [torch.zeros(())]
    return torch.stack([norm.to(norms[0].device) for norm in norms]).sum()


def _sides(shape: Sequence[int]) -> tuple[int, int]:
    """Return the sides of a gradient as a matrix: its first dimension, and all others."""
    rows = shape[0] if shape else 1
    return rows, math.prod(shape) // max(1, rows)


def _keys(argument: str, names: Collection[str], named: Mapping[str, nn.Parameter]) -> set[int]:
    """Return the ``id`` of each of these parameters."""
    if isinstance(names, str) or not isinstance(names, Collection):
        raise TypeError(f"GradientAccountant: {argument} must be a collection of names of parameters, got {names!r}")
    unknown = [name for name in names if name not in named]
    if unknown:
        raise ValueError(
            f"GradientAccountant: {argument} must name parameters of the model that require gradients, "
            f"{', '.join(named)}; got {', '.join(map(repr, unknown))}"
        )
    return {id(named[name]) for name in names}
