import pytest
import torch

from memloc_ext.models import LeNet


def test_takes_the_smallest_image_and_refuses_a_smaller():
    assert LeNet(image_size=4)(torch.randn(2, 3, 4, 4)).shape == (2, 10)
    with pytest.raises(ValueError, match="LeNet: image_size must be at least 4, got 3"):
        LeNet(image_size=3)
