import pytest
import torch

from memloc_ext._torchvision import import_torchvision
from memloc_ext.models import resnet18


@pytest.fixture(scope="module")
def models():
    try:
        return import_torchvision("models")
    except ImportError as error:
        pytest.skip(str(error))


def test_is_torchvisions(models):
    theirs = models.resnet18(num_classes=10).eval()
    ours = resnet18().eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 28, 28)
    with torch.inference_mode():
        assert torch.equal(ours(x), theirs(x))


@pytest.mark.usefixtures("models")
def test_a_new_stem_starts_at_torchvisions_scale():
    weight = resnet18(in_channels=1).conv1.weight
    assert weight.shape == (64, 1, 7, 7)
    assert weight.std().item() == pytest.approx((2 / (64 * 7 * 7)) ** 0.5, rel=0.1)
