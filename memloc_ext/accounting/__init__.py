"""Per-example gradient norms and the gradients of groups of examples, of every parameter, in one backward pass.

What happens from `accountant.backward(loss)` down, and the file of each step:

- `accountant`: what users open. `account`: arguments and result of a backward pass.
- `tracer`: sees every PyTorch function that is called while an accountant is open; a layer function runs those that get
  a parameter. `places`: where the examples are in every tensor. `example_axis`: in which rows of which dimension.
  `propagation`: where a function leaves them.
- `layers`: one file per kind of layer. A layer function runs forward and backward as an autograd function of its own,
  whose backward knows the layer's input and the gradient of its output.
- `contributions`: what one use of a parameter adds to each example's gradient: norms and sums, not the gradient itself.
- `uses`: all uses of a parameter, as one contribution to it. `backward_pass`: adds them up, for every parameter.
- `untraced`: later steps of a model, which run on PyTorch's own layers and watch no function. `recognise`: finds the
  layers in their autograd graph, in the first step; `pattern`: that graph. `told`: what the nodes of such a graph tell
  a backward pass. `fused`: which layers one operator accounts together.
- `queries`: what else is asked of the examples' gradients. `clipping`: sums of clipped gradients.
- `graph`: which parameters a loss depends on. `losses`: whether it is the mean that it is said to be.
- `per_example`: where the above cannot tell examples apart, a pass for each, by running the model again
  (`forward_pass`). `outputs`: what the model returned for each. `check`: holds two examples against plain autograd.
- `sharded`: models that several processes share. `members`: the modules, parameters and buffers of a model.
"""

from memloc_ext.accounting.account import Account
from memloc_ext.accounting.accountant import GradientAccountant
from memloc_ext.accounting.queries import Projection

__all__ = ["Account", "GradientAccountant", "Projection"]
