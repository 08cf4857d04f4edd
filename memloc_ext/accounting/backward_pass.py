"""One backward pass: adds up the uses of every parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from memloc_ext.accounting.contributions import Contribution, Rows, accumulated, squared_norm
from memloc_ext.accounting.example_axis import ExampleAxis
from memloc_ext.accounting.queries import Queries
from memloc_ext.accounting.uses import ParameterView, Use, together
from memloc_ext.ops import Groups

if TYPE_CHECKING:
    from memloc_ext.accounting.layers.derived import Derived


_FEW = 1 << 12  # elements, whose norm needs no care


@dataclass(frozen=True)
class Repeated:
    """A parameter, or rows of it, as every example meets it.

    Attributes:
        weight: The parameter or view; of rows that are looked up, the table.
        value: What is repeated.
        indices: Of the rows, or None for all of the parameter.
        padding_idx: A row that gets no gradient, or -1.
    """

    weight: ParameterView
    value: Tensor
    indices: Tensor | None = None
    padding_idx: int = -1


@dataclass(eq=False, repr=False)
class BackwardPass:
    """One backward pass.

    Attributes:
        batch: Number of examples.
        groups: Of the examples, or None.
        weight_grads: Whether parameters get gradients.
        calls: How often the forward pass used each parameter, by its ``id``.
        slow: Parameters that are accounted one example at a time, by their ``id``.
        several_rows: Whether an example may have several rows of the model's input, one behind the other.
        constant_statistics: Whether batch normalisation takes the batch's statistics for constants.
        queries: What else is asked, or None.
        clipped: Whether parameters get their gradients from `clipped_gradients`, when all norms are known.
        sqnorm: Squared norms ``[batch]`` of each parameter, by its ``id``.
        group_grad: Sums ``[groups.num, *shape]`` of the gradients of each group, by the ``id`` of each parameter.
        sum_sqnorm: Squared norm of the sum of all examples' gradients, where it was formed, in the same way.
    """

    per_example: ClassVar[bool] = True  # whether layers tell the examples' gradients apart

    batch: int
    groups: Groups | None
    weight_grads: bool
    calls: Mapping[int, int]
    slow: dict[int, nn.Parameter]
    several_rows: bool = False
    constant_statistics: bool = False
    queries: Queries | None = None
    clipped: bool = False
    sqnorm: dict[int, Tensor] = field(default_factory=dict, init=False)
    group_grad: dict[int, Tensor] = field(default_factory=dict, init=False)
    sum_sqnorm: dict[int, Tensor] = field(default_factory=dict, init=False)
    _single: Groups | None = field(default=None, init=False)
    _sums: dict[int, Tensor] = field(default_factory=dict, init=False)
    _held: dict[int, list[Use]] = field(default_factory=dict, init=False)
    _kept: dict[int, Contribution] = field(default_factory=dict, init=False)
    _derived: dict[Derived, list[Use]] = field(default_factory=dict, init=False)

    def trial(self) -> BackwardPass:
        """Return a pass for the norms alone, to be compared."""
        return replace(self, groups=None, weight_grads=False, constant_statistics=True, queries=None, clipped=False)

    def fits(self, axis: ExampleAxis) -> bool:
        """Return whether rows of the model's input that are in these places are those of the examples."""
        several = self.several_rows and self.batch > 0 and axis.batch % self.batch == 0
        return several or axis.batch == self.batch

    def place(self, axis: ExampleAxis) -> ExampleAxis:
        """Return where the examples are, given where the rows of the model's input are."""
        if axis.batch == self.batch:
            return axis
        if not self.fits(axis):
            raise ValueError(
                f"GradientAccountant: the model's input must have a row per example, got {axis.batch} rows and "
                f"{self.batch} examples; if each example has several, one behind the other, give batch_size"
            )
        return axis.merged(self.batch)

    def is_slow(self, weight: ParameterView) -> bool:
        """Return whether all that is trained of it is accounted one example at a time."""
        return all(id(parameter) in self.slow for parameter in weight.parameters)

    def wants(self, weight: ParameterView) -> bool:
        """Return whether a parameter's gradient of the whole batch is computed on the way."""
        return self.weight_grads and not self.clipped

    def record(self, weight: ParameterView, contribution: Contribution) -> Tensor | None:
        """Take note of a use; return the gradient of the whole batch, or None where it is not wanted.

        What is asked of a parameter that the forward pass used once is answered here. The uses of another, and all if
        gradients are clipped, are held, with the tensors they are made of, until all of them are known.
        """
        key, wanted = id(weight.parameter), self.wants(weight)
        if self.is_slow(weight):
            return contribution.total().to(weight.tensor.dtype) if wanted else None
        if weight.derived is not None:
            self._derived.setdefault(weight.derived, []).append((weight, contribution))
            return None
        all_of_it = weight.tensor.numel() == weight.parameter.numel()
        only_use = self.calls.get(key) == 1 and key not in self._held and all_of_it and not self.clipped
        if key in self.sqnorm:  # found out too late that there is another use
            raise ValueError(
                f"GradientAccountant: a parameter of shape {list(weight.parameter.shape)} is used in a way that "
                "reentrant checkpointing hides: give checkpoint use_reentrant=False"
            )
        gradient, queries = None, self.queries
        if only_use:
            gradient, dot = self._only_use(weight, contribution, wanted)
            if queries is not None:
                uses = [(weight, contribution)]
                queries.ask(key, uses, together(uses), dot)
        else:
            self._held.setdefault(key, []).append((weight, contribution))
            if wanted or self.groups is not None:
                gradient = self._summed(weight, contribution)[-1] if self.groups is not None else contribution.total()
        if not wanted or gradient is None:
            return None
        if only_use:
            self.note_totals({key: gradient})
        else:
            if key not in self._sums:
                like, dtype = weight.parameter, accumulated(gradient.dtype)
                self._sums[key] = torch.zeros_like(like, dtype=dtype, memory_format=torch.contiguous_format)
            weight.views_of(self._sums[key][None])[0].add_(gradient)
        return gradient.to(weight.tensor.dtype)

    def _only_use(
        self, weight: ParameterView, contribution: Contribution, wanted: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Note the norms of a parameter that is used once; return its gradient and the products with its directions."""
        key = id(weight.parameter)
        if not wanted and self.groups is None:
            self.sqnorm[key] = contribution.sqnorm()
            return None, None
        directions = self.queries.directions_of(key) if self.queries is not None and weight.is_parameter else None
        dot, self.sqnorm[key], gradient = self._summed(weight, contribution, directions)
        return gradient, dot

    def _summed(
        self, weight: ParameterView, contribution: Contribution, directions: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Note the sums over groups; return products with directions, squared norms and the sum over all examples."""
        if self.groups is None and directions is None:
            return None, *contribution.sqnorm_and_total()
        groups, dot = self.summation_groups(contribution.device), None
        if directions is None:
            sqnorm, sums = contribution.sqnorm_and_groups(groups)
        else:
            dot, sqnorm, sums = contribution.dot_and_groups(directions, groups)
        gradient = sums.sum(0) if groups.num > 1 else sums[0]
        if self.groups is not None:
            self._add_groups(weight, sums)
            gradient = gradient.clone() if groups.num == 1 else gradient  # the parameter's own, to be changed
        return dot, sqnorm, gradient

    def take(self, derived: Derived) -> list[Use]:
        """Return the uses of a tensor that is computed from parameters, now that all are known."""
        return self._derived.pop(derived, [])

    def finish(self) -> None:
        """Answer what is asked of the parameters whose uses were held."""
        for key, uses in self._held.items():
            contribution = together(uses)
            self.sqnorm[key] = contribution.sqnorm()
            if self.queries is not None:
                self.queries.ask(key, uses, contribution)
            if self.clipped:
                self._kept[key] = contribution
        self._held.clear()
        if self.weight_grads and not self.clipped:
            self.note_totals(self._sums)
        self._sums.clear()
        if self.queries is not None:
            self.queries.finish()

    def note_totals(self, totals: Mapping[int, Tensor]) -> None:
        """Take note of the sums of all examples' gradients, by the ``id`` of each parameter."""
        small = [key for key, t in totals.items() if t.numel() < _FEW and t.dtype in (torch.float32, torch.float64)]
        if len(small) > 1:
            norms = torch._foreach_norm([totals[key] for key in small])  # pyright: ignore
            self.sum_sqnorm.update(zip(small, torch._foreach_mul(norms, norms), strict=True))  # pyright: ignore
        for key in totals.keys() - small if len(small) > 1 else totals:
            self.sum_sqnorm[key] = squared_norm(totals[key])

    def clipped_gradients(self, factors: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Return the sums of the examples' gradients times their factors ``[batch]``, of all that was held."""
        result = {}
        while self._kept:
            key, contribution = self._kept.popitem()
            result[key] = contribution.total(factors[key])
        return result

    def add_examples(self, parameters: Mapping[int, nn.Parameter], begin: int, gradients: Mapping[int, Tensor]) -> None:
        """Take note of gradients, ``[n, *shape]``, of examples from ``begin`` on, by the ``id`` of each parameter."""
        for key, gradient in gradients.items():
            rows = gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()
            norms, end = Rows(rows).sqnorm(), begin + len(rows)
            if key not in self.sqnorm:
                self.sqnorm[key] = norms.new_zeros(self.batch)
            self.sqnorm[key][begin:end] = norms
            total = rows.sum(0, dtype=accumulated(rows.dtype))
            self._sums[key] = self._sums[key] + total if key in self._sums else total
            if self.queries is not None:
                self.queries.ask_rows(key, begin, rows)
            if self.weight_grads and self.groups is not None:
                rows = rows.to(accumulated(rows.dtype))
                self._groups_of(parameters[key]).index_add_(0, self.groups.ids[begin:end], rows)

    def forget(self, parameters: Mapping[int, nn.Parameter]) -> None:
        """Forget what was noted of parameters, given by their ``id``."""
        for key in parameters:
            self.sqnorm.pop(key, None)
            self.group_grad.pop(key, None)
            self._sums.pop(key, None)
            if self.queries is not None:
                self.queries.forget(key)

    def summation_groups(self, device: torch.device) -> Groups:
        """Return the groups over whose examples gradients are added up: all in one, if there are none."""
        if self.groups is not None:
            return self.groups
        if self._single is None:
            self._single = Groups.single(self.batch, device)
        return self._single

    def _groups_of(self, parameter: nn.Parameter) -> Tensor:
        key = id(parameter)
        assert self.groups is not None
        if key not in self.group_grad:
            shape, dtype = (self.groups.num, *parameter.shape), accumulated(parameter.dtype)
            self.group_grad[key] = torch.zeros(shape, dtype=dtype, device=parameter.device)
        return self.group_grad[key]

    def _add_groups(self, weight: ParameterView, groups: Tensor) -> None:
        key = id(weight.parameter)
        if weight.is_parameter and key not in self.group_grad:
            self.group_grad[key] = groups
            return
        for total, part in zip(self._groups_of(weight.parameter), groups, strict=True):
            weight.views_of(total[None])[0].add_(part)


class GradientPass(BackwardPass):
    """A backward pass for one example, or for a group: gradients of some parameters only, and no norms."""

    per_example = False

    def __init__(self, backward: BackwardPass, wanted: Mapping[int, nn.Parameter]) -> None:
        several_rows, constant_statistics = backward.several_rows, backward.constant_statistics
        slow = backward.slow | dict(wanted)
        super().__init__(backward.batch, None, True, {}, slow, several_rows, constant_statistics)
        self._wanted = frozenset(wanted)

    def wants(self, weight: ParameterView) -> bool:
        """Return whether it is one of these parameters, or computed from one."""
        return any(id(parameter) in self._wanted for parameter in weight.parameters)

    def record(self, weight: ParameterView, contribution: Contribution) -> Tensor | None:
        """Take no note."""
        return contribution.total().to(weight.tensor.dtype) if self.wants(weight) else None
