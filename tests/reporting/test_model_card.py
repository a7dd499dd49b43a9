"""A model card says what was measured, in a form that Hugging Face reads."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard

from project.evaluation.summary import EvaluationSummary
from project.reporting.model_card import CardFacts, card, header, plain

SECTIONS = {"data": {}, "backbone": {}, "training": {}, "versions": {"python": "3"}}


def _facts(classes: int, images: int = 20, name: str = "class") -> CardFacts:
    generator = np.random.default_rng(0)
    confusion = np.diag(np.full(classes, images))
    for at in range(classes):
        wrong = int(generator.integers(0, images // 2))
        confusion[at, at] -= wrong
        confusion[at, (at + 1) % classes] += wrong
    right, count = int(np.trace(confusion)), int(confusion.sum())
    calibration = np.zeros((10, 3))
    calibration[9] = count, 0.97 * count, right
    metrics = {"val/accuracy": right / count, "val/f1": 0.8, "val/ece": 0.1, "val/loss": 0.5}
    return CardFacts(
        name="photos on resnet18",
        data="photos",
        classes=[f"{name} {at}" for at in range(classes)],
        counts={"train": [10 + at for at in range(classes)], "val": [images] * classes, "test": [0] * classes},
        about=SECTIONS,
        scores=EvaluationSummary(2, metrics, count, confusion, calibration),
        epochs=10,
        validated=10,
    )


def _read(facts: CardFacts, folder: Path) -> ModelCard:
    path = folder / "model_card.md"
    path.write_text(card(facts), "utf-8")
    return ModelCard.load(path)


def test_hugging_face_reads_its_header(tmp_path: Path) -> None:
    facts = dataclasses.replace(_facts(3), base_model="timm/resnet18.a1_in1k")
    header = _read(facts, tmp_path).data
    assert header.pipeline_tag == "image-classification" and header.base_model == "timm/resnet18.a1_in1k"
    assert header.license is None, "it is the author's to choose"
    found = {each.metric_type: each.metric_value for each in header.eval_results}
    assert facts.scores is not None
    assert found["accuracy"] == pytest.approx(facts.scores.metrics["val/accuracy"], abs=1e-6)
    assert {each.dataset_split for each in header.eval_results} == {"validation"}


@pytest.mark.parametrize("scores", [True, False])
@pytest.mark.parametrize("base_model", ["timm/resnet18.a1_in1k", None])
@pytest.mark.parametrize("name", ["photos", "*é*: {", "---", "a very long name " * 9])
def test_the_header_is_the_same_without_hugging_faces_class(
    scores: bool, base_model: str | None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = dataclasses.replace(_facts(3), name=name, data=name, base_model=base_model)
    facts = facts if scores else dataclasses.replace(facts, scores=None)
    theirs = header(facts)
    monkeypatch.setattr("project.reporting.model_card.find_spec", lambda name: None)
    assert header(facts) == theirs and theirs.endswith("\n")


@pytest.mark.parametrize("name", ["a|b", "<script>alert(1)</script>", "[x](http://y)", "a\nb", "---", "`", "*é*: {"])
def test_names_cannot_break_out_of_it(name: str, tmp_path: Path) -> None:
    facts = dataclasses.replace(_facts(3, name=name), name=name, data=name)
    read = _read(facts, tmp_path)
    assert read.data.model_name == name and "<script>" not in read.text
    rows = [line for line in read.text.splitlines() if re.match(rf"\| {re.escape(plain(name))} \d", line)]
    assert len(rows) == 6, "of three classes in two tables"


def test_of_many_classes_it_shows_the_worst_and_some_of_the_best(tmp_path: Path) -> None:
    lines = _read(_facts(120), tmp_path).text.splitlines()
    assert len([line for line in lines if line.startswith("| class ")]) == 2 * 25 + 2
    assert "The 20 worst and the 5 best of 120." in "\n".join(lines)


def test_limits_are_the_measured_ones() -> None:
    text = card(_facts(3, images=4))
    for words in (
        "chose the best of 10 epochs",
        "From 12 validation images, the accuracy may be from",
        "Fewer than 10 validation images of",
    ):
        assert words in text, words
    assert "more certain than they should be: 97.0 %" in text
    assert "uneven" not in text and "uneven" in card(_facts(40))


def test_what_is_not_known_is_left_out() -> None:
    text = card(dataclasses.replace(_facts(3), scores=EvaluationSummary(2, {"val/accuracy": 0.5}, 20)))
    assert "0.299 to 0.701" in text and "Each class" not in text and "Calibration" not in text
    assert "None: this fit had no validation" in card(dataclasses.replace(_facts(3), scores=None, validates=False))


def test_nothing_is_said_to_be_certain_that_was_seen_a_few_times() -> None:
    facts = _facts(2)
    assert facts.scores is not None
    right = dataclasses.replace(facts.scores, confusion=np.diag([10, 10]), images=20)
    text = card(dataclasses.replace(facts, scores=right))
    assert "bootstrap" not in text and "1.000 to 1.000" not in text
    assert "bootstrap" in card(facts)


def test_the_worst_are_named_only_where_they_are_worse_than_others() -> None:
    facts = _facts(2)
    assert facts.scores is not None
    two = np.array([[1, 5], [1, 5]])
    text = card(dataclasses.replace(facts, scores=dataclasses.replace(facts.scores, confusion=two, images=12)))
    assert f"Recognised least: {facts.classes[0]} (1 of 6).\n" in text
    facts = _facts(8)
    assert facts.scores is not None
    all_alike = np.roll(np.eye(8, dtype=int), 1, 1)
    all_alike[7] = np.eye(8, dtype=int)[7]
    text = card(dataclasses.replace(facts, scores=dataclasses.replace(facts.scores, confusion=all_alike, images=8)))
    assert "(0 of 1), and 4 more as seldom." in text and "(1 image), and 4 other pairs as often." in text


def test_one_image_is_one() -> None:
    facts = _facts(2)
    assert facts.scores is not None
    scores = dataclasses.replace(facts.scores, images=1, confusion=None, calibration=None)
    text = card(dataclasses.replace(facts, scores=scores))
    assert "1 validation image." in text and "1 validation images" not in text


def test_what_a_terminal_would_take_for_a_command_is_no_part_of_it() -> None:
    assert plain("a\x1b[31mred $x$") == r"a \[31mred \$x\$"
