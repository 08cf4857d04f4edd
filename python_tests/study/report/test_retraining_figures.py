import numpy as np
from made_probes import GROUPS, made_accuracy, made_retraining

from memloc_ext.study.report import figures
from memloc_ext.study.report.retraining import accuracy_per_group, pictures, regained


def test_every_retraining_can_be_drawn() -> None:
    drawn = pictures(made_retraining())
    assert [picture.name for picture in drawn] == ["retraining_accuracy", "retraining_regained"]
    clean = pictures(made_retraining({"a": [None, None]}, unchanged=made_accuracy(None)))
    for picture in (*drawn, *clean):
        assert figures.encoded(picture.figure).startswith(b"\x89PNG")


def test_a_panel_shows_a_group_in_percent() -> None:
    figure = accuracy_per_group(made_retraining())
    assert [axes.get_title() for axes in figure.axes[:4]] == list(GROUPS)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    np.testing.assert_allclose(lines["memorized examples, given label"].get_ydata(), [10, 30, 40])
    np.testing.assert_allclose(lines["memorized, before rewinding"].get_ydata(), [96, 96])


def test_bars_are_what_is_there_after_the_training_and_marks_what_was_before() -> None:
    axes = regained(made_retraining()).axes[0]
    memorized, clean = axes.containers
    np.testing.assert_allclose([bar.get_width() for bar in memorized], [40, 96, 90, 93])
    np.testing.assert_allclose([bar.get_width() for bar in clean], [80] * 4)
    marks = next(line for line in axes.lines if line.get_label() == "back at its initial weights")
    np.testing.assert_allclose(marks.get_xdata(), [10, 95, 20, 10])
    assert [label.get_text() for label in axes.get_yticklabels()] == list(GROUPS)
