import pytest
import torch
from accounted import Model, check
from test_layers import awake
from torch import Tensor, nn
from torch.nn import functional as F

from memloc_ext.models import build


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target)


@pytest.mark.parametrize(
    ("name", "size", "batch", "width"),
    [
        ("lenet", 28, 4, 1.0),
        ("resnet9", 32, 2, 0.125),
        ("vit", 32, 2, 1.0),
        pytest.param("resnet50", 32, 2, 1.0, marks=pytest.mark.slow),  # 25 million parameters, five times over
    ],
)
def test_image_models(name: str, size: int, batch: int, width: float) -> None:
    torch.manual_seed(0)
    model = build(name, num_classes=3, in_channels=1, image_size=size, width=width).eval()
    check(model, torch.randn(batch, 1, size, size), torch.arange(batch) % 3, cross_entropy, steps=1)


class Translator(nn.Module):
    """Encoder and decoder whose input and output embeddings are one table."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8, padding_idx=0)
        self.positions = nn.Parameter(torch.randn(1, 6, 8))
        sizes = {"d_model": 8, "nhead": 2, "dim_feedforward": 12, "batch_first": batch_first}
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**sizes), 2, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**sizes), 1)
        self.scale = nn.Parameter(torch.ones(8))
        self.head = nn.Linear(8, 11)
        self.head.weight = self.words.weight
        self.batch_first = batch_first

    def embed(self, tokens: Tensor) -> Tensor:
        positions = self.positions[:, : tokens.shape[1 if self.batch_first else 0]]
        return self.words(tokens) * 8**0.5 + (positions if self.batch_first else positions.transpose(0, 1))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        padding = (source == 0) if self.batch_first else (source == 0).t()
        memory = self.encoder(self.embed(source), src_key_padding_mask=padding)
        length = target.shape[1 if self.batch_first else 0]
        causal = nn.Transformer.generate_square_subsequent_mask(length, dtype=memory.dtype)
        hidden = self.decoder(self.embed(target), memory, tgt_mask=causal, memory_key_padding_mask=padding)
        logits = self.head(hidden * self.scale)
        return logits if self.batch_first else logits.transpose(0, 1)


@pytest.mark.parametrize("batch_first", [True, False])
def test_tied_transformer(batch_first: bool) -> None:
    torch.manual_seed(0)
    source, words = torch.randint(1, 11, (4, 5)), torch.randint(1, 11, (4, 4))
    source[1, 3:], words[2, 2:] = 0, 0

    def loss_of(logits: Tensor, target: Tensor) -> Tensor:
        losses = F.cross_entropy(logits.transpose(1, 2), target, ignore_index=0, reduction="none")
        return losses.sum(1).mean()

    given = (source, words) if batch_first else (source.t(), words.t())
    model = awake(Translator(batch_first))
    check(model, given, words.roll(-1, 1), loss_of, batch_dim=0 if batch_first else 1)


def test_class_tokens_scales_and_masks() -> None:
    torch.manual_seed(0)

    def run(m: nn.Module, images: Tensor, mask: Tensor) -> Tensor:
        x = m.patches(images).flatten(2).transpose(1, 2)
        x = torch.where(mask[..., None], m.mask_token, x)
        x = torch.cat([m.token.expand(len(x), -1, -1), x], 1) + m.positions
        x = x + m.gamma * m.attention(m.norm(x), m.norm(x), m.norm(x), need_weights=False)[0]
        return m.head(x[:, 0]) / m.temperature

    model = Model(
        run,
        patches=nn.Conv2d(1, 8, 2, stride=2),
        token=nn.Parameter(torch.randn(1, 1, 8)),
        mask_token=nn.Parameter(torch.randn(8)),
        positions=nn.Parameter(torch.randn(1, 5, 8)),
        gamma=nn.Parameter(torch.rand(8)),
        norm=nn.LayerNorm(8),
        attention=nn.MultiheadAttention(8, 2, batch_first=True),
        head=nn.Linear(8, 3),
        temperature=nn.Parameter(torch.tensor([0.7])),
    )
    mask = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 1]]).bool()
    check(awake(model), (torch.randn(4, 1, 4, 4), mask), torch.tensor([0, 2, 1, 1]), cross_entropy)
