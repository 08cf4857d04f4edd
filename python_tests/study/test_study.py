import csv
import html
import json
import re
import shutil
import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from memloc_ext.nn import ExampleTiedDropout, FixedDropout
from memloc_ext.study import (
    DataConfig,
    DropoutConfig,
    ModelConfig,
    Run,
    StageName,
    StudyConfig,
    build_model,
    load_data,
    load_run,
    run_study,
)
from memloc_ext.study.command_line import main
from memloc_ext.study.report import text_table, write_report, write_seeds_report
from memloc_ext.study.report.accounting import answers, cost
from memloc_ext.study.report.accuracies import dropout_answers, plain_answers
from memloc_ext.study.report.localization import notes
from memloc_ext.study.report.sections import numbers, sections
from memloc_ext.study.run import load_runs
from memloc_ext.study.stages import STAGES, TRAINED
from memloc_ext.training import TrainConfig

SMALL = StudyConfig(model=ModelConfig("lenet"), train=TrainConfig(epochs=1, batch_size=256, learning_rate=0.05))
TRAININGS: tuple[StageName, ...] = ("train", "dropout", "controls")
QUICK = ["--model", "lenet", "--epochs", "1", "--batch-size", "256"]
FEW = ["--localized", "5", "--max-units", "3", "--edited", "2"]

