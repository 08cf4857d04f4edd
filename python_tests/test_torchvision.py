import subprocess
import sys

import pytest

MODELS = """
import torch, memloc_ext._torchvision as mend
models = mend.import_torchvision("models")
assert models.resnet18(num_classes=3).eval()(torch.randn(1, 3, 32, 32)).shape == (1, 3)
assert mend.import_torchvision("transforms").ToTensor
assert mend.import_torchvision() is mend.import_torchvision()
print(len(mend._declared))
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


def run(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


def plain_import_works() -> bool:
    command = [sys.executable, "-c", "import torchvision"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_the_import_is_mended_where_it_would_fail_and_only_there() -> None:
    assert run(MODELS) == ("0" if plain_import_works() else "1")


def test_a_library_that_loads_needs_no_mending() -> None:
    assert run(MATCHING_WHEEL) == "0"


def test_an_absent_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from memloc_ext import _torchvision

    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(_torchvision, "_declared", [])
    monkeypatch.setattr(_torchvision.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'memloc_ext\[study\]'"):
        _torchvision.import_torchvision()
