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
        (
            np.array([2, 1, 0, 1]),
            {},
            r"integers are indices and must differ, got 1 more than once, again in (row 3|line 4)",
        ),
        (np.array([0, 1, 1, 0]), {}, "write a mask as true and false, one for each of the 5 examples"),
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
        ("a.csv", b"\n# nothing\n,\n", "got an empty file"),
        ("a.csv", b"# of 2020\nscore\n", "line 2: must be followed by values, got a header alone"),
        ("a.csv", b"score\n0.1\nscore\n", "line 3: must hold true, false or a number, got 'score'"),
        ("a.csv", b"0.1\n\n0.5\n", "line 2: must hold true, false or a number, got ''"),
        ("a.csv", b"true\n1\n", "line 1: must hold true, false or a number, got 'true'"),
        ("a.csv", b"0.1\n\xff\n", "line 2: cannot be read"),
        ("a.csv", b"\xff\xfe\n", "line 1: cannot be read"),
        ("a.csv", b",a\n0,1\n1,\n", "line 3: must have 2 columns as other lines do, got 1"),
        ("a.csv", b",a\n0,1\nx,1\n", "line 2: must hold an integer in column 1, and so must all others"),
        ("a.csv", b"0.5,0.1\n0.2,0.3\n", "line 1: must hold one column of values, .* got 2 without names"),
        ("a.csv", b",a,b\n0,1,2\n", "line 2: must hold one column of values, .* got '', 'a', 'b'"),
        ("a.csv", b"index;score\n0;0,5\n", "line 2: must hold true, false or a number, got '0,5'"),
        ("a.csv", b"0," + b"1" * 140_000, "line 1: cannot be read: field larger than field limit"),
        ("a.csv", b"1" * 30, "holds scores"),
        ("a.npy", b"", "cannot be read"),
        ("a.npz", b"not an archive", "cannot be read"),
        ("a.json", b"[]", "must end in .npy, .npz, .csv, .tsv or .txt, got '.json'"),
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
    monkeypatch.setattr("memloc_ext.data._column._UNFOLDED", 1000)
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


TEXTS = {
    "spreadsheet.csv": (b"\xef\xbb\xbfTRUE\r\nFALSE\r\nTRUE\r\n", {}, "a mask of 3 examples: 2"),
    "series.csv": (b",0\n0,0.1\n1,0.9\n2,0.2\n", {"below": 0.5}, "(column '0', numbered among all in column 1): 2"),
    "frame.csv": (b"score\n0.1\n0.9\n0.2\n", {"below": 0.5}, "memorized below 0.5 (column 'score'): 2"),
    "no_names.csv": (
        b"0\n0.1\n0.9\n0.2\n",
        {"below": 0.5},
        "scores of 3 examples, memorized below 0.5 (column '0'): 2",
    ),
    "no_names_mask.csv": (b"0\n1\n0\n1\n", {}, "a mask of 3 examples (column '0'): 2"),
    "sorted.csv": (
        b"idx,c-score\n0,0.1\n2,0.2\n1,0.9\n",
        {"below": 0.5},
        "(column 'c-score', numbered among all in column 'idx')",
    ),
    "last.csv": (
        b"Score,Index\n0.2,2\n0.1,0\n0.9,1\n",
        {"below": 0.5},
        "(column 'Score', numbered among all in column 'Index')",
    ),
    "others.csv": (b',label,score\n2,"3, 4",0.2\n1,x,0.9\n0,3,0.1\n', {"below": 0.5}, "column 'score'"),
    "mask.csv": (b",memorized\n0,1\n1,0\n2,1\n", {}, "a mask of 3 examples (column 'memorized', "),
    "indices.csv": (
        b",0\n0,2\n1,0\n",
        {},
        "the indices of 2 examples (column '0', numbered among all in column 1): 2",
    ),
    "commas.csv": (b"0.1,\n0.9\n0.2,,\n,,\n", {"below": 0.5}, "scores of 3 examples"),
    "comments.txt": (b"# of 2020\n\n0.1 # low\n#\n0.9\n0.2\n\n", {"below": 0.5}, "scores of 3 examples"),
    "savetxt.txt": (b"# n score\n2e0 2e-1\n1e0 9e-1\n0e0 1e-1\n", {"below": 0.5}, "numbered among all in column 1"),
    "savetxt_mask.txt": (b"1.0e+00\n0.0e+00\n1.0e+00\n", {}, "a mask of 3 examples: 2"),
    "r.csv": (b'"","x"\n"2",0.2\n"0",0.1\n"1",0.9\n', {"below": 0.5}, "column 'x'"),
    "tabs.TSV": (b"\tscore\n2\t-0.2\n1\t-0.9\n0\t-0.1\n", {"above": -0.5}, "memorized above -0.5"),
    "semicolons.csv": (b"id;value\n2;0.2\n1;0.9\n0;0.1\n", {"below": 0.5}, "column 'value'"),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", TEXTS)
def test_text_is_read_as_other_programs_write_it(tmp_path, name, encoding):
    content, threshold, understood = TEXTS[name]
    (tmp_path / name).write_bytes(content.decode("utf-8-sig").encode(encoding))
    said = []
    assert memorized_mask(tmp_path / name, 3, **threshold, say=said.append).tolist() == [True, False, True]
    assert len(said) == 1
    assert said[0].startswith(f"{tmp_path / name}: read as ")
    assert understood in said[0]


@pytest.mark.parametrize(
    ("values", "below"),
    [(MASK.astype(np.uint8), None), (MASK.astype(np.float32), None), (MASK[:, None], None), (SCORES[:, None], 0.5)],
)
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_masks_of_numbers_and_columns_of_an_array(tmp_path, suffix, values, below):
    assert memorized_mask(save(tmp_path, suffix, values), 5, below=below).tolist() == MASK.tolist()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data(), mask=st.lists(st.booleans(), min_size=1, max_size=6))
