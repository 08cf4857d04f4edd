"""What `account_epoch` returns: the account of an epoch, of its layer groups and of its parameters."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class ParameterAccount:
    """The gradient of a parameter, summed over the batches of an epoch; 0 where there is none.

    Attributes:
        clean: ``||g_clean|| / sqrt(numel)``.
        memorized: ``||g_memorized|| / sqrt(numel)``.
        total: ``||g_clean + g_memorized|| / sqrt(numel)``.
        cosine: Of the angle between ``g_clean`` and ``g_memorized``, in ``[-1, 1]``; 0 where one of them is 0.
    """

    clean: float
    memorized: float
    total: float
    cosine: float


@dataclass(frozen=True)
class GroupAccount(ParameterAccount):
    """The gradients of several parameters over an epoch: the sums of their norms, and the mean of their cosines.

    Attributes:
        auc: Area under the ROC curve of "memorized" predicted from the norm of the example's gradient; None where there
            is no memorized or no clean example.
        clean_example_norm: Norm of a clean example's gradient, mean over them; None where there is none.
        memorized_example_norm: Likewise.
        noise_scale: ``S / |g|^2``, in examples: ``S`` is the sum of the variances of an example's gradient, ``g`` its
            mean, both free of bias and summed over the batches, which weigh as much as their examples less one. It may
            be negative where ``|g|^2`` is small; None without a batch of two.
        memorized_cosine: Cosine of a memorized example's gradient with the clean gradient so far, see
            `memloc_ext.probes.account_epoch`, mean over those that have one; None if none has, as in an epoch of one
            batch.
        memorized_cosine_q25: First quartile of these cosines.
        memorized_cosine_q50: Their median.
        memorized_cosine_q75: Third quartile.
        memorized_against: Share of the memorized examples whose cosine is negative: a step for the clean examples
            raises their loss.
        clean_against: Likewise of the clean examples.
    """

    auc: float | None
    clean_example_norm: float | None
    memorized_example_norm: float | None
    noise_scale: float | None = None
    memorized_cosine: float | None = None
    memorized_cosine_q25: float | None = None
    memorized_cosine_q50: float | None = None
    memorized_cosine_q75: float | None = None
    memorized_against: float | None = None
    clean_against: float | None = None


@dataclass(frozen=True, eq=False)
class EpochAccount:
    """The account of an epoch of N examples, on the CPU.

    Attributes:
        model: All parameters together.
        groups: Layer group to its account, from input to output.
        parameters: Parameter name to its account.
        example_norms: Norm of the gradient of each example's own loss with respect to each layer group,
            ``[N, groups]``, float32; NaN for an example whose batch overflowed in float16.
        example_cosines: Cosine of this gradient with the clean gradient so far, ``[N, groups + 1]``, float32, the last
            over all parameters; NaN in batches that were not asked for it, and where one of the two is 0 or overflowed.
        memorized: Which examples are memorized, ``[N]``, bool.
        indices: Number of each example, ``[N]``, int64, in ascending order.
    """

    model: GroupAccount
    groups: dict[str, GroupAccount]
    parameters: dict[str, ParameterAccount]
    example_norms: Tensor
    example_cosines: Tensor
    memorized: Tensor
    indices: Tensor

    @property
    def total_norms(self) -> Tensor:
        """Norm of the gradient of each example's own loss with respect to all parameters, ``[N]``, float32."""
        return self.example_norms.norm(dim=1)

    def rows(self) -> list[dict[str, Any]]:
        """Return a row per layer group: ``group``, and the numbers of its `GroupAccount`."""
        return [{"group": group, **asdict(row)} for group, row in self.groups.items()]
