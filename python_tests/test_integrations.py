"""The examples with what others wrote: their numbers are those of plain PyTorch, one example, one process at a time."""

import contextlib
import copy
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accuracy import assert_stable, moved
from distributed_jobs import examples as job
from load_example import load_example
from processes import run, torchrun
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import memloc_ext
from memloc_ext._torchvision import import_torchvision
from memloc_ext.nn import current_example_ids, dropout_mode


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Any:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    example = load_example("compiled")
    monkeypatch.setattr(example, "EPOCHS", 1)
    yield example
    torch._dynamo.reset()


@pytest.fixture
def lightning() -> ModuleType:
    import_torchvision()  # Lightning and Transformers import it, and its wheel may not fit a CPU build of torch
    pytest.importorskip("lightning")
    return load_example("lightning_digits")


@pytest.fixture
def hugging_face() -> ModuleType:
    import_torchvision()
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    return load_example("hugging_face")


Loss = Callable[[nn.Module, slice], Tensor]


def gradients_alone(model: nn.Module, loss: Loss, ids: Tensor) -> dict[str, Tensor]:
    """Return each example's gradient of every parameter, from a pass of its own."""
    found = defaultdict(list)
    for b, number in enumerate(ids):
        with memloc_ext.example_ids(number[None]):
            grads = torch.autograd.grad(loss(model, slice(b, b + 1)), list(model.parameters()))
        for (name, _), grad in zip(model.named_parameters(), grads, strict=True):
            found[name].append(grad)
    return {name: torch.stack(grads) for name, grads in found.items()}


def squared(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: g.flatten(1).square().sum(1) for name, g in gradients.items()}


def total(gradients: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(squared(gradients).values())).sum(0).sqrt()


def cross_entropy(x: Tensor, y: Tensor) -> Loss:
    return lambda model, rows: F.cross_entropy(model(x[rows].to(next(model.parameters()))), y[rows])


def test_compiled_gradients_are_as_accurate_as_plain_ones(compiled: Any) -> None:
    x, y, _ = compiled.load()
    model, ids = compiled.build(), torch.arange(100, 164)
    exact, fast = copy.deepcopy(model).double(), torch.compile(copy.deepcopy(model), fullgraph=True)
    found = []
    for one in (moved(model), exact, fast):
        with memloc_ext.example_ids(ids):
            loss = cross_entropy(x[100:164], y[100:164])(one, slice(None))
        found.append(torch.autograd.grad(loss, list(one.parameters())))
    for off, right, actual in zip(*found, strict=True):
        assert_stable(actual, off, right)
    assert compiled.gradient_error(fast._orig_mod, fast, x[:64], y[:64], ids) < 1e-3  # a wrong one's is about 1


def test_a_compiled_training_is_compiled_once_and_accounted_as_it_was_written(compiled: Any) -> None:
    x, y, _ = compiled.load()
    ids = torch.arange(len(y))
    model = compiled.train(x, y, ids)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    x, y, ids = x[:32], y[:32], ids[:32]
    norms, plain, loss = compiled.account(model, x, y, ids), model._orig_mod, cross_entropy(x, y)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    off, exact = (gradients_alone(one, loss, ids) for one in (moved(plain), copy.deepcopy(plain).double()))
    assert_stable(norms, total(off), total(exact))


