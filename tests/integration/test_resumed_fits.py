"""State that a resumed fit keeps, corrects or refuses: best checkpoint, early stopping, gradient accumulation."""

import errno
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


def test_best_checkpoint_is_carried_over(fit: Fit) -> None:
    fast = ["--model.optimizer", "AdamW", "--model.optimizer.lr", "0.01"]
    assert fit(*STORED, *fast, "--trainer.max_epochs", "6") == 0
    best = (checkpoints(0) / "best.ckpt").read_bytes()
    worse = ["--ckpt_path", "last", "--trainer.max_epochs", "7", "--model.optimizer.lr", "0"]
    assert fit(*STORED, *worse) == 0
    assert (checkpoints(1) / "best.ckpt").read_bytes() == best, "a worse epoch does not replace it"
    state = torch.load(checkpoints(1) / "last.ckpt", weights_only=True)["callbacks"]
    (best_state,) = (value for name, value in state.items() if name.startswith("Best"))
    assert best_state["best_model_path"] == str(checkpoints(1) / "best.ckpt")


def test_best_checkpoint_is_carried_over_twice_with_a_scheduler(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    """Each resumed fit is longer, and so is its schedule; another version of a library changes nothing either."""
    fast = [*STORED, "--model.optimizer", "AdamW", "--model.optimizer.lr", "0.01"]
    assert fit(*fast, "--model.scheduler", "CosineAnnealingLR", "--trainer.max_epochs", "6") == 0
    best = (checkpoints(0) / "best.ckpt").read_bytes()
    worse = ["--ckpt_path", "last", "--model.optimizer.lr", "0"]
    assert fit(*fast, *worse, "--trainer.max_epochs", "7") == 0
    last = torch.load(checkpoints(1) / "last.ckpt", weights_only=True)
    last["transfer"]["versions"]["torchvision"] = "99"
    torch.save(last, checkpoints(1) / "last.ckpt")
    assert fit(*fast, *worse, "--trainer.max_epochs", "8") == 0
    assert (checkpoints(2) / "best.ckpt").read_bytes() == best
    assert "is ignored" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["symlink", "another fit's", "not a checkpoint"])
