import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from memloc_ext.data import Dataset, Split
from memloc_ext.data import images as image_files


def make_split(num=10, size=(3, 4, 4)):
    pixels = torch.randint(256, (num, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Split.clean(pixels, torch.arange(num) % 3)


def shuffled(split, seed, batch_size=4):
    batches = split.batches(batch_size, torch.Generator().manual_seed(seed))
    return torch.cat([indices for _, _, indices in batches])


def test_pixels_are_normalised_as_by_torchvision():
    from memloc_ext._torchvision import import_torchvision

    transforms = import_torchvision("transforms")
    split = make_split()
    expected = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)])
    inputs, _, _ = split.batch(torch.arange(len(split)))
    for pixels, actual in zip(split.inputs, inputs, strict=True):
        assert torch.equal(actual, expected(pixels.permute(1, 2, 0).numpy()))


@pytest.mark.parametrize(
    "normalization", ["imagenet", ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.4,), (0.2,))]
)
def test_normalisation_is_a_setting(normalization):
    own = normalization == ((0.4,), (0.2,))
    mean, std = ([0.4] * 3, [0.2] * 3) if own else ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    dataset = Dataset("name", make_split(), make_split(4), ("a", "b", "c")).normalized(normalization)
    for split in (dataset.train, dataset.test.subset(torch.tensor([2, 1])).to("cpu")):
        inputs, _, _ = split.batch(torch.arange(len(split)))
        for channel in range(3):
            expected = (split.inputs[:, channel].double() / 255 - mean[channel]) / std[channel]
            torch.testing.assert_close(inputs[:, channel].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("wrong", ["mnist", ((0.5, 0.5), (0.5,)), ((0.5,), (0.0,))])
def test_a_wrong_normalisation_is_named(wrong):
    with pytest.raises(ValueError, match=r"normalization must be one of paper, imagenet or .* 3 channels"):
        Dataset("name", make_split(), make_split(), ("a", "b", "c")).normalized(wrong)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_floating_point_pixels_are_in_unit_range(dtype):
    pixels = torch.tensor([0.0, 0.5, 1.0], dtype=dtype).view(3, 1, 1, 1)
    split = Split.clean(pixels, torch.zeros(3, dtype=torch.int64))
    inputs, _, _ = split.batch(torch.arange(3))
    assert inputs.dtype == torch.float32
    assert inputs.flatten().tolist() == [-1, 0, 1]


def test_item_is_one_row_of_a_batch():
    split = make_split()
    inputs, labels, indices = split.batch(torch.tensor([7]))
    for position in (7, -3):
        item = split[position]
        assert torch.equal(item[0], inputs[0])
        assert item[1:] == (int(labels), int(indices))
    assert len(list(split)) == len(split) == 10  # iteration ends


def test_plain_dataloader_yields_the_batches():
    split = make_split(10)
    loaded = list(DataLoader(split, batch_size=4))
    assert [len(labels) for _, labels, _ in loaded] == [4, 4, 2]
    for actual, expected in zip(loaded, split.batches(4), strict=True):
        for left, right in zip(actual, expected, strict=True):
            assert left.dtype == right.dtype
            assert torch.equal(left, right)


@given(num=st.integers(0, 9), batch_size=st.integers(1, 12), seed=st.none() | st.integers(0, 99))
def test_batches_visit_every_example_once(num, batch_size, seed):
    split = make_split(num)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    batches = list(split.batches(batch_size, generator))
    sizes = [len(labels) for _, labels, _ in batches]
    assert sizes == [batch_size] * (num // batch_size) + [num % batch_size] * (num % batch_size > 0)
    seen = [int(index) for _, _, indices in batches for index in indices]
    assert sorted(seen) == list(range(num))
    if seed is None:
        assert seen == sorted(seen)
    for inputs, labels, indices in batches:
        assert torch.equal(labels, split.labels[indices])
        assert torch.equal(inputs, split.batch(indices)[0])


def test_shuffling_depends_on_the_generator_only():
    split = make_split(50)
    before = torch.get_rng_state()
    first = shuffled(split, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert torch.equal(shuffled(split, seed=1), first)
    assert not torch.equal(shuffled(split, seed=2), first)


def test_epochs_with_one_generator_differ():
    split, generator = make_split(50), torch.Generator().manual_seed(0)
    orders = [torch.cat([indices for _, _, indices in split.batches(8, generator)]) for _ in range(2)]
    assert not torch.equal(*orders)


def test_subset_keeps_the_example_numbers():
    split = make_split()
    part = split.subset(torch.tensor([8, 2, 5])).subset(torch.tensor([0, 2]))
    assert part.indices.tolist() == [8, 5]
    assert torch.equal(part.inputs, split.inputs[[8, 5]])
    assert torch.equal(part.labels, split.labels[[8, 5]])
    assert part[0][2] == 8


def test_subset_by_mask():
    split = make_split()
    assert split.subset(split.labels == 1).indices.tolist() == [1, 4, 7]
    assert len(split.subset(split.memorized)) == 0


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (torch.tensor([10]), IndexError, r"batch: rows must be in \[0, 10\), got 10"),
        (torch.tensor([-1, 3]), IndexError, r"batch: rows must be in \[0, 10\), got -1"),
        (torch.tensor([1.0]), TypeError, r"rows must be int64 \[B\] or bool \[10\], got torch.float32 \[1\]"),
        (torch.tensor([True]), TypeError, r"got torch.bool \[1\]"),
        (torch.tensor(1), TypeError, r"got torch.int64 \[\]"),
    ],
)
def test_bad_rows(rows, error, message):
    with pytest.raises(error, match=message):
        make_split().batch(rows)


def test_bad_batches():
    with pytest.raises(ValueError, match="batches: batch_size must be at least 1, got 0"):
        make_split().batches(0)
    with pytest.raises(ValueError, match=r"batches: batch_size must be at least 1, got \[3, 0\]"):
        make_split().batches([3, 0])
    with pytest.raises(ValueError, match=r"batches: batch_size must add up to \d+ examples, got 3"):
        make_split().batches([1, 2])


def test_batches_of_given_sizes():
    split = make_split()
    sizes = (1, 3, len(split) - 4)
    batches, (whole,) = (list(split.batches(s, torch.Generator().manual_seed(1))) for s in (sizes, [len(split)]))
    assert [len(labels) for _, labels, _ in batches] == list(sizes)
    assert torch.equal(torch.cat([indices for *_, indices in batches]), whole[2])


def test_bad_split():
    good = {
        "inputs": torch.zeros(2, 1, 4, 4, dtype=torch.uint8),
        "labels": torch.tensor([0, 1]),
        "true_labels": torch.tensor([0, 1]),
        "memorized": torch.tensor([False, True]),
        "indices": torch.tensor([0, 1]),
    }
    Split(**good)
    for field, value, error, message in [
        ("inputs", torch.zeros(2, 4, 4), ValueError, r"inputs must be \[N, channels, height, width\], got \[2, 4, 4\]"),
        (
            "inputs",
            torch.zeros(2, 1, 4, 4, dtype=torch.int32),
            TypeError,
            "inputs must be uint8 or floating point, got",
        ),
        ("inputs", torch.full((2, 1, 4, 4), 1.5), ValueError, r"inputs must be in \[0, 1\], got 1.5 .. 1.5"),
        ("inputs", torch.full((2, 1, 4, 4), torch.nan), ValueError, r"inputs must be in \[0, 1\], got nan .. nan"),
        ("labels", torch.tensor([0]), ValueError, r"labels must be \[2\] like inputs, got \[1\]"),
        ("labels", torch.tensor([0, -1]), ValueError, "labels must not be negative, got -1"),
        ("true_labels", torch.tensor([0.0, 1.0]), TypeError, "true_labels must be torch.int64, got torch.float32"),
        ("memorized", torch.tensor([0, 1]), TypeError, "memorized must be torch.bool, got torch.int64"),
        (
            "indices",
            torch.zeros(2, 1, dtype=torch.int64),
            ValueError,
            r"indices must be \[2\] like inputs, got \[2, 1\]",
        ),
        ("indices", torch.zeros(2, dtype=torch.int64, device="meta"), ValueError, "indices must be on cpu like labels"),
    ]:
        with pytest.raises(error, match=f"Split: .*{message}"):
            Split(**{**good, field: value})


def test_inputs_move_as_a_whole_only_if_they_fit(monkeypatch):
    moved = []
    split = make_split()
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: moved.append(tensor) or tensor)
    for free, whole in ((2 * split.inputs.nbytes, True), (2 * split.inputs.nbytes - 1, False)):
        moved.clear()
        monkeypatch.setattr(image_files, "free_bytes", lambda device, free=free: free)
        split.to("cpu")
        assert any(tensor is split.inputs for tensor in moved) == whole
        assert any(tensor is split.labels for tensor in moved)


