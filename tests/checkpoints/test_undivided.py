"""Checkpoints of earlier versions, in which a transformer was a single stage."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from project import ImageClassifier
from project.cli.main import main
from tests.conftest import STORED, row_counts

pytestmark = pytest.mark.filterwarnings("ignore:model.weights is null")

Fit = Callable[..., int]
CHECKPOINT = Path("runs/photos/version_0/checkpoints/last.ckpt")
VIT = ["--model.backbone", "timm/test_vit", "--model.weights", "null", "--model.image_size", "160"]
MORE = ["fit", "--ckpt_path", str(CHECKPOINT), "--data.num_workers", "0", "--dashboard.figures", "false"]
#: Keeps all weights.
NO_STEP = ["--model.optimizer.lr", "0"]


def rewrite(change: Callable[[dict[str, Any]], None]) -> None:
    checkpoint = torch.load(CHECKPOINT, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, CHECKPOINT)


def test_checkpoint_of_a_head_is_loaded_resumed_and_a_start_of_other_fits(
    fit: Fit, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(*VIT, *STORED) == 0

    def freeze_the_whole(checkpoint: dict[str, Any]) -> None:
        assert len(checkpoint["transfer"]["frozen"]["stages"]) == 7
        checkpoint["transfer"]["frozen"]["stages"] = ["body"]

    rewrite(freeze_the_whole)
    assert ImageClassifier.load_from_checkpoint(CHECKPOINT).cut.trainable == ()
    capsys.readouterr()
    assert main([*MORE, "--data.root", str(photos), "--trainer.max_epochs", "2", *STORED]) == 0
    out = capsys.readouterr().out
    assert row_counts(out) == [(36, 0)] and "a new fit starts" not in out
    two = ["--model.trainable", "-2", "--trainer.max_epochs", "1", *NO_STEP]
    assert main([*MORE, "--data.root", str(photos), *two]) == 0
    assert "Stages: blocks.4, blocks.5 now trained, from the pretrained weights" in capsys.readouterr().out
    started = torch.load("runs/photos/version_2/checkpoints/last.ckpt", weights_only=True)
    assert started["hyper_parameters"]["trainable"] == "-2"
    assert {name.split(".")[2] for name in started["state_dict"] if "stages" in name} == {"blocks_4", "blocks_5"}


def test_config_names_the_number_of_trained_stages(fit: Fit) -> None:
    Path("two.yaml").write_text("model:\n  trainable: -2\n")
    assert fit("--config", "two.yaml") == 0
    model = ImageClassifier.load_from_checkpoint(CHECKPOINT)
    assert model.cut.trainable == ("layer3", "layer4") and model.hparams["trainable"] == "-2"


def test_state_without_version_numbers_is_loaded() -> None:
    model = ImageClassifier("mnasnet0_5", None, "stage4", 32, classes=["a", "b"])
    model.load_state_dict(dict(model.state_dict()))  # MNASNet refuses tensors without the version of its layers


def test_checkpoint_of_a_trained_network_is_loaded_but_not_resumed(
    fit: Fit, photos: Path, refused: Callable[[int], str]
) -> None:
    assert fit(*VIT, "--model.trainable", "all") == 0
    expected = ImageClassifier.load_from_checkpoint(CHECKPOINT).state_dict()

    def name_as_whole(checkpoint: dict[str, Any]) -> None:
        checkpoint["hyper_parameters"]["trainable"] = "body"
        checkpoint["state_dict"] = {
            f"backbone.stages.body.{name.split('.network.')[1]}" if ".network." in name else name: tensor
            for name, tensor in checkpoint["state_dict"].items()
        }

    rewrite(name_as_whole)
    loaded = ImageClassifier.load_from_checkpoint(CHECKPOINT).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    message = refused(main([*MORE, "--data.root", str(photos), "--trainer.max_epochs", "2"]))
    assert "has trained timm/test_vit as a single stage" in message and "test and predict accept it" in message
