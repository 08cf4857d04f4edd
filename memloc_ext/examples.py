"""Data under one contract: a data set, a ``DataLoader`` or an iterable of batches, read by row or in passes.

Data is a map-style data set, a ``DataLoader``, or anything that can be iterated again and yields batches. An item, or
a batch, is ``(x, y)``, ``(x, y, index)`` or a mapping, see `memloc_ext.batches`; ``index`` is the example's number.
Without it the number is the example's position in the data.

A data set may say which of its examples are memorized, by an attribute ``memorized`` (bool), and their labels before
any noise, by ``true_labels``: by number, or by row where ``indices`` has the number of each row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, default_collate

from memloc_ext.batches import Batch, read_batch, tensors_of, with_each_tensor

Data: TypeAlias = Any
"""A map-style data set, a ``DataLoader``, or what yields the same batches whenever it is iterated."""
Shard = tuple[int, int]
_PASS = 512
"""Examples at a time where their number does not matter."""


@runtime_checkable
class Examples(Protocol):
    """Examples that can be read by row; what `examples` makes of data, and what a data set may be by itself."""

    @property
    def device(self) -> torch.device:
        """Where batches are."""
        ...

    @property
    def indices(self) -> Tensor:
        """Number of the example in each row, ``[N]``, int64."""
        ...

    def __len__(self) -> int:
        """Return the number of examples."""
        ...

    def batch(self, rows: Tensor) -> Batch:
        """Return the examples in some rows, ``[B]`` int64."""
        ...

    def batches(
        self, batch_size: int | Sequence[int], generator: torch.Generator | None = None, *, shard: Shard = (0, 1)
    ) -> Iterator[Batch]:
        """Iterate once over all examples, see `row_batches`."""
        ...

    def subset(self, rows: Tensor) -> Examples:
        """Return the examples in some rows, ``[B]`` int64, which keep their numbers."""
        ...

    def to(self, device: torch.device) -> Examples:
        """Return the same with batches on another device."""
        ...


def examples(
    function: str, data: Data, device: torch.device, *, num_workers: int = 0, numbered: bool = True
) -> Examples:
    """Return data as examples.

    A data set that has the methods of `Examples` is taken as it is. Another one, also an ``IterableDataset``, is read
    by a ``DataLoader``. A ``DataLoader`` or iterable is read in its own order and batches, whatever ``batch_size``
    says. Where its examples are shuffled or picked, a ``DataLoader`` lends its data set, ``collate_fn`` and workers;
    what another iterable yields is then held in memory.

    Args:
        function: Named in errors.
        data: See the head of this module.
        device: Where batches are returned.
        num_workers: Processes that read a data set; a ``DataLoader`` has its own.
        numbered: Whether the examples' numbers matter; if not, they may be positions in one pass.

    Raises:
        TypeError: If ``data`` can be iterated only once, or not at all.
        ValueError: When it is read: if a batch is of another form, or its numbers cannot be known.
    """
    if isinstance(data, Examples):
        return data if data.device == device else data.to(device)
    map_style = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    if map_style and not isinstance(data, list | tuple | dict | IterableDataset):  # a list holds batches
        return _Items(function, data, torch.arange(len(data)), device, num_workers)
    if not isinstance(data, Iterable) or isinstance(data, Iterator):
        raise TypeError(
            f"{function}: data must be a map-style data set, a DataLoader or an iterable that can be iterated again, "
            f"got {type(data).__name__}; make a list of the batches of a generator"
        )
    return _Passes(function, data, device, numbered, num_workers)


def digest(data: Examples) -> str:
    """Return what stands for examples, by their targets and numbers: a SHA-256 in hexadecimal.

    Of examples that have their ``labels`` in a tensor nothing else is read.
    """
    labels, sha = getattr(data, "labels", None), hashlib.sha256()
    if isinstance(labels, Tensor):
        whole = iter([Batch(None, labels, data.indices)])
    else:
        whole = data.subset(torch.arange(len(data))).batches(_PASS)  # by row, which a pass may shuffle
    for _, y, ids in whole:
        for t in tensors_of((y, ids)):
            sha.update(t.cpu().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def row_batches(
    count: int, batch_size: int | Sequence[int], generator: torch.Generator | None, shard: Shard
) -> Iterator[Tensor]:
    """Cut rows into batches, in order or shuffled; the last batch may be smaller.

    Args:
        count: Number of rows.
        batch_size: Rows in a batch, at least 1; or those of each batch, which add up to ``count``.
        generator: Shuffles if given; on the CPU. Drawn from once, in this call.
        shard: ``(k, n)``: of every batch cut into n slices, as equal as can be and the longer ones first, return
            slice k alone, from 0 on.

    Raises:
        ValueError: If ``batch_size``, the generator's device or ``shard`` breaks the above.
    """
    sizes = list(batch_size) if isinstance(batch_size, Sequence) else batch_size
    if (min(sizes, default=1) if isinstance(sizes, list) else sizes) < 1:
        raise ValueError(f"batches: batch_size must be at least 1, got {batch_size}")
    if isinstance(sizes, list) and sum(sizes) != count:
        raise ValueError(f"batches: batch_size must add up to {count} examples, got {sum(sizes)}")
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"batches: generator must be on the CPU, got {generator.device}")
    number, shards = shard
    if not 0 <= number < shards:
        raise ValueError(f"batches: shard must be (k, n) with k in [0, n), got {shard}")
    order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
    return (rows.tensor_split(shards)[number] for rows in order.split(sizes) if len(rows))


@dataclass(eq=False)
class _Items:
    """Rows of a map-style data set."""

    function: str
    data: Any
    rows: Tensor
    device: torch.device
    num_workers: int = 0
    collate: Callable[[list[Any]], Any] = default_collate
    unnumbered: str | None = None
    """Why the rows are not the numbers of the examples; None if they are."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def indices(self) -> Tensor:
        return self._ids

    @cached_property
    def _ids(self) -> Tensor:
        return torch.cat([self.rows[:0].to(self.device), *(batch.ids for batch in self.batches(_PASS))])

    def batch(self, rows: Tensor) -> Batch:
        (batch,) = self._load([self.rows[rows.cpu()]], 0)
        return batch

    def batches(
        self, batch_size: int | Sequence[int], generator: torch.Generator | None = None, *, shard: Shard = (0, 1)
    ) -> Iterator[Batch]:
        rows = row_batches(len(self), batch_size, generator, shard)
        return self._load([self.rows[chosen] for chosen in rows if len(chosen)], self.num_workers)

    def subset(self, rows: Tensor) -> _Items:
        return replace(self, rows=self.rows[rows.cpu()])

    def to(self, device: torch.device) -> _Items:
        return replace(self, device=device)

    def _load(self, chosen: Sequence[Tensor], num_workers: int) -> Iterator[Batch]:
        sampler, generator = [rows.tolist() for rows in chosen], torch.Generator()  # or it draws from the global one
        how: dict[str, Any] = {"collate_fn": self.collate, "num_workers": num_workers, "generator": generator}
        loader = DataLoader(self.data, batch_sampler=sampler, pin_memory=self.device.type == "cuda", **how)
        for rows, batch in zip(chosen, loader, strict=True):
            yield _numbered(self.function, read_batch(self.function, batch), rows, self.unnumbered, self.device)


