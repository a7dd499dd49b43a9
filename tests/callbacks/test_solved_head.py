"""A fit starts from the solved head: chosen within train, validated as epoch 0, and kept if no epoch is better."""

import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional

from project import load
from project.cli.main import main
from project.features import head_fitting
from project.models.head_solver import HeadSolution
from project.reporting.dashboard import Dashboard
from tests import forked
from tests.conftest import BACKBONE, FEATURES, SMALL, SOLVED, STORED, draw, scalars

Fit = Callable[..., int]
DEFAULT = [*STORED, *SOLVED]
VERSION = Path("runs/photos/version_0")
NO_TRAINING = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0"]


def checkpoint(name: str = "best", version: Path = VERSION) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(version / f"checkpoints/{name}.ckpt", weights_only=True)
    return state


def head(name: str = "best", version: Path = VERSION) -> dict[str, torch.Tensor]:
    return {key: value for key, value in checkpoint(name, version)["state_dict"].items() if key.startswith("head.")}


def test_the_solved_head_is_epoch_0(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(*DEFAULT, *NO_TRAINING, "--trainer.max_epochs", "2") == 0
    output = capsys.readouterr().out
    solved = re.search(
        r"Head: solved in [\d.]+ s on 24 training images: .* L2 penalty ([\d.e+-]+), chosen by 5-fold", output
    )
    assert solved
    rows = re.findall(r"^ *([\d.e+-]+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+) *(chosen)?", output, re.MULTILINE)
    assert len(rows) >= 10
    (chosen,) = (row for row in rows if row[5])
    assert float(chosen[0]) == pytest.approx(float(solved[1]), rel=0.01)
    assert float(chosen[3]) == min(float(row[3]) for row in rows)

    accuracy = scalars(VERSION).Scalars("val/accuracy")
    assert accuracy[0].step == 0
    assert len(accuracy) == 3
    assert f"Epoch 0, the solved head: val/accuracy {accuracy[0].value:.4f}" in output
    assert "best epoch: 0, " in output
    assert checkpoint()["best"]["epoch"] == -1
    assert checkpoint()["global_step"] == 0
    # The epochs with a learning rate of 0 have changed nothing.
    assert all(torch.equal(value, head("last")[key]) for key, value in head().items())


def test_the_checkpoint_of_epoch_0_predicts_as_it_was_validated(fit: Fit, photos: Path) -> None:
    assert fit(*DEFAULT, *NO_TRAINING) == 0
    model = load(VERSION / "checkpoints/best.ckpt")
    images = sorted((photos / "val").glob("*/*"))
    predicted = model.predict(images)
    accuracy = sum(name == path.parent.name for name, path in zip(predicted, images, strict=True)) / len(images)
    assert accuracy == pytest.approx(scalars(VERSION).Scalars("val/accuracy")[0].value)


def test_the_model_card_says_that_epoch_0_is_the_best(fit: Fit) -> None:
    assert fit(*DEFAULT, *NO_TRAINING) == 0
    card = (VERSION / "model_card.md").read_text()
    assert "Results of the best epoch (0 of 1)" in card
    assert "- Initial head: solved by logistic regression" in card


def test_an_epoch_that_is_better_replaces_it(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best epoch is the first one with the highest accuracy."""
    assert fit(*DEFAULT, "--trainer.max_epochs", "4", "--model.optimizer", "AdamW", "--model.optimizer.lr", "0.05") == 0
    values = [event.value for event in scalars(VERSION).Scalars("val/accuracy")]
    assert checkpoint()["best"]["epoch"] == values.index(max(values)) - 1


def test_random_starts_without_epoch_0(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(*DEFAULT, "--model.head_init", "random") == 0
    assert "Head:" not in capsys.readouterr().out
    assert len(scalars(VERSION).Scalars("val/accuracy")) == 1


@pytest.mark.parametrize(
    ("flags", "reason", "fix"),
    [
        (["--model.head", "project.models.heads.MLPHead"], "MLPHead is not linear", "Use LinearHead, or a head with"),
        (["--trainer.limit_train_batches", "2"], "leaves out training images", "Remove them"),
        (["--trainer.limit_train_batches", "1"], "leaves out training images", "Remove them"),
    ],
    ids=["not linear", "two batches", "one batch"],
)
def test_where_it_cannot_be_solved(
    fit: Fit, refused: Callable[[int], str], capsys: pytest.CaptureFixture[str], flags: list[str], reason: str, fix: str
) -> None:
    assert fit("--features.folder", "store", "--data.batch_size", "8", *SOLVED, *flags) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("Head:"))
    assert line.startswith("Head: not solved, because ")
    assert reason in line
    message = refused(
        fit("--features.folder", "store", "--data.batch_size", "8", *flags, "--model.head_init", "solved")
    )
    assert f"model.head_init solved: the head cannot be computed, because {reason}" in message.replace(
        "trainer.limit_train_batches or overfit_batches ", ""
    )
    assert f"\n{fix}" in message and message.endswith(", or use --model.head_init auto.\n")


def test_heads_that_exceed_the_memory_are_not_solved(
    fit: Fit, refused: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("project.callbacks.head_obstacles.row_memory_budget", lambda *_: 1000)
    message = refused(fit(*STORED, "--model.head_init", "solved"))
    assert "5 heads of 3 classes exceed the memory.\nUse --model.head_init random, or" in message


def test_features_that_trainable_stages_would_repeat_are_not_solved(
    fit: Fit, refused: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("project.callbacks.head_obstacles.COPIES", 10**12)
    message = refused(fit(*STORED, "--model.head_init", "solved", "--model.trainable", "layer4"))
    assert "the features do not fit in memory" in message and "\nUse --model.trainable head, or fewer" in message


def test_a_head_without_parameters_and_fit_is_refused(fit: Fit, refused: Callable[[int], str]) -> None:
    message = refused(fit(*DEFAULT, "--model.head", "torch.nn.Identity"))
    assert "Identity has to be computed from the training images, but Identity is not linear and has" in message
    assert "\nUse LinearHead, or a head with a method fit." in message


class Plain(pl.LightningModule):
    """A module of a user, with nothing of this project."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        return None

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        return None

    def configure_optimizers(self) -> None:
        return None


@pytest.mark.filterwarnings("ignore:.*")
def test_a_fit_of_no_epochs_of_another_module(here: Path) -> None:
    from project.trainer import Trainer

    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=0, accelerator="cpu", **options)
    loader = torch.utils.data.DataLoader(torch.zeros(4, 1))
    trainer.fit(Plain(), loader, loader)
    assert trainer.state.finished


def test_validation_images_choose_nothing(fit: Fit, photos: Path, here: Path) -> None:
    """The head is the same for other validation images."""
    assert fit(*DEFAULT, *NO_TRAINING) == 0
    others = here / "others/photos"
    shutil.copytree(photos, others)
    for path in sorted(others.glob("val/*/*")):
        draw(path, (90, 90, 90), seed=int(path.stem))
    assert fit(*DEFAULT, *NO_TRAINING, "--data.root", str(others)) == 0
    second = head(version=VERSION.with_name("version_1"))
    assert all(torch.equal(value, second[key]) for key, value in head().items())


def test_a_resumed_fit_keeps_its_head(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*DEFAULT, "--model.optimizer", "AdamW", "--model.optimizer.lr", "0.01"]
    assert fit(*flags, "--trainer.max_epochs", "3") == 0
    assert fit(*flags, "--trainer.max_epochs", "1") == 0
    capsys.readouterr()
    second, third = (VERSION.with_name(f"version_{number}") for number in (1, 2))
    resumed = ["--ckpt_path", str(second / "checkpoints/last.ckpt"), "--trainer.max_epochs", "3"]
    assert fit(*flags, *resumed) == 0
    assert "Head:" not in capsys.readouterr().out
    assert all(torch.equal(value, head("last", third)[key]) for key, value in head("last").items())
    assert checkpoint("best", third)["best"]["metrics"] == checkpoint("best")["best"]["metrics"]


PLATEAU = ["--model.scheduler", "torch.optim.lr_scheduler.ReduceLROnPlateau", "--model.scheduler.patience", "0"]


@pytest.mark.parametrize("scheduler", [[], PLATEAU], ids=["no schedule", "plateau schedule"])
def test_the_checkpoint_of_epoch_0_can_be_resumed(fit: Fit, scheduler: list[str]) -> None:
    flags = [*DEFAULT, "--model.optimizer", "AdamW", "--model.optimizer.lr", "0.0001", "--trainer.max_epochs", "3"]
    flags += scheduler
    assert fit(*flags) == 0
    assert checkpoint()["best"]["epoch"] == -1
    assert fit(*flags, "--ckpt_path", str(VERSION / "checkpoints/best.ckpt")) == 0
    resumed = head("last", VERSION.with_name("version_1"))
    assert all(torch.equal(value, resumed[key]) for key, value in head("last").items())


def test_a_fit_that_is_interrupted_in_epoch_0_validates_it_when_resumed(
    fit: Fit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*DEFAULT, "--model.optimizer", "AdamW", "--model.optimizer.lr", "0.0001", "--trainer.max_epochs", "2"]
    assert fit(*flags) == 0

    def interrupt(_: Dashboard, trainer: pl.Trainer, *args: Any) -> None:
        if not trainer.sanity_checking:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Dashboard, "on_validation_start", interrupt)
        assert fit(*flags) == 143
    second, third = (VERSION.with_name(f"version_{number}") for number in (1, 2))
    assert not (second / "checkpoints/best.ckpt").exists()
    capsys.readouterr()
    assert fit(*flags, "--ckpt_path", str(second / "checkpoints/last.ckpt")) == 0
    output = capsys.readouterr().out
    assert "Epoch 0, the solved head: " in output
    assert "Head:" not in output
    for name in ("best", "last"):
        assert all(torch.equal(value, head(name, third)[key]) for key, value in head(name).items())
    assert checkpoint("best", third)["best"]["epoch"] == -1


