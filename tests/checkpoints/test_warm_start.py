"""A new fit that starts from the weights of a checkpoint: more classes, or another cut."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from project import ImageClassifier
from project.checkpoints.warm_start import added_classes
from project.cli.main import main
from project.errors import CheckpointError
from project.models.heads import CosineHead, LinearHead, MLPHead
from project.models.loading import load_backbone
from tests.conftest import BACKBONE, FEATURES, SOLVED, STORED, draw, row_counts, scalars

Fit = Callable[..., int]
FLAGS = ["--data.num_workers", "0", "--dashboard.figures", "false", "--trainer.max_epochs", "1"]
STAGES = ["stem", "layer1", "layer2", "layer3", "layer4"]
#: Keeps all weights.
NO_STEP = ["--model.optimizer.lr", "0"]


def add_class(album: Path, name: str = "amber") -> None:
    """Add a class to a folder of photos; amber is the first one in alphabetical order."""
    for split, count in (("train", 6), ("val", 3), ("test", 2)):
        for number in range(count):
            draw(album / split / name / f"{number}.png", (220, 160, 20), 900 + 10 * len(split) + number)


def read(path: str | Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


def last(version: int) -> Path:
    return Path(f"runs/photos/version_{version}/checkpoints/last.ckpt")


def test_only_a_strict_superset_has_added_classes() -> None:
    assert added_classes(["b", "c"], ["a", "c", "b", "d"]) == ["a", "d"]
    assert not added_classes(["b", "c"], ["c", "b"])
    assert not added_classes(["b", "c"], ["a", "b"])


def test_new_class_starts_a_new_fit_that_keeps_the_rows_of_the_others(
    run: Path, album: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_class(album)
    before = read(last(0))
    fit = ["fit", "--data.root", "album", "--name", "photos", "--ckpt_path", str(last(0)), *FLAGS, *NO_STEP]
    assert main(fit) == 0
    out = capsys.readouterr().out
    assert f"Classes: 1 new (amber); the head starts with the weights of 3 classes from {last(0)}" in out
    after = read(last(1))
    assert after["transfer"]["classes"] == after["hyper_parameters"]["classes"] == ["amber", "blue", "green", "red"]
    for name, tensor in before["state_dict"].items():
        assert torch.equal(after["state_dict"][name][1:], tensor), name
        assert after["state_dict"][name][0].any(), "the new row is initialized"
    assert after["hyper_parameters"]["optimizer"]["class_path"].endswith("AdamW"), "as in the checkpoint"
    assert (after["epoch"], after["global_step"]) == (0, 1), "from the first epoch: 30 images in a batch of 32"
    assert {float(state["step"]) for state in after["optimizer_states"][0]["state"].values()} == {1.0}
    config = yaml.safe_load(Path("runs/photos/version_1/config.yaml").read_text())
    assert config["model"]["classes"] == after["transfer"]["classes"]
    assert main(["fit", "-c", "runs/photos/version_1/config.yaml"]) == 0
    for name, tensor in after["state_dict"].items():
        assert torch.equal(read(last(2))["state_dict"][name], tensor), "the config repeats the fit"


def test_last_starts_a_new_fit_on_a_grown_folder_and_then_resumes_it(
    run: Path, album: Path, capsys: pytest.CaptureFixture[str], refused: Callable[[int], str]
) -> None:
    add_class(album)
    fit = ["fit", "--data.root", "album", "--name", "photos", "--ckpt_path", "last", *FLAGS]
    assert main(fit) == 0
    assert "a new fit starts" in capsys.readouterr().out
    assert f"{last(1)}: 1 epochs are already complete; increase --trainer.max_epochs" in refused(main(fit))
    assert main([*fit, "--trainer.max_epochs", "2"]) == 0
    assert "a new fit starts" not in capsys.readouterr().out and read(last(2))["epoch"] == 1


def test_head_with_a_new_class_is_solved_and_stored_rows_are_reused(
    fit: Fit, album: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(*STORED, *SOLVED) == 0
    add_class(album)
    capsys.readouterr()
    assert fit(*STORED, *SOLVED, "--data.root", "album", "--ckpt_path", str(last(0)), "--name", "photos") == 0
    out = capsys.readouterr().out
    assert "1 new (amber)" in out and "Head: solved" in out and row_counts(out) == [(36, 9)]
    # The same as of a fit without the checkpoint, as the solver finds the optimum from any start.
    assert fit(*STORED, *SOLVED, "--data.root", "album", "--name", "photos") == 0
    assert row_counts(capsys.readouterr().out) == [(45, 0)]
    started, fresh = (read(last(version))["state_dict"] for version in (1, 2))
    torch.testing.assert_close(started, fresh)


def test_result_and_card_name_the_checkpoint_unless_the_head_is_solved(
    run: Path, album: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint may have been chosen by the validation images."""
    add_class(album)
    fit = ["fit", "--data.root", "album", "--name", "photos", "--ckpt_path", str(last(0)), *FLAGS]
    row = f"start: {last(0)}, which another fit may have chosen by some of the validation images"
    note, card = "Training started from a checkpoint of another fit", "runs/photos/version_{}/model_card.md"
    assert main(fit) == 0
    out = capsys.readouterr().out
    assert row in out and "from 2 validations" in out, "epoch 0 and epoch 1"
    text = Path(card.format(1)).read_text()
    assert note in text and "Initial head: weights of `last.ckpt`" in text
    assert main(["fit", "--data.root", "album", "--ckpt_path", str(last(1)), *FLAGS, "--trainer.max_epochs", "2"]) == 0
    assert row in capsys.readouterr().out, "also when the fit resumes"
    assert main([*fit, *STORED, "--model.head_init", "auto"]) == 0
    out = capsys.readouterr().out
    assert f"from {last(0)}, unless it is solved" in out and "Head: solved" in out and "start: " not in out
    text = Path(card.format(2)).read_text()
    assert note not in text and "Initial head: solved by" in text