@dataclass(eq=False)
class _Passes:
    """Batches as an iterable yields them, or the items of a stream in batches of any size."""

    function: str
    data: Iterable[Any]
    device: torch.device
    numbered: bool
    num_workers: int

    def __len__(self) -> int:
        return len(self._by_row)

    @property
    def indices(self) -> Tensor:
        return self._by_row.indices

    def batch(self, rows: Tensor) -> Batch:
        return self._by_row.batch(rows)

    def batches(
        self, batch_size: int | Sequence[int], generator: torch.Generator | None = None, *, shard: Shard = (0, 1)
    ) -> Iterator[Batch]:
        if generator is not None or isinstance(batch_size, Sequence):
            return self._by_row.batches(batch_size, generator, shard=shard)
        return self._pass(batch_size, shard)

    def subset(self, rows: Tensor) -> Examples:
        return self._by_row.subset(rows)

    def to(self, device: torch.device) -> _Passes:
        return replace(self, device=device)

    def _loader(self, batch_size: int = _PASS) -> Iterable[Any]:
        if isinstance(self.data, IterableDataset):
            return DataLoader(self.data, batch_size, num_workers=self.num_workers, generator=torch.Generator())
        return self.data

    def _pass(self, batch_size: int = _PASS, shard: Shard = (0, 1)) -> Iterator[Batch]:
        seen, unnumbered = 0, self._unnumbered
        for batch in self._loader(batch_size):
            read = read_batch(self.function, batch)
            count = len(tensors_of(read[1])[0])
            whole = _numbered(self.function, read, torch.arange(seen, seen + count), unnumbered, self.device)
            seen += count
            rows = torch.arange(count, device=self.device).tensor_split(shard[1])[shard[0]]
            if len(rows):
                yield whole if len(rows) == count else with_each_tensor(whole, lambda t, rows=rows: t[rows])

    @cached_property
    def _by_row(self) -> Examples:
        loader, sampler = self.data, getattr(self.data, "batch_sampler", None)  # without, a loader's items are batches
        if isinstance(loader, DataLoader) and sampler is not None and not isinstance(loader.dataset, IterableDataset):
            rows = torch.tensor(sorted(row for batch in sampler for row in batch), dtype=torch.int64)
            settings = (self.device, loader.num_workers, loader.collate_fn, self._unnumbered)
            return _Items(self.function, loader.dataset, rows, *settings)
        held = _Held(self.function, [with_each_tensor(batch, Tensor.cpu) for batch in self._pass()])
        return _Items(self.function, held, torch.arange(len(held)), self.device, collate=lambda batch: batch)

    @property
    def _unnumbered(self) -> str | None:
        """Why positions in a pass are not the numbers of the examples; None if they are, or if nobody asks."""
        loader = self._loader()
        if not self.numbered or not isinstance(loader, DataLoader):
            return None
        if isinstance(loader.dataset, IterableDataset):
            return "several workers share the stream" if loader.num_workers > 0 else None
        outer = loader.batch_sampler
        sampler = loader.sampler if outer is None else outer.sampler if type(outer) is BatchSampler else outer
        if type(sampler) is SequentialSampler:
            return None
        return f"the order of the loader is that of a {type(sampler).__name__}"


