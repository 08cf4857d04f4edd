import pytest
from hypothesis import given
from hypothesis import strategies as st

from memloc_ext.training import cosine, triangular

SCHEDULES = [pytest.param(cosine, 0.1, id="cosine"), pytest.param(triangular, 0.4, id="triangular")]


@pytest.mark.parametrize(("schedule", "peak"), SCHEDULES)
@pytest.mark.parametrize("total", [10, 25, 1000])
def test_starts_and_ends_at_0_and_peaks_at_1(schedule, peak, total):
    assert schedule(0, total) == 0
    assert schedule(peak * total, total) == 1
    assert schedule(total, total) == 0


def test_hand_computed_values():
    assert cosine(50, 1000) == 0.5
    assert cosine(550, 1000) == pytest.approx(0.5)  # half-way between the peak and the end
    assert triangular(5, 25) == 0.5
    assert triangular(20, 25) == pytest.approx(1 / 3)


@pytest.mark.parametrize(("schedule", "peak"), SCHEDULES)
@given(total=st.integers(1, 10_000), shares=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_rises_to_the_peak_and_falls_after_it(schedule, peak, total, shares):
    early, late = sorted(min(share * total, total) for share in shares)
    first, second = schedule(early, total), schedule(late, total)
    assert 0 <= first <= 1
    assert 0 <= second <= 1
    if late / total <= peak:
        assert first <= second
    if early / total >= peak:
        assert first >= second


@pytest.mark.parametrize("schedule", [cosine, triangular])
def test_depends_on_the_share_of_steps_alone(schedule):
    assert [schedule(step, 8) for step in range(9)] == [schedule(2 * step, 16) for step in range(9)]


@pytest.mark.parametrize("schedule", [cosine, triangular])
def test_refuses_steps_outside_the_training(schedule):
    name = schedule.__name__
    with pytest.raises(ValueError, match=rf"{name}: step must be in \[0, 10\], got 11"):
        schedule(11, 10)
    with pytest.raises(ValueError, match=rf"{name}: step must be in \[0, 10\], got -1"):
        schedule(-1, 10)
    with pytest.raises(ValueError, match=f"{name}: total_steps must be at least 1, got 0"):
        schedule(0, 0)
