import copy
import pickle
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import memloc_ext
from memloc_ext.nn import ExampleTiedDropout, FixedDropout, dropout_mode, set_dropout_mode
from memloc_ext.reference import example_tied_dropout as reference

IDS = torch.tensor([5, 0, 12, 7])


def module(**settings) -> ExampleTiedDropout:
    return ExampleTiedDropout(**{"p_gen": 0.25, "p_mem": 0.3, "seed": 3, "site": 2, **settings})


def test_train_mode_is_the_example_s_own_mask() -> None:
    x = torch.randn(4, 10, 3, 3)
    expected = reference.example_tied_dropout(x, IDS, 2, 0.3, 3, 2)
    layer = module()
    assert torch.equal(layer(x, IDS), expected)
    with memloc_ext.example_ids(IDS):
        assert torch.equal(layer(x), expected)
        assert torch.equal(layer(x, IDS + 1), reference.example_tied_dropout(x, IDS + 1, 2, 0.3, 3, 2))
    tokens = torch.arange(12).view(4, 3)
    x = torch.randn(4, 3, 10)
    expected = reference.example_tied_dropout(x, tokens, 2, 0.3, 3, 2, -1)
    assert torch.equal(module(channel_dim=-1)(x, tokens), expected)


@pytest.mark.parametrize("make", [ExampleTiedDropout, FixedDropout])
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)), mode=st.sampled_from(memloc_ext.nn.MODES)
)
def test_tokens_are_refused_unless_the_channels_are_named(make: type, shape: tuple[int, int, int], mode: str) -> None:
    x, ids = torch.randn(shape), torch.arange(shape[0])

    def masked(layer: nn.Module) -> Tensor:
        layer.mode = mode
        with memloc_ext.example_ids(ids):
            return layer(x)

    with pytest.raises(ValueError, match=r"channel_dim=-1 for tokens .*channel_dim=1 for \[batch, channels, length\]"):
        masked(make(0.4, 0.5, seed=3))
    first = masked(make(0.4, 0.5, seed=3, channel_dim=1))
    assert torch.equal(first, masked(make(0.4, 0.5, seed=3, channel_dim=-2)))
    x = x.transpose(1, 2)
    assert torch.equal(first.transpose(1, 2), masked(make(0.4, 0.5, seed=3, channel_dim=-1)))


def test_channels_may_be_named_later() -> None:
    layer, x = module(), torch.randn(4, 3, 10)
    layer.channel_dim = -1
    assert torch.equal(layer(x, IDS), reference.example_tied_dropout(x, IDS, 2, 0.3, 3, 2, -1))


@pytest.mark.parametrize(
    ("rescale", "factor"),
    [("none", 1.0), ("authors", 0.55 / 0.25), ("expectation", 0.475 / 0.25)],
)
def test_evaluation_modes(rescale: str, factor: float) -> None:
    x = torch.randn(4, 10, 3, 3)
    layer = module(rescale=rescale)
    layer.mode = "test"
    assert torch.equal(layer(x)[:, :2], x[:, :2])
    assert torch.equal(layer(x)[:, 2:], x[:, 2:] * 0.3)
    layer.mode = "drop"
    assert torch.allclose(layer(x)[:, :2], x[:, :2] * factor, rtol=1e-6)
    assert (layer(x)[:, 2:] == 0).all()
    layer.mode = "drop_gen"
    assert (layer(x)[:, :2] == 0).all()
    assert torch.equal(layer(x)[:, 2:], x[:, 2:])


