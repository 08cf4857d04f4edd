from dataclasses import replace
from pathlib import Path

import pytest
import torch

from memloc_ext.study import DataConfig, StudyConfig, load_data

PART = StudyConfig(data=DataConfig(examples=300), device="cpu")


def test_scores_of_just_the_chosen_examples_mark_them(tmp_path: Path) -> None:
    chosen = load_data(PART).train.indices
    scores = torch.rand(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = list(zip(chosen.tolist(), scores.tolist(), strict=True))
    texts = {
        "in_order.csv": "".join(f"{score}\n" for _, score in rows),
        "by_number.csv": ",score\n" + "".join(f"{number},{score}\n" for number, score in reversed(rows)),
        "of_all.csv": "score\n" + "".join(f"{dict(rows).get(number, 0)}\n" for number in range(1437)),
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        said: list[str] = []
        data = replace(PART.data, memorized=tmp_path / name, below=0.3)
        train = load_data(replace(PART, data=data), said.append).train
        assert torch.equal(train.indices, chosen)
        assert torch.equal(train.memorized, scores < 0.3)
        assert torch.equal(train.labels, train.true_labels)
        assert len(said) == 1
        assert said[0].startswith(f"{tmp_path / name}: read as scores of ")


@pytest.mark.parametrize("name", ["below", "above"])
def test_a_threshold_needs_a_file(name: str) -> None:
    with pytest.raises(ValueError, match=rf"DataConfig: {name} must come with memorized \(--memorized\).* got 0.5"):
        DataConfig(**{name: 0.5})
    DataConfig(**{name: 0.5}, memorized=Path("scores.csv"))
