# Every test here fails, at one of its sizes at least, for a defect that its comment names; once that is mended, it
# moves to the file of its topic.
import contextlib

import pytest
import torch
from accounting import Model, account_of, assert_as_accurate, check, grads, parameter, targets, weighted
from test_accounted_models import cross_entropy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memloc_ext import GradientAccountant
from memloc_ext.models import build

B, T = 4, 8  # as many tokens as examples, twice: what is divisible is taken for flattened examples
KEEP = torch.tensor([[1, 0, 0], [1, 1, 1], [1, 1, 0], [1, 1, 0]]).bool()  # 8 tokens of 4 examples


class PlainPositions(nn.Module):
    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.table, self.indices = nn.Embedding(tokens, 3), torch.arange(tokens)  # no buffer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table(self.indices)


def distances(n: int) -> Tensor:
    return (torch.arange(n)[:, None] - torch.arange(n)).abs()


# What a layer computes of constants or of parameters alone is taken for activations: `Session` knows two kinds of
# constants, and nothing of what depends on parameters but not on the input. Wrong numbers where the size is divisible
# by the batch, a ValueError where it is not; both are to be right, by the slow way if need be.
CONSTANT = {
    "linear of a buffer": lambda n: (
        Model(lambda m, x: m.l(x) + m.p(m.c), l=nn.Linear(3, 5), p=nn.Linear(2, 5), c=torch.randn(n, 2)),
        (B, n, 3),
    ),
    "linear of a parameter": lambda n: (
        Model(lambda m, x: m.l(x) + m.p(m.q.relu()), l=nn.Linear(3, 5), p=nn.Linear(2, 5), q=parameter(n, 2)),
        (B, n, 3),
    ),
    "layer norm of positions": lambda n: (
        Model(lambda m, x: x + m.n(m.e(torch.arange(n))), e=nn.Embedding(n, 3), n=nn.LayerNorm(3)),
        (B, n, 3),
    ),
    "relative positions": lambda n: (
        Model(lambda m, x: x + m.e(m.i).permute(2, 0, 1), e=nn.Embedding(9, 2), i=distances(n)),
        (B, 2, n, n),
    ),
    "relative positions, flat": lambda n: (
        Model(lambda m, x: x + m.t[m.i.view(-1)].view(n, n, 2).permute(2, 0, 1), t=parameter(9, 2), i=distances(n)),
        (B, 2, n, n),
    ),
    "positions from a plain attribute": lambda n: (PlainPositions(n), (B, n, 3)),
    "a number times a function of a parameter": lambda n: (
        Model(lambda m, x: x * (m.t * torch.softmax(m.v, 0)), t=parameter(1), v=parameter(n)),
        (B, n),
    ),
    "expanded over tokens": lambda n: (
        Model(lambda m, x: m.l(x) + m.c.expand(x.shape[1], 3).cumsum(0), l=nn.Linear(3, 3), c=parameter(1, 3)),
        (B, n, 3),
    ),
    "expanded over tokens, first": lambda n: (
        Model(lambda m, x: m.c.expand(x.shape[1], 3).cumsum(0) + m.l(x), l=nn.Linear(3, 3), c=parameter(1, 3)),
        (B, n, 3),
    ),
    "a layer's weight from a network": lambda n: (
        Model(lambda m, x: F.linear(x, m.h(m.z.relu())), h=nn.Linear(4, 3), z=parameter(n, 4)),
        (B, 3),
    ),
    "a product of matrices": lambda n: (
        Model(lambda m, x: F.linear(x, m.a.relu() @ m.b), a=parameter(n, 2), b=parameter(2, 3)),
        (B, 3),
    ),
    "normalised and scaled weight": lambda n: (
        Model(lambda m, x: F.linear(x, F.normalize(m.w) * m.s), w=parameter(n, 3), s=parameter(1)),
        (B, 3),
    ),
    "masked weight": lambda n: (_masked(n), (B, 3)),
    "a scaled plain tensor": lambda n: (_noisy(n), (B, n, 3)),
}


def _masked(n: int) -> nn.Module:
    mask = torch.rand(n, 3) > 0.5
    return Model(lambda m, x: F.linear(x, m.w * mask), w=parameter(1, 3))