def test_foreign_best_checkpoint_is_ignored(
    kind: str, fit: Fit, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(*STORED, "--trainer.max_epochs", "2") == 0
    best = checkpoints(0) / "best.ckpt"
    if kind == "symlink":
        secret = here / "secret"
        secret.write_text("SECRET")
        best.unlink()
        best.symlink_to(secret)
    elif kind == "another fit's":
        assert fit(*STORED, "--name", "another", "--model.trainable", "layer4", "--trainer.max_epochs", "1") == 0
        shutil.copy("runs/another/version_0/checkpoints/best.ckpt", best)
    else:
        best.write_bytes(b"nothing")
    capsys.readouterr()
    assert fit(*STORED, "--ckpt_path", "last", "--trainer.max_epochs", "3") == 0
    new_best = torch.load(checkpoints(1) / "best.ckpt", weights_only=True)
    assert new_best["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"] == 3, "from the new epoch"
    if kind != "symlink":
        assert "best.ckpt is ignored" in capsys.readouterr().out


def test_best_checkpoint_of_other_validation_images_is_ignored(
    fit: Fit, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its accuracy cannot be compared; data.per_class leaves the validation images as they are."""
    train = [*STORED, "--data.root", str(photos / "train"), "--name", "photos"]
    assert fit(*train, "--trainer.max_epochs", "1") == 0
    assert fit(*train, "--trainer.max_epochs", "2", "--ckpt_path", "last", "--data.per_class", "4") == 0
    assert "is ignored" not in capsys.readouterr().out
    assert fit(*train, "--trainer.max_epochs", "3", "--ckpt_path", "last", "--data.split_seed", "5") == 0
    assert (
        "version_1/checkpoints/best.ckpt is ignored (damaged, or from another fit or split)" in capsys.readouterr().out
    )
    assert torch.load(checkpoints(2) / "best.ckpt", weights_only=True)["best"]["epoch"] == 2


def test_refused_checkpoint_is_named(fit: Fit, refused: Callable[[int], str]) -> None:
    assert fit(*STORED) == 0
    message = refused(fit(*STORED, "--ckpt_path", "last", "--trainer.max_epochs", "2", "--model.head", "MLPHead"))
    assert f"error: {checkpoints(0)}/last.ckpt: The checkpoint lacks tensor 'head.0.bias'" in message


def test_full_disk_while_a_fit_resumes_is_no_damaged_checkpoint(
    fit: Fit, refused: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    assert fit(*STORED) == 0
    monkeypatch.setattr("project.callbacks.model_checkpoint.atomic_write", fail)
    message = refused(fit(*STORED, "--ckpt_path", "last", "--trainer.max_epochs", "2"))
    assert "best.ckpt: No space left on device. Files that were already saved are intact." in message


def test_printed_resume_command_is_shell_quoted(tmp_path: Path, photos: Path, weights: Path) -> None:
    flags = [*SMALL, "--model.weights", str(weights), "--data.root", str(photos), "--name", "my run; $HOME"]
    flags += ["--trainer.accelerator", "cpu", "--data.batch_size", "8", "--trainer.max_epochs", "2"]
    stopped = start(tmp_path, ["fit", *flags], {"step": 1, "number": signal.SIGTERM})
    assert stopped.wait() == 143, stopped.output
    match = re.search(r"Resume with:\n(.*)\n", stopped.output)
    assert match
    resumed = start(tmp_path, shlex.split(match[1])[3:])
    assert resumed.wait() == 0, resumed.output


def test_throughput_of_a_resumed_epoch_counts_only_the_resumed_batches(
    tmp_path: Path, photos: Path, weights: Path
) -> None:
    flags = ["fit", *SMALL, "--model.weights", str(weights), "--data.root", str(photos), "--trainer.accelerator", "cpu"]
    flags += ["--data.batch_size", "8", "--trainer.max_epochs", "1"]
    assert start(tmp_path, flags, {"step": 1, "number": signal.SIGTERM}).wait() == 143
    resumed = start(tmp_path, [*flags, "--ckpt_path", "last"])
    assert resumed.wait() == 0, resumed.output
    assert "not resumable" not in resumed.output
    logged = scalars(tmp_path / "runs/photos/version_1")
    (rate,), (seconds,) = logged.Scalars("train/images_per_second"), logged.Scalars("result/seconds")
    assert rate.value * seconds.value > 16, "two batches of 8, in part of the run's time"


def test_changed_data_is_refused_within_an_epoch_and_reported_at_its_end(
    tmp_path: Path, photos: Path, weights: Path
) -> None:
    flags = ["fit", *SMALL, "--model.weights", str(weights), "--trainer.accelerator", "cpu", "--data.batch_size", "8"]
    flags += ["--trainer.max_epochs", "3"]
    album = Path(shutil.copytree(photos, tmp_path / "photos"))
    stopped = start(tmp_path, [*flags, "--data.root", "photos"], {"step": 4, "number": signal.SIGTERM})
    assert stopped.wait() == 143, stopped.output
    draw(album / "train/red/more.png", (200, 40, 40), 999)
    refused = start(tmp_path, [*flags, "--data.root", "photos", "--ckpt_path", "last"])
    assert refused.wait() == 2
    assert "the images or labels have changed" in refused.output
    resumed = start(tmp_path, [*flags, "--data.root", "photos", "--ckpt_path", "best"])
    assert resumed.wait() == 0, resumed.output
    assert "the images or labels have changed" in resumed.output


def test_fit_that_has_reached_max_steps_is_refused(fit: Fit, refused: Callable[[int], str]) -> None:
    assert fit(*STORED, "--trainer.max_steps", "2", "--trainer.max_epochs", "5") == 0
    again = ["--ckpt_path", "last", "--trainer.max_steps", "2", "--trainer.max_epochs", "5"]
    assert "2 steps are already complete; increase --trainer.max_steps" in refused(fit(*STORED, *again))


def test_gradient_accumulation_schedule_resumes_within_an_epoch(tmp_path: Path, photos: Path, weights: Path) -> None:
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
    assert stopped.wait() == 143, stopped.output
    resumed = start(tmp_path, [*flags, "--ckpt_path", "last"])
    assert resumed.wait() == 0, resumed.output
    last = torch.load(tmp_path / "runs/photos/version_1/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 6 + 3 + 3


def test_weight_averaging_is_refused(fit: Fit, refused: Callable[[int], str]) -> None:
    message = refused(fit(*STORED, "--trainer.callbacks+=EMAWeightAveraging"))
    assert "is not supported: the head is created later" in message


def test_plateau_scheduler_can_monitor_another_metric(fit: Fit) -> None:
    monitor = ["--model.scheduler", "lightning.pytorch.cli.ReduceLROnPlateau", "--model.scheduler.monitor", "val/f1"]
    assert fit(*STORED, *monitor, "--trainer.max_epochs", "2") == 0
    first, _ = scalars(Path("runs/photos/version_0")).Scalars("val/f1")
    scheduler = torch.load(checkpoints(0) / "last.ckpt", weights_only=True)["lr_schedulers"][0]
    assert scheduler["best"] == pytest.approx(first.value), "the checkpoint precedes the scheduler's second step"


def early_stopping(**options: str) -> list[str]:
    """Flags of EarlyStopping on the validation loss, which is constant with a learning rate of 0."""
    flags = ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "val/loss"]
    return [*flags, *(flag for key, value in options.items() for flag in (f"--trainer.callbacks.{key}", value))]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"patience": "2"}, {"patience": "4"}),
        ({"stopping_threshold": "1000"}, {"stopping_threshold": "0"}),
    ],
)
def test_early_stopped_fit_resumes_only_if_it_would_not_stop_again(
    before: dict[str, str], after: dict[str, str], fit: Fit, refused: Callable[[int], str]
) -> None:
    constant = [*STORED, "--model.optimizer.lr", "0", "--trainer.max_epochs", "20"]
    assert fit(*constant, *early_stopping(**before)) == 0
    completed = epochs(checkpoints(0))
    assert completed == (3 if "patience" in before else 1)
    again = [*constant, "--ckpt_path", "last"]
    message = refused(fit(*again, *early_stopping(**before)))
    assert "EarlyStopping has stopped this fit" in message and "val/loss" in message and "remove it" in message
    assert fit(*again, *early_stopping(**after)) == 0
    assert epochs(newest("photos").parent) == 5, "the new arguments override the checkpoint"
    assert (
        fit(*constant, "--ckpt_path", str(checkpoints(0) / "last.ckpt"), "--trainer.max_epochs", str(completed + 1))
        == 0
    )


def test_stop_reason_of_the_previous_run_is_not_reported_again(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    constant = [*STORED, "--model.optimizer.lr", "0", "--trainer.max_epochs", "20"]

    def both(loss: str, accuracy: str) -> list[str]:
        first = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "val/loss"]
        second = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "val/accuracy"]
        second += ["--trainer.callbacks.mode", "max", "--trainer.callbacks.patience", accuracy]
        return [*first, "--trainer.callbacks.patience", loss, *second]

    assert fit(*constant, *both("2", "3")) == 0
    assert "did not improve in the last 2 records" in capsys.readouterr().out
    assert fit(*constant, *both("9", "3"), "--ckpt_path", "last") == 0
    assert "stopped early: Monitored metric val/accuracy did not improve in the last 3" in capsys.readouterr().out


#: When validations run: the flags.
VALIDATIONS = {
    "every second epoch": ["--trainer.check_val_every_n_epoch", "2"],
    "within epochs": ["--trainer.val_check_interval", "0.5", "--data.batch_size", "8"],
}


@pytest.mark.parametrize("name", VALIDATIONS)
def test_early_stopping_counts_each_validation_once(name: str, fit: Fit, here: Path) -> None:
    """A fit resumed from last.ckpt or best.ckpt stops at the same step as an uninterrupted one."""
    constant = [*STORED, "--model.optimizer.lr", "0", *VALIDATIONS[name], *early_stopping(patience="3")]
    assert fit(*constant, "--trainer.max_epochs", "20", "--name", "uninterrupted") == 0
    uninterrupted = torch.load(here / "runs/uninterrupted/version_0/checkpoints/last.ckpt", weights_only=True)
    assert fit(*constant, "--trainer.max_epochs", "1" if "within" in name else "4", "--name", "resumed") == 0
    for resumed in ("last", "best"):
        assert fit(*constant, "--trainer.max_epochs", "20", "--name", "resumed", "--ckpt_path", resumed) == 0
        checkpoint = torch.load(newest("resumed"), weights_only=True)
        assert checkpoint["global_step"] == uninterrupted["global_step"], resumed
        for key, state in uninterrupted["callbacks"].items():
            if key.startswith("EarlyStopping"):
                assert checkpoint["callbacks"][key]["wait_count"] == state["wait_count"], resumed


def test_fit_that_min_epochs_extends_is_not_refused_as_stopped(fit: Fit, here: Path) -> None:
    constant = [
        *STORED,
        "--model.optimizer.lr",
        "0",
        *early_stopping(patience="1"),
    ]  # would stop after the second epoch
    extended = [*constant, "--trainer.min_epochs", "6", "--trainer.max_epochs", "8"]
    assert fit(*extended, "--name", "uninterrupted") == 0
    assert epochs(here / "runs/uninterrupted/version_0/checkpoints") == 6
    assert fit(*constant, "--trainer.min_epochs", "3", "--trainer.max_epochs", "3", "--name", "resumed") == 0
    assert fit(*extended, "--name", "resumed", "--ckpt_path", "last") == 0
    assert epochs(here / "runs/resumed/version_1/checkpoints") == 6


def test_last_checkpoint_is_from_the_last_epoch_even_without_validation(fit: Fit) -> None:
    assert fit(*STORED, "--trainer.max_epochs", "5", "--trainer.check_val_every_n_epoch", "2") == 0
    assert epochs(checkpoints(0)) == 5


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_gradient_accumulation_schedule_resumes_at_the_next_epoch(cut: int, fit: Fit, here: Path) -> None:
    scheduled = [*STORED, "--data.batch_size", "8", "--trainer.callbacks", "GradientAccumulationScheduler"]
    scheduled += ["--trainer.callbacks.scheduling", "{0: 1, 2: 2}"]
    assert fit(*scheduled, "--trainer.max_epochs", "4", "--name", "uninterrupted") == 0
    assert fit(*scheduled, "--trainer.max_epochs", str(cut), "--name", "resumed") == 0
    assert fit(*scheduled, "--trainer.max_epochs", "4", "--name", "resumed", "--ckpt_path", "last") == 0
    uninterrupted, resumed = (
        torch.load(here / f"runs/{name}/checkpoints/last.ckpt", weights_only=True)
        for name in ("uninterrupted/version_0", "resumed/version_1")
    )
    assert uninterrupted["global_step"] == resumed["global_step"] == 10
    assert all(torch.equal(value, resumed["state_dict"][name]) for name, value in uninterrupted["state_dict"].items())


def test_capturable_optimizer_is_refused_on_a_cpu(fit: Fit, refused: Callable[[int], str]) -> None:
    adam = ["--model.optimizer", "AdamW", "--model.optimizer.lr", "0.01"]
    assert "capturable true needs a GPU" in refused(fit(*STORED, *adam, "--model.optimizer.capturable", "true"))
    assert fit(*STORED, *adam) == 0
    checkpoint = torch.load(newest("photos"), weights_only=True)  # changed to what a fit on a GPU saves
    checkpoint["hyper_parameters"]["optimizer"]["init_args"]["capturable"] = True
    for group in checkpoint["optimizer_states"][0]["param_groups"]:
        group["capturable"] = True
    torch.save(checkpoint, "gpu.ckpt")
    resume = [*STORED, "--ckpt_path", "gpu.ckpt", "--trainer.max_epochs", "2"]
    assert "AdamW with capturable true needs a GPU" in refused(fit(*resume))
    assert fit(*resume, "--model.optimizer.capturable", "false") == 0


def epochs(folder: Path) -> int:
    """Number of epochs that the run's last checkpoint has completed."""
    state = torch.load(folder / "last.ckpt", weights_only=True)
    return int(state["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])


def newest(run: str) -> Path:
    """The newest ``last.ckpt`` of a run."""
    return max(Path("runs", run).glob("version_*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)
