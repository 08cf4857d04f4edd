"""Example-tied dropout as a module, with the modes in which the paper evaluates it; and its control, a fixed mask."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from memloc_ext.nn.example_ids import current_example_ids
from memloc_ext.nn.skipping import skipping_in_force
from memloc_ext.ops.example_tied_dropout import call, check_example_ids

Mask = Callable[[Tensor], Tensor]
MODES = ("train", "test", "drop", "drop_gen")
RESCALES = ("none", "authors", "expectation")


class _TiedChannels(nn.Module):
    """The settings of `ExampleTiedDropout` and `FixedDropout`, checked."""

    def __init__(
        self, p_gen: float = 0.2, p_mem: float = 0.1, *, seed: int = 0, site: int = 0, channel_dim: int | None = None
    ) -> None:
        super().__init__()
        _check_settings(p_gen, p_mem, seed, site, channel_dim)
        self.p_gen, self.p_mem, self.seed, self.site, self.channel_dim = p_gen, p_mem, seed, site, channel_dim

    def dim_and_kept(self, x: Tensor) -> tuple[int, int]:
        """Return the dimension of the channels, and how many are generalization channels."""
        dim = _checked_channel_dim(x, self.channel_dim)
        return dim, self.num_generalization(x.shape[dim])

    def num_generalization(self, channels: int) -> int:
        """Return how many of so many channels are generalization channels: ``floor(p_gen * channels)``."""
        return math.floor(self.p_gen * channels)

    def draw(self, channels: int) -> dict[str, Any]:
        """Return what says which of so many channels each example keeps, by the names of the operators' arguments."""
        kept = self.num_generalization(channels)
        return {"num_generalization": kept, "p_mem": self.p_mem, "seed": self.seed, "site": self.site}

    def extra_repr(self) -> str:
        """Show the settings."""
        names = ("p_gen", "p_mem", "seed", "site", "channel_dim")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


