"""The model card: from what a fit has measured to Markdown with Hugging Face's metadata header.

The form is that of https://huggingface.co/docs/hub/model-cards; the idea that of Mitchell et al., "Model cards for
model reporting", arXiv:1810.03993. No license is named: that is for the author to choose.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import yaml

from project.evaluation.confidence_intervals import Interval, bootstrap_f1, wilson
from project.evaluation.summary import EvaluationSummary
from project.reporting.limitations import images_of, limits

FOLD = 50  # classes; of more, a table shows some
WORST, BEST = 20, 5

#: How intervals were had, with their sources.
SOURCES = {
    "Wilson": "Wilson's score interval (1927) of a share",
    "bootstrap": "percentiles of a bootstrap of 1,000 draws over images (Efron 1979) of F1",
}
#: What a metric is called by people, in their order, and by Hugging Face where it has a name for it.
NAMES = {
    "val/accuracy": ("Accuracy", "accuracy"),
    "val/f1": ("Macro F1", "f1"),
    "val/top5": ("Top-5 accuracy", "top-5-accuracy"),
    "val/ece": ("Expected calibration error", "ece"),
    "val/loss": ("Loss", "loss"),
}


@dataclass(frozen=True)
class CardFacts:
    """All that a card says; nothing in it is made up.

    Attributes:
        name: Of the run.
        data: Of the data.
        classes: Their names.
        counts: Images of each class, by split.
        about: Tables by their heading, each from a word to a value: data, backbone, training, versions.
        scores: What was measured; ``None`` where nothing was.
        validates: Whether there was to be a validation.
        epochs: How many there were.
        validated: How many of them the best one was chosen from.
        known: What is known of the data besides, a sentence each.
        base_model: Hugging Face's name of the backbone's weights, where they came from there.
        tags: For Hugging Face.
        checkpoint: The file to load, from the card's folder.
    """

    name: str
    data: str
    classes: Sequence[str]
    counts: Mapping[str, Sequence[int]]
    about: Mapping[str, Mapping[str, str]]
    scores: EvaluationSummary | None
    epochs: int
    validated: int
    known: Sequence[str] = ()
    base_model: str | None = None
    tags: Sequence[str] = field(default=("image-classification", "transfer-learning", "pytorch-lightning"))
    checkpoint: str = "checkpoints/best.ckpt"
    validates: bool = True


def card(facts: CardFacts) -> str:
    """The whole card."""
    about = facts.about
    parts = [
        f"---\n{header(facts)}---\n",
        f"# {plain(facts.name)}\n",
        f"A classifier of images into {len(facts.classes)} classes, trained on {plain(facts.data)}. This card was "
        "written by the fit from what it has measured; what it cannot know is marked as the author's to write.\n",
        "## Intended use\n",
        "> **To be written by the author:** what the model is for, what it is not for, whom its errors would harm, "
        "and under which license it may be used. Nothing of this is known to the program that wrote this card.\n",
        *_section("Data", about["data"]),
        *_classes(facts),
        *_section("Backbone", about["backbone"]),
        *_section("Training", about["training"]),
        *_scores(facts),
        "## Limits\n",
        "".join(
            f"- {plain(each)}\n"
            for each in [*limits(facts.scores, facts.classes, facts.counts, facts.validated), *facts.known]
        ),
        "## How to load it\n",
        "From this card's folder, in Python:\n",
        f'```python\nfrom project import load\nload("{facts.checkpoint}").predict(["a.jpg"])\n```\n',
        "On the command line, for an image or a folder of them:\n",
        f"```\npython -m project predict --ckpt_path {facts.checkpoint} --data.predict PATH --output predictions.csv\n"
        "```\n",
        "The checkpoint holds what was trained. The backbone's weights come from where they came from in training, and "
        "are refused if their SHA-256 is another.\n",
        *_section("Versions", about["versions"]),
    ]
    return "\n".join(parts)


def header(facts: CardFacts) -> str:
    """The header as YAML, checked by Hugging Face's own class where it is installed."""
    if find_spec("huggingface_hub") is not None:
        return f"{import_module('huggingface_hub').ModelCardData(**metadata(facts)).to_yaml()}\n"
    text: str = yaml.safe_dump(metadata(facts), sort_keys=False, allow_unicode=True)
    return text


def metadata(facts: CardFacts) -> dict[str, object]:
    """The header in plain types, in the order of Hugging Face's class."""
    measured = {} if facts.scores is None else facts.scores.metrics
    metrics = [
        {"type": kind, "value": round(measured[key], 6), "name": name}
        for key, (name, kind) in NAMES.items()
        if key in measured
    ]
    results = {
        "task": {"type": "image-classification", "name": "Image Classification"},
        "dataset": {"name": facts.data, "type": slug(facts.data), "split": "validation"},
        "metrics": metrics,
    }
    header: dict[str, object] = {
        "base_model": facts.base_model,
        "library_name": "pytorch",
        "metrics": [metric["type"] for metric in metrics],
        "pipeline_tag": "image-classification",
        "tags": list(facts.tags),
        "model-index": [{"name": facts.name, "results": [results]}] if metrics else None,
    }
    return {key: value for key, value in header.items() if value}


