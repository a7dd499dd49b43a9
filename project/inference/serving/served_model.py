"""The classifiers of a server: from the bytes of an image to an answer in plain types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from project.classifier import ImageClassifier
from project.data.image_arrays import to_images
from project.data.transforms import evaluation
from project.errors import ConfigError, DataError
from project.evaluation.step_outputs import Outputs
from project.features.engines import Engine, ExactEngine
from project.features.provider import RowProvider
from project.inference.answer import answers_of
from project.inference.many_tasks import ManyTasks
from project.inference.serving.limits import RefusedError
from project.models.fingerprint import fingerprint_tensors

TOP_CLASSES = 3
BATCH = 32  # images per batch, unless the engine needs another size
MEASURED_IMAGES = 32  # noise to measure engines with


@dataclass(frozen=True)
class GroupEncoder:
    """Computes the rows of a group of classifiers.

    Attributes:
        model: One of them.
        engine: Computes the rows; ``None`` for the frozen prefix itself, as ``load`` runs it.
    """

    model: ImageClassifier
    engine: Engine | None

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Map uint8 images ``(B, 3, H, W)`` on the CPU to rows on the device of the model."""
        if self.engine is None:
            return self.model.encode(images.to(self.model.device))
        rows = torch.cat([self.engine(part) for part in torch.split(images, self.engine.batch_size)])
        return rows.to(self.model.device, self.model.backbone.mean.dtype)


class ServedModel:
    """Classifiers for requests.

    Args:
        tasks: The trained classifiers, on their device. Each gives the answers of its ``answer_policy``.
        engines: Engine of each group of classifiers; ``None`` runs the frozen prefix itself, as ``load`` does.

    Attributes:
        batch_size: Number of images that the engines compute best at a time.
        single_threaded: Whether a batch is computed by one thread, so that several threads can compute batches.
        description: Classes and SHA-256 of each task, and its backbone, by the name of the task.
    """

    def __init__(self, tasks: ManyTasks, engines: Sequence[Engine | None]) -> None:
        self._tasks = tasks.eval()
        self._transforms = [evaluation(preprocessing) for preprocessing in tasks.preprocessings]
        models = [tasks.classifiers[group[0]] for group in tasks.groups]
        self._inputs = [tasks.preprocessings.index(model.backbone.preprocessing) for model in models]
        self._encoders = [GroupEncoder(model, engine) for model, engine in zip(models, engines, strict=True)]
        self.batch_size = min(BATCH if engine is None else engine.batch_size for engine in engines)
        self.single_threaded = all(engine is not None and engine.single_threaded for engine in engines)
        self.description: dict[str, Any] = dict(zip(tasks.names, map(_describe, tasks.classifiers), strict=True))

    def prepare(self, content: bytes) -> list[torch.Tensor]:
        """Decode an image as ``load`` does, and apply each preprocessing.

        Args:
            content: The bytes of a file.

        Returns:
            uint8 ``(3, H, W)``, for each preprocessing.

        Raises:
            RefusedError: The image cannot be read.
        """
        try:
            images = to_images(content, [transform.min_size for transform in self._transforms])
        except DataError as error:
            raise RefusedError(422, f"The image {error.reason}") from error
        except MemoryError as error:
            raise RefusedError(413, "The image needs more memory than the server has.") from error
        return [transform(image) for transform, image in zip(self._transforms, images, strict=True)]

    def answer(self, images: Sequence[list[torch.Tensor]]) -> list[dict[str, Any]]:
        """Answer a batch.

        Args:
            images: Of :meth:`prepare`.

        Returns:
            For each image, the answer of each task by name.
        """
        with torch.no_grad():  # not inference_mode, in which a compiled engine would be compiled again
            inputs = [torch.stack(parts) for parts in zip(*images, strict=True)]
            rows = [encode(inputs[index]) for encode, index in zip(self._encoders, self._inputs, strict=True)]
            outputs = self._tasks.outputs_of_rows(rows)
        columns = [_entries(model, output) for model, output in zip(self._tasks.classifiers, outputs, strict=True)]
        return [dict(zip(self._tasks.names, entries, strict=True)) for entries in zip(*columns, strict=True)]

    def warm_up(self) -> None:
        """Answer black images, so that the first request is not slower than others."""
        image = [torch.zeros(3, item.crop, item.crop, dtype=torch.uint8) for item in self._tasks.preprocessings]
        for count in (1, self.batch_size):
            self.answer([image] * count)


def _describe(model: ImageClassifier) -> dict[str, Any]:
    return {
        "classes": list(model.classes),
        "sha256": fingerprint_tensors(sorted(model.trained_tensors().items())),
        "backbone": {"name": model.backbone.name, "sha256": model.backbone.sha256},
    }


def _entries(model: ImageClassifier, outputs: Outputs) -> list[dict[str, Any]]:
    """The answer of a task for each image."""
    probabilities = outputs.probabilities.cpu()
    best = probabilities.topk(min(TOP_CLASSES, len(model.classes)))
    labels = [model.classes[label] for label in model.task.predict(probabilities).label.tolist()]
    entries: list[dict[str, Any]] = [
        {
            "class": label,
            "probability": max(values),
            "top": [
                {"class": model.classes[index], "probability": value}
                for value, index in zip(values, indices, strict=True)
            ],
        }
        for label, values, indices in zip(labels, best.values.tolist(), best.indices.tolist(), strict=True)
    ]
    if outputs.answers is not None:
        for entry, answer in zip(entries, answers_of(outputs.answers, labels, model.classes), strict=True):
            further = {"known": answer.known, "set": answer.classes, "answered": answer.answered}
            entry["calibrated_probability"] = answer.probability
            entry |= {name: value for name, value in further.items() if value is not None}
    return entries


def set_policies(tasks: ManyTasks, limits: Mapping[str, float | None]) -> None:
    """Let each classifier give calibrated answers, if any limit is given.

    Args:
        tasks: The classifiers.
        limits: Arguments of :meth:`~project.classifier.ImageClassifier.make_policy`.

    Raises:
        ConfigError: A classifier has no calibrated answers, or they do not permit a limit.
    """
    if all(value is None for value in limits.values()):
        return
    for name, model in zip(tasks.names, tasks.classifiers, strict=True):
        try:
            model.answer_policy = model.make_policy(**limits)
        except ConfigError as error:  # the message begins with the name of a limit
            raise ConfigError(f"Task {name}: --{error}") from error


def select_engines(tasks: ManyTasks, provider: RowProvider, precision: str) -> tuple[list[Engine | None], list[str]]:
    """Choose the engine of each group, as a fit does.

    Args:
        tasks: The classifiers, on their device.
        provider: Has the settings of the engine.
        precision: Lightning's name of a precision.

    Returns:
        The engine of each group, and a description of each; ``None`` where the frozen prefix itself is run: if it is
        the fastest, or if nothing is frozen.
    """
    engines: list[Engine | None] = []
    reasons = []
    generator = torch.Generator().manual_seed(0)
    for group in tasks.groups:
        model = tasks.classifiers[group[0]]
        if not model.cut.frozen:
            engines.append(None)
            reasons.append("torch fp32, because no stage is frozen")
            continue
        side = model.backbone.preprocessing.crop
        images = torch.randint(0, 256, (MEASURED_IMAGES, 3, side, side), dtype=torch.uint8, generator=generator)
        option, engine, reason = provider.select(model.prefix_spec(model.device, precision), images)
        engines.append(None if isinstance(engine, ExactEngine) else engine)
        reasons.append(f"{option} ({reason})")
    return engines, reasons
