"""The accountant of a model: what users open, and what they get."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from memloc_ext.nn.gradient_accountant.compiled import uncompiled
from memloc_ext.nn.gradient_accountant.graph import Reached, Rows, minimal, reached
from memloc_ext.nn.gradient_accountant.handlers import HANDLERS
from memloc_ext.nn.gradient_accountant.layout import Layout
from memloc_ext.nn.gradient_accountant.run import OneByOne, Run
from memloc_ext.nn.gradient_accountant.session import Session
from memloc_ext.nn.gradient_accountant.uses import accumulated
from memloc_ext.ops import Groups

_REDUCTIONS = ("mean", "sum", "none")


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

    ::

        accountant = GradientAccountant(model)
        with accountant:
            loss = F.cross_entropy(model(x), y)
            account = accountant.backward(loss, group_ids=noisy.long(), num_groups=2)
        account.sqnorm["conv1.weight"]  # [batch]

    Nothing of the model is changed: no hooks, buffers, flags or gradients but the usual ones are left behind, and
    outside of the ``with`` it runs as ever. Each thread may open the same accountant.

    Covered are linear layers and matrix products, convolutions, batch, layer, group, instance and RMS normalisation,
    embeddings, `torch.nn.MultiheadAttention`, and parameters that meet activations element by element; used any number
    of times, by modules or by functions. Any other parameter takes one backward pass per example, with a warning that
    names it. Autocast, gradient checkpointing, frozen parameters and `DistributedDataParallel` work as usual; under
    the last, group gradients are those of this process. What `torch.compile` compiled runs uncompiled here.

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

    def __enter__(self) -> Self:
        """Look at what the model does in this thread, until the end of the ``with``."""
        session, stack = Session(self._model, self._batch_dim, HANDLERS), ExitStack()
        stack.enter_context(uncompiled())
        for hook in self._hooks(session):
            stack.callback(hook.remove)
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

        def mine() -> bool:
            return any(session is entered for entered, _ in self._sessions)

        def before(model: nn.Module, args: Any, kwargs: Any) -> None:
            if mine():
                session.enter_model((args, kwargs))

        def after(model: nn.Module, args: Any, output: Any) -> None:
            if mine():
                session.leave_model(output)

        return [
            self._model.register_forward_pre_hook(before, with_kwargs=True, prepend=False),
            self._model.register_forward_hook(after, always_call=True),
        ]

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
                loss per example, ``[batch, *]``, of which the sum is differentiated.
            weight_grads: If False, the gradients of parameters are not computed, their ``grad`` stays as it was and
                there are no group gradients: the norms alone, for less than a usual backward pass.
            exact_groups: Get the groups' gradients from one backward pass per group, which is exact also where
                examples meet (batch normalisation in training mode). A ``mean`` or ``sum`` must then depend on the
                model through what it returns, with the examples in dimension ``batch_dim``.
            batch_size: Number of examples; by default that of ``group_ids``, of a ``none`` loss, or of the first
                layer's input.
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
            batch = _batch(loss, loss_reduction, group_ids, batch_size, session.batch)
            groups = _groups(loss, group_ids, num_groups, batch, exact_groups)
            self._check_parallel(weight_grads, exact_groups)
            root = loss.sum() if loss_reduction == "none" else loss
            found = reached(root, session, session.parameters)
        exact = exact_groups and weight_grads
        run = Run(batch, None if exact else groups, weight_grads and not exact, session.calls, found.unseen)
        if found.unseen or exact:
            rows = Rows([loss], [torch.ones_like(loss)], [Layout(0, 1, batch, 1)])
            if loss_reduction != "none":
                rows = self._rows(session, root, found, batch)
            self._account_unseen(session, run, rows)
            if exact and groups is not None:
                run.group_grad = _exact_groups(session, rows, found.all, groups)
        # parameters that are not covered know no other way to be left alone
        inputs = list(found.seen.values()) if found.unseen and not run.weight_grads else None
        session.run = run
        try:
            if inputs is None or inputs:
                root.backward(retain_graph=retain_graph, inputs=inputs)
            with torch._C.DisableTorchFunction():
                run.finish()
        finally:
            session.run = None
            if not retain_graph:
                session.calls.clear()
                with torch._C.DisableTorchFunction():
                    session.outputs = [t for t in session.outputs if t.grad_fn not in found.nodes]
        with torch._C.DisableTorchFunction():
            if exact:
                _add_to_grads(found.all, run.group_grad)
            return self._account(run, loss_reduction, groups if weight_grads else None)

    def _check_parallel(self, weight_grads: bool, exact_groups: bool) -> None:
        model = self._model
        if isinstance(model, DistributedDataParallel) and model.require_backward_grad_sync:
            for name, wrong, rule in (("weight_grads", not weight_grads, True), ("exact_groups", exact_groups, False)):
                if wrong:
                    raise ValueError(
                        f"GradientAccountant: {name} must be {rule} while DistributedDataParallel synchronises "
                        f"gradients, got {not rule}; call forward and backward inside model.no_sync()"
                    )

    def _rows(self, session: Session, root: Tensor, found: Reached, batch: int) -> Rows:
        """Return tensors whose rows are the examples and through which the loss depends on the parameters."""
        outputs = minimal(root, session, session.outputs, found.all)
        layouts = [session.output_layout(t) for t in outputs or ()]
        if not outputs or None in layouts:
            names = [name for name, p in self._model.named_parameters() if id(p) in (found.unseen or found.all)]
            raise ValueError(
                f"GradientAccountant: the loss depends on {', '.join(names)} in a way that cannot be told apart by "
                "example: call the model inside the with, and give a loss that depends on what it returns alone; or "
                "losses by example, with loss_reduction='none'"
            )
        session.run = OneByOne(batch, {})
        try:
            cotangents = torch.autograd.grad(root, outputs, retain_graph=True)
        finally:
            session.run = None
        return Rows(outputs, list(cotangents), [layout for layout in layouts if layout is not None])

    def _account_unseen(self, session: Session, run: Run, rows: Rows) -> None:
        """Account parameters whose layers are not covered, by one backward pass per example."""
        unseen = run.slow
        if not unseen:
            return
        for name, parameter in self._model.named_parameters():
            if id(parameter) in unseen and name not in self._warned:
                self._warned.add(name)
                message = f"GradientAccountant: the layer of {name} is not covered: a backward pass per example"
                warnings.warn(message, UserWarning, stacklevel=3)
        parameters = list(unseen.values())
        session.run = OneByOne(run.batch, unseen)
        try:
            for b in range(run.batch):
                cotangents = rows.of(run.batch, torch.tensor([b], device=rows.tensors[0].device))
                gradients = torch.autograd.grad(
                    rows.tensors, parameters, cotangents, retain_graph=True, allow_unused=True
                )
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        run.add_example(parameter, b, gradient)
        finally:
            session.run = None

    def _account(self, run: Run, loss_reduction: str, groups: Groups | None) -> Account:
        scale = run.batch**2 if loss_reduction == "mean" else 1
        sqnorm, group_grad = {}, {}
        for name, p in self._model.named_parameters():
            if not p.requires_grad:
                continue
            dtype, key = accumulated(p.dtype), id(p)
            norms = run.sqnorm.get(key)
            sqnorm[name] = torch.zeros(run.batch, dtype=dtype, device=p.device) if norms is None else norms * scale
            if groups is not None:
                sums = run.group_grad.get(key)
                shape = (groups.num, *p.shape)
                group_grad[name] = torch.zeros(shape, dtype=dtype, device=p.device) if sums is None else sums
        return Account(sqnorm, group_grad)


def _batch(
    loss: Tensor, loss_reduction: str, group_ids: Tensor | None, batch_size: int | None, seen: int | None
) -> int:
    """Return the number of examples; checks what it depends on."""
    if loss_reduction not in _REDUCTIONS:
        raise ValueError(f"GradientAccountant: loss_reduction must be mean, sum or none, got {loss_reduction!r}")
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        raise ValueError(
            "GradientAccountant: loss must be a tensor that depends on a parameter that requires a gradient"
        )
    if (loss.numel() == 1 and loss.dim() == 0) == (loss_reduction == "none"):
        rule = "one loss per example, [batch, *]," if loss_reduction == "none" else "a scalar"
        raise ValueError(
            f"GradientAccountant: loss must be {rule} for loss_reduction={loss_reduction!r}, got {list(loss.shape)}"
        )
    sizes = {
        "batch_size": batch_size,
        "group_ids": group_ids.numel() if isinstance(group_ids, Tensor) else None,
        "loss": len(loss) if loss_reduction == "none" else None,
    }
    known = {name: size for name, size in sizes.items() if size is not None}
    if len(set(known.values())) > 1:
        raise ValueError(f"GradientAccountant: sizes of the batch must agree, got {known}")
    batch = next(iter(known.values()), seen)
    if batch is None:
        raise ValueError(
            "GradientAccountant: the forward pass must run inside the with, where the first layer's input tells the "
            "size of the batch; no layer was seen there, so give batch_size"
        )
    return batch


def _groups(
    loss: Tensor, group_ids: Tensor | None, num_groups: int | None, batch: int, exact_groups: bool
) -> Groups | None:
    """Return the groups, checked."""
    if group_ids is None:
        for name, value in (("num_groups", num_groups), ("exact_groups", exact_groups or None)):
            if value is not None:
                raise ValueError(f"GradientAccountant: {name} needs group_ids, got None")
        return None
    if isinstance(group_ids, Tensor) and (group_ids.shape != (batch,) or group_ids.device != loss.device):
        raise ValueError(
            f"GradientAccountant: group_ids must be [{batch}] on {loss.device}, got {list(group_ids.shape)} on "
            f"{group_ids.device}"
        )
    try:
        if num_groups is None:
            num_groups = int(group_ids.max()) + 1 if batch else 1
        return Groups(group_ids, num_groups)
    except (TypeError, ValueError) as error:
        raise type(error)(f"GradientAccountant: {error}") from None


def _exact_groups(
    session: Session, rows: Rows, parameters: Mapping[int, nn.Parameter], groups: Groups
) -> dict[int, Tensor]:
    """Return the gradients of the groups from a backward pass each."""
    result = {
        key: torch.zeros(groups.num, *p.shape, dtype=accumulated(p.dtype), device=p.device)
        for key, p in parameters.items()
    }
    for group in range(groups.num):
        chosen = (groups.ids == group).nonzero().flatten()
        if len(chosen) == 0:
            continue
        cotangents = rows.of(len(groups.ids), chosen)
        session.run = OneByOne(len(groups.ids), parameters)
        try:
            gradients = torch.autograd.grad(
                rows.tensors, list(parameters.values()), cotangents, retain_graph=True, allow_unused=True
            )
        finally:
            session.run = None
        for key, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                result[key][group] = gradient
    return result


@torch.no_grad()
def _add_to_grads(parameters: Mapping[int, nn.Parameter], group_grad: Mapping[int, Tensor]) -> None:
    for key, p in parameters.items():
        total = group_grad[key].sum(0).to(p.dtype)
        p.grad = total if p.grad is None else p.grad.add_(total)
