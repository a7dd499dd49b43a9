"""Training on stored rows: what the frozen prefix makes of an image is computed once, not in every epoch."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch

from project.classifier import ImageClassifier
from project.data.datamodule import ImageDataModule
from project.data.samples import Source
from project.errors import ConfigError
from project.machine import cache_folder
from project.terminal import counting, say

if TYPE_CHECKING:  # what a fit alone needs is imported when one begins
    from project.features.engines import Engines, Option
    from project.features.extract import Image
    from project.features.ranks import Ranks
    from project.features.rows import RowLoader, Rows
    from project.features.supply import Progress, Supplied

#: Views of an image where the data is augmented and ``views`` says nothing.
VIEWS = 4
CALIBRATION = 128  # train images that int8 is calibrated on


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
        engine: Literal["auto", "torch", "compile", "onnxruntime"] = "auto",
        precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = "auto",
        budget: float = 20.0,
        folder: str | None = None,
    ) -> None:
        if views is not None and views < 1:
            raise ConfigError(f"features.views has to be at least 1, not {views}.")
        if not 0 < budget < math.inf:
            raise ConfigError(f"features.budget has to be more than 0 gigabytes, not {budget:g}.")
        # YAML reads a bare on or off as true or false
        self._cache = ("on" if cache else "off") if isinstance(cache, bool) else cache
        self._views = views
        self._engine = engine
        self._precision = precision
        self._budget = round(budget * 1e9)
        self._root = Path(folder).expanduser() if folder else cache_folder()
        self._in_use: tuple[ImageDataModule, Rows] | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._cache == "off":
            return
        from project.features.supply import OverBudgetError

        data: Any = getattr(trainer, "datamodule", None)
        why_not = self._why_not(trainer, pl_module, data)
        if why_not is None:
            assert isinstance(pl_module, ImageClassifier)
            try:
                self._use(trainer, pl_module, data)
                return
            except OverBudgetError as error:
                why_not = str(error)
        asked = self._cache == "on" or (self._views or 1) > 1 or (self._engine, self._precision) != ("auto", "auto")
        if asked and not getattr(trainer, "fast_dev_run", False):
            raise ConfigError(
                f"Features cannot be stored: {why_not}. Change that, or leave out the flags that ask for stored ones: "
                "features.views, engine, precision, and cache on."
            )
        say(f"Features: computed in every epoch, because {why_not}")

    def _why_not(self, trainer: pl.Trainer, module: pl.LightningModule, data: Any) -> str | None:
        if not isinstance(module, ImageClassifier) or not isinstance(data, ImageDataModule) or data.source is None:
            return "the data does not come from an ImageDataModule"
        if trainer.fit_loop._data_source.instance is not data:
            return "the fit was given loaders of its own"
        if type(data.source).read is not Source.read:
            return f"{type(data.source).__name__} reads its images past decode(), which is what features are kept of"
        if not module.backbone.frozen_names:
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
        from project.features.engines import Engines
        from project.features.extract import digest_all, load_image, views_of
        from project.features.ranks import Ranks
        from project.features.rows import Rows
        from project.features.supply import supply

        source, device, ranks = data.source, trainer.strategy.root_device, Ranks()
        assert source is not None
        train, val = data.splits["train"], data.splits["val"]
        digests = digest_all(source, [*train, *val], ranks)
        epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else VIEWS
        count = self._views or min(VIEWS, epochs)
        names = [f"view {n}" for n in range(1, count)] if data.augment != "none" else []
        views = views_of(source, train, digests[: len(train)], data.evaluation_transform(), [""])
        views += views_of(source, train, digests[: len(train)], data.training_transform(), names)
        plain = views_of(source, val, digests[len(train) :], data.evaluation_transform(), [""])
        if data.augment != "none":
            without = "" if names else ", so nothing is augmented: raise features.views"
            say(f"Features: {len(views)} views an image, {len(names)} with data.augment {data.augment}{without}")
        # All views of an image come together, so that what it is read from is passed over once.
        ordered = [*itertools.chain.from_iterable(zip(*views, strict=True)), *plain[0]]
        images = list({image.key: image for image in ordered}.values())

        def calibration() -> torch.Tensor:
            return torch.stack([load_image(source, image) for image in views[0][:: -(-len(train) // CALIBRATION)]])

        task = " ".join([source.name, *source.classes])
        layout = "channels_last" if module.hparams["channels_last"] else "contiguous"
        engines = Engines(self._root, module.backbone, module.encode, device, task, calibration, layout)
        options = self._options(engines, str(trainer.precision), ranks)
        with _progress(len(images), ranks) as progress:
            supplied = supply(
                images, source, options, module.backbone, device, self._root, self._budget, ranks, progress
            )
        self._tell(trainer, supplied, len(images))
        rows = Rows(supplied.found, _memory(device) // ranks.size, device)
        place = {image.key: index for index, image in enumerate(images)}
        data.instead = {
            "train": _loader(trainer, rows, views, place, data, "train"),
            "val": _loader(trainer, rows, plain, place, data, "val"),
        }
        trainer.fit_loop._combined_loader = None  # somebody may have looked at the loaders before
        self._in_use = data, rows
        if supplied.option.precision == "int8" and ranks.rank == 0:
            from project.features.fidelity import report

            say(
                report(
                    supplied,
                    rows,
                    place,
                    [*zip(views[0], train, strict=True)],
                    [*zip(plain[0], val, strict=True)],
                    engines.reference,
                    source,
                )
            )

    def _options(self, engines: Engines, trainer_precision: str, ranks: Ranks) -> list[Option]:
        precision = None if self._precision == "auto" else self._precision
        options: list[Option] = []
        for turn in range(2):  # what is exported and calibrated is written by one process, then read by the others
            with ranks.together():
                if (ranks.rank == 0) == (turn == 0):
                    options = engines.options(self._engine, precision, trainer_precision)
        return options

    def _tell(self, trainer: pl.Trainer, supplied: Supplied, count: int) -> None:
        if supplied.damaged:
            say(f"Features: {supplied.damaged} files were damaged; their rows were computed anew")
        reused, how = count - supplied.computed, ""
        if supplied.computed:
            how = f" in {supplied.seconds:.1f} s ({supplied.computed / supplied.seconds:.0f} images/s"
            how += f", {supplied.prepared:.1f} s to choose and build the engine before)"
        option = supplied.option
        text = f"{reused} rows reused, {supplied.computed} computed{how}; {option.name} {option.precision}"
        say(f"Features: {text}")
        values = {"features/rows_reused": float(reused), "features/rows_computed": float(supplied.computed)}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
            add_text = getattr(getattr(logger, "experiment", None), "add_text", None)
            if add_text is not None:
                add_text("features", f"{text} ({supplied.reason}) in {option.space.path}", trainer.global_step)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._let_go()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._let_go()

    def _let_go(self) -> None:
        if self._in_use is not None:
            data, rows = self._in_use
            data.instead = {}
            rows.close()
            self._in_use = None


@contextmanager
def _progress(count: int, ranks: Ranks) -> Iterator[Progress]:
    """A bar on a terminal, lines elsewhere; from the first process."""
    from project.features.supply import Progress

    done, total = 0, 0
    with counting("Features", ranks.rank == 0) as show:

        def begins(option: Option, reason: str, computed: int, mine: int) -> None:
            nonlocal total
            total = mine
            show(0, total)
            say(f"Features: {computed} of {count} rows to compute, by {option.name} {option.precision} ({reason})")

        def advance(more: int) -> None:
            nonlocal done
            done += more
            show(done, total)

        yield Progress(
            begins, advance, lambda: say("Features: another process is computing these rows; waiting for it")
        )


def _loader(
    trainer: pl.Trainer,
    rows: Rows,
    views: Sequence[Sequence[Image]],
    place: dict[bytes, int],
    data: ImageDataModule,
    name: str,
) -> RowLoader:
    from project.features.rows import RowLoader

    order = data.order(name)
    limit = trainer.limit_val_batches
    return RowLoader(
        rows,
        torch.tensor([[place[image.key] for image in view] for view in views]),
        torch.tensor([sample.label for sample in data.splits[name]]),
        data.batch_size,
        order,
        # Over-fitting on some batches is over the same ones in each epoch, in one view.
        epoch=lambda: 0 if trainer.overfit_batches else trainer.current_epoch,  # type: ignore[attr-defined]
        evaluates=name != "train" and not (isinstance(limit, int) and limit > 0),
    )


def _memory(device: torch.device) -> int:
    """Bytes that rows may take of the device's memory: half of what is free on a GPU, a quarter of all on a CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
