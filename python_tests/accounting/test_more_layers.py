"""Activations with parameters, bags of embeddings, and products with parameters of more dimensions."""

import warnings

import pytest
import torch
from accounted import Model, check, held, parameter, targets, weighted
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from memloc_ext import GradientAccountant

B = 4  # many sizes below are equal to it


def attend(m: nn.Module, x: Tensor) -> Tensor:
    q = x.unflatten(-1, (2, 2)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, m.keys.expand(len(x), -1, -1, -1), q * m.scale, attn_mask=m.table)


def assigned(m: nn.Module, x: Tensor) -> Tensor:
    result = torch.zeros_like(x)
    result[:, 1] = m.token
    result[:, 0, :2] = m.token[:2] * 2
    return m.l(x) * result


def routed(m: nn.Module, x: Tensor) -> Tensor:
    tokens = x.flatten(0, 1)
    expert = tokens[:, :3].argmax(-1)
    return (torch.bmm(m.w[expert], tokens.unsqueeze(-1)).squeeze(-1) + m.b[expert]).view(len(x), -1, 2)


LAYERS = {
    "prelu": (lambda: nn.Sequential(nn.Linear(3, 5), nn.PReLU(), nn.Linear(5, 2)), (B, 3)),
    "prelu, channels": (lambda: nn.Sequential(nn.Conv2d(2, B, 2), nn.PReLU(B)), (B, 2, 3, 3)),
    "prelu, features": (lambda: nn.Sequential(nn.Linear(3, 5), nn.PReLU(5)), (B, 3)),
    "prelu, no channels": (lambda: Model(lambda m, x: m.p(m.l(x)[:, 0]), p=nn.PReLU(), l=nn.Linear(3, 1)), (B, 3)),
    "bilinear": (lambda: Model(lambda m, x: m.b(x, m.l(x)), b=nn.Bilinear(3, 2, 2), l=nn.Linear(3, 2)), (B, B, 3)),
    "attention with a table": (
        lambda: Model(attend, keys=parameter(1, 2, B, 2), scale=parameter(2, 1, 1), table=parameter(2, B, B)),
        (B, B, 4),
    ),
    "matmul, from the left": (lambda: Model(lambda m, x: m.w @ x, w=parameter(5, B)), (B, B, 3)),
    "matmul, from the left, a convolution of channels": (
        lambda: Model(lambda m, x: m.w @ x.flatten(2), w=parameter(5, 2)),
        (B, 2, 3, 3),
    ),
    "matmul, heads": (
        lambda: Model(lambda m, x: x.unflatten(-1, (2, 2)).transpose(1, 2) @ m.w, w=parameter(2, 2, 3)),
        (B, 5, 4),
    ),
    "matmul, heads from the left": (lambda: Model(lambda m, x: m.w @ x, w=parameter(B, 2, 3)), (B, B, 3, 5)),
    "matmul, one head": (lambda: Model(lambda m, x: x @ m.w, w=parameter(1, 3, 2)), (B, B, 3)),
    "matmul, more heads than activations": (
        lambda: Model(lambda m, x: x[:, None] @ m.w, w=parameter(B, 3, 2)),
        (B, 5, 3),
    ),
    "matmul, a vector": (lambda: Model(lambda m, x: x @ m.w, w=parameter(3)), (B, 5, 3)),
    "matmul, a vector from the left": (lambda: Model(lambda m, x: torch.matmul(m.w, x), w=parameter(5)), (B, 5, 3)),
    "bmm, experts": (
        lambda: Model(lambda m, x: torch.bmm(x.transpose(0, 1), m.w).transpose(0, 1), w=parameter(B, 3, 2)),
        (B, B, 3),
    ),
    "bmm, experts from the left": (
        lambda: Model(lambda m, x: torch.bmm(m.w, x.permute(1, 2, 0)).permute(2, 0, 1), w=parameter(5, 2, 3)),
        (B, 5, 3),
    ),
    "experts of shared tokens": (
        lambda: Model(
            lambda m, x: torch.bmm(torch.bmm(x.flatten(0, 1).expand(3, -1, -1), m.a).relu(), m.b).sum(0).view(x.shape),
            a=parameter(3, 3, 5),
            b=parameter(3, 5, 3),
        ),
        (B, B, 3),
    ),
    "einsum": (lambda: Model(lambda m, x: torch.einsum("bi,oi->bo", x, m.w), w=parameter(5, 3)), (B, 3)),
    "einsum, an adapter": (
        lambda: Model(
            lambda m, x: (
                torch.einsum("bti,ri,or->bto", x, m.a, m.b)
                if False
                else torch.einsum("btr,or->bto", torch.einsum("bti,ri->btr", x, m.a), m.b)
            ),
            a=parameter(2, 3),
            b=parameter(3, 2),
        ),
        (B, B, 3),
    ),
    "einsum, heads": (
        lambda: Model(
            lambda m, x: torch.einsum(
                "bhd,nhd->bnd",
                torch.einsum("bnd,hdk->bnhk", x, m.w).sum(1),
                m.v,
            ),
            w=parameter(2, 3, 3),
            v=parameter(5, 2, 3),
        ),
        (B, B, 3),
    ),
    "einsum, parameter first": (
        lambda: Model(lambda m, x: torch.einsum("hd,bhtd->thb", m.w, x).permute(2, 1, 0), w=parameter(2, 3)),
        (B, 2, B, 3),
    ),
    "bmm, repeated positions": (
        lambda: Model(
            lambda m, x: torch.bmm(x, m.l(m.w).repeat(len(x), 1, 1).mT), w=parameter(5, 3), l=nn.Linear(3, 3)
        ),
        (B, B, 3),
    ),
    "einsum, repeated positions": (
        lambda: Model(
            lambda m, x: torch.einsum("ibd,bjd->bij", (m.w * m.s).tile(1, len(x), 1), x),
            w=parameter(B, 1, 3),
            s=parameter(3),
        ),
        (B, B, 3),
    ),
    "assigned token": (lambda: Model(assigned, l=nn.Linear(3, 3), token=parameter(3)), (B, 2, 3)),
    "matrices that are looked up": (lambda: Model(routed, w=parameter(3, 2, B), b=parameter(3, 2)), (B, 5, B)),
    "einsum, no sum": (lambda: Model(lambda m, x: torch.einsum("bc,k->bkc", x, m.w), w=parameter(5)), (B, 3)),
}


