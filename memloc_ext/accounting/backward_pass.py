"""One backward pass: adds up the uses of every parameter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from memloc_ext.accounting.contributions import Contribution, Rows, accumulated, combined_sqnorm
from memloc_ext.accounting.example_axis import ExampleAxis
from memloc_ext.ops import Groups

if TYPE_CHECKING:
    from memloc_ext.accounting.layers.derived import Derived


@dataclass(frozen=True)
class ParameterView:
    """A parameter, or a view of it: a slice, a transposed one, a part of a split one; or what stands in its place.

    Attributes:
        parameter: What is trained; of a tensor that is computed from such, its copy.
        tensor: What the function is run with.
        derived: How it is computed, or None.
    """

    parameter: nn.Parameter
    tensor: Tensor
    derived: Derived | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [self.parameter] if self.derived is None else self.derived.parameters

    @property
    def is_parameter(self) -> bool:
        """Whether no view was taken."""
        return self.tensor is self.parameter

    def view_of(self, parameter_like: Tensor) -> Tensor:
        """Return the same view of a contiguous tensor of the parameter's shape."""
        if self.is_parameter:
            return parameter_like
        offset = parameter_like.storage_offset() + self.tensor.storage_offset() - self.parameter.storage_offset()
        return parameter_like.as_strided(self.tensor.shape, self.tensor.stride(), offset)


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
        sqnorm: Squared norms ``[batch]`` of each parameter, by its ``id``.
        group_grad: Sums ``[groups.num, *shape]`` of the gradients of each group, by the ``id`` of each parameter.
    """

    per_example: ClassVar[bool] = True  # whether layers tell the examples' gradients apart

    batch: int
    groups: Groups | None
    weight_grads: bool
    calls: Mapping[int, int]
    slow: dict[int, nn.Parameter]
    several_rows: bool = False
    constant_statistics: bool = False
    sqnorm: dict[int, Tensor] = field(default_factory=dict, init=False)
    group_grad: dict[int, Tensor] = field(default_factory=dict, init=False)
    _single: Groups | None = field(default=None, init=False)
    _held: dict[int, list[tuple[ParameterView, Contribution]]] = field(default_factory=dict, init=False)
    _derived: dict[Derived, list[Contribution]] = field(default_factory=dict, init=False)

    def trial(self) -> BackwardPass:
        """Return a pass for the norms alone, to be compared."""
        return replace(self, groups=None, weight_grads=False, constant_statistics=True)

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
        """Return whether a parameter's gradient of the whole batch is computed."""
        return self.weight_grads

    def record(self, weight: ParameterView, contribution: Contribution) -> Tensor | None:
        """Take note of a use; return the gradient of the whole batch, or None where it is not wanted.

        The norm of a parameter that the forward pass used once is computed here. The uses of another are held, with
        the tensors they are made of, until all of them are known.
        """
        key, wanted = id(weight.parameter), self.wants(weight)
        if self.is_slow(weight):
            return contribution.total().to(weight.tensor.dtype) if wanted else None
        if weight.derived is not None:
            self._derived.setdefault(weight.derived, []).append(contribution)
            return None
        all_of_it = weight.tensor.numel() == weight.parameter.numel()
        only_use = self.calls.get(key) == 1 and key not in self._held and all_of_it
        if key in self.sqnorm:  # found out too late that there is another use
            raise ValueError(
                f"GradientAccountant: a parameter of shape {list(weight.parameter.shape)} is used in a way that "
                "reentrant checkpointing hides: give checkpoint use_reentrant=False"
            )
        gradient = None
        if wanted and (only_use or self.groups is not None):
            groups = self.summation_groups(contribution.device)
            sqnorm, sums = contribution.sqnorm_and_groups(groups)
            gradient = sums.sum(0) if groups.num > 1 else sums[0]
            if self.groups is not None:
                self._add_groups(weight, sums)
                gradient = gradient.clone() if groups.num == 1 else gradient  # the parameter's own, to be changed
            if only_use:
                self.sqnorm[key] = sqnorm
        elif wanted:
            gradient = contribution.total()
        elif only_use:
            self.sqnorm[key] = contribution.sqnorm()
        if not only_use:
            self._held.setdefault(key, []).append((weight, contribution))
        return None if gradient is None else gradient.to(weight.tensor.dtype)

    def take(self, derived: Derived) -> list[Contribution]:
        """Return the uses of a tensor that is computed from parameters, now that all are known."""
        return self._derived.pop(derived, [])

    def finish(self) -> None:
        """Compute the norms of the parameters whose uses were held."""
        for key, contributions in self._held.items():
            self.sqnorm[key] = _held_sqnorm(contributions)
        self._held.clear()

    def add_examples(self, parameters: Mapping[int, nn.Parameter], begin: int, gradients: Mapping[int, Tensor]) -> None:
        """Take note of gradients, ``[n, *shape]``, of examples from ``begin`` on, by the ``id`` of each parameter."""
        for key, gradient in gradients.items():
            rows = gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()
            norms, end = Rows(rows).sqnorm(), begin + len(rows)
            if key not in self.sqnorm:
                self.sqnorm[key] = norms.new_zeros(self.batch)
            self.sqnorm[key][begin:end] = norms
            if self.weight_grads and self.groups is not None:
                rows = rows.to(accumulated(rows.dtype))
                self._groups_of(parameters[key]).index_add_(0, self.groups.ids[begin:end], rows)

    def forget(self, parameters: Mapping[int, nn.Parameter]) -> None:
        """Forget what was noted of parameters, given by their ``id``."""
        for key in parameters:
            self.sqnorm.pop(key, None)
            self.group_grad.pop(key, None)

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
            weight.view_of(total).add_(part)


