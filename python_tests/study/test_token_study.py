"""A study of a causal language model, called by keyword or with one tensor, against plain PyTorch."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memloc_ext.study import load_run
from memloc_ext.study.command_line import main
from memloc_ext.training import cosine, list_checkpoints, load_checkpoint
from memloc_ext.training.epoch import epoch_rng

SOURCE = """
import torch
from torch import nn
from torch.utils.data import Dataset

class Causal(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 16)
        self.mix = nn.Parameter(torch.rand(7, 7))
        self.hidden = nn.Linear(16, 64)
        self.head = nn.Linear(64, 9)

    def forward(self, input_ids, attention_mask=None):
        h = self.embed(input_ids)
        h = h if attention_mask is None else h * attention_mask[:, :, None]
        return self.head(torch.relu(self.hidden(h + torch.tril(self.mix) @ h)))

class Texts(Dataset):
    def __init__(self, count, random, seed, mapping):
        generator = torch.Generator().manual_seed(seed)
        self.ids = (torch.randint(9, (count, 1), generator=generator) + torch.arange(7)) % 9
        self.memorized = torch.arange(count) < random
        self.ids[:random] = torch.randint(9, (random, 7), generator=generator)
        lengths = torch.randint(3, 8, (count,), generator=generator)
        lengths[:random] = 7
        self.mask = torch.arange(7) < lengths[:, None]
        self.labels = torch.where(self.mask, self.ids, -100)
        self.labels[: 2 * random, 1:3] = -100
        self.mapping = mapping

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        if not self.mapping:
            return self.ids[i], self.labels[i]
        return {"input_ids": self.ids[i], "attention_mask": self.mask[i].long(), "labels": self.labels[i]}

def make(seed):
    return Causal()

def plain(seed):
    return Texts(44, 6, seed, False), Texts(20, 0, seed + 1, False)

def mapped(seed):
    return Texts(44, 6, seed, True), Texts(20, 0, seed + 1, True)
"""
EPOCHS, BATCH, RATE, SEED = 15, 16, 0.3, 3
SETTINGS = f"--task tokens --epochs {EPOCHS} --batch-size {BATCH} --learning-rate {RATE} --seed {SEED} --device cpu"
PROBES = "--localized 4 --max-units 6 --edited 2 --retrain-epochs 2 --rewind-epochs 0 9 --sites hidden --channel-dim -1"


class Study:
    """A finished run in a folder, and what its data and checkpoints are."""

    def __init__(self, folder: Path, data: str) -> None:
        self.mine = import_module(f"texts_{data}")
        self.train, self.test = getattr(self.mine, data)(SEED)
        self.run, self.mapping = load_run(folder), data == "mapped"
        (stage,) = folder.glob("train-*")
        self.states = [load_checkpoint(path).model for path in list_checkpoints(stage / "checkpoints").values()]

    def model(self, epoch: int) -> nn.Module:
        model: nn.Module = self.mine.make(SEED)
        model.load_state_dict(self.states[epoch])
        return model

    def outputs(self, model: nn.Module, texts: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and labels of the tokens after the first."""
        mask = {"attention_mask": texts.mask[rows].long()} if self.mapping else {}
        return model(texts.ids[rows], **mask)[:, :-1], texts.labels[rows, 1:]

    def right(self, model: nn.Module, texts: Any) -> tuple[Tensor, Tensor]:
        """Which tokens are right, and which are labelled."""
        with torch.no_grad():
            logits, labels = self.outputs(model.eval(), texts, torch.arange(len(texts)))
        return logits.argmax(2) == labels, labels != -100

    def shares(self, model: nn.Module) -> dict[str, Tensor]:
        right, labelled = self.right(model, self.train)
        texts, marks = (right | ~labelled).all(1).double(), self.train.memorized
        found = {"clean": texts[~marks].mean(), "memorized": texts[marks].mean()}
        right, labelled = self.right(model, self.test)
        return {**found, "test": (right | ~labelled).all(1).double().mean()}


