"""Models with ``skip`` give the numbers of those without, through the operators that skip work."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import memloc_ext
from memloc_ext import GradientAccountant, ops
from memloc_ext.models import ResNet9, ViT
from memloc_ext.nn import ExampleTiedDropout, dropout_mode, insert_example_tied_dropout
from memloc_ext.ops import kept_conv2d, kept_mlp

MLP, CONV = "example_tied_mlp", "example_tied_conv2d"
Run = Callable[[nn.Module, Tensor], Tensor]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators that were run; none of them thinks that dense products take less time."""
    names: list[str] = []
    monkeypatch.setattr(kept_mlp, "RUN_ROWS", -1)
    monkeypatch.setattr(kept_mlp, "ROWS", -1)
    for owner, name in ((ops, MLP), (ops, CONV), (kept_mlp, "kept_mlp"), (kept_conv2d, "kept_conv2d")):
        run = getattr(owner, name)

        def counted(*args: Any, name: str = name, run: Any = run, **kwargs: Any) -> Tensor:
            names.append(name)
            return run(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)
    return names


def pair(model: nn.Module, after: Sequence[str], **settings: Any) -> tuple[nn.Module, nn.Module]:
    """Return a model with dropouts, in float64, without and with ``skip``."""
    settings = {"p_gen": 0.25, "p_mem": 0.2, "seed": 5, "skip": "require", **settings}
    model = model.double().train()
    plain = {**settings, "skip": False}
    return tuple(insert_example_tied_dropout(copy.deepcopy(model), after, **s) for s in (plain, settings))  # pyright: ignore


def step(model: nn.Module, x: Tensor, ids: Tensor, run: Run) -> tuple[Tensor, list[Tensor | None]]:
    model.zero_grad()
    with memloc_ext.example_ids(ids):
        y = run(model, x)
    y.square().sum().backward()
    return y, [p.grad for p in model.parameters()]


def hold(
    model: nn.Module,
    after: Sequence[str],
    x: Tensor,
    called: list[str],
    expected: Sequence[str],
    run: Run = lambda model, x: model(x),
    ids: Tensor | None = None,
    **settings: Any,
) -> nn.Module:
    """Hold three steps against those without ``skip``; the first one finds out what can skip."""
    plain, skipping = pair(model, after, **settings)
    ids = torch.arange(len(x)) * 7 if ids is None else ids
    assert list(plain.state_dict()) == list(skipping.state_dict())
    for number in range(3):
        called.clear()
        torch.testing.assert_close(step(skipping, x, ids, run), step(plain, x, ids, run), rtol=1e-9, atol=1e-9)
        assert called == ([] if number == 0 else list(expected))
    return skipping


def mlp(*between: nn.Module, d: int = 8, h: int = 32, o: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d, h), *between, nn.Linear(h, o))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 24, bias=False), nn.Linear(8, 24), nn.Linear(24, 8)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x) * self.act(self.gate(x)))


class Written(nn.Module):
    """An activation that is written out, and a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        z = self.into(x)
        return x + self.out(0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))))


class Residual(nn.Module):
    """A site that a convolution and a sum read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return (x + self.second(x)).mean((2, 3))


X, TOKENS, IMAGES = (
    torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for shape in ((5, 8), (3, 6, 8), (4, 3, 12, 12))
)


@pytest.mark.parametrize(
    ("between", "after"),
    [
        ([nn.ReLU()], "1"),
        ([nn.ReLU(inplace=True)], "1"),
        ([nn.ReLU(inplace=True)], "0"),
        ([nn.GELU(), nn.Dropout(0)], "2"),
        ([nn.GELU("tanh")], "1"),
        ([nn.SiLU()], "0"),
    ],
)
@pytest.mark.parametrize("x", [X, TOKENS])
def test_linear_layers(between: list[nn.Module], after: str, x: Tensor, called: list[str]) -> None:
    hold(mlp(*between), [after], x, called, [MLP], channel_dim=-1)


@pytest.mark.parametrize("after", ["gate", "up", "act"])
def test_gated_layers(after: str, called: list[str]) -> None:
    hold(Gated(), [after], TOKENS, called, [MLP], channel_dim=-1)


def test_written_activation(called: list[str]) -> None:
    hold(Written(), ["into"], TOKENS, called, [MLP], channel_dim=-1)


def test_ids_of_tokens(called: list[str]) -> None:
    ids = torch.tensor([[1, 1, 1, 2, 2, 2], [3, 3, 4, 4, 4, 4], [5, 5, 5, 5, 5, 5]])
    hold(mlp(nn.ReLU()), ["1"], TOKENS, called, [MLP], ids=ids, channel_dim=-1)


