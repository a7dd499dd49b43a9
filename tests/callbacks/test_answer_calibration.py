"""A fit calibrates the answers of best.ckpt, with the weights of this file, and predict and load use them."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from project import classifier, load
from project.callbacks import answer_calibration, held_out_predictions
from project.callbacks.model_checkpoint import BestCheckpoint
from project.classifier import ImageClassifier
from project.cli.main import main
from project.data.datamodule import ImageDataModule
from project.errors import ConfigError
from project.evaluation.answers import held_out
from project.evaluation.answers.calibration import Answers
from project.evaluation.answers.held_out import HeldOutImages
from project.evaluation.answers.unknown_images import select_rows
from project.trainer import Trainer
from tests.conftest import BACKBONE, COLOURS, FEATURES, SOLVED, STORED, draw

Fit = Callable[..., int]
BEST = Path("runs/photos/version_0/checkpoints/best.ckpt")


def saved_answers(path: Path = BEST) -> Answers:
    state = torch.load(path, weights_only=True)
    answers = Answers.from_state(state.get("answers"), 3, FEATURES)
    assert answers is not None
    return answers


def predict(path: Path, images: Path, *flags: str) -> list[dict[str, str]]:
    arguments = ["--data.predict", str(images), "--data.num_workers", "0", *flags]
    assert main(["predict", "--ckpt_path", str(path), *arguments]) == 0
    with Path("predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_answers_are_those_of_the_weights_in_the_checkpoint(fit: Fit, photos: Path) -> None:
    assert fit(*STORED, "--trainer.max_epochs", "3", "--model.optimizer", "AdamW", "--model.optimizer.lr", "0.05") == 0
    answers, model = saved_answers(), load(BEST)
    images = sorted((photos / "val").glob("*/*"))
    labels = [model.classes_.index(path.parent.name) for path in images]
    probabilities = model.predict_proba(images)
    assert answers.validation == len(answers) == 12
    np.testing.assert_allclose(np.sort(answers.confidence), np.sort(probabilities.max(1)), atol=1e-4)
    assert answers.correct.sum() == (probabilities.argmax(1) == labels).sum()
    assert answers.rows.shape == (24, FEATURES)  # all training images
    calibrated = model.predict_proba(images, calibrated=True)
    assert calibrated.argmax(1).tolist() == probabilities.argmax(1).tolist()
    np.testing.assert_allclose(calibrated.sum(1), 1, atol=1e-5)


@pytest.mark.parametrize(
    "flags",
    [
        ["--model.trainable", "layer4", "--features.cache", "off"],
        ["--model.trainable", "layer4", *STORED],
        ["--model.trainable", "layer4", *STORED, "--model.interpolate", "auto"],
        ["--model.ema", "0.5", *STORED],
        ["--model.schedule", "{0: head, 2: layer4}", *STORED],
        ["--model.adapter", "lora", "--model.trainable", "layer4", *STORED],
        ["--model.head", "project.models.heads.KNNHead", *SOLVED, *STORED],
        ["--trainer.precision", "bf16-mixed", "--features.cache", "off"],
    ],
    ids=["images", "rows", "interpolated", "averaged", "schedule", "adapter", "computed head", "bf16"],
)
def test_features_and_predictions_are_those_of_the_best_weights(fit: Fit, photos: Path, flags: list[str]) -> None:
    assert fit(*flags, "--trainer.max_epochs", "3", "--model.optimizer", "SGD", "--model.optimizer.lr", "0.02") == 0
    answers, model = saved_answers(), load(BEST)
    images = sorted((photos / "val").glob("*/*"))
    np.testing.assert_allclose(np.sort(answers.confidence), np.sort(model.predict_proba(images).max(1)), atol=5e-3)
    training = sorted((photos / "train").glob("*/*"))
    rows = model.features([training[index] for index in select_rows(np.zeros(24), FEATURES)])
    stored = answers.rows / np.linalg.norm(answers.rows, axis=1, keepdims=True)
    similarity = (rows / np.linalg.norm(rows, axis=1, keepdims=True)) @ stored.T
    assert similarity.max(1).min() > 0.999  # each training image has its row


def test_out_of_fold_predictions_are_used_with_the_solved_head(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(*STORED, *SOLVED, "--trainer.max_epochs", "0") == 0
    answers, output = saved_answers(), capsys.readouterr().out
    assert (answers.validation, len(answers)) == (12, 36)
    assert "on 12 validation and 24 out-of-fold training images" in output
    assert fit(*STORED, *SOLVED, "--trainer.max_epochs", "0", "--features.cache", "off") == 0
    np.testing.assert_allclose(
        saved_answers(BEST.parents[2] / "version_1/checkpoints/best.ckpt").distances, answers.distances, atol=1e-3
    )


def test_a_better_epoch_is_calibrated_on_validation_images_only(fit: Fit) -> None:
    flags = ["--model.optimizer", "SGD", "--model.optimizer.lr", "0.001", "--trainer.max_epochs", "2"]
    assert fit(*STORED, *flags, "--model.head_init", "random") == 0
    assert len(saved_answers()) == 12


@pytest.fixture
def strange(here: Path) -> Path:
    """Images unlike those of any class."""
    for number in range(4):
        draw(here / f"strange/{number}.png", (250, 250, 250), number)
    return here / "strange"


def test_predict_writes_columns_for_the_flags(calibrated: Path, strange: Path) -> None:
    limits = ["--coverage", "0.9", "--max_error", "0.05", "--false_alarms", "0.05"]
    rows = predict(calibrated, calibrated.parent / "photos/val", *limits)
    expected = ["top3_probability", "calibrated_probability", "known", "set", "answered", "error"]
    assert list(rows[0])[-6:] == expected
    assert all(row["predicted"] in row["set"].split("|") for row in rows)
    assert np.mean([Path(row["path"]).parent.name in row["set"].split("|") for row in rows]) >= 0.85
    assert np.mean([row["known"] == "yes" for row in rows]) >= 0.85
    answered = [row for row in rows if row["answered"] == "yes"]
    assert answered and all(Path(row["path"]).parent.name == row["predicted"] for row in answered)
    assert {row["known"] for row in predict(calibrated, strange, "--false_alarms", "0.05")} == {"no"}
    assert list(predict(calibrated, strange)[0])[-2] == "top3_probability"  # without flags


def test_predict_answers_for_several_tasks(calibrated: Path, strange: Path) -> None:
    copy = strange.parent / "other.ckpt"
    copy.write_bytes(calibrated.read_bytes())
    (row, *_) = predict(calibrated, strange, "--ckpt_path", str(copy), "--false_alarms", "0.05")
    assert [name for name in row if name.endswith("/known")] == ["best/known", "other/known"]
    assert row["best/known"] == row["other/known"] == "no"


def test_the_task_that_has_no_answers_is_named(calibrated: Path, strange: Path, refused: Callable[[int], str]) -> None:
    paths = ["--ckpt_path", str(calibrated), "--ckpt_path", str(without_answers(calibrated))]
    message = refused(main(["predict", *paths, "--data.predict", str(strange), "--coverage", "0.9"]))
    assert "Task old: --coverage: the checkpoint has no calibrated answers" in message


def test_of_many_validation_images_a_random_part_is_kept(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_out, "MAX_IMAGES", 10)
    assert fit(*STORED) == 0
    assert len(saved_answers()) == 10


def test_a_resumed_fit_keeps_a_part_too_if_it_validates_only_at_its_start(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning's check before training validates one batch of three."""
    flags = ["--features.cache", "off", "--data.batch_size", "4"]
    assert fit(*flags) == 0
    state = torch.load(BEST, weights_only=True)
    del state["answers"]
    torch.save(state, BEST)
    kept = []

    def spied(*arguments: Any) -> HeldOutImages:
        kept.append(validation_images(*arguments))
        return kept[-1]

    validation_images = held_out_predictions.validation_images
    monkeypatch.setattr(answer_calibration, "validation_images", spied)
    monkeypatch.setattr(held_out, "MAX_IMAGES", 4)
    never = ["--trainer.check_val_every_n_epoch", "5", "--trainer.num_sanity_val_steps", "1"]
    assert fit(*flags, *never, "--trainer.max_epochs", "2", "--ckpt_path", "last") == 0
    assert 0 < len(kept[0]) < 9


