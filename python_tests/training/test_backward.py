import contextlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from test_resume import CONFIG, build, make_split
from torch import Tensor, nn

from memloc_ext.training import Backward, list_checkpoints, train


class Recorder(Backward):
    """Does what the plain backward pass does, and writes down every call."""

    def __init__(self, folder) -> None:
        self.folder, self.calls = folder, []
        self.inside = False

    def start(self, epoch: int) -> None:
        self.calls.append(("start", epoch, len(list_checkpoints(self.folder))))

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False

    def run(self, loss: Tensor, ids: Tensor, scale: Tensor | None, share: float) -> None:
        assert self.inside
        assert share == 1
        self.calls.append(("run", ids.tolist(), loss.item(), scale if scale is None else scale.item()))
        super().run(loss, ids, scale, share)

    def finish(self, epoch: int) -> None:
        assert not self.inside
        self.calls.append(("finish", epoch, len(list_checkpoints(self.folder))))


def test_is_called_in_order_and_before_the_checkpoint(tmp_path) -> None:
    recorder, plain = Recorder(tmp_path / "run"), build()
    expected = train(plain, make_split(), CONFIG, checkpoints=tmp_path / "plain", progress=False)
    model = build()
    model[0].register_forward_hook(lambda *_: pytest.fail("outside of batch") if not recorder.inside else None)
    history = train(model, make_split(), CONFIG, checkpoints=tmp_path / "run", backward=recorder, progress=False)
    assert history == expected
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    assert [call for call in recorder.calls if call[0] != "run"] == [
        (name, epoch, epoch) for epoch in range(1, 5) for name in ("start", "finish")
    ]
    batches = [call for call in recorder.calls if call[0] == "run"]
    assert len(batches) == 4 * 7
    assert sorted(number for _, ids, *_ in batches[:7] for number in ids) == list(range(200))
    assert all(scale is None for *_, scale in batches)


def test_is_told_the_scale_of_float16(tmp_path) -> None:
    recorder = Recorder(tmp_path)
    config = replace(CONFIG, epochs=1, precision="float16")
    history = train(build(), make_split(), config, checkpoints=tmp_path, backward=recorder, progress=False)
    batches = [call for call in recorder.calls if call[0] == "run"]
    total = sum(loss / scale * len(ids) for _, ids, loss, scale in batches)
    assert all(scale > 1 for *_, scale in batches)
    assert history[1]["loss"] == pytest.approx(total / 200)


@pytest.mark.parametrize("already", [False, True])
def test_needs_a_model_that_is_not_compiled(tmp_path, already) -> None:
    model: nn.Module = build()
    with pytest.raises(ValueError, match="train: model must not be compiled if backward is given"):
        train(
            torch.compile(model, backend="eager") if already else model,
            make_split(),
            replace(CONFIG, compile=not already),
            checkpoints=tmp_path / "new",
            backward=Backward(),
            progress=False,
        )
    assert not (tmp_path / "new").exists()