def _noisy(n: int) -> nn.Module:
    noise = torch.randn(n, 3)
    return Model(lambda m, x: m.l(x) + noise.to(x.dtype) * m.c, l=nn.Linear(3, 3), c=parameter(3))


@pytest.mark.parametrize("tokens", [B, T, 7])
@pytest.mark.parametrize("name", CONSTANT)
def test_what_does_not_depend_on_the_input(name: str, tokens: int) -> None:
    torch.manual_seed(0)
    model, shape = CONSTANT[name](tokens)
    check(model, torch.randn(shape), uncovered=None, tell_batch=True)


ONE_ROW = {  # session.see takes 1 for the batch, and the layer refuses that
    "linear": Model(lambda m, x: m.l(x) + m.p(m.q.relu()), l=nn.Linear(3, 5), p=nn.Linear(2, 5), q=parameter(1, 2)),
    "rounded": Model(lambda m, x: x * (m.w + (m.w.round() - m.w).detach()), w=parameter(1, 3)),
}


@pytest.mark.parametrize("name", ONE_ROW)
def test_a_layer_of_a_learned_constant_of_one_row(name: str) -> None:
    torch.manual_seed(0)
    check(ONE_ROW[name], torch.randn(B, 3), uncovered=None, tell_batch=True)


# examples_first refuses [batch * windows, tokens, *] where there happen to be as many tokens as examples: a model of
# windows works or not by the size of its batch. To be right, by the slow way if need be.
def test_windows_of_as_many_tokens_as_examples() -> None:
    torch.manual_seed(0)

    def run(m: nn.Module, x: Tensor) -> Tensor:
        windows = x.unflatten(1, (2, B)).flatten(0, 1)
        return m.n(m.l(windows)).unflatten(0, (len(x), 2)).flatten(1, 2)

    check(Model(run, l=nn.Linear(3, 3), n=nn.LayerNorm(3)), torch.randn(B, 2 * B, 3), uncovered=None, tell_batch=True)


# Rows that are not the examples in their order: `examples_first` and `Broadcast.backward` take any dimension that is
# divisible for examples with their tokens behind one another. To be right or refused.


def chosen_by_value(m: nn.Module, x: Tensor) -> Tensor:
    keep = x[..., 0] > 0
    h = m.l(x)
    return torch.zeros_like(h).index_put((keep,), m.h(h[keep]))


def experts(m: nn.Module, x: Tensor) -> Tensor:
    tokens = x.flatten(0, 1)
    out = torch.zeros_like(tokens)
    for expert, here in ((m.l, tokens[:, 0] > 0), (m.h, tokens[:, 0] <= 0)):
        i = here.nonzero().flatten()
        out = out.index_add(0, i, expert(tokens[i]))
    return out.view_as(x)


def siamese(m: nn.Module, x: Tensor) -> Tensor:
    first, second = m.l(torch.cat([x[:, 0], x[:, 1]])).chunk(2)
    return first * second


