import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from memloc_ext.probes import roc_auc


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=30))
def test_is_the_share_of_pairs_in_the_right_order(examples: list[tuple[int, bool]]) -> None:
    scores = torch.tensor([score for score, _ in examples], dtype=torch.float32)
    positive = torch.tensor([marked for _, marked in examples], dtype=torch.bool)
    pairs = [(high, low) for high in scores[positive].tolist() for low in scores[~positive].tolist()]
    if not pairs:
        assert roc_auc(scores, positive) is None
        return
    expected = sum((high > low) + 0.5 * (high == low) for high, low in pairs) / len(pairs)
    assert roc_auc(scores, positive) == pytest.approx(expected)
    assert roc_auc(scores, positive) == pytest.approx(roc_auc_score(positive, scores))


def test_knows_the_ends() -> None:
    scores, positive = torch.tensor([0.1, 0.2, 0.8, 0.9]), torch.tensor([False, False, True, True])
    assert roc_auc(scores, positive) == 1
    assert roc_auc(scores, ~positive) == 0
    assert roc_auc(torch.zeros(4), positive) == 0.5
