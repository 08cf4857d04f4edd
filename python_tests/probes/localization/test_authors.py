from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import memloc_ext
from memloc_ext.models import LeNet, ResNet9
from memloc_ext.reference.localization import authors_search


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Sequential(nn.Linear(64, 24), nn.ReLU())
        self.fc2 = nn.Sequential(nn.Linear(24, 16), nn.ReLU())
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc2(self.fc1(x.flatten(1))))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "lenet": lambda: LeNet(in_channels=1, image_size=8),
    "resnet9": lambda: ResNet9(in_channels=1, image_size=8, width=0.1),
    "mlp": MLP,
}


@pytest.fixture(scope="module", params=MODELS)
def fitted(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, Tensor]:
    """A network that has memorized 40 random images with random labels, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[request.param]().double()
        x, y = torch.randn(40, 1, 8, 8, dtype=torch.float64), torch.randint(10, (40,))
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(150):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    model.eval()
    assert (model(x).argmax(1) == y).float().mean() > 0.9
    return model, x, y


@pytest.mark.parametrize("inside", [True, False])
def test_the_authors_objective_chooses_the_units_of_the_authors_search(
    fitted: tuple[nn.Module, Tensor, Tensor], inside: bool
) -> None:
    model, x, y = fitted
    first = 0 if inside else 8
    reference = (x[first : first + 24], y[first : first + 24])
    found = memloc_ext.localize(
        model,
        x[:5],
        y[:5],
        reference=reference,
        objective="authors",
        noise=0,
        eot=1,
        max_units=12,
    )
    layers = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    layer_of = dict(zip(found.sites, layers[:-1], strict=True))  # both in the order of the network; the head is no site
    for i in range(5):
        theirs = authors_search(
            model,
            x[i],
            int(y[i]),
            reference,
            position=i if inside else None,
            max_units=12,
            eot=1,
            noise=0,
        )
        assert [(layer_of[site], unit) for site, unit in found[i].units] == theirs.units
        assert found[i].predicted == theirs.predicted
        assert found[i].losses == pytest.approx(theirs.losses, rel=1e-9)


def test_the_authors_search_leaves_the_model_as_it_was(fitted: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = fitted
    before, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    model.train()
    found = authors_search(model, x[0], int(y[0]), (x[:8], y[:8]), position=0, max_units=2)
    assert model.training
    model.eval()
    assert len(found.losses) == len(found.predicted) == len(found.units) + 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(generator, torch.get_rng_state())


def test_the_authors_search_ends_when_no_unit_is_left() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    x = torch.ones(2, 1, 2, 2, dtype=torch.float64)
    found = authors_search(model, x[0], 0, (x, torch.zeros(2, dtype=torch.int64)), position=0)
    assert sorted(found.units) == [("1", 0), ("1", 1), ("1", 2)]
    assert found.predicted == [0] * 4
