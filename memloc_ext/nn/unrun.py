"""Tensors that are not computed yet, and what they would be computed by."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from memloc_ext.batches import tensors_of, with_each_tensor

if TYPE_CHECKING:
    from memloc_ext.nn.example_tied_dropout import ExampleTiedDropout

METADATA = frozenset(
    ("size", "dim", "ndimension", "numel", "element_size", "is_floating_point", "is_complex", "__len__")
)
"""Names of methods that ask nothing but a shape or type."""
ATTRIBUTES = frozenset(
    getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad")
)
"""Attributes that ask nothing but a shape or type."""


@dataclass(frozen=True)
class Product:
    """A linear layer's ``x @ weight.T + bias``.

    Attributes:
        x: ``[*, in]``.
        weight: ``[out, in]``.
        bias: ``[out]``, or None.
        parameter: What the weight is a view of.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    parameter: Tensor

    @classmethod
    def of(cls, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Product | None:
        """Return what a function computes, if it is a linear layer."""
        if name == "linear":
            x, weight, bias = (*args, *(kwargs.get(key) for key in ("input", "weight", "bias")[len(args) :]))
            assert x is not None
            assert weight is not None
            made = cls(x, weight, bias, weight)
        elif name == "addmm" and len(args) == 3 and not kwargs:
            made = cls(args[1], args[2].t(), args[0], args[2])
        elif name in ("matmul", "__matmul__", "mm") and len(args) == 2 and isinstance(args[1], Tensor) and not kwargs:
            made = cls(args[0], args[1].t() if args[1].dim() == 2 else args[1], None, args[1])
        else:
            return None
        plain = isinstance(made.x, Tensor) and made.x.dim() > 1 and not isinstance(made.parameter, Unrun)
        if not plain or made.parameter.dim() != 2:
            return None
        return made if made.bias is None or made.bias.shape == made.weight.shape[:1] else None

    @property
    def dtype(self) -> torch.dtype:
        """Of the result."""
        device = self.x.device.type
        if torch.is_autocast_enabled(device) and self.x.dtype != torch.float64:
            return torch.get_autocast_dtype(device)
        return self.x.dtype


@dataclass(frozen=True)
class Site:
    """A dropout that is to be run.

    Attributes:
        dropout: The module, in mode ``train``.
        ids: Of the examples.
        x: Shape of what it is given.
    """

    dropout: ExampleTiedDropout
    ids: Tensor
    x: torch.Size


def is_watched() -> bool:
    """Return whether something must see every function run: transforms, forward mode, dispatch modes, checkpointing."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore[reportAttributeAccessIssue]
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return transformed or hooks is not None or _get_current_dispatch_mode() is not None


@dataclass(frozen=True)
class State:
    """What functions depend on besides their arguments."""

    watched: bool = field(default_factory=is_watched)
    grad: bool = field(default_factory=torch.is_grad_enabled)
    autocast: tuple[tuple[str, bool, torch.dtype], ...] = field(
        default_factory=lambda: tuple(
            (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")
        )
    )

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Bring it back."""
        if self == State():
            yield
            return
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self.grad))
            for device, enabled, dtype in self.autocast:
                stack.enter_context(torch.autocast(device, dtype, enabled))
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t))
            yield


