"""The paper's methods: each takes a model and data and returns a typed result."""

from memloc_ext.probes.account_epoch import GradientAccounting, account_epoch, roc_auc
from memloc_ext.probes.accuracy import Accuracy, accuracy, accuracy_by_mode
from memloc_ext.probes.audit import Audit, audit
from memloc_ext.probes.epoch_account import EpochAccount, GroupAccount, ParameterAccount
from memloc_ext.probes.localization import DatasetLocalization, Found, Localization, localize, localize_dataset
from memloc_ext.probes.retraining import GroupRetraining, RetrainedEpoch, Retraining, retrain
from memloc_ext.probes.rewinding import GroupRewinding, Rewinding, RewoundAccuracy, rewind

__all__ = [
    "Accuracy",
    "Audit",
    "DatasetLocalization",
    "EpochAccount",
    "Found",
    "GradientAccounting",
    "GroupAccount",
    "GroupRetraining",
    "GroupRewinding",
    "Localization",
    "ParameterAccount",
    "RetrainedEpoch",
    "Retraining",
    "Rewinding",
    "RewoundAccuracy",
    "account_epoch",
    "accuracy",
    "accuracy_by_mode",
    "audit",
    "localize",
    "localize_dataset",
    "retrain",
    "rewind",
    "roc_auc",
]
