"""The probes on models and data of others: every number is that of a plain PyTorch loop in float64."""

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import memloc_ext
from memloc_ext.nn import dropout_mode, example_ids, insert_example_tied_dropout
from memloc_ext.training import triangular

N = 10
MEMORIZED = [1, 4, 8]


@dataclass
class Case:
    """A model, data as a user has it, and the same examples one by one.

    Attributes:
        model: In float64.
        data: What the probes get.
        test: Test examples.
        batches: Numbers of the examples in each batch.
        inputs: The model's arguments for some examples.
        y: Their targets.
        task: What the probes get.
        logits: Of what the model returns.
        losses: Of logits and targets of single examples.
        right: Likewise.
        groups: Layer groups.
        site: Of a dropout, and its dimension of channels.
    """

    model: nn.Module
    data: Any
    test: Any
    batches: list[list[int]]
    inputs: Callable[[list[int]], dict[str, Tensor]]
    y: Tensor
    task: Any
    logits: Callable[[Any], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    right: Callable[[Tensor, Tensor], bool]
    groups: list[str]
    site: tuple[str, int]

    def output(self, model: nn.Module, rows: list[int]) -> Tensor:
        with example_ids(torch.tensor(rows)):
            return self.logits(model(**self.inputs(rows)))

    def loss_of(self, model: nn.Module, rows: list[int]) -> Tensor:
        """The sum of the examples' losses, each by itself."""
        logits = self.output(model, rows)
        return torch.stack([self.loss(out, self.y[row]) for out, row in zip(logits, rows, strict=True)]).sum()

    def share(self, model: nn.Module, rows: list[int]) -> float:
        model = copy.deepcopy(model).eval()
        with torch.no_grad():
            hits = [self.right(self.output(model, [row])[0], self.y[row]) for row in rows]
        return sum(hits) / len(hits)


CLEAN = [row for row in range(N) if row not in MEMORIZED]


def one_label(logits: Tensor, y: Tensor) -> Tensor:
    return logits.logsumexp(0) - logits[y]


def tabular() -> Case:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    x, y = torch.randn(N, 5, dtype=torch.float64), torch.randint(3, (N,))
    data = TensorDataset(x, y)
    right = lambda logits, label: int(logits.argmax()) == int(label)  # noqa: E731
    batches = [list(range(4)), list(range(4, 8)), [8, 9]]
    inputs = lambda rows: {"input": x[rows]}  # noqa: E731
    return Case(model, data, data, batches, inputs, y, "classification", lambda out: out, one_label, right,
                ["0", "2", "4"], ("1", 1))  # fmt: skip


def bert() -> Case:
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.BertConfig(vocab_size=12, max_position_embeddings=6, num_labels=3, **size)
    model = transformers.BertForSequenceClassification(config).double()
    words, y, mask = torch.randint(1, 12, (N, 5)), torch.randint(3, (N,)), torch.ones(N, 5, dtype=torch.int64)
    mask[::2, 3:] = 0
    order = [[3, 0, 9, 5], [1, 2, 4, 8], [7, 6]]  # as of a loader that shuffles
    items = [{"input_ids": words[row], "attention_mask": mask[row], "labels": y[row], "index": row} for row in range(N)]
    data = DataLoader(items, batch_sampler=order)  # type: ignore[arg-type]
    right = lambda logits, label: int(logits.argmax()) == int(label)  # noqa: E731
    inputs = lambda rows: {"input_ids": words[rows], "attention_mask": mask[rows]}  # noqa: E731
    groups = ["bert", "bert.encoder.layer.0", "bert.encoder.layer.1", "classifier"]
    site = ("bert.encoder.layer.0.intermediate.intermediate_act_fn", -1)
    return Case(model, data, data, order, inputs, y, "classification", lambda out: out.logits, one_label, right,
                groups, site)  # fmt: skip


def gpt2() -> Case:
    transformers = pytest.importorskip("transformers")
    size = {"vocab_size": 6, "n_positions": 6, "n_embd": 8, "n_layer": 2, "n_head": 2}
    config = transformers.GPT2Config(**size, bos_token_id=None, eos_token_id=None)
    model = transformers.GPT2LMHeadModel(config).double()
    tokens = torch.randint(6, (N, 5))
    y = tokens.clone()
    y[:, :3], y[2, 3] = -100, -100

    def each(logits: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(logits[t - 1], labels[t]) for t in range(1, 5) if labels[t] != -100]

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return torch.stack([one_label(out, label) for out, label in each(logits, labels)]).mean()

    right = lambda logits, labels: all(int(o.argmax()) == int(label) for o, label in each(logits, labels))  # noqa: E731
    data = TensorDataset(tokens, y)
    batches = [list(range(4)), list(range(4, 8)), [8, 9]]
    inputs = lambda rows: {"input_ids": tokens[rows]}  # noqa: E731
    groups = ["transformer", "transformer.h.0", "transformer.h.1"]
    return Case(model, data, data, batches, inputs, y, "tokens", lambda out: out.logits, loss, right, groups,
                ("transformer.h.0.mlp.act", -1))  # fmt: skip


CASES = {"tabular": tabular, "bert": bert, "gpt2": gpt2}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    made = CASES[request.param]()
    with torch.no_grad():  # so that some examples are right
        for parameter in made.model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    rows = list(range(N))
    wanted = made.output(copy.deepcopy(made.model).eval(), rows).argmax(-1)[::2]
    if made.task == "tokens":
        made.y[::2, 1:] = torch.where(made.y[::2, 1:] == -100, -100, wanted[:, :-1])
    else:
        made.y[::2] = wanted
        if isinstance(made.data, DataLoader):
            for row, item in enumerate(made.data.dataset):
                item["labels"] = made.y[row]
    return made


def test_accuracy(case: Case) -> None:
    found = memloc_ext.accuracy(
        case.model, case.data, memorized=MEMORIZED, test=case.test, task=case.task, batch_size=4
    )
    shares = {"clean": case.share(case.model, CLEAN), "memorized": case.share(case.model, MEMORIZED)}
    expected = [(*pair, count) for pair, count in zip(shares.items(), (7, 3), strict=True)]
    expected += [("memorized_true", None, 0), ("test", case.share(case.model, list(range(N))), N)]
    assert found.rows() == [dict(zip(("part", "share", "count"), row, strict=True)) for row in expected]
    assert 0 < shares["clean"] < 1
    if case.task == "tokens":
        with torch.no_grad():
            guessed = case.output(case.model.eval(), CLEAN).argmax(-1)[:, :-1]
        labels = case.y[CLEAN, 1:]
        assert found.tokens["clean"] == (guessed == labels).sum().item() / (labels != -100).sum().item()
    true = memloc_ext.accuracy(case.model, case.data, memorized=MEMORIZED, true_labels=case.y, task=case.task)
    assert true.memorized_true == true.memorized


def test_account_of_an_epoch(case: Case) -> None:
    model = copy.deepcopy(case.model).eval()
    parameters = dict(model.named_parameters())
    sums = {name: torch.zeros(2, *p.shape, dtype=torch.float64) for name, p in parameters.items()}
    for batch, kind in itertools.product(case.batches, (0, 1)):
        rows = [row for row in batch if (row in MEMORIZED) == kind]
        if rows:
            grads = torch.autograd.grad(case.loss_of(model, rows) / len(batch), list(parameters.values()), None, None,
                                        False, True)  # fmt: skip
            for name, grad in zip(parameters, grads, strict=True):
                sums[name][kind] += 0 if grad is None else grad
    single = [
        torch.autograd.grad(case.loss_of(model, [row]), list(parameters.values()), allow_unused=True)
        for row in range(N)
    ]
    found = memloc_ext.account_epoch(case.model, case.data, memorized=MEMORIZED, task=case.task, batch_size=4)
    assert list(found.groups) == case.groups
    assert found.indices.tolist() == list(range(N))
    owners = memloc_ext.models.layer_groups(model)
    for column, row in enumerate(found.rows()):
        names = owners[row["group"]]
        for key, pick in {"clean": lambda s: s[0], "memorized": lambda s: s[1], "total": lambda s: s.sum(0)}.items():
            expected = sum(float(pick(sums[name]).norm()) / math.sqrt(sums[name][0].numel()) for name in names)
            assert row[key] == pytest.approx(expected)
        for name in names:
            kinds = sums[name].flatten(1)
            if kinds.norm(dim=1).min() > 1e-12:  # the biases of keys have none but for rounding
                assert found.parameters[name].cosine == pytest.approx(F.cosine_similarity(*kinds, dim=0).item())
        assert row["cosine"] == pytest.approx(sum(found.parameters[n].cosine for n in names) / len(names))
        places = [list(parameters).index(name) for name in names]
        norms = [
            math.sqrt(sum(float(grads[i].square().sum()) for i in places if grads[i] is not None)) for grads in single
        ]
        torch.testing.assert_close(found.example_norms[:, column].double(), torch.tensor(norms).double(), rtol=1e-5,
                                   atol=1e-7)  # fmt: skip
        pairs = [(norms[m] > norms[c]) + 0.5 * (norms[m] == norms[c]) for m in MEMORIZED for c in CLEAN]
        assert row["auc"] == pytest.approx(sum(pairs) / len(pairs))


def test_account_of_a_trained_epoch(case: Case) -> None:
    for module in case.model.modules():
        if isinstance(module, nn.Dropout):  # the loop would have to repeat its draws
            module.p = 0.0
    plain = copy.deepcopy(case.model).train()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (plain, case.model)]
    for batch in case.batches:
        optimizers[0].zero_grad()
        (case.loss_of(plain, batch) / len(batch)).backward()
        optimizers[0].step()
    case.model.eval()
    memloc_ext.account_epoch(
        case.model, case.data, memorized=MEMORIZED, task=case.task, optimizer=optimizers[1], batch_size=4
    )
    assert not case.model.training
    assert all(parameter.grad is None for parameter in case.model.parameters())
    torch.testing.assert_close(case.model.state_dict(), plain.state_dict())


