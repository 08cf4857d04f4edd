"""The authors' search for the units that flip an example, spelled out: a backward pass over a batch for every step."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

Filter = tuple[str, int]


@dataclass(frozen=True)
class AuthorsSearch:
    """What `authors_search` found for one example.

    Attributes:
        units: ``(layer, filter)`` in the order in which they were zeroed.
        losses: Cross-entropy of the example without noise: of the unchanged network, then after each unit.
        predicted: Class with the largest logit, without noise, likewise. The search flipped the example if the last
            one is not its label, else no unit is left or the cap is reached.
    """

    units: list[Filter]
    losses: list[float]
    predicted: list[int]


def authors_search(
    model: nn.Module,
    x: Tensor,
    y: int,
    reference: tuple[Tensor, Tensor],
    *,
    position: int | None = None,
    layers: Sequence[str] | None = None,
    max_units: int = 50,
    eot: int = 5,
    noise: float = 0.01,
    seed: int = 0,
) -> AuthorsSearch:
    r"""Zero filters of a copy of the model, one at a time, until the prediction of an example changes.

    With B reference examples, of which the example may be one, and losses of logits that are averaged over the draws,
    the objective is ``L = (1/B) sum_{j != i} loss_j - loss_i``. The score of a filter is ``sum(w * dL/dw)`` over its
    weights: what L falls by, to first order, when they are zeroed. The filter with the largest score is zeroed and
    never looked at again. Its bias and its batch normalisation stay, and batch-norm statistics do not change.

    Where the published description says nothing, the prediction is that of the example without noise, and every image
    has its own draws, anew in each step.

    Args:
        model: Returns logits ``[batch, classes]``; its values are copied.
        x: The example, without a batch dimension.
        y: Its label.
        reference: Examples ``[B, *]`` and labels ``[B]``.
        position: Of the example in ``reference``; None if it is not in it.
        layers: Names of the convolutions and linear layers whose filters or rows are the units; by default all but the
            last linear layer.
        max_units: Largest number of units.
        eot: Draws of the noise.
        noise: Norm of each image's Gaussian noise over that of the image.
        seed: Of the noise.

    Source: Maini et al., "Can Neural Network Memorization Be Localized?", ICML 2023: the neurons that flip an example.
    """
    model, generator = copy.deepcopy(model).eval(), torch.Generator().manual_seed(seed)
    names = _layers(model) if layers is None else list(layers)
    weights = {name: model.get_submodule(name).get_parameter("weight").requires_grad_() for name in names}
    removed = {name: torch.zeros(len(w), dtype=torch.bool, device=w.device) for name, w in weights.items()}
    inputs, labels = reference
    shares = inputs.new_full((len(labels),), 1 / len(labels))
    if position is None:
        inputs, labels = torch.cat([inputs, x[None]]), torch.cat([labels, labels.new_tensor([y])])
        shares, position = torch.cat([shares, shares.new_zeros(1)]), len(labels) - 1
    shares[position] = -1
    losses, predicted, units = [], [], list[Filter]()
    while True:
        with torch.no_grad():
            logits = model(x[None])
        losses.append(float(functional.cross_entropy(logits, labels[position : position + 1])))
        predicted.append(int(logits.argmax()))
        if predicted[-1] != y or len(units) == max_units or all(bool(gone.all()) for gone in removed.values()):
            return AuthorsSearch(units, losses, predicted)
        draws = [model(_noisy(inputs, noise, generator)) for _ in range(eot)]
        each = functional.cross_entropy(torch.stack(draws).mean(0), labels, reduction="none")
        grads = torch.autograd.grad((each * shares).sum(), list(weights.values()))
        best, chosen = -torch.inf, units[-1] if units else ("", 0)
        for (name, weight), grad in zip(weights.items(), grads, strict=True):
            scores = (weight.detach() * grad).flatten(1).sum(1).masked_fill(removed[name], -torch.inf)
            if float(scores.max()) > best:
                best, chosen = float(scores.max()), (name, int(scores.argmax()))
        layer, unit = chosen
        with torch.no_grad():
            weights[layer][unit] = 0
        removed[layer][unit] = True
        units.append(chosen)


def _layers(model: nn.Module) -> list[str]:
    kinds = nn.modules.conv._ConvNd | nn.Linear
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    last = max((i for i, name in enumerate(names) if isinstance(model.get_submodule(name), nn.Linear)), default=None)
    return [name for i, name in enumerate(names) if i != last]


def _noisy(images: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    if noise == 0:
        return images
    draws = torch.randn(images.shape, generator=generator, dtype=images.dtype).to(images.device)
    norms = (t.flatten(1).norm(dim=1).reshape(-1, *[1] * (images.dim() - 1)) for t in (images, draws))
    size, length = norms
    return images + draws * (noise * size / length)
