"""Which function is run by which layer function: the one list of what is covered."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from memloc_ext.accounting.layers.contraction import bmm, einsum, grouped
from memloc_ext.accounting.layers.convolution import convolution, example_tied_convolution, kept_convolution
from memloc_ext.accounting.layers.elementwise import broadcast, cat, prelu, repeat, setitem
from memloc_ext.accounting.layers.embedding import embedding, embedding_bag, getitem
from memloc_ext.accounting.layers.kept_mlp import example_tied_mlp, kept_mlp
from memloc_ext.accounting.layers.linear import addmm, bilinear, linear, matmul
from memloc_ext.accounting.layers.normalization import batch_norm, group_norm, instance_norm, layer_norm, rms_norm
from memloc_ext.accounting.layers.recurrent import cell, recurrent
from memloc_ext.accounting.propagation import ELEMENTWISE
from memloc_ext.accounting.tracer import Handler, Tracer
from memloc_ext.borrowing import in_parts
from memloc_ext.ops.kept_mlp import kept_mlp as run_kept_mlp

_attention = in_parts(F.multi_head_attention_forward)


def attention(tracer: Tracer, func: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Handle `torch.nn.functional.multi_head_attention_forward`: its projections are handled one by one."""
    with tracer:
        return _attention(*args, **kwargs)


HANDLERS: dict[Any, Handler] = {
    F.linear: linear,
    **dict.fromkeys(("matmul", "__matmul__", "__rmatmul__", "mm"), matmul),
    "addmm": addmm,
    "bilinear": bilinear,
    "bmm": bmm,
    "_grouped_mm": grouped,
    torch.einsum: einsum,
    "prelu": prelu,
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), convolution),
    **dict.fromkeys((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), convolution),
    F.embedding: embedding,
    F.embedding_bag: embedding_bag,
    "__getitem__": getitem,
    F.batch_norm: batch_norm,
    F.layer_norm: layer_norm,
    F.group_norm: group_norm,
    F.instance_norm: instance_norm,
    F.rms_norm: rms_norm,
    F.multi_head_attention_forward: attention,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), recurrent),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), cell),
    **dict.fromkeys((*ELEMENTWISE, "scaled_dot_product_attention"), broadcast),
    **dict.fromkeys(("cat", "concat", "concatenate", "stack"), cat),
    "__setitem__": setitem,
    torch.ops.memloc_ext.example_tied_conv2d.default: example_tied_convolution,
    torch.ops.memloc_ext.kept_conv2d.default: kept_convolution,
    torch.ops.memloc_ext.example_tied_mlp.default: example_tied_mlp,
    run_kept_mlp: kept_mlp,
    **dict.fromkeys(("repeat", "tile", "repeat_interleave"), repeat),
}
"""Function, or the name of a function and of the tensor method that does the same, to its handler."""
COMPLEX_HANDLERS = {key: handler for key, handler in HANDLERS.items() if handler in (broadcast, cat, repeat)}
"""Those that are right for complex tensors, too."""
