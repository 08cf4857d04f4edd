from made_localization import NOTHING, make_localization

from memloc_ext.probes.localization.dataset import STATUSES
from memloc_ext.study.report.localization import answers, notes, numbers, summary


def test_the_terminal_gets_a_line_per_model() -> None:
    localization = make_localization()
    plain, tied = summary({"plain": localization, "example_tied": localization})
    assert plain == (
        "Units that flip an example, plain training: "
        "3 in the median for memorized examples (2 of 3 flipped, 1 not within the limit) and "
        "3 in the median for clean examples (2 of 3 flipped, 1 not within the limit); 250 ms per example."
    )
    assert tied == plain.replace("plain training", "example-tied dropout")
    assert summary({}) == answers({}) == notes({}) == []


def test_plain_training_answers_how_many_where_and_what_else() -> None:
    counts, where, memorized, clean = answers({"plain": make_localization()})
    ends = "3 in the median for {} examples (2 of 3 flipped, 1 not within the limit)"
    assert f"{ends.format('memorized')} and {ends.format('clean')}. The paper: around 5" in counts
    assert "75.0 % of the units found for memorized examples are in blocks.0:heads, which has 57.1 % of all" in where
    change = "from 100.0 to 90.0 % on clean, from 100.0 to 50.0 % on memorized, from 90.0 to 80.0 % on test examples"
    assert (
        memorized == f"With the units of one memorized example off, accuracy goes {change} (mean over 3 such examples)."
    )
    assert change in clean


def test_example_tied_dropout_answers_whether_the_units_are_memorization_channels() -> None:
    (more,) = answers({"example_tied": make_localization()})
    assert "62.5 % of the units found for memorized examples (2.67 each)" in more
    assert "They are 42.9 % of all units, and 27.3 % of those that an example keeps." in more
    assert more.endswith("for memorized examples more often than chance would.")
    (less,) = answers({"example_tied": make_localization(memorization=2)})
    assert "25.0 % of the units found for memorized examples" in less
    assert "does not point to them" in less
    (clean,) = answers({"example_tied": make_localization(("clean",))})
    assert clean.endswith("of those that an example keeps.")


def test_a_search_that_found_nothing_has_no_numbers() -> None:
    localization = make_localization(**NOTHING)
    (line,) = summary({"plain": localization})
    assert "unknown for memorized examples (0 of 3 flipped, 3 wrong already) and unknown for clean" in line
    (counts,) = answers({"plain": localization})
    assert "is unknown for memorized examples (0 of 3 flipped, 3 wrong already) and unknown for clean" in counts
    assert answers({"example_tied": localization}) == []


ALL = {"statuses": {**dict.fromkeys(STATUSES, 0), "flipped": 3, "already_wrong": 1}, "mean": 8 / 3, "median": 3.0}
FEW = {"statuses": {**dict.fromkeys(STATUSES, 0), "flipped": 1, "capped": 1, "exhausted": 1}, "median": None}


def test_searches_without_a_flip_are_not_called_flips() -> None:
    assert summary({"plain": make_localization(**ALL)}) == [
        "Units that flip an example, plain training: "
        "2.67 on average (median 3) for memorized examples (3 of 4 flipped, 1 wrong already) and "
        "2.67 on average (median 3) for clean examples (3 of 4 flipped, 1 wrong already); 250 ms per example."
    ]
    (counts, *_) = answers({"plain": make_localization(**ALL)})
    assert "2.67 on average (median 3) for memorized examples (3 of 4 flipped, 1 wrong already)" in counts
    few = make_localization(**FEW)
    ends = "1 of 3 flipped, 1 not within the limit, 1 not with all units off"
    assert f"unknown for clean examples ({ends});" in summary({"plain": few})[0]
    assert f"is unknown for memorized examples ({ends}) and unknown for clean" in answers({"plain": few})[0]


def test_numbers_are_missing_where_they_are_bounds() -> None:
    rows = {row.what: row.value for row in numbers({"plain": make_localization()})}
    name = "plain training"
    for kind in ("memorized", "clean"):
        assert rows[f"{name}: units that flip a {kind} example, mean"] is None
        assert rows[f"{name}: units that flip a {kind} example, median"] == 3
        assert rows[f"{name}: {kind} examples that units flip"] == 2 / 3
    for change, values in ((ALL, {8 / 3, 3, 1}), (FEW, {None, 1 / 3}), (NOTHING, {None})):
        assert {row.value for row in numbers({"plain": make_localization(**change)})} == values


def test_notes_say_what_was_searched_and_evaluated() -> None:
    (note,) = notes({"plain": make_localization()})
    assert note.startswith("Plain training: 3 of 9 memorized examples that it fits were searched (2 of 3 flipped")
    assert "accuracy measured after the units of 3" in note
    assert note.endswith("on at most 512 examples of each kind. The search took 250 ms per example.")
