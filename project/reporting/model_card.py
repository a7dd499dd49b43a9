"""Model card: the results of a fit as Markdown with Hugging Face's metadata header.

The format is https://huggingface.co/docs/hub/model-cards; the idea is from Mitchell et al., "Model Cards for Model
Reporting", arXiv:1810.03993. The card names no license: the author has to choose one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import yaml

from project.evaluation.answers.calibration import Answers
from project.evaluation.confidence_intervals import Interval, bootstrap_f1, wilson
from project.evaluation.gain import Gain
from project.evaluation.summary import EvaluationSummary
from project.reporting.answer_section import answer_section
from project.reporting.limitations import limitations, pluralize
from project.reporting.markdown import format_interval, plain, slug, table

MAX_CLASSES = 50  # listed in full; with more, a table shows the first N_FIRST and the last N_LAST
N_FIRST, N_LAST = 20, 5
TAGS = ("image-classification", "transfer-learning", "pytorch-lightning")

#: Methods of the confidence intervals, with references.
INTERVAL_METHODS = {
    "Wilson": "Wilson score interval (Wilson 1927)",
    "bootstrap": "percentile bootstrap over images, 1,000 resamples (Efron 1979)",
}
#: Display name and Hugging Face type of each reported metric, in the order of the table.
METRICS = {
    "val/accuracy": ("Accuracy", "accuracy"),
    "val/f1": ("Macro F1", "f1"),
    "val/top5": ("Top-5 accuracy", "top-5-accuracy"),
    "val/ece": ("Expected calibration error", "ece"),
    "val/loss": ("Loss", "loss"),
}


@dataclass(frozen=True)
class CardContent:
    """The content of a model card.

    Attributes:
        name: Model name.
        dataset: Data set name.
        classes: Class names.
        class_counts: Images per class, by split.
        sections: Key-value lists of the sections "data", "backbone", "training" and "versions", as Markdown.
        evaluation: Validation results of the best epoch; ``None`` if nothing was measured.
        epochs: Number of completed epochs.
        validations: Number of validations that the best one was selected from.
        notes: Further limitations, one sentence each.
        base_model: Hugging Face repository of the backbone's weights, if they come from there.
        checkpoint: Path of the checkpoint, relative to the card.
        has_validation: Whether the fit was configured to validate.
        gain: Difference between the best epoch and the initial head; ``None`` if unknown.
        answers: Calibrated answers of the checkpoint; ``None`` if there are none.
        answers_note: Why the answers are calibrated without out-of-fold predictions, a clause; empty if no reason has
            to be given.
    """

    name: str
    dataset: str
    classes: Sequence[str]
    class_counts: Mapping[str, Sequence[int]]
    sections: Mapping[str, Mapping[str, str]]
    evaluation: EvaluationSummary | None
    epochs: int
    validations: int
    notes: Sequence[str] = ()
    base_model: str | None = None
    checkpoint: str = "checkpoints/best.ckpt"
    has_validation: bool = True
    gain: Gain | None = None
    answers: Answers | None = None
    answers_note: str = ""


def render_card(card: CardContent) -> str:
    """The card as Markdown, header included."""
    sections, classes = card.sections, card.classes
    caveats = [*limitations(card.evaluation, classes, card.class_counts, card.validations), *card.notes]
    parts = [
        f"---\n{header(card)}---\n",
        f"# {plain(card.name)}\n",
        f"An image classification model with {len(classes)} classes, trained on the data set {plain(card.dataset)} by "
        "transfer learning. This card was generated automatically at the end of training.\n",
        "## Intended use\n",
        "> **To be completed by the author:** intended uses, out-of-scope uses, who may be harmed by errors, and the "
        "license. This information cannot be generated automatically.\n",
        *_section("Training data", sections["data"]),
        *_class_counts(card),
        *_section("Backbone", sections["backbone"]),
        *_section("Training procedure", sections["training"]),
        *_evaluation(card),
        "## Limitations\n",
        "".join(f"- {plain(sentence)}\n" for sentence in caveats),
        "## How to use\n",
        "In Python, with the `frozen-backbone` package, from the folder of this card:\n",
        f'```python\nfrom project import load\n\nload("{card.checkpoint}").predict(["a.jpg"])\n```\n',
        "On the command line, for one image or a folder of images:\n",
        f"```\npython -m project predict --ckpt_path {card.checkpoint} --images PATH --output predictions.csv\n```\n",
        "The checkpoint contains only the trained parameters. The backbone's weights are loaded from their original "
        "location and verified by SHA-256.\n",
        *_section("Environment", sections["versions"]),
    ]
    return "\n".join(parts)


def header(card: CardContent) -> str:
    """The metadata header as YAML, validated by ``huggingface_hub`` if it is installed."""
    if find_spec("huggingface_hub") is not None:
        return f"{import_module('huggingface_hub').ModelCardData(**metadata(card)).to_yaml()}\n"
    text: str = yaml.safe_dump(metadata(card), sort_keys=False, allow_unicode=True)
    return text


def metadata(card: CardContent) -> dict[str, object]:
    """The metadata header in plain types, with keys in the order of ``huggingface_hub.ModelCardData``."""
    values = {} if card.evaluation is None else card.evaluation.metrics
    metrics = [
        {"type": kind, "value": round(values[key], 6), "name": name}
        for key, (name, kind) in METRICS.items()
        if key in values
    ]
    results = {
        "task": {"type": "image-classification", "name": "Image Classification"},
        "dataset": {"name": card.dataset, "type": slug(card.dataset), "split": "validation"},
        "metrics": metrics,
    }
    header: dict[str, object] = {
        "base_model": card.base_model,
        "library_name": "pytorch",
        "metrics": [metric["type"] for metric in metrics],
        "pipeline_tag": "image-classification",
        "tags": list(TAGS),
        "model-index": [{"name": card.name, "results": [results]}] if metrics else None,
    }
    return {key: value for key, value in header.items() if value}


def _evaluation(card: CardContent) -> list[str]:
    evaluation = card.evaluation
    if evaluation is None:
        reason = "training ended before the first validation finished" if card.has_validation else "no validation ran"
        return ["## Evaluation\n", f"Not evaluated: {reason}.\n"]
    rows, methods = [], set()
    for key, (name, _) in METRICS.items():
        if key in evaluation.metrics:
            interval, method = metric_interval(key, evaluation)
            rows.append((name, f"{evaluation.metrics[key]:.4f}", format_interval(interval), method))
            methods.add(method)
    images = pluralize(evaluation.images, "validation image") if evaluation.images else "the validation images"
    epoch = "from an earlier run" if evaluation.epoch is None else f"{evaluation.epoch + 1} of {card.epochs}"
    weights = ", of the moving average of the weights," if evaluation.weights == "ema" else ""
    sources = "; ".join(source for method, source in INTERVAL_METHODS.items() if method in methods)
    return [
        "## Evaluation\n",
        f"Results of {_evaluated(evaluation)} ({epoch}){weights} on {images}."
        f"{f' Intervals: {sources}.' if sources else ''}\n",
        table(("Metric", "Value", "95 % interval", "Method"), rows),
        *_gain(card.gain),
        *_calibration(evaluation),
        *_per_class_recall(card, evaluation),
        *answer_section(card.answers, card.answers_note),
    ]


def _gain(gain: Gain | None) -> list[str]:
    if gain is None:
        return []
    method = "" if gain.is_none else " Interval: square-and-add for paired proportions (Newcombe 1998, method 10)."
    return [f"Gain in accuracy over the initial head (epoch 0): {gain}.{method}\n"]


def _evaluated(evaluation: EvaluationSummary) -> str:
    if evaluation.interpolated is None:
        return "the best epoch"
    return f"weights interpolated with alpha {evaluation.interpolated} between the start of the fit and an epoch"


def metric_interval(key: str, evaluation: EvaluationSummary) -> tuple[Interval | None, str]:
    """The 95 % interval of a metric and its method in :data:`INTERVAL_METHODS`; ``(None, "")`` if there is none."""
    value, confusion = evaluation.metrics[key], evaluation.confusion
    if key in ("val/accuracy", "val/top5") and evaluation.images:
        return wilson(value * evaluation.images, evaluation.images), "Wilson"
    if key != "val/f1" or confusion is None or confusion.shape[0] != confusion.shape[1]:
        return None, ""
    if np.trace(confusion) in (0, confusion.sum()):  # all wrong or all right: every resample has the same F1
        return None, ""
    return bootstrap_f1(confusion), "bootstrap"


def _calibration(evaluation: EvaluationSummary) -> list[str]:
    if evaluation.calibration is None:
        return []
    bins = len(evaluation.calibration)
    rows = [
        (
            f"{index / bins:.2f} to {(index + 1) / bins:.2f}",
            f"{count:,.0f}",
            f"{confidence / count:.3f}",
            f"{correct / count:.3f}",
        )
        for index, (count, confidence, correct) in enumerate(evaluation.calibration)
        if count
    ]
    return [
        "### Calibration\n",
        "Accuracy per confidence bin. In a well-calibrated model, accuracy equals mean confidence.\n",
        table(("Confidence", "Images", "Mean confidence", "Accuracy"), rows),
    ]


def _per_class_recall(card: CardContent, evaluation: EvaluationSummary) -> list[str]:
    if evaluation.per_class is None:
        return []
    correct, support = evaluation.per_class
    recall = np.where(support > 0, correct / np.maximum(support, 1), np.inf)  # classes without images come last
    order = sorted(range(len(support)), key=lambda label: (recall[label], -support[label]))
    rows = [
        (
            plain(card.classes[label]),
            f"{correct[label]:,.0f} of {support[label]:,.0f}",
            f"{recall[label]:.3f}" if support[label] else "",
            format_interval(wilson(correct[label], support[label]) if support[label] else None),
        )
        for label in _ends(order)
    ]
    subset = f", {N_FIRST} worst and {N_LAST} best of {len(order)} classes" if len(order) > MAX_CLASSES else ""
    return [
        "### Per-class recall\n",
        f"Share of each class's images that are classified correctly, lowest first{subset}.\n",
        table(("Class", "Correct", "Recall", "95 % interval"), rows),
    ]


def _class_counts(card: CardContent) -> list[str]:
    counts, order = card.class_counts, list(range(len(card.classes)))
    splits = [split for split, images in counts.items() if sum(images)]
    note = []
    if len(order) > MAX_CLASSES:
        order.sort(key=counts["train"].__getitem__)
        note = [f"Images of the {N_FIRST} smallest and the {N_LAST} largest of {len(order)} classes:\n"]
    rows = [(plain(card.classes[label]), *(f"{counts[split][label]:,}" for split in splits)) for label in _ends(order)]
    rows.append(("**All**", *(f"**{sum(counts[split]):,}**" for split in splits)))
    return [*note, table(("Class", *splits), rows)]


def _ends(order: list[int]) -> list[int]:
    return order if len(order) <= MAX_CLASSES else order[:N_FIRST] + order[-N_LAST:]


def _section(title: str, items: Mapping[str, str]) -> list[str]:
    return [f"## {title}\n", "".join(f"- {key}: {value}\n" for key, value in items.items())]
