"""The accountant of a model: what users open, and what they get."""

from __future__ import annotations

import threading
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from memloc_ext.nn.gradient_accountant.arguments import batch_of, groups_of
from memloc_ext.nn.gradient_accountant.compiled import uncompiled
from memloc_ext.nn.gradient_accountant.graph import Outputs, Reached, minimal, reached
from memloc_ext.nn.gradient_accountant.handlers import HANDLERS
from memloc_ext.nn.gradient_accountant.layout import Layout
from memloc_ext.nn.gradient_accountant.one_by_one import account_examples, add_to_grads
from memloc_ext.nn.gradient_accountant.one_by_one import exact_groups as exact_groups_of
from memloc_ext.nn.gradient_accountant.run import OneByOne, Run
from memloc_ext.nn.gradient_accountant.session import Session
from memloc_ext.nn.gradient_accountant.sharded import gathering, watch
from memloc_ext.nn.gradient_accountant.uses import accumulated
from memloc_ext.ops import Groups


@dataclass(frozen=True)
class Account:
    """What one backward pass tells of its examples. Its tensors take no part in autograd.

    Attributes:
        sqnorm: Parameter name to ``[batch]``: squared L2 norm of the gradient of each example's *own* loss, whatever
            the loss of the batch was; float64 for a float64 parameter, else float32. Zeros if the loss does not
            depend on the parameter.
        group_grad: Parameter name to ``[num_groups, *shape]``: what each group of examples adds to the gradient of the
            loss *as it was given*, so that their sum is the gradient of the batch; a mean loss divides by the size
            of the batch, not of the group. Of the dtypes of ``sqnorm``. Empty without ``group_ids``.
    """

    sqnorm: dict[str, Tensor]
    group_grad: dict[str, Tensor]


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

    Covered are linear layers and matrix products, convolutions, batch, layer, group, instance and RMS normalisation,
    embeddings, `torch.nn.MultiheadAttention`, and parameters that meet activations element by element; used any number
    of times, by modules or by functions. Any other parameter takes one backward pass per example, with a warning that
    names it. Autocast, gradient checkpointing, frozen parameters, `DistributedDataParallel` and
    `torch.distributed.fsdp.fully_shard` work as usual; under the last two, norms and group gradients are those of this
    process's examples, and after `fully_shard` every parameter must be covered. What `torch.compile` compiled runs
    uncompiled here.

    The layers it runs cannot be differentiated twice, as gradient penalties need. A hook on a parameter is called with
    None where ``weight_grads`` is False.

    If examples meet in the forward pass, as batch normalisation in training mode makes them, the norm is that of the
    gradient *that flows through the example's own activations*: what the example's rows add to the gradient of the
    whole batch's loss, statistics included. In evaluation mode it is the gradient of the example's own loss.

    Args:
        model: Its parameters that require gradients are accounted, under their names.
        batch_dim: Dimension of the examples in the model's inputs: 0, or 1 for ``[tokens, batch, *]``.

    Raises:
        TypeError: If ``model`` is not a module.
        ValueError: If ``batch_dim`` is negative.

    Source: Maini et al., "Can Neural Network Memorization Be Localized?", ICML 2023, gradient accounting; for the way
    norms are computed, see `memloc_ext.ops.linear_grad_sqnorm`.
    """

    def __init__(self, model: nn.Module, *, batch_dim: int = 0) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"GradientAccountant: model must be a torch.nn.Module, got {type(model).__name__}")
        if batch_dim < 0:
            raise ValueError(f"GradientAccountant: batch_dim must be at least 0, got {batch_dim}")
        self._model, self._batch_dim = model, batch_dim
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
        session, stack = Session(self._model, self._batch_dim, HANDLERS), ExitStack()
        for hook in self._hooks(session):
            stack.callback(hook.remove)
        stack.enter_context(uncompiled())
        stack.enter_context(session)
        self._sessions.append((session, stack))
        return self

    def __exit__(self, *error: object) -> None:
        """Stop looking."""
        session, stack = self._sessions.pop()
        session.outputs.clear()
        stack.close()

    def _hooks(self, session: Session) -> list[RemovableHandle]:
        """Have the session told when this thread runs the model."""
        sharded = gathering(self._model)

        def mine() -> bool:
            return any(session is entered for entered, _ in self._sessions)

        def before(model: nn.Module, args: Any, kwargs: Any) -> None:
            if mine():
                session.enter_model((args, kwargs))

        def after(model: nn.Module, args: Any, output: Any) -> None:
            if mine():
                session.leave_model(output)

        hooks = [
            self._model.register_forward_pre_hook(before, with_kwargs=True),
            self._model.register_forward_hook(after, always_call=True),
        ]
        return hooks + [watch(session, name, module, sharded) for name, module in sharded.items()]

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
                loss per example, ``[batch, *]``, of which the sum is differentiated. A mean over tokens of which
                examples have different numbers is not a mean over examples: give ``none`` or ``sum`` then.
            weight_grads: If False, the gradients of parameters are not computed, their ``grad`` stays as it was and
                there are no group gradients: the norms alone, for less than a usual backward pass.
            exact_groups: Get the groups' gradients from one backward pass per group, which is exact also where
                examples meet (batch normalisation in training mode). A ``mean`` or ``sum`` must then depend on the
                model through what it returns, with the examples in dimension ``batch_dim``.
            batch_size: Number of examples, if an example has several rows of the model's input, one behind the other;
                by default each row is one.
            retain_graph: Keep the graph for another backward pass.

        Returns:
            Squared norms and group gradients of every parameter that requires a gradient.

        Raises:
            RuntimeError: If called outside the ``with``.
            ValueError: If an argument breaks the above, the examples cannot be told apart in what a layer is given, or
                a parameter is not covered and neither the loss nor the model's output tells the examples apart. No
                gradient is written then, unless the layer is the cause.
            TypeError: If ``group_ids`` is not int64.
        """
        if not self._sessions:
            raise RuntimeError("GradientAccountant: backward must be called inside the with of the accountant")
        session = self._sessions[-1][0]
        with torch._C.DisableTorchFunction():  # only what checkpointing recomputes is to be seen
            batch = batch_of(loss, loss_reduction, group_ids, batch_size, session.batch)
            groups = groups_of(loss, group_ids, num_groups, batch, exact_groups)
            self._check_parallel(weight_grads, exact_groups)
            root = loss.sum() if loss_reduction == "none" else loss
            found = reached(root, session, session.parameters)
            self._check_sharded(session, found, exact_groups)
        exact = exact_groups and weight_grads
        calls = session.calls | found.uses  # the larger count of each
        several = batch_size is not None
        run = Run(batch, None if exact else groups, weight_grads and not exact, calls, found.unseen, several)
        if found.unseen or exact:
            outputs = Outputs([loss], [torch.ones_like(loss)], [Layout(0, 1, batch, 1)])
            if loss_reduction != "none":
                outputs = self._outputs(session, root, found, run)
            self._account_unseen(session, run, outputs)
            if exact and groups is not None:
                run.group_grad = exact_groups_of(session, run, outputs, found.all, groups)
        # parameters that are not covered know no other way to be left alone
        inputs = list(found.seen.values()) if found.unseen and not run.weight_grads else None
        session.run = run
        try:
            if inputs is None or inputs:
                root.backward(retain_graph=retain_graph, inputs=inputs)
            with torch._C.DisableTorchFunction(), torch.no_grad():
                run.finish()
        finally:
            session.run = None
            if not retain_graph:
                session.calls.clear()
                with torch._C.DisableTorchFunction():
                    session.drop_outputs(found.nodes)
        with torch._C.DisableTorchFunction(), torch.no_grad():
            if exact:
                add_to_grads(found.all, run.group_grad)
            return self._account(session, run, loss_reduction, groups if weight_grads else None)

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

    def _outputs(self, session: Session, root: Tensor, found: Reached, run: Run) -> Outputs:
        """Return tensors whose rows are the examples and through which the loss depends on the parameters."""
        returned = [t for forward_pass in session.outputs for t in forward_pass]
        outputs = minimal(root, session, returned, found.all)
        layouts = [session.output_layout(t) for t in outputs or ()]
        if not outputs or None in layouts:
            names = [name for name, p in session.named_parameters() if id(p) in (found.unseen or found.all)]
            raise ValueError(
                f"GradientAccountant: the loss depends on {', '.join(names)} in a way that cannot be told apart by "
                "example: call the model inside the with, and give a loss that depends on what it returns alone; or "
                "losses by example, with loss_reduction='none'"
            )
        session.run = OneByOne(run, {})
        try:
            cotangents = torch.autograd.grad(root, outputs, retain_graph=True)
        finally:
            session.run = None
        return Outputs(outputs, list(cotangents), [layout for layout in layouts if layout is not None])

    def _account_unseen(self, session: Session, run: Run, outputs: Outputs) -> None:
        """Account parameters whose layers are not covered, by one backward pass per example."""
        unseen = run.slow
        if not unseen:
            return
        for name, parameter in session.named_parameters():
            if id(parameter) in unseen and name not in self._warned:
                self._warned.add(name)
                message = f"GradientAccountant: the layer of {name} is not covered: a backward pass per example"
                warnings.warn(message, UserWarning, stacklevel=3)
        account_examples(session, run, outputs, unseen)

    def _account(self, session: Session, run: Run, loss_reduction: str, groups: Groups | None) -> Account:
        scale = run.batch**2 if loss_reduction == "mean" else 1
        sqnorm, group_grad = {}, {}
        for name, p in session.named_parameters():
            if not p.requires_grad:
                continue
            dtype, key = accumulated(p.dtype), id(p)
            norms = run.sqnorm.get(key)
            sqnorm[name] = torch.zeros(run.batch, dtype=dtype, device=p.device) if norms is None else norms
            if groups is not None:
                sums = run.group_grad.get(key)
                shape = (groups.num, *p.shape)
                group_grad[name] = torch.zeros(shape, dtype=dtype, device=p.device) if sums is None else sums
        if scale != 1:
            scaled = torch._foreach_mul(list(sqnorm.values()), scale)  # pyright: ignore[reportPrivateImportUsage]
            sqnorm = dict(zip(sqnorm, scaled, strict=True))
        return Account(sqnorm, group_grad)
