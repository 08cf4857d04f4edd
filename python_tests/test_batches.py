"""Whatever form data has, the same examples arrive, with their own numbers."""

from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, Subset, TensorDataset

import memloc_ext
from memloc_ext.batches import Batch, call, device_of, read_batch, tensors_of, with_each_tensor
from memloc_ext.data import Split
from memloc_ext.examples import Examples, examples
from memloc_ext.marks import ByNumber, marked, truth
from memloc_ext.probes.accuracy import Evaluation

X, Y = torch.arange(14.0).view(7, 2), torch.arange(7) % 3
NUMBERS = torch.tensor([30, 10, 20, 0, 60, 50, 40])
CPU = torch.device("cpu")


class Items(Dataset):
    """Items as a user makes them."""

    def __init__(self, make: Any) -> None:
        self.make = make

    def __len__(self) -> int:
        return 7

    def __getitem__(self, row: int) -> Any:
        return self.make(row)


class Streamed(IterableDataset):
    def __iter__(self) -> Any:
        return iter([(X[row], int(Y[row])) for row in range(7)])


class Repeatable:
    """Yields the batches of a list whenever it is iterated."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)


@dataclass(frozen=True)
class Graph:
    """A dataclass with everything that makes copies hard."""

    nodes: Any
    count: int
    edges: Any = field(init=False)

    def __post_init__(self) -> None:
        assert self.count > 0
        object.__setattr__(self, "edges", 3 * self.nodes)


@dataclass(slots=True)
class Slots:
    a: Any
    b: Any = None


class Rooted(dict):
    """A mapping whose first argument is something else."""

    def __init__(self, root: Any = None, **items: Any) -> None:
        super().__init__(items)
        self.root = root


Pair = namedtuple("Pair", "first second")


@pytest.mark.parametrize(
    "tree",
    [
        X,
        (X, [X, "text", None, {"a": X, 3: Y}]),
        Pair(X, Y),
        Graph(X, 2),
        [Slots(X, Y), Slots(3)],
        Rooted(a=X, b=Y),
        defaultdict(list, a=X),
        OrderedDict(a=X, b=(Y,)),
        MappingProxyType({"a": X}),
        Graph,
        3,
    ],
    ids=lambda tree: type(tree).__name__,
)
def test_every_tensor_that_is_found_is_changed_in_its_place(tree: Any) -> None:
    found = tensors_of(tree)
    changed = with_each_tensor(tree, lambda t: t + 100)
    assert len(tensors_of(changed)) == len(found)
    for t, before in zip(tensors_of(changed), found, strict=True):
        assert torch.equal(t, before + 100)
    assert type(changed) is (dict if isinstance(tree, Rooted | defaultdict) else type(tree))
    assert all(t is before for t, before in zip(tensors_of(tree), found, strict=True))


def pair(row: int) -> tuple[Any, int]:
    return X[row], int(Y[row])


def triple(row: int) -> tuple[Any, int, int]:
    return X[row], int(Y[row]), int(NUMBERS[row])


def mapping(row: int) -> dict[str, Any]:
    return {"a": X[row], "b": 2 * X[row], "labels": int(Y[row])}


def several(row: int) -> tuple[Any, int]:
    return (X[row], 2 * X[row]), int(Y[row])


PARTS = [slice(0, 3), slice(3, 5), slice(5, 7)]
DATA: dict[str, Any] = {
    "tensors": TensorDataset(X, Y),
    "items": Items(pair),
    "loader": DataLoader(TensorDataset(X, Y), batch_size=3),
    "loader of lists": DataLoader(Items(several), batch_size=3),
    "loader of mappings": DataLoader(Items(mapping), batch_size=3),
    "mappings": Items(mapping),
    "list of batches": [(X[part], Y[part]) for part in PARTS],
    "repeatable": Repeatable([(X[part], Y[part]) for part in PARTS]),
    "stream": Streamed(),
    "loader of a stream": DataLoader(Streamed(), batch_size=3),
    "loader of batches": DataLoader([(X[part], Y[part]) for part in PARTS], batch_size=None),  # type: ignore[arg-type]
}
NUMBERED: dict[str, Any] = {
    "triples": Items(triple),
    "shuffled": DataLoader(Items(triple), batch_size=3, shuffle=True),
    "key": Items(lambda row: {**mapping(row), "index": int(NUMBERS[row])}),
    "list of triples": [(X[part], Y[part], NUMBERS[part]) for part in PARTS],
    "index as a list": [(X[part], Y[part], NUMBERS[part].tolist()) for part in PARTS],
}


def first_of(x: Any) -> torch.Tensor:
    return x["a"] if isinstance(x, dict) else x[0] if isinstance(x, tuple) else x


def joined(batches: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What batches hold, in the order of the examples' numbers."""
    xs, ys, ids = zip(*[(first_of(x), y, ids) for x, y, ids in batches], strict=True)
    order = torch.cat(ids).argsort()
    return torch.cat(xs)[order], torch.cat(ys)[order], torch.cat(ids)[order]


