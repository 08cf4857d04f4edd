"""Whether a compiled model can be trained: compilers have returned zeros as gradients of convolutions, silently."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from memloc_ext import distributed
from memloc_ext.batches import Batch, call
from memloc_ext.borrowing import generator_states, kept_state
from memloc_ext.examples import Examples
from memloc_ext.nn.example_ids import example_ids
from memloc_ext.tasks import Task, example_losses
from memloc_ext.training.config import TrainConfig
from memloc_ext.training.epoch import batch_sizes

_TOLERANCE = 0.1
"""Largest error of a gradient, relative to its norm: far above the rounding of float32, far below a wrong one's 1."""
_SMALL = 0.01
"""Share of the norm of all gradients together below which one's own does not count: it may be rounding alone."""

Forward = Callable[..., Any]


def check_gradients(model: nn.Module, compiled: Forward, data: Examples, config: TrainConfig, task: Task) -> None:
    """Compare the gradients of a compiled model with those of the model itself, in training mode.

    Under autocast both are compared with those in float32, and the compiled ones may err twice as much.
    This is done for both sizes of batch that a training has, since each is compiled by itself. A model that draws
    random numbers is not checked: compiled it draws others. Parameters, buffers and generators stay as they are. Of
    several processes each looks at its own slice.

    Raises:
        ValueError: If a gradient differs by more than rounding; names it.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for examples in dict.fromkeys(batch_sizes(model, len(data), config.batch_size)):
        rows = torch.arange(examples).tensor_split(distributed.world_size())[distributed.rank()]
        errors = _errors(model, compiled, data.batch(rows), config, task) if names and len(rows) else torch.zeros(1)
        worst = int(errors.argmax())
        if errors[worst] > _TOLERANCE:
            raise ValueError(
                "train: compile must be False (leave out --compile) for this model with this torch: compiled, in a "
                f"batch of {len(rows)}, the gradient of {names[worst]} is off by {float(errors[worst]):.2g} times its "
                "norm; another batch_size may do"
            )


def _errors(model: nn.Module, compiled: Forward, batch: Batch, config: TrainConfig, task: Task) -> Tensor:
    """Return each parameter's relative error, less what is allowed for the precision; 0 where nothing can be said."""
    exact, draws = _gradients(model, model, batch, "float32", task)
    norms = torch.stack([gradient.norm() for gradient in exact])
    if draws or not norms.isfinite().all() or not norms.any():  # not finite: the training itself says so
        return torch.zeros(len(norms))
    scale, plain = norms.clamp(min=_SMALL * norms.norm()), exact
    if config.precision != "float32":
        plain, _ = _gradients(model, model, batch, config.precision, task)
    actual, _ = _gradients(model, compiled, batch, config.precision, task)
    allowed, errors = (
        torch.stack([(g - e).norm() for g, e in zip(gradients, exact, strict=True)]) / scale
        for gradients in (plain, actual)
    )
    return torch.where(allowed.isfinite(), (errors - 2 * allowed).nan_to_num(torch.inf), 0.0)


def _gradients(
    model: nn.Module, forward: Forward, batch: Batch, precision: str, task: Task
) -> tuple[list[Tensor], bool]:
    """Return those of the loss summed over some examples, zeros where there is none, and whether the model drew."""
    device = batch.ids.device
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with kept_state(model), torch.enable_grad(), example_ids(batch.ids):
        model.train()
        drawn = generator_states(device)
        with torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32"):
            loss = example_losses(task, call(forward, batch.x), batch.y, len(batch.ids)).sum()
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        draws = any(not torch.equal(*pair) for pair in zip(generator_states(device), drawn, strict=True))
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)], draws
