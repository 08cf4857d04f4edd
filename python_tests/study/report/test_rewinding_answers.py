from made_probes import made_accuracy, made_rewinding

from memloc_ext.study.report.rewinding import PAPER, answers, keeping


def test_the_answers_have_the_numbers() -> None:
    kept, worst, without, paper = answers(made_rewinding())
    assert kept == (
        "With one layer group put back to its initialisation, batch-norm statistics included, 3 of 4 groups keep at "
        "least half of the accuracy on memorized examples, which is 96.0 % in the model as it is; 1 of 4 keep at least "
        "90 % of it (blocks.0)."
    )
    assert worst == (
        "Most is lost with conv1: accuracy falls from 96.0 to 10.0 % on memorized, from 100.0 to 80.0 % on clean "
        "examples."
    )
    assert "0 of 4 groups can be put back to its initialisation with at least 90 %" in without
    assert paper == (
        f"{PAPER} Here that holds as far back as epoch 2, for most groups and 90 % of the accuracy, but not for its "
        "initialisation."
    )


def test_it_is_said_whether_the_paper_is_right() -> None:
    assert (
        answers(made_rewinding({"a": [0.9], "b": [0.95]}, (4,)))[-1]
        == f"{PAPER} So it is here, as far back as epoch 4."
    )
    assert answers(made_rewinding({"a": [0.1, 0.2], "b": [0.2, 0.95]}))[-1] == (
        f"{PAPER} This differs here: even at epoch 2, the last one tried, only 1 of 2 groups keep 90 % of the accuracy "
        "on memorized examples."
    )


def test_without_memorized_examples_nothing_is_said() -> None:
    assert answers(made_rewinding({"a": [None]}, (0,), unchanged=made_accuracy(None))) == []
    assert answers(made_rewinding({"a": [0.0]}, (0,), unchanged=made_accuracy(0.0))) == []


def test_groups_without_batch_norm_are_not_told_apart() -> None:
    assert len(answers(made_rewinding({"a": [0.5]}, (0,)))) == 3
    assert keeping(made_rewinding(), 2, 0.9) == ["blocks.0", "(root)", "head"]
    assert keeping(made_rewinding(), 2, 0.9, buffers=False) == ["head"]
