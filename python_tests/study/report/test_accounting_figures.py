import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from memloc_ext.probes import EpochAccount, GroupAccount, ParameterAccount
from memloc_ext.study.accounting import AccountedEpoch, Accounting, account_path, save_account
from memloc_ext.study.report import figures
from memloc_ext.study.report.accounting import (
    answers,
    bands_and_auc,
    cosines,
    example_cosines,
    example_norms,
    group_norms,
    numbers,
    pictures,
)


def make_accounting(folder: Path, epochs: int = 3, *, memorized: bool = True, norms: float = 1.0) -> Accounting:
    """Two layer groups, 20 examples; the account of every epoch is on disk as well."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for epoch in range(1, epochs + 1):
        row = GroupAccount(1.0 / epoch, 0.5 * memorized, 1.0, -0.5 * memorized, 0.9 if memorized else None, 1.0, None)
        if memorized and epoch > 1:  # the first as of a file without
            row = replace(row, memorized_cosine=-0.3, memorized_against=0.75, clean_against=0.25)
            quartiles = {"memorized_cosine_q25": -0.4, "memorized_cosine_q50": -0.3, "memorized_cosine_q75": -0.1}
            row = replace(row, noise_scale=90.0 / epoch, **quartiles)
        account = EpochAccount(
            model=row,
            groups={"conv1": row, "head": row},
            parameters={"conv1.weight": ParameterAccount(1.0, 0.5, 1.0, -0.5)},
            example_norms=norms * torch.rand(20, 2, generator=generator),
            example_cosines=torch.full((20, 3), math.nan),
            memorized=(torch.arange(20) < 5) & memorized,
            indices=torch.arange(20),
        )
        save_account(account_path(folder, epoch), epoch, account)
        rows.append(AccountedEpoch(epoch, row, account.groups, account.parameters))
    return Accounting(folder, rows, {})


@pytest.mark.parametrize("change", [{}, {"epochs": 1}, {"epochs": 40}, {"memorized": False}, {"norms": 0.0}])
def test_every_account_can_be_drawn(tmp_path: Path, change: dict) -> None:
    drawn = {picture.name: picture.figure for picture in pictures(make_accounting(tmp_path, **change))}
    names = ["gradient_norms", "gradient_cosine", "example_cosines", "example_norms", "example_norms_auc"]
    assert list(drawn) == names
    for figure in drawn.values():
        assert figures.encoded(figure).startswith(b"\x89PNG")


def test_examples_whose_batch_overflowed_are_left_out(tmp_path: Path) -> None:
    pictures(make_accounting(tmp_path, norms=math.nan))


def test_curves_are_those_of_the_table(tmp_path: Path) -> None:
    accounting = make_accounting(tmp_path)
    clean, memorized, total = group_norms(accounting).axes
    assert [line.get_label() for line in clean.lines] == ["conv1", "head"]
    np.testing.assert_allclose(clean.lines[0].get_ydata(), [1, 1 / 2, 1 / 3])
    assert [axes.get_title() for axes in (clean, memorized, total)] == [
        "clean examples",
        "memorized examples",
        "all examples",
    ]
    assert clean.get_yscale() == "log"


def test_the_cosine_map_is_from_minus_one_to_one(tmp_path: Path) -> None:
    axes = cosines(make_accounting(tmp_path)).axes[0]
    (picture,) = axes.images
    assert picture.get_clim() == (-1, 1)
    np.testing.assert_array_equal(picture.get_array(), np.full((2, 3), -0.5))
    assert [label.get_text() for label in axes.get_yticklabels()] == ["conv1", "head"]


def test_cosines_shares_and_noise_scale_are_those_of_the_table(tmp_path: Path) -> None:
    cosine, share, noise = example_cosines(make_accounting(tmp_path)).axes
    for axes, values in ((cosine, -0.3), (share, 75)):
        assert [line.get_label() for line in axes.lines[:3]] == ["conv1", "head", "whole model"]
        for line in axes.lines[:3]:
            np.testing.assert_allclose(line.get_ydata(), [math.nan, values, values])
    np.testing.assert_allclose(share.lines[3].get_ydata(), [math.nan, 25, 25])
    np.testing.assert_allclose(noise.lines[2].get_ydata(), [math.nan, 45, 30])


def test_the_answer_says_who_is_pushed_against(tmp_path: Path) -> None:
    accounting = make_accounting(tmp_path)
    assert "75.0 % of the memorized examples are pushed against, and 25.0 % of the clean ones" in answers(accounting)[0]
    shares = [number.value for number in numbers(accounting) if "pushes against" in number.what]
    assert shares == [0.75]
    assert "unknown in the first epoch, 30 in the last" in pictures(accounting)[2].caption
    assert "pushed against" not in " ".join(answers(make_accounting(tmp_path, epochs=1)))


def test_histograms_hold_every_example_and_a_few_epochs() -> None:
    generator = np.random.default_rng(0)
    norms = {
        epoch: {"clean examples": generator.random(100), "memorized examples": np.append(generator.random(7), 0)}
        for epoch in range(1, 31)
    }
    panels = example_norms(norms).axes
    assert [axes.get_title() for axes in panels] == [f"epoch {epoch}" for epoch in (1, 11, 20, 30)]
    for axes in panels:
        assert sum(patch.get_height() for patch in axes.patches) == pytest.approx(200)  # percent of either kind


def test_auc_is_drawn_for_the_model_and_each_group(tmp_path: Path) -> None:
    norms = {epoch: {"clean examples": np.ones(9), "memorized examples": np.zeros(0)} for epoch in (1, 2, 3)}
    left, right = bands_and_auc(norms, make_accounting(tmp_path)).axes
    assert [line.get_label() for line in left.lines] == ["clean examples"]
    assert [line.get_label() for line in right.lines[:3]] == ["conv1", "head", "whole model"]