@pytest.mark.parametrize(("data", "numbers"), [(d, None) for d in DATA.values()] + [(d, NUMBERS) for d in
                         NUMBERED.values()], ids=[*DATA, *NUMBERED])  # fmt: skip
def test_every_form_yields_the_examples(data: Any, numbers: torch.Tensor | None) -> None:
    numbers = torch.arange(7) if numbers is None else numbers
    order = numbers.argsort()
    expected = X[order], Y[order], numbers[order]
    source = examples("probe", data, CPU)
    assert isinstance(source, Examples)
    state = torch.get_rng_state()
    for found in (source.batches(3), source.batches(2, torch.Generator().manual_seed(1)), source.batches([4, 3])):
        for actual, whole in zip(joined(found), expected, strict=True):
            assert torch.equal(actual, whole)
    if not isinstance(data, DataLoader):
        assert torch.equal(torch.get_rng_state(), state)
    assert len(source) == 7
    assert sorted(source.indices.tolist()) == sorted(numbers.tolist())
    rows = torch.tensor([5, 1, 3])
    part = source.subset(rows)
    assert part.indices.tolist() == source.indices[rows].tolist()
    for found in (source.batch(rows), part.batch(torch.arange(3)), next(part.batches(9))):
        assert found.ids.tolist() == numbers[rows].tolist()
        assert torch.equal(first_of(found.x), X[rows])
        assert torch.equal(found.y, Y[rows])


def test_a_split_is_data_by_itself() -> None:
    split = Split.clean(torch.rand(5, 1, 4, 4), torch.arange(5) % 2)
    assert examples("probe", split, CPU) is split
    loader = examples("probe", DataLoader(split, batch_size=2), CPU)
    for actual, expected in zip(loader.batches(2), split.batches(2), strict=True):
        assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


def test_a_loader_keeps_its_batches_in_a_pass_and_lends_its_data_set() -> None:
    made: list[int] = []

    def collate(items: list[Any]) -> Any:
        made.append(len(items))
        x, y = zip(*items, strict=True)
        return torch.stack(x), torch.tensor(y)

    source = examples("probe", DataLoader(Items(pair), batch_size=4, collate_fn=collate, drop_last=True), CPU)
    assert [len(batch.ids) for batch in source.batches(100)] == [4]
    assert len(source) == 4
    made.clear()
    assert [len(batch.ids) for batch in source.batches(3, torch.Generator())] == [3, 1]
    assert made == [3, 1]


def test_workers_read_a_data_set() -> None:
    source = examples("probe", Items(pair), CPU, num_workers=1)
    assert torch.equal(joined(source.batches(3))[0], X)


