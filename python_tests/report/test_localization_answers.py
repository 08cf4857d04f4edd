from made_localization import NOTHING, make_localization

from memloc_ext.report.localization_answers import answers, notes, summary


def test_the_terminal_gets_a_line_per_model() -> None:
    localization = make_localization()
    plain, tied = summary({"plain": localization, "example_tied": localization})
    assert plain == (
        "Localization, plain training: 2.67 units flip a memorized example (median 3), 2.67 units flip a clean example "
        "(median 3); 250 ms per example."
    )
    assert tied.startswith("Localization, example-tied dropout: 2.67 units")
    assert summary({}) == answers({}) == notes({}) == []


def test_plain_training_answers_how_many_where_and_what_else() -> None:
    counts, where, noisy, clean = answers({"plain": make_localization()})
    ends = "2.67 on average for {} examples (median 3; 2 of 3 flipped, 1 not within the limit, with which they count)"
    assert f"{ends.format('memorized')} and {ends.format('clean')}. The paper: around 5" in counts
    assert "75.0 % of the units found for memorized examples are in blocks.0:heads, which has 57.1 % of all" in where
    change = "from 100.0 to 90.0 % on clean, from 100.0 to 50.0 % on memorized, from 90.0 to 80.0 % on test examples"
    assert noisy == f"With the units of one memorized example off, accuracy goes {change} (mean over 3 such examples)."
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
    assert "no memorized example is fitted, 0 of 3 flipped, 3 wrong already, no clean" in line
    (counts,) = answers({"plain": localization})
    assert "is unknown for memorized examples (0 of 3 flipped, 3 wrong already) and unknown for clean" in counts
    assert answers({"example_tied": localization}) == []


def test_notes_say_what_was_searched_and_evaluated() -> None:
    (note,) = notes({"plain": make_localization()})
    assert note.startswith("Plain training: 3 of 9 memorized examples that it fits were searched (2 of 3 flipped")
    assert "accuracy measured after the units of 3" in note
    assert note.endswith("on at most 512 examples of each kind. The search took 250 ms per example.")
