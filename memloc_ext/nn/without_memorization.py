"""The model that remains when memorization channels are off, as a smaller one."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memloc_ext.batches import call, tensors_of
from memloc_ext.borrowing import check_whole, without_fast_path
from memloc_ext.nn.example_tied_dropout import ExampleTiedDropout, FixedDropout, set_dropout_mode
from memloc_ext.nn.insert import DROPOUT
from memloc_ext.nn.removal.folding import Factors, ScaleFolding
from memloc_ext.nn.removal.kept import drop_only, find_kept, find_zeros, outer, project
from memloc_ext.nn.removal.recording import Recorder, Step, Value
from memloc_ext.nn.removal.surgery import forget, remove, slice_parameters, swap


def without_memorization(model: nn.Module, example: Any) -> nn.Module:
    """Return a copy of a model without its memorization channels, which computes what mode ``drop`` does.

    Filters, neurons and their biases and normalisations are gone, and so are the inputs of the next layers that read
    them; ``rescale`` is in the weights. The copy has no module of this library in it, but those of the user's model,
    whose classes and parameter names it keeps. It is in evaluation mode; ``torch.export`` and ONNX take it.

    A channel goes where all that reads it sees 0. One that is needed elsewhere, such as in a residual sum with other
    channels, stays: its weights are 0 if only this site reads them, else its activations are multiplied by 0, by a
    `torch.fx.GraphModule` in the place of the dropout. Channels before a batch norm, of which it makes constants, stay
    as well. ``copy.memorization_removed`` says what has happened, in plain Python::

        {"sites": {"conv1": {"channels": 64, "removed": 52, "masked": 0}, ...},
         "parameters": {"conv1.0.weight": {"before": [64, 3, 3, 3], "after": [12, 3, 3, 3]}, ...}}

    Which channels belong together is read from the operators of one pass, so that any module is followed. A model whose
    code has the sizes of its layers written into it keeps the channels of the sites where that fails. `FixedDropout`
    is a mask like any other here.

    Args:
        model: With an `ExampleTiedDropout` or several, see `insert_example_tied_dropout`. It is left as it was.
        example: What the model is called with: a tensor, ``(*args,)``, or a mapping of keyword arguments. A few
            examples are enough.

    Raises:
        ValueError: If the model has no such dropout, is sharded, or computes something else without it.
        TypeError: If ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"without_memorization: model must be a torch.nn.Module, got {type(model).__name__}")
    check_whole(model)
    full = copy.deepcopy(model).eval()
    names = [name for name, module in full.named_modules() if isinstance(module, ExampleTiedDropout | FixedDropout)]
    if not names:
        raise ValueError("without_memorization: model must have an ExampleTiedDropout, got none")
    set_dropout_mode(full, "drop")
    with torch.no_grad(), without_fast_path():
        factors, expected = _factors(full, names, example)
        whole = [name for name, factor in factors.items() if bool(factor.any())]
        sliced = _attempt(full, factors, whole, example, expected)
        if sliced is None:
            allowed: list[str] = []
            for name in whole:
                if _attempt(full, factors, [*allowed, name], example, expected) is not None:
                    allowed.append(name)
            sliced = _attempt(full, factors, allowed, example, expected)
    if sliced is None:
        raise ValueError(
            "without_memorization: model must compute the same for the same input in evaluation mode, as its copy with "
            "weights in place of the dropout; it does not for this example"
        )
    return sliced


class _Factor(nn.Module):
    """Stands for a dropout while a pass is recorded."""

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.factor = nn.Buffer(factor)

    def forward(self, x: Tensor, example_ids: Tensor | None = None) -> Tensor:
        return x * self.factor


