import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from memloc_ext.data import Split, digits, with_label_noise
from memloc_ext.nn import current_example_ids, insert_example_tied_dropout
from memloc_ext.training import TrainConfig, cosine, list_checkpoints, load_checkpoint, train
from memloc_ext.training.epoch import batch_sizes, epoch_rng

CONFIG = TrainConfig(epochs=3, batch_size=32, learning_rate=0.05)


@pytest.fixture(scope="module")
def split():
    """200 digits with label noise, whose numbers in the data set are not their rows."""
    return with_label_noise(digits(), 0.1).train.subset(torch.arange(1200, 1000, -1))


def build(seed=0):
    """A small network with batch norm and standard dropout: buffers and draws of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(144, 10)
        )


def accuracy(split):
    inputs, labels, _ = split.batch(torch.arange(len(split)))

    @torch.no_grad()
    def evaluate(model):
        return {"accuracy": (model(inputs).argmax(1) == labels).float().mean()}

    return evaluate


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_is_plain_sgd(split, tmp_path):
    model, reference = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), nn.Linear(64, 10)
    reference.load_state_dict(model[1].state_dict())
    history = train(model, split, CONFIG, checkpoints=tmp_path, progress=False)

    buffers = [torch.zeros_like(parameter) for parameter in reference.parameters()]
    step = 0
    for record in history[1:]:
        with epoch_rng(CONFIG.seed, int(record["epoch"]), split.device) as generator:
            batches = list(split.batches(32, generator))
        total = 0.0
        for inputs, labels, _ in batches:
            rate = 0.05 * cosine(step + 0.5, 3 * 7)
            step += 1
            loss = F.cross_entropy(reference(inputs.flatten(1)), labels)
            total += loss.item() * len(labels)
            gradients = torch.autograd.grad(loss, list(reference.parameters()))
            with torch.no_grad():
                for parameter, gradient, buffer in zip(reference.parameters(), gradients, buffers, strict=True):
                    buffer.mul_(0.9).add_(gradient + 5e-4 * parameter)
                    parameter -= rate * buffer
        assert record["loss"] == pytest.approx(total / 200)
        assert record["learning_rate"] == rate
    torch.testing.assert_close(model[1].state_dict(), reference.state_dict())


def test_learns_and_records_every_epoch(split, tmp_path):
    config = TrainConfig(epochs=12, batch_size=32, learning_rate=0.1)
    history = train(build(), split, config, checkpoints=tmp_path, evaluate=accuracy(split), progress=False)
    assert [record["epoch"] for record in history] == list(range(13))
    assert history[0].keys() == {"epoch", "accuracy"}
    assert all(record.keys() == {"epoch", "loss", "learning_rate", "accuracy"} for record in history[1:])
    assert all(type(value) in (int, float) for record in history for value in record.values())
    assert history[-1]["loss"] < history[1]["loss"] / 2
    assert history[-1]["accuracy"] > 0.8
    assert 0 < history[-1]["learning_rate"] < history[2]["learning_rate"] <= 0.1


def test_any_data_is_trained_on_in_the_same_order(split, tmp_path):
    batches = [tuple(batch) for batch in split.batches(50)]
    forms = [split, DataLoader(split, batch_size=7), DataLoader(split, batch_size=9, shuffle=True), batches]
    models = [build() for _ in forms]
    for number, (model, data) in enumerate(zip(models, forms, strict=True)):
        train(model, data, TrainConfig(epochs=2, batch_size=32), checkpoints=tmp_path / str(number), progress=False)
        assert_same(model.state_dict(), models[0].state_dict())
    with pytest.raises(ValueError, match=r"to continue .*, got"):
        train(build(), split.subset(torch.arange(100)), TrainConfig(2, 32), checkpoints=tmp_path / "1", progress=False)
    again = train(build(), batches, TrainConfig(epochs=2, batch_size=32), checkpoints=tmp_path / "1", progress=False)
    assert len(again) == 3  # finished before, on the same examples


def test_saves_the_initial_model_and_every_epoch(split, tmp_path):
    model = build()
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    history = train(model, split, CONFIG, checkpoints=tmp_path / "new" / "folder", progress=False)
    found = list_checkpoints(tmp_path / "new" / "folder")
    assert list(found) == [0, 1, 2, 3]
    saved = [load_checkpoint(path) for path in found.values()]
    assert_same(saved[0].model, initial)
    assert_same(saved[3].model, model.state_dict())
    assert [checkpoint.history for checkpoint in saved] == [history[: epoch + 1] for epoch in range(4)]


def test_two_runs_are_equal_and_the_seed_matters(split, tmp_path):
    models = [build(), build(), build()]
    histories = [
        train(model, split, TrainConfig(2, 32, seed=seed), checkpoints=tmp_path / str(number), progress=False)
        for number, (model, seed) in enumerate(zip(models, (1, 1, 2), strict=True))
    ]
    assert_same(models[0].state_dict(), models[1].state_dict())
    assert histories[0] == histories[1] != histories[2]


def test_leaves_nothing_behind(split, tmp_path):
    model = build().eval()
    model[1].train()
    flags = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    train(model, split, CONFIG, checkpoints=tmp_path, evaluate=lambda _: {"draw": torch.rand(())}, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_trains_in_training_mode_and_evaluates_in_evaluation_mode(split, tmp_path):
    model, seen = build(), []
    model[3].register_forward_hook(lambda module, *_: seen.append(module.training))
    config = TrainConfig(epochs=2, batch_size=100)
    train(model, split, config, checkpoints=tmp_path, evaluate=accuracy(split), progress=False)
    assert seen == [False, True, True, False, True, True, False]


@settings(max_examples=20)
@given(seed=st.integers(0, 2**70), epoch=st.integers(0, 1000))
def test_an_epochs_draws_depend_on_its_seed_and_number_alone(seed, epoch):
    draws = []
    for at in (epoch, epoch, epoch + 1):
        torch.rand(3)
        with epoch_rng(seed, at, torch.device("cpu")) as generator:
            draws.append((torch.randperm(20, generator=generator).tolist(), torch.randperm(20).tolist()))
    assert draws[0] == draws[1]
    assert draws[0][0] != draws[2][0]
    assert draws[0][1] != draws[2][1]
    assert draws[0][0] != draws[0][1]


def test_modules_find_the_ids_of_their_batch(split, tmp_path):
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            ids = current_example_ids()
            assert ids is not None
            seen.append(ids.tolist())
            rows = (split.indices[None] == ids[:, None]).nonzero()[:, 1]
            assert torch.equal(split.batch(rows)[0], x)
            return x

    model = nn.Sequential(Spy(), build())
    train(model, split, TrainConfig(epochs=2, batch_size=150), checkpoints=tmp_path, progress=False)
    assert [len(ids) for ids in seen] == [150, 50, 150, 50]
    orders = seen[0] + seen[1], seen[2] + seen[3]
    assert orders[0] != orders[1]
    assert all(sorted(order) == sorted(split.indices.tolist()) for order in orders)
    assert current_example_ids() is None


def test_example_tied_dropout_trains_and_continues(split, tmp_path):
    models = [insert_example_tied_dropout(build(), ["2"], seed=3) for _ in range(2)]
    histories = [train(m, split, CONFIG, checkpoints=tmp_path, progress=False) for m in models]
    assert histories[0] == histories[1]
    assert_same(models[0].state_dict(), models[1].state_dict())
    other = insert_example_tied_dropout(build(), ["2"], seed=4)
    with pytest.raises(ValueError, match=r'train: model\.2\.dropout_after\._extra_state must be .*"seed": 3.* got .*4'):
        train(other, split, CONFIG, checkpoints=tmp_path, progress=False)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision(split, tmp_path, precision):
    seen = []
    model = build()
    model[5].register_forward_hook(lambda *hooked: seen.append(hooked[2].dtype))
    config = TrainConfig(epochs=3, batch_size=32, learning_rate=0.05, precision=precision)
    history = train(model, split, config, checkpoints=tmp_path, progress=False)
    assert set(seen) == {getattr(torch, precision)}
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert history[-1]["loss"] < history[1]["loss"]
    scaler = load_checkpoint(tmp_path / "epoch_003.safetensors").scaler
    assert bool(scaler) == (precision == "float16")


def test_a_loss_that_is_not_finite_stops_the_training(split, tmp_path):
    model, calls = build(), []

    def spoil(_, arguments, logits):
        calls.append(len(arguments[0]))
        return logits * float("nan") if len(calls) == 7 + 3 else logits

    model[5].register_forward_hook(spoil)
    with pytest.raises(FloatingPointError, match="loss must be finite, got nan in epoch 2, batch 2"):
        train(model, split, CONFIG, checkpoints=tmp_path, progress=False)
    assert list(list_checkpoints(tmp_path)) == [0, 1]
    assert all(parameter.isfinite().all() and parameter.grad is None for parameter in model.parameters())
    unbroken = train(build(), split, CONFIG, checkpoints=tmp_path / "unbroken", progress=False)
    assert train(build(), split, CONFIG, checkpoints=tmp_path, progress=False) == unbroken


def test_weights_that_are_not_finite_are_not_saved(split, tmp_path):
    config = TrainConfig(epochs=1, batch_size=200, learning_rate=1e38, weight_decay=1e38)
    with pytest.raises(FloatingPointError, match=r"0\.weight must be finite, got NaN or an infinity in epoch 1"):
        train(build(), split, config, checkpoints=tmp_path, progress=False)
    assert list(list_checkpoints(tmp_path)) == [0]


def test_a_model_elsewhere_is_refused(split, tmp_path):
    with pytest.raises(ValueError, match=r"train: model must have values, got 0\.weight on meta"):
        train(build().to("meta"), split, CONFIG, checkpoints=tmp_path / "new", progress=False)
    half = build()
    half[5].to("meta")
    with pytest.raises(ValueError, match=r"train: model must have values, got 5\.weight on meta"):
        train(half, split, CONFIG, checkpoints=tmp_path / "new", progress=False)
    assert not (tmp_path / "new").exists()


def test_an_empty_split_is_refused(split, tmp_path):
    with pytest.raises(ValueError, match="train: data must hold at least one example, got none"):
        train(build(), split.subset(torch.arange(0)), CONFIG, checkpoints=tmp_path / "new", progress=False)
    assert not (tmp_path / "new").exists()


def test_evaluate_must_not_take_the_names_of_the_record(split, tmp_path):
    with pytest.raises(ValueError, match="train: evaluate must not name a number epoch, loss, learning_rate, got loss"):
        train(build(), split, CONFIG, checkpoints=tmp_path, evaluate=lambda _: {"loss": 0.0}, progress=False)
    assert os.listdir(tmp_path) == []


def test_one_example_and_one_step(tmp_path):
    one = Split.clean(torch.rand(1, 1, 8, 8), torch.tensor([3]))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    before = model[1].weight.clone()
    history = train(model, one, TrainConfig(epochs=1), checkpoints=tmp_path, progress=False)
    assert history[1]["learning_rate"] > 0
    assert not torch.equal(model[1].weight, before)


@given(examples=st.integers(1, 40), batch_size=st.integers(1, 12))
def test_no_batch_of_one_example_for_batch_norm(examples, batch_size):
    plain = batch_sizes(nn.Linear(2, 2), examples, batch_size)
    assert plain == [len(rows) for rows in torch.arange(examples).split(batch_size)]
    sizes = batch_sizes(nn.Sequential(nn.BatchNorm1d(2)), examples, batch_size)
    assert sum(sizes) == examples
    if len(plain) > 1 and plain[-1] == 1 < batch_size:
        assert sizes == [*plain[:-2], batch_size + 1]
    else:
        assert sizes == plain


@pytest.mark.parametrize("examples", [9, 5])
def test_a_last_batch_of_one_example_joins_the_one_before_where_batch_norm_needs_it(split, tmp_path, examples):
    def small():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Linear(6, 10))

    model, reference = small(), small()
    split, config = (
        split.subset(torch.arange(examples)),
        TrainConfig(epochs=2, batch_size=4, momentum=0.0, weight_decay=0.0),
    )
    with pytest.warns(
        UserWarning, match=rf"batch_size 4 leaves a single one of {examples} examples .* has 5 examples"
    ) as told:
        history = train(model, split, config, checkpoints=tmp_path, progress=False)
    assert len(told) == 1

    sizes = [4] * (examples // 4 - 1) + [5]
    optimizer = torch.optim.SGD(reference.parameters(), 0.1)
    for record in history[1:]:
        with epoch_rng(config.seed, int(record["epoch"]), split.device) as generator:
            order, total = torch.randperm(examples, generator=generator), 0.0
        for batch, rows in enumerate(order.split(sizes)):
            inputs, labels, _ = split.batch(rows)
            optimizer.zero_grad()
            loss = F.cross_entropy(reference(inputs), labels)
            loss.backward()
            step = (record["epoch"] - 1) * len(sizes) + batch + 0.5
            optimizer.param_groups[0]["lr"] = config.learning_rate * cosine(step, 2 * len(sizes))
            optimizer.step()
            total += loss.item() * len(rows)
        assert record["loss"] == pytest.approx(total / examples, rel=1e-5)
    assert_same(dict(model.named_buffers()), dict(reference.named_buffers()))


@pytest.mark.parametrize("already", [False, True])
def test_compiled_models_share_and_save_the_parameters_of_the_original(split, tmp_path, monkeypatch, already):
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile_(model, backend="eager"))  # without code generation
    model = build()
    given = torch.compile(model) if already else model
    config = TrainConfig(epochs=2, batch_size=50, compile=not already)
    train(given, split, config, checkpoints=tmp_path, progress=False)
    assert_same(load_checkpoint(tmp_path / "epoch_002.safetensors").model, model.state_dict())
    torch._dynamo.reset()
    assert build().load_state_dict(load_checkpoint(tmp_path / "epoch_001.safetensors").model)


@pytest.mark.slow
def test_compiles(split, tmp_path):
    model = insert_example_tied_dropout(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), ["0"])
    config = TrainConfig(epochs=2, batch_size=100, learning_rate=0.05)
    plain = insert_example_tied_dropout(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), ["0"])
    plain.load_state_dict(model.state_dict())
    expected = train(plain, split, config, checkpoints=tmp_path / "plain", progress=False)
    config = TrainConfig(epochs=2, batch_size=100, learning_rate=0.05, compile=True)
    history = train(model, split, config, checkpoints=tmp_path / "compiled", progress=False)
    torch._dynamo.reset()
    assert history[2]["loss"] == pytest.approx(expected[2]["loss"], rel=1e-4)


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_on_cuda(split, tmp_path, precision):
    config = TrainConfig(epochs=4, batch_size=32, learning_rate=0.05, precision=precision)
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    history = train(build().cuda(), split.to("cuda"), config, checkpoints=tmp_path, progress=False)
    assert history[-1]["loss"] < history[1]["loss"]
    (tmp_path / "epoch_004.safetensors").unlink()
    model = build(1).cuda()
    continued = train(model, split.to("cuda"), config, checkpoints=tmp_path, progress=False)
    assert continued[:4] == history[:4]
    assert continued[4]["loss"] == pytest.approx(history[4]["loss"], rel=0.01)  # kernels may add in any order
    saved = load_checkpoint(tmp_path / "epoch_004.safetensors")
    assert_same(saved.model, {name: value.cpu() for name, value in model.state_dict().items()})
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(torch.cuda.get_rng_state(), states[1])
