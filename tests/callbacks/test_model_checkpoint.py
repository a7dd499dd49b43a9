"""best.ckpt is never worse than the head that a fit began with, and the result says what training has gained."""

import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from project import load
from project.callbacks.model_checkpoint import BestCheckpoint
from project.classifier import ImageClassifier
from project.data.datamodule import ImageDataModule
from project.evaluation.gain import CorrectImages
from project.evaluation.paired_intervals import newcombe_paired
from project.trainer import Trainer
from tests.conftest import BACKBONE, COLOURS, SMALL, SOLVED, STORED, draw, scalars
from tests.forked import start

Fit = Callable[..., int]
RUNS = Path("runs/photos")
#: The learning rate times the weight decay is 2, so a step changes the sign of all weights.
HARMFUL = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.001", "--trainer.max_epochs", "1"]
HARMFUL += ["--model.optimizer.weight_decay", "2000"]
HELPFUL = ["--model.optimizer", "AdamW", "--model.optimizer.lr", "0.01", "--trainer.max_epochs", "6"]
HELPFUL += ["--data.batch_size", "8"]
#: A fit that ends with random weights of the head.
UNTRAINED = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0", "--trainer.max_epochs", "1"]


def path(version: int, name: str = "best") -> Path:
    return RUNS / f"version_{version}/checkpoints/{name}.ckpt"


def read(version: int, name: str = "best") -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(path(version, name), weights_only=True)
    return checkpoint


