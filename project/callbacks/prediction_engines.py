"""Prediction with the engines that compute stored features."""

from __future__ import annotations

import functools
from typing import Any

import lightning.pytorch as pl
import torch

from project.callbacks.prediction_writer import PredictionWriter
from project.classifier import ImageClassifier
from project.data.transforms import evaluation
from project.errors import ConfigError
from project.features.frozen_prefix import PrefixSpec
from project.features.provider import RowProvider
from project.runtime.console import print_rank_zero

NETWORK = "network"  # recorded if no engine is used
SAMPLED_IMAGES = 32  # images to estimate how many rows are stored


class PredictionEngines(pl.Callback):
    """Computes the rows of the images to predict with an engine, instead of the frozen stages themselves.

    Rows that a fit has stored with the same engine are reused; none are stored. The trained stages and the head run in
    the trainer's precision. Without frozen stages, or with ``model.compile``, the network itself predicts.

    Args:
        provider: Chooses the engines.
        writer: Knows which engines have predicted the earlier part of an interrupted run.
        reuses_rows: Whether rows are reused.
    """

    def __init__(self, provider: RowProvider, writer: PredictionWriter, reuses_rows: bool = True) -> None:
        self._provider = provider
        self._writer = writer
        self._reuses_rows = reuses_rows

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data: Any = getattr(trainer, "datamodule", None)
        loader = getattr(data, "predict_loader", None)
        if loader is None:
            return
        reason = _obstacle(pl_module)
        earlier = self._writer.earlier_engines
        if reason is not None:
            if earlier not in (None, [NETWORK]):
                raise ConfigError(
                    f"The earlier part was predicted with {' and '.join(earlier)}. Now the network itself would "
                    f"predict, because {reason}. Repeat the earlier command to complete it."
                )
            print_rank_zero(f"Features: computed by the network itself, because {reason}")
            self._writer.record_engines([NETWORK])
            return
        from project.features.prediction_rows import PrefixEngine, decoding_processes, encoded_batches
        from project.features.stored_rows import StoredRows, stored_share
        from project.features.views import view_description
        from project.runtime.system import cores

        specs = _prefixes(pl_module, trainer)
        preprocessings = [data.preprocessing, *data.further_preprocessings]
        source = loader.dataset.source
        engines, names, spaces = [], [], []
        sample = functools.cache(lambda: loader.sample(SAMPLED_IMAGES) if self._reuses_rows else [])
        # Not in Lightning's inference mode, in which networks cannot be exported or compiled for other threads.
        with torch.inference_mode(False), torch.no_grad():
            for number, spec in enumerate(specs):
                position = preprocessings.index(spec.backbone.preprocessing)
                description = view_description(source, evaluation(spec.backbone.preprocessing))
                engine, option = self._provider.prediction_engine(
                    spec,
                    f"predict {self._writer.fingerprint}",
                    lambda count, position=position: loader.dataset.first_images(count)[position],  # type: ignore[misc]
                    self._writer.pending_count,
                    earlier[number] if earlier is not None else None,
                    lambda space, description=description: stored_share(space, description, sample()),  # type: ignore[misc]
                )
                engines.append(PrefixEngine(engine, position))
                names.append(str(option))
                spaces.append((option.space, description))
        self._writer.record_engines(names)
        if any(item.engine.prefetch for item in engines):
            loader.num_workers = decoding_processes(data.given_workers, loader.num_workers, cores())
        stored = StoredRows(spaces)
        loader.dataset.stored = stored if self._reuses_rows and not stored.is_empty else None
        loader.rows = lambda images: encoded_batches(images, engines)


def _classifiers(module: pl.LightningModule) -> list[ImageClassifier]:
    """A classifier of each group that shares a frozen prefix."""
    if isinstance(module, ImageClassifier):
        return [module]
    tasks: Any = module  # ManyTasks, of a package that this one does not import
    return [tasks.classifiers[group[0]] for group in tasks.groups]


def _prefixes(module: pl.LightningModule, trainer: pl.Trainer) -> list[PrefixSpec]:
    device, precision = trainer.strategy.root_device, str(trainer.precision)
    return [classifier.prefix_spec(device, precision) for classifier in _classifiers(module)]


def _obstacle(module: pl.LightningModule) -> str | None:
    """Why engines cannot be used; ``None`` if they can."""
    for classifier in _classifiers(module):
        if not classifier.cut.frozen:
            return "no stage is frozen"
        if classifier.hparams["compile"]:
            return "model.compile is set"
    return None
