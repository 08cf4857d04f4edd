"""The settings of the probes in a study."""

import pytest

from memloc_ext.study.config import DropoutConfig, RetrainConfig, RewindConfig


def test_rewind_settings_are_checked() -> None:
    assert RewindConfig() == RewindConfig((), ())
    for wrong in (
        {"rewind_epochs": [0]},
        {"rewind_epochs": (0.5,)},
        {"rewind_epochs": (True,)},
        {"rewind_groups": "a"},
    ):
        with pytest.raises(TypeError, match=r"RewindConfig: rewind_.* must be a tuple of"):
            RewindConfig(**wrong)
    with pytest.raises(ValueError, match=r"rewind_epochs must be at least 0, got \(-1,\)"):
        RewindConfig((-1,))
    with pytest.raises(ValueError, match="rewind_groups must be different"):
        RewindConfig((), ("a", "a"))


def test_dropout_has_its_channels_first_or_last() -> None:
    assert [DropoutConfig(channel_dim=dim).channel_dim for dim in (None, 1, -1)] == [None, 1, -1]
    with pytest.raises(ValueError, match="DropoutConfig: channel_dim must be 1, -1 or None, got 2"):
        DropoutConfig(channel_dim=2)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"retrain_epochs": 0}, "retrain_epochs must be at least 1, got 0"),
        ({"patience": 0}, "patience must be at least 1, got 0"),
        ({"retrain_batch_size": -1}, "retrain_batch_size must be at least 1, got -1"),
        ({"retrain_learning_rate": 0.0}, "must be positive and finite, got 0.0"),
        ({"retrain_learning_rate": float("nan")}, "must be positive and finite, got nan"),
        ({"retrain_groups": ("a", "a")}, "retrain_groups must be different"),
    ],
)
def test_retrain_settings_have_rules(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RetrainConfig(**wrong)


@pytest.mark.parametrize(
    "wrong", [{"retrain_epochs": True}, {"patience": 2.0}, {"retrain_learning_rate": "1"}, {"retrain_groups": ["a"]}]
)
def test_retrain_settings_have_types(wrong: dict) -> None:
    (name,) = wrong
    with pytest.raises(TypeError, match=f"RetrainConfig: {name} must be"):
        RetrainConfig(**wrong)
