from dataclasses import fields

import numpy as np
import pytest

from memloc_ext.training import TrainConfig


def test_the_defaults_are_the_papers():
    config = TrainConfig()
    assert (config.epochs, config.batch_size, config.learning_rate) == (50, 512, 0.01)
    assert (config.momentum, config.weight_decay, config.schedule) == (0.9, 5e-4, "cosine")


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("epochs", 0, "at least 1"),
        ("batch_size", 0, "at least 1"),
        ("learning_rate", 0.0, "positive and finite"),
        ("learning_rate", float("nan"), "positive and finite"),
        ("momentum", 1.0, r"in \[0, 1\)"),
        ("weight_decay", -1.0, "at least 0 and finite"),
        ("schedule", "linear", "one of cosine, triangular"),
        ("precision", "float64", "one of float32, bfloat16, float16"),
        ("seed", -1, r"in \[0, 2\*\*63\)"),
    ],
)
def test_refuses_values(name, value, rule):
    with pytest.raises(ValueError, match=f"TrainConfig: {name} must be {rule}, got {value!r}"):
        TrainConfig(**{name: value})


@pytest.mark.parametrize("name", [field.name for field in fields(TrainConfig)])
def test_refuses_types(name):
    with pytest.raises(TypeError, match=f"TrainConfig: {name} must be (int|float|bool|str), got NoneType"):
        TrainConfig(**{name: None})


@pytest.mark.parametrize("value", [True, np.int64(3), 3.0])
def test_an_integer_is_pythons(value):
    with pytest.raises(TypeError, match="TrainConfig: seed must be int, got"):
        TrainConfig(seed=value)