def kill_in_the_solver() -> None:
    """Kill the process with SIGKILL once half of the penalties are solved."""
    solve = head_fitting.solve_head

    def killed(*arguments: Any, **options: Any) -> HeadSolution:
        def on_progress(done: int, total: int) -> None:
            if done == 5:
                os.kill(os.getpid(), signal.SIGKILL)

        return solve(*arguments[:-1], on_progress, **options)

    head_fitting.solve_head = killed  # type: ignore[assignment]


def test_a_fit_killed_in_the_solver_repeats_with_equal_bits(here: Path, photos: Path, weights: Path) -> None:
    flags = ["fit", *SMALL, *SOLVED, *STORED, "--model.weights", str(weights), "--data.root", str(photos)]
    flags += ["--trainer.max_epochs", "1", "--ckpt_path", "last"]
    assert forked.start(here, flags, prepare=kill_in_the_solver).wait(120) == -signal.SIGKILL
    assert not list(here.glob("runs/photos/*/checkpoints/*"))
    assert main(flags) == 0
    after_kill = head("last", here / "runs/photos/version_1")
    shutil.move("runs", "killed")
    assert main(flags) == 0
    whole = head("last")
    assert all(torch.equal(whole[name], after_kill[name]) for name in whole)


@pytest.mark.parametrize("flags", [["--data.balance", "sampler"], ["--data.balance", "loss"]], ids=["sampler", "loss"])
def test_balancing_applies_to_the_solved_head(
    fit: Fit, photos: Path, resnet18_weights: Path, here: Path, flags: list[str]
) -> None:
    """The sampler draws each class equally often, the loss weights each class equally: the same head."""
    imbalanced = here / "few/photos"
    shutil.copytree(photos, imbalanced)
    for number in range(2, 8):
        (imbalanced / f"train/red/{number}.png").unlink()
    one = ["--data.root", str(imbalanced), *DEFAULT, *NO_TRAINING]
    # With the features of the small network, the bias alone does not show it.
    one += ["--model.backbone", "resnet18", "--model.weights", str(resnet18_weights)]
    assert fit(*one) == 0
    assert fit(*one, *flags) == 0
    plain, balanced = head()["head.bias"], head(version=VERSION.with_name("version_1"))["head.bias"]
    red = 2
    assert float(balanced[red] - balanced.mean()) > float(plain[red] - plain.mean())