def test_more_dimensions(called: list[str]) -> None:
    hold(mlp(nn.ReLU()), ["1"], TOKENS.reshape(3, 2, 3, 8), called, [MLP], channel_dim=-1)


@pytest.mark.parametrize(
    "behind", [[], [nn.ReLU()], [nn.MaxPool2d(2, padding=1)], [nn.AvgPool2d(2), nn.SiLU()]], ids=str
)
def test_convolutions(behind: list[nn.Module], called: list[str]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *behind, nn.Conv2d(8, 5, 3, padding=1), nn.Flatten())
    hold(model, ["0"], IMAGES, called, [CONV])


def test_a_site_that_a_sum_reads_too(called: list[str]) -> None:
    hold(Residual(), ["first"], IMAGES, called, [CONV])


def test_resnet9(called: list[str]) -> None:
    hold(ResNet9(width=0.1, image_size=12), list(ResNet9.layout.sites), IMAGES, called, [CONV] * 5, skip=True)


def test_transformers(called: list[str]) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, activation="gelu", batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    hold(encoder, ["layers.0.linear1", "layers.1.dropout"], TOKENS, called, [MLP] * 2, channel_dim=-1)
    vit = ViT(image_size=12, patch=4, dim=8, depth=2, heads=2, mlp=16, dropout=0)
    hold(vit, list(vit.layout.sites), IMAGES, called, [MLP] * 2, channel_dim=-1)


