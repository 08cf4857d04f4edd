"""Let every program of an environment import torchvision next to a CPU torch: ``python tools/mend_torchvision.py``.

Run, it copies itself into the environment's packages, with a ``.pth`` file that imports it whenever Python starts. That
costs no import of torch, unless torchvision is imported. `memloc_ext._torchvision` says what is mended.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
import sysconfig
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        package = importlib.util.find_spec("memloc_ext")
        if package is not None and package.origin is not None:
            # the file alone, without the package; kept, since its operators go when it goes
            self.mend = runpy.run_path(str(Path(package.origin).with_name("_torchvision.py")))
            self.mend["declare_missing_operators"]()
        super().exec_module(module)


class _Finder:
    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name) if name == "torchvision" else None
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(name, spec.origin)
        return spec


def _install() -> None:
    packages, source = Path(sysconfig.get_path("purelib")), Path(__file__)
    (packages / source.name).write_bytes(source.read_bytes())
    (packages / f"{source.stem}.pth").write_text(f"import {source.stem}\n")


if __name__ == "__main__":
    _install()
else:
    sys.meta_path.insert(0, _Finder)