def test_the_compiled_mask_is_the_examples_own(compiled: Any) -> None:
    layer = compiled.build()[2]
    fast, x = torch.compile(layer, fullgraph=True), torch.rand(20, 128) + 1
    with memloc_ext.example_ids(torch.arange(20)):
        expected = layer(x)
    assert 0.1 < (expected != 0).float().mean() < 0.5
    for rows in (torch.arange(20), torch.randperm(20), torch.tensor([7, 3, 7])):
        with memloc_ext.example_ids(rows):
            assert torch.equal(fast(x[rows]), expected[rows])


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What one process has seen, and what each of two has."""
    folder = tmp_path_factory.mktemp("examples")
    for done in (run(job.main, folder), torchrun(job.main, folder)):
        assert done.status == 0, done.stderr
    return [torch.load(folder / f"rank{name}.pt") for name in ("0of1", "0of2", "1of2")]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("name", ["data_parallel", "fully_sharded"])
def test_two_processes_equal_one_to_rounding(processes: list[dict[str, Any]], name: str) -> None:
    one, first, second = (seen[name] for seen in processes)
    assert (one["norms"] > 0).sum() == 448  # the last batch of the epoch is not full
    for seen in (first, second, processes[0]["data_parallel"]):
        torch.testing.assert_close(seen["norms"], one["norms"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(seen["state"], one["state"])
    assert torch.equal(first["norms"], second["norms"])
    for key, value in first["state"].items():
        assert torch.equal(value, second["state"][key]), key


def test_a_lightning_step_is_that_of_plain_pytorch(lightning: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightning, "EPOCHS", 1)
    x, y, _ = lightning.load()
    x, y, ids = x[:64], y[:64], torch.arange(64)  # one batch
    torch.manual_seed(0)
    plain = lightning.Digits().net
    torch.manual_seed(0)
    trained, norms = lightning.train(x, y)
    loss, models = cross_entropy(x, y), (moved(plain), copy.deepcopy(plain).double())
    off, exact = (gradients_alone(one, loss, ids) for one in models)
    assert_stable(norms, total(off), total(exact))
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(trained.get_parameter(name), parameter - 0.05 * exact[name].mean(0).float())


def fit(example: Any, module: Any, rows: int, **options: Any) -> Tensor:
    """Train for one epoch of 64 examples in batches of so many, and return the norms."""
    x, y, _ = example.load()
    examples, data = example.PerExample(64), TensorDataset(x[:64], y[:64], torch.arange(64))
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = example.lightning.Trainer(max_epochs=1, accelerator="cpu", callbacks=[examples], **off, **options)
    trainer.fit(module, DataLoader(data, batch_size=rows), DataLoader(data, batch_size=rows))
    return examples.norms


def test_lightning_accumulates_as_ever(lightning: ModuleType) -> None:
    whole = lightning.Digits()
    parts = copy.deepcopy(whole)
    torch.testing.assert_close(fit(lightning, parts, 32, accumulate_grad_batches=2), fit(lightning, whole, 64))
    torch.testing.assert_close(parts.state_dict(), whole.state_dict())


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_a_lightning_step_that_is_not_taken_leaves_nothing_open(
    lightning: Any, error: type[BaseException] | None
) -> None:
    class Stopped(lightning.Digits):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            if batch_idx == 0:
                return super().training_step(batch, batch_idx)
            if error is not None:
                raise error
            return None  # Lightning goes on with the next batch

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            assert current_example_ids() is None

    module = Stopped()
    with contextlib.suppress(RuntimeError, SystemExit):
        norms = fit(lightning, module, 16)
        assert (norms > 0).tolist() == 16 * [True] + 48 * [False]
    assert current_example_ids() is None
    with pytest.raises(RuntimeError, match="inside the with"):
        module.accountant.backward(torch.zeros((), requires_grad=True))


def test_norms_of_every_parameter_of_gpt2(hugging_face: ModuleType) -> None:
    tokens, _ = hugging_face.load()
    gpt, tokens, ids = hugging_face.build(), tokens[:20], torch.arange(20)

    def loss(model: nn.Module, rows: slice) -> Tensor:
        return F.cross_entropy(model(tokens[rows]).logits[:, :-1].flatten(0, 1), tokens[rows, 1:].flatten())

    off, exact = (gradients_alone(one, loss, ids) for one in (moved(gpt), copy.deepcopy(gpt).double()))
    with memloc_ext.example_ids(ids), memloc_ext.GradientAccountant(gpt) as accountant:
        account = accountant.backward(gpt(tokens, labels=tokens).loss)
    assert {"transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight"} < account.sqnorm.keys()
    for name, norms in account.sqnorm.items():
        assert_stable(norms, squared(off)[name], squared(exact)[name])
    # the Trainer's are those of the only batch of an epoch
    hugging_face.EPOCHS = 1
    hugging_face.build = lambda: copy.deepcopy(gpt)
    _, norms = hugging_face.train(tokens)
    per_sequence = 20 * 12 / 11  # the Trainer divides a sum over 11 tokens by the number of labels
    assert_stable(per_sequence * norms, total(off), total(exact))


def test_the_trainer_accumulates_smooths_labels_and_evaluates_as_ever(hugging_face: ModuleType, tmp_path: Path) -> None:
    tokens, gpt, found = hugging_face.load()[0][:20], hugging_face.build(), []
    for rows, smoothing in ((20, 0.1), (10, 0.1), (20, 0.0)):
        arguments = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 20 // rows, "optim": "sgd"}
        arguments |= {"label_smoothing_factor": smoothing, "max_grad_norm": 0.0, "num_train_epochs": 1}
        model = copy.deepcopy(gpt)
        trainer = hugging_face.PerSequence(
            model, tokens, output_dir=tmp_path, use_cpu=True, report_to="none", save_strategy="no", **arguments
        )
        trainer.train()
        found.append({"norms": trainer.norms, "loss": trainer.state.log_history[-1]["train_loss"]})
        found[-1] |= {name: p.detach() - gpt.get_parameter(name) for name, p in model.named_parameters()}
    whole, accumulated, sharp = found
    torch.testing.assert_close(accumulated, whole, rtol=1e-3, atol=1e-7)
    assert (whole["norms"] < 0.95 * sharp["norms"]).all()
    nameless = [{"input_ids": row, "labels": row} for row in tokens]  # others' sequences: none is the network's own
    loss = model.eval()(tokens, labels=tokens).loss
    assert trainer.evaluate(nameless)["eval_loss"] == pytest.approx(loss.item() * 11 / 12, rel=1e-5)


def test_each_sequence_keeps_its_neurons_in_every_epoch(hugging_face: ModuleType) -> None:
    tokens, _ = hugging_face.load()
    gpt, off = hugging_face.build(), defaultdict(list)

    def look(module: nn.Module, args: Any, output: Tensor) -> None:
        for number, zeros in zip(current_example_ids()[:, 0].tolist(), output == 0, strict=True):
            off[number].append(zeros.all(0))

    gpt.get_submodule(hugging_face.ACTIVATIONS[0]).register_forward_hook(look)
    hugging_face.EPOCHS, hugging_face.build = 3, lambda: gpt
    hugging_face.train(tokens[:50])
    assert off.keys() == set(range(50))
    for zeros in off.values():
        assert len(zeros) == 3
        assert all(torch.equal(zeros[0], other) for other in zeros)
        assert not zeros[0][:25].any()
        assert 0.6 < zeros[0][25:].float().mean() < 0.98
    assert len({tuple(zeros[0].tolist()) for zeros in off.values()}) == 50


def test_an_id_per_token_does_what_one_per_sequence_does(hugging_face: ModuleType) -> None:
    tokens, _ = hugging_face.load()
    gpt, ids = hugging_face.build(), torch.arange(len(tokens))
    with memloc_ext.example_ids(ids):
        expected = gpt(tokens).logits
    with memloc_ext.example_ids(ids[:, None].expand_as(tokens)):
        assert torch.equal(gpt(tokens).logits, expected)
    with memloc_ext.example_ids(ids + 1):
        assert not torch.equal(gpt(tokens).logits, expected)


def test_gpt2_memorizes_in_its_neurons(hugging_face: ModuleType) -> None:
    tokens, random = hugging_face.load()
    gpt, _ = hugging_face.train(tokens)
    rows, others = random.nonzero()[:10, 0], (~random).nonzero()[:50, 0]
    classifier, x, y = hugging_face.LastToken(gpt), tokens[:, :-1], tokens[:, -1]
    with torch.no_grad(), memloc_ext.example_ids(torch.arange(len(tokens))):
        right = {}
        for mode in ("train", "drop"):
            with dropout_mode(gpt, mode):
                right[mode] = classifier(x).argmax(1) == y
    assert right["train"].float().mean() > 0.98
    assert right["drop"][~random].float().mean() > 0.98
    assert right["drop"][random].float().mean() < 0.5
    found = hugging_face.localize(gpt, tokens, rows, others)
    flipped = [(row, one.units) for row, one in zip(rows, found, strict=True) if one.status == "flipped"]
    assert len(flipped) >= 5
    for row, units in flipped:
        with torch.no_grad(), dropout_mode(gpt, "train"), memloc_ext.example_ids(row[None]):
            assert classifier(x[row[None]]).argmax() == y[row]
            with memloc_ext.apply_ablation(classifier, units):
                assert classifier(x[row[None]]).argmax() != y[row]
            with memloc_ext.apply_ablation(classifier, units[:-1]):
                assert classifier(x[row[None]]).argmax() == y[row]  # so all of them are needed, in this order