def test_load_flags_unknown_images(calibrated: Path, strange: Path) -> None:
    model = load(calibrated)
    images = sorted(strange.iterdir())
    assert model.predict(images, unknown="flag") == [None] * 4
    assert None not in model.predict(images)
    (answer, *_) = model.answer(images, coverage=0.9, max_error=0.05, false_alarms=0.05)
    assert answer.known is False and answer.label in model.classes_ and answer.classes and answer.answered is not None
    assert answer.classes[0] == answer.label and 0 < answer.probability <= 1
    assert model.answer(images[:1])[0][2:] == (None, None, None)
    with pytest.raises(ConfigError, match="unknown must be 'ignore' or 'flag', not 'reject'"):
        model.predict(images, unknown="reject")  # type: ignore[call-overload]


def without_answers(path: Path) -> Path:
    state = torch.load(path, weights_only=True)
    del state["answers"]
    torch.save(state, "old.ckpt")
    return Path("old.ckpt")


def test_old_checkpoints_load_and_refuse_the_flags(
    calibrated: Path, strange: Path, refused: Callable[[int], str]
) -> None:
    old = without_answers(calibrated)
    model, images = load(old), sorted(strange.iterdir())
    assert model.predict(images) == load(calibrated).predict(images)
    with pytest.raises(ConfigError, match="false_alarms: the checkpoint has no calibrated answers"):
        model.predict(images, unknown="flag")
    with pytest.raises(ConfigError, match="calibration: the checkpoint has no calibrated answers"):
        model.predict_proba(images, calibrated=True)
    predicted = ["predict", "--ckpt_path", str(old), "--data.predict", str(strange), "--data.num_workers", "0"]
    message = refused(main([*predicted, "--coverage", "0.9"]))
    assert "--coverage: the checkpoint has no calibrated answers" in message
    assert "Use best.ckpt of a completed fit with validation images, or fit again" in message
    assert not Path("predictions.csv").exists()


