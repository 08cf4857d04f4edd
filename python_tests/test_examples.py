"""The examples run as a user runs them, each in a process of its own; the second is the first and a few lines."""

import ast
import difflib
import importlib.util
import re
import subprocess
import sys

import pytest
from load_example import EXAMPLES

REPLACED = {
    "    loader = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True)",  # gets the examples' numbers
    "        for inputs, labels in loader:",
    "    model = build()",
    "            loss = F.cross_entropy(model(inputs), labels)",  # moves into a with
    "            loss.backward()",
}
"""Lines of the plain training that cannot stay as they are."""


def numbers(name: str, *packages: str) -> list[list[float]]:
    """Run an example; return the numbers in each line that it prints about its network, the last lines."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    done = subprocess.run([sys.executable, EXAMPLES / f"{name}.py"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stderr}\n`make` mends the import of torchvision in its environment"
    lines = [line for line in done.stdout.splitlines() if not line.startswith("{")]  # a log of the Trainer
    return [[float(number) for number in re.findall(r"\d+\.?\d*", line.split(": ", 1)[1])] for line in lines]


def test_plain() -> None:
    ((right, wrong),) = numbers("plain")
    assert right > 95
    assert wrong > 95


def test_with_memloc() -> None:
    (right, wrong), (ratio,), units = numbers("with_memloc")
    assert right > 90 > 20 > wrong
    assert ratio > 2
    assert len(units) > 10
    assert min(units) >= 1


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("compiled", "torch"),
        ("data_parallel", "torch.distributed"),
        ("fully_sharded", "torch.distributed"),
        ("lightning_digits", "lightning"),
    ],
)
def test_the_right_labels_alone_are_learnt(name: str, package: str) -> None:
    *_, (right, wrong), (ratio,) = numbers(name, package)
    assert right > 85 > 20 > wrong
    assert ratio > 2


def test_private() -> None:
    ((learnt, _, epsilon),) = numbers("private", "opacus")
    assert learnt > 85
    assert 1 < epsilon < 10


def test_hugging_face() -> None:
    (rule, random), (rule_without, random_without), (ratio,), units = numbers(
        "hugging_face", "transformers", "accelerate"
    )
    assert min(rule, random, rule_without) > 98
    assert random_without < 50
    assert ratio > 2
    assert len(units) >= 5


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


@pytest.mark.parametrize(
    ("name", "packages"), [("tabular", ["sklearn"]), ("bert", ["transformers"]), ("tokens", ["transformers"])]
)
def test_probes_of_other_models(name: str, packages: list[str]) -> None:
    account, rewound, retrained, units, tied = numbers(name, *packages)
    assert account
    assert len(rewound) == len(retrained) > 0
    assert units
    assert tied


@pytest.mark.parametrize("name", ["tabular", "bert", "tokens"])
def test_the_probes_take_few_lines_and_no_subclass(name: str) -> None:
    tree = ast.parse((EXAMPLES / f"{name}.py").read_text())
    assert not any(isinstance(node, ast.ClassDef) for node in ast.walk(tree))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    lines = {name: (node.end_lineno or 0) - node.lineno for name, node in functions.items()}
    assert lines["train"] < 10
    assert lines["main"] < 25  # all five, with what they print
