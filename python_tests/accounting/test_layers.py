import pytest
import torch
from accounted import Model, check, parameter, targets
from accuracy import assert_stable, moved
from torch import Tensor, nn
from torch.nn import functional as F

from memloc_ext import GradientAccountant

B = 4  # many sizes below are equal to it, or a multiple


def awake(model: nn.Module) -> nn.Module:
    """Give affine parameters values that tell them apart from their start."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p))
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return model.eval()


LAYERS = {
    "linear": (lambda: nn.Linear(3, 5), (B, 3)),
    "linear, no bias": (lambda: nn.Linear(3, 5, bias=False), (B, 3)),
    "linear, tokens": (lambda: nn.Linear(3, 5), (B, 7, 3)),
    "linear, as many tokens as examples": (lambda: nn.Linear(B, B), (B, B, B)),
    "linear, 4-D": (lambda: nn.Linear(3, 5), (B, 2, B, 3)),
    "linear, flattened": (
        lambda: nn.Sequential(nn.Flatten(0, 1), nn.Linear(3, 5), nn.LayerNorm(5), nn.Unflatten(0, (-1, 2 * B))),
        (B, 2 * B, 3),
    ),
    "batch norm, 1d": (lambda: nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)), (B, 3)),
    "batch norm, as many channels as examples": (lambda: nn.BatchNorm1d(B), (B, B, B)),
    "batch norm, 2d": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3)), (B, 3, 5, 4)),
    "batch norm, 3d": (lambda: nn.BatchNorm3d(3), (B, 3, 2, 3, 4)),
    "layer norm": (lambda: nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6)), (B, 5, 3)),
    "layer norm, no bias": (lambda: nn.LayerNorm(6, bias=False), (B, 6)),
    "layer norm, several dimensions": (lambda: nn.LayerNorm((B, 3)), (B, B, 3)),
    "group norm": (lambda: nn.Sequential(nn.Conv2d(2, 6, 3), nn.GroupNorm(3, 6)), (B, 2, 5, 5)),
    "group norm, 2-D": (lambda: nn.GroupNorm(2, B), (B, B)),
    "rms norm": (lambda: nn.Sequential(nn.Linear(3, 6), nn.RMSNorm(6)), (B, 5, 3)),
    "rms norm, several dimensions": (lambda: nn.RMSNorm((B, 3), eps=1e-3), (B, B, 3)),
    "instance norm, 1d": (lambda: nn.InstanceNorm1d(3, affine=True), (B, 3, 7)),
    "instance norm, 2d": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 1, bias=False), nn.InstanceNorm2d(3, affine=True)),
        (B, 2, 4, 4),
    ),
    "instance norm, 3d": (lambda: nn.InstanceNorm3d(3, affine=True), (B, 3, 2, 3, 3)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=2, dilation=2), (B, 2, 9)),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(2, 3, (3, 2), stride=(2, 1)), nn.Conv2d(3, 2, 2)), (B, 2, 7, 5)),
    "conv2d, larger stride": (lambda: nn.Conv2d(2, 3, 2, stride=3, padding=1), (B, 2, 7, 6)),
    "conv2d, as many channels as examples": (lambda: nn.Conv2d(B, B, 3, padding=1), (B, B, B, B)),
    "conv2d, depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), (B, 4, 4, 5)),
    "conv2d, grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2), (B, 4, 6, 5)),
    "conv2d, same": (lambda: nn.Conv2d(2, 3, (2, 4), dilation=(1, 2), padding="same"), (B, 2, 5, 8)),
    "conv2d, valid": (lambda: nn.Conv2d(2, 3, 3, padding="valid"), (B, 2, 5, 8)),
    "conv2d, reflect": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (B, 2, 5, 4)),
    "conv2d, replicate": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="replicate"), (B, 2, 5, 4)),
    "conv2d, circular and same": (lambda: nn.Conv2d(2, 3, 4, padding="same", padding_mode="circular"), (B, 2, 5, 4)),
    "conv2d, folded batch": (
        lambda: nn.Sequential(nn.Flatten(0, 1), nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Unflatten(0, (-1, 2))),
        (B, 2, 2, 4, 4),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, padding=1, stride=(1, 2, 1)), (B, 2, 3, 4, 3)),
    "conv3d, depthwise": (lambda: nn.Conv3d(2, 2, 3, groups=2), (B, 2, 3, 4, 3)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, output_padding=1), (B, 2, 5)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2, padding=1), (B, 4, 4, 5)),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(2, 3, 2, stride=2), (B, 2, 2, 3, 2)),
    "flatten": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, B)), (B, 2, 4, 4)),
}


@pytest.mark.parametrize("batch", [1, B])
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str, batch: int) -> None:
    torch.manual_seed(0)
    factory, shape = LAYERS[name]
    check(awake(factory()), torch.randn(batch, *shape[1:]), tell_batch="flattened" in name or "folded" in name)


@pytest.mark.parametrize("name", ["linear, tokens", "batch norm, 2d", "conv2d, grouped", "conv3d", "rms norm"])
def test_layer_in_float64(name: str) -> None:
    torch.manual_seed(0)
    factory, shape = LAYERS[name]
    account = check(awake(factory()).double(), torch.randn(shape).double())
    assert all(t.dtype == torch.float64 for t in (*account.sqnorm.values(), *account.group_grad.values()))


@pytest.mark.parametrize("name", LAYERS)
def test_the_forward_pass_computes_the_same(name: str) -> None:
    torch.manual_seed(0)
    factory, shape = LAYERS[name]
    x, model = torch.randn(shape), awake(factory())
    with GradientAccountant(model):
        actual = model(x)
    (model_off, x_off), exact = moved((model, x)), model.double()(x.double())
    assert_stable(actual.detach(), model_off(x_off).detach(), exact.detach())


def test_channels_last_and_views() -> None:
    torch.manual_seed(0)
    model = awake(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.GroupNorm(2, 6)))
    check(model.to(memory_format=torch.channels_last), torch.randn(B, 4, 5, 5).to(memory_format=torch.channels_last))
    check(model, torch.randn(B, 5, 5, 8)[..., ::2].permute(0, 3, 1, 2))
    check(nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5)), torch.randn(3, 5, B).permute(2, 1, 0))
    check(nn.Linear(3, 5), torch.randn(1, 5, 3).expand(B, -1, -1))


def test_inplace_activations() -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(3), nn.SiLU(inplace=True), nn.Conv2d(3, 2, 1)
    check(nn.Sequential(*layers).eval(), torch.randn(B, 2, 4, 4))


@pytest.mark.parametrize("layer", [nn.LayerNorm(3), nn.Linear(3, 2), nn.RMSNorm(3)])
def test_no_examples(layer: nn.Module) -> None:
    with GradientAccountant(layer) as accountant:
        account = accountant.backward(layer(torch.randn(0, 5, 3)).sum(), loss_reduction="sum")
    assert all(norm.shape == (0,) for norm in account.sqnorm.values())
    assert not any(p.grad.any() for p in layer.parameters() if p.grad is not None)


def test_rms_norm_without_eps_in_bfloat16_is_that_of_pytorch() -> None:
    # its eps is then that of float32
    model, x = nn.RMSNorm(8).bfloat16(), torch.randn(B, 8).bfloat16() / 100
    with GradientAccountant(model):
        output = model(x)
    assert torch.equal(output, model(x))


# embeddings


def test_embedding() -> None:
    torch.manual_seed(0)
    indices = torch.tensor([[1, 1, 0, 3], [2, 0, 0, 0], [5, 4, 5, 5], [0, 0, 0, 0]])
    for padding_idx in (None, 0, -1):
        check(nn.Sequential(nn.Embedding(6, 3, padding_idx=padding_idx), nn.Linear(3, 2)), indices)
    check(nn.Embedding(B, B), indices % B)
    check(nn.Embedding(6, 3), indices[:, 0])
    check(nn.Embedding(6, 3), indices.int()[:, None].repeat(1, 2, 1))
    check(Model(lambda m, i: m.table[i], table=parameter(6, 3)), indices)
    check(Model(lambda m, i: m.table[i - 3], table=parameter(6, 3)), indices[:, 0])


def test_positions_from_a_table() -> None:
    torch.manual_seed(0)
    x = torch.randn(B, 5, 3)
    check(Model(lambda m, x: x + m.e(torch.arange(5)), e=nn.Embedding(9, 3)), x)
    check(Model(lambda m, x: x + m.e(m.i), e=nn.Embedding(9, 3), i=torch.arange(9)[None, :5]), x)
    check(Model(lambda m, x: m.e(torch.arange(B)) * x, e=nn.Embedding(B, 3, padding_idx=1)), x[:, :B])


def test_an_embedding_of_a_batch_of_one_is_covered() -> None:
    torch.manual_seed(0)
    check(nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)), torch.tensor([[2, 1, 2]]))


# attention


@pytest.mark.parametrize("kind", ["plain", "other sizes", "bias_kv", "no bias"])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_multihead_attention(batch_first: bool, cross: bool, kind: str) -> None:
    torch.manual_seed(0)
    more = {
        "plain": {},
        "other sizes": {"kdim": 3, "vdim": 5},
        "bias_kv": {"add_bias_kv": True, "add_zero_attn": True},
        "no bias": {"bias": False},
    }[kind]
    if not cross and kind == "other sizes":
        pytest.skip("self-attention has one size")
    q, k, v = torch.randn(B, B, 4), torch.randn(B, 6, more.get("kdim", 4)), torch.randn(B, 6, more.get("vdim", 4))
    for weights in (False, True):

        def attend(m: nn.Module, *qkv: Tensor, weights: bool = weights) -> Tensor:
            out = m.attention(*(qkv if cross else (qkv[0],) * 3), need_weights=weights)[0]
            return out if batch_first else out.transpose(0, 1)

        model = Model(attend, attention=awake(nn.MultiheadAttention(4, 2, batch_first=batch_first, **more)))
        given = (q, k, v) if batch_first else tuple(t.transpose(0, 1) for t in (q, k, v))
        check(model, given, targets(B), batch_dim=0 if batch_first else 1)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_transformer_layers(batch_first: bool, norm_first: bool) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 4, "nhead": 2, "dim_feedforward": 6, "batch_first": batch_first, "norm_first": norm_first}

    def run(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        out = m.decoder(y, m.encoder(x, is_causal=True, src_mask=torch.ones(5, 5).triu(1).bool()))
        return out if batch_first else out.transpose(0, 1)

    model = Model(run, encoder=nn.TransformerEncoderLayer(**sizes), decoder=nn.TransformerDecoderLayer(**sizes))
    x, y = torch.randn(B, 5, 4), torch.randn(B, 3, 4)
    given = (x, y) if batch_first else (x.transpose(0, 1), y.transpose(0, 1))
    check(awake(model), given, targets(B), batch_dim=0 if batch_first else 1)


# parameters that meet activations


ELEMENTWISE = {
    "bias": lambda m, x: x + m.row,
    "bias, from the right": lambda m, x: m.row + x,
    "minus": lambda m, x: m.row - x,
    "scale": lambda m, x: x * m.row,
    "divide": lambda m, x: x / m.positive,
    "power": lambda m, x: x.abs() ** m.positive,
    "positions": lambda m, x: x + m.positions,
    "positions of one dimension more": lambda m, x: x + m.positions[0],
    "a column": lambda m, x: x * m.column,
    "one number": lambda m, x: x * m.one,
    "a slice": lambda m, x: x + m.positions[:, :1] + m.row[1:2],
    "maximum": lambda m, x: torch.maximum(x, m.row),
    "where": lambda m, x: torch.where(x > 0, m.row, m.column * x),
    "lerp": lambda m, x: torch.lerp(x, m.row, 0.3),
    "in place": lambda m, x: (x * 1).add_(m.row, alpha=2).mul_(m.column),
    "class token": lambda m, x: torch.cat([m.positions[:, :1].expand(len(x), -1, -1), x], 1),
    "repeated class token": lambda m, x: torch.cat([m.row.repeat(len(x), 2, 1), x], 1),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise(name: str) -> None:
    torch.manual_seed(0)
    parts = {"row": parameter(3), "positions": parameter(1, B, 3), "column": parameter(B, 1), "one": parameter(1)}
    model = Model(ELEMENTWISE[name], positive=nn.Parameter(torch.rand(3) + 0.5), **parts)
    check(model, torch.randn(B, B, 3), tell_batch="token" in name)


@pytest.mark.parametrize("shape", [(1,), (1, 5), ()])
def test_a_broadcast_bias_of_a_linear_layer(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = Model(lambda m, x: F.linear(x, m.w, m.b), w=parameter(5, 3), b=parameter(*shape))
    check(model, torch.randn(B, 3), uncovered=None)


def test_a_parameter_of_no_dimensions() -> None:
    torch.manual_seed(0)
    model = Model(lambda m, x: m.l(x) / m.temperature, l=nn.Linear(3, 5), temperature=nn.Parameter(torch.tensor(0.7)))
    check(model, torch.randn(B, 3))


def test_norms_of_large_parameters_are_accurate() -> None:
    torch.manual_seed(0)
    check(Model(lambda m, x: x + m.w, w=parameter(300_000)), torch.randn(2, 300_000))


def test_outputs_may_be_written_to() -> None:
    torch.manual_seed(0)

    def run(m: nn.Module, x: Tensor) -> Tensor:
        h = m.l(x)
        h += x
        h[:, 0] = 0
        return nn.functional.relu(m.k(h), inplace=True)

    check(Model(run, l=nn.Linear(3, 3), k=nn.Linear(3, 3)), torch.randn(4, 5, 3))
