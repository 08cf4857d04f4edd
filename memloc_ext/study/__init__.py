"""The paper's study from end to end: one data set, every way to train, every probe, one run directory."""

from memloc_ext.study.config import DataConfig, DropoutConfig, ModelConfig, StudyConfig
from memloc_ext.study.run import run_study
from memloc_ext.study.run_directory import VARIANTS, Run, Variant, load_run
from memloc_ext.study.setup import build_model, load_data
from memloc_ext.study.stages import STAGES, StageName

__all__ = [
    "STAGES",
    "VARIANTS",
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