def of_hugging_face(name: str) -> tuple[nn.Module, list[str], Tensor]:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    none = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    tokens = torch.randint(1, 20, (3, 5), generator=torch.Generator().manual_seed(1))
    if name == "GPT2":
        config = transformers.GPT2Config(
            vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        return transformers.GPT2Model(config), ["h.0.mlp.act", "h.1.mlp.c_fc"], tokens
    if name == "Bert":
        config = transformers.BertConfig(vocab_size=20, **sizes, **none)
        after = ["encoder.layer.0.intermediate", "encoder.layer.1.intermediate.dense"]
        return transformers.BertModel(config), after, tokens
    config = transformers.LlamaConfig(vocab_size=20, bos_token_id=0, eos_token_id=0, **sizes)
    return transformers.LlamaModel(config), ["layers.0.mlp.act_fn", "layers.1.mlp.up_proj"], tokens


@pytest.mark.parametrize("name", ["GPT2", "Bert", "Llama"])
def test_hugging_face(name: str, called: list[str]) -> None:
    model, after, tokens = of_hugging_face(name)
    hold(model, after, tokens, called, [MLP] * 2, lambda m, x: m(x).last_hidden_state, channel_dim=-1)


def test_copies_find_out_by_themselves(called: list[str]) -> None:
    model = hold(mlp(nn.ReLU()), ["1"], X, called, [MLP])
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        called.clear()
        with memloc_ext.example_ids(torch.arange(len(X))):
            torch.testing.assert_close(copied(X), copied(X))
        assert called == [MLP]


def test_other_modes_do_not_skip(called: list[str]) -> None:
    plain, skipping = pair(mlp(nn.ReLU()), ["1"])
    step(skipping, X, torch.arange(len(X)), lambda m, x: m(x))
    for mode in ("test", "drop", "drop_gen"):
        with dropout_mode(plain, mode), dropout_mode(skipping, mode):
            torch.testing.assert_close(skipping(X), plain(X))
    assert not called


@pytest.mark.parametrize("ids", [torch.arange(3), torch.tensor([[1, 1, 1, 2, 2, 2], [3] * 6, [4] * 6])], ids=str)
@pytest.mark.parametrize("p_gen", [0.0, 0.25])
def test_own_masks(p_gen: float, ids: Tensor, called: list[str]) -> None:
    def mask(ids: Tensor) -> Tensor:
        return (ids[:, None] + torch.arange(24)) % 5 == 0

    for model in (mlp(nn.ReLU(), h=24), Gated()):
        after = ["1"] if isinstance(model, nn.Sequential) else ["act"]
        hold(model, after, TOKENS, called, ["kept_mlp"], ids=ids, channel_dim=-1, mask=mask, p_gen=p_gen)
    convolutions = nn.Sequential(nn.Conv2d(3, 24, 3), nn.Conv2d(24, 16, 3))
    hold(convolutions, ["0"], IMAGES, called, ["kept_conv2d"], mask=mask, p_gen=p_gen)


@pytest.mark.parametrize("after", ["1", "2"])
@pytest.mark.parametrize("p_mem", [0.2, 1.0])  # the second computes all channels
def test_ordinary_dropout_that_is_active(after: str, p_mem: float, called: list[str]) -> None:
    plain, skipping = pair(mlp(nn.GELU(), nn.Dropout(0.25, inplace=True), h=64), [after], p_mem=p_mem, channel_dim=-1)
    ids, x = torch.arange(3), TOKENS.clone().requires_grad_()
    step(skipping, x, ids, lambda m, x: m(x))
    called.clear()

    def drawn(seed: int, x: Tensor = x) -> Tensor:
        torch.manual_seed(seed)
        with memloc_ext.example_ids(ids):
            return skipping(x)

    outputs = torch.stack([drawn(seed).detach() for seed in range(400)])
    assert called == ["kept_mlp"] * 400
    plain.eval()
    with dropout_mode(plain, "train"), memloc_ext.example_ids(ids):
        expected = plain(x)
    torch.testing.assert_close(outputs.mean(0), expected, rtol=0, atol=float(5 * outputs.std(0).max() / 20))
    assert not torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(drawn(0), outputs[0])
    assert torch.autograd.gradcheck(lambda x: drawn(3, x), x, fast_mode=True)


def test_what_watches_every_function_sees_them(called: list[str]) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = mlp(nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, x, use_reentrant=False)

    plain, skipping = pair(Checkpointed(), ["block.1"], skip=True)
    ids, x = torch.arange(len(X)), X.clone().requires_grad_()
    for _ in range(2):
        with memloc_ext.example_ids(ids):
            gradients = [torch.autograd.grad(model(x).square().sum(), x) for model in (plain, skipping)]
        torch.testing.assert_close(*gradients)
    model = pair(mlp(nn.ReLU()), ["1"])[1]
    step(model, X, ids, lambda m, x: m(x))
    called.clear()
    with memloc_ext.example_ids(ids):
        compiled = torch.compile(model, backend="eager")
        compiled(X)
        torch.func.grad(lambda x: torch.func.functional_call(model, dict(model.named_parameters()), x).sum())(X)
    assert not called


def test_ablation_in_mode_train_sees_them(called: list[str]) -> None:
    y, losses = torch.arange(5) % 4, []
    for model in pair(mlp(nn.ReLU()), ["1"]):
        with dropout_mode(model.eval(), "train"), memloc_ext.example_ids(torch.arange(5)):
            losses.append(memloc_ext.ablation_losses(model, X, y, ["1"])["1"].loss)  # looks for no chains
            model(X)
            losses.append(memloc_ext.ablation_losses(model, X, y, ["1"])["1"].loss)
            called.clear()
            model(X)
    assert called == [MLP]
    for of_losses in losses[1:]:
        torch.testing.assert_close(of_losses, losses[0])


def test_what_was_not_run_runs_where_it_is_asked_for(called: list[str]) -> None:
    read: list[Tensor] = []
    model = mlp(nn.ReLU(), nn.Identity())
    model[2].register_forward_hook(lambda module, args, output: read.append(output.sum()))
    hold(model, ["1"], X, called, [MLP])
    assert len({float(t) for t in read}) == 1
    assert read[-1].grad_fn is not None


class Made(nn.Module):
    """A linear layer, whatever is done with what it computes, a site and a linear layer."""

    def __init__(self, between: Callable[[Any, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.into, self.site, self.out, self.between = nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 4), between
        self.held: Any = None

    def forward(self, x: Tensor) -> Any:
        x = x * 20
        return self.between(self, x, self.into(x))


def assigned(net: Made, x: Tensor, hidden: Tensor) -> Tensor:
    hidden[:, 0] = 0
    return net.out(net.site(hidden))


def through_a_view(net: Made, x: Tensor, hidden: Tensor) -> Tensor:
    hidden.view(5, 24).neg().add_(1)
    hidden.view(5, 24).mul_(0.5)
    return net.out(net.site(hidden))


def through_a_part(net: Made, x: Tensor, hidden: Tensor) -> Tensor:
    y = net.site(hidden)
    y[:, 1:3].mul_(2)
    return net.out(y)


def over_what_is_read(net: Made, x: Tensor, hidden: Tensor) -> list[Tensor]:
    double = hidden * 2
    hidden.neg_()
    return [hidden.sum(1), net.out(net.site(hidden)), double]


def over_the_input(net: Made, x: Tensor, hidden: Tensor) -> Tensor:
    with torch.no_grad():
        hidden = net.into(x)
        x.zero_()
        y = net.out(net.site(hidden))
    return y + net.out.bias


def with_dropout(net: Made, x: Tensor, hidden: Tensor) -> Tensor:
    return net.out(net.site(F.dropout(hidden, 0.3)))


def with_dropout_off(net: Made, x: Tensor, hidden: Tensor) -> Tensor:
    return net.out(torch.dropout(net.site(hidden), p=0.3, train=False))


def clipped_above(net: Made, x: Tensor, hidden: Tensor) -> Tensor:
    return net.out(net.site(hidden.relu() - (hidden - 10).relu()))


def by_name(net: Made, x: Tensor, hidden: Tensor) -> Tensor:
    return net.out(torch.reshape(input=net.site(hidden), shape=(5, 24)))


@pytest.mark.parametrize(
    "between",
    [
        assigned, through_a_view, through_a_part, over_what_is_read, over_the_input, with_dropout, clipped_above,
        by_name, with_dropout_off,
    ],
)  # fmt: skip
def test_what_is_not_a_chain(between: Callable[..., Any], called: list[str]) -> None:
    plain, skipping = pair(Made(between), ["site"], skip=True)
    for _ in range(2):
        told = []
        for model in (plain, skipping):
            torch.manual_seed(0)
            y, grads = step(model, X, torch.arange(5), lambda m, x: torch.cat([t.flatten() for t in m(x)]))
            told.append((y, grads, torch.rand(1)))
        torch.testing.assert_close(*told, rtol=1e-9, atol=1e-9)


def test_what_the_model_holds_has_the_weights_of_its_pass(called: list[str]) -> None:
    def hold_hidden(net: Made, x: Tensor, hidden: Tensor) -> Tensor:
        net.held = hidden, net.site(hidden)
        return net.out(net.held[1])

    models = pair(Made(hold_hidden), ["site"])
    for _ in range(2):
        for model in models:
            step(model, X, torch.arange(5), lambda m, x: m(x))
            with torch.no_grad():
                model.into.weight.mul_(1.5)  # pyright: ignore
        for of_plain, of_skipping in zip(*(m.held for m in models), strict=True):  # pyright: ignore
            torch.testing.assert_close(of_skipping.detach(), of_plain.detach())
    assert called == [MLP]


def test_gradients_of_activations_are_watched(called: list[str]) -> None:
    def retain(net: Made, x: Tensor, hidden: Tensor) -> Tensor:
        hidden.retain_grad()
        net.held = hidden
        return net.out(net.site(hidden))

    models = pair(Made(retain), ["site"])
    for _ in range(2):
        for model in models:
            step(model, X, torch.arange(5), lambda m, x: m(x))
        torch.testing.assert_close(models[1].held.grad, models[0].held.grad)  # pyright: ignore


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
@pytest.mark.parametrize("hooked", ["0", "1", "2"])
def test_backward_hooks_of_modules(hooked: str, register: str, called: list[str]) -> None:
    models = pair(mlp(nn.ReLU()), ["1"])
    for model in models:
        step(model, X, torch.arange(5), lambda m, x: m(x))
    told = []
    for model in models:
        seen: list[Tensor] = []
        handle = getattr(model.get_submodule(hooked), register)(lambda *grads, seen=seen: seen.extend(grads[-1]))
        told.append((*step(model, X, torch.arange(5), lambda m, x: m(x)), seen))
        handle.remove()
    torch.testing.assert_close(*told, rtol=1e-9, atol=1e-9)
    assert not called
    step(models[1], X, torch.arange(5), lambda m, x: m(x))
    assert called == [MLP]


def test_convolutions_behind_what_works_in_place(called: list[str]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 5, 3), nn.Flatten())
    hold(model, ["0"], IMAGES, called, [CONV])


def test_products_are_added_to_more_than_a_bias(called: list[str]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.act, self.out = nn.Parameter(torch.ones(8, 16)), nn.ReLU(), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.act(torch.addmm(x.repeat(1, 2), x, self.weight)))

    hold(Net(), ["act"], X, called, [], skip=True)


def test_empty_batches(called: list[str]) -> None:
    hold(mlp(nn.ReLU()), ["1"], torch.zeros(0, 2, 3, 8, dtype=torch.float64), called, [MLP], channel_dim=-1)


def test_an_interrupted_pass_leaves_nothing(called: list[str]) -> None:
    def interrupted(net: Made, x: Tensor, hidden: Tensor) -> Tensor:
        if net.held:
            raise net.held
        return net.out(net.site(hidden))

    model: Any = pair(Made(interrupted), ["site"])[1]
    for error in (None, ValueError(), None, KeyboardInterrupt(), None):
        model.held = error
        with memloc_ext.example_ids(torch.arange(5)), pytest.raises(type(error)) if error else contextlib.nullcontext():
            model(X)
    assert called == [MLP, MLP]
    assert torch.overrides._get_current_function_mode() is None


@pytest.mark.parametrize("inner", [torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16, enabled=False)])
def test_what_is_asked_for_elsewhere_is_what_would_have_been_there(inner: Callable[[], Any], called: list[str]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.read = mlp(nn.ReLU()), torch.empty(0)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.net[0](x)
            with inner():
                self.read = hidden * 2
            return self.net[2](self.net[1](hidden))

    with torch.autocast("cpu", torch.bfloat16):
        models = [m.float() for m in pair(Net(), ["net.1"])]
        for _ in range(2):
            told: list[Any] = [(*step(m, X.float(), torch.arange(len(X)), lambda m, x: m(x)), m.read) for m in models]
            torch.testing.assert_close(*told, rtol=2e-2, atol=5e-3)
            assert torch.equal(told[0][-1], told[1][-1])
    assert called == [MLP]


def test_a_function_that_hides_what_it_does_is_refused() -> None:
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.relu()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return grad

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.hides = mlp(nn.ReLU()), False

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.net[0](x)
            hidden = Hidden.apply(hidden) if self.hides else self.net[1](hidden)
            return self.net[2](hidden)

    model = pair(Net(), ["net.0"])[1]
    step(model, X, torch.arange(len(X)), lambda m, x: m(x))
    model.hides = True  # pyright: ignore
    with pytest.raises(RuntimeError, match="insert the dropout without skip"):
        step(model, X, torch.arange(len(X)), lambda m, x: m(x))


@pytest.mark.parametrize(
    ("model", "after", "reason"),
    [
        (mlp(nn.Sigmoid()), "1", "none of relu, gelu"),
        (mlp(nn.Dropout(0.5), nn.SiLU()), "1", "none of relu, gelu"),
        (mlp(nn.ReLU(), nn.LayerNorm(32)), "1", "goes to layer_norm"),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(800, 2)), "0", "goes to flatten"),
        (nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 2)), "0", "no linear layer leads to it"),
    ],
)
def test_required(model: nn.Module, after: str, reason: str, called: list[str]) -> None:
    skipping = pair(copy.deepcopy(model), [after])[1]
    x = IMAGES if isinstance(model[0], nn.Conv2d) else X  # pyright: ignore
    with memloc_ext.example_ids(torch.arange(len(x))), pytest.raises(ValueError, match=reason) as raised:
        skipping(x)
    assert repr(after) in str(raised.value)
    if not any(isinstance(m, nn.Dropout) for m in model.modules()):
        hold(model, [after], x, called, [], skip=True)


