import numpy as np
import pytest
import torch

from memloc_ext.reference.example_tied_dropout import keep_mask, philox4x32_10

PI = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]  # fractional digits


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (PI[:4], PI[4:], [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter: list[int], key: list[int], expected: list[int]) -> None:
    draws = philox4x32_10(np.array(counter, np.uint64), np.array(key, np.uint64))
    assert draws.tolist() == expected


def test_keep_mask_keeps_the_named_shares() -> None:
    keep = keep_mask(torch.arange(2000), 100, 20, 0.1, seed=3)
    assert keep[:, :20].all()
    kept = keep[:, 20:].double()
    assert abs(kept.mean() - 0.1) < 4 * (0.09 / kept.numel()) ** 0.5
    per_channel = kept.mean(0)
    assert (per_channel - 0.1).abs().max() < 5 * (0.09 / 2000) ** 0.5


@pytest.mark.parametrize("change", ["seed", "site", "example"])
def test_keep_mask_draws_are_independent(change: str) -> None:
    ids = torch.arange(500)
    base = keep_mask(ids, 64, 0, 0.5, seed=1, site=2)
    other = {
        "seed": lambda: keep_mask(ids, 64, 0, 0.5, seed=2, site=2),
        "site": lambda: keep_mask(ids, 64, 0, 0.5, seed=1, site=3),
        "example": lambda: keep_mask(ids + 1, 64, 0, 0.5, seed=1, site=2),
    }[change]()
    agree = (base == other).double().mean()
    assert abs(agree - 0.5) < 5 * (0.25 / base.numel()) ** 0.5
