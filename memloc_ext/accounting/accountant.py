"""The accountant of a model: what users open, and what they get."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._C._functorch import maybe_current_level
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from memloc_ext.accounting.account import Account, OwnGradients, account_of, batch_of, groups_of
from memloc_ext.accounting.backward_pass import BackwardPass
from memloc_ext.accounting.check import Checks, Known, known_of, known_slow, mistook
from memloc_ext.accounting.clipping import clipping_of
from memloc_ext.accounting.forward_pass import unwrapped
from memloc_ext.accounting.graph import Reached, check_reentrant, reached
from memloc_ext.accounting.layers.handlers import COMPLEX_HANDLERS, HANDLERS
from memloc_ext.accounting.losses import check_example_weights, check_loss
from memloc_ext.accounting.per_example import add_to_grads, clipped_gradients, extra_passes
from memloc_ext.accounting.queries import Directions, Projection, Queries
from memloc_ext.accounting.sharded import check_parallel, check_sharded, gathering, watch
from memloc_ext.accounting.told import run
from memloc_ext.accounting.tracer import Tracer
from memloc_ext.accounting.untraced import begin, end, found_untraced, learn
from memloc_ext.batches import tensors_of
from memloc_ext.borrowing import uncompiled, without_hooks


class GradientAccountant:
    r"""Per-example gradient norms, and gradients of groups of examples, of every parameter, from one backward pass.

    ```python
    accountant = GradientAccountant(model)
    with accountant:
        loss = F.cross_entropy(model(x), y)
        account = accountant.backward(loss, group_ids=noisy.long(), num_groups=2)
    account.sqnorm["conv1.weight"]  # [batch]
    ```

    Nothing of the model is changed: no hooks, buffers, flags or gradients but the usual ones are left behind, and
    outside of the ``with`` it runs as ever. Each thread may open the same accountant.

    The first step of a model, with inputs of some shapes, may run the model twice; it finds out whether later ones can
    run on PyTorch's own layers, which tell the same in less time. A model that then computes something else from inputs
    of the same shapes takes a pass per example in that step, with a warning.

    Covered are linear layers, matrix products and ``einsum``, convolutions, batch, layer, group, instance and RMS
    normalisation, embeddings and bags of them, `torch.nn.MultiheadAttention`, LSTM, GRU and RNN, PReLU, and parameters
    that meet activations element by element; used any number of times, by modules or by functions. What is computed
    from parameters alone, as by `torch.nn.utils.parametrizations`, takes the place of a parameter. Any other parameter
    takes one pass per example, with a warning that names it.

    Autocast, gradient checkpointing, frozen parameters, `DistributedDataParallel` and
    `torch.distributed.fsdp.fully_shard` work as usual; under the last two, norms and group gradients are those of this
    process's examples, and after `fully_shard` every parameter must be covered. What `torch.compile` compiled runs
    uncompiled here.

    A gradient penalty takes `torch.func.grad`, losses by example and one backward pass for each: layers that run here
    cannot be differentiated twice. A hook on a parameter is called with None where ``weight_grads`` is False.

    If the model mixes the examples of a batch, as batch normalisation does in training mode, the norm is that of the
    gradient *that flows through the example's own activations*: what the example's rows add to the gradient of the
    whole batch's loss, statistics included. In evaluation mode it is the gradient of the example's own loss.

    Args:
        model: Its parameters that require gradients are accounted, under their names.
        batch_dim: Dimension of the examples in the model's inputs: 0, or 1 for ``[tokens, batch, *]``.
        shared_inputs: Inputs of the model that are the same for all examples: names of arguments, or positions.
        check: Which backward passes are checked against plain autograd, for two random examples, which takes three
            more backward passes: the ``first`` of each number of examples, dtypes of inputs and training flags, and
            all in which ``batch_size`` says that examples have several rows; ``always``; or ``never``. A parameter
            whose norm differs takes a pass per example from then on, with a warning.

    Raises:
        TypeError: If ``model`` is not a module, or ``shared_inputs`` are not names and positions.
        ValueError: If ``batch_dim`` is negative, ``check`` is something else, or an input is not there when the model
            is called.

    Source: Maini et al., "Can Neural Network Memorization Be Localized?", ICML 2023, gradient accounting; for the way
    norms are computed, see `memloc_ext.ops.linear_grad_sqnorm`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        batch_dim: int = 0,
        shared_inputs: Sequence[str | int] = (),
        check: Literal["first", "always", "never"] = "first",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"GradientAccountant: model must be a torch.nn.Module, got {type(model).__name__}")
        if batch_dim < 0:
            raise ValueError(f"GradientAccountant: batch_dim must be at least 0, got {batch_dim}")
        if check not in ("first", "always", "never"):
            raise ValueError(f"GradientAccountant: check must be first, always or never, got {check!r}")
        if isinstance(shared_inputs, str) or not all(isinstance(item, str | int) for item in shared_inputs):
            raise TypeError(
                f"GradientAccountant: shared_inputs must be a sequence of names or positions, got {shared_inputs!r}"
            )
        self._model, self._batch_dim, self._check = model, batch_dim, check
        self._shared_inputs = tuple(shared_inputs)
        self._local = threading.local()
        self._warned: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is open here, so that a module that holds an accountant of its own can be copied."""
        return {name: value for name, value in self.__dict__.items() if name != "_local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open nothing."""
        self.__dict__.update(state, _local=threading.local())

    def __enter__(self) -> Self:
        """Trace the model in this thread, until the end of the ``with``."""
        tracer = Tracer(self._model, self._batch_dim, HANDLERS, COMPLEX_HANDLERS, self._known.input_of_examples)
        with ExitStack() as stack:
            for hook in self._hooks(tracer):
                stack.callback(hook.remove)
            stack.enter_context(uncompiled())
            stack.enter_context(tracer)
            self._tracers.append((tracer, stack.pop_all()))
        return self

    def __exit__(self, *error: object) -> None:
        """Stop tracing; warn if ``loss.backward()`` ran in place of ``accountant.backward(loss)``."""
        tracer, stack = self._tracers.pop()
        tracer.stand_in()
        tracer.passes.clear()
        stack.close()
        if tracer.unaccounted and not tracer.accounted and error[0] is None:
            warnings.warn(
                "GradientAccountant: loss.backward() ran inside the with, and nothing was accounted; call "
                "accountant.backward(loss) in its place",
                UserWarning,
                stacklevel=2,
            )

    def _hooks(self, tracer: Tracer) -> list[RemovableHandle]:
        """Have the tracer told when this thread runs the model."""
        sharded = gathering(self._model, tracer.members)

        def mine(args: Any, kwargs: Any) -> bool:
            if maybe_current_level() is not None:
                return False
            return any(tracer is entered for entered, _ in self._tracers) or tracer.recomputes(args, kwargs)

        def before(model: nn.Module, args: Any, kwargs: Any) -> None:
            if not mine(args, kwargs):
                return
            tracer.look()
            with torch._C.DisableTorchFunction():
                entered = tracer.enter_model(args, kwargs, self._shared(args, kwargs))
                if entered is not None and self._check != "always":
                    begin(self._known, tracer, entered, checked=self._check == "first")

        def after(model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not mine(args, kwargs):
                return
            with torch._C.DisableTorchFunction():
                tracer.leave_model(output)
                if tracer.depth == 0 and not tracer.replaying:
                    end(tracer)
            tracer.look_away()

        hooks = [
            self._model.register_forward_pre_hook(before, with_kwargs=True),
            self._model.register_forward_hook(after, with_kwargs=True, always_call=True),
        ]
        return hooks + [watch(tracer, name, module, sharded) for name, module in sharded.items()]

    def _shared(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Return the inputs that are the same for all examples."""
        if not self._shared_inputs:
            return []
        names = list(inspect.signature(unwrapped(self._model).forward).parameters)
        given = dict(enumerate(args)) | dict(zip(names, args, strict=False)) | dict(kwargs)
        missing = [item for item in self._shared_inputs if item not in given]
        if missing:
            rule = f"shared_inputs must be among the inputs that the model is given, {list(given)}"
            raise ValueError(f"GradientAccountant: {rule}, got {missing}")
        return tensors_of([given[item] for item in self._shared_inputs])

    @property
    def _tracers(self) -> list[tuple[Tracer, ExitStack]]:
        if not hasattr(self._local, "tracers"):
            self._local.tracers = []
        return self._local.tracers

    def backward(
        self,
        loss: Tensor,
        *,
        group_ids: Tensor | None = None,
        num_groups: int | None = None,
        loss_reduction: str = "mean",
        example_weights: Tensor | None = None,
        weight_grads: bool = True,
        exact_groups: bool = False,
        batch_size: int | None = None,
        retain_graph: bool = False,
        directions: Directions | None = None,
        max_norm: float | None = None,
        clipping: Literal["flat", "per_parameter"] = "flat",
        pairwise: bool | Collection[str] = False,
        project: Projection | None = None,
        per_position: bool = False,
        by_row: Collection[str] = (),
    ) -> Account:
        """Run ``loss.backward()`` and account it.

        Args:
            loss: Of the batch, computed inside this ``with``.
            group_ids: Group of each example, ``[batch]``, int64, in ``[0, num_groups)``, on the device of ``loss``. On
                CUDA the values are not checked, as that would wait for the device.
            num_groups: At least 1; by default the largest id and one, which waits for a device.
            loss_reduction: What ``loss`` is of the examples' own losses: their ``mean`` or ``sum``; or ``none``: one
                loss per example, ``[batch, *]``, of which the sum is differentiated.
            example_weights: Factor of each example's own loss in ``loss`` (in the sum, for ``none``), ``[batch]``,
                floating point, finite and at least 0, on the device of ``loss``; by default 1 / batch for a ``mean``,
                else 1. A norm is divided by its square, and 0 where it is 0. In a mean over tokens it is the example's
                share of them; in a mean with class weights, that of ``weight[target]``.
            weight_grads: If False, the gradients of parameters are not computed, their ``grad`` stays as it was and
                there are no group gradients: the norms alone, for less than a usual backward pass.
            exact_groups: Get the groups' gradients from one backward pass per group, which is exact also where the
                model mixes the examples of a batch (batch normalisation in training mode). A ``mean`` or ``sum`` must
                then depend on the model through what it returns, with the examples in dimension ``batch_dim``.
            batch_size: Number of examples, if each has the same number of consecutive rows of the model's input; by
                default each row is one.
            retain_graph: Keep the graph for another backward pass.
            directions: Name to tensors by name of parameter, each of the parameter's shape, dtype and device: answered
                by ``account.dot`` and ``account.cosine``. A parameter that a direction leaves out counts as zero.
            max_norm: Give parameters the sum, or the mean as the loss is, of the examples' own gradients clipped to
                this L2 norm: ``g * min(1, max_norm / |g|)``. Greater than 0. Norms and answers are of the gradients
                before clipping. The layers' inputs and gradients are kept until all norms are known.
            clipping: ``flat`` clips by the norm over all parameters; ``per_parameter`` each parameter's gradient by its
                own norm, to ``max_norm / sqrt(number of parameters)``.
            pairwise: True for ``account.inner``, inner products over all parameters; or names of parameters, for
                ``account.parameter_inner`` of each.
            project: Random matrices for ``account.projected``.
            per_position: Whether to tell ``account.position_sqnorm``, of linear layers and embeddings over tokens.
            by_row: Names of parameters for ``account.row_sqnorm``.

        Returns:
            Squared norms of every parameter that requires a gradient, and the answers to what else was asked.

        Raises:
            RuntimeError: If called outside the ``with``.
            ValueError: If an argument breaks the above, the examples cannot be told apart in what a layer is given, or
                a parameter is not covered and neither the loss nor the model's output tells the examples apart; or the
                loss has a gradient penalty, or is a ``mean`` of PyTorch's in which examples' ignored targets or class
                weights differ. No gradient is written then, unless the layer is the cause.
            TypeError: If ``group_ids`` is not int64, ``example_weights`` not of floating point, or another argument of
                another type.
        """
        if not self._tracers:
            raise RuntimeError("GradientAccountant: backward must be called inside the with of the accountant")
        tracer = self._tracers[-1][0]
        with torch._C.DisableTorchFunction():  # only what checkpointing recomputes is to be seen
            everything = tracer.members.parameters.items() if tracer.ran_untraced else tracer.named_parameters()
            named = {name: p for name, p in everything if p.requires_grad}
            batch = batch_of(tracer, loss, loss_reduction, group_ids, batch_size)
            check_example_weights(loss, example_weights, batch)
            groups = groups_of(loss, group_ids, num_groups, batch, exact_groups)
            check_parallel(self._model, weight_grads, exact_groups)
            clip = clipping_of(max_norm, clipping, weight_grads)
            asked = None
            if (directions, pairwise, project, per_position, by_row) != (None, False, None, False, ()):
                asked = Queries(named, batch, directions, pairwise, project, per_position, by_row)
            if asked is not None and project is not None:  # drawn by the names that the model has without its wrapper
                asked.names |= {id(p): name for name, p in unwrapped(self._model).named_parameters()}
            root = loss.sum() if loss_reduction == "none" else loss
            untraced = found_untraced(self._known, tracer, root, batch)
            found = reached(root, tracer, tracer.parameters) if untraced is None else untraced
            mean = loss_reduction == "mean" and example_weights is None
            watched = check_loss(tracer, found.nodes, batch, mean=mean)
            if mistaken := mistook(self._known, tracer, loss, batch, batch_size is not None):
                found = Reached(unseen=found.all, nodes=found.nodes)
            check_sharded(tracer, found, exact_groups, max_norm)
            if clip is not None:
                check_reentrant(found)
        slow = found.unseen | ({} if self._check == "never" else known_slow(self._known, tracer, found))
        exact = groups if exact_groups and weight_grads else None
        backward = BackwardPass(
            batch,
            groups if weight_grads and exact is None else None,
            weight_grads and exact is None,
            tracer.calls | found.uses if tracer.calls else found.uses,  # the larger count of each
            slow,
            several_rows=batch_size is not None and not mistaken,
            queries=asked if asked is not None and asked.any else None,
            clipped=clip is not None,
        )
        own_mean = mean and not watched and batch > 1 and self._check != "never"
        checks = Checks(self._known, self._check, self._model, tracer, backward)
        if not mistaken and (untraced is None or found.matched is not None):
            self._warn(found.unseen, tracer, batch)
        told, outputs = extra_passes(checks, loss, root, found, exact, own_mean)
        self._warned |= told
        try:
            tracer.accounted = True
            written = learn(checks, root, found, retain_graph)
            with tracer.accounting(backward):
                if written is None:
                    written = _run(tracer, root, found, backward, retain_graph or bool(clip and slow))
                with torch._C.DisableTorchFunction(), torch.no_grad():
                    backward.finish()
        finally:
            if not retain_graph:
                tracer.calls.clear()
                with torch._C.DisableTorchFunction():
                    tracer.drop_outputs(found.nodes if found.matched is None else {*found.nodes, *found.matched[1]})
        with torch._C.DisableTorchFunction(), torch.no_grad():
            if exact is not None:
                totals = {key: t.sum(0) for key, t in backward.group_grad.items()}
                backward.note_totals(totals)
                written |= {p: totals[key] for key, p in found.all.items()}
            own = OwnGradients.of(batch, loss_reduction, example_weights)
            account = account_of(named, backward, groups if weight_grads else None, own)
        if clip is not None:
            factors = {id(named[name]): t for name, t in clip.factors(account.sqnorm).items()}
            written |= clipped_gradients(checks, outputs, factors, found.all, clip, retain_graph)
        if written:
            add_to_grads(written)
        return account

    @property
    def _known(self) -> Known:
        return known_of(self._model, (self._batch_dim, self._shared_inputs))

    def _warn(self, uncovered: Mapping[int, nn.Parameter], tracer: Tracer, batch: int) -> None:
        """Name the parameters that take a pass per example, once each."""
        named = tracer.named_parameters() if uncovered else ()
        names = [name for name, p in named if id(p) in uncovered and name not in self._warned]
        if names and batch:
            self._warned.update(names)
            message = f"GradientAccountant: layers that are not covered take a pass per example, of {', '.join(names)}"
            warnings.warn(message, UserWarning, stacklevel=3)


def _run(
    tracer: Tracer, root: Tensor, found: Reached, backward: BackwardPass, retain_graph: bool
) -> dict[Tensor, Tensor]:
    """Run the backward pass; return the gradients of leaves that it did not write."""
    if found.matched is not None:
        with torch._C.DisableTorchFunction():
            return run(tracer, backward, found.matched, [root], None, found.others, retain_graph)
    inputs = None
    if backward.clipped:
        inputs = [*found.seen.values(), *found.others]
    elif found.unseen and not backward.weight_grads:
        inputs = list(found.seen.values())  # parameters that are not covered know no other way to be left alone
    if inputs is None:
        root.backward(retain_graph=retain_graph)
    elif inputs and not backward.clipped:
        root.backward(retain_graph=retain_graph, inputs=inputs)
    elif inputs:
        with without_hooks(inputs):
            gradients = torch.autograd.grad(root, inputs, retain_graph=retain_graph, allow_unused=True)
        return {leaf: t for leaf, t in zip(inputs, gradients, strict=True) if t is not None}
    return {}
