"""Arguments and result of a backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from memloc_ext.accounting.backward_pass import BackwardPass
from memloc_ext.accounting.contributions import accumulated
from memloc_ext.accounting.losses import read
from memloc_ext.accounting.tracer import Tracer
from memloc_ext.ops import Groups

_REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class Account:
    """What one backward pass tells of its examples. Its tensors take no part in autograd.

    All but the group gradients are of the gradient of each example's *own* loss, whatever the loss of the batch was,
    and zeros for a parameter that the loss does not depend on. They are float64 for a float64 parameter, else float32.

    Attributes:
        sqnorm: Parameter name to ``[batch]``: squared L2 norm of each example's gradient.
        group_grad: Parameter name to ``[num_groups, *shape]``: what each group of examples adds to the gradient of the
            loss *as it was given*, so that their sum is the gradient of the batch; a mean loss divides by the size
            of the batch, not of the group. Empty without ``group_ids``.
        dot: Name of a direction to parameter name to ``[batch]``: inner product of each example's gradient with it.
        direction_sqnorm: Name of a direction to its squared L2 norm over all parameters, 0-d.
        inner: Inner products of the gradients of all pairs of examples over all parameters, ``[batch, batch]``; None
            without ``pairwise=True``.
        parameter_inner: Parameter name to the same for it alone, of the parameters named in ``pairwise``.
        projected: Parameter name to ``[batch, k, k']``; see `Projection`. Empty without ``project``.
        position_sqnorm: Parameter name to ``[batch, positions]``: squared norm of what each position (token) adds to
            an example's gradient. Of linear layers and embeddings whose uses have the same number of positions; those
            that take a pass per example are left out. Empty without ``per_position``.
        row_sqnorm: Parameter name to ``[batch, out]``: squared norm of each output row (neuron, filter) of each
            example's gradient, of the parameters named in ``by_row``. Rows are the first dimension: of a weight that is
            stored as ``[in, out]``, as transposed convolutions and GPT-2 do, they are the inputs.
        mean_sqnorm: Parameter name to the squared norm of the mean of the examples' gradients, 0-d. Empty where it
            does not come with the parameters' gradients: see `noise_scale`.
    """

    sqnorm: dict[str, Tensor]
    group_grad: dict[str, Tensor]
    dot: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    direction_sqnorm: dict[str, Tensor] = field(default_factory=dict)
    inner: Tensor | None = None
    parameter_inner: dict[str, Tensor] = field(default_factory=dict)
    projected: dict[str, Tensor] = field(default_factory=dict)
    position_sqnorm: dict[str, Tensor] = field(default_factory=dict)
    row_sqnorm: dict[str, Tensor] = field(default_factory=dict)
    mean_sqnorm: dict[str, Tensor] = field(default_factory=dict)

    @property
    def total_sqnorm(self) -> Tensor:
        """Squared L2 norm of each example's own gradient over all parameters, ``[batch]``."""
        return _total(self.sqnorm)

    @property
    def norms(self) -> Tensor:
        """L2 norm of each example's own gradient over all parameters, ``[batch]``."""
        return self.total_sqnorm.sqrt()

    def cosine(self, direction: str) -> Tensor:
        """Return the cosine of each example's own gradient and a direction, over all parameters, ``[batch]``.

        It is 0 where one of the two is 0.

        Raises:
            ValueError: If there is no such direction.
        """
        if direction not in self.dot:
            raise ValueError(f"Account: direction must be one of {list(self.dot)}, got {direction!r}")
        dot = _total(self.dot[direction])
        lengths = self.norms.to(dot.dtype) * self.direction_sqnorm[direction].to(dot).sqrt()
        return torch.where(lengths == 0, 0, dot / lengths)

    @property
    def noise_scale(self) -> Tensor:
        """Simple noise scale ``S / (|g|^2 - S / B)`` of the gradient over all parameters, 0-d, of whatever sign.

        ``g`` is the mean of the ``B`` examples' own gradients, ``S`` the sum of their variances.

        Raises:
            ValueError: If the mean is not known: it comes with the parameters' gradients, so with ``weight_grads`` and
                without ``max_norm``, where all examples weigh the same in the loss; or with ``pairwise=True``.

        Source: McCandlish et al., "An empirical model of large-batch training", 2018.
        """
        if self.inner is not None:
            return _noise_scale(self.total_sqnorm, self.inner.mean())
        return _noise_scale(self.total_sqnorm, _total(self._known("pairwise=True", self.mean_sqnorm)))

    @property
    def parameter_noise_scale(self) -> dict[str, Tensor]:
        """Parameter name to the `noise_scale` of its gradient alone, 0-d; else of the parameters named in ``pairwise``.

        Raises:
            ValueError: As `noise_scale`, but for ``pairwise`` with names.
        """
        pairs = {name: inner.mean() for name, inner in self.parameter_inner.items()}
        means = self._known("the names of parameters in pairwise", self.mean_sqnorm or pairs)
        return {name: _noise_scale(self.sqnorm[name], mean) for name, mean in means.items()}

    def _known(self, other: str, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the squared norms of mean gradients, if there are any."""
        if not means:
            raise ValueError(
                "Account: noise_scale needs the mean of the examples' own gradients, which comes with "
                f"weight_grads=True, without max_norm and with equal example_weights; or give {other}"
            )
        return means


def _noise_scale(sqnorm: Tensor, mean_sqnorm: Tensor) -> Tensor:
    batch = len(sqnorm)
    noise = (sqnorm.mean() - mean_sqnorm) * (batch / (batch - 1) if batch > 1 else math.nan)
    return noise / (mean_sqnorm - noise / batch)


def _total(by_parameter: dict[str, Tensor]) -> Tensor:
    """Return the sum over the parameters."""
    first, *others = by_parameter.values()
    return sum((t.to(first.device) for t in others), start=first)


@dataclass(frozen=True)
class OwnGradients:
    """How examples' own gradients follow from those that flow in a backward pass: times a factor.

    Attributes:
        batch: Number of examples.
        factor: Of all, a whole number; or of each, ``[batch]`` float64, 0 where an example has no part in the loss.
    """

    batch: int
    factor: int | Tensor

    @classmethod
    def of(cls, batch: int, loss_reduction: str, example_weights: Tensor | None) -> OwnGradients:
        """Return this for a loss of examples with these weights."""
        if example_weights is None:
            return cls(batch, batch if loss_reduction == "mean" else 1)
        wide = example_weights.double()
        return cls(batch, torch.where(wide > 0, 1 / wide, 0))

    @property
    def of_all(self) -> float | None:
        """The factor if it is the same for all examples, else None."""
        if not isinstance(self.factor, Tensor):
            return self.factor
        values = read(self.factor) or (None,)
        return values[0] if all(value == values[0] for value in values) else None

    def times(self, answers: dict[str, Tensor], power: int = 1) -> dict[str, Tensor]:
        """Return answers ``[batch, *]`` times the factor, or a power of it."""
        if isinstance(self.factor, Tensor):
            return {name: self._times_each(t, self.factor, power) for name, t in answers.items()}
        return _times(answers, self.factor**power)

    def times_pairs(self, answers: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return inner products ``[batch, batch]`` times the factors of both examples."""
        if not isinstance(self.factor, Tensor):
            return self.times(answers, 2)
        rows = self.times(answers)
        return {name: t.t() for name, t in self.times({name: t.t() for name, t in rows.items()}).items()}

    def _times_each(self, t: Tensor, factors: Tensor, power: int) -> Tensor:
        factors = factors.to(t.device).reshape(-1, *[1] * (t.dim() - 1))
        wide = t.to(torch.complex128 if t.is_complex() else torch.float64)
        for _ in range(power):  # float64 has room for squares that float32 has none for
            wide = wide * factors
        return torch.where(factors > 0, wide, 0).to(t.dtype)


def _times(answers: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    """Return answers times a factor: of the same kind as one tensor, which takes less time than one by one."""
    if not answers or factor == 1:
        return answers
    tensors = list(answers.values())
    if len({(t.shape, t.dtype, t.device) for t in tensors}) == 1:
        scaled: Sequence[Tensor] = torch.stack(tensors).mul_(factor).unbind()
    else:
        scaled = torch._foreach_mul(tensors, factor)  # pyright: ignore
    return dict(zip(answers, scaled, strict=True))


def account_of(
    named: Mapping[str, nn.Parameter], backward: BackwardPass, groups: Groups | None, own: OwnGradients
) -> Account:
    """Return what a backward pass told of every parameter that requires a gradient; zeros where it told nothing."""
    batch = own.batch

    def told(
        answers: Mapping[int, Tensor], shape: Callable[[nn.Parameter], Sequence[int]] = lambda _: (batch,)
    ) -> dict[str, Tensor]:
        """Return what was told of each parameter, by name; ``shape``: of the zeros."""
        found = {}
        for name, p in named.items():
            known = answers.get(id(p))
            if known is None:
                known = p.new_zeros(shape(p), dtype=accumulated(p.dtype).to_real())
            found[name] = known
        return found

    group_grad = {}
    if groups is not None:
        for name, p in named.items():
            sums, shape = backward.group_grad.get(id(p)), (groups.num, *p.shape)
            group_grad[name] = p.new_zeros(shape, dtype=accumulated(p.dtype)) if sums is None else sums
    means = {}
    if backward.sum_sqnorm and (factor := own.of_all) is not None:
        square = (factor / max(1, batch)) ** 2
        found = told(backward.sum_sqnorm, lambda _: ())
        means = _times(found, square)
    account, asked = Account(own.times(told(backward.sqnorm), 2), group_grad, mean_sqnorm=means), backward.queries
    if asked is None:
        return account
    by_name = {id(p): name for name, p in named.items()}

    def of_some(answers: Mapping[int, Tensor], power: int = 1) -> dict[str, Tensor]:
        return own.times({by_name[key]: t for key, t in answers.items()}, power)

    return replace(
        account,
        dot={direction: own.times(told(answers)) for direction, answers in asked.dot.items()},
        direction_sqnorm=asked.direction_sqnorm,
        inner=None if asked.inner is None else own.times_pairs({"": asked.inner})[""],
        parameter_inner=own.times_pairs({by_name[key]: t for key, t in asked.parameter_inner.items()}),
        projected=of_some(asked.projected),
        position_sqnorm=of_some(asked.position_sqnorm, 2),
        row_sqnorm=of_some(asked.row_sqnorm, 2),
    )


def batch_of(
    tracer: Tracer, loss: Tensor, loss_reduction: str, group_ids: Tensor | None, batch_size: int | None
) -> int:
    """Return the number of examples, that of the model's inputs if not told; checks what it depends on."""
    if loss_reduction not in _REDUCTIONS:
        raise ValueError(f"GradientAccountant: loss_reduction must be mean, sum or none, got {loss_reduction!r}")
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        raise ValueError(
            "GradientAccountant: loss must be a tensor that depends on a parameter that requires a gradient"
        )
    if (loss.dim() == 0) == (loss_reduction == "none"):
        rule = "one loss per example, [batch, *]," if loss_reduction == "none" else "a scalar"
        raise ValueError(
            f"GradientAccountant: loss must be {rule} for loss_reduction={loss_reduction!r}, got {list(loss.shape)}"
        )
    sizes = {
        "batch_size": batch_size,
        "group_ids": group_ids.numel() if isinstance(group_ids, Tensor) else None,
        "loss": len(loss) if loss_reduction == "none" else None,
    }
    known = {name: size for name, size in sizes.items() if size is not None}
    if len(set(known.values())) > 1:
        raise ValueError(f"GradientAccountant: sizes of the batch must agree, got {known}")
    unread = tracer.passes[-1].unread if tracer.passes else ""
    batch = batch_size if batch_size is not None else next(iter(known.values()), None if unread else tracer.batch)
    if batch is None and unread:
        raise ValueError(
            "GradientAccountant: the model must be called with tensors, or tuples, lists, mappings or dataclasses of "
            f"them, to tell the examples apart, got {unread}; or give batch_size: then every layer takes a pass per "
            "example"
        )
    if batch is None:
        raise ValueError(
            "GradientAccountant: the forward pass must run inside the with, where the first layer's input tells the "
            "size of the batch; no layer was seen there, so give batch_size"
        )
    return batch


def groups_of(
    loss: Tensor, group_ids: Tensor | None, num_groups: int | None, batch: int, exact_groups: bool
) -> Groups | None:
    """Return the groups, checked."""
    if group_ids is None:
        for name, value in (("num_groups", num_groups), ("exact_groups", exact_groups or None)):
            if value is not None:
                raise ValueError(f"GradientAccountant: {name} needs group_ids, got None")
        return None
    if isinstance(group_ids, Tensor) and (group_ids.shape != (batch,) or group_ids.device != loss.device):
        raise ValueError(
            f"GradientAccountant: group_ids must be [{batch}] on {loss.device}, got {list(group_ids.shape)} on "
            f"{group_ids.device}"
        )
    try:
        if num_groups is None:
            num_groups = max(group_ids.tolist()) + 1 if batch else 1  # which waits for a device
        return Groups(group_ids, num_groups)
    except (TypeError, ValueError) as error:
        raise type(error)(f"GradientAccountant: {error}") from None
