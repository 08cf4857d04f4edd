"""Per-example gradient norms and the gradients of groups of examples, of every parameter, in one backward pass.

A model is run as it is. While an accountant is open, a `Session` sees every PyTorch function that is called; where a
function gets a parameter, a rule (`linear`, `convolution`, ...) runs it as an autograd function of its own, whose
backward knows the layer's input and the gradient of its output. From these it makes a `Use`: what one use of a
parameter adds to every example's gradient. A `Run`, one backward pass, adds up the uses.

A `Layout` says where the examples are in an activation; it is followed from the model's inputs. What cannot be
followed, or what `check` finds to be wrong, runs on one example at a time (`one_by_one`), by the `ForwardPass` that is
kept.
"""

from memloc_ext.accounting.account import Account
from memloc_ext.accounting.accountant import GradientAccountant

__all__ = ["Account", "GradientAccountant"]