def other_state(model: nn.Module) -> dict[str, Tensor]:
    state = copy.deepcopy(model.state_dict())
    return {name: t + torch.randn_like(t) if t.is_floating_point() else t for name, t in state.items()}


@pytest.mark.filterwarnings("ignore:ParameterVariants")  # BERT reads its mask into Python
def test_rewinding(case: Case) -> None:
    states = {0: other_state(case.model), 3: other_state(case.model)}
    how = {"memorized": MEMORIZED, "test": case.test, "task": case.task}
    found = memloc_ext.rewind(case.model, states, case.data, **how, batch_size=4)
    owners, rows = memloc_ext.models.layer_groups(case.model), []
    for group, epoch in itertools.product(case.groups, states):
        model = copy.deepcopy(case.model)
        model.load_state_dict({name: states[epoch][name] for name in owners[group]}, strict=False)
        shares = [case.share(model, some) for some in (CLEAN, MEMORIZED, list(range(N)))]
        rows.append(dict(zip(("group", "epoch", "buffers", "clean", "memorized", "test"),
                             (group, epoch, None, *shares), strict=True)))  # fmt: skip
    assert found.rows() == rows
    assert any(row["test"] != found.unchanged.test for row in rows)
    assert found.unchanged == memloc_ext.accuracy(case.model, case.data, **how, batch_size=4)