@pytest.mark.parametrize("name", ["tensors", "loader", "list of batches"])
def test_shards_cut_every_batch(name: str) -> None:
    source = examples("probe", DATA[name], CPU)
    parts = [list(source.batches(3, shard=(k, 2))) for k in range(2)]
    assert torch.equal(joined(batch for part in parts for batch in part)[0], X)
    assert [len(batch.ids) for batch in parts[0]] == [len(batch.ids) - len(batch.ids) // 2 for batch in
                                                      source.batches(3)]  # fmt: skip


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        (DataLoader(Items(pair), batch_size=2, shuffle=True), "that of a RandomSampler"),
        (DataLoader(Items(pair), batch_sampler=BatchSampler(RandomSampler(Items(pair)), 2, False)), "a RandomSampler"),
        (DataLoader(Items(pair), batch_sampler=[[3, 1], [0]]), "that of a list"),
        (DataLoader(Streamed(), batch_size=2, num_workers=2), "several workers share the stream"),
    ],
)
def test_numbers_that_cannot_be_known(loader: Any, reason: str) -> None:
    source = examples("probe", loader, CPU)
    with pytest.raises(ValueError, match=rf"probe: the numbers .* {reason}; have each item .*\(x, y, index\)"):
        list(source.batches(2))
    with pytest.raises(ValueError, match=reason):
        source.subset(torch.tensor([0])).batch(torch.tensor([0]))
    free = examples("probe", loader, CPU, numbered=False)
    assert sum(len(batch.ids) for batch in free.batches(2)) in (3, 7, 14)


@pytest.mark.parametrize("data", [(batch for batch in ()), iter([(X, Y)]), 7, None])
def test_what_can_be_iterated_once_or_not_at_all_is_refused(data: Any) -> None:
    with pytest.raises(TypeError, match=r"probe: data must be .* iterated again, got .*; make a list"):
        examples("probe", data, CPU)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (X, "must be .* or a mapping with labels, got Tensor"),
        ((X,), "got 1 parts"),
        ({"a": X, "label": Y}, "must hold labels, got a, label"),
        ((X, 3), "a tensor of targets, one per example, got int; .* put a DataLoader around it"),
        (({}, Y), "x must be a tensor, or a tuple or mapping of tensors, got dict"),
        (("text", Y), "got str"),
        ((X, Y, NUMBERS[:3]), r"index must be integers \[7\].*, got torch.int64 \[3\]"),
        ((X, Y, NUMBERS.float()), r"got torch.float32 \[7\]"),
        ((X, Y, NUMBERS > 0), r"got torch.bool \[7\]"),
    ],
)
def test_what_is_no_batch_is_refused(batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"probe: .*{message}"):
        read_batch("probe", batch)


