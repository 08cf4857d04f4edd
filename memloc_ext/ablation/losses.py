"""The loss of every example under switching off every unit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memloc_ext.ablation.network import HOWS, Network, given
from memloc_ext.ablation.one_by_one import one_by_one
from memloc_ext.ablation.recording import UnsupportedError
from memloc_ext.ops.ablation import linear_ablation_loss


@dataclass(frozen=True)
class SiteLosses:
    """What switching off the units of one site does.

    Attributes:
        loss: ``[units, batch]``, cross-entropy of each example with that one unit switched off.
        predicted: ``[units, batch]``, int64: the class with the largest logit then.
    """

    loss: Tensor
    predicted: Tensor


class AblationLosses(Mapping[str, SiteLosses]):
    """Site name to its `SiteLosses`, in the order in which the network computes the sites.

    Attributes:
        base_loss: ``[batch]``, cross-entropy of each example in the unchanged network.
        base_predicted: ``[batch]``, int64.
        channel_dims: Site name to the dimension of its units, for `apply_ablation`.
    """

    def __init__(
        self,
        base_loss: Tensor,
        base_predicted: Tensor,
        sites: Mapping[str, SiteLosses],
        channel_dims: Mapping[str, int],
    ) -> None:
        self.base_loss, self.base_predicted = base_loss, base_predicted
        self._sites, self.channel_dims = dict(sites), dict(channel_dims)

    def __getitem__(self, site: str) -> SiteLosses:
        """Return the losses of a site."""
        return self._sites[site]

    def __iter__(self) -> Iterator[str]:
        """Return the names of the sites."""
        return iter(self._sites)

    def __len__(self) -> int:
        """Return the number of sites."""
        return len(self._sites)


def ablation_losses(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    sites: Sequence[str] | None = None,
    how: str = "zero",
    *,
    reference: Tensor | None = None,
    memory_budget: int = 1 << 30,
    progress: Callable[[int], object] | None = None,
) -> AblationLosses:
    """Return the exact loss of every example with every unit of some sites switched off, one unit at a time.

    The model runs in evaluation mode and is left as it was. What lies before a site is computed once; where a
    convolution or linear layer meets the one changed channel, only that channel's part is computed anew; the rest runs
    for many variants at a time. What cannot be run so (a model that reads activations into Python, or whose examples
    meet in evaluation mode, or recurrent layers) takes one forward pass of the whole batch per unit, with a warning.

    Args:
        model: Returns logits ``[batch, classes]``: a tensor, an object or mapping with ``logits``, or a tuple that
            begins with them.
        x: ``[batch, *]``, on the model's device.
        y: Classes, ``[batch]``, int64.
        sites: Names of modules; ``<module>.heads`` for the attention heads of one that calls
            `torch.nn.functional.scaled_dot_product_attention`. Units are the channels of what a module returns: those
            of an image, else the last dimension. By default the output of every convolution with its normalisation and
            activation, of every linear layer that feeds another, and all attention heads.
        how: What a unit is replaced by: ``zero``; ``mean``, its mean over the reference examples and all positions; or
            ``filter``: the weights of its convolution or linear layer, which serve no other call, are zero, before any
            normalisation.
        reference: Examples for ``mean``, ``[*, *]``; by default ``x``.
        memory_budget: Bytes of activations that may be held at a time, the results not counted.
        progress: Called with the number of units that are done, each time some are, for long scans.

    Returns:
        Site name to losses ``[units, batch]`` and predicted classes, with those of the unchanged network beside them.

    Raises:
        TypeError: If ``y`` is not int64.
        ValueError: If an argument breaks the above, the budget is too small for one example, or the unchanged
            network's logits are not finite.

    Source: Maini et al., "Can Neural Network Memorization Be Localized?", ICML 2023: the neurons that flip an example.
    """
    check_examples("ablation_losses", x, y)
    if how not in HOWS:
        raise ValueError(f"ablation_losses: how must be one of {', '.join(HOWS)}, got {how!r}")
    progress = progress or _nothing
    try:
        network = Network(model, x, sites, how, memory_budget)
        with torch.no_grad():
            return _by_graph(model, network, x, y, reference, progress)
    except UnsupportedError as error:
        message = f"ablation_losses: {error}; running the model once per unit instead"
        warnings.warn(message, UserWarning, stacklevel=2)
        reason = error
    logits, variants = one_by_one(model, x, sites, how, x if reference is None else reference, reason, progress)
    base = judge(check_logits(logits, y), y)
    found = {
        site.name: SiteLosses(*(torch.stack(t) for t in zip(*(judge(rows, y) for rows in units), strict=True)))
        for site, units in variants.items()
    }
    return AblationLosses(*base, found, {site.name: site.dim for site in variants})


def _nothing(_: int) -> None:
    pass


class _Progress:
    """Tells how many units are done, of which each takes a pair with every example."""

    def __init__(self, tell: Callable[[int], object], examples: int) -> None:
        self._tell, self._examples, self._pairs = tell, examples, 0

    def add(self, pairs: int) -> None:
        """Count pairs that are done."""
        before, self._pairs = self._pairs // self._examples, self._pairs + pairs
        if self._pairs // self._examples > before:
            self._tell(self._pairs // self._examples - before)


def _by_graph(
    model: nn.Module,
    network: Network,
    x: Tensor,
    y: Tensor,
    reference: Tensor | None,
    progress: Callable[[int], object],
) -> AblationLosses:
    inputs = given(x)
    baselines = network.baselines(inputs if reference is None else given(reference))
    step, parts, base, done = network.examples_at_once, [], [], _Progress(progress, len(x))
    for begin in range(0, len(x), step):
        some, classes = [t[begin : begin + step] for t in inputs], y[begin : begin + step]
        unchanged = network.unchanged(some, recorded=begin == 0)
        logits = check_logits(unchanged[network.output][:, 0], classes)
        network.check_agreement(model, some, logits)
        base.append(judge(logits, classes))
        scans = [_scan_features if features else _scan for features in network.ends_in_feature]
        parts.append([scans[i](network, i, unchanged, classes, b, done) for i, b in enumerate(baselines)])
    sites = {}
    for i, site in enumerate(network.sites):
        losses, predicted = zip(*(part[i] for part in parts), strict=True)
        sites[site.name] = SiteLosses(torch.cat(losses, 1), torch.cat(predicted, 1))
    losses, predicted = zip(*base, strict=True)
    dims = {site.name: site.dim for site in network.sites}
    return AblationLosses(torch.cat(losses), torch.cat(predicted), sites, dims)


def _scan(
    network: Network, index: int, unchanged: dict[int, Tensor], y: Tensor, baseline: Tensor, done: _Progress
) -> tuple[Tensor, Tensor]:
    """Return losses and predictions of all units of a site, ``[units, examples]``."""
    units, n, suffix = network.sites[index].units, len(y), network.suffixes[index]
    losses, predictions = [], []
    for rows, chosen in _grid(units, n, network.rows_at_once[index], y.device):
        slab = network.slab(index, chosen, baseline)
        loss, predicted = judge(suffix.run(unchanged, rows, slab)[:, 0], y[rows])
        losses.append(loss)
        predictions.append(predicted)
        done.add(len(rows))
    return torch.cat(losses).reshape(units, n), torch.cat(predictions).reshape(units, n)


def _scan_features(
    network: Network, index: int, unchanged: dict[int, Tensor], y: Tensor, baseline: Tensor, done: _Progress
) -> tuple[Tensor, Tensor]:
    """Return the same where each unit changes one feature of the last linear layer."""
    units, n, suffix = network.sites[index].units, len(y), network.suffixes[index]
    head = suffix.head
    assert head is not None
    features = unchanged[head.input][:, 0]
    changed, feature = features.clone(), torch.empty(units, dtype=torch.int64, device=y.device)
    for rows, chosen in _grid(units, n, network.rows_at_once[index], y.device):
        state = suffix.feature(unchanged, rows, network.slab(index, chosen, baseline))
        assert state is not None
        changed[rows, state.start] = state.values.flatten().to(changed.dtype)
        feature[chosen] = state.start
        done.add(len(rows))
    bias = None if head.bias is None else head.bias * suffix.factor
    loss, predicted = linear_ablation_loss(features, head.weight * suffix.factor, bias, y, changed)
    return loss[feature], predicted[feature]


def _grid(units: int, examples: int, step: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield example and unit of every pair of them, so many pairs at a time, unit by unit."""
    for begin in range(0, units * examples, step):
        flat = torch.arange(begin, min(units * examples, begin + step), device=device)
        yield flat % examples, flat // examples


