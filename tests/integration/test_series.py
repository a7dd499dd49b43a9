"""``fit --folds --seeds``: ordinary fits on a shared store, a table, and what a stopped series leaves."""

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import lightning.pytorch as pl
import pytest
import yaml

from project.cli.main import main
from project.reporting.dashboard import Dashboard
from tests.conftest import SOLVED, STORED, row_counts, scalars

Fit = Callable[..., int]
RUNS = Path("runs/train")


def table(output: str) -> list[list[str]]:
    """Cells of the rows of the table: fold, seed, accuracies and run."""
    return [line.split() for line in output.splitlines() if re.match(r" *\d/\d ", line)]


def test_a_series_of_folds_and_seeds(fit: Fit, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*STORED, *SOLVED, "--data.root", str(photos / "train"), "--trainer.max_epochs", "2"]
    assert fit(*flags, "--folds", "2", "--seeds", "2") == 0
    output = capsys.readouterr().out
    assert row_counts(output) == [(0, 24), (24, 0), (24, 0), (24, 0)]
    rows = table(output)
    assert [row[:2] for row in rows] == [["1/2", "0"], ["2/2", "0"], ["1/2", "1"], ["2/2", "1"]]
    last = []
    for number, row in enumerate(rows):
        run = RUNS / f"version_{number}"
        accuracy = [event.value for event in scalars(run).Scalars("val/accuracy")]
        assert [float(cell) for cell in row[5:8]] == pytest.approx([accuracy[0], accuracy[-1], max(accuracy)], abs=1e-4)
        assert row[8] == run.name
        assert int(row[2]) + int(row[4]) == 24
        config = yaml.safe_load((run / "config.yaml").read_text())
        assert (config["data"]["fold"], config["data"]["split_seed"]) == (row[0], int(row[1]))
        assert config["seed_everything"] == int(row[1]) and not {"folds", "seeds"} & config.keys()
        last.append(accuracy[-1])
    for name, value in (("mean", mean(last)), ("sd", stdev(last))):
        (line,) = re.findall(rf"^ +{name} +(.*)$", output, re.MULTILINE)
        assert float(line.split()[1]) == pytest.approx(value, abs=1e-4)
    assert "val/accuracy of 4 fits in runs/train:" in output
    assert "The best epoch is, so its figure is optimistic" in " ".join(output.split())


def test_a_stopped_series_reports_its_completed_fits(
    fit: Fit, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The printed command resumes the stopped fit alone."""
    started: list[int] = []

    def interrupt(_: Dashboard, trainer: pl.Trainer, *args: object) -> None:
        started.append(trainer.global_step)
        if len(started) == 11:  # in the second fit
            os.kill(os.getpid(), signal.SIGTERM)

    flags = [*STORED, "--data.root", str(photos / "train"), "--trainer.max_epochs", "2", "--data.batch_size", "4"]
    with monkeypatch.context() as patch:
        patch.setattr(Dashboard, "on_train_batch_end", interrupt)
        assert fit(*flags, "--folds", "3") == 143
    captured = capsys.readouterr()
    assert "val/accuracy of 1 of 3 fits in runs/train:" in captured.out
    assert [row[0] for row in table(captured.out)] == ["1/3"]
    assert sorted(path.name for path in RUNS.iterdir()) == ["version_0", "version_1"]
    command = captured.err.strip().splitlines()[-1]
    assert "--folds" not in command and "--data.fold 2/3" in command
    assert main(command.split()[3:]) == 0
    assert len(scalars(RUNS / "version_2").Scalars("val/accuracy")) >= 1


def test_an_error_in_a_fit_ends_the_series(
    fit: Fit, photos: Path, refused: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--data.root", str(photos / "train"), "--trainer.limit_train_batches", "2", "--model.head_init", "solved"]
    assert "model.head_init" in refused(fit(*STORED, *flags, "--seeds", "2"))


def test_several_devices_are_refused(fit: Fit, photos: Path, refused: Callable[[int], str]) -> None:
    devices = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    assert "run on one device, not on 2. Add --trainer.devices 1" in refused(fit("--folds", "2", *devices))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--folds", "1"], "--folds must be at least 2"),
        (["--folds", "2", "--data.fold", "1/2"], "--data.fold"),
        (["--seeds", "2", "--ckpt_path", "last"], "--ckpt_path"),
    ],
    ids=["one fold", "fold", "checkpoint"],
)
def test_contradictions_are_refused(fit: Fit, refused: Callable[[int], str], flags: list[str], words: str) -> None:
    assert words in refused(fit(*flags))
    assert not RUNS.exists()


def test_the_result_says_what_the_validation_images_chose(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(*STORED, *SOLVED, "--trainer.max_epochs", "2") == 0
    output = capsys.readouterr().out
    accuracy = [event.value for event in scalars(Path("runs/photos/version_0")).Scalars("val/accuracy")]
    assert "chosen by: these 12 images, from 3 validations, so it is optimistic" in output
    assert f"epoch 0: val/accuracy {accuracy[0]:.4f}, not chosen by these 12 images" in output
    assert f"last epoch: 2, val/accuracy {accuracy[2]:.4f}, not chosen by these 12 images" in output
    assert fit(*STORED) == 0
    assert "chosen by: nothing: it is the only validation of these 12 images" in capsys.readouterr().out


def test_validations_within_an_epoch_are_counted_also_when_a_fit_resumes(
    fit: Fit, capsys: pytest.CaptureFixture[str]
) -> None:
    """best.ckpt is chosen from all of them, and so is the best figure of a series."""
    flags = [*STORED, "--data.batch_size", "8", "--trainer.val_check_interval", "1"]  # three per epoch
    assert fit(*flags, "--seeds", "2") == 0
    output = capsys.readouterr().out
    for version in (0, 1):
        accuracy = [event.value for event in scalars(Path(f"runs/photos/version_{version}")).Scalars("val/accuracy")]
        assert len(accuracy) == 3 and f"{max(accuracy):.4f}  version_{version}" in output
    assert output.count("these 12 images, from 3 validations, so it is optimistic") == 2
    assert "The best of 3 validations" in Path("runs/photos/version_1/model_card.md").read_text()
    assert fit(*flags, "--ckpt_path", "last", "--trainer.max_epochs", "2") == 0
    assert "these 12 images, from 6 validations, so it is optimistic" in capsys.readouterr().out


def test_early_stopping_by_a_training_metric_is_no_choice_of_the_validation_images(
    fit: Fit, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped_by(metric: str) -> str:
        stopping = ["EarlyStopping", "--trainer.callbacks.monitor", metric]
        stopping += ["--trainer.callbacks.stopping_threshold", "100", "--trainer.callbacks.check_finite", "false"]
        assert fit(*STORED, *SOLVED, "--trainer.max_epochs", "3", "--seeds", "2", "--trainer.callbacks", *stopping) == 0
        return capsys.readouterr().out

    output = stopped_by("val/loss")
    assert "chosen by EarlyStopping" in output and "EarlyStopping chose the last epoch of 2 fits" in output
    output = stopped_by("train/loss")
    assert "stopped early" in output
    assert "chosen by EarlyStopping" not in output and "EarlyStopping chose the last epoch" not in output