def _factors(model: nn.Module, names: Sequence[str], example: Any) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return by what each dropout that is called multiplies the channels, and what the model returns."""
    found: dict[str, Tensor] = {}
    handles = []
    for name in names:
        module = model.get_submodule(name)
        assert isinstance(module, ExampleTiedDropout | FixedDropout)

        def hook(module: Any, args: Any, _: Any, name: str = name) -> None:
            dim, _ = module.dim_and_kept(args[0])
            dim %= args[0].dim()
            shape = [1] * args[0].dim()
            shape[dim] = -1
            ones = args[0].new_ones(args[0].shape[dim]).view(shape)
            factor = module.forward(ones)[0] if dim else module.forward(ones)
            if name in found and not torch.equal(found[name], factor):
                raise ValueError(f"without_memorization: {name} must see as many channels in each call")
            found[name] = factor

        handles.append(module.register_forward_hook(hook))
    try:
        expected = tensors_of(call(model, example))
    finally:
        for handle in handles:
            handle.remove()
    return found, expected


def _attempt(
    full: nn.Module, factors: dict[str, Tensor], allowed: Sequence[str], example: Any, expected: list[Tensor]
) -> nn.Module | None:
    """Return the copy in which the channels of the allowed sites are gone; None if it computes something else."""
    model = copy.deepcopy(full)
    standing = {name: _Factor(factor) for name, factor in factors.items()}
    for name, factor in standing.items():
        swap(model, model.get_submodule(name), factor)
    recorder = Recorder()
    with recorder:
        outputs = tensors_of(call(model, example))
    sites = {name: recorder.value(module.factor) for name, module in standing.items()}
    own = [recorder.value(tensor) for tensor in (*model.parameters(), *model.buffers())]
    recorder.close(own, outputs)
    _drop(recorder.steps, [sites[name] for name in allowed])
    if any(len(keep) and not keep.any() for value in own if value.uses for keep in value.keep):
        return None  # sites that together leave nothing of a layer
    masks = _fold(sites, set(own) - set(sites.values()))
    changed = slice_parameters(model, {id(value.tensor): value for value in own if value.uses})
    parameters = {name: shapes for name, shapes in changed.items() if name.rpartition(".")[0] not in standing}
    report = {}
    for name, value in sites.items():
        keep = max(value.keep, key=len)
        masked = int((value.tensor.flatten()[torch.from_numpy(keep)] == 0).sum())
        removed = {"channels": len(keep), "removed": int((~keep).sum()), "masked": masked}
        report[name.removesuffix(f".{DROPOUT}")] = removed
    for old in [m for m in model.modules() if isinstance(m, _Factor | ExampleTiedDropout | FixedDropout)]:
        needed = any(old is standing.get(name) for name in masks)
        remove(model, old, old.factor if needed and isinstance(old, _Factor) else None)
    forget(model)
    model.memorization_removed = {"sites": report, "parameters": parameters}  # pyright: ignore[reportArgumentType]
    try:
        actual = tensors_of(call(model, example))
    except Exception:  # whatever its code raises with other sizes
        return None
    return model if _agree(actual, expected) else None


def _drop(steps: Sequence[Step], sites: Sequence[Value]) -> None:
    """Leave to go, of all that a pass used, what belongs together with the zeros of some sites."""
    for site in sites:
        site.zero = project(site.tensor.cpu() == 0, torch.all)
    find_zeros(steps)
    find_kept(steps)
    drop_only(steps, [((site, dim), zero) for site in sites for dim, zero in enumerate(site.zero)])


def _fold(sites: dict[str, Value], parameters: Collection[Value]) -> list[str]:
    """Multiply parameters by what the sites multiply their channels by; return the sites where that is not possible."""
    folding, found, left = ScaleFolding(parameters), Factors(), []
    for name, site in sites.items():
        keep = torch.from_numpy(outer(site.keep))
        staying = site.tensor.cpu()[keep]
        factor = torch.where(keep, site.tensor.cpu(), staying[0])  # the others go
        if bool((factor == 1).all()):
            continue
        taken = folding.fold(site, factor)
        if taken is None:
            left.append(name)
        else:
            found += taken
    for value, scale in found:
        value.tensor.mul_(scale.to(value.tensor))
    return left


def _agree(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    if [t.shape for t in actual] != [t.shape for t in expected]:
        return False
    for one, other in zip(actual, expected, strict=True):
        if not one.is_floating_point():
            same = torch.equal(one, other)
        else:
            finite = other[other.isfinite()].abs()
            allowed = torch.finfo(one.dtype).eps ** 0.5 * float(finite.max() if finite.numel() else 1)
            same = torch.allclose(one, other, rtol=0, atol=allowed, equal_nan=True)
        if not same:
            return False
    return True