def test_a_mask_is_read_back_however_it_is_written(tmp_path, data, mask):
    order = data.draw(st.permutations(range(len(mask))), "order")
    words = data.draw(st.sampled_from([("False", "True"), ("0", "1"), ("0.0", "1.0"), ("0.7", "0.2")]), "words")
    mark = data.draw(st.sampled_from([",", ";", "\t", " "]), "mark")
    header = data.draw(st.sampled_from([[], [f"index{mark}memorized"]]), "header")
    rows = [f"{n}{mark}{words[mask[n]]}" for n in order]
    if data.draw(st.booleans(), "one column"):
        header, rows = header and ["memorized"], [words[marked] for marked in mask]
    path = tmp_path / "a.csv"
    path.write_text("\n".join(header + rows), encoding=data.draw(st.sampled_from(["utf-8", "utf-16"])))
    below = 0.5 if "0.7" in words else None
    assert memorized_mask(path, len(mask), below=below).tolist() == mask


PART = torch.tensor([1, 3, 4, 8])


@pytest.mark.parametrize(
    ("text", "understood"),
    [
        ("0.1 0.9 0.2 0.8", "scores of the 4 examples chosen,"),
        (",score 0,0.1 1,0.9 2,0.2 3,0.8", "numbered among those chosen in column 1"),
        (",score 3,0.8 1,0.9 2,0.2 0,0.1", "numbered among those chosen in column 1"),
        (",score 1,0.1 3,0.9 4,0.2 8,0.8", "numbered among all in column 1"),
        (",score 8,0.8 1,0.1 4,0.2 3,0.9 2,0.7", "scores of 5 examples,"),
        ("0.9 0.1 0.9 0.9 0.2 0.9 0.9 0.9 0.8 0.9", "scores of 10 examples,"),
    ],
)
def test_scores_of_a_part_are_enough_for_it(tmp_path, text, understood):
    said = []
    (tmp_path / "a.csv").write_text(text.replace(" ", "\n"))
    mask = memorized_mask(tmp_path / "a.csv", 10, below=0.5, part=PART, say=said.append)
    assert mask.tolist() == [n in (1, 4) for n in range(10)]
    assert understood in said[0]


def test_a_mask_of_a_part_is_enough_for_it(tmp_path):
    for text in ("1\n0\n1\n0\n", ",0\n0,1\n1,0\n2,1\n3,0\n", "index,m\n8,0\n1,1\n4,1\n3,0\n7,1\n"):
        (tmp_path / "a.csv").write_text(text)
        assert memorized_mask(tmp_path / "a.csv", 10, part=PART)[PART].tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.1\n0.9\n", "must hold one value for each of the 10 examples or of the 4 chosen, got 2"),
        ("x\n0.9\n", r"got 1 \(column 'x'\)"),
        (",s\n1,0.1\n3,0.9\n4,0.2\n", "must hold one value for each example, got none for example 8"),
        (",s\n1,0.1\n3,0.9\n4,0.2\n10,1\n", r"example numbers must be in \[0, 10\), got 10 in line 5"),
        (",s\n1,0.1\n3,0.9\n3,0.2\n8,1\n", "integers are example numbers and must differ, got 3 .* line 4"),
        (",s\n1,nan\n3,0.9\n4,0.2\n8,1\n", "scores must be numbers, got NaN for example 1 in line 2"),
    ],
)
def test_what_a_part_lacks_is_named(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        memorized_mask(tmp_path / "a.csv", 10, below=0.5, part=PART)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(suffix=st.sampled_from([".npy", ".npz", ".csv"]), data=st.data())
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
