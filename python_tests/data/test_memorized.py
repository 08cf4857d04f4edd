import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memloc_ext.data import Dataset, Split, memorized_mask, with_memorized

MASK = np.array([False, True, False, True, True])
INDICES = np.array([4, 1, 3])
SCORES = np.array([0.9, 0.2, 0.5, 0.1, 0.4])  # MASK is where they are below 0.5


def save(folder, suffix, values):
    path = folder / f"values{suffix}"
    if suffix == ".npy":
        np.save(path, values)
    elif suffix == ".npz":
        np.savez(path, values)
    else:
        path.write_text("\n".join(map(str, values.tolist())) + "\n")
    return path


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".csv", ".txt"])
def test_every_format_holds_every_kind(tmp_path, suffix):
    for values, threshold in (
        (MASK, {}),
        (INDICES, {}),
        (SCORES, {"below": 0.5}),
        (-SCORES, {"above": -0.5}),
        ((10 * SCORES).astype(int), {"below": 5}),  # counts are scores too, once there is a threshold
    ):
        mask = memorized_mask(save(tmp_path, suffix, values), 5, **threshold)
        assert mask.dtype == torch.bool
        assert mask.tolist() == MASK.tolist()


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint64, np.int64])
def test_indices_of_any_integer_type(tmp_path, dtype):
    assert memorized_mask(save(tmp_path, ".npy", INDICES.astype(dtype)), 5).tolist() == MASK.tolist()


def test_no_indices_mark_nothing(tmp_path):
    assert not memorized_mask(save(tmp_path, ".npy", INDICES[:0]), 5).any()


@pytest.mark.parametrize("key", ["scores", "mask"])
def test_named_array_of_an_archive(tmp_path, key):
    np.savez(tmp_path / "a.npz", labels=INDICES, **{key: MASK})
    assert memorized_mask(tmp_path / "a.npz", 5).tolist() == MASK.tolist()


@pytest.mark.parametrize("arrays", [{}, {"a": MASK, "b": MASK}, {"scores": SCORES, "mask": MASK}])
def test_archive_without_a_clear_choice(tmp_path, arrays):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=f"one called scores or mask, got {', '.join(arrays) or 'none'}"):
        memorized_mask(tmp_path / "a.npz", 5)


@pytest.mark.parametrize(
    ("values", "threshold", "message"),
    [
        (np.array([0, 5]), {}, r"indices must be in \[0, 5\), got 5"),
        (np.array([0, -1]), {}, r"indices must be in \[0, 5\), got -1"),
        (np.array([0, 1, 1, 0, 1]), {}, "integers are indices and must differ, got 0 more than once; write a mask as"),
        (MASK[:4], {}, "must hold one value for each of the 5 examples, got 4"),
        (SCORES[:4], {"below": 0.5}, "must hold one value for each of the 5 examples, got 4"),
        (SCORES, {}, "holds scores, which need a threshold: give below or above"),
        (MASK, {"below": 0.5}, "holds a mask, which takes no threshold"),
        (np.where(MASK, np.nan, SCORES), {"below": 0.5}, "scores must be numbers, got NaN for example 1"),
    ],
)
@pytest.mark.parametrize("suffix", [".npy", ".csv"])
def test_values_that_do_not_fit(tmp_path, suffix, values, threshold, message):
    path = save(tmp_path, suffix, values)
    with pytest.raises(ValueError, match=message) as error:
        memorized_mask(path, 5, **threshold)
    assert str(path) in str(error.value)


def test_thresholds_are_checked_before_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"memorized_mask: give below or above, not both, got 0.1 and 0.2"):
        memorized_mask(tmp_path / "none.npy", 5, below=0.1, above=0.2)
    with pytest.raises(ValueError, match="memorized_mask: below must be a number, got nan"):
        memorized_mask(tmp_path / "none.npy", 5, below=float("nan"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "got an empty file"),
        ("a.csv", b"score\n0.5\n", "could not convert string to float: 'score'"),
        ("a.csv", b"0.1\n\n0.5\n", "could not convert string to float: ''"),
        ("a.csv", b"0,0.5\n", "could not convert string to float: '0,0.5'"),
        ("a.csv", b"true\n1\n", "must hold true, false or one number per line"),
        ("a.csv", b"\xff\xfe\n", "cannot be read"),
        ("a.csv", b"1" * 30, "holds scores"),
        ("a.npy", b"", "cannot be read"),
        ("a.npz", b"not an archive", "cannot be read"),
        ("a.json", b"[]", "must end in .npy, .npz, .csv or .txt, got '.json'"),
    ],
)
def test_files_that_hold_something_else(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        memorized_mask(tmp_path / name, 5)
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"), [(MASK[None], r"shape \[1, 5\]"), (np.array(list("abcde")), "booleans or numbers")]
)
def test_arrays_of_another_kind(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        memorized_mask(save(tmp_path, ".npy", values), 5)


def test_pickles_are_not_loaded(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="cannot be read"):
        memorized_mask(tmp_path / "a.npy", 1)


def test_an_archive_that_unfolds_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("memloc_ext.data.memorized._UNFOLDED", 1000)
    np.savez_compressed(tmp_path / "a.npz", scores=np.zeros(100), other=np.zeros(10_000))
    assert memorized_mask(tmp_path / "a.npz", 100, below=1.0).all()
    np.savez_compressed(tmp_path / "a.npz", scores=np.zeros(10_000))
    with pytest.raises(ValueError, match=r"a\.npz: .* must hold an array of at most 1000 bytes, got 80128"):
        memorized_mask(tmp_path / "a.npz", 10_000, below=1.0)


def test_what_is_no_array_in_an_archive_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("scores", b"0.5")
    with pytest.raises(ValueError, match=r"a\.npz: cannot be read"):
        memorized_mask(tmp_path / "a.npz", 1, below=1.0)


def test_missing_file(tmp_path):
    for name in ("none.npy", "none.csv"):
        with pytest.raises(FileNotFoundError, match=name):
            memorized_mask(tmp_path / name, 5)


def test_text_as_spreadsheets_write_it(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfTRUE\r\nFALSE\r\n")
    assert memorized_mask(tmp_path / "a.csv", 2).tolist() == [True, False]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(suffix=st.sampled_from([".npy", ".npz"]), data=st.data())
def test_a_damaged_file_is_a_value_error_or_harmless(tmp_path, suffix, data):
    path = save(tmp_path, suffix, MASK)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans(), "truncate"):
        del content[data.draw(st.integers(0, len(content) - 1), "length") :]
    else:
        content[data.draw(st.integers(0, len(content) - 1), "at")] ^= data.draw(st.integers(1, 255), "flip")
    path.write_bytes(content)
    try:
        mask = memorized_mask(path, 5)
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017 - not every damage is noticed
    else:
        assert mask.shape == (5,)
        assert mask.dtype == torch.bool


def test_a_data_set_gets_the_mask_and_keeps_its_labels():
    split = Split.clean(torch.zeros(5, 1, 4, 4), torch.arange(5))
    dataset = Dataset("zeros", split, split, tuple("01234"))
    marked = with_memorized(dataset, torch.from_numpy(MASK))
    assert marked.train.memorized.tolist() == MASK.tolist()
    assert marked.train.labels is split.labels
    assert marked.test is split
    assert not dataset.train.memorized.any()
    with pytest.raises(ValueError, match=r"memorized must be \[5\] like inputs, got \[4\]"):
        with_memorized(dataset, torch.from_numpy(MASK[:4]))
    with pytest.raises(TypeError, match=r"memorized must be torch.bool, got torch.int64"):
        with_memorized(dataset, torch.from_numpy(INDICES))
