"""A vision transformer for small images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memloc_ext.models.layout import Layout


class ViT(nn.Module):
    """Pre-norm transformer over image patches; a class token carries the result.

    Dropout follows the embedding and every linear layer but the projection to queries, keys and values.

    Args:
        num_classes: Number of classes, positive.
        in_channels: Channels of the image, positive.
        image_size: Side of the square image in pixels, a multiple of ``patch``.
        patch: Side of the square patches in pixels.
        dim: Channels of a token, a multiple of ``heads``.
        depth: Number of blocks.
        heads: Attention heads per block.
        mlp: Hidden units of the MLP in each block.
        dropout: Probability of zeroing an activation, in ``[0, 1]``.

    Shape:
        ``[batch, in_channels, image_size, image_size]`` to logits ``[batch, num_classes]``.

    Raises:
        ValueError: If ``image_size`` is not a positive multiple of ``patch``, or ``dim`` not one of ``heads``.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        *,
        patch: int = 2,
        dim: int = 512,
        depth: int = 6,
        heads: int = 8,
        mlp: int = 512,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if image_size < patch or image_size % patch:
            raise ValueError(f"ViT: image_size must be a positive multiple of patch = {patch}, got {image_size}")
        if dim < heads or dim % heads:
            raise ValueError(f"ViT: dim must be a positive multiple of heads = {heads}, got {dim}")
        blocks = [f"blocks.{i}" for i in range(depth)]
        self.layout = Layout(
            groups={"embedding": ("embedding",), **{block: (block,) for block in blocks}, "head": ("norm", "head")},
            sites=tuple(f"{block}.mlp.act" for block in blocks),
            channel_dim=-1,
        )
        self.embedding = Embedding(in_channels, image_size // patch, patch, dim, dropout)
        self.blocks = nn.Sequential(*(Block(dim, heads, mlp, dropout) for _ in blocks))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        class_token = self.blocks(self.embedding(x))[:, 0]
        return self.head(self.norm(class_token))


class Embedding(nn.Module):
    """Patches of an image, projected, behind a class token, plus learned positions.

    ``[batch, in_channels, grid * patch, grid * patch]`` to ``[batch, 1 + grid ** 2, dim]``; else as `ViT`.
    """

    def __init__(self, in_channels: int, grid: int, patch: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.patches = nn.Conv2d(in_channels, dim, patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(nn.init.normal_(torch.empty(1, 1 + grid**2, dim), std=0.02))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens."""
        patches = self.patches(x).flatten(2).transpose(1, 2)
        class_token = self.class_token.expand(len(x), -1, -1)
        return self.dropout(torch.cat((class_token, patches), dim=1) + self.position)


class Block(nn.Module):
    """Attention and an MLP, each normalised at its input and added to it; ``[batch, tokens, dim]`` to the same."""

    def __init__(self, dim: int, heads: int, mlp: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, mlp, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of ``x``."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """Multi-head self-attention, with dropout at its output; ``[batch, tokens, dim]`` to the same."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of ``x``."""
        heads = self.qkv(x).unflatten(2, (3, self.heads, -1)).transpose(1, 3)  # [batch, heads, 3, tokens, dim / heads]
        query, key, value = heads.unbind(2)
        x = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.dropout(self.proj(x))


class Mlp(nn.Module):
    """Two linear layers, with dropout after each; ``[batch, tokens, dim]`` to the same.

    The output of ``act`` is the hidden units, ``[batch, tokens, hidden]``.
    """

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of ``x``."""
        return self.dropout(self.fc2(self.dropout(self.act(self.fc1(x)))))
