"""Other ways to the squared norms of per-example gradients, each as its authors mean it to be used.

Each takes a `Workload` and returns a `Step`, or None where its package is not installed or does not know the model.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from bench.workloads import Step, Workload


def one_by_one(workload: Workload) -> Step:
    """Take a backward pass for each example."""
    model = workload.model

    def step() -> dict[str, Tensor]:
        norms: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
        for i in range(len(workload.inputs)):
            one = slice(i, i + 1)
            x = workload.inputs[one].detach().requires_grad_(workload.input_grad)
            loss = workload.losses(model(x), workload.targets[one]).sum()
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            for name, gradient in zip(norms, gradients, strict=True):
                norms[name].append(gradient.square().sum())
        return {name: torch.stack(values) for name, values in norms.items()}

    return step


def functorch(workload: Workload) -> Step:
    """Vectorise the gradient of one example over the batch with `torch.func`, eight examples at a time."""

    def norms(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: gradient.square().sum() for name, gradient in gradients.items()}

    return _functorch(workload, norms)


def per_example_gradients(workload: Workload) -> dict[str, Tensor]:
    """Return every example's gradient of every parameter, by `torch.func`."""
    return _functorch(workload, lambda gradients: gradients)()


def _functorch(workload: Workload, of: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Step:
    model = workload.model
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(values: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
        return workload.losses(functional_call(model, (values, buffers), (x[None],)), target[None]).sum()

    def one(values: dict[str, Tensor], x: Tensor, target: Tensor) -> dict[str, Tensor]:
        return of(grad(loss)(values, x, target))

    batched = vmap(one, in_dims=(None, 0, 0), chunk_size=8)
    return lambda: batched(parameters, workload.inputs, workload.targets)


def opacus_ghost(workload: Workload) -> Step | None:
    """Use Opacus' ghost norms: Grams where they are cheaper, of unfolded patches in convolutions."""
    if importlib.util.find_spec("opacus") is None:
        return None
    wrapped = _ghost(workload, 1)

    def step() -> dict[str, Tensor]:
        wrapped.zero_grad(set_to_none=True)
        workload.loss(wrapped).backward()
        wrapped.get_norm_sample()
        return {name: vars(p)["_norm_sample"].square() for name, p in wrapped._module.named_parameters()}

    return step


def opacus_clipping(workload: Workload, max_norm: int) -> Callable[[], object] | None:
    """Use Opacus' ghost clipping: norms in a first backward pass, the clipped gradient in a second."""
    if importlib.util.find_spec("opacus") is None:
        return None
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    wrapped, batch = _ghost(workload, max_norm), len(workload.inputs)
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(wrapped.parameters(), lr=0.1),
        noise_multiplier=0,
        max_grad_norm=max_norm,
        expected_batch_size=batch,
        loss_reduction="sum",
    )
    criterion = DPLossFastGradientClipping(wrapped, optimizer, nn.CrossEntropyLoss(reduction="sum"), "sum")

    def step() -> None:
        wrapped.zero_grad(set_to_none=True)
        criterion(wrapped(workload.inputs), workload.targets).backward()

    return step


def _ghost(workload: Workload, max_norm: int) -> Any:
    """Return the model in Opacus' wrapper."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    model = copy.deepcopy(workload.model).train()  # it refuses evaluation mode
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            _replace(model, name, _frozen(module))
    return GradSampleModuleFastGradientClipping(
        model, loss_reduction="sum", strict=False, max_grad_norm=max_norm, use_ghost_clipping=True
    )


def backpack(workload: Workload) -> Step | None:
    """Use BackPACK's BatchL2Grad; it knows no LayerNorm, whose norms are then missing."""
    if importlib.util.find_spec("backpack") is None:
        return None
    from backpack import backpack as extended  # pyright: ignore[reportMissingImports]
    from backpack import extend  # pyright: ignore[reportMissingImports]
    from backpack.extensions import BatchL2Grad  # pyright: ignore[reportMissingImports]

    model = extend(copy.deepcopy(workload.model))

    def step() -> dict[str, Tensor]:
        model.zero_grad()
        loss = workload.loss(model)
        with extended(BatchL2Grad()):
            loss.backward()
        return {name: vars(p)["batch_l2"] for name, p in model.named_parameters() if "batch_l2" in vars(p)}

    return step


PEERS: dict[str, Callable[[Workload], Step | None]] = {
    "one example at a time": one_by_one,
    "torch.func vmap(grad)": functorch,
    "Opacus ghost norms": opacus_ghost,
    "BackPACK BatchL2Grad": backpack,
}


def _frozen(norm: nn.BatchNorm2d) -> nn.Module:
    """Return a batch normalisation in evaluation mode that stays in it, with Opacus' rule for its gradients."""
    from opacus.grad_sample import register_grad_sampler

    frozen = _Frozen(norm)

    @register_grad_sampler(_Frozen)
    def _(layer: _Frozen, activations: list[Tensor], grad_output: Tensor) -> dict[nn.Parameter, Tensor]:
        normalised = (activations[0] - layer.mean) * layer.rstd
        return {layer.weight: (normalised * grad_output).sum((2, 3)), layer.bias: grad_output.sum((2, 3))}

    return frozen


class _Frozen(nn.Module):
    mean: Tensor
    var: Tensor
    rstd: Tensor

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.register_buffer("mean", norm.running_mean[:, None, None])
        self.register_buffer("var", norm.running_var[:, None, None])
        self.register_buffer("rstd", (norm.running_var + norm.eps).rsqrt()[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        stats = (self.mean.flatten(), self.var.flatten())
        return nn.functional.batch_norm(x, *stats, self.weight, self.bias, eps=self.eps)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
