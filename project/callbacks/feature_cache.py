"""Training on stored rows: what the frozen prefix makes of an image is computed once, not in every epoch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch

from project.classifier import ImageClassifier
from project.data.datamodule import ImageDataModule
from project.data.sources.base import Source
from project.data.split_fingerprint import count_common, split_fingerprint
from project.errors import ConfigError
from project.features.provider import EngineName, PrecisionName, RowProvider, StoredFeatures, memory, thinned
from project.runtime import lightning_internals
from project.runtime.console import print_rank_zero
from project.runtime.logger_adapters import log_text
from project.runtime.system import cache_folder

if TYPE_CHECKING:  # what a fit alone needs is imported when one begins
    from project.features.builder import Provided
    from project.features.row_loader import RowLoader, Rows

#: Views of an image where the data is augmented and ``views`` says nothing.
VIEWS = 4
EXAMPLES = 12  # views that are kept to be looked at


class FeatureCache(pl.Callback):
    """Computes each frozen feature once, keeps it on disk, and trains on what is kept.

    Rows are looked up by what they are made of: the image's bytes, the transform, the frozen weights, the engine with
    its precision, and the versions of the libraries. Change one, and the rows that it touches are computed anew.

    Args:
        cache: auto keeps features while a part of the backbone is frozen, on insists, off computes them in every epoch.
        views: Views that are kept of each training image, the plain one and then augmented ones; epochs take them in
            turn. By default 1, or 4 where data.augment is not none.
        engine: What computes features: torch, compile (torch.compile), onnxruntime (CPU), or auto, the one that has
            them all soonest.
        precision: Of the computation: fp32, bf16, fp16 or int8 (onnxruntime on a CPU); auto is what trainer.precision
            allows.
        budget: Gigabytes that all stored features may take; those used least recently make room.
        folder: Where features are kept; by default in the user's cache folder.
    """

    def __init__(
        self,
        cache: Literal["auto", "on", "off"] | bool = "auto",
        views: int | None = None,
        engine: EngineName = "auto",
        precision: PrecisionName = "auto",
        budget: float = 20.0,
        folder: str | None = None,
    ) -> None:
        if views is not None and views < 1:
            raise ConfigError(f"features.views has to be at least 1, not {views}.")
        # YAML reads a bare on or off as true or false
        self._cache = ("on" if cache else "off") if isinstance(cache, bool) else cache
        self._views = views
        self._asked = (engine, precision) != ("auto", "auto")
        #: Provides rows of images, to this fit and to others.
        self.provider = RowProvider(engine, precision, budget, Path(folder).expanduser() if folder else cache_folder())
        self._in_use: tuple[ImageDataModule, Rows, StoredFeatures] | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(pl_module, ImageClassifier):
            pl_module.stored_features = None
        if self._cache == "off":
            return
        from project.features.builder import OverBudgetError

        data: Any = getattr(trainer, "datamodule", None)
        why_not = self._why_not(trainer, pl_module, data)
        if why_not is None:
            assert isinstance(pl_module, ImageClassifier)
            try:
                self._use(trainer, pl_module, data)
                return
            except OverBudgetError as error:
                why_not = str(error)
        asked = self._cache == "on" or (self._views or 1) > 1 or self._asked
        if asked and not getattr(trainer, "fast_dev_run", False):
            raise ConfigError(
                f"Feature caching is not possible: {why_not}. Remove the options that require it: features.views, "
                "engine, precision, cache on."
            )
        print_rank_zero(f"Features: computed in every epoch, because {why_not}")

    def _why_not(self, trainer: pl.Trainer, module: pl.LightningModule, data: Any) -> str | None:
        if not isinstance(module, ImageClassifier) or not isinstance(data, ImageDataModule) or data.source is None:
            return "the data does not come from an ImageDataModule"
        if lightning_internals.training_loader(trainer) not in (None, data.loaders["train"]):
            return "the fit was given loaders of its own"
        if data.source.decoder.read is not Source.read:
            return f"{data.source.decoder.__name__} reads its images past decode(), which is what features are kept of"
        if not module.cut.frozen:
            return "model.trainable is all, so nothing is frozen, and every row changes with every step"
        if getattr(trainer, "fast_dev_run", False):
            return "trainer.fast_dev_run takes a batch or so"
        if data.mixes:
            return "data.mixup and data.cutmix mix images anew in every batch"
        if self._views is not None and self._views > 1 and data.augment == "none":
            return "without data.augment all features.views are the same"
        return None

    def _use(self, trainer: pl.Trainer, module: ImageClassifier, data: ImageDataModule) -> None:
        """Have all rows, and put them in the place of the images."""
        from project.features.row_loader import open_rows
        from project.features.views import digest_images, distinct, image_views
        from project.runtime.distributed import ProcessGroup

        source, device, ranks = data.source, trainer.strategy.root_device, ProcessGroup()
        assert source is not None
        train, val = data.splits["train"], data.splits["val"]
        digests = {"train": digest_images(source, train, ranks), "val": digest_images(source, val, ranks)}
        fingerprints = {
            name: split_fingerprint(data.splits[name], digests[name], source.classes) for name in ("train", "val")
        }
        in_both = count_common(digests["train"], digests["val"])
        stored = module.stored_features = StoredFeatures(fingerprints, in_both)
        if in_both:
            print_rank_zero(f"Data: images that are in train and in val: {in_both}; python -m project check names them")
        epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else VIEWS
        count = self._views or min(VIEWS, epochs)
        names = [f"view {n}" for n in range(1, count)] if data.augment != "none" else []
        views = image_views(source, train, digests["train"], data.evaluation_transform(), [""])
        views += image_views(source, train, digests["train"], data.training_transform(), names)
        (plain,) = image_views(source, val, digests["val"], data.evaluation_transform(), [""])
        del digests  # 32 bytes an image, which the keys have in them
        if data.augment != "none":
            without = "" if names else ", so nothing is augmented: raise features.views"
            augment = data.augment if isinstance(data.augment, str) else "of transforms"
            print_rank_zero(f"Features: {len(views)} views an image, {len(names)} with data.augment {augment}{without}")
        each = -(-len(train) // max(EXAMPLES // len(views), 1))  # from all over the split, which lies class by class
        stored.examples = [list(of_one) for of_one in zip(*(view[::each] for view in views), strict=True)]
        all_views, ((*of_train,), (of_val,)) = distinct([views, [plain]])
        count, typical = len(views), thinned(views[0])
        del views, plain  # their keys are in all_views
        computation = module.row_computation(device, str(trainer.precision))
        provided, engines = self.provider.provide(computation, source, all_views, typical)
        _log(trainer, provided)
        stored.computed_by = f"{provided.option}, {count} view(s) of a training image"
        space = provided.option.space
        rows = open_rows(space, all_views.keys, provided.found, memory(device, trainer.num_devices), device)
        data.loaders["train"].rows = _loader(trainer, rows, of_train, data, "train")
        data.loaders["val"].rows = _loader(trainer, rows, [of_val], data, "val")
        self._in_use = data, rows, stored
        if provided.option.precision == "int8" and ranks.rank == 0:
            from project.features.int8_report import report

            train_part, val_part = ((all_views.take(places), places) for places in (of_train[0], of_val))
            print_rank_zero(report(provided, rows, train_part, val_part, engines.reference, source))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._let_go()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._let_go()

    def _let_go(self) -> None:
        if self._in_use is not None:
            data, rows, stored = self._in_use
            data.loaders["train"].rows = data.loaders["val"].rows = None
            rows.close()
            self._in_use = None
            stored.examples = ()


def _log(trainer: pl.Trainer, provided: Provided) -> None:
    """Log how many rows were reused and computed, and by what."""
    values = {"features/rows_reused": float(provided.reused), "features/rows_computed": float(provided.computed)}
    for logger in trainer.loggers:
        logger.log_metrics(values, step=trainer.global_step)
    log_text(trainer, "features", f"{provided} ({provided.reason}) in {provided.option.space.path}")


def _loader(
    trainer: pl.Trainer, rows: Rows, views: Sequence[np.ndarray], data: ImageDataModule, name: str
) -> RowLoader:
    from project.features.row_loader import RowLoader

    limit = trainer.limit_val_batches
    samples = data.splits[name]
    return RowLoader(
        rows,
        torch.from_numpy(np.stack(views)),
        torch.from_numpy(np.fromiter((sample.label for sample in samples), np.int32, len(samples))),
        data.batch_size,
        data.order(name),
        epoch=data.epoch,
        evaluates=name != "train" and not (isinstance(limit, int) and limit > 0),
        skip_batches=lambda: data.skip_batches(name),
    )