def _scores(facts: CardFacts) -> list[str]:
    scores = facts.scores
    if scores is None:
        why = "it ended before its first validation was over" if facts.validates else "this fit had no validation"
        return ["## Metrics\n", f"None: {why}.\n"]
    rows = []
    for key, (name, _) in NAMES.items():
        if key in scores.metrics:
            interval, how = interval_of(key, scores)
            rows.append((name, f"{scores.metrics[key]:.4f}", span(interval), how))
    count = images_of(scores.images, "validation ") if scores.images else "the validation images"
    epoch = "one" if scores.epoch is None else scores.epoch + 1
    hows = list(dict.fromkeys(how for *_, how in rows if how))
    told = f" Intervals are of 95 %: {', '.join(SOURCES[how] for how in hows)}." if hows else ""
    return [
        "## Metrics\n",
        f"Of the best epoch, {epoch} of {facts.epochs}, on {count}.{told}\n",
        table(("metric", "value", "95 % interval", "how"), rows),
        *_calibration(scores),
        *_per_class(facts, scores),
    ]


def interval_of(key: str, scores: EvaluationSummary) -> tuple[Interval | None, str]:
    """The 95 % interval of a metric, and how it was had; none of a loss, whose images are not kept."""
    value, square = scores.metrics[key], scores.confusion is not None and len(set(scores.confusion.shape)) == 1
    if key in ("val/accuracy", "val/top5") and scores.images:
        return wilson(value * scores.images, scores.images), "Wilson"
    if key == "val/f1" and square and scores.confusion is not None:
        right = int(np.trace(scores.confusion))
        if 0 < right < scores.confusion.sum():  # drawn from all right or all wrong, nothing would ever vary
            return bootstrap_f1(scores.confusion), "bootstrap"
    return None, ""


def _calibration(scores: EvaluationSummary) -> list[str]:
    if scores.calibration is None:
        return []
    bins = len(scores.calibration)
    rows = [
        (f"{at / bins:.2f} to {(at + 1) / bins:.2f}", f"{int(count):,}", f"{sure / count:.3f}", f"{right / count:.3f}")
        for at, (count, sure, right) in enumerate(scores.calibration)
        if count
    ]
    return [
        "### Calibration\n",
        "Accuracy per confidence bin; equal values mean good calibration.\n",
        table(("probability of the predicted class", "images", "its mean", "share that is right"), rows),
    ]


def _per_class(facts: CardFacts, scores: EvaluationSummary) -> list[str]:
    if scores.per_class is None:
        return []
    right, count = scores.per_class
    share = right / np.maximum(count, 1)
    order = sorted(range(len(count)), key=lambda at: (share[at], -count[at]) if count[at] else (2.0, 0))
    shown, note = order, ""
    if len(order) > FOLD:
        shown, note = order[:WORST] + order[-BEST:], f" The {WORST} worst and the {BEST} best of {len(order)}."
    rows = [
        (
            plain(facts.classes[at]),
            f"{int(right[at]):,} of {int(count[at]):,}",
            f"{share[at]:.3f}" if count[at] else "",
            span(wilson(right[at], count[at]) if count[at] else None),
        )
        for at in shown
    ]
    return [
        "### Each class\n",
        f"How many images of a class were recognised, the worst first.{note}\n",
        table(("class", "right", "share", "95 % interval"), rows),
    ]


def _classes(facts: CardFacts) -> list[str]:
    splits = [split for split, counts in facts.counts.items() if sum(counts)]
    order = range(len(facts.classes))
    note = ""
    if len(facts.classes) > FOLD:
        by_size = sorted(order, key=lambda at: facts.counts["train"][at])
        order_shown = by_size[:WORST] + by_size[-BEST:]
        note = f"The {WORST} smallest and the {BEST} largest classes of {len(facts.classes)}.\n"
    else:
        order_shown = list(order)
    rows = [(plain(facts.classes[at]), *(f"{facts.counts[split][at]:,}" for split in splits)) for at in order_shown]
    rows.append(("**all**", *(f"**{sum(facts.counts[split]):,}**" for split in splits)))
    return [*([note] if note else []), table(("class", *splits), rows)]


def _section(title: str, rows: Mapping[str, str]) -> list[str]:
    return [f"## {title}\n", "".join(f"- {word}: {value}\n" for word, value in rows.items())]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, whose numbers are to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def span(interval: Interval | None) -> str:
    """An interval for people; nothing for none."""
    return "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"


def plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line, whatever somebody has called a folder."""
    line = "".join(letter if letter.isprintable() else " " for letter in " ".join(text.split()))
    return re.sub(r"([\\`*_{}\[\]<>#|~&!$@])", r"\\\1", line)


def code(text: str) -> str:
    """Text as code, which nothing in it ends."""
    return f"`{' '.join(text.replace('`', chr(39)).split())}`"


def slug(text: str) -> str:
    """A name that may stand where Hugging Face expects that of a data set."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "data"