def test_limits_that_the_checkpoint_does_not_permit_are_refused(
    calibrated: Path, strange: Path, refused: Callable[[int], str]
) -> None:
    predicted = ["predict", "--ckpt_path", str(calibrated), "--data.predict", str(strange), "--data.num_workers", "0"]
    assert "--max_error 0.01 cannot be certified: it needs at least 230 images" in refused(
        main([*predicted, "--max_error", "0.01"])
    )


@pytest.mark.parametrize("flag", ["--coverage", "--max_error", "--false_alarms"])
def test_limits_out_of_range_are_refused_before_weights_are_loaded(
    flag: str, calibrated: Path, strange: Path, refused: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(classifier, "load_backbone")
    predicted = ["predict", "--ckpt_path", str(calibrated), "--data.predict", str(strange), "--data.num_workers", "0"]
    assert f"{flag} must be between 1e-06 and 0.999999, not 95.0. For 95 %, use 0.95." in refused(
        main([*predicted, flag, "95"])
    )


def test_damaged_answers_are_refused(calibrated: Path, strange: Path, refused: Callable[[int], str]) -> None:
    state: dict[str, Any] = torch.load(calibrated, weights_only=True)
    state["answers"]["rows"] = state["answers"]["rows"][:, :5]
    torch.save(state, "damaged.ckpt")
    message = refused(main(["predict", "--ckpt_path", "damaged.ckpt", "--data.predict", str(strange)]))
    assert "its calibrated answers are invalid" in message


def test_a_resumed_fit_keeps_or_renews_the_answers(fit: Fit) -> None:
    flags = [*STORED, "--model.optimizer", "AdamW", "--model.optimizer.lr", "0.01", "--trainer.max_epochs"]
    assert fit(*flags, "1") == 0
    first = saved_answers()
    assert fit(*flags, "3", "--ckpt_path", "last") == 0
    second = BEST.parents[2] / "version_1/checkpoints/best.ckpt"
    epoch = torch.load(second, weights_only=True)["best"]["epoch"]
    answers = saved_answers(second)
    assert epoch == 0 or not np.array_equal(answers.confidence, first.confidence)


def test_fits_that_cannot_calibrate_say_why(fit: Fit, album: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (1, 2, 3):
        for colour in COLOURS:
            (album / f"val/{colour}/{number}.png").unlink()
    assert fit("--data.root", str(album)) == 0
    assert "Answers: not calibrated, because there are 3 held-out images, and at least 10" in capsys.readouterr().out


def test_the_model_card_reports_the_answers(fit: Fit) -> None:
    assert fit(*STORED, *SOLVED, "--trainer.max_epochs", "0") == 0
    card = BEST.parents[1].joinpath("model_card.md").read_text()
    assert "### Single predictions" in card and "Calibrated on 12 validation images and 24 training images" in card
    assert "| 0.01 | none (at least 230 images are needed) | none answered |" in card


@pytest.mark.filterwarnings("ignore:.*in eval mode.*", "ignore:.*does not have many workers.*")
def test_a_new_fit_discards_the_answers_of_the_loaded_weights(calibrated: Path, tmp_path: Path) -> None:
    model = ImageClassifier.load_from_checkpoint(calibrated)
    assert model.answers is not None
    data = ImageDataModule(str(calibrated.parent / "photos"), num_workers=0)
    trainer = Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path
    )
    trainer.fit(model, data)
    assert model.answers is None
    with pytest.raises(ConfigError, match="coverage: the checkpoint has no calibrated answers"):
        model.make_policy(coverage=0.9)


def test_outputs_that_are_not_finite_are_not_calibrated(
    fit: Fit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> HeldOutImages:
        images = held_out_predictions.validation_images(*arguments)
        return HeldOutImages(images.probabilities * np.nan, images.labels, images.distances)

    monkeypatch.setattr(answer_calibration, "validation_images", broken)
    assert fit(*STORED) == 0
    assert "Answers: not calibrated, because the outputs of the network are not finite" in capsys.readouterr().out


def remove_answers() -> None:
    """As if the fit had been killed at its end."""
    state = torch.load(BEST, weights_only=True)
    del state["answers"]
    torch.save(state, BEST)


@pytest.mark.parametrize("flags", [STORED, ["--features.cache", "off"]], ids=["stored", "live"])
def test_a_resumed_fit_without_validation_calibrates_what_a_killed_one_did_not(flags: list[str], fit: Fit) -> None:
    assert fit(*flags) == 0
    expected = saved_answers()
    remove_answers()
    never = ["--trainer.check_val_every_n_epoch", "5", "--trainer.num_sanity_val_steps", "0"]
    assert fit(*flags, *never, "--trainer.max_epochs", "2", "--ckpt_path", "last") == 0
    resumed = saved_answers(BEST.parents[2] / "version_1/checkpoints/best.ckpt")
    np.testing.assert_allclose(resumed.confidence, expected.confidence, atol=1e-6)


def test_a_resumed_fit_without_validation_batches_says_so(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(*STORED) == 0
    remove_answers()
    never = ["--trainer.limit_val_batches", "0", "--trainer.callbacks", f"{BestCheckpoint.__module__}.BestCheckpoint"]
    assert fit(*STORED, *never, "--trainer.max_epochs", "2", "--ckpt_path", "last") == 0
    assert "Answers: not calibrated, because trainer.limit_val_batches is 0" in capsys.readouterr().out


def test_weights_that_cannot_be_restored_are_none(weights: Path) -> None:
    model = ImageClassifier(BACKBONE, str(weights), "layer4", image_size=32, classes=["a", "b"])
    tensors = model.trained_tensors()
    head = {name: tensor for name, tensor in tensors.items() if name.startswith("head.")}
    restored = answer_calibration._weights_of(model, head)  # layer4 is pretrained
    assert restored is not None and all(torch.equal(restored[name], tensor) for name, tensor in tensors.items())
    assert answer_calibration._weights_of(model, {"head.weight": head["head.weight"]}) is None
    frozen = ImageClassifier(BACKBONE, str(weights), image_size=32, classes=["a", "b"])
    assert answer_calibration._weights_of(frozen, tensors) is None  # layer4 is trained, but frozen in this model
