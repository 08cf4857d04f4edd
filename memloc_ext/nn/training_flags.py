"""Borrow a model: run it, or change its training flags, and have everything put back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def kept_training_flags(model: nn.Module) -> Iterator[None]:
    """Give every module of ``model`` its ``training`` flag back after the ``with``, also on an error."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextlib.contextmanager
def kept_state(model: nn.Module) -> Iterator[None]:
    """Give ``model`` its training flags and buffers, and the generators their states, back after the ``with``."""
    held = [(module._buffers, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    try:
        with kept_training_flags(model), torch.random.fork_rng(devices=devices):
            yield
    finally:
        for names, name, buffer in held:  # another tensor may have been put in its place
            names[name] = buffer
        with torch.no_grad():
            for buffer, kept in buffers:
                if not torch.equal(buffer, kept):
                    buffer.copy_(kept)


def generator_states(device: torch.device) -> list[Tensor]:
    """Return the states of the generators that a model on a device can draw from."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states
