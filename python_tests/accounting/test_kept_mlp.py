"""MLPs that compute the channels which each example keeps."""

from __future__ import annotations

import pytest
import torch
from accounted import check, parameter
from torch import Tensor, nn

from memloc_ext import ops
from memloc_ext.ops import kept_mlp

IDS = {
    "examples": torch.arange(5) * 3,
    "the same twice": torch.tensor([4, 4, 7, 7, 9]),
    "tokens": torch.tensor([[1, 1, 2], [2, 2, 2], [3, 4, 4], [5, 5, 5], [5, 6, 6]]),
}


@pytest.fixture(autouse=True, params=["kept", "dense"])
def plan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the operator compute kept channels, or all."""
    for name in ("RUN_ROWS", "ROWS"):
        monkeypatch.setattr(kept_mlp, name, -1 if request.param == "kept" else 10**6)


class Mlp(nn.Module):
    def __init__(self, *, gated: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.w_in, self.w_out = parameter(9, 4), parameter(3, 9)
        self.b_in, self.b_out = (parameter(9), parameter(3)) if bias else (None, None)
        self.w_gate, self.b_gate = (parameter(9, 4), parameter(9)) if gated else (None, None)
        self.p_mem = 0.4

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return ops.example_tied_mlp(
            self.first(x),
            ids,
            *(self.w_in, self.b_in, self.w_out, self.b_out),
            activation="silu",
            num_generalization=3,
            p_mem=self.p_mem,
            seed=2,
            w_gate=self.w_gate,
            b_gate=self.b_gate,
        )


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("ids", IDS)
def test_tokens(ids: str, gated: bool) -> None:
    torch.manual_seed(0)
    check(Mlp(gated=gated), (torch.randn(5, 3, 4), IDS[ids]))


@pytest.mark.parametrize("bias", [False, True])
def test_rows(bias: bool) -> None:
    torch.manual_seed(0)
    check(Mlp(bias=bias), (torch.randn(5, 4), IDS["examples"]))


@pytest.mark.parametrize("p_mem", [0.0, 1.0])
def test_all_or_none(p_mem: float) -> None:
    torch.manual_seed(0)
    model = Mlp()
    model.p_mem = p_mem
    check(model, (torch.randn(5, 3, 4), IDS["examples"]))


def test_weights_that_are_shared_and_turned_over() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = parameter(4, 9)

        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            for site in range(2):
                settings = {"activation": "relu", "num_generalization": 3, "p_mem": 0.4, "seed": 2, "site": site}
                x = x + ops.example_tied_mlp(x, ids, self.weight.t(), None, self.weight, None, **settings)
            return x

    torch.manual_seed(0)
    check(Tied(), (torch.randn(5, 3, 4), IDS["examples"]))