@pytest.mark.parametrize("batch", [1, B])
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str, batch: int) -> None:
    torch.manual_seed(0)
    factory, shape = LAYERS[name]
    check(factory(), torch.randn(batch, *shape[1:]), tell_batch=True)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_contractions(data: st.DataObject) -> None:
    letters = "bcdef"
    sizes = {a: data.draw(st.integers(1, 3)) for a in letters}
    own = "".join(data.draw(st.permutations("b" + "".join(a for a in "cde" if data.draw(st.booleans())))))
    given_ = "".join(data.draw(st.permutations([a for a in "cdef" if data.draw(st.booleans())])))
    both = [a for a in own if a in given_]
    kept = [a for a in both if data.draw(st.booleans())]
    free = [a for a in own + given_ if a not in both]
    result = "".join(data.draw(st.permutations([*free, *kept])))
    if not given_:
        return
    torch.manual_seed(0)
    order = [result.index("b"), *(i for i, a in enumerate(result) if a != "b")]

    def run(m: nn.Module, x: Tensor) -> Tensor:
        x = x.permute([("b" + own.replace("b", "")).index(a) for a in own])
        return torch.einsum(f"{own},{given_}->{result}", x, m.w).permute(order)

    x = torch.randn([sizes[a] for a in "b" + own.replace("b", "")])
    held(Model(run, w=parameter(*(sizes[a] for a in given_))).double(), x.double(), batch_size=len(x))


@pytest.mark.parametrize("padding", [None, 2, -1])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags(mode: str, padding: int | None) -> None:
    torch.manual_seed(0)
    bag = nn.EmbeddingBag(B, 3, mode=mode, padding_idx=padding)
    indices = torch.tensor([[1, 1, 0], [2, 3, 2], [2, 2, 2], [3, 3, 3]])
    check(nn.Sequential(bag, nn.Linear(3, 2)), indices)
    if mode == "sum":
        factors = torch.randn(B, 3)
        check(Model(lambda m, i, f: m.b(i, per_sample_weights=f * m.s), b=bag, s=parameter(3)), (indices, factors))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_different_lengths(mode: str) -> None:
    torch.manual_seed(0)
    model = Model(
        lambda m, i, o: m.l(m.b(i, o)), b=nn.EmbeddingBag(5, 3, mode=mode, padding_idx=1), l=nn.Linear(3, 2)
    ).double()
    bags = [[0, 3, 3, 1], [], [1], [2, 4]]
    indices, y = torch.tensor([index for own in bags for index in own]), targets(B).double()
    offsets = torch.tensor([0, 4, 4, 5])
    with warnings.catch_warnings(), GradientAccountant(model) as accountant:
        warnings.simplefilter("error")
        output = model(indices, offsets)
        account = accountant.backward(weighted(output, y))
    torch.testing.assert_close(output, model(indices, offsets))
    for b, own in enumerate(bags):
        loss = weighted(model(torch.tensor(own, dtype=torch.int64), torch.tensor([0])), y[b : b + 1])
        for (name, _), g in zip(
            model.named_parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            torch.testing.assert_close(account.sqnorm[name][b], g.square().sum())
