"""Data options on the command line: manifests, mixing, balancing, unreadable images, folds and augmentation."""

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from project.cli.main import main
from tests.conftest import draw, scalars

Fit = Callable[..., int]


def test_fit_trains_on_the_manifest_that_check_writes(
    fit: Fit, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(photos, "album")
    assert main(["check", "--data.root", "album", "--fix", "table.csv"]) == 1, "the test photos have duplicates"
    Path("table.csv").rename("album/table.csv")
    text = Path("album/table.csv").read_text().replace(",album/", ",")
    Path("album/table.csv").write_text(text.replace("\nalbum/", "\n"))
    assert fit("--data.root", "album/table.csv") == 0
    assert "runs/table/version_0" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--data.mixup", "0.3"], ["--data.mixup", "0.3", "--data.cutmix", "1.0"]])
def test_mixing_disables_stored_features(fit: Fit, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(*flags, "--trainer.max_epochs", "2") == 0
    assert "computed in every epoch, because data.mixup and data.cutmix mix" in capsys.readouterr().out
    values = [event.value for event in scalars(Path("runs/photos/version_0")).Scalars("train/loss")]
    assert len(values) == 2 and all(0 < value < 5 for value in values)


def test_mixing_with_feature_cache_on_is_rejected(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--data.mixup", "0.3", "--features.cache", "on") == 2
    assert "data.mixup" in capsys.readouterr().err


@pytest.mark.parametrize("cache", ["auto", "off"])
@pytest.mark.parametrize("balance", ["sampler", "loss"])
def test_balancing_works_with_and_without_stored_features(fit: Fit, balance: str, cache: str) -> None:
    assert fit("--data.balance", balance, "--features.cache", cache) == 0


def test_two_sets_of_class_weights_are_rejected(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--data.balance", "loss", "--model.class_weights", "[1, 1, 2]") == 2
    assert "exclude each other" in capsys.readouterr().err


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_unreadable_image_stops_fit_or_is_skipped(
    cache: str, fit: Fit, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(photos, "album")
    Path("album/train/red/bad.png").write_bytes(b"no image")
    flags = ["--data.root", "album", "--features.cache", cache]
    assert fit(*flags) == 2
    error = capsys.readouterr().err
    assert "album/train/red/bad.png" in error and "Traceback" not in error
    assert fit(*flags, "--data.on_bad_image", "skip") == 0
    assert "skipping 1 of 25 images of train that cannot be read" in capsys.readouterr().out


def test_unreadable_image_is_recorded_or_stops_predict(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(Path("some/a.png"), (200, 0, 0), 1)
    Path("some/b.png").write_bytes(b"no image")
    flags = ["predict", "--ckpt_path", str(run / "checkpoints/best.ckpt"), "--images", "some"]
    assert main([*flags, "--on_bad_image", "stop"]) == 2
    assert "some/b.png" in capsys.readouterr().err
    assert not Path("predictions.csv").exists()
    assert main([*flags, "--data.on_bad_image", "skip"]) == 2
    assert "predict takes --on_bad_image record or stop" in capsys.readouterr().err
    assert main(flags) == 0
    assert "2 images, 1 of which cannot be read (column error)" in capsys.readouterr().out
    with Path("predictions.csv").open(newline="") as file:
        good, bad = csv.DictReader(file)
    assert (good["path"], good["predicted"], good["error"]) == ("some/a.png", "red", "")
    assert bad["path"] == "some/b.png" and "is not a readable image" in bad["error"]
    assert not any(value for name, value in bad.items() if name not in ("path", "error"))


def test_fit_validates_one_fold(fit: Fit) -> None:
    for number in (1, 2):
        assert fit("--data.fold", f"{number}/2", "--name", f"fold{number}") == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["fold1", "fold2"]


def test_torchvision_transforms_can_be_configured(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    Path("custom.yaml").write_text(
        "data:\n  augment:\n  - class_path: torchvision.transforms.v2.RandomRotation\n    init_args: {degrees: 30}\n"
        "  - class_path: torchvision.transforms.v2.GaussianBlur\n    init_args: {kernel_size: 3}\n"
    )
    assert fit("-c", "custom.yaml", "--trainer.max_epochs", "2") == 0
    assert "views per image" in capsys.readouterr().out


@pytest.mark.parametrize("augment", ["trivial", "rand"])
def test_fit_with_named_augmentation(fit: Fit, augment: str) -> None:
    assert fit("--data.augment", augment, "--features.cache", "off", "--data.num_workers", "1") == 0


def test_mixing_does_not_depend_on_the_number_of_workers(fit: Fit) -> None:
    losses = []
    for workers in (0, 2):
        flags = ["--data.mixup", "0.4", "--data.cutmix", "1.0", "--data.num_workers", str(workers)]
        assert fit(*flags, "--trainer.max_epochs", "2", "--name", f"workers{workers}") == 0
        losses.append(
            [event.value for event in scalars(Path(f"runs/workers{workers}/version_0")).Scalars("train/loss")]
        )
    assert losses[0] == losses[1]


def test_split_settings_are_restored_from_the_checkpoint_unless_overridden(
    fit: Fit, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data.root", str(photos / "train"), "--data.fold", "2/3", "--data.split_seed", "5"]
    flags += ["--data.per_class", "3"]
    assert fit(*flags, "--name", "fold") == 0
    checkpoints = Path("runs/fold/version_0/checkpoints")
    best = max(event.value for event in scalars(checkpoints.parent).Scalars("val/accuracy"))
    saved = torch.load(checkpoints / "last.ckpt", weights_only=True)["transfer"]["split"]
    assert saved == {"val_fraction": 0.2, "test_fraction": 0.0, "fold": "2/3", "split_seed": 5, "per_class": 3}
    capsys.readouterr()
    resume = ["fit", "--ckpt_path", str(checkpoints / "last.ckpt"), "--data.root", str(photos / "train")]
    resume += ["--trainer.max_epochs", "2", "--trainer.accelerator", "cpu"]
    assert main(resume) == 0
    config = yaml.safe_load(next(Path("runs/train").glob("version_*/config.yaml")).read_text())["data"]
    assert (config["fold"], config["split_seed"], config["per_class"]) == ("2/3", 5, 3)
    assert main([*resume, "--data.fold", "1/3", "--trainer.max_epochs", "3", "--name", "other"]) == 0
    config = yaml.safe_load(Path("runs/other/version_0/config.yaml").read_text())["data"]
    assert config["fold"] == "1/3", "a flag overrides the checkpoint"
    assert 0 <= best <= 1


def test_checkpoint_with_invalid_split_settings_is_rejected(
    run: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "checkpoints" / "last.ckpt"
    for invalid in ({"fold": 5}, {"per_class": "5"}, {"other": 1}, [1], {"val_fraction": "0.2"}):
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["transfer"]["split"] = invalid
        torch.save(checkpoint, "odd.ckpt")
        assert main(["validate", "--ckpt_path", "odd.ckpt", "--data.root", str(photos)]) == 2
        assert "odd.ckpt is damaged: its split settings are invalid" in capsys.readouterr().err
