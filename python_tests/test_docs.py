"""The code of the documentation runs, in little: what a reader types must not rot."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import memloc_ext

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
QUICK = {
    "epochs=20": "epochs=2",
    "width=0.5": "width=0.1",
    "localized=20": "localized=3",
    "epochs=5,": "epochs=1,",
    "epochs=[0, 2, 4, 8]": "epochs=[0, 1]",
}


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_the_code_of_a_tutorial_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
    for full, quick in QUICK.items():
        code = code.replace(full, quick)
    assert "epochs=2," in code
    assert "width=0.1" in code
    whole = memloc_ext.data.digits()
    few = {"train": whole.train.subset(torch.arange(320)), "test": whole.test.subset(torch.arange(50))}
    monkeypatch.setattr(memloc_ext.data, "load", lambda name: replace(whole, **few))
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        exec(compile(code, page.name, "exec"), {"__name__": "tutorial"})
    assert capsys.readouterr().out


@pytest.mark.parametrize("module", ["ops", "nn", "probes", "data", "models", "training"])
def test_the_reference_has_every_public_function_and_class(module: str) -> None:
    documented = set(re.findall(r"^::: .*?(\w+)$", (ROOT / "docs" / "api" / f"{module}.md").read_text(), re.MULTILINE))
    public = getattr(memloc_ext, module)
    missing = {
        name
        for name in public.__all__
        if getattr(getattr(public, name), "__name__", None) == name and name not in documented  # constants have none
    }
    assert not missing


def test_the_lines_on_integrations_are_those_of_the_examples() -> None:
    page = (ROOT / "docs" / "integrations.md").read_text()
    sections = re.findall(r"^`examples/(\w+\.py)`(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert len(sections) == 5
    for name, section in sections:
        lines = iter((ROOT / "examples" / name).read_text().splitlines())
        shown = "".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL)).splitlines()
        assert shown
        for line in shown:
            assert line in lines, f"{name} has no {line!r}, or not in this order"
