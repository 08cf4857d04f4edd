"""Threads that wait sleep, in the command ``memloc``: importing this comes before torch, whose OpenMP reads it once.

By default they spin, and take the cores from other processes. A program that imports the package decides for itself.
"""

import os
import sys
from pathlib import Path

_started = sys.argv[0] if sys.argv else ""
# Python imports the package of `python -m memloc_ext`, which torchrun starts as well, while its name is "-m"
_as_module = _started == "-m" and any(argument.endswith("memloc_ext") for argument in sys.orig_argv)
if _as_module or Path(_started).stem == "memloc":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
