"""The example of a training loop of one's own: both files run, and the second is the first and a few lines."""

import difflib

import pytest
import torch
from load_example import EXAMPLES, load_example

REPLACED = {
    "    loader = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True)",  # gets the examples' numbers
    "        for inputs, labels in loader:",
    "    model = build()",
    "            loss = F.cross_entropy(model(inputs), labels)",  # moves into a with
    "            loss.backward()",
}
"""Lines of the plain training that cannot stay as they are."""


@pytest.mark.parametrize("name", ["plain", "with_memloc"])
def test_an_example_runs(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    example = load_example(name)
    monkeypatch.setattr(example, "EPOCHS", 2)
    with torch.random.fork_rng(devices=[]):
        example.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("right labels learnt: ")
    assert len(lines) == (1 if name == "plain" else 3)


def test_the_plain_example_knows_nothing_of_the_library() -> None:
    assert "memloc" not in (EXAMPLES / "plain.py").read_text()


def test_the_features_take_fewer_than_fifteen_lines() -> None:
    plain, ours = ((EXAMPLES / f"{name}.py").read_text().splitlines() for name in ("plain", "with_memloc"))
    changes = list(difflib.ndiff(plain, ours))
    added = [line[2:] for line in changes if line.startswith("+ ")]
    removed = {line[2:] for line in changes if line.startswith("- ")}
    assert len(added) < 15
    assert removed == REPLACED
    for feature in ("insert_example_tied_dropout", "GradientAccountant", "localize"):
        assert sum(feature in line for line in added) == 1