@pytest.mark.cuda
@pytest.mark.parametrize("free", [0, 1 << 30])
def test_batches_arrive_on_the_device(monkeypatch, free):
    monkeypatch.setattr(image_files, "free_bytes", lambda device: free)
    split = make_split()
    moved = split.to("cuda")
    assert moved.device.type == "cuda"
    assert moved.inputs.device.type == ("cuda" if free else "cpu")
    for actual, expected in zip(moved.batches(4), split.batches(4), strict=True):
        for left, right in zip(actual, expected, strict=True):
            assert left.device.type == "cuda"
            torch.testing.assert_close(left.cpu(), right)
    assert moved.subset(moved.labels == 1).indices.tolist() == [1, 4, 7]


def test_free_memory_of_the_host_is_plausible():
    assert 1 << 20 < image_files.free_bytes(torch.device("cpu")) < 1 << 50


def test_dataset_properties_and_errors():
    dataset = Dataset("name", make_split(6), make_split(3), ("a", "b", "c"))
    assert (dataset.num_classes, dataset.in_channels, dataset.image_size) == (3, 3, 4)
    assert dataset.to("cpu").train.device.type == "cpu"
    with pytest.raises(ValueError, match=r"name: labels must be in \[0, 2\), got 2"):
        Dataset("name", make_split(6), make_split(3), ("a", "b"))
    with pytest.raises(ValueError, match=r"name: train and test images must have one shape, got \[3, 4, 4\] and"):
        Dataset("name", make_split(), make_split(size=(1, 4, 4)), ("a", "b", "c"))
    oblong = Dataset("name", make_split(size=(3, 4, 5)), make_split(size=(3, 4, 5)), ("a", "b", "c"))
    with pytest.raises(ValueError, match="name: images must be square here, got height 4 and width 5"):
        _ = oblong.image_size


def test_import_needs_torch_and_numpy_only():
    program = "import sys; sys.modules.update(dict.fromkeys(['torchvision', 'sklearn', 'PIL', 'scipy'])); "
    subprocess.run([sys.executable, "-c", program + "import memloc_ext.data"], check=True)


@pytest.mark.parametrize("shards", [1, 2, 3, 5])
def test_shards_cut_every_batch(shards: int) -> None:
    split = make_split()

    def batches(**how) -> list[torch.Tensor]:
        return [indices for _, _, indices in split.batches(4, torch.Generator().manual_seed(1), **how)]

    parts = [batches(shard=(number, shards)) for number in range(shards)]
    for whole, *slices in zip(batches(), *parts, strict=True):
        assert torch.equal(torch.cat(slices), whole)
        sizes = list(map(len, slices))
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] - sizes[-1] <= 1


@pytest.mark.parametrize("shard", [(1, 1), (-1, 2), (0, 0)])
def test_a_shard_is_one_of_those_there_are(shard: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"batches: shard must be \(k, n\) with k in \[0, n\), got "):
        make_split().batches(4, shard=shard)