def test_a_channel_switched_off_is_zero_even_where_it_is_infinite() -> None:
    layer = module().eval()
    x = torch.full((2, 8), float("inf"))
    assert (layer(x)[:, 2:] == 0).all()
    x.requires_grad_(True)
    layer(x)[:, 2:].sum().backward()
    assert (x.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", memloc_ext.nn.MODES)
def test_every_mode_keeps_dtype_and_memory_format(mode: str, dtype: torch.dtype) -> None:
    x = torch.randn(4, 8, 4, 4, dtype=dtype).to(memory_format=torch.channels_last)
    layer = module(rescale="authors")
    layer.mode = mode
    y = layer(x, IDS)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_train_and_eval_select_the_mode_unless_one_was_set_by_name() -> None:
    layer = module()
    assert layer.mode == "train"
    assert layer.eval().mode == "drop"
    layer.mode = "test"
    assert layer.train().mode == "test"
    layer.mode = None
    assert layer.mode == "train"
    with pytest.raises(ValueError, match="mode must be None or one of train, test, drop, drop_gen, got 'off'"):
        layer.mode = "off"
    assert layer.mode == "train"


def test_modes_of_a_whole_model() -> None:
    model = nn.Sequential(module(), nn.Sequential(module(site=1)))
    model[0].mode = "test"
    with dropout_mode(model, "drop_gen"):
        assert [model[0].mode, model[1][0].mode] == ["drop_gen", "drop_gen"]
    assert [model[0].mode, model[1][0].mode] == ["test", "train"]
    set_dropout_mode(model, None)
    assert [model[0].mode, model[1][0].mode] == ["train", "train"]


@pytest.mark.parametrize("mode", [None, "drop_gen"])
def test_settings_survive_state_dict_round_trips(mode: str | None, tmp_path: Path) -> None:
    source = nn.Sequential(nn.Linear(4, 4), module(p_gen=0.1 + 0.2, seed=-(2**62) - 1))
    source[1].mode = mode
    torch.save(source.state_dict(), tmp_path / "model.pt")
    target = nn.Sequential(nn.Linear(4, 4), ExampleTiedDropout())
    target[1].mode = "test"
    target.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    for name in ("seed", "site", "p_gen", "p_mem", "mode"):
        assert getattr(target[1], name) == getattr(source[1], name)
    assert all(isinstance(value, Tensor) for value in source.state_dict().values())
    for copied in (copy.deepcopy(source), pickle.loads(pickle.dumps(source))):
        assert repr(copied[1]) == repr(source[1])


def test_an_unreadable_state_is_refused() -> None:
    layer = module()
    rescaled = module(rescale="authors")
    with pytest.raises(ValueError, match="p_gen, which must be > 0"):
        rescaled.set_extra_state(module(p_gen=0.0).get_extra_state())
    assert rescaled.p_gen == 0.25
    for state in (torch.tensor([1, 2], dtype=torch.uint8), torch.zeros(0, dtype=torch.uint8), None, torch.randn(3)):
        with pytest.raises(ValueError, match="cannot be read"):
            layer.set_extra_state(state)
    assert layer.seed == 3


@given(p_gen=st.floats(0, 1), channels=st.integers(1, 300))
def test_the_pools_partition_the_channels(p_gen: float, channels: int) -> None:
    layer = ExampleTiedDropout(p_gen, 0.0)
    x = torch.ones(1, channels)
    kept = layer(x, torch.tensor([0]))
    assert int(kept.sum()) == int(p_gen * channels)
    layer.mode = "drop_gen"
    assert torch.equal(layer(x) + kept, x)


def test_errors() -> None:
    x = torch.randn(4, 8)
    with pytest.raises(ValueError, match="needs example ids"):
        module()(x)
    with pytest.raises(ValueError, match=r"example_ids must have shape \[4\]"):
        module()(x, IDS[:3])
    with memloc_ext.example_ids(IDS[:3]), pytest.raises(ValueError, match=r"example_ids must have shape \[4\]"):
        module()(x)
    with pytest.raises(TypeError, match="x must be a tensor"):
        module()((x, x))
    for name, value in {"p_gen": 1.1, "p_mem": -0.1}.items():
        with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\], got {value}"):
            module(**{name: value})
    for name, value in {"site": -1, "seed": 2**63, "channel_dim": 0}.items():
        with pytest.raises(ValueError, match=rf"{name} must .*got {value}"):
            module(**{name: value})
        if name != "seed":
            with pytest.raises(ValueError, match=rf"{name} must .*got {value}"):
                FixedDropout(**{name: value})
    with pytest.raises(TypeError, match="seed must be an integer, got float"):
        module(seed=1.5)
    for bad in (torch.randn(8), torch.randn(())):
        for layer in (module().eval(), FixedDropout()):
            with pytest.raises(ValueError, match="channel_dim must name a dimension of x after the batch, got 1"):
                layer(bad)
    with pytest.raises(TypeError, match="p_gen must be a number"):
        module(p_gen="0.2")
    with pytest.raises(ValueError, match="rescale must be one of none, authors, expectation, got 'all'"):
        module(rescale="all")
    with pytest.raises(ValueError, match="p_gen, which must be > 0"):
        module(p_gen=0.0, rescale="authors")


