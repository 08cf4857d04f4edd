"""Operators: each is also ``torch.ops.memloc_ext.<name>``, on the CPU and on CUDA."""

from memloc_ext import _libraries as _libraries
from memloc_ext.ops import ablation as _ablation  # noqa: F401, registers its operators
from memloc_ext.ops import account as _account  # noqa: F401
from memloc_ext.ops.ablate_channels import ablate_channels, ablate_channels_
from memloc_ext.ops.channel_saliency import channel_saliency
from memloc_ext.ops.example_tied_conv2d import example_tied_conv2d
from memloc_ext.ops.example_tied_dropout import example_tied_dropout
from memloc_ext.ops.example_tied_mlp import example_tied_mlp
from memloc_ext.ops.grad_dot import conv2d_grad_dot, linear_grad_dot
from memloc_ext.ops.grad_inner import conv2d_grad_inner, linear_grad_inner
from memloc_ext.ops.grad_sqnorm import Plan, conv2d_grad_sqnorm, linear_grad_sqnorm, plan_conv2d, plan_linear
from memloc_ext.ops.grad_sqnorm_groups import Groups, conv2d_grad_sqnorm_groups, linear_grad_sqnorm_groups
from memloc_ext.ops.normalization_grads import normalization_grads

__all__ = [
    "Groups",
    "Plan",
    "ablate_channels",
    "ablate_channels_",
    "channel_saliency",
    "conv2d_grad_dot",
    "conv2d_grad_inner",
    "conv2d_grad_sqnorm",
    "conv2d_grad_sqnorm_groups",
    "example_tied_conv2d",
    "example_tied_dropout",
    "example_tied_mlp",
    "linear_grad_dot",
    "linear_grad_inner",
    "linear_grad_sqnorm",
    "linear_grad_sqnorm_groups",
    "normalization_grads",
    "plan_conv2d",
    "plan_linear",
]
