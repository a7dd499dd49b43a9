"""The model card reports what was measured, and Hugging Face can parse it."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard

from project.evaluation.summary import EvaluationSummary
from project.reporting.markdown import plain
from project.reporting.model_card import CardContent, header, render_card

SECTIONS = {"data": {}, "backbone": {}, "training": {}, "versions": {"Python": "3"}}


def _card(classes: int, images: int = 20, name: str = "class") -> CardContent:
    """Facts of an overconfident model with random errors.

    Args:
        classes: Number of classes.
        images: Validation images per class.
        name: Prefix of the class names.
    """
    generator = np.random.default_rng(0)
    confusion = np.diag(np.full(classes, images))
    for label in range(classes):
        errors = int(generator.integers(0, images // 2))
        confusion[label, label] -= errors
        confusion[label, (label + 1) % classes] += errors
    correct, count = int(np.trace(confusion)), int(confusion.sum())
    calibration = np.zeros((10, 3))
    calibration[9] = count, 0.97 * count, correct
    metrics = {"val/accuracy": correct / count, "val/f1": 0.8, "val/ece": 0.1, "val/loss": 0.5}
    return CardContent(
        name="photos on resnet18",
        dataset="photos",
        classes=[f"{name} {label}" for label in range(classes)],
        class_counts={
            "train": [10 + label for label in range(classes)],
            "val": [images] * classes,
            "test": [0] * classes,
        },
        sections=SECTIONS,
        evaluation=EvaluationSummary(2, metrics, count, confusion, calibration),
        epochs=10,
        validations=10,
    )


def _with_confusion(card: CardContent, confusion: np.ndarray) -> CardContent:
    assert card.evaluation is not None
    evaluation = dataclasses.replace(card.evaluation, confusion=confusion, images=int(confusion.sum()))
    return dataclasses.replace(card, evaluation=evaluation)


def _parse(card: CardContent, folder: Path) -> ModelCard:
    path = folder / "model_card.md"
    path.write_text(render_card(card), "utf-8")
    return ModelCard.load(path)


def test_hugging_face_parses_the_header(tmp_path: Path) -> None:
    card = dataclasses.replace(_card(3), base_model="timm/resnet18.a1_in1k")
    data = _parse(card, tmp_path).data
    assert data.pipeline_tag == "image-classification" and data.base_model == "timm/resnet18.a1_in1k"
    assert data.license is None, "the author has to choose a license"
    results = {result.metric_type: result.metric_value for result in data.eval_results}
    assert card.evaluation is not None
    assert results["accuracy"] == pytest.approx(card.evaluation.metrics["val/accuracy"], abs=1e-6)
    assert {result.dataset_split for result in data.eval_results} == {"validation"}


@pytest.mark.parametrize("evaluated", [True, False])
@pytest.mark.parametrize("base_model", ["timm/resnet18.a1_in1k", None])
@pytest.mark.parametrize("name", ["photos", "*é*: {", "---", "a very long name " * 9])
def test_header_is_the_same_without_huggingface_hub(
    evaluated: bool, base_model: str | None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = dataclasses.replace(_card(3), name=name, dataset=name, base_model=base_model)
    card = card if evaluated else dataclasses.replace(card, evaluation=None)
    expected = header(card)
    monkeypatch.setattr("project.reporting.model_card.find_spec", lambda name: None)
    assert header(card) == expected and expected.endswith("\n")


@pytest.mark.parametrize("name", ["a|b", "<script>alert(1)</script>", "[x](http://y)", "a\nb", "---", "`", "*é*: {"])
def test_names_cannot_inject_markdown_or_html(name: str, tmp_path: Path) -> None:
    card = dataclasses.replace(_card(3, name=name), name=name, dataset=name)
    model_card = _parse(card, tmp_path)
    assert model_card.data.model_name == name and "<script>" not in model_card.text
    rows = [line for line in model_card.text.splitlines() if re.match(rf"\| {re.escape(plain(name))} \d", line)]
    assert len(rows) == 6, "three classes in two tables"


def test_long_tables_show_the_worst_and_the_best_classes(tmp_path: Path) -> None:
    lines = _parse(_card(120), tmp_path).text.splitlines()
    assert len([line for line in lines if line.startswith("| class ")]) == 2 * 25
    assert "lowest first, 20 worst and 5 best of 120 classes." in "\n".join(lines)


def test_limitations_come_from_the_measurements() -> None:
    text = render_card(_card(3, images=4))
    for words in (
        "The best of 10 validations was selected by its accuracy",
        "With 12 validation images, the 95 % interval of the accuracy is",
        "Fewer than 10 validation images for",
    ):
        assert words in text, words
    assert "overconfident: its mean confidence is 97.0 %" in text
    assert "imbalanced" not in text and "imbalanced" in render_card(_card(40))


def test_unknown_results_are_omitted() -> None:
    card = _card(3)
    text = render_card(dataclasses.replace(card, evaluation=EvaluationSummary(2, {"val/accuracy": 0.5}, 20)))
    assert "0.299 to 0.701" in text and "Per-class" not in text and "Calibration" not in text
    text = render_card(dataclasses.replace(card, evaluation=None, has_validation=False))
    assert "Not evaluated: no validation ran." in text


def test_perfect_f1_has_no_interval() -> None:
    card = _card(2)
    text = render_card(_with_confusion(card, np.diag([10, 10])))
    assert "bootstrap" not in text and "1.000 to 1.000" not in text
    assert "bootstrap" in render_card(card)


def test_lowest_recall_names_only_classes_below_the_accuracy() -> None:
    card = _card(2)
    text = render_card(_with_confusion(card, np.array([[1, 5], [1, 5]])))
    assert f"Lowest recall: {card.classes[0]} (1 of 6).\n" in text


def test_ties_are_counted() -> None:
    confusion = np.roll(np.eye(8, dtype=int), 1, 1)
    confusion[7] = np.eye(8, dtype=int)[7]
    text = render_card(_with_confusion(_card(8), confusion))
    assert "(0 of 1), and 4 more with the same recall." in text
    assert "(1 image), and 4 other pairs with the same count." in text


def test_one_image_is_singular() -> None:
    card = _card(2)
    assert card.evaluation is not None
    evaluation = dataclasses.replace(card.evaluation, images=1, confusion=None, calibration=None)
    text = render_card(dataclasses.replace(card, evaluation=evaluation))
    assert "1 validation image." in text and "1 validation images" not in text


def test_terminal_escapes_and_math_are_removed() -> None:
    assert plain("a\x1b[31mred $x$") == r"a \[31mred \$x\$"
