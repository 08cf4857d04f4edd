import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from memloc_ext.data import Dataset, Split
from memloc_ext.nn import ExampleTiedDropout
from memloc_ext.study import (
    DataConfig,
    DropoutConfig,
    ModelConfig,
    StudyConfig,
    build_model,
    load_data,
    load_run,
    run_study,
)
from memloc_ext.study.command_line import main
from memloc_ext.study.setup import fingerprint_data
from memloc_ext.training import TrainConfig

TIMM = """
from torch import nn

class models:
    get_pretrained_cfg = lambda name: None

def is_model(name):
    return name == "net.a1_in1k"

def create_model(name, num_classes, in_chans):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
"""
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


def test_images_are_normalised_as_asked_and_are_other_data_then() -> None:
    plain = load_data(PART)
    assert isinstance(plain, Dataset)
    with pytest.raises(ValueError, match="normalization must be one of paper, imagenet"):  # digits have one channel
        load_data(replace(PART, data=replace(PART.data, normalization="imagenet")))
    other = plain.normalized(((0.0,), (1.0,)))
    assert fingerprint_data(other) != fingerprint_data(plain)


def test_one_class_of_images_of_any_size_is_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for part, count in (("train", 9), ("test", 2)):
        (tmp_path / part / "cat").mkdir(parents=True)
        for number in range(count):
            Image.new("L", (8, 7 + number % 3), 20 * number).save(tmp_path / part / "cat" / f"{number}.png")

    def show(message: Warning, category: type[Warning], filename: str, lineno: int, *_: object) -> None:
        print(warnings.formatwarning(message, category, filename, lineno), end="", file=sys.stderr)

    monkeypatch.setattr(warnings, "showwarning", show)
    model = ["--model", "resnet9", "--width", "0.1", "--epochs", "1", "--batch-size", "8", "--device", "cpu"]
    arguments = ["train", "--dataset", f"folder:{tmp_path}", *model, "--output", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match=r"num_classes must be at least 2 .* got 1; give fraction 0 \(--noise 0\)"):
        main([*arguments, "--noise", "0.5"])
    formatted = warnings.formatwarning
    main([*arguments, "--noise", "0"])
    assert warnings.formatwarning is formatted
    lines = capsys.readouterr().err.splitlines()
    joined = "memloc: train: batch_size 8 leaves a single one of 9 examples for the last batch, which batch norm cannot"
    assert [line.startswith(joined) for line in lines if "batch" in line] == [True]
    run = load_run(tmp_path / "run")
    assert run.metrics[0]["clean"] == 1


@pytest.mark.parametrize("name", ["below", "above"])
def test_a_threshold_needs_a_file(name: str) -> None:
    with pytest.raises(ValueError, match=rf"DataConfig: {name} must come with memorized \(--memorized\).* got 0.5"):
        DataConfig(**{name: 0.5})
    DataConfig(**{name: 0.5}, memorized=Path("scores.csv"))


def test_a_model_of_timm_needs_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="--model timm:resnet10t needs timm; run: pip install timm"):
        build_model(replace(PART, model=ModelConfig("timm:resnet10t")), load_data(PART), "plain")


def test_dropout_is_left_out_of_a_model_of_timm_whatever_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "timm.py").write_text(TIMM)
    monkeypatch.setitem(sys.modules, "timm", None)  # which is put back after the test
    del sys.modules["timm"]
    monkeypatch.syspath_prepend(tmp_path)
    config = replace(PART, model=ModelConfig("timm:net.a1_in1k"), train=TrainConfig(epochs=1))
    said: list[str] = []
    run = run_study(config, tmp_path / "run", stages=["train", "dropout"], progress=False, say=said.append)
    assert list(run.histories) == ["plain"]
    assert said == ["left out: dropout; name modules for dropout by --sites", "[1/1] train: begins"]


def test_models_of_timm_fit_the_images(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    images = Split.clean(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4))
    dataset = Dataset("images", images, images, ("a", "b", "c", "d"))
    for name in ("resnet10t", "vit_tiny_patch16_224"):  # the second is made for one size of images
        model = build_model(replace(PART, model=ModelConfig(f"timm:{name}")), dataset, "plain").eval()
        assert model(images.batch(torch.arange(2)).x).shape == (2, 4)
    with pytest.raises(ValueError, match="--model timm:resnet0 must be of timm"):
        build_model(replace(PART, model=ModelConfig("timm:resnet0")), dataset, "plain")
    few = ["--examples", "12", "--test-examples", "4", "--batch-size", "12", "--epochs", "1", "--device", "cpu"]
    main(["account", "--model", "timm:resnet10t", *few, "--output", str(tmp_path / "run")])
    accounting = load_run(tmp_path / "run").accounting
    assert accounting is not None
    assert accounting.groups == ["conv1", "bn1", "layer1.0", "layer2.0", "layer3.0", "layer4.0", "fc"]


def test_channels_that_are_not_kept_are_skipped_where_asked() -> None:
    dataset = load_data(PART)
    for skip in (False, True):
        model = build_model(replace(PART, dropout=DropoutConfig(skip_channels=skip)), dataset, "example_tied")
        assert {m.skip for m in model.modules() if isinstance(m, ExampleTiedDropout)} == {skip}