SHORT = ["--retrain-epochs", "1", "--rewind-epochs", "0"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_study(SMALL, tmp_path_factory.mktemp("study") / "run", stages=TRAININGS)


@pytest.fixture(scope="module")
def accounted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("study") / "account"
    main(["account", *QUICK, "--epochs", "2", "--output", str(folder)])
    return load_run(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("study") / "whole"
    main(["run", *QUICK, *FEW, *SHORT, "--output", str(folder)])
    return load_run(folder)


@pytest.fixture(scope="module")
def localized(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("study") / "localize"
    main(["localize", *QUICK, *FEW, "--output", str(folder)])
    return load_run(folder)


def folder(run: Run, stage: str, *inner: str) -> Path:
    """A folder in that of a stage's result."""
    (found,) = run.path.glob(f"{stage}-????????")
    return found.joinpath(*inner)


def test_a_run_holds_everything_and_reads_back(finished) -> None:
    path = finished.path
    assert load_run(path) == finished
    assert finished.mislabelled
    modes = [(row["model"], row["mode"]) for row in finished.metrics]
    tied = [("example_tied", mode) for mode in ("train", "test", "drop", "drop_gen")]
    assert modes == [("plain", "as trained"), *tied, ("standard", "as trained"), ("fixed", "as trained")]
    assert [len(history) for history in finished.histories.values()] == [2] * 4
    assert finished.config.train.epochs == 1
    with open(path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["clean"]) for row in rows] == [row["clean"] for row in finished.metrics]
    assert rows[1]["test"] == ""
    assert finished.accounting is None
    assert finished.localizations == {}
    assert not list(path.rglob("localization*"))
    names = [file.name for file in folder(finished, "train", "checkpoints").iterdir()]
    assert sorted(names) == ["epoch_000.safetensors", "epoch_001.safetensors"]


def test_the_report_is_one_page_with_its_pictures_inside(finished) -> None:
    page = write_report(finished).read_text()
    assert page.count('src="data:image/png;base64,') == 3
    assert not re.search(r'(src|href)="(?!data:)', page)
    for sentence in (*plain_answers(finished.metrics, True), *dropout_answers(finished.metrics, True)):
        assert sentence.split("%")[0] in page
    assert sorted(file.name for file in (finished.path / "figures").iterdir()) == [
        "accuracy.png",
        "curves.png",
        "plain_curves.png",
    ]
    assert (finished.path / "figures" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert "example-tied dropout, own mask" in text_table(finished.metrics)


def test_a_finished_run_is_not_trained_again(finished) -> None:
    before = {file: file.stat().st_mtime_ns for file in finished.path.rglob("checkpoints/epoch_*")}
    assert len(before) == 8
    assert run_study(SMALL, finished.path, stages=TRAININGS) == finished
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_an_accounted_run_holds_an_account_of_every_epoch(accounted) -> None:
    accounting = accounted.accounting
    assert accounting is not None
    assert (accounting.epochs, accounting.groups) == ([1, 2], ["conv1", "conv2", "fc1", "fc2", "head"])
    for epoch in (1, 2):
        account = accounting.epoch(epoch)
        assert account.example_norms.shape == (1437, 5)
        assert account.memorized.sum() == 143
        assert accounting.column("total")[epoch - 1] == account.model.total
        assert accounting.column("auc", "fc1")[epoch - 1] == account.groups["fc1"].auc
        told = ~account.example_cosines.isnan()
        assert 0 < told[:, 5].sum() < 1437
        against = (account.example_cosines[account.memorized & told[:, 2], 2] < 0).double().mean()
        assert account.groups["fc1"].memorized_against == pytest.approx(against.item())
        assert account.model.noise_scale > 0
    assert [len(row.parameters) for row in accounting.table] == [10, 10]
    assert accounting.cost["pairs"] >= 3
    with open(folder(accounted, "account", "accounting.csv"), newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["group"] == "(model)"]
    assert [float(row["clean"]) for row in rows] == accounting.column("clean")


def test_the_report_of_an_accounted_run_shows_whose_gradient_it_is(accounted) -> None:
    page = (accounted.path / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 6
    pictures = {"gradient_norms", "gradient_cosine", "example_cosines", "example_norms", "example_norms_auc"}
    assert {f"{name}.png" for name in pictures} < {file.name for file in (accounted.path / "figures").iterdir()}
    shares, auc = answers(accounted.accounting)
    assert "The memorized examples, 10.0 % of the data, make" in shares
    assert f"mean cosine of {statistics.mean(accounted.accounting.column('cosine')):.2f}" in shares
    against = 100 * statistics.mean(accounted.accounting.column("memorized_against"))
    assert f"{against:.1f} % of the memorized examples are pushed against" in shares
    assert f"is {max(accounted.accounting.column('auc')):.3f} in epoch" in auc
    (sentence,) = cost(accounted.accounting)
    assert f"takes {accounted.accounting.cost['ratio']:.2f}x the time of plain training" in sentence
    assert sentence in page


def test_an_accounted_run_that_goes_on_ends_like_an_unbroken_one(accounted, tmp_path: Path) -> None:
    other = replace(accounted, path=shutil.copytree(accounted.path, tmp_path / "run"))
    for stage in ("train", "account"):
        folder(other, stage, "SHA256SUMS").unlink()
    for name in ("checkpoints", "accounting"):
        folder(other, "train", name, "epoch_002.safetensors").unlink()
    main(["account", *QUICK, "--epochs", "2", "--output", str(other.path)])
    for name in ("accounting/epoch_002.safetensors", "checkpoints/epoch_002.safetensors", "history.json"):
        assert folder(other, "train", name).read_bytes() == folder(accounted, "train", name).read_bytes()
    for name in ("accounting.json", "accounting.csv", "accounting_parameters.csv"):
        assert folder(other, "account", name).read_bytes() == folder(accounted, "account", name).read_bytes()


def test_a_finished_account_is_neither_kept_nor_timed_again(accounted) -> None:
    main(["account", *QUICK, "--epochs", "2", "--output", str(accounted.path)])
    assert load_run(accounted.path) == accounted


def test_damaged_accounts_are_named(accounted, tmp_path: Path) -> None:
    other = replace(accounted, path=shutil.copytree(accounted.path, tmp_path / "run"))
    stored = folder(other, "train", "accounting", "epoch_001.safetensors")
    stored.write_bytes(stored.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"epoch_001\.safetensors: cannot be loaded"):
        load_run(other.path).accounting.epoch(1)
    folder(other, "account", "accounting.json").write_text("[]")
    with pytest.raises(ValueError, match=r"accounting\.json: must have the checksum"):
        load_run(other.path)
    folder(other, "account", "accounting.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"accounting\.json"):
        load_run(other.path)


def test_a_localized_run_holds_every_example_of_both_models(localized) -> None:
    assert load_run(localized.path) == localized
    assert list(localized.localizations) == ["plain", "example_tied"]
    for model, localization in localized.localizations.items():
        assert Counter(row.kind for row in localization.examples) == {"memorized": 5, "clean": 5}
        assert {kind: summary.total for kind, summary in localization.kinds.items()} == {
            "memorized": 143,
            "clean": 1294,
        }
        clean = localization.kinds["clean"]
        assert clean.curve[0].examples == clean.edited.examples == 2
        stage = {"plain": "localize", "example_tied": "localize-dropout"}[model]
        with open(folder(localized, stage, "localization.csv"), newline="") as file:
            found = [
                (int(row["index"]), row["sites"].split(), row["unit_numbers"].split()) for row in csv.DictReader(file)
            ]
        units = [(row.example, row.units) for row in localization.examples]
        assert found == [(i, [site for site, _ in some], [str(unit) for _, unit in some]) for i, some in units]
    assert localized.localizations["plain"].memorization_share == 0
    assert localized.localizations["example_tied"].memorization_share > 0.75
    assert localized.accounting is None


def test_the_report_of_a_localized_run_shows_which_units_flip_an_example(localized) -> None:
    page = (localized.path / "report.html").read_text()
    pictures = {f"localization_{name}.png" for name in ("units", "sites", "accuracy", "memorization")}
    assert pictures < {file.name for file in (localized.path / "figures").iterdir()}
    assert page.count('src="data:image/png;base64,') == 7
    assert "Which units flip an example?" in page
    for sentence in notes(localized.localizations):
        assert sentence in page


def test_a_finished_localization_is_kept_and_a_missing_one_made_again(localized, tmp_path: Path, capsys) -> None:
    path = shutil.copytree(localized.path, tmp_path / "run")
    shutil.rmtree(folder(replace(localized, path=path), "localize"))
    main(["localize", *QUICK, *FEW, "--output", str(path)])
    output = capsys.readouterr()
    assert output.err.splitlines() == [
        "[1/4] train: finished before, reused",
        "[2/4] localize: begins",
        "[3/4] dropout: finished before, reused",
        "[4/4] localize-dropout: finished before, reused",
    ]
    assert "Units that flip an example, example-tied dropout: " in output.out
    again = load_run(path)
    assert again.localizations["example_tied"] == localized.localizations["example_tied"]
    plain = replace(again.localizations["plain"], seconds=localized.localizations["plain"].seconds)
    assert plain == localized.localizations["plain"]


@pytest.mark.parametrize(
    ("arguments", "stages"),
    [
        (["run"], (*STAGES, "report")),
        (["run", "--skip", "account"], tuple(name for name in (*STAGES, "report") if name != "account")),
        (["run", "--no-account"], tuple(name for name in (*STAGES, "report") if name != "account")),
        (["run", "--skip", "train"], ("dropout", "controls", "localize-dropout", "audit-dropout", "report")),
        (
            ["run", "--skip", "dropout", "report"],
            ("train", "account", "rewind", "retrain", "localize", "audit", "controls"),
        ),
        (["run", "--only", "rewind", "account"], ("rewind", "account", "report")),
        (["run", "--only", "rewind", "account", "--skip", "account", "report"], ("rewind",)),
        (["train"], ("train", "report")),
        (["account"], ("train", "account", "report")),
        (["rewind"], ("train", "rewind", "report")),
        (["retrain"], ("train", "retrain", "report")),
        (["audit"], ("train", "audit", "dropout", "audit-dropout", "report")),
        (["localize"], ("train", "localize", "dropout", "localize-dropout", "report")),
        (["dropout"], ("dropout", "report")),
    ],
)
def test_commands_do_what_they_say(
    arguments: list[str], stages: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def study(*_, stages: tuple[str, ...], **__) -> None:
        asked.append(stages)
        raise ValueError("enough")

    monkeypatch.setattr("memloc_ext.study.command_line.run_study", study)
    with pytest.raises(SystemExit, match="enough"):
        main([*arguments, "--output", str(tmp_path)])
    assert asked == [stages]


def test_a_study_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--only and --skip leave no stage"):
        main(["run", "--only", "rewind", "--skip", "train", "--output", str(tmp_path / "run")])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="must be a new or empty folder"):
        run_study(SMALL, tmp_path, stages=TRAININGS)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_kill_while_the_settings_were_written_does_not_block_the_run(finished, tmp_path: Path) -> None:
    path = tmp_path / "run"
    for stage in finished.path.glob("*-????????"):
        shutil.copytree(stage, path / stage.name)
    (path / ".run.json.0123456789abcdef.tmp").write_text("{")
    assert run_study(SMALL, path, stages=TRAININGS) == replace(finished, path=path)
    assert not (path / ".run.json.0123456789abcdef.tmp").exists()


def test_damaged_and_missing_runs_are_named(finished, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no run, run\.json is missing"):
        load_run(tmp_path)
    shutil.copy(finished.path / "run.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no finished training"):
        load_run(tmp_path)
    path = shutil.copytree(finished.path, tmp_path / "run")
    metrics = folder(replace(finished, path=path), "train", "metrics.json")
    for text in ('[{"mod', '{"a": 1}', "[]", '[{"mode": 1}]'):
        metrics.write_text(text)
        with pytest.raises(ValueError, match=r"metrics\.json: must have the checksum"):
            load_run(path)


def test_variants_start_from_the_same_weights_and_differ_in_dropout_only() -> None:
    dataset = load_data(SMALL)
    state = torch.get_rng_state()
    networks = {variant: build_model(SMALL, dataset, variant) for variant in TRAINED}
    assert torch.equal(torch.get_rng_state(), state)
    plain = dict(networks["plain"].named_parameters())
    for model in networks.values():
        for name, value in model.named_parameters():
            assert torch.equal(value, plain[name])
    sites = {
        variant: sum(isinstance(m, ExampleTiedDropout | FixedDropout | torch.nn.Dropout) for m in model.modules())
        for variant, model in networks.items()
    }
    assert sites == {"plain": 0, "example_tied": 2, "standard": 2, "fixed": 2}
    tied = [m for m in networks["example_tied"].modules() if isinstance(m, ExampleTiedDropout)]
    assert [m.site for m in tied] == [0, 1]
    named = replace(SMALL, dropout=DropoutConfig(sites=("conv1",)))
    assert sum(isinstance(m, ExampleTiedDropout) for m in build_model(named, dataset, "example_tied").modules()) == 1


def test_a_file_of_memorized_examples_takes_the_place_of_noise(tmp_path: Path) -> None:
    (tmp_path / "scores.txt").write_text("\n".join(["0.1"] * 40 + ["0.9"] * 1397))
    dataset = load_data(replace(SMALL, data=DataConfig(memorized=tmp_path / "scores.txt", below=0.5)))
    assert torch.equal(dataset.train.labels, dataset.train.true_labels)
    assert dataset.train.memorized.nonzero()[:, 0].tolist() == list(range(40))


def test_seeds_have_a_folder_each_and_one_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["dropout", *QUICK, "--seed", "3", "--seeds", "2", "--output", str(tmp_path)])
    runs = load_runs(tmp_path)
    assert [(run.path, run.config.train.seed) for run in runs] == [(tmp_path / f"seed{s}", s) for s in (3, 4)]
    assert {path.parent.name for path in tmp_path.rglob("stage.json")} == {p.name for p in tmp_path.glob("dropout-*")}
    assert f"report of all seeds: {tmp_path / 'report.html'}" in capsys.readouterr().out
    drops = [next(row["clean"] for row in run.metrics if row["mode"] == "drop") for run in runs]
    assert drops[0] != drops[1]
    (row,) = (
        r for r in json.loads((tmp_path / "numbers.json").read_text()) if "clean training examples, d" in r["what"]
    )
    assert row["mean"] == statistics.mean(drops)
    assert row["deviation"] == pytest.approx(statistics.stdev(drops))
    assert (row["runs"], row["paper"]) == (2, "90.8 % (CIFAR-10)")
    page = (tmp_path / "report.html").read_text()
    assert f"{100 * row['mean']:.1f} ± {100 * row['deviation']:.1f} %" in page
    assert "seeds 3, 4" in page
    assert "--seed 3" in page
    assert page.count('src="data:image/png;base64,') == 2 * 2
    with open(tmp_path / "metrics.csv", newline="") as file:
        assert [row["seed"] for row in csv.DictReader(file)] == ["3"] * 4 + ["4"] * 4


def test_seeds_may_differ_in_what_they_found(whole, finished, tmp_path: Path) -> None:
    page = write_seeds_report(tmp_path / "both", [whole, finished]).read_text()
    rows = {row["what"]: row["runs"] for row in json.loads((tmp_path / "both" / "numbers.json").read_text())}
    assert rows["plain training: test accuracy"] == 2
    assert rows["cosine of clean and memorized gradient, mean over the epochs"] == 1
    assert re.search(r"mean over the epochs</td><td>\S+ ± 0</td><td>\S+</td><td>-</td>", page)


def test_a_study_without_memorized_examples_ends_in_a_report(tmp_path: Path) -> None:
    arguments = ["--noise", "0", "--examples", "200", "--seeds", "2", "--output", str(tmp_path)]
    main(["run", *QUICK, *FEW, *SHORT, *arguments])
    page = (tmp_path / "report.html").read_text()
    assert len(re.findall("<h3>", page)) == 2 * 7
    assert "nan" not in page.split("base64")[0]
    run = load_run(tmp_path / "seed1")
    assert list(run.localizations["plain"].kinds) == ["clean"]


def test_the_report_says_how_to_make_it_again(finished) -> None:
    (line,) = re.findall("<pre>(.*)</pre>", (finished.path / "report.html").read_text())
    settings = "--model lenet --epochs 1 --batch-size 256 --learning-rate 0.05"
    assert line == f"memloc run --only train dropout controls {settings}"


def test_a_part_of_the_examples_keeps_its_numbers() -> None:
    part = replace(SMALL, data=DataConfig(examples=200, test_examples=50))
    dataset = load_data(part)
    whole = load_data(SMALL)
    assert (len(dataset.train), len(dataset.test), int(dataset.train.memorized.sum())) == (200, 50, 20)
    numbers = dataset.train.indices
    assert numbers.unique().tolist() == numbers.tolist()
    assert torch.equal(dataset.train.true_labels, whole.train.true_labels[numbers])
    assert torch.equal(dataset.train.batch(torch.arange(200))[0], whole.train.batch(numbers)[0])
    assert torch.equal(load_data(part).train.indices, numbers)
    other = load_data(replace(part, train=replace(part.train, seed=1)))
    assert not torch.equal(other.train.indices, numbers)


def test_the_whole_study_holds_every_probe(whole) -> None:
    assert load_run(whole.path) == whole
    groups = ["conv1", "conv2", "fc1", "fc2", "head"]
    assert whole.rewinding is not None
    assert whole.retraining is not None
    assert list(whole.rewinding.groups) == list(whole.retraining.groups) == groups
    assert whole.rewinding.epochs == [0]
    plain = next(row for row in whole.metrics if row["model"] == "plain")
    assert whole.rewinding.unchanged.clean == whole.retraining.unchanged.clean == plain["clean"]
    assert [len(found.epochs) for found in whole.retraining.groups.values()] == [2] * 5
    assert list(whole.localizations) == ["plain", "example_tied"]
    assert whole.accounting is not None
    assert set(whole.seconds) == set(STAGES)
    assert not list(whole.path.rglob("parts"))


def test_the_report_of_the_whole_study_has_every_section(whole) -> None:
    page = html.unescape((whole.path / "report.html").read_text())
    titles = re.findall("<h3>(.*)</h3>", page)
    assert titles == [section.title for section in sections(whole)]
    assert [section.name for section in sections(whole)] == [
        "memorization", "accounting", "rewinding", "retraining", "localization", "dropout", "audit"
    ]  # fmt: skip
    for number in numbers(whole):
        assert f"<td>{number.what}</td><td>{number.text(number.value)}</td><td>{number.paper}</td>" in page
    for section in sections(whole):
        for sentence in section.answers:
            assert sentence.split("(")[0] in page.replace("&#39;", "'")


def test_atypical_examples_go_through_every_probe(tmp_path: Path) -> None:
    (tmp_path / "scores.txt").write_text("\n".join(["0.1"] * 40 + ["0.9"] * 1397))
    arguments = ["--memorized", str(tmp_path / "scores.txt"), "--below", "0.5", "--examples", "300"]
    main(["run", *QUICK, *FEW, *SHORT, *arguments, "--output", str(tmp_path / "run")])
    run = load_run(tmp_path / "run")
    dataset = load_data(replace(SMALL, data=DataConfig(memorized=tmp_path / "scores.txt", below=0.5, examples=300)))
    count = int(dataset.train.memorized.sum())
    assert 0 < count < 40
    assert run.accounting is not None
    assert run.accounting.epoch(1).memorized.sum() == count
    assert run.localizations["plain"].kinds["memorized"].total == count
    assert run.rewinding is not None
    assert run.retraining is not None
    for row in (run.rewinding.unchanged, run.retraining.unchanged):
        assert row.memorized == row.memorized_true is not None
    page = (tmp_path / "run" / "report.html").read_text()
    assert "of the memorized examples.</li>" in page
    assert "true label" not in page.split("The probes")[1].split("Accuracy of every model")[0]
    assert not run.mislabelled


def test_examples_are_mislabelled_whatever_their_shares(finished: Run) -> None:
    by_chance = [{**row, "memorized": 0.5, "memorized_true": 0.5} for row in finished.metrics]
    for mislabelled in (True, False):
        run = replace(finished, metrics=by_chance, mislabelled=mislabelled)
        plain, dropout = (section.answers for section in sections(run))
        assert ("50.0 % of the memorized examples the wrong label" in plain[0]) == mislabelled
        assert ("50.0 % of the memorized examples get their true label" in dropout[1]) == mislabelled
        assert any("true label" in number.what for number in numbers(run)) == mislabelled


def test_commands_write_their_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["dropout", *QUICK, "--output", str(tmp_path / "tied")])
    output = capsys.readouterr()
    assert "example-tied dropout, drop" in output.out
    assert "plain training" not in output.out
    assert output.err == "[1/1] dropout: begins\n"
    assert f"report: {tmp_path / 'tied' / 'report.html'}" in output.out
    assert "accounting" not in output.out
    main(["train", *QUICK, "--output", str(tmp_path / "plain")])
    assert list(load_run(tmp_path / "plain").histories) == ["plain"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "mnits"], "mnits"),
        (["--dataset", "mnist", "--root", "nowhere"], "nowhere"),
        (["--model", "alexnet"], "alexnet"),
        (["--noise", "1.5"], "fraction must be in"),
        (["--p-gen", "2"], "p_gen must be in"),
        (["--compile"], "leave out --compile, or give --no-account"),
        (["--device", "tpu9"], "device must be"),
        (["--device", "meta"], "device must be"),
        (["--device", "cuda:99"], "device must be"),
        (["--examples", "2000"], "examples must be at most 1437"),
        (["--test-examples", "2000"], "test_examples must be at most 360"),
        (["--rewind-epochs", "0", "99"], "rewind_epochs must be at most 20, the epochs of training, got 99"),
        (["--rewind-groups", "conv9"], "rewind: groups must be among conv1, conv2"),
        (["--retrain-groups", "conv9"], "retrain: groups must be among conv1, conv2"),
        (["--noise", "1"], "retrain needs a clean training example"),
        (["--width", "inf"], "width must be positive and finite"),
        (["--memorized", "nothing.npy"], "nothing.npy"),
    ],
)
def test_wrong_settings_end_with_one_line_and_no_folder(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["run", *arguments])
    assert message in str(stop.value)
    assert "\n" not in str(stop.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--epochs", "0"],
        ["--examples", "0"],
        ["--only", "everything"],
        ["--epochs", "many"],
        ["--localized", "0"],
        ["--max-units", "no"],
        ["--edited", "-1"],
        ["--noize", "0.1"],
        ["--seed", "9" * 20],
    ],
)
def test_options_that_do_not_parse_are_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["run", *arguments])
    assert stop.value.code == 2
    assert arguments[0].lstrip("-") in capsys.readouterr().err
