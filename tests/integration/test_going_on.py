"""What a fit takes along when it goes on, and what it does not."""

import re
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import SMALL, STORED, draw, scalars
from tests.forked import start

Fit = Callable[..., int]


def checkpoints(version: int) -> Path:
    return Path(f"runs/photos/version_{version}/checkpoints")


def test_the_best_checkpoint_so_far_comes_along(fit: Fit) -> None:
    fast = ["--model.optimizer", "AdamW", "--model.optimizer.lr", "0.01"]
    assert fit(*STORED, *fast, "--trainer.max_epochs", "6") == 0
    best = (checkpoints(0) / "best.ckpt").read_bytes()
    worse = ["--ckpt_path", "last", "--trainer.max_epochs", "7", "--model.optimizer.lr", "0"]
    assert fit(*STORED, *worse) == 0
    assert (checkpoints(1) / "best.ckpt").read_bytes() == best, "an epoch that is no better does not take its place"
    state = torch.load(checkpoints(1) / "last.ckpt", weights_only=True)["callbacks"]
    (kept,) = (each for name, each in state.items() if name.startswith("Best"))
    assert kept["best_model_path"] == str(checkpoints(1) / "best.ckpt")


@pytest.mark.parametrize("what", ["a link", "another fit's", "no checkpoint"])
def test_what_is_called_best_beside_a_checkpoint_is_looked_at(
    what: str, fit: Fit, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(*STORED, "--trainer.max_epochs", "2") == 0
    best = checkpoints(0) / "best.ckpt"
    if what == "a link":
        secret = here / "secret"
        secret.write_text("SECRET")
        best.unlink()
        best.symlink_to(secret)
    elif what == "another fit's":
        assert fit(*STORED, "--name", "another", "--model.trainable", "layer4", "--trainer.max_epochs", "1") == 0
        shutil.copy("runs/another/version_0/checkpoints/best.ckpt", best)
    else:
        best.write_bytes(b"nothing")
    capsys.readouterr()
    assert fit(*STORED, "--ckpt_path", "last", "--trainer.max_epochs", "3") == 0
    taken = torch.load(checkpoints(1) / "best.ckpt", weights_only=True)
    assert taken["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"] == 3, "of the new epoch"
    if what != "a link":
        assert "best.ckpt is not of this fit" in capsys.readouterr().out


def test_the_command_can_be_pasted_whatever_the_folders_are_called(tmp_path: Path, photos: Path, weights: Path) -> None:
    flags = [*SMALL, "--model.weights", str(weights), "--data.root", str(photos), "--name", "my run; $HOME"]
    flags += ["--trainer.accelerator", "cpu", "--data.batch_size", "8", "--trainer.max_epochs", "2"]
    stopped = start(tmp_path, ["fit", *flags], {"step": 1, "number": signal.SIGTERM})
    assert stopped.wait() == 143, stopped.said
    found = re.search(r"Go on with:\n(.*)\n", stopped.said)
    assert found
    resumed = start(tmp_path, shlex.split(found[1])[3:])
    assert resumed.wait() == 0, resumed.said


def test_throughput_of_an_epoch_that_was_resumed_is_of_this_fit(tmp_path: Path, photos: Path, weights: Path) -> None:
    flags = ["fit", *SMALL, "--model.weights", str(weights), "--data.root", str(photos), "--trainer.accelerator", "cpu"]
    flags += ["--data.batch_size", "8", "--trainer.max_epochs", "1"]
    assert start(tmp_path, flags, {"step": 1, "number": signal.SIGTERM}).wait() == 143
    resumed = start(tmp_path, [*flags, "--ckpt_path", "last"])
    assert resumed.wait() == 0, resumed.said
    assert "not resumable" not in resumed.said
    logged = scalars(tmp_path / "runs/photos/version_1")
    (rate,), (seconds,) = logged.Scalars("train/images_per_second"), logged.Scalars("result/seconds")
    assert rate.value * seconds.value > 16, "two batches of 8, in a part of the fit's time"


def test_within_an_epoch_of_other_data_it_is_refused_and_at_its_end_told(
    tmp_path: Path, photos: Path, weights: Path
) -> None:
    flags = ["fit", *SMALL, "--model.weights", str(weights), "--trainer.accelerator", "cpu", "--data.batch_size", "8"]
    flags += ["--trainer.max_epochs", "3"]
    album = Path(shutil.copytree(photos, tmp_path / "photos"))
    stopped = start(tmp_path, [*flags, "--data.root", "photos"], {"step": 4, "number": signal.SIGTERM})
    assert stopped.wait() == 143, stopped.said
    draw(album / "train/red/more.png", (200, 40, 40), 999)
    refused = start(tmp_path, [*flags, "--data.root", "photos", "--ckpt_path", "last"])
    assert refused.wait() == 2
    assert "within an epoch of other images" in refused.said
    told = start(tmp_path, [*flags, "--data.root", "photos", "--ckpt_path", "best"])
    assert told.wait() == 0, told.said
    assert "not those that it was trained on" in told.said


def test_what_has_had_its_steps_is_refused(fit: Fit, refused: Callable[[int], str]) -> None:
    assert fit(*STORED, "--trainer.max_steps", "2", "--trainer.max_epochs", "5") == 0
    again = ["--ckpt_path", "last", "--trainer.max_steps", "2", "--trainer.max_epochs", "5"]
    assert "has had 2 steps: raise --trainer.max_steps" in refused(fit(*STORED, *again))


def test_a_schedule_of_accumulation_goes_on_within_an_epoch(tmp_path: Path, photos: Path, weights: Path) -> None:
    flags = ["fit", *SMALL, "--model.weights", str(weights), "--data.root", str(photos), "--trainer.accelerator", "cpu"]
    flags += [
        "--data.batch_size",
        "4",
        "--trainer.max_epochs",
        "3",
        "--trainer.callbacks+=GradientAccumulationScheduler",
    ]
    flags += ["--trainer.callbacks.scheduling", "{0: 1, 1: 2}"]
    stopped = start(tmp_path, flags, {"step": 7, "number": signal.SIGTERM})
    assert stopped.wait() == 143, stopped.said
    resumed = start(tmp_path, [*flags, "--ckpt_path", "last"])
    assert resumed.wait() == 0, resumed.said
    last = torch.load(tmp_path / "runs/photos/version_1/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 6 + 3 + 3


def test_averages_of_weights_are_refused(fit: Fit, refused: Callable[[int], str]) -> None:
    said = refused(fit(*STORED, "--trainer.callbacks+=EMAWeightAveraging"))
    assert "averages weights from before there is a head" in said


def test_a_plateau_of_another_metric_can_be_watched(fit: Fit) -> None:
    watched = ["--model.scheduler", "lightning.pytorch.cli.ReduceLROnPlateau", "--model.scheduler.monitor", "val/f1"]
    assert fit(*STORED, *watched, "--trainer.max_epochs", "2") == 0
    first, _ = scalars(Path("runs/photos/version_0")).Scalars("val/f1")
    scheduler = torch.load(checkpoints(0) / "last.ckpt", weights_only=True)["lr_schedulers"][0]
    assert scheduler["best"] == pytest.approx(first.value), "Lightning saves before the scheduler's second step"


def stopping(**wanted: str) -> list[str]:
    """EarlyStopping by the validation loss, which a learning rate of nothing leaves as it is."""
    flags = ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "val/loss"]
    return [*flags, *(each for key, value in wanted.items() for each in (f"--trainer.callbacks.{key}", value))]


@pytest.mark.parametrize(
    ("ended", "more"),
    [
        ({"patience": "2"}, {"patience": "4"}),
        ({"stopping_threshold": "1000"}, {"stopping_threshold": "0"}),
    ],
)
def test_what_early_stopping_has_ended_goes_on_only_where_it_would_not_end_it_again(
    ended: dict[str, str], more: dict[str, str], fit: Fit, refused: Callable[[int], str]
) -> None:
    still = [*STORED, "--model.optimizer.lr", "0", "--trainer.max_epochs", "20"]
    assert fit(*still, *stopping(**ended)) == 0
    had = epochs(checkpoints(0))
    assert had == (3 if "patience" in ended else 1)
    again = [*still, "--ckpt_path", "last"]
    said = refused(fit(*again, *stopping(**ended)))
    assert "EarlyStopping has ended this fit" in said and "val/loss" in said and "leave it out" in said
    assert fit(*again, *stopping(**more)) == 0
    assert epochs(Path(newest())) == 5, "what is asked for now beats the checkpoint"
    assert fit(*still, "--ckpt_path", str(checkpoints(0) / "last.ckpt"), "--trainer.max_epochs", str(had + 1)) == 0


def test_what_ended_a_fit_before_is_not_told_of_the_one_that_goes_on(
    fit: Fit, capsys: pytest.CaptureFixture[str]
) -> None:
    still = [*STORED, "--model.optimizer.lr", "0", "--trainer.max_epochs", "20"]

    def both(loss: str, accuracy: str) -> list[str]:
        first = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "val/loss"]
        second = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "val/accuracy"]
        second += ["--trainer.callbacks.mode", "max", "--trainer.callbacks.patience", accuracy]
        return [*first, "--trainer.callbacks.patience", loss, *second]

    assert fit(*still, *both("2", "3")) == 0
    assert "did not improve in the last 2 records" in capsys.readouterr().out
    assert fit(*still, *both("9", "3"), "--ckpt_path", "last") == 0
    assert "ended: early. Monitored metric val/accuracy did not improve in the last 3" in capsys.readouterr().out