def initial(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """State of the results of epoch 0."""
    (key,) = (key for key in checkpoint["callbacks"] if key.startswith("Best"))
    state: dict[str, Any] = checkpoint["callbacks"][key]["initial"]
    return state


def gain_line(output: str) -> str:
    """The gain in a result, without line breaks of the table."""
    match = re.search(r"gain over the initial head: (.*?)\n *(checkpoint|start):", output, re.DOTALL)
    assert match, output
    return " ".join(match[1].split())


@pytest.mark.parametrize(
    "flags",
    [
        [*STORED, "--model.trainable", "layer4"],
        ["--features.cache", "off", "--model.trainable", "layer4"],
        ["--model.trainable", "all"],
        STORED,
    ],
    ids=["layer4 stored", "layer4 live", "all", "head"],
)
def test_training_that_only_harms_keeps_the_solved_head(
    fit: Fit, photos: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    assert fit(*SOLVED, *flags, *HARMFUL) == 0
    output = capsys.readouterr().out
    accuracies = [event.value for event in scalars(path(0).parents[1]).Scalars("val/accuracy")]
    assert len(accuracies) == 2 and accuracies[1] < accuracies[0]
    assert read(0)["best"]["epoch"] == -1
    assert gain_line(output) == "none: no epoch is better on 12 images"
    card = (path(0).parents[1] / "model_card.md").read_text()
    assert "over the initial head (epoch 0): none: no epoch is better on 12 images.\n" in card
    assert fit(*SOLVED, *flags, *HARMFUL, "--trainer.max_epochs", "0") == 0
    assert "gain over" not in capsys.readouterr().out, "there is no epoch to compare"
    for name, tensor in read(1)["state_dict"].items():
        assert torch.equal(read(0)["state_dict"][name], tensor), name


@pytest.mark.parametrize("trainable", ["layer4", "all"])
def test_training_that_only_harms_keeps_the_head_of_the_checkpoint_that_it_started_from(
    fit: Fit, capsys: pytest.CaptureFixture[str], trainable: str
) -> None:
    assert fit(*STORED, *SOLVED, "--trainer.max_epochs", "0") == 0
    flags = ["--ckpt_path", str(path(0)), "--model.trainable", trainable, *HARMFUL]
    for more in (SOLVED, ["--model.head_init", "random"]):
        assert fit(*flags, *more) == 0
    assert gain_line(capsys.readouterr().out) == "none: no epoch is better on 12 images"
    for version in (1, 2):
        assert read(version)["best"]["epoch"] == -1
        for name, tensor in read(0)["state_dict"].items():
            assert torch.equal(read(version)["state_dict"][name], tensor), name


def test_a_resumed_fit_keeps_the_head_that_it_began_with(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*STORED, *SOLVED, "--model.trainable", "layer4", *HARMFUL]
    assert fit(*flags) == 0
    capsys.readouterr()
    assert fit(*flags, "--ckpt_path", str(path(0, "last")), "--trainer.max_epochs", "2") == 0
    assert gain_line(capsys.readouterr().out) == "none: no epoch is better on 12 images"
    assert read(1)["best"]["epoch"] == -1
    for name, tensor in read(0)["state_dict"].items():
        assert torch.equal(read(1)["state_dict"][name], tensor), name


def correct(version: int, photos: Path, name: str = "best") -> np.ndarray:
    """Whether a checkpoint classifies each validation image correctly, in the order of the split."""
    images = sorted((photos / "val").glob("*/*"))
    predicted = load(path(version, name)).predict(images)
    return np.array([image.parent.name == label for image, label in zip(images, predicted, strict=True)])


def test_the_gain_is_the_paired_difference_between_the_best_epoch_and_epoch_0(
    fit: Fit, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(*STORED, *UNTRAINED) == 0
    assert "gain over" not in capsys.readouterr().out, "a random head is not validated"
    assert fit("--ckpt_path", str(path(0)), "--model.trainable", "layer4", *HELPFUL) == 0
    text = gain_line(capsys.readouterr().out)
    best, before = correct(1, photos), correct(0, photos)
    assert best.sum() > before.sum() and read(1)["best"]["epoch"] > -1
    low, high = newcombe_paired(best, before)
    points = 100 * (best.sum() - before.sum()) / 12
    interval = f"95 % interval {100 * low:+.1f} to {100 * high:+.1f}"
    assert text.startswith(f"{points:+.1f} points ({interval}, paired on 12 images)")
    card = (path(1).parents[1] / "model_card.md").read_text()
    assert f"Gain in accuracy over the initial head (epoch 0): {text}. Interval: square-and-add" in card
    for state, expected in ((read(1)["best"]["correct"], best), (initial(read(1, "last")), before)):
        saved = CorrectImages.from_state(state)
        assert saved is not None and np.array_equal(saved.correct, expected)


def test_a_gain_is_not_computed_from_other_images(fit: Fit, album: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*STORED, *SOLVED, "--data.root", "album", "--name", "photos", *HELPFUL]
    assert fit(*flags, "--trainer.max_epochs", "1") == 0
    draw(album / "val/red/9.png", (200, 40, 40), seed=77)
    capsys.readouterr()
    assert fit(*flags, "--ckpt_path", str(path(0, "last")), "--trainer.max_epochs", "2") == 0
    output = capsys.readouterr().out
    assert "the images or labels have changed" in output and "gain over" not in output


def test_a_checkpoint_without_results_of_epoch_0_can_be_resumed(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    """As those of earlier versions."""
    flags = [*STORED, *SOLVED, *HELPFUL]
    assert fit(*flags, "--trainer.max_epochs", "1") == 0
    for name in ("best", "last"):
        checkpoint = read(0, name)
        (key,) = (key for key in checkpoint["callbacks"] if key.startswith("Best"))
        del checkpoint["callbacks"][key]["initial"], checkpoint["best"]["correct"]
        torch.save(checkpoint, path(0, name))
    capsys.readouterr()
    assert fit(*flags, "--ckpt_path", str(path(0, "last"))) == 0
    assert "gain over" not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*")
def test_results_on_own_loaders_are_not_paired(
    photos: Path, weights: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their images may be in another order in each epoch."""
    model = ImageClassifier(BACKBONE, str(weights), image_size=32, classes=list(COLOURS))
    data, best = ImageDataModule(str(photos), num_workers=0), BestCheckpoint()
    data.preprocessing = model.backbone.preprocessing
    loader = data.training_images(slice(24))
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
    Trainer(max_epochs=1, callbacks=[best], **options).fit(model, loader, loader)
    assert "Head: not solved, because the data does not come from an ImageDataModule" in capsys.readouterr().out
    again = BestCheckpoint()
    Trainer(max_epochs=1, callbacks=[again], **options).fit(model, loader, loader)
    assert (best.validations, again.validations) == (1, 2), "a trained head is validated as epoch 0"
    assert again.initial is None and again.gain is None


@pytest.mark.parametrize("setup", ["stored", "live"])
def test_the_gain_is_equal_after_a_kill_and_a_resume(tmp_path: Path, photos: Path, weights: Path, setup: str) -> None:
    store = ["--features.engine", "torch"] if setup == "stored" else ["--features.cache", "off"]
    flags = ["fit", *SMALL, *SOLVED, *store, "--model.weights", str(weights), "--trainer.accelerator", "cpu"]
    flags += ["--data.root", "photos", "--data.batch_size", "8", "--model.trainable", "layer4", *HELPFUL]
    shutil.copytree(photos, tmp_path / "photos")
    for seed, image in enumerate(sorted((tmp_path / "photos").glob("*/*/*"))):
        # Hard to tell apart, so that the initial head makes errors.
        draw(image, (100 + 4 * list(COLOURS).index(image.parent.name), 100, 100), seed)
    outputs = []
    for folder, at in (("whole", None), ("killed", {"step": 7})):
        (tmp_path / folder).mkdir()
        shutil.copytree(tmp_path / "photos", tmp_path / folder / "photos")
        run = start(tmp_path / folder, flags, at)
        assert run.wait(120) == (0 if at is None else -signal.SIGKILL), run.output
        if at is not None:
            run = start(tmp_path / folder, [*flags, "--ckpt_path", "last"])
            assert run.wait(120) == 0, run.output
        outputs.append(run.output)
    assert gain_line(outputs[0]) == gain_line(outputs[1])
    whole, resumed = (tmp_path / folder / "runs/photos" for folder in ("whole", "killed"))
    states = [
        [torch.load(run / f"checkpoints/{name}.ckpt", weights_only=True) for name in ("best", "last")]
        for run in (whole / "version_0", resumed / "version_1")
    ]
    for first, second in zip(*states, strict=True):
        for one, other in ((initial(first), initial(second)), (first["best"]["correct"], second["best"]["correct"])):
            assert torch.equal(one["bits"], other["bits"]) and one["images"] == other["images"] == 12
