"""The accountant of a model: what users open, and what they get."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from torch._C._functorch import maybe_current_level
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from memloc_ext.accounting.account import Account, account_of
from memloc_ext.accounting.arguments import batch_of, groups_of
from memloc_ext.accounting.check import (
    Checked,
    check_own_mean,
    checked,
    different,
    outputs_of,
    returned_by_model,
    signature,
)
from memloc_ext.accounting.forward_pass import tensors, unwrapped
from memloc_ext.accounting.graph import Outputs, Reached, reached
from memloc_ext.accounting.handlers import HANDLERS
from memloc_ext.accounting.losses import check_example_weights, check_loss
from memloc_ext.accounting.one_by_one import account_examples, add_to_grads
from memloc_ext.accounting.one_by_one import exact_groups as exact_groups_of
from memloc_ext.accounting.run import Run
from memloc_ext.accounting.session import Session
from memloc_ext.accounting.sharded import gathering, watch
from memloc_ext.borrowing import kept_state, uncompiled

# by whether the losses of examples depend on each other
_DISAGREE = {
    False: "GradientAccountant: a check of two examples found norms that disagree with autograd, of {}: from now on "
    "these parameters take a pass per example; name inputs that are the same for all examples in shared_inputs, and "
    "give batch_size only where each example has the same number of consecutive rows, as stack(..., 1).flatten(0, 1) "
    "makes them",
    True: "GradientAccountant: an example's loss depends on what the model returned for others, as a contrastive loss "
    "does: the norms of {} are of each example's own loss and take a backward pass per example; give the sum of the "
    "losses and loss_reduction='sum' for the gradient that flows through each example's own activations",
}
_UNCHECKED = (
    "GradientAccountant: the loss depends on parameters in another way than through what the model returns for each "
    "example, as with a load-balancing term: the norms are of the gradient that flows through each example's own "
    "activations, and were not checked; account the loss without that term, or give losses by example and "
    "loss_reduction='none'"
)


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

    If examples meet in the forward pass, as batch normalisation in training mode makes them, the norm is that of the
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
        """Have nothing open."""
        self.__dict__.update(state, _local=threading.local())

    def __enter__(self) -> Self:
        """Look at what the model does in this thread, until the end of the ``with``."""
        session, stack = Session(self._model, self._batch_dim, HANDLERS, self._known.input_of_examples), ExitStack()
        for hook in self._hooks(session):
            stack.callback(hook.remove)
        stack.enter_context(uncompiled())
        stack.enter_context(session)
        self._sessions.append((session, stack))
        return self

    def __exit__(self, *error: object) -> None:
        """Stop looking."""
        session, stack = self._sessions.pop()
        session.passes.clear()
        stack.close()

    def _hooks(self, session: Session) -> list[RemovableHandle]:
        """Have the session told when this thread runs the model."""
        sharded = gathering(self._model)

        def mine() -> bool:
            return maybe_current_level() is None and any(session is entered for entered, _ in self._sessions)

        def before(model: nn.Module, args: Any, kwargs: Any) -> None:
            if mine():
                session.enter_model(args, kwargs, self._shared(args, kwargs))

        def after(model: nn.Module, args: Any, output: Any) -> None:
            if mine():
                session.leave_model(output)

        hooks = [
            self._model.register_forward_pre_hook(before, with_kwargs=True),
            self._model.register_forward_hook(after, always_call=True),
        ]
        return hooks + [watch(session, name, module, sharded) for name, module in sharded.items()]

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
        return tensors([given[item] for item in self._shared_inputs])

    @property
    def _sessions(self) -> list[tuple[Session, ExitStack]]:
        if not hasattr(self._local, "sessions"):
            self._local.sessions = []
        return self._local.sessions

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
    ) -> Account:
        """Run ``loss.backward()`` and account it.

        Args:
            loss: Of the batch, computed inside this ``with``.
            group_ids: Group of each example, ``[batch]``, int64, in ``[0, num_groups)``, on the device of ``loss``.
            num_groups: At least 1; by default the largest id and one.
            loss_reduction: What ``loss`` is of the examples' own losses: their ``mean`` or ``sum``; or ``none``: one
                loss per example, ``[batch, *]``, of which the sum is differentiated.
            example_weights: Factor of each example's own loss in ``loss`` (in the sum, for ``none``), ``[batch]``,
                floating point, finite and at least 0, on the device of ``loss``; by default 1 / batch for a ``mean``,
                else 1. A norm is divided by its square, and 0 where it is 0. In a mean over tokens it is the example's
                share of them; in a mean with class weights, that of ``weight[target]``.
            weight_grads: If False, the gradients of parameters are not computed, their ``grad`` stays as it was and
                there are no group gradients: the norms alone, for less than a usual backward pass.
            exact_groups: Get the groups' gradients from one backward pass per group, which is exact also where
                examples meet (batch normalisation in training mode). A ``mean`` or ``sum`` must then depend on the
                model through what it returns, with the examples in dimension ``batch_dim``.
            batch_size: Number of examples, if each has the same number of consecutive rows of the model's input; by
                default each row is one.
            retain_graph: Keep the graph for another backward pass.

        Returns:
            Squared norms and group gradients of every parameter that requires a gradient.

        Raises:
            RuntimeError: If called outside the ``with``.
            ValueError: If an argument breaks the above, the examples cannot be told apart in what a layer is given, or
                a parameter is not covered and neither the loss nor the model's output tells the examples apart; or the
                loss has a gradient penalty, or is a ``mean`` of PyTorch's in which examples' ignored targets or class
                weights differ. No gradient is written then, unless the layer is the cause.
            TypeError: If ``group_ids`` is not int64, or ``example_weights`` not of floating point.
        """
        if not self._sessions:
            raise RuntimeError("GradientAccountant: backward must be called inside the with of the accountant")
        session = self._sessions[-1][0]
        with torch._C.DisableTorchFunction():  # only what checkpointing recomputes is to be seen
            unread = session.passes[-1].unread if session.passes else ""
            batch = batch_of(loss, loss_reduction, group_ids, batch_size, session.batch, unread)
            check_example_weights(loss, example_weights, batch)
            groups = groups_of(loss, group_ids, num_groups, batch, exact_groups)
            self._check_parallel(weight_grads, exact_groups)
            root = loss.sum() if loss_reduction == "none" else loss
            found = reached(root, session, session.parameters)
            mean = loss_reduction == "mean" and example_weights is None
            watched = check_loss(session, found.nodes, batch, mean=mean)
            if mistook := self._mistook(session, loss, batch, batch_size is not None):
                found = Reached(unseen=found.all, nodes=found.nodes)
            self._check_sharded(session, found, exact_groups)
        exact = exact_groups and weight_grads
        calls = session.calls | found.uses  # the larger count of each
        slow = found.unseen | self._known_slow(session, found)
        several = batch_size is not None and not mistook
        run = Run(batch, None if exact else groups, weight_grads and not exact, calls, slow, several=several)
        numbers = returned_by_model(session, loss, found.all) if mean and not watched and batch > 1 else []
        own_mean = bool(numbers) and self._check != "never"
        unchecked = self._unchecked(session, batch, found)
        if slow or exact or own_mean or unchecked is not None:
            outputs = outputs_of(session, root, loss if loss_reduction == "none" else None, found.all, run)
            if own_mean and outputs is not None:
                with kept_state(self._model):
                    check_own_mean(session, loss, numbers, outputs, run)
            if unchecked is not None:
                self._compare(session, run, outputs, found, unchecked)
            if slow or exact:
                outputs = outputs or self._no_outputs(session, slow or found.all)
                self._account_unseen(session, run, outputs, {} if mistook else found.unseen)
            if exact and groups is not None and outputs is not None:
                run.group_grad = exact_groups_of(session, run, outputs, found.all, groups)
        # parameters that are not covered know no other way to be left alone
        inputs = list(found.seen.values()) if found.unseen and not run.weight_grads else None
        try:
            with session.accounting(run):
                if inputs is None or inputs:
                    root.backward(retain_graph=retain_graph, inputs=inputs)
                with torch._C.DisableTorchFunction(), torch.no_grad():
                    run.finish()
        finally:
            if not retain_graph:
                session.calls.clear()
                with torch._C.DisableTorchFunction():
                    session.drop_outputs(found.nodes)
        with torch._C.DisableTorchFunction(), torch.no_grad():
            if exact:
                add_to_grads(found.all, run.group_grad)
            return account_of(session, run, groups if weight_grads else None, loss_reduction, example_weights)

    def _check_parallel(self, weight_grads: bool, exact_groups: bool) -> None:
        model = self._model
        if isinstance(model, DistributedDataParallel) and model.require_backward_grad_sync:
            for name, wrong, rule in (("weight_grads", not weight_grads, True), ("exact_groups", exact_groups, False)):
                if wrong:
                    raise ValueError(
                        f"GradientAccountant: {name} must be {rule} while DistributedDataParallel synchronises "
                        f"gradients, got {not rule}; call forward and backward inside model.no_sync()"
                    )

    def _check_sharded(self, session: Session, found: Reached, exact_groups: bool) -> None:
        """Refuse what takes several backward passes: processes with fewer would leave the others waiting."""
        if session.whole and exact_groups:
            raise ValueError("GradientAccountant: exact_groups must be False after fully_shard, got True")
        names = [name for name, p in session.named_parameters() if id(p) in found.unseen]
        if session.whole and names:
            raise ValueError(
                f"GradientAccountant: the layers of {', '.join(names)} are not covered, and fully_shard allows no "
                "backward pass per example; freeze them, or use DistributedDataParallel"
            )

    def _mistook(self, session: Session, loss: Tensor, batch: int, several: bool) -> bool:
        """Return whether the examples were looked for in an input that has no row for each; remember the right one."""
        for source in session.passes:
            if source.rows in (None, batch):
                continue
            where = None
            if batch in source.sizes:
                self._known.input_of_examples = source.sizes.index(batch)
                where = "another has {batch}, the number of examples"
            elif several and source.rows % max(1, batch) and (loss.dim() or source.returned_rows(batch)):
                where = "batch_size is {batch}, which does not divide that"
            if where is not None:
                warnings.warn(
                    f"GradientAccountant: the model's first input has {source.rows} rows, and "
                    f"{where.format(batch=batch)}: every layer takes a pass per example in this step; name inputs that "
                    "are the same for all examples in shared_inputs",
                    UserWarning,
                    stacklevel=3,
                )
                return True
        return False

    @property
    def _known(self) -> Checked:
        return checked(self._model, (self._batch_dim, self._shared_inputs))

    def _known_slow(self, session: Session, found: Reached) -> dict[int, nn.Parameter]:
        if not self._known.slow or self._check == "never":
            return {}
        named = session.named_parameters()
        return {id(p): p for name, p in named if name in self._known.slow and id(p) in found.seen}

    def _unchecked(self, session: Session, batch: int, found: Reached) -> object | None:
        """Return what this pass is remembered by, if it is to be checked."""
        if self._check == "never" or batch < 2 or session.whole or not found.seen or found.reentrant:
            return None
        source = session.passes[-1] if session.passes else None
        sign = signature(self._model, source, batch, found.seen)
        # examples of several rows need not have as many in every batch
        known = sign in self._known.signatures and all(source.rows in (None, batch) for source in session.passes)
        return None if self._check == "first" and known else sign

    def _compare(self, session: Session, run: Run, outputs: Outputs | None, found: Reached, unchecked: object) -> None:
        """Add the covered parameters whose norms are not those of plain autograd to the slow ones, with a warning."""
        if outputs is None:
            if session.passes and not run.slow:
                self._known.signatures.add(unchecked)
                warnings.warn(_UNCHECKED, UserWarning, stacklevel=3)
            return
        parameters = {key: p for key, p in found.seen.items() if key not in run.slow}
        if not parameters:
            return
        with kept_state(self._model):  # which checkpointing would update
            wrong = different(session, run, outputs, parameters)
        if wrong is None:
            return
        run.slow.update(wrong)
        self._known.signatures.add(unchecked)
        names = [name for name, p in session.named_parameters() if id(p) in wrong]
        if names:
            self._known.slow.update(names)
            self._warned.update(names)
            warnings.warn(_DISAGREE[outputs.meeting].format(", ".join(names)), UserWarning, stacklevel=3)

    def _no_outputs(self, session: Session, parameters: Mapping[int, nn.Parameter]) -> NoReturn:
        names = [name for name, p in session.named_parameters() if id(p) in parameters]
        raise ValueError(
            f"GradientAccountant: the loss depends on {', '.join(names)} in a way that cannot be told apart by "
            "example: call the model inside the with, and give a loss that depends on what it returns alone; or "
            "losses by example, with loss_reduction='none'"
        )

    def _account_unseen(
        self, session: Session, run: Run, outputs: Outputs, uncovered: Mapping[int, nn.Parameter]
    ) -> None:
        """Account the slow parameters one example at a time, with a warning for those whose layers are not covered."""
        if not run.slow:
            return
        named = session.named_parameters()
        names = [name for name, p in named if id(p) in uncovered and name not in self._warned]
        if names and run.batch:
            self._warned.update(names)
            message = f"GradientAccountant: layers that are not covered take a pass per example, of {', '.join(names)}"
            warnings.warn(message, UserWarning, stacklevel=3)
        with kept_state(self._model):
            account_examples(session, run, outputs, run.slow)
