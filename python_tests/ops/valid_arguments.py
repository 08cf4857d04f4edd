"""Small arguments that each operator takes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def call(name: str, values: list[Any]) -> Any:
    """Call an operator with arguments by position, and by name those of a dict that comes last."""
    *values, last = values
    operator = getattr(torch.ops.memloc_ext, name)
    return operator(*values, **last) if isinstance(last, dict) else operator(*values, last)


VALID: dict[str, Callable[[], list[Any]]] = {
    "example_tied_dropout": lambda: [torch.randn(3, 5, 2, 2), ids(4, 0, 2), 2, 0.3, 0, 0, 1],
    "example_tied_mlp": lambda: [
        torch.randn(2, 4, 3), ids(4, 0), torch.randn(6, 3), torch.randn(6), torch.randn(5, 6), torch.randn(5),
        "gelu", 2, 0.3, 0, 0, torch.randn(6, 3), torch.randn(6),
    ],
    "example_tied_mlp_backward": lambda: [
        torch.randn(2, 4, 5), torch.randn(2, 4, 3), ids(4, 0), torch.randn(6, 3), torch.randn(6), torch.randn(5, 6),
        torch.randn(5), "gelu", 2, 0.3, 0, 0, torch.randn(6, 3), torch.randn(6), [True] * 7,
    ],
    "kept_linear_": lambda: [
        torch.randn(8), torch.randn(5, 3), torch.randn(4, 3), torch.randn(4), ids(1, 3, 0), [0, 3, 5], [0, 2, 3]
    ],
    "kept_linear_input_": lambda: [
        torch.randn(5, 3), torch.randn(8), torch.randn(4, 3), ids(1, 3, 0), [0, 3, 5], [0, 2, 3]
    ],
    "kept_linear_weight_": lambda: [
        torch.randn(4, 3), torch.randn(8), torch.randn(5, 3), ids(1, 3, 0), [0, 3, 5], [0, 2, 3]
    ],
    "turned": lambda: [torch.randn(4, 3)],
    "example_tied_conv2d": lambda: [
        torch.randn(2, 4, 5, 5), ids(3, 0), torch.randn(6, 2, 3, 3), torch.randn(6), [2, 1], [1, 1], [1, 1], 2,
        {"num_generalization": 1, "p_mem": 0.4, "seed": 0, "site": 0},
    ],
    "kept_conv2d": lambda: [
        torch.randn(2, 4, 9, 9), torch.eye(2, 4) > 0, torch.randn(16, 4, 3, 3), torch.randn(16),
        [2, 1], [1, 1], [1, 1], 1,
    ],
    "kept_conv2d_input_grad": lambda: [
        torch.randn(2, 16, 5, 9), torch.eye(2, 4) > 0, torch.randn(16, 4, 3, 3), [9, 9], [2, 1], [1, 1], [1, 1], 1
    ],
    "kept_conv2d_weight_grad": lambda: [
        torch.randn(2, 16, 5, 9), torch.randn(2, 4, 9, 9), torch.eye(2, 4) > 0, [3, 3], [2, 1], [1, 1], [1, 1], 1
    ],
    "linear_grad_sqnorm": lambda: [torch.randn(3, 4, 5), torch.randn(3, 4, 2)],
    "conv2d_grad_sqnorm": lambda: [
        torch.randn(2, 4, 5, 5), torch.randn(2, 2, 3, 3), [3, 3], [2, 2], [1, 1], [1, 1], 2
    ],
    "linear_grad_sqnorm_groups": lambda: [torch.randn(3, 4, 5), torch.randn(3, 4, 2), ids(1, 0, 1), 2],
    "conv2d_grad_sqnorm_groups": lambda: [
        torch.randn(2, 4, 5, 5), torch.randn(2, 2, 3, 3), ids(1, 0), 2, [3, 3], [2, 2], [1, 1], [1, 1], 2
    ],
    "linear_grad_dot": lambda: [
        torch.randn(3, 4, 5), torch.randn(3, 4, 2), torch.randn(2, 2, 5), ids(1, 0, 1), 2
    ],
    "conv2d_grad_dot": lambda: [
        torch.randn(2, 4, 5, 5), torch.randn(2, 2, 3, 3), torch.randn(1, 2, 2, 3, 3), ids(1, 0), 2,
        [3, 3], [2, 2], [1, 1], [1, 1], 2,
    ],
    "linear_grad_inner": lambda: [torch.randn(3, 4, 5), torch.randn(3, 4, 2)],
    "conv2d_grad_inner": lambda: [torch.randn(2, 4, 5, 5), torch.randn(2, 2, 3, 3), [3, 3], [2, 2], [1, 1], [1, 1], 2],
    "plan": lambda: [2, 8, 16, [6, 3, 1, 1, 1], [6, 3, 1, 1, 1], 1],
    "channel_saliency": lambda: [torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), 1],
    "linear_ablation_loss": lambda: [
        torch.randn(3, 4), torch.randn(5, 4), torch.randn(5), ids(0, 4, 2), torch.randn(4)
    ],
    "account": lambda: [
        [torch.randn(3, 4, 5), torch.randn(3, 2, 5, 5), torch.randn(3, 4, 5), torch.randn(3, 4, 5)],
        [torch.randn(3, 4, 2), torch.randn(3, 4, 3, 3), torch.randn(3, 4, 5), torch.randn(3, 4, 5)],
        [torch.randn(3, 4, 1), torch.rand(3, 4, 1), torch.randn(4), torch.rand(4)],
        [
            0, 3, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1,
            1, 3, 0, 1, 1, 1, 3, 3, 2, 2, 1, 1, 1, 1, 2,
            2, 3, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1,
            3, 3, 0, 1, 1, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1,
        ],
        [-1.0, -1.0, -1.0, 0.1], ids(1, 0, 1), 2, True,
    ],
    "normalization_grads": lambda: [
        torch.randn(3, 2, 4), torch.randn(3, 2, 4), torch.randn(3, 2, 1), torch.rand(3, 2, 1)
    ],
    "conv2d_ablation": lambda: [
        torch.randn(2, 3, 4, 4), torch.randn(5, 2, 4, 4), torch.randn(3, 6, 3, 3), ids(0, 5, 1, 2, 3),
        [1, 1], [1, 1], [1, 1], torch.randn(3), torch.randn(3), torch.randn(5, 2, 3, 4, 4), True, None,
    ],
    "linear_ablation": lambda: [
        torch.randn(2, 3), torch.randn(5, 2), torch.randn(3, 6), ids(0, 5, 1, 2, 3),
        torch.randn(3), torch.randn(3), torch.randn(5, 2, 3), True, None,
    ],
    "ablate_channels": lambda: [torch.randn(2, 4, 3), ids(0, 1, 3), ids(2, 0, 3), torch.randn(4), 1],
    "ablate_channels_": lambda: [torch.randn(2, 4, 3), ids(0, 1, 3), ids(2, 0, 3), torch.randn(4), 1],
}  # fmt: skip
