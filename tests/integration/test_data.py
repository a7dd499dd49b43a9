"""What is done to data on its way into a fit, by the command line."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from project.cli.main import main
from tests.conftest import draw, scalars

Fit = Callable[..., int]


def test_a_manifest_is_trained_on(fit: Fit, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(photos, "album")
    assert main(["check", "--data.root", "album", "--fix", "table.csv"]) == 1, "the tests' photos have copies"
    Path("table.csv").rename("album/table.csv")
    text = Path("album/table.csv").read_text().replace(",album/", ",")
    Path("album/table.csv").write_text(text.replace("\nalbum/", "\n"))
    assert fit("--data.root", "album/table.csv") == 0
    assert "runs/table/version_0" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--data.mixup", "0.3"], ["--data.mixup", "0.3", "--data.cutmix", "1.0"]])
def test_mixed_images_are_trained_on_live(fit: Fit, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(*flags, "--trainer.max_epochs", "2") == 0
    assert "computed in every epoch, because data.mixup and data.cutmix mix" in capsys.readouterr().out
    values = [event.value for event in scalars(Path("runs/photos/version_0")).Scalars("train/loss")]
    assert len(values) == 2 and all(0 < value < 5 for value in values)


def test_mixing_with_stored_features_is_refused(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--data.mixup", "0.3", "--features.cache", "on") == 2
    assert "data.mixup" in capsys.readouterr().err


@pytest.mark.parametrize("cache", ["auto", "off"])
@pytest.mark.parametrize("balance", ["sampler", "loss"])
def test_classes_are_balanced_with_stored_features_and_live(fit: Fit, balance: str, cache: str) -> None:
    assert fit("--data.balance", balance, "--features.cache", cache) == 0


def test_two_sets_of_class_weights_are_refused(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--data.balance", "loss", "--model.class_weights", "[1, 1, 2]") == 2
    assert "keep one" in capsys.readouterr().err


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_bad_images_stop_a_fit_or_are_skipped(
    cache: str, fit: Fit, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(photos, "album")
    Path("album/train/red/bad.png").write_bytes(b"no image")
    flags = ["--data.root", "album", "--features.cache", cache]
    assert fit(*flags) == 2
    error = capsys.readouterr().err
    assert "album/train/red/bad.png" in error and "Traceback" not in error
    assert fit(*flags, "--data.on_bad_image", "skip") == 0
    assert "skips 1 of 25 images of train, which cannot be read" in capsys.readouterr().out


def test_bad_images_of_a_prediction_are_skipped(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(Path("some/a.png"), (200, 0, 0), 1)
    Path("some/b.png").write_bytes(b"no image")
    flags = ["predict", "--ckpt_path", str(run / "checkpoints/best.ckpt"), "--data.predict", "some"]
    assert main(flags) == 2
    assert "some/b.png" in capsys.readouterr().err
    assert main([*flags, "--data.on_bad_image", "skip"]) == 0
    assert "some/b.png" in capsys.readouterr().out
    assert [line.split(",")[0] for line in Path("predictions.csv").read_text().splitlines()[1:]] == ["some/a.png"]


def test_folds_are_made_by_one_flag(fit: Fit) -> None:
    for number in (1, 2):
        assert fit("--data.fold", f"{number}/2", "--name", f"fold{number}") == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["fold1", "fold2"]


def test_transforms_of_torchvision_are_named_in_a_config(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    Path("own.yaml").write_text(
        "data:\n  augment:\n  - class_path: torchvision.transforms.v2.RandomRotation\n    init_args: {degrees: 30}\n"
        "  - class_path: torchvision.transforms.v2.GaussianBlur\n    init_args: {kernel_size: 3}\n"
    )
    assert fit("-c", "own.yaml", "--trainer.max_epochs", "2") == 0
    assert "views an image" in capsys.readouterr().out


@pytest.mark.parametrize("augment", ["trivial", "rand"])
def test_augmentation_by_name(fit: Fit, augment: str) -> None:
    assert fit("--data.augment", augment, "--features.cache", "off", "--data.num_workers", "1") == 0


def test_mixing_is_the_same_with_any_number_of_workers(fit: Fit) -> None:
    losses = []
    for workers in (0, 2):
        flags = ["--data.mixup", "0.4", "--data.cutmix", "1.0", "--data.num_workers", str(workers)]
        assert fit(*flags, "--trainer.max_epochs", "2", "--name", f"by{workers}") == 0
        losses.append([event.value for event in scalars(Path(f"runs/by{workers}/version_0")).Scalars("train/loss")])
    assert losses[0] == losses[1]


def test_what_was_held_out_of_a_fit_is_what_its_checkpoint_is_validated_on(
    fit: Fit, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data.root", str(photos / "train"), "--data.fold", "2/3", "--data.split_seed", "5"]
    assert fit(*flags, "--name", "fold") == 0
    checkpoints = Path("runs/fold/version_0/checkpoints")
    best = max(event.value for event in scalars(checkpoints.parent).Scalars("val/accuracy"))
    saved = torch.load(checkpoints / "last.ckpt", weights_only=True)["transfer"]["split"]
    assert saved == {"val_fraction": 0.2, "test_fraction": 0.0, "fold": "2/3", "split_seed": 5}
    capsys.readouterr()
    resume = ["fit", "--ckpt_path", str(checkpoints / "last.ckpt"), "--data.root", str(photos / "train")]
    resume += ["--trainer.max_epochs", "2", "--trainer.accelerator", "cpu"]
    assert main(resume) == 0
    config = yaml.safe_load(next(Path("runs/train").glob("version_*/config.yaml")).read_text())["data"]
    assert (config["fold"], config["split_seed"]) == ("2/3", 5)
    assert main([*resume, "--data.fold", "1/3", "--trainer.max_epochs", "3", "--name", "other"]) == 0
    config = yaml.safe_load(Path("runs/other/version_0/config.yaml").read_text())["data"]
    assert config["fold"] == "1/3", "a flag beats the checkpoint"
    assert 0 <= best <= 1


def test_a_checkpoint_that_says_nonsense_of_its_split_is_refused(
    run: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "checkpoints" / "last.ckpt"
    for nonsense in ({"fold": 5}, {"other": 1}, [1], {"val_fraction": "0.2"}):
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["transfer"]["split"] = nonsense
        torch.save(checkpoint, "odd.ckpt")
        assert main(["validate", "--ckpt_path", "odd.ckpt", "--data.root", str(photos)]) == 2
        assert "odd.ckpt does not say" in capsys.readouterr().err