ROWS = {
    "tokens chosen by value": chosen_by_value,
    "mixture of experts": experts,
    "two views in one batch": siamese,
    "reversed": lambda m, x: m.l(x.flip(0)).flip(0),
    "shuffled": lambda m, x: m.l(x.roll(1, 0)).roll(-1, 0),
    "tokens first, flat": lambda m, x: m.l(x.transpose(0, 1).flatten(0, 1)).view(x.shape[1], len(x), 3).transpose(0, 1),
    "tokens first, scale": lambda m, x: (x.repeat(1, 3, 1)[:, :T].transpose(0, 1) * m.g).transpose(0, 1),
    "features first, one number": lambda m, x: (x.repeat(1, 1, T)[:, 0, :T].t() * m.one).t(),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_that_are_not_the_examples(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(B, 3, 3)
    x[..., 0] = x[..., 0].abs() * (KEEP * 2 - 1)
    model = Model(ROWS[name], l=nn.Linear(3, 3), h=nn.Linear(3, 3), g=parameter(3), one=parameter(1))
    try:
        check(model, x, uncovered=None, tell_batch=True)
    except ValueError as error:
        assert str(error).startswith("GradientAccountant")  # noqa: PT017


# One covered and one uncovered use of a parameter: Silent leaves out the covered one, and Run.finish then writes over
# what add_example found.
@pytest.mark.parametrize("second", ["einsum", "lookup", "norm"])
def test_a_covered_and_an_uncovered_use(second: str) -> None:
    torch.manual_seed(0)
    if second == "einsum":
        model = Model(lambda m, x: torch.einsum("bti,oi->bto", F.linear(x, m.w), m.w), w=parameter(3, 3))
    elif second == "norm":
        model = Model(lambda m, x: F.linear(x, m.w) / m.w.norm(dim=1), w=parameter(7, 3))
    else:
        model = Model(lambda m, x: x + m.e(torch.arange(5)) + m.e(torch.arange(5)).cumsum(0), e=nn.Embedding(5, 3))
    check(model, torch.randn(B, 5, 3), uncovered=None)


# Rows.sqnorm: vector_norm over a dimension adds one after the other (1e-4 at 10^4 elements); so does add_example.
def test_norms_of_large_parameters_are_accurate() -> None:
    torch.manual_seed(0)
    check(Model(lambda m, x: x + m.w, w=parameter(300_000)), torch.randn(2, 300_000))


def test_vit() -> None:  # the same, at its positions
    torch.manual_seed(0)
    model = build("vit", num_classes=3, in_channels=1, image_size=32).eval()
    check(model, torch.randn(2, 1, 32, 32), torch.arange(2), cross_entropy)


def test_a_parameter_of_no_dimensions() -> None:  # Rows.sqnorm: flatten(1) of [batch]
    torch.manual_seed(0)
    model = Model(lambda m, x: m.l(x) / m.temperature, l=nn.Linear(3, 5), temperature=nn.Parameter(torch.tensor(0.7)))
    check(model, torch.randn(B, 3))


# _held_sqnorm and _add_groups view contiguous tensors by the strides of a parameter that is not contiguous.
@pytest.mark.parametrize("kind", ["channels last", "transposed"])
def test_a_parameter_with_other_strides_used_twice(kind: str) -> None:
    torch.manual_seed(0)
    conv, linear = nn.Conv2d(3, 3, 3, padding=1).to(memory_format=torch.channels_last), nn.Linear(3, 3)
    linear.weight = nn.Parameter(torch.randn(3, 3).t())
    layer, shape = (conv, (B, 3, 5, 5)) if kind == "channels last" else (linear, (B, 3))
    check(Model(lambda m, x: m.layer(m.layer(x).relu()), layer=layer), torch.randn(shape))


# Session.weight lets views through whose elements overlap; add_ through them is not defined.
def test_views_that_overlap_themselves() -> None:
    torch.manual_seed(0)
    check(Model(lambda m, x: F.linear(x, m.w.unfold(0, 3, 1)), w=parameter(6)), torch.randn(B, 3), uncovered=None)
    check(
        Model(lambda m, x: F.linear(x, m.w.as_strided((2, 2), (1, 1))), w=parameter(4)),
        torch.randn(B, 2),
        uncovered=None,
        tell_batch=True,
    )


@pytest.mark.parametrize("shape", [(1,), (1, 5), ()])
def test_a_broadcast_bias_of_a_linear_layer(shape: tuple[int, ...]) -> None:  # linear records [out] for any bias
    torch.manual_seed(0)
    model = Model(lambda m, x: F.linear(x, m.w, m.b), w=parameter(5, 3), b=parameter(*shape))
    check(model, torch.randn(B, 3), uncovered=None)


# Outputs that are parts of one node share its grad_fn, by which `reached` tells them apart: all but the last are lost.
def test_outputs_that_are_chunks_of_one_tensor() -> None:
    torch.manual_seed(0)

    def loss_of(output: tuple[Tensor, ...], target: Tensor) -> Tensor:
        return (output[0].square().sum(1) * target + output[1].sum(1)).mean()

    model = Model(lambda m, x: m.a(m.l(x)).chunk(2, -1), l=nn.Linear(3, 6), a=nn.PReLU())
    check(model, torch.randn(B, 3), loss_of=loss_of, uncovered={"a.weight"})


def test_exact_groups_of_chunks() -> None:  # the same
    torch.manual_seed(0)
    model, x = Model(lambda m, x: m.l(x).chunk(2, -1), l=nn.Linear(3, 6)), torch.randn(B, 3)
    with GradientAccountant(model) as accountant:
        a, b = model(x)
        arguments = {"group_ids": torch.tensor([0, 1, 1, 0]), "loss_reduction": "sum"}
        account = accountant.backward(a.square().sum() + b.sum(), exact_groups=True, **arguments)
    a, b = model(x)
    (plain,) = torch.autograd.grad(a.square().sum() + b.sum(), [model.l.weight])
    torch.testing.assert_close(account.group_grad["l.weight"].sum(0), plain)


# expand: what repeat copies is a view here, which cannot be written to or viewed as another shape.
def test_repeat_copies() -> None:
    torch.manual_seed(0)

    def written(m: nn.Module, x: Tensor) -> Tensor:
        token = m.c.repeat(len(x), 1, 1)
        token += x
        return token

    check(Model(written, c=parameter(1, 2, 3)), torch.randn(B, 2, 3), uncovered=None, tell_batch=True)


def test_repeat_is_contiguous() -> None:
    torch.manual_seed(0)

    def viewed(m: nn.Module, x: Tensor) -> Tensor:
        return m.l(m.c.repeat(len(x), 1, 1).view(-1, 3)).view(len(x), -1) * x

    model = Model(viewed, c=parameter(1, 2, 3), l=nn.Linear(3, 1))
    check(model, torch.randn(B, 2), uncovered=None, tell_batch=True)


def test_rms_norm_without_eps_in_bfloat16_is_that_of_pytorch() -> None:  # rms_norm: PyTorch takes that of float32
    model, x = nn.RMSNorm(8).bfloat16(), torch.randn(B, 8).bfloat16() / 100
    with GradientAccountant(model):
        output = model(x)
    assert torch.equal(output, model(x))


def test_sparse_gradients() -> None:  # add_example: vector_norm knows no sparse tensors
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 3, sparse=True), nn.Linear(3, 2))
    check(model, torch.randint(9, (B, 5)), uncovered={"0.weight"}, tell_batch=True)