def test_retraining(case: Case) -> None:
    state, group, epochs = other_state(case.model), case.groups[-1], 3
    how = {"learning_rate": 0.2, "patience": 9, "train_batch_size": 64}
    found = memloc_ext.retrain(case.model, state, case.data, memorized=MEMORIZED, task=case.task,
                               groups={group: [group]}, epochs=epochs, **how)  # fmt: skip
    model = copy.deepcopy(case.model).eval()  # without draws: dropouts of BERT and GPT-2 lie inside of the group
    names = [name for name, _ in model.named_parameters() if name.startswith(f"{group}.")]
    model.load_state_dict({name: state[name] for name in names}, strict=False)
    parameters = [model.get_parameter(name) for name in names]
    optimizer = torch.optim.SGD(parameters, lr=0.2, momentum=0.9, weight_decay=5e-4)
    records = found.groups[group].epochs
    expected = [{"group": group, "epoch": 0, **{k: case.share(model, rows) for k, rows in
                 (("clean", CLEAN), ("memorized", MEMORIZED))}, "test": None}]  # fmt: skip
    assert found.rows()[:1] == expected
    draws = any(isinstance(module, nn.Dropout) for module in model.get_submodule(group).modules())
    for epoch in range(1, epochs + 1):
        optimizer.param_groups[0]["lr"] = 0.2 * triangular(epoch - 0.5, epochs)
        optimizer.zero_grad()
        loss = case.loss_of(model, CLEAN) / len(CLEAN)
        loss.backward()
        optimizer.step()
        if not draws:
            assert records[epoch].loss == pytest.approx(loss.item())
            row = found.rows()[epoch]
            assert (row["clean"], row["memorized"]) == (case.share(model, CLEAN), case.share(model, MEMORIZED))
    assert records[-1].loss != records[1].loss


