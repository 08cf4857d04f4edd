import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import memloc_ext

TOOLS = Path(__file__).parents[1] / "tools"
MODELS = """
import torch, memloc_ext._torchvision as mend
models = mend.import_torchvision("models")
assert models.resnet18(num_classes=3).eval()(torch.randn(1, 3, 32, 32)).shape == (1, 3)
assert mend.import_torchvision("transforms").ToTensor
assert mend.import_torchvision() is mend.import_torchvision()
print(len(mend._declared))
"""
MENDED = f"""
import sys
sys.path.insert(0, {str(TOOLS)!r})
import mend_torchvision
assert "torch" not in sys.modules
import torchvision
assert "memloc_ext" not in sys.modules
from memloc_ext._torchvision import import_torchvision
assert import_torchvision() is torchvision
print(torchvision.models.resnet18)
"""
MATCHING_WHEEL = """
import torch, memloc_ext._torchvision as mend
library = torch.library.Library("torchvision", "FRAGMENT")
def load_library(path):
    for name in ("nms", "qnms"):
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
torch.ops.load_library = load_library
assert mend._operators_load()
print(len(mend._declared))
"""


def run(program: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a program in an environment that nothing has mended: without the ``.pth`` files of its packages."""
    paths = [*filter(None, sys.path), str(Path(memloc_ext.__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-S", "-c", program]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=check)


def test_the_import_is_mended_where_it_would_fail_and_only_there() -> None:
    plain_import_works = run("import torchvision", check=False).returncode == 0
    assert run(MODELS).stdout.strip() == ("0" if plain_import_works else "1")


def test_make_mends_the_import_whatever_comes_first() -> None:
    assert "function resnet18" in run(MENDED).stdout


def test_a_library_that_loads_needs_no_mending() -> None:
    assert run(MATCHING_WHEEL).stdout.strip() == "0"


def test_an_absent_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from memloc_ext import _torchvision

    monkeypatch.setattr(_torchvision, "torch", SimpleNamespace(ops=SimpleNamespace(torchvision=None)))
    monkeypatch.setattr(_torchvision.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'memloc_ext\[study\]'"):
        _torchvision.import_torchvision()
