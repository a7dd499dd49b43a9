"""A fit that is resumed goes on as if it had never stopped, to the bit."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler

from project.callbacks import early_stopping_resume
from project.classifier import ImageClassifier
from project.data.datamodule import ImageDataModule
from project.errors import CheckpointError, ConfigError, abbreviate, damaged_checkpoint
from project.runtime import lightning_internals
from project.runtime.console import print_rank_zero
from project.runtime.distributed import ProcessGroup
from project.runtime.seeding import reseed, run_seed

KEY = "resume"


class ExactResume(Callback):
    """Puts into a checkpoint what Lightning leaves out, and takes it up again.

    That is: the state of what draws random numbers; the metrics of an epoch that is not over; and what a scheduler
    that watches a metric has yet to see, as Lightning saves before it steps it. What is drawn within a step comes from
    the run's seed, the epoch and the batch, in each process, so nothing that was drawn before it matters.
    """

    def __init__(self) -> None:
        self._kept: Mapping[str, Any] | None = None
        self._data: str | None = None
        self._accumulated: int | None = None
        self._validated: int | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._data = _outline(trainer) if stage == "fit" else None  # once: it is saved in every epoch

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        progress, validation = lightning_internals.epochs(trainer), lightning_internals.validation_batches(trainer)
        within = progress.processed < progress.ready
        mine: dict[str, Any] = {"chance": _chance()}
        if within and isinstance(pl_module, ImageClassifier):
            mine["train"] = pl_module.epoch_metrics("train").state()
        checkpoint[KEY] = {
            "seed": run_seed(),
            "batches_of": _batches_of(trainer),
            "data": self._data,
            "within": within,
            "validating": within and trainer.validating,
            # What has seen a validation's end has counted it; it is repeated all the same when the epoch goes on.
            "counted": within and trainer.validating and validation.completed == validation.ready,
            "watched": _watched(trainer),
            "processes": _of_all(trainer, mine),
        }
        if within:
            accumulates = lightning_internals.accumulates_gradients(trainer)
            lightning_internals.make_resumable(checkpoint, trainer.validating, accumulates)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        kept = checkpoint.get(KEY)
        if kept is not None and trainer.state.fn == "fit":
            with ProcessGroup().together():
                self._go_on(trainer, checkpoint, kept)

    def _go_on(self, trainer: pl.Trainer, checkpoint: dict[str, Any], kept: Mapping[str, Any]) -> None:
        with _refusing_damage():
            then, now, told = kept["batches_of"], _batches_of(trainer), _told(kept["batches_of"])
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(each, GradientAccumulationScheduler) for each in callbacks):
            now["accumulated"] = then["accumulated"]
            self._accumulated = then["accumulated"] if kept["within"] else None  # the callback says it to new epochs
        data, ours = kept.get("data"), self._data
        if data is not None and ours is not None and data != ours:
            if kept["within"]:
                raise CheckpointError(
                    "The checkpoint was saved within an epoch of other images, or other labels of them.\n"
                    "Give the data as it was, or a checkpoint of an epoch's end."
                )
            print_rank_zero(
                "Checkpoint: the images or their labels are not those that it was trained on; it goes on with these"
            )
        if kept["within"] and then != now:
            raise CheckpointError(
                "The checkpoint was saved within an epoch, whose batches this fit cannot go on with: there were "
                f"{told}, now {_told(now)}.\nTake the same, or a checkpoint of an epoch's end."
            )
        with _refusing_damage():
            why = early_stopping_resume.restore_early_stopping(
                trainer, checkpoint, kept["watched"], kept.get("counted", False)
            )
        if why:
            raise ConfigError(
                f"EarlyStopping has ended this fit, and would end it again at once: {why}\n"
                "Give it more patience or other thresholds, or leave it out, to go on."
            )
        self._kept = kept

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        kept, self._kept = self._kept, None
        if kept is None:
            return
        with _refusing_damage():
            mine = kept["processes"][trainer.global_rank % len(kept["processes"])]
            if kept["within"]:
                validated = lightning_internals.discard_started_batches(trainer)
                self._validated = None if kept.get("validating", True) else validated
                if isinstance(pl_module, ImageClassifier):
                    pl_module.epoch_metrics("train").merge(mine["train"])
            for config in trainer.lr_scheduler_configs:
                if config.reduce_on_plateau and kept["watched"] and not kept["within"]:
                    config.scheduler.step(kept["watched"][str(config.monitor)])
                    lightning_internals.count_scheduler_step(trainer)
            _take_up(mine["chance"])

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # They were of the epoch which was resumed within, where nobody calls this.
        self._accumulated = self._validated = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._accumulated is not None:
            trainer.accumulate_grad_batches, self._accumulated = self._accumulated, None
        if self._validated is not None:  # Lightning counts the validation before this batch once more
            lightning_internals.set_validated_batches(trainer, self._validated)
            self._validated = None
        reseed(pl_module.device, run_seed(), "step", trainer.current_epoch, batch_idx, trainer.global_rank)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Or else Lightning, in an epoch that was resumed within, leaves out the schedulers that watch a metric.
        lightning_internals.end_restart(trainer)


@contextmanager
def _refusing_damage() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever is wrong with it: it may come from anywhere
        raise damaged_checkpoint(
            f"The checkpoint is damaged: what it keeps for a fit to go on cannot be taken up ({abbreviate(error)})."
        ) from error


def _batches_of(trainer: pl.Trainer) -> dict[str, int]:
    size = getattr(getattr(trainer, "datamodule", None), "batch_size", 0)
    return {"images": size, "processes": trainer.world_size, "accumulated": trainer.accumulate_grad_batches}


def _outline(trainer: pl.Trainer) -> str | None:
    """What tells data from other data without reading an image: SHA-256 of which class each image of a split is."""
    data: Any = getattr(trainer, "datamodule", None)
    if not isinstance(data, ImageDataModule):
        return None
    labels = {name: [sample.label for sample in samples] for name, samples in sorted(data.splits.items())}
    return hashlib.sha256(json.dumps([data.classes, labels]).encode()).hexdigest()


def _told(batches: Mapping[str, int]) -> str:
    return (
        f"batches of {batches['images']} in {batches['processes']} processes (data.batch_size, trainer.devices), "
        f"{batches['accumulated']} accumulated"
    )


def _watched(trainer: pl.Trainer) -> dict[str, float]:
    """The last value of each metric that a scheduler or EarlyStopping goes by."""
    names = [str(config.monitor) for config in trainer.lr_scheduler_configs if config.reduce_on_plateau]
    names += [each.monitor for each in early_stopping_resume.early_stopping_callbacks(trainer)]
    return {name: float(trainer.callback_metrics[name]) for name in names if name in trainer.callback_metrics}


def _of_all(trainer: pl.Trainer, mine: dict[str, Any]) -> list[dict[str, Any]]:
    """What each process has, in the order of their ranks."""
    if trainer.world_size == 1:
        return [mine]
    found: list[dict[str, Any]] = [{} for _ in range(trainer.world_size)]
    torch.distributed.all_gather_object(found, mine)
    return found


def _chance() -> dict[str, Any]:
    """The state of what draws random numbers in this process, in plain types."""
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "random": [version, list(words), gauss],
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
    }


def _take_up(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([each.cpu() for each in state["cuda"]])
    version, words, gauss = state["random"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