def test_a_complex_parameter() -> None:  # accumulated(): float32 for complex64
    torch.manual_seed(0)

    def loss_of(output: Tensor, target: Tensor) -> Tensor:
        return (output.sum(1) * target).mean()

    model = Model(lambda m, x: torch.fft.rfft(x).mul(m.w).abs(), w=nn.Parameter(torch.randn(3, dtype=torch.cfloat)))
    x, y = torch.randn(B, B), targets(B)
    account, _ = account_of(model, loss_of, x, y, batch_size=B)
    for b in range(B):
        (g,) = torch.autograd.grad(loss_of(model(x[b : b + 1]), y[b : b + 1]), [model.w])
        torch.testing.assert_close(account.sqnorm["w"][b], g.abs().square().sum())


# B = 0: reshape(0, -1, n) is ambiguous in LayerNorm._affine and uses._positions.
@pytest.mark.parametrize("layer", [nn.LayerNorm(3), nn.Linear(3, 2), nn.RMSNorm(3)])
def test_no_examples(layer: nn.Module) -> None:
    with GradientAccountant(layer) as accountant:
        account = accountant.backward(layer(torch.randn(0, 5, 3)).sum(), loss_reduction="sum")
    assert all(norm.shape == (0,) for norm in account.sqnorm.values())
    assert not any(p.grad.any() for p in layer.parameters() if p.grad is not None)


def test_no_examples_and_an_uncovered_layer() -> None:  # the same, behind a slow way of no passes
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.PReLU(), nn.Flatten(), nn.Linear(27, 4)).eval()
    ids = torch.zeros(0, dtype=torch.int64)
    with pytest.warns(UserWarning, match=r"2\.weight"), GradientAccountant(model) as accountant:
        account = accountant.backward(
            model(torch.randn(0, 2, 5, 5)).sum(), loss_reduction="sum", group_ids=ids, num_groups=2
        )
    assert all(norm.shape == (0,) for norm in account.sqnorm.values())


