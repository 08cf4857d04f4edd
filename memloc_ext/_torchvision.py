"""Import torchvision next to any build of torch.

torchvision's binary wheels are built against CUDA; next to a CPU build of torch their operator library does not load
and ``import torchvision`` stops at the first operator it cannot find. Models, datasets and transforms need none of
those operators, so declaring the two schemas that the import asks for is enough.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import torch

_BOXES = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[torch.library.Library] = []  # a Library takes its operators away when it is collected


def import_torchvision(submodule: str = "") -> ModuleType:
    """Return ``torchvision`` or a submodule, such as ``"models"``, mending the import only where it would fail.

    Raises:
        ImportError: If torchvision is not installed.
    """
    declare_missing_operators()
    return importlib.import_module(f"torchvision.{submodule}" if submodule else "torchvision")


def declare_missing_operators() -> None:
    """Declare what ``import torchvision`` asks for, unless it is there or torchvision's own library can be loaded.

    Raises:
        ImportError: If torchvision is not installed.
    """
    if hasattr(torch.ops.torchvision, "nms") or _operators_load():
        return
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(operator + _BOXES)
    _declared.append(library)


def _operators_load() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise ImportError("torchvision is not installed; run: pip install 'memloc_ext[study]'")
    try:
        for path in Path(spec.origin).parent.glob("_C*"):
            torch.ops.load_library(path)
    except OSError:
        return False
    return hasattr(torch.ops.torchvision, "nms")
