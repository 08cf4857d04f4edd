"""Every score is that of a plain PyTorch loop over the states and the single examples, in float64."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from probing import Everything, Store, changed_state, made_split, small_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import memloc_ext
from memloc_ext import models
from memloc_ext.nn import dropout_mode, example_ids, insert_example_tied_dropout
from memloc_ext.probes import Audit, audit
from memloc_ext.training import Checkpoint, save_checkpoint

N, CLASSES, NOISY = 9, 3, [2, 5, 6]
NAMES = ("gradnorm", "self_influence", "margin", "loss", "forgetting", "cosine")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()


def examples(n: int = N) -> TensorDataset:
    return TensorDataset(torch.randn(n, 4).double(), torch.randint(CLASSES, (n,)))


def loaded(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    model = copy.deepcopy(model).eval()
    model.load_state_dict(state, strict=False)
    return model


def states_of(model: nn.Module, *epochs: int) -> dict[int, dict[str, Tensor]]:
    return {epoch: changed_state(model, epoch) for epoch in epochs}


def plain(
    model: nn.Module, states: list[dict[str, Tensor]], x: Tensor, y: Tensor, rates: list[float], marked: Any = ()
) -> dict[str, Tensor]:
    """Every score but that of dropout; predicted classes and losses, ``[states, N]``."""
    gradients_of: list[Tensor] = []
    table: dict[str, list[list[float]]] = {name: [] for name in ("sqnorm", "loss", "margin", "predicted")}
    for state in states:
        net, columns = loaded(model, state), {name: [] for name in table}
        for row in range(len(y)):
            with example_ids(torch.tensor([row])), dropout_mode(net, "train"):
                logits = net(x[row : row + 1])[0]
            margin = logits[y[row]] - max(z for c, z in enumerate(logits) if c != y[row])
            loss = logits.logsumexp(0) - logits[y[row]]
            gradients = torch.autograd.grad(loss, list(net.parameters()))
            columns["sqnorm"].append(sum(float(g.square().sum()) for g in gradients))
            columns["loss"].append(loss.item())
            columns["margin"].append(margin.item())
            columns["predicted"].append(int(logits.argmax()))
            gradients_of.append(torch.cat([g.flatten() for g in gradients]))
        for name, values in columns.items():
            table[name].append(values)
    found = {name: torch.tensor(values).double() for name, values in table.items()}
    right, forgetting = found["predicted"] == y, []
    for each in right.T.tolist():
        events = sum(before and not after for before, after in itertools.pairwise(each))
        forgetting.append(float(events if any(each) else len(each)))
    last = torch.stack(gradients_of[-len(y) :])
    clean = last[[row for row in range(len(y)) if row not in marked]].mean(0)
    return found | {
        "score_cosine": -F.cosine_similarity(last, clean[None]),
        "score_gradnorm": found["sqnorm"].sqrt().mean(0),
        "score_self_influence": sum(rate * norm for rate, norm in zip(rates, found["sqnorm"], strict=True)),
        "score_margin": -found["margin"].mean(0),
        "score_loss": found["loss"].mean(0),
        "score_forgetting": torch.tensor(forgetting).double(),
    }


def check(found: Audit, expected: dict[str, Tensor]) -> None:
    for name, values in found.scores.items():
        torch.testing.assert_close(torch.tensor(values).double(), expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("given", [[0.5, 0.1, 0.0], {7: 0.0, 1: 0.5, 3: 0.1}])
def test_every_score_is_that_of_a_plain_loop(given: Any) -> None:
    model, data = network().train(), examples()
    states, (x, y) = states_of(model, 7, 1, 3), data.tensors
    before = Everything(model)
    found = audit(model, data, states=states, learning_rates=given, memorized=NOISY, batch_size=4)
    before.check()
    expected = plain(model, [states[1], states[3], states[7]], x, y, [0.5, 0.1, 0.0], NOISY)
    check(found, expected)
    assert list(found.scores) == [f"score_{n}" for n in NAMES]
    assert (found.indices, found.labels) == (list(range(N)), y.tolist())
    assert found.memorized == [row in NOISY for row in range(N)]
    votes = torch.zeros(N, CLASSES)
    for losses, predicted in zip(expected["loss"], expected["predicted"].long(), strict=True):
        votes += losses.std(correction=0) * F.one_hot(predicted, CLASSES)
    assert found.suggested == votes.argmax(1).tolist()
    assert found.score == "score_loss"


@pytest.mark.parametrize("memorized", [None, range(N)])
def test_the_model_as_it_is_is_the_only_state_by_default(memorized: Any) -> None:
    model, data = network(), examples()
    check(audit(model, data, memorized=memorized), plain(model, [model.state_dict()], *data.tensors, [1.0]))


def test_the_order_of_a_loader_does_not_matter() -> None:
    model, data = network(), examples()
    items = [(x, y, index + 10) for index, (x, y) in enumerate(data)]
    states = states_of(model, 0, 1)
    found = audit(model, DataLoader(items, batch_size=4, shuffle=True), states=states, memorized=[12])
    assert found.indices == list(range(10, 10 + N))
    assert found.memorized == [index == 12 for index in found.indices]
    check(found, plain(model, list(states.values()), *data.tensors, [1.0, 1.0], [2]))
    with pytest.raises(ValueError, match="data must yield the same examples in every pass; leave out drop_last"):
        audit(model, DataLoader(items, batch_size=4, shuffle=True, drop_last=True), states=states_of(model, *range(9)))


def test_example_tied_dropout_is_dropped_at_the_end() -> None:
    split, model = made_split(N, 8, noisy=3), small_model("lenet")
    insert_example_tied_dropout(model, models.dropout_sites(model), p_gen=0.5, p_mem=0.5)
    model = model.double().train()
    extra = {name: value for name, value in model.state_dict().items() if "_extra" in name}
    weights = {name: value for name, value in model.state_dict().items() if name not in extra}
    states = {epoch: {name: epoch * value for name, value in weights.items()} | extra for epoch in (1, 2)}
    x, y, _ = split.batch(torch.arange(N))
    data, before = [(x.double()[:5], y[:5]), (x.double()[5:], y[5:])], Everything(model)
    found = audit(model, data, states=states, memorized=range(3))
    before.check()
    expected = plain(model, list(states.values()), x.double(), y, [1.0, 1.0], range(3))
    with torch.no_grad():
        dropped = loaded(model, states[2])(x.double())
    assert not torch.equal(F.cross_entropy(dropped, y, reduction="none"), expected["loss"][1])
    check(found, expected | {"score_drop": F.cross_entropy(dropped, y, reduction="none") - expected["loss"][1]})
    assert found.score == "score_drop"
    assert found.suggested == dropped.argmax(1).tolist()


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 5), nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


def test_tokens_have_a_margin_and_no_label() -> None:
    model, tokens = Words().double(), torch.randint(7, (4, 5))
    labels = tokens.clone()
    labels[0, 2], labels[2, :] = -100, -100
    found = audit(model, TensorDataset(tokens, labels), task="tokens")
    margins, losses = [], []
    for row in range(4):
        logits = model(tokens[row : row + 1])[0].detach()
        pairs = [(logits[t - 1], int(labels[row, t])) for t in range(1, 5) if labels[row, t] != -100]
        margin = [z[k] - max(v for c, v in enumerate(z) if c != k) for z, k in pairs]
        margins.append(float(sum(margin)) / max(len(margin), 1))
        losses.append(float(sum(z.logsumexp(0) - z[k] for z, k in pairs)) / max(len(pairs), 1))
    assert found.scores["score_margin"] == pytest.approx([-margin for margin in margins])
    assert found.scores["score_loss"] == pytest.approx(losses)
    assert found.labels is found.suggested is None
    assert found.rows()[0]["label"] is None
    assert [row["index"] for row in found.top(2)] == sorted(range(4), key=lambda i: -losses[i])[:2]


class Square:
    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        return (output - y).square().sum(1)

    def right(self, output: Tensor, y: Tensor) -> Tensor:
        return (output - y).abs().amax(1) < 1


def test_a_task_of_ones_own_is_ranked_by_its_loss() -> None:
    model, x, y = network(), torch.randn(N, 4).double(), torch.randn(N, CLASSES).double()
    found = audit(model, TensorDataset(x, y), task=Square())
    losses = Square().loss(model(x), y).tolist()
    assert found.scores["score_loss"] == pytest.approx(losses)
    assert "score_margin" not in found.scores
    assert [row["index"] for row in found.top(N)] == sorted(range(N), key=lambda i: -losses[i])


def test_learning_rates_are_those_that_a_training_recorded(tmp_path: Path) -> None:
    model, data, rates = network(), examples(), [0.0, 0.3, 0.2]
    states = states_of(model, 0, 1, 2)
    history = [{"epoch": 0}, {"epoch": 1, "learning_rate": 0.3}, {"epoch": 2, "learning_rate": 0.2}]
    for epoch, state in states.items():
        save_checkpoint(tmp_path, Checkpoint(epoch, state, {}, {}, history[: epoch + 1], {}, ""))
    check(audit(model, data, states=tmp_path), plain(model, list(states.values()), *data.tensors, rates))


KNOWN = [False, True, False, True, False], [0, 0, 1, 2, 2]
MADE = Audit(
    "score_a",
    [3, 4, 7, 8, 9],
    [0, 1, 1, 0, 2],
    [0, 0, 1, 1, 2],
    {"score_a": [1.0, 5.0, 1.0, 2.0, 0.0], "score_b": [0.0, 0.0, 1.0, 0.0, 3.0]},
    *KNOWN,
)


def test_ranks_begin_with_the_highest_score_and_ties_go_by_number() -> None:
    assert [row["rank"] for row in MADE.rows()] == [3, 1, 4, 2, 5]
    assert [row["index"] for row in MADE.top(3)] == [4, 8, 3]
    row = {"index": 4, "label": 1, "suggested": 0, "score_a": 5.0, "score_b": 0.0, "rank": 1}
    assert MADE.top(1) == [row]
    assert list(MADE.rows()[0]) == list(row)


def test_quality_is_that_of_counted_pairs() -> None:
    quality = {row["score"]: row for row in MADE.quality()}
    marks = [bool(mark) for mark in MADE.memorized or []]
    for name, values in MADE.scores.items():
        pairs = [
            (a, b) for a, m in zip(values, marks, strict=True) if m for b, k in zip(values, marks, strict=True) if not k
        ]
        assert quality[name]["auc"] == pytest.approx(sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs))
    assert (quality["score_a"]["precision"], quality["score_a"]["restored"]) == (1, 0.5)
    assert (quality["score_b"]["precision"], quality["score_b"]["restored"]) == (0, 0)
    equal = Audit("score_a", MADE.indices, MADE.labels, MADE.suggested, {"score_a": [1, 1, 1, 0, 2]}, *KNOWN)
    (row,) = equal.quality()
    assert (row["precision"], row["restored"]) == pytest.approx((1 / 3 / 2, 1 / 3 / 2))
    atypical = Audit("score_a", MADE.indices, MADE.labels, MADE.suggested, MADE.scores, MADE.memorized, MADE.labels)
    assert all(row["restored"] is None for row in atypical.quality())
    assert Audit("score_a", MADE.indices, None, None, MADE.scores).quality() == []


def test_an_interrupted_audit_goes_on() -> None:
    model, data, store = network(), examples(), Store(2)
    state = changed_state(model, 0)
    states = {0: state, 1: changed_state(model, 1), 2: state}
    with pytest.raises(KeyboardInterrupt):
        audit(model, data, states=states, parts=store)
    before, store.limit = list(store), None
    found = audit(model, data, states=list(states.values()), parts=store)
    assert list(store)[:2] == before
    assert len(store) == 3
    assert found == audit(model, data, states=states)
    audit(model, TensorDataset(data.tensors[0], (data.tensors[1] + 1) % CLASSES), states=states, parts=store)
    assert len(store) == 6


def test_errors_name_what_arrived(tmp_path: Path) -> None:
    model, data = network(), examples()
    states = states_of(model, 0, 1)
    with pytest.raises(ValueError, match=r"score must be one of gradnorm, .*, cosine, got 'drop'"):
        audit(model, data, score="drop")
    with pytest.raises(ValueError, match="states must hold at least one, got none"):
        audit(model, data, states={})
    with pytest.raises(ValueError, match="at least one checkpoint, got none"):
        audit(model, data, states=tmp_path)
    with pytest.raises(ValueError, match=r"of epochs 0, 1, got \[0.1\]"):
        audit(model, data, states=states, learning_rates=[0.1])
    with pytest.raises(ValueError, match=r"of epochs 0, 1, got \{0: 0.1, 2: 0.1\}"):
        audit(model, data, states=states, learning_rates={0: 0.1, 2: 0.1})
    with pytest.raises(ValueError, match=r"finite and at least 0, got \[0.1, -1\]"):
        audit(model, data, states=states, learning_rates=[0.1, -1])
    with pytest.raises(TypeError, match="audit: epochs in states must be integers, got '0'"):
        audit(model, data, states={"0": states[0]})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="audit: the state dict must be of this model"):
        audit(model, data, states={0: {"0.weight": torch.ones(1)}})
    with pytest.raises(ValueError, match="data must hold at least one example, got none"):
        audit(model, TensorDataset(torch.ones(0, 4).double(), torch.ones(0, dtype=torch.int64)))
    broken = {name: t.clone().fill_(float("nan")) for name, t in states[1].items()}
    with pytest.raises(ValueError, match=r"finite, got nan as sqnorm of example 0 in state 1"):
        audit(model, data, states={0: states[0], 1: broken})
    assert memloc_ext.audit is audit