SCHEDULES = {
    "every second epoch": ["--trainer.check_val_every_n_epoch", "2"],
    "within epochs": ["--trainer.val_check_interval", "0.5", "--data.batch_size", "8"],
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_early_stopping_counts_each_validation_once(schedule: str, fit: Fit, here: Path) -> None:
    """A fit that goes on ends where the one ends that was never stopped, from its last checkpoint and its best."""
    still = [*STORED, "--model.optimizer.lr", "0", *SCHEDULES[schedule], *stopping(patience="3")]
    assert fit(*still, "--trainer.max_epochs", "20", "--name", "whole") == 0
    whole = torch.load(here / "runs/whole/version_0/checkpoints/last.ckpt", weights_only=True)
    assert fit(*still, "--trainer.max_epochs", "1" if "within" in schedule else "4", "--name", "part") == 0
    for word in ("last", "best"):
        assert fit(*still, "--trainer.max_epochs", "20", "--name", "part", "--ckpt_path", word) == 0
        gone_on = max(here.glob("runs/part/version_*/checkpoints/last.ckpt"), key=lambda each: each.stat().st_mtime)
        state = torch.load(gone_on, weights_only=True)
        assert state["global_step"] == whole["global_step"], word
        for name, each in whole["callbacks"].items():
            if name.startswith("EarlyStopping"):
                assert state["callbacks"][name]["wait_count"] == each["wait_count"], word


def test_what_min_epochs_holds_open_is_not_taken_for_ended(fit: Fit, here: Path) -> None:
    still = [*STORED, "--model.optimizer.lr", "0", *stopping(patience="1")]  # patience is at an end in the second epoch
    held = [*still, "--trainer.min_epochs", "6", "--trainer.max_epochs", "8"]
    assert fit(*held, "--name", "whole") == 0
    assert epochs(here / "runs/whole/version_0/checkpoints") == 6
    assert fit(*still, "--trainer.min_epochs", "3", "--trainer.max_epochs", "3", "--name", "part") == 0
    assert fit(*held, "--name", "part", "--ckpt_path", "last") == 0
    assert epochs(here / "runs/part/version_1/checkpoints") == 6


def test_the_last_checkpoint_is_of_the_last_epoch_whenever_it_is_validated(fit: Fit) -> None:
    assert fit(*STORED, "--trainer.max_epochs", "5", "--trainer.check_val_every_n_epoch", "2") == 0
    assert epochs(checkpoints(0)) == 5


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_schedule_of_accumulation_goes_on_in_the_epoch_that_is_next(cut: int, fit: Fit, here: Path) -> None:
    scheduled = [*STORED, "--data.batch_size", "8", "--trainer.callbacks", "GradientAccumulationScheduler"]
    scheduled += ["--trainer.callbacks.scheduling", "{0: 1, 2: 2}"]
    assert fit(*scheduled, "--trainer.max_epochs", "4", "--name", "whole") == 0
    assert fit(*scheduled, "--trainer.max_epochs", str(cut), "--name", "part") == 0
    assert fit(*scheduled, "--trainer.max_epochs", "4", "--name", "part", "--ckpt_path", "last") == 0
    whole, part = (
        torch.load(here / f"runs/{name}/checkpoints/last.ckpt", weights_only=True)
        for name in ("whole/version_0", "part/version_1")
    )
    assert whole["global_step"] == part["global_step"] == 10
    assert all(torch.equal(value, part["state_dict"][name]) for name, value in whole["state_dict"].items())


def epochs(folder: Path) -> int:
    """How many a run's last checkpoint has had."""
    state = torch.load(folder / "last.ckpt", weights_only=True)
    return int(state["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])


def newest() -> Path:
    return max(
        Path("runs/photos").glob("version_*/checkpoints/last.ckpt"), key=lambda each: each.stat().st_mtime
    ).parent