class ExampleTiedDropout(_TiedChannels):
    r"""Dropout whose mask belongs to the example, so that what is memorized goes into channels known beforehand.

    Of ``C`` channels the first ``floor(p_gen * C)`` are *generalization* channels, kept for every example. Each other
    one is a *memorization* channel, kept for an example with probability ``p_mem`` by a draw that never changes.

    Modes:
        - ``train``: each example's own mask; needs example ids. Nothing is rescaled.
        - ``test``: every channel, memorization channels multiplied by ``p_mem``.
        - ``drop``: memorization channels 0, generalization channels multiplied by ``rescale``'s factor.
        - ``drop_gen``: generalization channels 0, memorization channels as they come: the reverse probe.

    ``.train()`` selects ``train`` and ``.eval()`` selects ``drop``, until a mode is set by name; ``mode = None`` goes
    back to that.

    Args:
        p_gen: Share of generalization channels, in ``[0, 1]``.
        p_mem: Probability that a memorization channel is kept for an example, in ``[0, 1]``.
        seed: Names the assignment of channels to examples, any int64.
        site: Number of this layer among those that share the seed, in ``[0, 2**32)``.
        channel_dim: Dimension of the channels: 1 for images, -1 for tokens ``[batch, tokens, channels]``; by default 1,
            but then 3-d activations are refused, which can be of either kind.
        rescale: What ``drop`` multiplies generalization channels by: ``none``: 1; ``authors``:
            ``(p_gen + p_mem) / p_gen``; ``expectation``: ``(p_gen + (1 - p_gen) * p_mem) / p_gen``, which keeps the
            expected number of active channels.
        mask: Which channels an example keeps, in place of the draw: a function of ids ``[n]``, int64, that returns
            ``[n, channels]``, bool, the same for an id each time. Generalization channels are kept whatever it says.
            It is no part of the state dict.

    Shape:
        ``[batch, channels, ...]`` in and out, or with the channels at ``channel_dim``.

    Raises:
        ValueError: If a setting breaks the above. In the forward pass: if the activations have no such dimension, or
            have three and ``channel_dim`` was not given.
        TypeError: If a setting or the activations are of another type.

    Source: Maini et al., "Can Neural Network Memorization Be Localized?", ICML 2023, section on example-tied dropout.
    """

    skip: bool | Literal["require"] = False  # set by `insert_example_tied_dropout`

    def __init__(
        self,
        p_gen: float = 0.2,
        p_mem: float = 0.1,
        *,
        seed: int = 0,
        site: int = 0,
        channel_dim: int | None = None,
        rescale: str = "none",
        mask: Mask | None = None,
    ) -> None:
        super().__init__(p_gen, p_mem, seed=seed, site=site, channel_dim=channel_dim)
        if mask is not None and not callable(mask):
            raise TypeError(f"ExampleTiedDropout: mask must be a function of ids, got {type(mask).__name__}")
        if rescale not in RESCALES:
            raise ValueError(f"ExampleTiedDropout: rescale must be one of {', '.join(RESCALES)}, got {rescale!r}")
        _check_rescale(rescale, p_gen)
        self.rescale, self.mask = rescale, mask
        self._mode: str | None = None

    @property
    def mode(self) -> str:
        """The mode in force: the one set by name, else the one that ``training`` selects."""
        return self._mode or ("train" if self.training else "drop")

    @mode.setter
    def mode(self, mode: str | None) -> None:
        if mode is not None and mode not in MODES:
            raise ValueError(f"ExampleTiedDropout: mode must be None or one of {', '.join(MODES)}, got {mode!r}")
        self._mode = mode

    def forward(self, x: Tensor, example_ids: Tensor | None = None) -> Tensor:
        """Apply the mode in force; only ``train`` needs ids, by default those of `memloc_ext.example_ids`."""
        dim, kept = self.dim_and_kept(x)
        mode = self.mode
        if mode == "train":
            ids = current_example_ids() if example_ids is None else example_ids
            if ids is None:
                raise ValueError(
                    "ExampleTiedDropout: mode 'train' needs example ids: call the model inside "
                    "`with memloc_ext.example_ids(ids):`, or pass example_ids to this module"
                )
            if example_ids is None:  # checked before
                ids = ids.to(x.device)
            elif isinstance(ids, Tensor):
                check_example_ids(ids)
            skipping = skipping_in_force() if self.skip else None
            if skipping is None:
                return self._train(x, ids, dim, kept)
            return skipping.site(self, x, ids, lambda x: self._train(x, ids, dim, kept))
        factors = {"test": (1.0, self.p_mem), "drop": (self._rescale_factor(), 0.0), "drop_gen": (0.0, 1.0)}
        generalization, memorization = factors[mode]
        return _scale_pools(x, kept, generalization, memorization, dim)

    def _train(self, x: Tensor, ids: Tensor, dim: int, kept: int) -> Tensor:
        if self.mask is None:
            return call(x, ids, kept, self.p_mem, self.seed, self.site, dim)
        shape = [*ids.shape, *[1] * (x.dim() - ids.dim())]
        shape[dim] = x.shape[dim]
        return torch.where(
            self.kept(ids, x.shape[dim]).reshape(shape), x, torch.zeros((), dtype=x.dtype, device=x.device)
        )

    def kept(self, ids: Tensor, channels: int) -> Tensor:
        """Return which channels examples keep, ``[*ids.shape, channels]``, bool."""
        rows, shared = ids.flatten(), self.num_generalization(channels)
        if self.mask is None:
            ones = torch.ones(len(rows), channels, device=ids.device)
            return (call(ones, rows, *self.draw(channels).values(), 1) != 0).unflatten(0, ids.shape)
        kept = self.mask(rows)
        if not isinstance(kept, Tensor) or kept.dtype != torch.bool or kept.shape != (len(rows), channels):
            got = f"{kept.dtype} {list(kept.shape)}" if isinstance(kept, Tensor) else type(kept).__name__
            raise ValueError(f"ExampleTiedDropout: mask must return bool [{len(rows)}, {channels}], got {got}")
        return (kept | (torch.arange(channels, device=kept.device) < shared)).unflatten(0, ids.shape)

    def _rescale_factor(self) -> float:
        if self.rescale == "authors":
            return (self.p_gen + self.p_mem) / self.p_gen
        if self.rescale == "expectation":
            return (self.p_gen + (1 - self.p_gen) * self.p_mem) / self.p_gen
        return 1.0

    def get_extra_state(self) -> Tensor:
        """Return what the assignment of channels to examples depends on, as the bytes of a JSON text.

        A tensor, so that safetensors and ``torch.load(weights_only=True)`` carry it.
        """
        state = {"seed": self.seed, "site": self.site, "p_gen": self.p_gen, "p_mem": self.p_mem, "mode": self._mode}
        return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over what `get_extra_state` wrote; ValueError if it is something else."""
        try:
            values = json.loads(state.numpy(force=True).tobytes())
            p_gen, p_mem, seed, site = (values[name] for name in ("p_gen", "p_mem", "seed", "site"))
            _check_settings(p_gen, p_mem, seed, site, self.channel_dim)
            _check_rescale(self.rescale, p_gen)
            self.mode = values["mode"]
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"ExampleTiedDropout: the saved state cannot be read: {error}") from error
        self.p_gen, self.p_mem, self.seed, self.site = p_gen, p_mem, seed, site

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        own = prefix + "_extra_state"
        if own in missing:  # a state dict from before the dropout was put in still loads, and its settings stay
            missing.remove(own)

    def extra_repr(self) -> str:
        """Show the settings and the mode in force."""
        return f"{super().extra_repr()}, rescale={self.rescale!r}, mode={self.mode!r}"


class FixedDropout(_TiedChannels):
    """Keep the same channels for every example, in training and in evaluation.

    The mask is that of example 0 under `ExampleTiedDropout` with the same settings, so as many channels are active as
    each example has there. Kept activations are not rescaled. Shapes and errors are as there.

    Source: Maini et al., "Can Neural Network Memorization Be Localized?", ICML 2023, baselines.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Zero the channels outside the mask."""
        dim, kept = self.dim_and_kept(x)
        ids = torch.zeros(1, dtype=torch.int64, device=x.device).expand(x.shape[0])
        return call(x, ids, kept, self.p_mem, self.seed, self.site, dim)


def set_dropout_mode(model: nn.Module, mode: str | None) -> None:
    """Set the mode of every `ExampleTiedDropout` in ``model``; None goes back to what ``training`` selects."""
    for module in model.modules():
        if isinstance(module, ExampleTiedDropout):
            module.mode = mode


@contextlib.contextmanager
def dropout_mode(model: nn.Module, mode: str | None) -> Iterator[None]:
    """Set the mode of every `ExampleTiedDropout` in ``model`` inside the ``with``; then each has its own back."""
    before = [(m, m._mode) for m in model.modules() if isinstance(m, ExampleTiedDropout)]
    try:
        set_dropout_mode(model, mode)
        yield
    finally:
        for module, own in before:
            module.mode = own


def _checked_channel_dim(x: Tensor, channel_dim: int | None) -> int:
    """Return ``channel_dim``, by default 1; raise unless ``x`` is a tensor whose channels are certainly there."""
    if not isinstance(x, Tensor):
        raise TypeError(f"dropout: x must be a tensor, got {type(x).__name__}")
    if channel_dim is None:
        if x.dim() == 3:
            raise ValueError(
                f"dropout: channel_dim must be given for 3-d activations, got {list(x.shape)} without; pass "
                "channel_dim=-1 for tokens [batch, tokens, channels], channel_dim=1 for [batch, channels, length] "
                "(--channel-dim of a command)"
            )
        channel_dim = 1
    if not -x.dim() < channel_dim < x.dim():
        got = f"{channel_dim} for shape {list(x.shape)}"
        raise ValueError(f"dropout: channel_dim must name a dimension of x after the batch, got {got}")
    return channel_dim


def _check_settings(p_gen: float, p_mem: float, seed: int, site: int, channel_dim: int | None) -> None:
    """Raise TypeError or ValueError unless the settings of a dropout are what its module asks for."""
    for name, value in (("p_gen", p_gen), ("p_mem", p_mem)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"dropout: {name} must be a number in [0, 1], got {type(value).__name__}")
        if not 0 <= value <= 1:
            raise ValueError(f"dropout: {name} must be in [0, 1], got {value}")
    ranges = {"seed": (seed, -(2**63), 2**63), "site": (site, 0, 2**32)}
    if channel_dim is not None:
        ranges["channel_dim"] = (channel_dim, -25, 25)
    for name, (number, low, high) in ranges.items():
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"dropout: {name} must be an integer, got {type(number).__name__}")
        if not low <= number < high:
            raise ValueError(f"dropout: {name} must be in [{low}, {high}), got {number}")
    if channel_dim == 0:
        raise ValueError("dropout: channel_dim must not be the batch, got 0")


def _check_rescale(rescale: str, p_gen: float) -> None:
    if rescale != "none" and p_gen == 0:
        raise ValueError(f"ExampleTiedDropout: rescale={rescale!r} divides by p_gen, which must be > 0, got 0")


def _scale_pools(x: Tensor, kept: int, generalization: float, memorization: float, channel_dim: int) -> Tensor:
    factor = x.new_full((x.shape[channel_dim],), memorization)
    factor[:kept] = generalization
    shape = [1] * x.dim()
    shape[channel_dim] = -1
    factor = factor.view(shape)
    # a channel that is switched off is 0 even where x is infinite
    return torch.where(factor == 0, torch.zeros_like(factor), x * factor)
