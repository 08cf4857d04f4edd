"""The command ``memloc audit``: its table, what it prints, and its page."""

import base64
import csv
import html
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import memloc_ext
from memloc_ext.study import Run, build_model, load_data, load_run
from memloc_ext.study.audited import PICTURE, shown_examples
from memloc_ext.study.command_line import main
from memloc_ext.training import list_checkpoints, load_checkpoint

QUICK = ["--model", "lenet", "--epochs", "3", "--batch-size", "64", "--learning-rate", "0.1", "--device", "cpu"]
FEW = ["--examples", "150", "--test-examples", "20", "--no-account"]


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str]:
    """A finished run, and what the command printed."""
    folder, out = tmp_path_factory.mktemp("audit") / "run", io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", out)
        main(["audit", *QUICK, *FEW, "--top", "7", "--output", str(folder)])
    return load_run(folder), out.getvalue()


def table(run: Run, model: str) -> list[dict[str, str]]:
    with open(run.audits[model].table, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("model", ["plain", "example_tied"])
def test_the_table_is_the_audit_of_the_checkpoints(audited: tuple[Run, str], model: Any) -> None:
    run, stage = audited[0], {"plain": "train", "example_tied": "dropout"}[model]
    (folder,) = run.path.glob(f"{stage}-????????")
    dataset, states = load_data(run.config), folder / "checkpoints"
    network = build_model(run.config, dataset, model)
    network.load_state_dict(load_checkpoint(list_checkpoints(states)[3]).model)
    found = memloc_ext.audit(network, dataset.train, states=states)
    assert run.audits[model].found == found
    rows = table(run, model)
    assert len(rows) == 150
    scores = ["gradnorm", "self_influence", "margin", "loss", "forgetting", "cosine", "drop"]
    scores = scores[:-1] if model == "plain" else scores
    assert list(rows[0]) == ["index", "label", "suggested", *(f"score_{name}" for name in scores), "rank"]
    for row, expected in zip(rows, found.rows(), strict=True):
        assert {name: float(value) for name, value in row.items()} == {k: float(v) for k, v in expected.items()}
    by_rank = sorted(rows, key=lambda row: int(row["rank"]))
    key = "score_loss" if model == "plain" else "score_drop"
    assert by_rank == sorted(rows, key=lambda row: -float(row[key]))


def test_the_most_suspect_and_the_quality_are_printed(audited: tuple[Run, str]) -> None:
    run, out = audited
    for model in ("plain", "example_tied"):
        found = run.audits[model].found
        assert str(run.audits[model].table) in out
        for row in found.top(5):
            assert re.search(rf"^{row['index']} +{row['label']} +{row['suggested']} +\S+$", out, re.MULTILINE)
        assert len(found.quality()) == len(found.scores)
        for row in found.quality():
            assert re.search(rf"^{row['score']} +{row['auc']:.4f} +{row['precision']:.4f} ", out, re.MULTILINE)


def test_the_page_has_the_most_suspect_with_their_pictures(audited: tuple[Run, str]) -> None:
    run, train = audited[0], load_data(audited[0].config).train
    page = html.unescape((run.path / "report.html").read_text())
    found = run.audits["example_tied"].found
    rows = re.findall(rf'<tr><td><img class="example" alt="" src="{PICTURE}([^"]+)"></td>(.*)</tr>', page)
    assert len(rows) == 2 * 7
    for (picture, cells), row in zip(rows[7:], found.top(7), strict=True):
        texts = re.findall("<td>(.*?)</td>", cells)
        assert texts[:4] == [str(row[name]) for name in ("rank", "index", "label", "suggested")]
        assert texts[4:] == [f"{row[name]:.3g}" for name in found.scores]
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))))[..., 0].astype(int)
        given = train.batch((train.indices == row["index"]).nonzero()[:, 0]).x[0, 0].numpy()
        expected = 255 * (given - given.min()) / (given.max() - given.min())
        assert abs(pixels - expected).max() <= 0.5 + 1e-4


def test_another_score_ranks_otherwise_and_trains_nothing(
    audited: tuple[Run, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shutil.copytree(audited[0].path, tmp_path / "run")
    main(["audit", *QUICK, *FEW, "--score", "drop", "--output", str(path)])
    told = capsys.readouterr().err
    assert told.count("finished before, reused") == 2
    assert told.count("audit: begins") == 1
    run = load_run(path)
    assert (run.audits["plain"].found.score, run.audits["example_tied"].found.score) == ("score_loss", "score_drop")
    main(["audit", *QUICK, *FEW, "--score", "margin", "--output", str(path)])
    values = {int(row["rank"]): float(row["score_margin"]) for row in table(load_run(path), "plain")}
    assert [values[rank] for rank in sorted(values)] == sorted(values.values(), reverse=True)


def test_a_run_from_before_there_were_audits_is_read(audited: tuple[Run, str], tmp_path: Path) -> None:
    path = shutil.copytree(audited[0].path, tmp_path / "run")
    (path / "SHA256SUMS").unlink()
    about = json.loads((path / "run.json").read_text())
    about["stages"] = {name: folder for name, folder in about["stages"].items() if not name.startswith("audit")}
    del about["config"]["audit"]
    (path / "run.json").write_text(json.dumps(about))
    run = load_run(path)
    assert run.audits == {}
    assert run.metrics == audited[0].metrics


@pytest.mark.parametrize(
    ("options", "message"), [(["--score", "beauty"], "beauty"), (["--top", "0"], "top must be at least 1, got 0")]
)
def test_wrong_options_end_before_anything_is_written(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["audit", *QUICK, *FEW, *options, "--output", str(tmp_path / "run")])
    assert message in re.sub(r"[\s│]+", " ", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_tokens_are_shown_by_number_and_other_inputs_not_at_all() -> None:
    tokens, values = torch.arange(100).view(2, 50), torch.randn(2, 5)

    def items(x: torch.Tensor) -> Any:
        return memloc_ext.examples.examples("test", [(x, torch.zeros(2))], torch.device("cpu"))

    assert shown_examples(items(tokens), [1]) == [" ".join(map(str, range(50, 90)))]
    assert shown_examples(items(values), [1, 0]) == ["", ""]