# The number of examples is that of the first forward pass since the last backward of the accountant, whatever came in
# between: session.batch is not taken anew.
@pytest.mark.parametrize("before", ["without gradient", "plain backward"])
def test_a_smaller_batch_before(before: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    with GradientAccountant(model) as accountant:
        if before == "plain backward":
            model(torch.randn(4, 3)).sum().backward()
        else:
            with torch.no_grad():
                model(torch.randn(4, 3))
        account = accountant.backward(model(torch.randn(8, 3)).square().sum(), loss_reduction="sum")
    assert account.sqnorm["weight"].shape == (8,)


def test_a_first_layer_of_constants_does_not_tell_the_batch() -> None:  # see() takes a buffer's size
    torch.manual_seed(0)
    model = Model(lambda m, x: m.p(m.c).mean() + m.l(x), l=nn.Linear(3, 5), p=nn.Linear(2, 5), c=torch.randn(T, 2))
    account, _ = account_of(model, weighted, torch.randn(B, 3), targets(B))
    assert account.sqnorm["l.weight"].shape == (B,)


# Session.forget() ends all forward passes with the first backward pass: batch, outputs and counts of the second too.
@pytest.mark.parametrize("layer", ["covered", "uncovered"])
@pytest.mark.filterwarnings("ignore:GradientAccountant")
def test_two_forward_then_two_backward_passes(layer: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.PReLU() if layer == "uncovered" else nn.ReLU())
    inputs = torch.randn(B, 3), torch.randn(B, 3)
    with GradientAccountant(model) as accountant:
        losses = [model(x).square().sum() for x in inputs]
        together = [accountant.backward(loss, loss_reduction="sum") for loss in losses]
        for x, account in zip(inputs, together, strict=True):
            alone = accountant.backward(model(x).square().sum(), loss_reduction="sum")
            for name, norm in alone.sqnorm.items():
                torch.testing.assert_close(account.sqnorm[name], norm)


# `reached` takes the layers of another Session for its own: zeros. To be right or refused.
@pytest.mark.parametrize("how", ["an earlier with", "an inner accountant", "an accountant of a part"])
def test_layers_that_another_session_saw(how: str) -> None:
    torch.manual_seed(0)
    model, x, ids = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), torch.randn(B, 3), torch.tensor([0, 1, 1, 0])
    outer = GradientAccountant(model)
    inner = {"an inner accountant": GradientAccountant(model), "an accountant of a part": GradientAccountant(model[1])}
    with contextlib.ExitStack() as stack:
        if how == "an earlier with":
            with outer:
                loss = model(x).square().sum()
            stack.enter_context(outer)
        else:
            stack.enter_context(outer)
            stack.enter_context(inner[how])
            loss = model(x).square().sum()
        try:
            account = outer.backward(loss, loss_reduction="sum", group_ids=ids)
        except ValueError as error:
            assert str(error).startswith("GradientAccountant")  # noqa: PT017
            return
    assert account.sqnorm["1.weight"].all(), "zeros"


def test_a_parameter_that_is_unfrozen_inside() -> None:  # Session.parameters are those of __enter__: zeros
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model[1].requires_grad_(False)
    with GradientAccountant(model) as accountant:
        model[1].requires_grad_(True)
        account = accountant.backward(model(torch.randn(B, 3)).square().sum(), loss_reduction="sum")
    assert account.sqnorm["1.weight"].all()


# Reentrant checkpointing hides the graph: `reached` finds no uncovered parameter in it. Zeros, and with
# weight_grads=False its gradient is written. To be right or refused.
def test_an_uncovered_parameter_under_reentrant_checkpointing() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(3, 3), nn.PReLU(3))
    model = Model(lambda m, x: checkpoint(m.block, m.stem(x), use_reentrant=True), stem=nn.Linear(3, 3), block=block)
    try:
        account, warned = account_of(model, weighted, torch.randn(B, 3), targets(B), weight_grads=False)
    except (ValueError, RuntimeError):
        return
    assert all(grad is None for grad in grads(model).values()), "a gradient was written"
    assert warned == {"block.1.weight"}
    assert account.sqnorm["block.1.weight"].all(), "zeros"


