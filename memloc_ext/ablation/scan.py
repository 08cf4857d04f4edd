"""The loss of every example under switching off every unit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from memloc_ext.ablation.model_runs import one_by_one
from memloc_ext.ablation.network import HOWS, Network, Query
from memloc_ext.ablation.recording import UnsupportedError
from memloc_ext.ablation.recording_cache import with_network
from memloc_ext.ablation.signature import Judged, check_examples, given
from memloc_ext.ops.ablation import linear_ablation_loss
from memloc_ext.tasks import Task, TaskName, task_of


class AblationLosses(dict[str, Judged]):
    """Site name to what its units do, in the order in which the network computes the sites.

    ``losses[site].loss``, ``.right`` and ``.predicted`` are ``[units, batch]``, see `Judged`: of each example with that
    one unit switched off.

    Attributes:
        base_loss: ``[batch]``, of each example in the unchanged network.
        base_right: ``[batch]``, bool.
        base_predicted: ``[batch]``, int64; None for other tasks than classification.
        channel_dims: Site name to the dimension of its units, for `apply_ablation`.
    """

    def __init__(self, base: Judged, sites: Mapping[str, Judged], channel_dims: Mapping[str, int]) -> None:
        super().__init__(sites)
        self.base_loss, self.base_right, self.base_predicted = base
        self.channel_dims = dict(channel_dims)


def ablation_losses(
    model: nn.Module,
    x: Any,
    y: Tensor,
    sites: Sequence[str] | None = None,
    how: str = "zero",
    *,
    task: TaskName | Task = "classification",
    reference: Any = None,
    memory_budget: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> AblationLosses:
    """Return the exact loss of every example with every unit of some sites switched off, one unit at a time.

    The model runs in evaluation mode and is left as it was. What lies before a site is computed once; where a
    convolution or linear layer meets the one changed channel, only that channel's part is computed anew; the rest runs
    for many variants at a time. What cannot be run so (a model that reads activations into Python, or whose examples
    meet in evaluation mode, or recurrent layers) takes one forward pass of the whole batch per unit, with a warning.

    Args:
        model: Returns what the task reads: for named ones logits, as a tensor, an object or mapping with ``logits``,
            or a tuple that begins with them.
        x: What the model is called with, on its device: a tensor, a tuple (``model(*x)``) or a mapping (``model(**x)``)
            of tensors ``[batch, *]``. Values of it that are no tensors are passed on.
        y: Labels, ``[batch]``, or as the task has them ``[batch, *]``; int64 for named tasks.
        sites: Names of modules; ``<module>.heads`` for the attention heads of one that calls
            `torch.nn.functional.scaled_dot_product_attention`. Units are the channels of what a module returns: those
            of an image, else the last dimension. By default the output of every convolution with its normalisation and
            activation, of every hidden linear layer, and all attention heads.
        how: What a unit is replaced by: ``zero``; ``mean``, its mean over the reference examples and all positions; or
            ``filter``: the weights of its convolution or linear layer, which serve no other call, are zero, before any
            normalisation.
        task: ``classification``, ``tokens``, or an object with ``loss`` and ``right``, see `memloc_ext.tasks`.
        reference: Examples for ``mean``, of the form of ``x``; by default ``x``.
        memory_budget: Bytes of activations that may be held at a time, the results not counted. By default 1 GiB, and
            on a GPU a quarter of the memory that is free at the first call, at most 16 GiB.
        progress: Called with the number of units that are done, each time some are, for long scans.

    Returns:
        Site name to losses ``[units, batch]``, whether each example is right, and predicted classes, with those of the
        unchanged network beside them.

    Raises:
        TypeError: If ``y`` is not int64.
        ValueError: If an argument breaks the above, the budget is too small for one example, or the unchanged
            network's logits or losses are not finite.

    Source: Maini et al., "Can Neural Network Memorization Be Localized?", ICML 2023: the neurons that flip an example.
    """
    task, progress = task_of(task), progress or (lambda _: None)
    check_examples("ablation_losses", task, x, y)
    if how not in HOWS:
        raise ValueError(f"ablation_losses: how must be one of {', '.join(HOWS)}, got {how!r}")
    tensors, signature = given(x)
    others = tensors if reference is None else given(reference)[0]
    query = Query(task, sites, how, memory_budget)
    try:
        with torch.no_grad():
            use = partial(_by_graph, model=model, inputs=tensors, y=y, reference=others, progress=progress)
            return with_network(model, tensors, signature, query, use)
    except UnsupportedError as error:
        message = f"ablation_losses: {error}; running the model once per unit instead"
        warnings.warn(message, UserWarning, stacklevel=2)
        reason = error
    return AblationLosses(*one_by_one(model, tensors, signature, y, query, others, reason, progress))


def _counted(tell: Callable[[int], object], examples: int) -> Callable[[int], None]:
    """Return what counts pairs of a unit and an example, and tells how many units are done."""
    done = 0

    def count(pairs: int) -> None:
        nonlocal done
        before, done = done, done + pairs
        if done // examples > before // examples:
            tell(done // examples - before // examples)

    return count


def _by_graph(
    network: Network,
    model: nn.Module,
    inputs: Sequence[Tensor],
    y: Tensor,
    reference: Sequence[Tensor],
    progress: Callable[[int], object],
) -> AblationLosses:
    baselines = network.baselines(reference)
    step, parts, base, done = network.examples_at_once, [], [], _counted(progress, len(y))
    for begin in range(0, len(y), step):
        some, labels = [t[begin : begin + step] for t in inputs], y[begin : begin + step]
        unchanged = network.graph.examples(some, network.needed)
        base.append(network.judge_unchanged(model, some, unchanged, labels))
        scans = [_scan_features if features else _scan for features in network.ends_in_feature]
        parts.append([scans[i](network, i, unchanged, labels, b, done) for i, b in enumerate(baselines)])
    sites = {site.name: Judged.joined([part[i] for part in parts], 1) for i, site in enumerate(network.sites)}
    return AblationLosses(Judged.joined(base), sites, {site.name: site.dim for site in network.sites})


def _scan(
    network: Network, index: int, unchanged: dict[int, Tensor], y: Tensor, baseline: Tensor, done: Callable[[int], None]
) -> Judged:
    """Return what the examples are worth without each unit of a site, ``[units, examples]``."""
    units, n, suffix = network.sites[index].units, len(y), network.suffixes[index]
    parts = []
    for rows, chosen in _grid(units, n, network.rows_at_once[index], y.device):
        slab = network.slab(index, chosen, baseline)
        parts.append(network.judge(suffix.run(unchanged, rows, slab), y[rows]))
        done(len(rows))
    return Judged.joined(parts).map(lambda t: t.reshape(units, n))


def _scan_features(
    network: Network, index: int, unchanged: dict[int, Tensor], y: Tensor, baseline: Tensor, done: Callable[[int], None]
) -> Judged:
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
        done(len(rows))
    bias = None if head.bias is None else head.bias * suffix.factor
    loss, predicted = linear_ablation_loss(features, head.weight * suffix.factor, bias, y, changed)
    return Judged(loss[feature], (predicted == y)[feature], predicted[feature])


def _grid(units: int, examples: int, step: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield example and unit of every pair of them, so many pairs at a time, unit by unit."""
    for begin in range(0, units * examples, step):
        flat = torch.arange(begin, min(units * examples, begin + step), device=device)
        yield flat % examples, flat // examples
