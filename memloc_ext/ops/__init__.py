"""Operators: each is also ``torch.ops.memloc_ext.<name>``, on the CPU and on CUDA."""

from memloc_ext import _libraries as _libraries
from memloc_ext.ops.example_tied_dropout import example_tied_dropout
from memloc_ext.ops.grad_sqnorm import Plan, conv2d_grad_sqnorm, linear_grad_sqnorm, plan_conv2d, plan_linear

__all__ = [
    "Plan",
    "conv2d_grad_sqnorm",
    "example_tied_dropout",
    "linear_grad_sqnorm",
    "plan_conv2d",
    "plan_linear",
]
