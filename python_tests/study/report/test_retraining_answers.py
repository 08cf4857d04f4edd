from made_probes import made_accuracy, made_retraining

from memloc_ext.study.report.retraining import PAPER, answers


def test_the_answers_have_the_numbers() -> None:
    regained, least, fitted, paper = answers(made_retraining())
    assert regained == (
        "With one layer group at its initial weights and trained anew, alone and on clean examples only, at least 90 % "
        "of the accuracy on memorized examples (96.0 % before) is there again for 3 of 4 groups (blocks.0, (root), "
        "head), though no memorized example was seen; 1 of these had not lost it at their initial weights."
    )
    assert least == (
        "Least is there with conv1: 40.0 % on memorized examples (10.0 % before its training), 80.0 % on clean ones."
    )
    assert fitted == (
        "3 of 4 trainings ended because every clean example was fitted, the others after all their epochs; they took 1 "
        "to 2 epochs."
    )
    assert paper == f"{PAPER} So it is here; the last group is none of those for which it does not."


def test_it_is_said_whether_the_paper_is_right() -> None:
    differs = answers(made_retraining({"a": [0.1, 0.2], "b": [0.1, 0.3]}))
    assert differs[-1] == (
        f"{PAPER} This differs here: it does for 0 of 2; the last group is among those for which it does not."
    )
    assert "for 0 of 2 groups, though" in differs[0]
    assert answers(made_retraining({"a": [0.1, 0.96]}))[-1] == f"{PAPER} So it is here, for every group."


def test_without_memorized_examples_nothing_is_said() -> None:
    assert answers(made_retraining({"a": [None, None]}, unchanged=made_accuracy(None))) == []
