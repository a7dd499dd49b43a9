"""Training on cached features: the frozen prefix processes each image once, not in every epoch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
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
from project.features.provider import (
    EngineSetting,
    PrecisionSetting,
    RowProvider,
    StoredFeatures,
    calibration_subset,
    row_memory_budget,
)
from project.models.cut import Cut
from project.models.unfreezing import entry_name
from project.runtime import lightning_internals
from project.runtime.console import print_rank_zero
from project.runtime.logger_adapters import log_text
from project.runtime.system import cache_folder

if TYPE_CHECKING:  # imported only when a fit needs it
    from project.features.builder import BuildResult
    from project.features.row_loader import RowLoader, Rows

VIEWS = 4  # views per training image if the data is augmented and ``views`` is not given
EXAMPLES = 12  # views to show in reports


class FeatureCache(pl.Callback):
    """Computes each frozen feature once, stores it on disk, and trains on the stored features.

    A feature's key covers the image bytes, the transform, the frozen weights, the engine, the precision and the library
    versions. After a change, only the features that it affects are recomputed.

    Args:
        cache: auto caches features if a part of the backbone is frozen; on fails if that is not possible; off computes
            the features in every epoch, and in predict.
        views: Stored views per training image: the image itself, then augmented views; epochs cycle through them. By
            default 1, or 4 if data.augment is not none.
        engine: What computes features: torch, compile (torch.compile), onnxruntime (CPU), or auto, which picks the
            one with the lowest estimated total time.
        precision: fp32, bf16, fp16 or int8 (onnxruntime on a CPU); auto picks among those that trainer.precision
            allows.
        budget: Maximum size of all stored features in gigabytes; the least recently used are removed.
        folder: Folder of the feature store; by default in the user's cache folder.
    """

    def __init__(
        self,
        cache: Literal["auto", "on", "off"] | bool = "auto",
        views: int | None = None,
        engine: EngineSetting = "auto",
        precision: PrecisionSetting = "auto",
        budget: float = 20.0,
        folder: str | None = None,
    ) -> None:
        if views is not None and views < 1:
            raise ConfigError(f"features.views must be at least 1, not {views}.")
        # YAML parses on and off as booleans.
        self._cache = ("on" if cache else "off") if isinstance(cache, bool) else cache
        self._views = views
        self._options_given = (engine, precision) != ("auto", "auto")
        #: Provides rows of images; shared with other callbacks.
        self.provider = RowProvider(engine, precision, budget, Path(folder).expanduser() if folder else cache_folder())
        self._in_use: tuple[ImageDataModule, Rows, StoredFeatures] | None = None
        self._cut: Cut | None = None  # of the rows, or of live computation

    @property
    def is_enabled(self) -> bool:
        """Whether stored features may be used."""
        return self._cache != "off"

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(pl_module, ImageClassifier) and self._is_required(trainer):
            self._validate_later_cuts(trainer, pl_module)
        self._provide(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Follow a cut that has moved: see :class:`~project.callbacks.staged_unfreezing.StagedUnfreezing`."""
        if isinstance(pl_module, ImageClassifier) and pl_module.cut != self._cut:
            self.teardown()  # frees the memory of the earlier rows
            start = time.perf_counter()
            self._provide(trainer, pl_module)
            if self._in_use is not None:
                rows, seconds = self._in_use[1], time.perf_counter() - start
                size = len(rows) * rows.row_bytes / 1e6
                print_rank_zero(f"Features: {size:,.1f} MB of rows at the new cut, after {seconds:.1f} s")
            lightning_internals.reload_validation_data(trainer)  # batches of rows may have another size

    def _provide(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Train on rows at the cut, or compute them in every epoch."""
        if isinstance(pl_module, ImageClassifier):
            pl_module.stored_features, self._cut = None, pl_module.cut
        if not self.is_enabled:
            return
        from project.features.builder import OverBudgetError

        data: Any = getattr(trainer, "datamodule", None)
        reason = self._obstacle(trainer, pl_module, data)
        if reason is None:
            assert isinstance(pl_module, ImageClassifier)
            try:
                self._cache_features(trainer, pl_module, data)
                return
            except OverBudgetError as error:
                reason = str(error)
        if self._is_required(trainer):
            raise _not_possible(reason)
        print_rank_zero(f"Features: computed in every epoch, because {reason}{self._live_cost(pl_module, data)}")

    def _is_required(self, trainer: pl.Trainer) -> bool:
        """Whether options require stored features."""
        is_required = self._cache == "on" or (self._views or 1) > 1 or self._options_given
        return is_required and self.is_enabled and not getattr(trainer, "fast_dev_run", False)

    def _validate_later_cuts(self, trainer: pl.Trainer, module: ImageClassifier) -> None:
        """Check before training that the rows of each cut of a schedule can be stored."""
        data: Any = getattr(trainer, "datamodule", None)
        if module.unfreezing is None or self._obstacle(trainer, module, data) is not None:
            return
        for cut in module.unfreezing.cuts:
            if len(cut.frozen) >= len(module.cut.frozen):
                continue
            name = f"model.schedule {entry_name(cut)}"
            if not cut.frozen:
                raise _not_possible(f"{name} leaves no stage frozen")
            prefix = replace(module.prefix_spec(trainer.strategy.root_device, str(trainer.precision)), cut=cut)
            count = len(data.splits["train"]) * self._view_count(trainer, data) + len(data.splits["val"])
            size, budget = count * self.provider.row_bytes(prefix), self.provider.budget
            if size > budget:
                raise _not_possible(
                    f"the rows of {name} take about {size / 1e9:.3g} GB, and features.budget is {budget / 1e9:.3g}"
                )

    def _view_count(self, trainer: pl.Trainer, data: ImageDataModule) -> int:
        """Number of stored views per training image."""
        epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else VIEWS
        return (self._views or min(VIEWS, epochs)) if data.augment != "none" else 1

    def _live_cost(self, module: pl.LightningModule, data: Any) -> str:
        """The estimated time of the frozen stages per epoch, for a fit whose cut moves; empty if it is unknown."""
        if not isinstance(module, ImageClassifier) or not isinstance(data, ImageDataModule):
            return ""
        if module.unfreezing is None or not module.cut.frozen:
            return ""
        size = module.backbone.preprocessing.crop
        images = torch.zeros(min(data.batch_size, 16), 3, size, size, dtype=torch.uint8, device=module.device)
        start = time.perf_counter()
        float(module.encode(images).sum())  # waits for the device
        count = len(data.splits["train"]) + len(data.splits["val"])
        seconds = (time.perf_counter() - start) * count / len(images)
        return f"; the frozen stages take about {seconds:.1f} s per epoch"

    def _obstacle(self, trainer: pl.Trainer, module: pl.LightningModule, data: Any) -> str | None:
        """Why features cannot be cached; ``None`` if they can."""
        if not isinstance(module, ImageClassifier) or not isinstance(data, ImageDataModule) or data.source is None:
            return "the data does not come from an ImageDataModule"
        if lightning_internals.training_loader(trainer) not in (None, data.loaders["train"]):
            return "the fit uses its own data loaders"
        if data.source.decoder.read is not Source.read:
            return f"{data.source.decoder.__name__} overrides read(), and only what decode() returns can be cached"
        if not module.cut.frozen:
            return "no stage is frozen" if module.unfreezing else "model.trainable is all, so no stage is frozen"
        if getattr(trainer, "fast_dev_run", False):
            return "trainer.fast_dev_run runs only a few batches"
        if data.mixes:
            return "data.mixup and data.cutmix mix images differently in every batch"
        if self._views is not None and self._views > 1 and data.augment == "none":
            return "without data.augment, all features.views are identical"
        return None

    def _cache_features(self, trainer: pl.Trainer, module: ImageClassifier, data: ImageDataModule) -> None:
        """Compute the missing rows, and make the data loaders yield rows instead of images."""
        from project.features.row_loader import open_rows
        from project.features.views import deduplicate, digest_images, image_views
        from project.runtime.distributed import ProcessGroup

        source, device, ranks = data.source, trainer.strategy.root_device, ProcessGroup()
        assert source is not None
        train, val = data.splits["train"], data.splits["val"]
        digests = {"train": digest_images(source, train, ranks), "val": digest_images(source, val, ranks)}
        fingerprints = {
            name: split_fingerprint(data.splits[name], digests[name], source.classes) for name in ("train", "val")
        }
        overlap = count_common(digests["train"], digests["val"])
        stored = module.stored_features = StoredFeatures(fingerprints, overlap)
        if overlap:
            print_rank_zero(f"Data: {overlap} images are in both train and val; python -m project check lists them")
        names = [f"view {n}" for n in range(1, self._view_count(trainer, data))]
        views = image_views(source, train, digests["train"], data.evaluation_transform(), [""])
        views += image_views(source, train, digests["train"], data.training_transform(), names)
        (plain,) = image_views(source, val, digests["val"], data.evaluation_transform(), [""])
        del digests  # frees 32 bytes per image; they are part of the keys
        if data.augment != "none":
            hint = "" if names else "; increase features.views to augment images"
            augment = data.augment if isinstance(data.augment, str) else "transforms"
            print_rank_zero(f"Features: {len(views)} views per image, {len(names)} augmented ({augment}){hint}")
        stride = -(-len(train) // max(EXAMPLES // len(views), 1))  # over the whole split, which may be sorted by class
        stored.examples = [list(image) for image in zip(*(view[::stride] for view in views), strict=True)]
        all_views, ((*train_rows,), (val_rows,)) = deduplicate([views, [plain]])
        count, typical = len(views), calibration_subset(views[0])
        del views, plain  # frees their keys, which are also in all_views
        prefix = module.prefix_spec(device, str(trainer.precision))
        provided, engines = self.provider.provide(prefix, source, all_views, typical)
        _log(trainer, provided)
        stored.computed_by = f"{provided.option}, {count} view{'s' if count > 1 else ''} per training image"
        space = provided.option.space
        rows = open_rows(
            space, all_views.keys, provided.locations, row_memory_budget(device, trainer.num_devices), device
        )
        data.loaders["train"].rows = _loader(trainer, rows, train_rows, data, "train")
        data.loaders["val"].rows = _loader(trainer, rows, [val_rows], data, "val")
        self._in_use = data, rows, stored
        if provided.option.precision == "int8" and ranks.rank == 0:
            from project.features.int8_report import report

            train_part, val_part = ((all_views.take(places), places) for places in (train_rows[0], val_rows))
            print_rank_zero(report(provided, rows, train_part, val_part, engines.reference, source))

    def teardown(self, *_: Any, **__: Any) -> None:
        if self._in_use is not None:
            data, rows, stored = self._in_use
            data.loaders["train"].rows = data.loaders["val"].rows = None
            rows.close()
            self._in_use = None
            stored.examples = ()

    on_exception = teardown


def _not_possible(reason: str) -> ConfigError:
    return ConfigError(
        f"Feature caching is not possible: {reason}. Remove the options that require it: features.views, engine, "
        "precision, cache on."
    )


def _log(trainer: pl.Trainer, provided: BuildResult) -> None:
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
        epoch=data.current_epoch,
        evaluates=name != "train" and not (isinstance(limit, int) and limit > 0),
        skip_batches=lambda: data.skip_batches(name),
    )
