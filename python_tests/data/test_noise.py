import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memloc_ext.data import Dataset, Split, label_noise, with_label_noise

LABELS = torch.arange(5000) % 10


@given(
    num=st.integers(0, 300),
    num_classes=st.integers(3, 12),
    percent=st.integers(0, 100),
    kind=st.sampled_from(["uniform", "repo"]),
    seed=st.integers(0, 2**32),
)
def test_exactly_the_floor_is_mislabelled_and_the_rest_is_not(num, num_classes, percent, kind, seed):
    labels = torch.arange(num) % num_classes
    noisy, mask = label_noise(labels, num_classes, percent / 100, kind=kind, seed=seed)
    assert mask.sum() == percent * num // 100  # the decimal that was written, free of float error
    assert torch.equal(noisy != labels, mask)
    assert noisy.dtype == torch.int64
    assert num == 0 or (noisy.min() >= 0 and noisy.max() < num_classes)
    assert torch.equal(labels, torch.arange(num) % num_classes)


def test_the_fraction_is_the_decimal_written():
    assert 0.29 * 100 < 29
    assert label_noise(LABELS[:100], 10, 0.29)[1].sum() == 29
    assert label_noise(LABELS, 10, 1e-3)[1].sum() == 5


@pytest.mark.parametrize(("kind", "largest"), [("uniform", 9), ("repo", 8)])
def test_wrong_classes_are_equally_likely(kind, largest):
    noisy, _ = label_noise(LABELS, 10, 1.0, kind=kind, seed=3)
    counts = torch.bincount((noisy - LABELS) % 10, minlength=10)
    assert counts[0] == 0
    assert counts[largest + 1 :].sum() == 0
    expected = len(LABELS) / largest
    assert (counts[1 : largest + 1] - expected).abs().max() < 5 * expected**0.5  # five standard deviations


def test_two_classes_are_swapped():
    noisy, _ = label_noise(torch.tensor([0, 1, 1]), 2, 1.0)
    assert noisy.tolist() == [1, 0, 0]


def test_the_seed_decides_and_the_global_generator_is_untouched():
    before = torch.get_rng_state()
    first, again, other = (label_noise(LABELS, 10, 0.1, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])


def test_a_larger_fraction_extends_a_smaller_one():
    small, small_mask = label_noise(LABELS, 10, 0.05, seed=4)
    large, large_mask = label_noise(LABELS, 10, 0.2, seed=4)
    assert large_mask[small_mask].all()
    assert torch.equal(large[small_mask], small[small_mask])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"fraction": 1.5}, ValueError, r"fraction must be in \[0, 1\], got 1.5"),
        ({"fraction": -0.1}, ValueError, r"fraction must be in \[0, 1\], got -0.1"),
        ({"fraction": float("nan")}, ValueError, r"fraction must be in \[0, 1\], got nan"),
        ({"kind": "flip"}, ValueError, "kind must be one of uniform, repo, got 'flip'"),
        ({"num_classes": 1}, ValueError, "num_classes must be at least 2 for kind 'uniform', got 1"),
        ({"num_classes": 2, "kind": "repo"}, ValueError, "num_classes must be at least 3 for kind 'repo', got 2"),
        ({"num_classes": 9}, ValueError, r"labels must be in \[0, 9\), got 0 .. 9"),
        ({"labels": LABELS.view(2, -1)}, ValueError, r"labels must be \[N\], got \[2, 2500\]"),
        ({"labels": LABELS.int()}, TypeError, "labels must be torch.int64, got torch.int32"),
    ],
)
def test_errors(changes, error, message):
    with pytest.raises(error, match=f"label_noise: {message}"):
        label_noise(**{"labels": LABELS, "num_classes": 10, "fraction": 0.1, **changes})


@pytest.mark.parametrize(("kind", "num_classes"), [("uniform", 1), ("repo", 1), ("repo", 2)])
def test_no_noise_needs_no_other_class(kind, num_classes):
    labels = torch.arange(10) % num_classes
    for fraction in (0, 0.09):  # of 10 examples it is none
        noisy, mask = label_noise(labels, num_classes, fraction, kind=kind)
        assert torch.equal(noisy, labels)
        assert noisy is not labels
        assert not mask.any()
    with pytest.raises(ValueError, match="num_classes must be at least"):
        label_noise(labels, num_classes, 0.1, kind=kind)


def test_a_data_set_gets_noise_in_train_only_and_once():
    split = Split.clean(torch.zeros(100, 1, 4, 4), LABELS[:100])
    dataset = Dataset("zeros", split, split, tuple("0123456789"))
    noisy = with_label_noise(dataset, 0.2, seed=1)
    assert noisy.train.memorized.sum() == 20
    assert torch.equal(noisy.train.labels != noisy.train.true_labels, noisy.train.memorized)
    assert torch.equal(noisy.train.true_labels, split.labels)
    assert noisy.test is dataset.test
    assert not dataset.train.memorized.any()
    again = with_label_noise(noisy, 0.1, seed=2)  # replaces the noise, does not add to it
    assert torch.equal(again.train.labels, with_label_noise(dataset, 0.1, seed=2).train.labels)
    assert again.train.memorized.sum() == 10