@dataclass(eq=False)
class Step:
    """A function and what it is given.

    Attributes:
        function: What to run.
        args: Its arguments, with steps in the place of what they compute.
        kwargs: Those by name.
        product: What it computes, if it is a linear layer.
        site: What it is, if it is a dropout.
        reshapes: Whether it changes the shape alone.
        value: The result, once it is known.
        fixed: Whether the value alone counts, because something writes to it or watches its gradient.
        state: In which it would have been run.
    """

    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    product: Product | None = None
    site: Site | None = None
    reshapes: bool = False
    value: Tensor | None = None
    fixed: bool = False
    state: State = field(default_factory=State)

    def run(self) -> Tensor:
        """Return the result."""
        if self.value is None:
            args, kwargs = with_each_step((self.args, dict(self.kwargs)), Step.run)
            with self.state.restored():
                self.value = self.function(*args, **kwargs)
        return self.value

    @property
    def drops(self) -> float | None:
        """Probability with which it zeroes values as ordinary dropout, or None if it is no such thing."""
        if getattr(self.function, "__name__", "") != "dropout":
            return None
        training = self.kwargs.get("training", self.kwargs.get("train", True))
        _, p, training = (*self.args, *(self.kwargs.get("p", 0.5), training)[len(self.args) - 1 :])[:3]
        return p if training else 0.0

    def before(self) -> Iterator[Step]:
        """Yield this step and, as often as they are used, those that it depends on; nothing before a linear layer."""
        yield self
        if self.product is None:
            for step in steps_of((self.args, self.kwargs)):
                yield from step.before()

    def memory(self) -> set[int]:
        """Return which storages this step and those before it read, and hold results in."""
        tensors = [t for step in self.before() for t in (*tensors_of((step.args, dict(step.kwargs))), step.value)]
        return {storage_of(t) for t in tensors if t is not None}

    def formula(self, layers: list[Step]) -> str:
        """Return what is computed of the outputs of linear layers, which are numbered; whatever their sizes."""
        if self.product is not None:
            if self not in layers:
                layers.append(self)
            return f"layer {layers.index(self)}"
        inner = ", ".join(step.formula(layers) for step in steps_of((self.args, self.kwargs)))
        if self.site is not None or self.reshapes:
            return f"site({inner})" if self.site else inner
        constants = with_each_step((self.args, dict(self.kwargs)), lambda _: None)
        return f"{self.function}{constants}({inner})"


class Unrun(Tensor):
    """The result of a step that is not run yet.

    Functions that are given it run the step, unless `nn.skipping` knows better.
    """

    step: Step

    @staticmethod
    def of(step: Step, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Unrun:
        """Return one of a shape, type and device."""
        make = Tensor._make_wrapper_subclass  # pyright: ignore[reportAttributeAccessIssue]
        with torch._C.DisableTorchFunction():
            t = make(Unrun, torch.Size(shape), dtype=dtype, device=device, requires_grad=torch.is_grad_enabled())
            t.step = step
            if t.requires_grad:
                t.register_hook(_unseen)
        return t

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_metadata(func):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        args, kwargs = run_all((args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _unseen(None)


def is_metadata(func: Any) -> bool:
    """Return whether a function asks nothing but a shape or type."""
    return func in ATTRIBUTES or getattr(func, "__name__", "") in METADATA


def in_place(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a function writes to its first argument."""
    place = 3 if name == "dropout" else 1  # of the argument inplace
    by_place = len(args) > place and args[place] is True
    return by_place or kwargs.get("inplace", False) or name[-1:] == "_" != name[-2:-1]


def writes(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a function may write to what it is given, or watches the gradient of it."""
    special = name in ("__setitem__", "__set__", "register_hook", "retain_grad") or name.startswith("__i")
    overload = name.partition(".")[0]
    return special or kwargs.get("out") is not None or in_place(overload, args, kwargs)


def storage_of(t: Tensor) -> int:
    """Return what names a tensor's memory while it is there; that of its result for an `Unrun`, which is run."""
    t = t.step.run() if isinstance(t, Unrun) else t
    with torch._C.DisableTorchFunctionSubclass():
        return t.untyped_storage()._cdata if t.layout == torch.strided else id(t)


def run_all(tree: Any) -> Any:
    """Return nested arguments with every `Unrun` computed."""
    if not any(isinstance(t, Unrun) for t in tensors_of(tree)):
        return tree
    return with_each_tensor(tree, lambda t: t.step.run() if isinstance(t, Unrun) else t)


def steps_of(tree: Any) -> list[Step]:
    """Return the steps in nested tuples, lists and mappings."""
    found: list[Step] = []
    with_each_step(tree, found.append)
    return found


def with_each_step(tree: Any, change: Callable[[Step], Any]) -> Any:
    """Return nested tuples, lists and mappings with every step changed."""
    if isinstance(tree, Step):
        return change(tree)
    if type(tree) in (tuple, list):
        return type(tree)(with_each_step(part, change) for part in tree)
    if type(tree) is dict:
        return {key: with_each_step(part, change) for key, part in tree.items()}
    return tree


def _unseen(_: Any) -> None:
    raise RuntimeError(
        "ExampleTiedDropout: with skip, an activation near a dropout went to an autograd function of its own, which "
        "cannot be seen from outside; insert the dropout without skip"
    )
