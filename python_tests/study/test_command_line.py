"""The command in a process of its own: what it imports, and how its threads wait for each other."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import memloc_ext
from memloc_ext.study.command_line import main


def command(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP", "GOMP"))}
    start = [sys.executable, "-X", "importtime", "-m", "memloc_ext"]
    return subprocess.run([*start, *arguments], env=environment | variables, capture_output=True, text=True, check=True)


def test_info_needs_no_package_beside_torch_and_numpy(tmp_path: Path) -> None:
    for name in ("tyro", "matplotlib", "sklearn", "torchvision", "tqdm", "jinja2"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')")
    done = command("info", PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    assert memloc_ext.__version__ in done.stdout
    assert torch.__version__ in done.stdout
    assert re.search(r"operator example_tied_dropout +CPU", done.stdout)


def test_no_argument_is_info(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    assert capsys.readouterr().out == f"{memloc_ext.info.info()}\n"


def test_help_imports_nothing_heavier_than_torch() -> None:
    done = command("run", "--help-all")
    assert "--retrain-epochs" in done.stdout
    imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert {"torch", "tyro", "memloc_ext"} < imported
    heavy = {"sklearn", "scipy", "pandas", "torchvision", "PIL", "matplotlib", "jinja2", "transformers", "lightning"}
    assert not imported & (heavy | {"sympy", "tensorboard"})


@pytest.mark.parametrize("name", ["run", "audit"])
def test_help_fits_on_a_screen_and_help_all_has_every_setting(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    def shown(option: str) -> set[str]:
        with pytest.raises(SystemExit) as ended:
            main([name, option])
        assert ended.value.code == 0
        text = capsys.readouterr().out
        assert len(re.findall(r"^.*\w.*$", text, re.MULTILINE)) <= 40 or option == "--help-all"
        assert ("--help-all" in text) == (option != "--help-all")
        return set(re.findall(r"^\W*(--[a-z][a-z-]*)", text, re.MULTILINE))

    common = {"--output", "--dataset", "--model", "--noise", "--epochs", "--batch-size", "--learning-rate", "--seed"}
    assert shown("--help") == shown("-h") == common | {"--p-gen", "--p-mem"}
    assert shown("--help-all") > common | {
        "--device",
        "--retrain-epochs",
        "--score",
        "--only" if name == "run" else "--top",
    }