def test_how_a_model_is_called() -> None:
    def model(*args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    named = namedtuple("named", ["a", "b"])(1, 2)
    assert call(model, X)[0][0] is X
    assert call(model, (1, 2)) == call(model, named) == ((1, 2), {})
    assert call(model, {"a": 1}) == ((), {"a": 1})
    assert device_of(torch.nn.Linear(1, 1)) == device_of(torch.nn.ReLU()) == CPU


def test_nested_targets_and_other_values_survive() -> None:
    target = namedtuple("target", ["box", "label"])
    data = [({"a": X, "n": None}, target(X, Y))]
    (batch,) = examples("probe", data, CPU).batches(9)
    assert isinstance(batch, Batch)
    assert batch.x["n"] is None
    assert isinstance(batch.y, target)
    part = examples("probe", data, CPU).batch(torch.tensor([2]))
    assert torch.equal(part.y.box, X[[2]])
    assert torch.equal(part.y.label, Y[[2]])


@pytest.mark.parametrize(
    "memorized",
    [
        [1, 4],
        torch.tensor([4, 1]),
        np.array([1, 4]),
        {1, 4},
        [False, True, False, False, True, False, False],
        np.arange(7) % 3 == 1,
        torch.arange(7) % 3 == 1,
    ],
)
def test_memorized_examples_are_a_mask_or_numbers(memorized: Any) -> None:
    told = marked("probe", memorized, None)
    assert told is not None
    assert told(torch.tensor([4, 0, 1, 6])).tolist() == [True, False, True, False]


def test_no_memorized_example() -> None:
    told = marked("probe", [], None)
    assert told is not None
    assert told(torch.tensor([4, 0])).tolist() == [False, False]
    assert marked("probe", None, TensorDataset(X, Y)) is None
    assert truth("probe", None, DATA["loader"]) is None


@pytest.mark.parametrize("memorized", [[0.5], [[1]], [-1], [1, 0, 1], "ab", [[True]]])
def test_what_marks_no_examples_is_refused(memorized: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        marked("probe", memorized, None)


def test_a_data_set_may_know_its_memorized_examples() -> None:
    mask = torch.tensor([True, False, True])
    own = Split(torch.rand(3, 1, 2, 2), torch.zeros(3).long(), torch.ones(3).long(), mask, torch.tensor([9, 4, 6]))
    for data in (own, DataLoader(own)):
        told, before = marked("probe", None, data), truth("probe", None, data)
        assert told is not None
        assert before is not None
        assert told(torch.tensor([6, 4, 9])).tolist() == [True, False, True]
        assert before(torch.tensor([4])).tolist() == [1]
        with pytest.raises(ValueError, match="memorized must have a value for each example, got none for number 5"):
            told(torch.tensor([4, 5]))
    by_number = marked("probe", None, SimpleNamespace(memorized=[False, True]))
    assert by_number is not None
    assert by_number(torch.tensor([1, 0])).tolist() == [True, False]
    with pytest.raises(ValueError, match=r"probe: memorized must have .* number 7"):
        ByNumber("probe: memorized", mask)(torch.tensor([7]))


def test_true_labels_are_by_number() -> None:
    told = truth("probe", [[1, 2], [3, 4]], None)
    assert told is not None
    assert told(torch.tensor([1, 0, 1])).tolist() == [[3, 4], [1, 2], [3, 4]]


def test_a_stream_comes_in_batches_of_the_size_that_is_asked_for() -> None:
    source = examples("probe", Streamed(), CPU)
    for size, sizes in ((3, [3, 3, 1]), (512, [7])):
        batches = list(source.batches(size))
        assert [len(batch.ids) for batch in batches] == sizes
        assert torch.equal(torch.cat([batch.ids for batch in batches]), torch.arange(7))
        assert torch.equal(torch.cat([batch.x for batch in batches]), X)
    slices = [batch.ids.tolist() for batch in source.batches(4, shard=(1, 2))]
    assert slices == [[2, 3], [6]]
    seen = []
    model = torch.nn.Linear(2, 3)
    model.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    memloc_ext.accuracy(model, Streamed(), batch_size=2)
    assert seen == [2, 2, 2, 1]


def test_a_negative_number_is_no_examples_number() -> None:
    with pytest.raises(ValueError, match="memorized must have a value for each example, got none for number -1"):
        memloc_ext.accuracy(torch.nn.Linear(2, 3), [(X, Y, torch.arange(7) - 1)], memorized=[True] * 7)


def test_the_marks_of_a_subset_are_by_its_own_numbers() -> None:
    subset = Subset(TensorDataset(X, Y), [2, 0, 1])
    subset.memorized = torch.tensor([True, False, False])
    account = memloc_ext.account_epoch(torch.nn.Linear(2, 3), subset)
    assert account.memorized.tolist() == [True, False, False]


def test_batches_of_several_shapes_give_no_single_examples() -> None:
    batches = [(torch.randn(3, 2), Y[:3]), (torch.randn(3, 4), Y[:3])]
    with pytest.raises(ValueError, match=r"probe: batches must be of one shape where .*, got .*2.* and .*4"):
        len(examples("probe", batches, CPU))


def test_every_probe_takes_the_settings_of_all() -> None:
    model, data = (
        torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3)),
        TensorDataset(X, Y),
    )
    common = {"memorized": [0], "true_labels": Y, "test": None, "task": "classification", "groups": None}
    memloc_ext.accuracy(model, data, **common)
    memloc_ext.account_epoch(model, data, **common)
    memloc_ext.rewind(model, {0: model.state_dict()}, data, **common)
    memloc_ext.retrain(model, model.state_dict(), data, **common, epochs=1)
    memloc_ext.localize_dataset(model, data, **common, localized=1, max_units=1, edited=0)


def test_an_example_is_judged_in_the_row_it_is_in_though_each_pass_leaves_others_out() -> None:
    model, y = torch.nn.Linear(2, 3), torch.arange(40) % 3
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(x, y, torch.arange(40)), 7, shuffle=True, drop_last=True)
    evaluation = Evaluation("probe", model, loader, None, None, None, "classification", 16, 0)
    ids = evaluation.train.indices
    assert torch.equal(evaluation.right_by_row(model), (model(x).argmax(1) == y)[ids])