@pytest.mark.parametrize("state", ["fewer classes", "the same classes", "none", "damaged"])
def test_fit_without_a_checkpoint_reports_classes_since_the_latest_run(
    state: str, run: Path, fit: Fit, album: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if state != "the same classes":
        add_class(album)
    if state == "none":
        shutil.rmtree(run)
    if state == "damaged":
        last(0).write_bytes(last(0).read_bytes()[:5000])
    assert fit("--data.root", "album", "--name", "photos") == 0
    note = "Data: 1 new class since runs/photos/version_0 (amber)"
    assert (note in capsys.readouterr().out) == (state == "fewer classes")


def with_class_weights() -> str:
    checkpoint = read(last(0))
    checkpoint["hyper_parameters"]["class_weights"] = [1.0, 2.0, 3.0]
    torch.save(checkpoint, "weighted.ckpt")
    return "weighted.ckpt"


@pytest.mark.parametrize(
    ("change", "flags", "texts"),
    [
        ("remove", [], ("data's classes (amber, blue, green) are not the model's (blue, green, red)",)),
        ("rename", [], ("(amber, blue, green, rose) are not the model's", "without --ckpt_path and --model.classes")),
        ("", ["--model.head", "MLPHead"], ("tensor 'head.0.bias'", "another model.head")),
        ("", ["--model.head.bias", "false"], ("unexpected tensor 'head.bias'", "another model.head")),
        ("", ["--model.image_size", "48"], ("The preprocessing differs: resize",)),
        ("", ["--model.classes", "[a, b, c, d]"], ("(amber, blue, green, red) are not the model's (a, b, c, d)",)),
        ("weights", [], ("model.class_weights: 3 weights for 4 classes",)),
    ],
)
def test_fit_that_cannot_start_from_the_checkpoint_is_refused(
    change: str, flags: list[str], texts: tuple[str, ...], run: Path, album: Path, refused: Callable[[int], str]
) -> None:
    add_class(album)
    for split in ("train", "val", "test") if change in ("remove", "rename") else ():
        if change == "remove":
            shutil.rmtree(album / split / "red")
        else:
            (album / split / "red").rename(album / split / "rose")
    path = with_class_weights() if change == "weights" else str(last(0))
    message = refused(main(["fit", "--data.root", "album", "--ckpt_path", path, *FLAGS, *flags]))
    for text in texts:
        assert text in message
    assert not Path("runs/album").exists()


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_evaluation_on_more_classes_is_refused(
    verb: str, run: Path, album: Path, refused: Callable[[int], str]
) -> None:
    add_class(album)
    message = refused(main([verb, "--data.root", "album", "--data.num_workers", "0", "--ckpt_path", str(last(0))]))
    assert "(amber, blue, green, red) are not the model's (blue, green, red)" in message


@pytest.mark.parametrize(("trainable", "stages"), [("layer4", STAGES[-1:]), ("all", STAGES)])
def test_checkpoint_of_a_head_starts_a_fit_of_more_stages(
    trainable: str,
    stages: list[str],
    run: Path,
    photos: Path,
    weights: Path,
    capsys: pytest.CaptureFixture[str],
    refused: Callable[[int], str],
) -> None:
    fit = ["fit", "--data.root", str(photos), *FLAGS]
    more = [*fit, "--ckpt_path", str(last(0)), "--model.trainable", trainable, "--model.head_init", "auto", *NO_STEP]
    assert main(more) == 0
    out = capsys.readouterr().out
    assert (
        "Classes: the same; the head starts with the weights of 3 classes" in out
        and "Head: not solved, because it is trained" in out
    )
    assert f"Stages: {', '.join(stages)} now trained, from the pretrained weights" in out
    accuracy = scalars(run).Scalars("val/accuracy")[-1].value
    assert f"Epoch 0, the weights of {last(0)}: val/accuracy {accuracy:.4f}" in out
    assert scalars(run.with_name("version_1")).Scalars("val/accuracy")[0].value == accuracy
    probe, partial = read(last(0)), read(last(1))
    assert partial["epoch"] == 0
    for name, parameter in load_backbone(BACKBONE, str(weights)).stages.named_parameters():
        if name.partition(".")[0] in stages:
            assert torch.equal(partial["state_dict"][f"backbone.stages.{name}"], parameter), name
    for name, tensor in probe["state_dict"].items():
        assert torch.equal(partial["state_dict"][name], tensor), name
    message = refused(main([*fit, "--ckpt_path", str(last(1)), "--model.trainable", "head"]))
    assert "unexpected tensor 'backbone.stages." in message and "another model.head or model.trainable" in message


class Transposed(nn.Module):
    """A head with one column per class."""

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.columns = nn.Parameter(torch.rand(in_features, num_classes))


def saved(model: ImageClassifier) -> dict[str, Any]:
    """The entries of a model's checkpoint that a new fit starts from."""
    state = {name: value for name, value in model.state_dict().items() if name.startswith("head.")}
    return {"transfer": model.identity(), "state_dict": state, "hyper_parameters": dict(model.hparams)}


@pytest.mark.parametrize("head", [LinearHead, MLPHead, CosineHead])
def test_logits_of_the_old_classes_are_those_of_the_checkpoint(head: type[nn.Module], weights: Path) -> None:
    backbone, features = load_backbone(BACKBONE, str(weights), 32), torch.rand(5, FEATURES)
    old = ImageClassifier(backbone, head=head, classes=["b", "c"]).eval()
    new = ImageClassifier(backbone, head=head, classes=["c", "a", "b"]).eval()
    fresh = {name: value.clone() for name, value in new.head.state_dict().items()}
    assert new.head_is_new
    new.start_from(saved(old), "old.ckpt")
    assert new.head_is_new, "one class is not trained"
    torch.testing.assert_close(new.head(features)[:, [2, 0]], old.head(features))
    for name, value in new.head.state_dict().items():
        if value.shape != old.head.state_dict()[name].shape:
            assert torch.equal(value[1], fresh[name][1]), "the new class has its initial weights"
            assert torch.equal(value[[2, 0]], old.head.state_dict()[name])
        else:
            assert torch.equal(value, old.head.state_dict()[name])
    same = ImageClassifier(backbone, head=head, classes=["b", "c"])
    same.start_from(saved(old), "old.ckpt")
    assert not same.head_is_new


def test_head_without_a_row_per_class_and_missing_classes_are_refused(weights: Path) -> None:
    backbone = load_backbone(BACKBONE, str(weights), 32)
    old = ImageClassifier(backbone, head=Transposed, classes=["b", "c"])
    new = ImageClassifier(backbone, head=Transposed, classes=["b", "c", "d"])
    with pytest.raises(CheckpointError, match=r"Transposed cannot get more classes: its tensor 'head.columns' changes"):
        new.start_from(saved(old), "old.ckpt")
    with pytest.raises(CheckpointError, match="The classes differ"):
        ImageClassifier(backbone, classes=["b", "d"]).start_from(saved(old), "old.ckpt")
