"""Train with example-tied dropout at the cost of the channels that are kept.

A model that `insert_example_tied_dropout` was given ``skip`` for runs under a `Skipping`. The first forward pass in
mode ``train`` runs as ever, and finds two kinds of chains:

- linear layers, an activation, the dropout, a linear layer: they become `ops.example_tied_mlp`;
- the dropout, functions of each channel, a convolution: they become `ops.example_tied_conv2d`.

From then on, what begins a chain returns an `Unrun`, and the layer that ends it runs the operator. Whatever else an
`Unrun` is given to makes it run as without ``skip``.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from memloc_ext import ops
from memloc_ext.batches import tensors_of, with_each_tensor
from memloc_ext.nn import unrun
from memloc_ext.nn.recognise import recognise
from memloc_ext.nn.unrun import Product, Site, State, Step, Unrun, is_watched, run_all
from memloc_ext.ops import kept_conv2d, kept_mlp
from memloc_ext.ops.kept_mlp import ACTIVATIONS

if TYPE_CHECKING:
    from memloc_ext.nn.example_tied_dropout import ExampleTiedDropout

_ARITHMETIC = ("mul", "mul_", "__mul__", "__rmul__", "add", "add_", "__add__", "__radd__", "div", "__truediv__", "pow")
_ACTIVATIONS = ("relu", "relu_", "gelu", "silu", "silu_", "sigmoid", "tanh", "erf", "square", "dropout")
_ELEMENTWISE = frozenset((*_ARITHMETIC, *_ACTIVATIONS, "__pow__", "sub", "__sub__", "__rsub__", "neg", "contiguous"))
_RESHAPES = frozenset(("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze"))
_POOLS = ("max_pool2d", "_max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d")
_BY_CHANNEL = frozenset(("relu", "gelu", "silu", "leaky_relu", "tanh", *_POOLS))  # 0 of a channel of zeros


@dataclass
class Chains:
    """What was found in a model.

    Attributes:
        first: Names of the weights of the linear layers that a chain begins with, by the dropout they lead to.
        read: Dropouts that a convolution reads.
        reasons: Why a dropout cannot skip.
        found: Whether a forward pass has looked for them.
    """

    first: dict[ExampleTiedDropout, set[str]] = field(default_factory=dict)
    read: set[ExampleTiedDropout] = field(default_factory=set)
    reasons: dict[nn.Module, str] = field(default_factory=dict)
    found: bool = False


_known: weakref.WeakKeyDictionary[nn.Module, Chains] = weakref.WeakKeyDictionary()  # a copy of a model finds its own
_open = threading.local()


def skip_in(model: nn.Module) -> None:
    """Have a model skip what its dropouts allow."""
    if _enter not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_enter)
        model.register_forward_hook(_leave, always_call=True)


def skipping_in_force() -> Skipping | None:
    """Return the innermost that is open in this thread."""
    return _stack()[-1][1] if _stack() else None


def _stack() -> list[tuple[nn.Module, Skipping | None]]:
    if not hasattr(_open, "stack"):
        _open.stack = []
    return _open.stack


def _enter(model: nn.Module, _: Any) -> None:
    if torch.compiler.is_compiling():
        return
    if any(inner is model for inner, _ in _stack()):  # KeyboardInterrupt ended its last pass, and calls no hooks
        while _stack():
            _close(_stack().pop()[1])
    skipping = None
    modules = [m for m in model.modules() if m is not model]
    hooked = any(m._backward_hooks or m._backward_pre_hooks for m in modules)  # they wait for gradients of activations
    skips = any(getattr(m, "skip", False) and m.mode == "train" for m in modules)
    if skips and not hooked and not is_watched():
        skipping = Skipping(model, _known.setdefault(model, Chains()))
        skipping.__enter__()
    _stack().append((model, skipping))


def _leave(model: nn.Module, _: Any, output: Any) -> Any:
    if torch.compiler.is_compiling() or not _stack() or _stack()[-1][0] is not model:
        return None
    _, skipping = _stack().pop()
    if skipping is None:
        return None
    _close(skipping)
    skipping.settle()
    if output is not None:  # no error passes
        skipping.finish()
    return run_all(output)


def _close(skipping: Skipping | None) -> None:
    if skipping is not None and torch.overrides._get_current_function_mode() is skipping:
        skipping.__exit__(None, None, None)


class Skipping(TorchFunctionMode):
    """Watches a forward pass of a model for the chains in which channels can be skipped.

    Args:
        model: That has dropouts.
        chains: What is known of it, or is to be found out.
    """

    def __init__(self, model: nn.Module, chains: Chains) -> None:
        super().__init__()
        self._chains, self._learns = chains, not chains.found
        self._model = model
        first = {name for site, names in chains.first.items() if site.mode == "train" for name in names}
        named = model.named_parameters() if self._learns or first else ()
        self._names = {id(p): name for name, p in named if self._learns or name in first}
        self._seen: dict[int, tuple[Tensor, Step]] = {}  # tensors that are there, while chains are looked for
        self._unrun: list[weakref.ref[Unrun]] = []

    def finish(self) -> None:
        """End the pass; ValueError if it is the first and a dropout that must skip cannot."""
        if not self._learns:
            return
        known = self._chains.first.keys() | self._chains.read
        for name, site in self._model.named_modules():
            if getattr(site, "skip", False) == "require" and site not in known:
                reason = self._chains.reasons.get(site, "it did not run in mode train")
                got = f"{name.removesuffix('.dropout_after')!r} cannot skip: {reason}"
                raise ValueError(f"insert_example_tied_dropout: every site must skip for skip='require', but {got}")
        self._chains.found = True

    def site(self, dropout: ExampleTiedDropout, x: Tensor, ids: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        """Run a dropout in mode ``train``, or leave it to what reads it."""
        before = self._step(x)
        if not self._learns and before is None and (dropout not in self._chains.read or is_watched()):
            return run(x)
        step = Step(run, (x if before is None else before,), site=Site(dropout, ids, x.shape))
        return self._later(step, (x,), {}, x.shape, x.dtype)

    def settle(self, tensors: Sequence[Tensor] | None = None) -> None:
        """Run what is not run yet and held by the model, all of it or what shares memory with tensors."""
        held = [t for ref in self._unrun if (t := ref()) is not None and not t.step.fixed]
        memory = None if tensors is None or not held else {unrun.storage_of(t) for t in tensors}
        for t in held:
            if memory is None or memory & t.step.memory():
                t.step = Step(t.step.function, (), value=t.step.run(), fixed=True)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # a part of the model
            return func(*args, **kwargs)
        if unrun.is_metadata(func):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        steps = [step for t in tensors_of((args, kwargs)) if (step := self._step(t)) is not None]
        ways = (self._mlp, self._conv2d, self._by_channel, self._continued) if steps else (self._begun,)
        now = State()
        for way in ways if all(step.state == now for step in steps) else ():
            result = way(func, name, args, kwargs)
            if result is not None:
                return result
        for dropout in {before.site.dropout for step in steps for before in step.before() if before.site is not None}:
            self._chains.reasons.setdefault(dropout, f"its output goes to {name}")
        if unrun.writes(name, args, kwargs):
            self.settle(tensors_of((args, kwargs)))
        args, kwargs = run_all((args, kwargs))
        return func(*args, **kwargs)

    def _step(self, t: object) -> Step | None:
        if isinstance(t, Unrun):
            return None if t.step.fixed else t.step
        return self._seen[id(t)][1] if id(t) in self._seen else None

    def _later(self, step: Step, args: Any, kwargs: Any, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Leave a step for later; run it if chains are looked for."""
        if not self._learns:
            t = Unrun.of(step, shape, dtype, tensors_of(args)[0].device)
            self._unrun.append(weakref.ref(t))
            return t
        t = step.function(*args, **kwargs)
        self._seen[id(t)] = t, step
        return t

    def _is_shared(self, t: Unrun) -> bool:
        """Return whether something else that is held depends on what a function in place would change."""
        own, held = set(t.step.before()), [ref() for ref in self._unrun]
        return any(other is not None and other is not t and own & set(other.step.before()) for other in held)

    def _begun(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Leave a linear layer for later that may begin a chain."""
        product = Product.of(name, args, kwargs) if self._names else None
        if product is None or id(product.parameter) not in self._names or is_watched():
            return None
        shape = (*product.x.shape[:-1], len(product.weight))
        return self._later(Step(func, args, kwargs, product=product), args, kwargs, shape, product.dtype)

    def _continued(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Leave a function of each element for later, or a change of shape that leaves the channels as they are."""
        given = tensors_of((args, kwargs))
        first, shape = given[0], given[0].shape
        if not args or any(self._step(t) is None for t in given) or any(t.shape != shape for t in given):
            return None
        if reshapes := name in _RESHAPES:
            shape = getattr(torch.empty(shape, device="meta"), name)(*args[1:], **kwargs).shape
            if shape[-1:] != first.shape[-1:]:
                return None
        elif name not in _ELEMENTWISE:
            return None
        args_of, kwargs_of = with_each_tensor((args, kwargs), lambda t: cast(Any, self._step(t)))
        step = Step(func, args_of, kwargs_of, reshapes=reshapes)
        if isinstance(first, Unrun) and unrun.in_place(name, args, kwargs):
            if self._is_shared(first):
                return None
            first.step = step
            return first
        return self._later(step, args, kwargs, shape, first.dtype)

    def _by_channel(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Run a function of each channel on what a dropout is given, and leave the dropout for later."""
        step = self._step(args[0]) if args else None
        if step is None or step.site is None or len(step.site.x) != 4 or name not in _BY_CHANNEL:
            return None
        (x,), in_place = step.args, kwargs.get("inplace", False)
        if isinstance(x, Step) or (in_place and not self._learns and self._is_shared(args[0])):
            return None
        if self._learns:
            return self._later(Step(func, step.args, site=step.site), args, kwargs, x.shape, x.dtype)
        x = func(x, *args[1:], **(kwargs | {"inplace": False} if in_place else kwargs))
        later = Step(step.function, (x,), site=Site(step.site.dropout, step.site.ids, x.shape))
        if in_place:
            args[0].step = later
            return args[0]
        return self._later(later, (x,), {}, x.shape, x.dtype)

    def _conv2d(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Run a convolution that reads a dropout."""
        step = self._step(args[0]) if name == "conv2d" and args else None
        if step is None or step.site is None or isinstance(step.args[0], Step):
            return None
        site = step.site
        if site.dropout.channel_dim not in (None, 1, -3) or len(site.x) != 4 or site.ids.dim() != 1:
            return None
        if any(isinstance(value, str) for value in (*args, *kwargs.values())):  # padding="same"
            return None
        self._chains.read.add(site.dropout)
        if self._learns:
            return None
        x, channels, dropout = step.args[0], site.x[1], site.dropout
        if dropout.mask is not None:
            return kept_conv2d.kept_conv2d(x, dropout.kept(site.ids, channels), *args[1:], **kwargs)
        return ops.example_tied_conv2d(x, site.ids, *args[1:], **kwargs, **dropout.draw(channels))

    def _mlp(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Run the chain that a linear layer ends."""
        last = Product.of(name, args, kwargs)
        step = self._step(last.x) if last is not None else None
        sites = {s: s.site for s in step.before() if s.site is not None} if step is not None else {}
        if last is None or step is None or len(sites) != 1:
            return None
        (site,) = sites.values()
        layers: list[Step] = []
        formula = step.formula(layers)
        found, products = recognise(formula, step, layers), [s.product for s in layers if s.product is not None]
        rule = ""
        if not products:
            rule = "no linear layer leads to it"
        elif found is None:
            rule = f"what is between linear layers is none of {', '.join(ACTIVATIONS)}"
        elif any(p.x is not products[0].x for p in products):
            rule = "the layers that lead to it read different inputs"
        elif site.dropout.channel_dim not in (-1, len(site.x) - 1) and (site.dropout.channel_dim or len(site.x) != 2):
            rule = "its channels are not the last dimension"
        elif site.ids.dim() == 2 and len(site.x) != 3:
            rule = "its ids are of tokens, and its input is not [batch, tokens, channels]"
        if rule or found is None:
            self._chains.reasons[site.dropout] = rule
            return None
        if self._learns:
            self._chains.first.setdefault(site.dropout, set()).update(self._names[id(p.parameter)] for p in products)
            return None
        into, gate = products[found.order[-1]], products[found.order[0]] if len(found.order) > 1 else None
        rows = (site.x[0], site.x[1:-1].numel()) if len(site.x) > 3 else site.x[:-1]
        x, activation = into.x.reshape(*rows, into.x.shape[-1]), found.activation
        weights = (into.weight, into.bias, last.weight, last.bias)
        of_gate = (None, None) if gate is None else (gate.weight, gate.bias)
        if site.dropout.mask is not None or found.p:
            y = kept_mlp.kept_mlp(x, activation, _plan(site, x, found.p), *weights, *of_gate)
        else:
            draw = site.dropout.draw(site.x[-1])
            gated = dict(zip(("w_gate", "b_gate"), of_gate, strict=True))
            y = ops.example_tied_mlp(x, site.ids, *weights, activation=activation, **draw, **gated)
        return y.reshape(*last.x.shape[:-1], y.shape[-1])


def _plan(site: Site, x: Tensor, p: float) -> kept_mlp.Plan:
    """Return the plan for rows ``[*, d]``, with a user's own mask or behind ordinary dropout."""
    channels = site.x[-1]
    ids, lengths = site.ids.flatten().unique_consecutive(return_counts=True)
    tokens = x.shape[:-1].numel() // max(1, site.ids.numel())
    mask, shared = site.dropout.kept(ids, channels), site.dropout.num_generalization(channels)
    plan = kept_mlp.plan_of(mask, (lengths * tokens).tolist(), shared)
    return plan._replace(p=p, seed=int(torch.randint(2**62, ())) if p else 0)
