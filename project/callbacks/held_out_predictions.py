"""Predictions of images that the head was not trained on, with distances to stored rows of training images."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from project.classifier import ImageClassifier
from project.data.datamodule import ImageDataModule
from project.evaluation.answers.held_out import HeldOutImages, max_images
from project.evaluation.answers.unknown_images import distances, quantized, select_rows
from project.evaluation.candidates import STAGES
from project.evaluation.step_outputs import StepOutput
from project.evaluation.validation_data import validated_images
from project.features.feature_reader import FeatureReader
from project.features.row_loader import RowLoader
from project.runtime import lightning_internals
from project.runtime.distributed import ProcessGroup
from project.task import Task


def out_of_fold_images(reader: FeatureReader, folds: torch.Tensor, logits: torch.Tensor, task: Task) -> HeldOutImages:
    """Predictions of training images by heads that were not trained on them.

    Args:
        reader: Reads the features of the training images.
        folds: Cross-validation fold of each image, int64 ``(N,)``; negative for images that are never held out.
        logits: Out-of-fold logits ``(N, C)``.
        task: Of the model.

    Returns:
        At most :func:`~project.evaluation.answers.held_out.max_images` images. Rows of the same fold do not count in
        their distances.
    """
    labels = reader.rows.labels
    images = (folds >= 0).nonzero()[:, 0]
    limit = max_images(logits.shape[1])
    if len(images) > limit:
        drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:limit]
        images = images[drawn.sort().values]
    first = reader.read(images[:1])
    stored = torch.from_numpy(select_rows(labels.numpy(), first.shape[1]))
    rows = quantized(reader.read(stored).cpu().numpy())
    parts = torch.split(images, reader.rows.evaluation_batch_size)
    measured = [
        distances(reader.read(part).cpu().numpy(), rows, (folds[part, None] == folds[stored]).numpy()) for part in parts
    ]
    return HeldOutImages(task.probabilities(logits[images]).numpy(), labels[images].numpy(), np.concatenate(measured))


@torch.no_grad()
def stored_rows(trainer: pl.Trainer, module: ImageClassifier, data: ImageDataModule) -> np.ndarray:
    """Features of some training images, int8 ``(M, D)``, with the current weights.

    Args:
        trainer: The trainer of the fit.
        module: Its model.
        data: Its data.
    """
    stored, was_training, device = data.loaders["train"].rows, module.training, trainer.strategy.root_device
    chosen = torch.from_numpy(select_rows(data.training_labels.numpy(), module.backbone.feature_dim))
    module.eval()
    try:
        if isinstance(stored, RowLoader):
            return quantized(
                FeatureReader(stored, module.refine, device, module.backbone.mean.dtype).read(chosen).cpu().numpy()
            )
        parts = []
        for images, *_ in data.training_images(chosen.tolist()):
            with trainer.precision_plugin.forward_context():
                parts.append(module.refine(module.encode(images.to(device))).float().cpu())
        return quantized(torch.cat(parts).numpy())
    finally:
        module.train(was_training)


def validation_images(
    trainer: pl.Trainer, module: ImageClassifier, data: ImageDataModule, rows: np.ndarray
) -> HeldOutImages:
    """Predictions of the validation images with the current weights. Collective: all ranks must call it.

    Of many images, a random part is kept, so that the memory is bounded.

    Args:
        trainer: The trainer of a fit, with its validation batches loaded.
        module: Its model.
        data: Its data.
        rows: Features of training images ``(M, D)``.
    """
    parts: list[HeldOutImages] = []
    ranks, limit = ProcessGroup(), max_images(len(module.classes))
    share = 1.1 * limit / validated_images(trainer, data)  # of which max_images() are used in the end
    generator = np.random.default_rng(ranks.rank)

    def update(batch: Any, output: StepOutput) -> None:
        kept = torch.from_numpy(np.flatnonzero(generator.random(len(output.labels)) < share)).to(output.labels.device)
        if len(kept):  # a rank may have only padding
            probabilities, labels = output.probabilities[kept].cpu().numpy(), output.labels[kept].cpu().numpy()
            features = output.features[kept].float().cpu().numpy()
            parts.append(HeldOutImages(probabilities, labels, distances(features, rows)))

    lightning_internals.run_validation_steps(trainer, update)
    for stage in STAGES.values():
        module.epoch_metrics(stage).reset()  # keeps the results of the fit's own validation
    all_parts = [part for rank in ranks.gather(parts) for part in rank]
    return HeldOutImages.concatenated(all_parts, len(module.classes))