def test_example_ids_checks_nests_and_cleans_up() -> None:
    for bad, error in ((IDS.int(), TypeError), ([1, 2], TypeError), (torch.tensor(3), ValueError)):
        with pytest.raises(error), memloc_ext.example_ids(bad):
            pass
    layer = module()
    x = torch.randn(4, 8)
    with memloc_ext.example_ids(IDS):
        inside = layer(x)
        with memloc_ext.example_ids(IDS + 1):
            assert not torch.equal(layer(x), inside)
        assert torch.equal(layer(x), inside)
    with pytest.raises(RuntimeError, match="boom"), memloc_ext.example_ids(IDS):
        raise RuntimeError("boom")
    with pytest.raises(ValueError, match="needs example ids"):
        layer(x)


def test_negative_ids_from_the_context_are_refused() -> None:
    with pytest.raises(ValueError, match=">= 0, got -3"), memloc_ext.example_ids(torch.tensor([0, -3, 1, 2])):
        module()(torch.randn(4, 8))


def test_each_thread_has_its_own_ids() -> None:
    layer, x = module(), torch.ones(4, 64)
    results: dict[int, Tensor] = {}
    barrier = threading.Barrier(4)

    def work(n: int) -> None:
        with memloc_ext.example_ids(IDS + n):
            barrier.wait()
            results[n] = layer(x)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in range(4):
        assert torch.equal(results[n], layer(x, IDS + n))


def test_gradient_checkpointing_recomputes_the_same_mask() -> None:
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), module())
    x = torch.randn(4, 8)
    with memloc_ext.example_ids(IDS):
        plain = torch.autograd.grad(net(x).square().sum(), net[0].weight)[0]
        again = torch.autograd.grad(checkpoint(net, x, use_reentrant=False).square().sum(), net[0].weight)[0]
    assert torch.equal(plain, again)


def test_compiled_model_takes_ids_from_the_context() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), module(), nn.Linear(32, 3))
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(4, 8)
    for ids in (IDS, IDS + 100):
        with memloc_ext.example_ids(ids):
            assert torch.allclose(compiled(x), model(x), atol=1e-6)
    model.eval()
    assert torch.allclose(compiled(x), model(x), atol=1e-6)
    model[2].channel_dim, tokens = -1, torch.randn(4, 3, 8)
    assert torch.allclose(compiled(tokens), model(tokens), atol=1e-6)


def test_fixed_dropout_has_one_mask_for_all_in_both_modes() -> None:
    layer = FixedDropout(0.25, 0.3, seed=3, site=2)
    x = torch.randn(4, 40, 2, 2)
    expected = reference.example_tied_dropout(x, torch.zeros(4, dtype=torch.int64), 10, 0.3, 3, 2)
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.eval()(x), expected)
    tokens = torch.randn(4, 5, 40)
    assert torch.equal(
        FixedDropout(0.25, 0.3, seed=3, site=2, channel_dim=-1)(tokens),
        reference.example_tied_dropout(tokens, torch.zeros(4, dtype=torch.int64), 10, 0.3, 3, 2, -1),
    )
    with pytest.raises(ValueError, match="p_mem must be in"):
        FixedDropout(0.2, 2.0)


@pytest.mark.cuda
def test_cuda_module_moves_ids_and_agrees_with_the_cpu() -> None:
    layer, x = module(), torch.randn(4, 10, 3, 3)
    with memloc_ext.example_ids(IDS):
        assert torch.equal(layer(x.cuda()).cpu(), layer(x))
    with memloc_ext.example_ids(IDS.cuda()):
        assert torch.equal(layer(x.cuda()).cpu(), layer(x, IDS))
    with pytest.raises(ValueError, match="got -3"), memloc_ext.example_ids(torch.tensor([-3]).cuda()):
        pass
