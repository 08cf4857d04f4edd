"""Chunks depend on nothing but themselves, and a search that was interrupted does only what is missing."""

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_localize_dataset import dataset, found_in, plain, tied  # noqa: F401
from torch import nn

from memloc_ext.data import Dataset
from memloc_ext.probes import DatasetLocalization, localize
from memloc_ext.probes.localization import chunks
from memloc_ext.probes.localization.search import Searches
from memloc_ext.probes.localization.settings import Settings
from memloc_ext.tasks import task_of


class Memory(dict[str, Any]):
    """Parts that are kept until the process ends; may be interrupted in place of keeping one."""

    def __init__(self, limit: int = 1000) -> None:
        self.limit, self.puts = limit, 0

    def put(self, name: str, result: Any) -> None:
        if self.puts == self.limit:
            raise KeyboardInterrupt
        self.puts += 1
        self[name] = result


@pytest.fixture(autouse=True, scope="module")
def small_chunks() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK", 3)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["plain", "tied"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def whole(model: nn.Module, dataset: Dataset) -> DatasetLocalization:  # noqa: F811
    """What is found in one go."""
    return found_in(model, dataset)


@pytest.mark.parametrize("limit", [0, 2, 7, 11])
def test_an_interrupted_localization_goes_on(
    model: nn.Module,
    whole: DatasetLocalization,
    limit: int,
    dataset: Dataset,  # noqa: F811
) -> None:
    """Of 6 chunks and 6 edits, the last in work is lost."""
    parts = Memory(limit)
    with pytest.raises(KeyboardInterrupt):
        found_in(model, dataset, parts=parts)
    assert len(parts) == limit
    parts.limit = 1000
    result = found_in(model, dataset, parts=parts)
    assert parts.puts == len(parts) == 12
    assert found_in(model, dataset, parts=parts) == result
    assert parts.puts == 12
    assert replace(result, seconds=0.0) == replace(whole, seconds=0.0)


def test_other_work_takes_none_of_the_parts(plain: nn.Module, dataset: Dataset) -> None:  # noqa: F811
    parts = Memory()
    found_in(plain, dataset, parts=parts)

    def new(model: nn.Module = plain, data: Dataset = dataset, seed: int = 0, **settings: int) -> list[str]:
        before = set(parts)
        found_in(model, data, **settings, seed=seed, parts=parts)
        return sorted(name.split("_")[0] for name in set(parts) - before)

    searches, edits = ["search"] * 6, ["edit"] * 6
    assert new(edited=1) == []
    assert new(edited=4) == ["edit"] * 2
    assert {*searches} <= {*new(max_units=19)}
    assert new(seed=1).count("search") == 6
    darker = replace(dataset.train, inputs=dataset.train.inputs * 0.9999)
    assert new(data=replace(dataset, train=darker)) == edits + searches
    changed = copy.deepcopy(plain)
    next(changed.parameters()).data.mul_(1 + 1e-6)
    assert new(model=changed) == edits + searches


def test_a_search_leaves_nothing_behind_for_the_next(plain: nn.Module, dataset: Dataset) -> None:  # noqa: F811
    x, y, _ = dataset.train.batch(torch.arange(12))
    reference = dataset.train.batch(torch.arange(12, 40))[:2]
    shared = Searches(plain, Settings(max_units=5), reference)
    for _ in range(2):
        for rows in (slice(0, 4), slice(4, 12)):
            alone = localize(plain, x[rows], y[rows], reference=reference, max_units=5)
            found = shared.run(x[rows], y[rows])
            assert list(found) == list(alone)
            assert (found.sites, found.channel_dims, found.modules) == (alone.sites, alone.channel_dims, alone.modules)


def test_settings_have_the_defaults_of_localize() -> None:
    arguments = inspect.signature(localize).parameters
    for name, value in vars(Settings()).items():
        default = arguments[name].default
        assert value == (task_of(default) if name == "task" else default), name


@pytest.mark.parametrize(
    "damage",
    [
        lambda part: part["found"].pop(),
        lambda part: part["sites"].pop(),
        lambda part: part["found"][0].update(status="lost"),
        lambda part: part["found"][0].update(units=[["nowhere", 0]]),
        lambda part: part["found"][0].update(units=[[part["sites"][0][0], 10**6]]),
    ],
)
def test_a_part_that_does_not_fit_is_named(
    plain: nn.Module,  # noqa: F811
    dataset: Dataset,  # noqa: F811
    damage: Callable[[dict[str, Any]], object],
) -> None:
    parts = Memory()
    found_in(plain, dataset, parts=parts)
    name = next(name for name in parts if name.startswith("search_0001"))
    parts[name] = copy.deepcopy(parts[name])
    damage(parts[name])
    with pytest.raises(ValueError, match=rf"{name}\.json: must be "):
        found_in(plain, dataset, parts=parts)