def test_skip_is_checked() -> None:
    with pytest.raises(ValueError, match="skip must be True, False or 'require', got 'yes'"):
        insert_example_tied_dropout(mlp(nn.ReLU()), ["1"], skip="yes")  # pyright: ignore


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["mlp", "gated", "convolution", "vit"])
def test_accounted(kind: str, called: list[str]) -> None:
    x = IMAGES if kind in ("convolution", "vit") else TOKENS
    made: dict[str, Callable[[], tuple[nn.Module, list[str]]]] = {
        "mlp": lambda: (mlp(nn.ReLU()), ["1"]),
        "gated": lambda: (Gated(), ["act"]),
        "convolution": lambda: (nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 16, 3)), ["1"]),
        "vit": lambda: (
            ViT(image_size=12, patch=4, dim=8, depth=2, heads=2, mlp=16, dropout=0),
            ["blocks.0.mlp.act", "blocks.1.mlp.act"],
        ),
    }
    model, after = made[kind]()
    models = pair(model, after, channel_dim=1 if kind == "convolution" else -1)
    direction = {name: torch.randn_like(p) for name, p in models[0].named_parameters()}
    ids, groups = torch.arange(len(x)), torch.arange(len(x)) % 2
    for _ in range(2):
        told = []
        for m in models:
            m.zero_grad()
            accountant = GradientAccountant(m)
            with accountant, memloc_ext.example_ids(ids):
                loss = F.softplus(m(x)).flatten(1).sum(1)
                account = accountant.backward(
                    loss, loss_reduction="none", group_ids=groups, directions={"d": direction}, pairwise=True
                )
            told.append(
                (account.sqnorm, account.group_grad, account.dot, account.inner, [p.grad for p in m.parameters()])
            )
        torch.testing.assert_close(*told, rtol=1e-8, atol=1e-8)
    assert called


def test_sites_say_that_they_skip() -> None:
    model = pair(mlp(nn.ReLU()), ["1"])[1]
    assert [m.skip for m in model.modules() if isinstance(m, ExampleTiedDropout)] == ["require"]