def test_the_sampler_class_weights_and_label_smoothing_apply_together(
    fit: Fit, photos: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imbalanced = here / "few/photos"
    shutil.copytree(photos, imbalanced)
    for number in range(2, 8):
        (imbalanced / f"train/red/{number}.png").unlink()  # 8, 8 and 2 images
    seen: list[torch.Tensor] = []
    solve = head_fitting.solve_head

    def record(rows: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(rows.targets(torch.arange(3)))
        return solve(rows, *args, **kwargs)

    monkeypatch.setattr(head_fitting, "solve_head", record)
    flags = ["--data.balance", "sampler", "--model.class_weights", "[1, 2, 3]", "--model.label_smoothing", "0.3"]
    assert fit("--data.root", str(imbalanced), *DEFAULT, *flags) == 0
    smoothed = torch.eye(3) * torch.tensor([1.0, 2, 3])[:, None] * 0.7 + 0.1 * torch.tensor([1.0, 2, 3])
    drawn = 18 / (3 * torch.tensor([8.0, 8, 2]))
    torch.testing.assert_close(seen[0], smoothed * drawn[:, None])


def test_early_stopping_does_not_see_epoch_0(fit: Fit) -> None:
    """Its metric may be one of training, which epoch 0 does not have."""
    Path("stop.yaml").write_text(
        "trainer:\n  callbacks:\n  - class_path: lightning.pytorch.callbacks.EarlyStopping\n"
        "    init_args: {monitor: train/loss, patience: 1}\n"
    )
    flags = [*DEFAULT, "-c", "stop.yaml", "--trainer.max_epochs", "2", "--trainer.check_val_every_n_epoch", "2"]
    assert fit(*flags) == 0


def test_a_fit_without_validation_does_not_validate_epoch_0_when_resumed(
    fit: Fit, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(*DEFAULT, "--trainer.limit_val_batches", "0") == 0
    last = ["--ckpt_path", str(VERSION / "checkpoints/last.ckpt")]
    assert fit(*DEFAULT, "--trainer.max_epochs", "2", "--trainer.limit_val_batches", "1.0", *last) == 0
    assert "Epoch 0" not in capsys.readouterr().out


def test_all_views_count(fit: Fit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, float]] = []
    solve = head_fitting.solve_head

    def record(rows: Any, *args: Any, **kwargs: Any) -> Any:
        features = rows.read(slice(None))
        folds = rows.folds.view(3, -1)
        assert torch.equal(folds[0], folds[1]) and torch.equal(folds[0], folds[2])  # an image's views share a fold
        assert not torch.equal(features[:24], features[24:48])
        seen.append((len(features), float(rows.targets(rows.labels).sum())))
        return solve(rows, *args, **kwargs)

    monkeypatch.setattr(head_fitting, "solve_head", record)
    assert fit(*DEFAULT, "--data.augment", "standard", "--features.views", "3") == 0
    assert seen == [(72, pytest.approx(24))]


def test_trainable_stages_get_the_features_of_the_untrained_ones(fit: Fit) -> None:
    """With layer4 trainable, the initial head is the one that is solved with layer4 frozen."""
    assert fit(*DEFAULT, *NO_TRAINING) == 0
    assert fit(*DEFAULT, *NO_TRAINING, "--model.trainable", "layer4") == 0
    second = head(version=VERSION.with_name("version_1"))
    for key, value in head().items():
        torch.testing.assert_close(second[key], value, atol=1e-3, rtol=1e-2)


LIVE = ["--features.cache", "off", *SOLVED, "--trainer.accelerator", "cpu"]


@pytest.mark.parametrize(
    "flags",
    [
        LIVE,
        [*LIVE, "--data.num_workers", "1", "--data.batch_size", "7"],
        [*SOLVED, "--data.mixup", "0.2"],
        [*LIVE, "--model.trainable", "layer4"],
        [*SOLVED, "--model.trainable", "all"],
    ],
    ids=["cache off", "worker", "mixup", "layer4", "all"],
)
def test_features_that_are_not_stored_are_computed_once_for_the_solver(
    fit: Fit, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    """The initial head is that of the probe on stored features, and so is the accuracy of epoch 0."""
    assert fit(*DEFAULT, "--trainer.max_epochs", "0") == 0
    capsys.readouterr()
    assert fit(*flags, "--trainer.max_epochs", "0") == 0
    output = capsys.readouterr().out
    assert "Head: features of 24 training images computed once in " in output
    assert "Head: solved in " in output and "Epoch 0, the solved head: " in output
    second = VERSION.with_name("version_1")
    for key, value in head().items():
        torch.testing.assert_close(head(version=second)[key], value, atol=1e-3, rtol=1e-2)
    accuracies = [scalars(version).Scalars("val/accuracy")[0].value for version in (VERSION, second)]
    assert accuracies[0] == accuracies[1]


@pytest.mark.parametrize("kind", ["PrototypeHead", "CosineHead"])
def test_heads_that_compute_themselves_need_no_stored_features(fit: Fit, kind: str) -> None:
    flags = ["--model.head", f"project.models.heads.{kind}", "--trainer.max_epochs", "0"]
    assert fit(*DEFAULT, *flags) == 0
    assert fit(*LIVE, *flags) == 0
    torch.testing.assert_close(head(version=VERSION.with_name("version_1")), head(), atol=1e-4, rtol=1e-3)


def test_a_sample_of_features_that_are_not_stored(
    fit: Fit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("project.features.head_fitting.MAX_WORK", {"cpu": 12 * FEATURES * 3})
    monkeypatch.setattr("project.features.head_fitting.MIN_SAMPLE", 1)
    assert fit(*LIVE) == 0
    assert "on a sample of 12 images" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [[], ["--model.head", "project.models.heads.CosineHead"]], ids=["linear", "cosine"])
def test_features_that_are_neither_stored_nor_fit_in_memory(
    fit: Fit, refused: Callable[[int], str], monkeypatch: pytest.MonkeyPatch, kind: list[str]
) -> None:
    monkeypatch.setattr("project.callbacks.head_obstacles.row_memory_budget", lambda *_: 5 * 4 * 23 * FEATURES)
    message = refused(fit(*LIVE, *kind, "--model.head_init", "solved"))
    assert "no features are stored, and those of all training images do not fit in memory.\nUse --features" in message
    monkeypatch.setattr("project.callbacks.head_obstacles.row_memory_budget", lambda *_: 10**9)
    assert fit(*LIVE, *kind, "--model.head_init", "solved") == 0


def test_a_fast_dev_run_solves_nothing(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(*LIVE, "--trainer.fast_dev_run", "true") == 0
    assert "Head: not solved, because trainer.fast_dev_run runs only a few batches" in capsys.readouterr().out


def test_rows_that_exceed_the_memory_are_sampled(
    fit: Fit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fit(*DEFAULT, *NO_TRAINING) == 0
    capsys.readouterr()
    monkeypatch.setattr("project.callbacks.head_obstacles.row_memory_budget", lambda *_: 1_000_000)
    monkeypatch.setattr("project.callbacks.head_obstacles.COPIES", 1_000_000 // (4 * 12 * FEATURES))
    monkeypatch.setattr("project.features.head_fitting.MIN_SAMPLE", 1)
    assert fit(*DEFAULT, *NO_TRAINING) == 0
    assert "chosen by 5-fold cross-validation on a sample of 12 images" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode")
def test_python_users_get_it_with_the_feature_cache(photos: Path, weights: Path, here: Path) -> None:
    from project.callbacks.feature_cache import FeatureCache
    from project.classifier import ImageClassifier
    from project.data.datamodule import ImageDataModule
    from project.trainer import Trainer

    model = ImageClassifier(BACKBONE, str(weights), image_size=32)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=1, callbacks=[FeatureCache(folder="store")], accelerator="cpu", **options)
    data = ImageDataModule(str(photos), num_workers=0)
    trainer.fit(model, datamodule=data)
    assert isinstance(model.head, nn.Linear)
    assert float(trainer.callback_metrics["train/accuracy"]) == 1.0

    trained = model.head.weight.clone()
    model.head.weight.data.mul_(2)
    again = Trainer(max_epochs=0, callbacks=[FeatureCache(folder="store")], accelerator="cpu", **options)
    again.fit(model, datamodule=data)
    assert torch.equal(model.head.weight, 2 * trained), "a trained head is kept"


PROTOTYPES = ["--model.head", "project.models.heads.PrototypeHead"]
NEIGHBORS = ["--model.head", "project.models.heads.KNNHead"]


@pytest.mark.parametrize("kind", [PROTOTYPES, NEIGHBORS], ids=["prototypes", "neighbors"])
def test_a_head_that_is_not_trained(
    fit: Fit, photos: Path, kind: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """It is validated and saved without an epoch; its checkpoints load, predict, validate and resume."""
    assert fit(*DEFAULT, *kind, "--trainer.max_epochs", "5") == 0
    output, name = capsys.readouterr().out, kind[1].rpartition(".")[2]
    assert f"Epochs: none, because {name} has no parameters to train" in output
    assert "from 24 rows of 24 training images" in output
    accuracy = scalars(VERSION).Scalars("val/accuracy")
    assert len(accuracy) == 1
    assert f"Epoch 0, the computed {name}: val/accuracy {accuracy[0].value:.4f}" in output
    assert f"best val/accuracy: {accuracy[0].value:.4f}" in output
    assert f"- Initial head: {name} computed from 24 rows" in (VERSION / "model_card.md").read_text()
    assert all(torch.equal(value, head("last")[key]) for key, value in head().items())

    paths = sorted((photos / "val").glob("*/*"))
    predicted = load(VERSION / "checkpoints/best.ckpt").predict(paths)
    correct = sum(name == path.parent.name for name, path in zip(predicted, paths, strict=True))
    assert correct / len(paths) == pytest.approx(accuracy[0].value)

    best, last = (str(VERSION / f"checkpoints/{name}.ckpt") for name in ("best", "last"))
    assert main(["validate", "--ckpt_path", best, "--data.root", str(photos), "--data.num_workers", "0"]) == 0
    assert f"val/accuracy: {accuracy[0].value:.4f}" in capsys.readouterr().out
    assert fit(*DEFAULT, "--ckpt_path", last, "--trainer.max_epochs", "5") == 2
    assert f"{name} is computed and not trained, so there is nothing to resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--trainer.limit_train_batches", "1"], "leaves out training images.\nRemove them"),
        (["--model.head_init", "random"], "model.head_init random has no effect on PrototypeHead"),
        (["--data.balance", "sampler"], "data.balance has no effect"),
        (["--model.label_smoothing", "0.1"], "model.label_smoothing has no effect"),
        (["--model.class_weights", "[1, 2, 3]"], "model.class_weights has no effect"),
        (["--model.trainable", "layer4"], "model.trainable layer4"),
        (["--model.head_init", "solved_1se"], "no penalty for solved_1se.\nUse --model.head_init solved."),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_a_head_that_is_not_trained_refuses(
    fit: Fit, refused: Callable[[int], str], flags: list[str], reason: str
) -> None:
    assert reason in refused(fit("--features.folder", "store", *SOLVED, *PROTOTYPES, *flags))


COSINE = ["--model.head", "project.models.heads.CosineHead"]


def test_a_cosine_head_starts_from_the_class_means_and_is_trained(
    fit: Fit, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(*DEFAULT, *COSINE, "--trainer.max_epochs", "0") == 0
    assert "Epoch 0, the computed CosineHead: " in capsys.readouterr().out
    model, start = load(VERSION / "checkpoints/best.ckpt"), head()["head.weight"]
    for name, vector in zip(model.classes_, start, strict=True):
        features = torch.from_numpy(model.features(sorted((photos / "train" / name).glob("*"))))
        torch.testing.assert_close(vector, functional.normalize(features, dim=1).mean(0), atol=1e-4, rtol=1e-3)
    assert fit(*DEFAULT, *COSINE, "--model.optimizer", "AdamW", "--model.optimizer.lr", "0.01") == 0
    trained = head("last", VERSION.with_name("version_1"))["head.weight"]
    assert not torch.equal(trained, start)
    torch.testing.assert_close(trained, start, atol=0.03, rtol=0)  # three steps of 0.01


def test_the_penalty_of_a_cosine_head_is_refused(fit: Fit, refused: Callable[[int], str]) -> None:
    message = refused(fit(*DEFAULT, *COSINE, "--model.head_init", "solved_1se"))
    assert "model.head_init solved_1se: the head cannot be computed, because CosineHead has no penalty" in message
    assert "\nUse --model.head_init solved, or use --model.head_init auto." in message


def test_all_views_count_for_a_head_that_is_not_trained(fit: Fit) -> None:
    assert fit(*DEFAULT, *NEIGHBORS, "--data.augment", "standard", "--features.views", "3") == 0
    assert head()["head.rows"].shape == (72, FEATURES)


@pytest.mark.parametrize("flags", [SOLVED, ["--model.head_init", "random"]], ids=["solved", "random"])
def test_a_fit_of_no_epochs_validates_and_saves_the_head(
    fit: Fit, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    assert fit(*STORED, *flags, "--trainer.max_epochs", "0") == 0
    output = capsys.readouterr().out
    (accuracy,) = scalars(VERSION).Scalars("val/accuracy")
    described = "the solved head" if flags == SOLVED else "the initial head"
    assert f"Epoch 0, {described}: val/accuracy {accuracy.value:.4f}" in output
    assert f"best val/accuracy: {accuracy.value:.4f}" in output
    assert all(torch.equal(value, head("last")[key]) for key, value in head().items())
    assert load(VERSION / "checkpoints/last.ckpt").classes_ == ["blue", "green", "red"]


def test_a_fit_of_no_epochs_without_validation_saves_the_head(fit: Fit) -> None:
    assert fit(*DEFAULT, "--trainer.max_epochs", "0", "--trainer.limit_val_batches", "0") == 0
    assert head("last")["head.weight"].shape == (3, FEATURES)


def test_one_image_of_each_class_is_solved_with_a_fixed_penalty(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(*DEFAULT, "--data.per_class", "1") == 0
    output = capsys.readouterr().out
    assert "on 3 training images: logistic regression with L2 penalty 1, fixed, because no class has two" in output
    assert "Epoch 0, the solved head: " in output


def test_two_images_of_each_class_are_cross_validated(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(*DEFAULT, "--data.per_class", "2") == 0
    assert re.search(r"on 6 training images: .* chosen by [2-5]-fold cross-validation", capsys.readouterr().out)