class _Held:
    """Batches as one data set, in memory."""

    def __init__(self, function: str, batches: Sequence[Batch]) -> None:
        columns = [tensors_of(batch) for batch in batches]
        shapes = sorted({str([["batch", *t.shape[1:]] for t in column]) for column in columns})
        if len(shapes) > 1:
            raise ValueError(
                f"{function}: batches must be of one shape where single examples are picked out of them, got "
                f"{shapes[0]} and {shapes[1]}; give a DataLoader, whose collate_fn can pad any examples alike"
            )
        joined = iter([torch.cat(parts) for parts in zip(*columns, strict=True)])
        self._batch = with_each_tensor(batches[0], lambda _: next(joined)) if batches else None

    def __len__(self) -> int:
        return 0 if self._batch is None else len(self._batch.ids)

    def __getitems__(self, rows: list[int]) -> Batch:
        return with_each_tensor(self._batch, lambda t: t[rows])

    __getitem__ = __getitems__


def _numbered(
    function: str, read: tuple[Any, Any, Tensor | None], positions: Tensor, unnumbered: str | None, device: torch.device
) -> Batch:
    """Return what was read of a batch, whose examples have these positions unless they say otherwise."""
    x, y, ids = read
    if ids is None and unnumbered is not None:
        raise ValueError(
            f"{function}: the numbers of the examples cannot be known: {unnumbered}; have each item give its own, as "
            "(x, y, index) or under the key 'index'"
        )
    return with_each_tensor(Batch(x, y, positions if ids is None else ids), lambda t: t.to(device, non_blocking=True))
