"""Several classifiers on the same images: each frozen prefix that they share runs once per image."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, Self

import lightning.pytorch as pl
import torch

from project.classifier import ImageClassifier
from project.data.prediction_loader import PredictionBatch
from project.errors import CheckpointError
from project.evaluation.step_outputs import Outputs
from project.models.loading import load_backbone


class ManyTasks(pl.LightningModule):
    """Classifiers of several tasks, for inference.

    Classifiers with the same backbone, frozen prefix and preprocessing form a group. The prefix of a group runs once
    per batch; the probabilities are bit-identical to those of each classifier alone.

    Args:
        names: Unique name of each task.
        classifiers: Classifier of each task.

    Attributes:
        names: Names of the tasks.
        classifiers: The classifiers, in the same order.
        groups: Positions of the classifiers of each group.
        preprocessings: The different preprocessings of the classifiers.
    """

    def __init__(self, names: Sequence[str], classifiers: Sequence[ImageClassifier]) -> None:
        super().__init__()
        self.names = list(names)
        self.classifiers = list(classifiers)
        for position, classifier in enumerate(classifiers):  # direct children, to which Lightning passes the trainer
            self.add_module(f"task{position}", classifier)
        groups: dict[Hashable, list[int]] = {}
        for position, classifier in enumerate(classifiers):
            groups.setdefault(_prefix_key(classifier), []).append(position)
        self.groups = list(groups.values())
        self.preprocessings = list(dict.fromkeys(classifier.backbone.preprocessing for classifier in classifiers))

    @classmethod
    def load(cls, paths: Sequence[str | Path], **changes: Any) -> Self:
        """Load the classifiers of checkpoints. Equal backbones are loaded once and share their frozen stages.

        Args:
            paths: The checkpoints; :func:`task_names` gives their names.
            changes: Constructor arguments that override those of each checkpoint.

        Raises:
            CheckpointError: A checkpoint is given twice, missing, damaged, unsafe, or does not match its backbone.
            WeightsError: The weights of a backbone are not available on this machine.
        """
        names, backbones = task_names(paths), functools.cache(load_backbone)
        return cls(
            names, [ImageClassifier.load_from_checkpoint(path, backbones=backbones, **changes) for path in paths]
        )

    @property
    def classes(self) -> list[tuple[str, ...]]:
        """Class names of each task."""
        return [classifier.classes for classifier in self.classifiers]

    def setup(self, stage: str) -> None:
        """Set up each classifier, and pass the preprocessings to the data.

        Raises:
            DataError: The data has other classes than a classifier.
            ConfigError: The precision would change the frozen weights.
        """
        for classifier in self.classifiers:
            classifier.setup(stage)
        data: Any = getattr(self.trainer, "datamodule", None)
        if hasattr(data, "preprocessing"):
            data.preprocessing, *data.further_preprocessings = self.preprocessings

    def forward(self, images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Probabilities of each task, float32 ``(B, C)``; see :meth:`outputs`."""
        return [output.probabilities for output in self.outputs(images)]

    def outputs(self, images: Sequence[torch.Tensor]) -> list[Outputs]:
        """Predictions of each task.

        Args:
            images: The images in each of :attr:`preprocessings`: ``(B, 3, H, W)``, uint8 or float in [0, 1].
        """
        firsts = [self.classifiers[group[0]] for group in self.groups]
        return self.outputs_of_rows(
            [first.encode(images[self.preprocessings.index(first.backbone.preprocessing)]) for first in firsts]
        )

    def outputs_of_rows(self, rows: Sequence[torch.Tensor]) -> list[Outputs]:
        """Predictions of each task.

        Args:
            rows: Rows at the cut of each of :attr:`groups`, ``(B, ...)``.
        """
        results: dict[int, Outputs] = {}
        for group, group_rows in zip(self.groups, rows, strict=True):
            for position in group:
                # Cloned, because a stage or a head may start with an operation that modifies its input.
                results[position] = self.classifiers[position].outputs(group_rows.clone())
        return [results[position] for position in range(len(self.names))]

    def predict_step(self, batch: PredictionBatch, batch_idx: int) -> Any:
        """Paths, and probabilities of each task, of a batch of images in each preprocessing, or of their rows.

        If the tasks have an answer policy, the third item are the answers of each task.
        """
        names = batch.images.names
        if batch.encoded:
            dtypes = (self.classifiers[group[0]].backbone.mean.dtype for group in self.groups)
            outputs = self.outputs_of_rows([rows.to(dtype) for rows, dtype in zip(batch.inputs, dtypes, strict=True)])
        else:
            outputs = self.outputs(batch.inputs)
        probabilities, answers = [output.probabilities for output in outputs], [output.answers for output in outputs]
        return (names, probabilities) if None in answers else (names, probabilities, answers)

    def describe(self) -> str:
        """One line: the tasks of each group."""
        groups = "; ".join(" and ".join(self.names[position] for position in group) for group in self.groups)
        return f"Tasks: {len(self.names)}; backbone runs per image: {len(self.groups)} ({groups})"


def _prefix_key(classifier: ImageClassifier) -> Hashable:
    """Equal for classifiers whose prefixes map an image to bit-identical rows."""
    backbone, options = classifier.backbone, classifier.hparams
    identity = backbone.name, backbone.sha256, classifier.cut, backbone.features, backbone.preprocessing
    return *identity, options["channels_last"], options["compile"]


def task_names(paths: Sequence[str | Path]) -> list[str]:
    """Names of the tasks of checkpoints: ``flowers`` for ``runs/flowers/version_0/checkpoints/best.ckpt``.

    Equal names get more of the path: ``flowers/version_0``, then ``flowers/version_0/best``. A checkpoint outside a run
    folder has the name of its file, preceded by its folders where that is necessary.

    Raises:
        CheckpointError: A checkpoint is given twice.
    """
    files = [Path(path).expanduser().resolve() for path in paths]
    repeated = [path for path, file in zip(paths, files, strict=True) if files.count(file) > 1]
    if repeated:
        raise CheckpointError(f"The checkpoint {repeated[0]} is given twice. Pass each checkpoint once.")
    candidates = [_candidates(file) for file in files]
    depth, names = 0, [names[0] for names in candidates]
    while len(set(names)) < len(names):
        depth, counts = depth + 1, Counter(names)
        names = [
            longer[min(depth, len(longer) - 1)] if counts[name] > 1 else name
            for name, longer in zip(names, candidates, strict=True)
        ]
    return names


def _candidates(file: Path) -> list[str]:
    """Names of a checkpoint's task, from short to long; the last one is its whole path."""
    parts = file.with_suffix("").parts[1:]
    if len(parts) >= 4 and parts[-2] == "checkpoints":  # NAME/version_N/checkpoints/FILE
        name, version, _, stem = parts[-4:]
        names = [name, f"{name}/{version}", f"{name}/{version}/{stem}"]
    else:
        names = ["/".join(parts[start:]) for start in reversed(range(len(parts)))]
    return [*names, str(file)]
