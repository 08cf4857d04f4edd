"""The scripts that draw single figures of a run."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from memloc_ext.study import ModelConfig, StudyConfig, run_study
from memloc_ext.study.report.sections import sections
from memloc_ext.training import TrainConfig

SCRIPTS = Path(__file__).parents[3] / "scripts"


def test_every_section_has_a_script_and_draws_its_figures(tmp_path: Path) -> None:
    config = StudyConfig(model=ModelConfig("lenet"), train=TrainConfig(epochs=1, batch_size=512))
    run = run_study(config, tmp_path / "run", stages=("dropout",))
    for section in sections(run):
        command = [sys.executable, SCRIPTS / f"figure_{section.name}.py", run.path, "--output", tmp_path / "drawn"]
        done = subprocess.run([*command, "--format", "svg"], capture_output=True, text=True, check=True)
        paths = [Path(line) for line in done.stdout.splitlines()]
        assert paths == [tmp_path / "drawn" / f"{picture.name}.svg" for picture in section.pictures]
        assert all("</svg>" in path.read_text() for path in paths)


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("figure_*.py")), ids=lambda path: path.stem)
def test_a_folder_without_a_run_ends_with_one_line(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == f"load_run: {tmp_path} holds no run, run.json is missing"
