"""The paper's study from end to end: one data set, every way to train, every probe, one report.

Nothing else of the package imports this one. Its files: `config` (settings), `setup` (data and models), `stages` (what
each does), `results` (what it found, on disk), `accounting` (a training that keeps an account), `store` (folders named
by a hash), `run` (which stages to do), `report`, and `command_line`.
"""

from memloc_ext.study.config import DataConfig, DropoutConfig, ModelConfig, StudyConfig, Variant
from memloc_ext.study.run import Run, load_run, run_study
from memloc_ext.study.setup import build_model, load_data
from memloc_ext.study.stages import STAGES, StageName

__all__ = [
    "STAGES",
    "DataConfig",
    "DropoutConfig",
    "ModelConfig",
    "Run",
    "StageName",
    "StudyConfig",
    "Variant",
    "build_model",
    "load_data",
    "load_run",
    "run_study",
]