class GradientPass(BackwardPass):
    """A backward pass for one example, or for a group: gradients of some parameters only, and no norms."""

    per_example = False

    def __init__(self, backward: BackwardPass, wanted: Mapping[int, nn.Parameter]) -> None:
        several_rows, constant_statistics = backward.several_rows, backward.constant_statistics
        super().__init__(backward.batch, None, True, {}, dict(wanted), several_rows, constant_statistics)

    def wants(self, weight: ParameterView) -> bool:
        """Return whether it is one of these parameters, or computed from one."""
        return any(id(parameter) in self.slow for parameter in weight.parameters)

    def record(self, weight: ParameterView, contribution: Contribution) -> Tensor | None:
        """Take no note."""
        return contribution.total().to(weight.tensor.dtype) if self.wants(weight) else None


def _held_sqnorm(contributions: list[tuple[ParameterView, Contribution]]) -> Tensor:
    """Return the squared norm of the sum of uses of views of one parameter; views that do not overlap just add up."""
    places: dict[tuple[object, ...], list[Contribution]] = defaultdict(list)
    views: dict[tuple[object, ...], ParameterView] = {}
    for weight, contribution in contributions:
        place = (weight.tensor.shape, weight.tensor.stride(), weight.tensor.storage_offset())
        places[place].append(contribution)
        views[place] = weight
    parameter = contributions[0][0].parameter
    touched = torch.zeros(parameter.shape, dtype=torch.int8)
    for weight in views.values():
        weight.view_of(touched).add_(1)
    if len(places) == 1 or not (touched > 1).any():
        return torch.stack([combined_sqnorm(contributions) for contributions in places.values()]).sum(0)
    batch, dtype = contributions[0][1].batch, contributions[0][1].dtype
    norms = torch.zeros(batch, dtype=dtype, device=parameter.device)
    for example in range(batch):
        gradient = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
        for weight, contribution in contributions:
            weight.view_of(gradient).add_(contribution.gradients(example, example + 1)[0])
        norms[example] = Rows(gradient[None]).sqnorm()[0]
    return norms
