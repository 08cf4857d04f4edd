import numpy as np
from made_probes import GROUPS, WHOLE, made_accuracy, made_rewinding

from memloc_ext.study.report import figures
from memloc_ext.study.report.rewinding import accuracy_per_group, memorized_accuracy, pictures


def test_every_rewinding_can_be_drawn() -> None:
    drawn = pictures(made_rewinding())
    assert [picture.name for picture in drawn] == ["rewinding_accuracy", "rewinding_memorized"]
    one = pictures(made_rewinding({"a": [0.5]}, (3,)))
    clean = pictures(made_rewinding({"a": [None]}, (3,), unchanged=made_accuracy(None, test=None)))
    assert [picture.name for picture in clean] == ["rewinding_accuracy"]
    for picture in (*drawn, *one, *clean):
        assert figures.encoded(picture.figure).startswith(b"\x89PNG")


def test_a_panel_shows_a_group_in_percent_with_and_without_its_statistics() -> None:
    figure = accuracy_per_group(made_rewinding())
    assert [axes.get_title() for axes in figure.axes[:4]] == list(GROUPS)
    assert figure.get_supylabel() == "accuracy (%)"
    lines = {line.get_label(): line for line in figure.axes[1].lines}
    np.testing.assert_allclose(lines["memorized examples, given label"].get_ydata(), [90, 95])
    dotted = [line for line in figure.axes[1].lines if line.get_linestyle() == ":"]
    assert [list(line.get_ydata()) for line in dotted if line.get_color() == figures.COLORS["memorized"]] == [
        [45, 47.5]
    ]
    assert not any(line.get_linestyle() == ":" for line in figure.axes[3].lines)
    levels = [line.get_ydata()[0] for line in figure.axes[0].lines if line.get_alpha() and len(line.get_ydata())]
    np.testing.assert_allclose(levels, [100 * WHOLE.clean, 100 * WHOLE.memorized, 100 * WHOLE.test])


def test_the_map_has_a_number_per_group_and_epoch() -> None:
    axes = memorized_accuracy(made_rewinding()).axes[0]
    assert [text.get_text() for text in axes.texts[:4]] == ["10.0", "50.0", "90.0", "95.0"]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(GROUPS)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "2"]
    assert "96.0 %" in axes.get_title()