@pytest.fixture(scope="module", params=["plain", "mapped"])
def study(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Training and accounting for ``(x, y)``, the whole study for mappings."""
    data, folder = request.param, tmp_path_factory.mktemp("tokens")
    (folder / f"texts_{data}.py").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        settings = f"--model texts_{data}:make --dataset texts_{data}:{data} {SETTINGS} --output out"
        main(f"account {settings}".split() if data == "plain" else f"run {settings} {PROBES}".split())
        return Study(folder / "out", data)


def test_every_stage_is_in_the_report(study: Study) -> None:
    stages = {"train", "account"}
    if study.mapping:
        stages |= {"rewind", "retrain", "localize", "dropout", "controls", "localize-dropout"}
        stages |= {"audit", "audit-dropout"}
    assert set(study.run.seconds) == stages
    page = (study.run.path / "report.html").read_text()
    marks, (right, labelled) = study.train.memorized, study.right(study.model(EPOCHS), study.train)
    share = float((right & labelled)[marks].sum() / labelled[marks].sum())
    assert 0 < share < 1
    assert f"{100 * share:.1f} % in memorized examples" in page
    assert "the wrong label that they came with" not in page  # which these are not


def test_the_accuracies_are_those_of_the_model(study: Study) -> None:
    shares = study.shares(study.model(EPOCHS))
    assert shares["clean"] > 0
    assert study.run.metrics[0].items() >= shares.items()
    for epoch in (0, 9):
        assert study.run.histories["plain"][epoch].items() >= study.shares(study.model(epoch)).items()


def test_the_first_epoch_is_that_of_a_plain_loop_and_its_account_that_of_each_example(study: Study) -> None:
    model, count = study.model(0), len(study.train)
    parameters, norms = dict(model.named_parameters()), torch.zeros(count)
    sums = {name: torch.zeros(2, *p.shape) for name, p in parameters.items()}
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=5e-4)
    with epoch_rng(SEED, 1, torch.device("cpu")) as generator:
        batches = torch.randperm(count, generator=generator).split(BATCH)
    for step, rows in enumerate(batches):
        optimizer.zero_grad()
        for row in rows:
            logits, labels = study.outputs(model, study.train, row[None])
            loss = F.cross_entropy(logits[0], labels[0])  # of the labelled tokens, of which each text has some
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            norms[row] = torch.cat([gradient.flatten() for gradient in gradients]).norm()
            for (name, p), gradient in zip(parameters.items(), gradients, strict=True):
                sums[name][int(study.train.memorized[row])] += gradient / len(rows)
                p.grad = gradient / len(rows) + (0 if p.grad is None else p.grad)
        optimizer.param_groups[0]["lr"] = RATE * cosine(step + 0.5, EPOCHS * len(batches))
        optimizer.step()
    torch.testing.assert_close(model.state_dict(), study.states[1], rtol=1e-4, atol=1e-6)
    assert study.run.accounting is not None
    account = study.run.accounting.epoch(1)
    assert torch.equal(account.memorized, study.train.memorized)
    torch.testing.assert_close(account.total_norms, norms, rtol=1e-4, atol=1e-6)
    for name, found in account.parameters.items():
        clean, memorized = sums[name].flatten(1).double()
        root = clean.numel() ** 0.5
        assert found.clean == pytest.approx(float(clean.norm()) / root, rel=1e-4)
        assert found.memorized == pytest.approx(float(memorized.norm()) / root, rel=1e-4)
        assert found.cosine == pytest.approx(float(F.cosine_similarity(clean, memorized, 0)), abs=1e-4)


@pytest.mark.parametrize("study", ["mapped"], indirect=True)
def test_rewinding_and_retraining_are_of_single_groups(study: Study) -> None:
    assert study.run.rewinding is not None
    assert study.run.retraining is not None
    assert list(study.run.rewinding.groups) == ["(root)", "embed", "hidden", "head"]
    for group, found in study.run.rewinding.groups.items():
        model = study.model(EPOCHS)
        prefix = "mix" if group == "(root)" else f"{group}."
        earlier = {name: value for name, value in study.states[9].items() if name.startswith(prefix)}
        model.load_state_dict(earlier, strict=False)
        assert found.at(9).with_buffers.shares().items() >= study.shares(model).items()
        initial = {name: study.states[0][name] for name in earlier}
        model.load_state_dict(initial, strict=False)
        retrained = study.run.retraining.groups[group].epochs[0].accuracy
        assert retrained.shares().items() >= study.shares(model).items()


@pytest.mark.parametrize("study", ["mapped"], indirect=True)
def test_units_that_were_found_flip_their_example(study: Study) -> None:
    """By a plain hook that zeroes them."""
    flipped = 0
    for found in study.run.localizations["plain"].examples:
        model, units = study.model(EPOCHS), [unit for _, unit in found.units]
        right, labelled = study.right(model, study.train)
        assert bool((right | ~labelled)[found.example].all()) == (found.status != "already_wrong")
        assert {site for site, _ in found.units} <= {"hidden"}
        if found.status == "flipped":
            off = torch.ones(64).index_fill(0, torch.tensor(units), 0)
            model.get_submodule("hidden").register_forward_hook(lambda _, inputs, output, off=off: output * off)
            right, labelled = study.right(model, study.train)
            assert not (right | ~labelled)[found.example].all()
            flipped += 1
    assert flipped >= 4