# An optimizer that steps in this hook would step: `untouched` lets autograd write a gradient and takes it away after.
@pytest.mark.filterwarnings("ignore:GradientAccountant")
def test_hooks_after_accumulation_without_weight_gradients() -> None:
    model, calls = nn.Sequential(nn.Linear(3, 2), nn.PReLU()), []
    model[1].weight.register_post_accumulate_grad_hook(calls.append)
    with GradientAccountant(model) as accountant:
        accountant.backward(model(torch.randn(B, 3)).square().sum(), loss_reduction="sum", weight_grads=False)
    assert not calls


# With batch_dim 1, [batch, features] behind a mean over the tokens is split by its features, for `see` and `broadcast`.
def test_batch_dim_one_behind_a_mean_over_tokens() -> None:
    torch.manual_seed(0)
    model = Model(lambda m, x: m.h(m.l(x).mean(0)) * m.t, l=nn.Linear(3, 3), h=nn.Linear(3, T), t=parameter(1))
    check(model, torch.randn(5, B, 3), targets(B), batch_dim=1, uncovered=None)


def test_batch_dim_one_and_a_first_layer_behind_a_mean_over_tokens() -> None:
    torch.manual_seed(0)
    model = Model(lambda m, x: m.h(x.mean(0)), h=nn.Linear(3, T))
    check(model, torch.randn(5, B, 3), targets(B), batch_dim=1, uncovered=None)


# combined_sqnorm promotes by the first and the last use: a middle one in float32 is rounded to bfloat16.
def test_a_use_in_float32_between_two_in_bfloat16() -> None:
    torch.manual_seed(0)

    def run(m: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            first = m.l(x).float() / 1000
        middle = m.l(x)
        with torch.autocast("cpu", torch.bfloat16):
            return torch.cat([first, middle, m.l(x).float() / 1000], 1)

    model, x, y = Model(run, l=nn.Linear(33, 17, bias=False)), torch.randn(B, 33), targets(B)
    exact = torch.stack(
        [
            torch.autograd.grad(weighted(model(x[b : b + 1]), y[b : b + 1]), [model.l.weight])[0].square().sum()
            for b in range(B)
        ]
    )
    account, _ = account_of(model, weighted, x, y)
    assert_as_accurate(account.sqnorm["l.weight"], exact, exact.double())


# Run.record returns groups[0], a view: autograd makes it the grad of the parameter, and what is added to or zeroed in
# that changes the account.
@pytest.mark.parametrize("model", [nn.Linear(3, 2), Model(lambda m, x: x + m.row, row=parameter(3))])
def test_an_account_does_not_change_with_the_gradients(model: nn.Module) -> None:
    model.zero_grad()
    ids = torch.zeros(B, dtype=torch.int64)
    with GradientAccountant(model) as accountant:
        account = accountant.backward(model(torch.randn(B, 3)).square().sum(), loss_reduction="sum", group_ids=ids)
        before = {name: group.clone() for name, group in account.group_grad.items()}
        accountant.backward(model(torch.randn(B, 3)).square().sum(), loss_reduction="sum", group_ids=ids)
    for name, group in account.group_grad.items():
        assert torch.equal(group, before[name]), name


# _look_up takes indices [1, tokens] for the positions of every example as long as no layer has told the batch.
def test_an_embedding_of_a_batch_of_one_is_covered() -> None:
    torch.manual_seed(0)
    check(nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)), torch.tensor([[2, 1, 2]]))


# A returned tensor that is computed from another one that the loss uses too: refused, before anything is written.
def test_a_loss_of_logits_and_of_the_features_below() -> None:
    torch.manual_seed(0)

    def run(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        features = m.a(m.l(x))
        return m.h(features), features

    model = Model(run, l=nn.Linear(3, 4), a=nn.PReLU(), h=nn.Linear(4, 2))
    with GradientAccountant(model) as accountant, pytest.raises(ValueError, match="a.weight"):
        logits, features = model(torch.randn(B, 3))
        accountant.backward(logits.square().sum() + features.square().sum(), loss_reduction="sum")
    assert all(grad is None for grad in grads(model).values())