def judge(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's cross-entropy and predicted class."""
    return F.cross_entropy(wide(logits), y, reduction="none"), logits.argmax(1)


def wide(t: Tensor) -> Tensor:
    """Return a tensor in the type that losses are computed in: float64 as it is, else float32."""
    return t if t.dtype == torch.float64 else t.float()


def check_examples(name: str, x: Tensor, y: Tensor) -> None:
    """Raise unless there is a label for each of at least one example."""
    if y.dtype != torch.int64:
        raise TypeError(f"{name}: y must have dtype int64, got {y.dtype}")
    if y.dim() != 1 or len(y) != len(x) or len(x) == 0:
        raise ValueError(
            f"{name}: x and y must have the same number of examples, at least one; "
            f"got shapes {list(x.shape)} and {list(y.shape)}"
        )


def check_logits(logits: Tensor, y: Tensor) -> Tensor:
    """Return logits if they are ``[batch, classes]``, finite and of the classes of ``y``."""
    if logits.dim() != 2:
        raise ValueError(f"the model must return logits [batch, classes], got {list(logits.shape)}")
    if not bool(logits.isfinite().all()):
        raise ValueError("the model's logits must be finite, got NaN or infinity in the unchanged network")
    check_classes("y", y, logits)
    return logits


def check_classes(name: str, y: Tensor, logits: Tensor) -> None:
    """Raise unless labels are of the classes of ``[batch, classes]``."""
    if bool(((y < 0) | (y >= logits.shape[1])).any()):
        raise ValueError(f"{name} must be in [0, {logits.shape[1]}), got values from {int(y.min())} to {int(y.max())}")
