from dataclasses import replace

import numpy as np
import pytest
from made_localization import NOTHING, make_kind, make_localization

from memloc_ext.study.report import figures
from memloc_ext.study.report.localization import (
    accuracy_after_units,
    memorization_share,
    pictures,
    units_per_example,
    units_per_site,
)

NAMES = [f"localization_{name}" for name in ("units", "sites", "accuracy", "memorization")]


@pytest.mark.parametrize("kinds", [("memorized", "clean"), ("memorized",), ("clean",)])
@pytest.mark.parametrize(
    ("change", "names"), [({}, NAMES), ({"edited": None, "curve": []}, [*NAMES[:2], NAMES[3]]), (NOTHING, NAMES[:2])]
)
def test_every_localization_can_be_drawn(kinds: tuple[str, ...], change: dict, names: list[str]) -> None:
    localization = make_localization(kinds, **change)
    drawn = pictures({"plain": localization, "example_tied": localization})
    assert [picture.name for picture in drawn] == names
    for picture in drawn:
        assert figures.encoded(picture.figure).startswith(b"\x89PNG")


def test_only_example_tied_dropout_has_memorization_channels() -> None:
    assert [picture.name for picture in pictures({"plain": make_localization()})] == NAMES[:3]


def test_bars_are_percent_of_the_examples_of_a_kind() -> None:
    (axes,) = units_per_example({"plain": make_localization()}).axes
    assert axes.get_title() == "plain training"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "memorized examples: 2 of 3 flip, median 3",
        "clean examples: 2 of 3 flip, median 3",
    ]
    memorized, clean = axes.containers
    for bars in (memorized, clean):
        np.testing.assert_allclose([bar.get_height() for bar in bars], [0, 100 / 3, 0, 100 / 3])


def test_sites_have_their_share_of_the_found_and_of_all_units() -> None:
    axes = units_per_site({"plain": make_localization()}).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["conv1 (6)", "blocks.0:heads (8)"]
    for bars in axes.containers:
        np.testing.assert_allclose([bar.get_width() for bar in bars], [25, 75])
    np.testing.assert_allclose(axes.lines[0].get_xdata(), [100 * 6 / 14, 100 * 8 / 14])
    assert axes.yaxis_inverted()


def test_curves_are_those_of_the_summary() -> None:
    panel, _ = accuracy_after_units({"plain": make_localization()}).axes
    clean, memorized, test = panel.lines
    np.testing.assert_array_equal(clean.get_xdata(), range(5))
    np.testing.assert_allclose(clean.get_ydata(), [100, 98, 96, 94, 92])
    np.testing.assert_allclose(memorized.get_ydata(), [100, 90, 80, 70, 60])
    np.testing.assert_allclose(test.get_ydata(), [90] * 5)
    sizes = panel.collections[0].get_sizes()
    assert sizes[0] == sizes[1] > sizes[2] == sizes[3] > sizes[4]


def test_accuracy_that_was_not_measured_leaves_a_gap() -> None:
    curve = [replace(point, test=None) for point in make_kind().curve]
    memorized, _ = accuracy_after_units({"example_tied": make_localization(curve=curve)}).axes
    assert np.isnan(memorized.lines[2].get_ydata()).all()


def test_shares_of_memorization_channels_stand_beside_chance() -> None:
    axes = memorization_share(make_localization()).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "units found for memorized examples",
        "units found for clean examples",
        "units that an example keeps",
        "all units",
    ]
    widths = [bar.get_width() for bar in axes.containers[0]]
    np.testing.assert_allclose(widths, [100 * 5 / 8, 100 / 8, 100 * 3 / 11, 100 * 6 / 14])