@pytest.mark.filterwarnings("ignore::UserWarning")  # BERT reads its mask into Python
def test_localization(case: Case) -> None:
    how = {"localized": 3, "max_units": 12, "edited": 0}
    found = memloc_ext.localize_dataset(case.model, case.data, memorized=MEMORIZED, task=case.task, **how)
    rows = found.rows()
    assert {tuple(row) for row in rows} == {("index", "memorized", "status", "units", "sites")}
    assert sorted(row["index"] for row in rows if row["memorized"]) == MEMORIZED
    assert {row["status"] for row in rows} & {"flipped", "already_wrong"}
    for example, row in zip(found.examples, rows, strict=True):
        number = row["index"]
        fitted = bool(case.share(case.model, [number]))
        assert fitted == (row["status"] != "already_wrong")
        with memloc_ext.apply_ablation(case.model, example.units):
            assert bool(case.share(case.model, [number])) == (fitted and row["status"] != "flipped")


def test_example_tied_dropout(case: Case) -> None:
    site, dim = case.site
    insert_example_tied_dropout(case.model, [site], p_gen=0.2, p_mem=0.5, channel_dim=dim)
    with dropout_mode(case.model, "train"):
        found = memloc_ext.accuracy(case.model, case.data, memorized=MEMORIZED, test=case.test, task=case.task)
        assert (found.clean, found.memorized) == (case.share(case.model, CLEAN), case.share(case.model, MEMORIZED))
        assert found.test is None
        whole = memloc_ext.account_epoch(case.model, case.data, memorized=MEMORIZED, task=case.task).total_norms
    dropped = memloc_ext.account_epoch(case.model, case.data, memorized=MEMORIZED, task=case.task).total_norms
    assert not torch.allclose(whole, dropped)


def test_numbers_that_cannot_be_known_are_an_error() -> None:
    torch.manual_seed(0)
    case = tabular()
    loader = DataLoader(case.data, batch_size=4, shuffle=True)
    for probe in (
        lambda: memloc_ext.accuracy(case.model, loader, memorized=MEMORIZED),
        lambda: memloc_ext.account_epoch(case.model, loader, memorized=MEMORIZED),
        lambda: memloc_ext.rewind(case.model, {0: case.model.state_dict()}, loader, memorized=MEMORIZED),
        lambda: memloc_ext.retrain(case.model, case.model.state_dict(), loader, memorized=MEMORIZED),
    ):
        with pytest.raises(ValueError, match="the numbers of the examples cannot be known"):
            probe()
    assert memloc_ext.accuracy(case.model, case.data, test=loader).test is not None  # which need no numbers


def test_a_task_of_ones_own() -> None:
    class Regression:
        def loss(self, output: Any, y: Tensor) -> Tensor:
            return (output["mean"][:, 0] - y).square()

        def right(self, output: Any, y: Tensor) -> Tensor:
            return (output["mean"][:, 0] - y).abs() < 0.5

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"mean": self.layer(x)}

    torch.manual_seed(0)
    model, x, y, task = Net().double(), torch.randn(N, 3, dtype=torch.float64), torch.randn(N).double(), Regression()
    errors = model(x)["mean"][:, 0].detach() - y
    found = memloc_ext.accuracy(model, TensorDataset(x, y), memorized=MEMORIZED, task=task)
    assert found.clean == (errors.abs() < 0.5)[CLEAN].double().mean().item()
    account = memloc_ext.account_epoch(model, [(x, y)], memorized=MEMORIZED, task=task)
    expected = torch.cat([2 * errors[:, None] * x, 2 * errors[:, None]], 1).norm(dim=1)
    torch.testing.assert_close(account.total_norms, expected.float())
    bias = account.parameters["layer.bias"]
    assert bias.total == pytest.approx(abs(float(2 * errors.mean())))
    with pytest.warns(UserWarning, match="must return one tensor"):
        rewound = memloc_ext.rewind(model, {0: model.state_dict()}, TensorDataset(x, y), memorized=MEMORIZED, task=task)
    assert rewound.rows()[0]["clean"] == found.clean
    short = {"epochs": 1, "memorized": MEMORIZED, "task": task}
    loss = memloc_ext.retrain(model, model.state_dict(), [(x, y)], **short).groups["layer"].epochs[1].loss
    assert loss == pytest.approx(errors[CLEAN].square().mean().item())
