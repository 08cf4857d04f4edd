"""The backward pass of a training, which others can look into."""

from __future__ import annotations

import contextlib

from torch import Tensor


class Backward:
    """The plain backward pass; a subclass can keep an account of the gradients of a training.

    `memloc_ext.training.train` calls ``start`` before an epoch. For each batch it enters ``batch``, in which it runs
    the forward pass and calls ``run``. It calls ``finish`` before it saves the epoch's checkpoint; a training that is
    killed in between runs that epoch again, and calls them again, once it is continued.

    Under torchrun all of it is called in every process, for its slice of each batch; ``train`` adds the gradients up.
    """

    def start(self, epoch: int) -> None:
        """Begin an epoch; the first has number 1."""

    def batch(self) -> contextlib.AbstractContextManager[object]:
        """Return what to enter around the forward and the backward pass of a batch."""
        return contextlib.nullcontext()

    def run(self, loss: Tensor, ids: Tensor, scale: Tensor | None, share: float) -> None:
        """Give the parameters their gradients, as ``loss.backward()`` does.

        Args:
            loss: Cross-entropy of the slice, mean over its B examples, multiplied by ``share`` and by ``scale``; 0-d.
                Over the processes it adds up to the batch's, mean over its examples.
            ids: Numbers of its examples in the data set, ``[B]``, int64.
            scale: What the loss is multiplied by for float16, 0-d, on the device of ``loss``; None for 1.
            share: B over the number of examples in the batch, in ``(0, 1]``; 1 in a single process.
        """
        loss.backward()

    def finish(self, epoch: int) -> None:
        """End an epoch, after its last batch."""
