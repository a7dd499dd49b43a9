"""Exact resume: a resumed fit is bit-identical to one that was never interrupted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler

from project.callbacks import early_stopping_resume
from project.classifier import ImageClassifier
from project.data.datamodule import ImageDataModule
from project.errors import CheckpointError, ConfigError, abbreviate, damaged_checkpoint
from project.runtime import lightning_internals
from project.runtime.console import print_rank_zero
from project.runtime.distributed import ProcessGroup
from project.runtime.seeding import reseed, restore_rng_state, rng_state, run_seed

KEY = "resume"


class ExactResume(Callback):
    """Saves and restores the training state that Lightning omits from checkpoints.

    That is the RNG states, the metrics of an unfinished epoch, and the metric values that ReduceLROnPlateau has not
    seen yet, as Lightning saves a checkpoint before it steps schedulers. Each training step is also seeded from the
    run's seed, the epoch, the batch and the rank, so it does not depend on earlier random numbers.
    """

    def __init__(self) -> None:
        self._restored: Mapping[str, Any] | None = None
        self._data_digest: str | None = None
        #: In a resumed, unfinished epoch: its accumulate_grad_batches, and its completed validation batches.
        self._accumulation: int | None = None
        self._validated: int | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._data_digest = _data_digest(trainer) if stage == "fit" else None  # computed once, saved in every epoch

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        progress, validation = lightning_internals.epochs(trainer), lightning_internals.validation_batches(trainer)
        within_epoch = progress.processed < progress.ready
        rank_state: dict[str, Any] = {"chance": rng_state()}
        if within_epoch and isinstance(pl_module, ImageClassifier):
            rank_state["train"] = pl_module.epoch_metrics("train").state()
        checkpoint[KEY] = {
            "seed": run_seed(),
            "batches_of": _batch_settings(trainer),
            "data": self._data_digest,
            "within": within_epoch,
            "validating": within_epoch and trainer.validating,
            # At the end of a validation, EarlyStopping has counted it already, and resuming repeats it.
            "counted": within_epoch and trainer.validating and validation.completed == validation.ready,
            # Before the first epoch, schedulers have no metric to see.
            "watched": _monitored_values(trainer) if progress.ready else {},
            "processes": ProcessGroup().gather(rank_state),
        }
        if within_epoch:
            accumulates = lightning_internals.accumulates_gradients(trainer)
            lightning_internals.make_resumable(checkpoint, trainer.validating, accumulates)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        state = checkpoint.get(KEY)
        if state is not None and trainer.state.fn == "fit":
            with ProcessGroup().propagate_errors():
                self._prepare(trainer, checkpoint, state)
            self._restored = state

    def _prepare(self, trainer: pl.Trainer, checkpoint: dict[str, Any], state: Mapping[str, Any]) -> None:
        """Check that the fit can be resumed with the current settings, and correct the EarlyStopping states."""
        with _report_damage():
            saved, current, described = state["batches_of"], _batch_settings(trainer), _describe(state["batches_of"])
        if lightning_internals.find_callback(trainer, GradientAccumulationScheduler):
            current["accumulated"] = saved["accumulated"]
            # The scheduler sets it only when an epoch starts.
            self._accumulation = saved["accumulated"] if state["within"] else None
        digest = state.get("data")
        if digest is not None and self._data_digest is not None and digest != self._data_digest:
            if state["within"]:
                raise CheckpointError(
                    "The checkpoint was saved within an epoch, and the images or labels have changed since.\n"
                    "Restore the data, or use a checkpoint from the end of an epoch."
                )
            print_rank_zero(
                "Checkpoint: the images or labels have changed since it was saved; training uses the new ones"
            )
        if state["within"] and saved != current:
            raise CheckpointError(
                f"The checkpoint was saved within an epoch with {described}; this fit has {_describe(current)}.\n"
                "Use the same settings, or a checkpoint from the end of an epoch."
            )
        with _report_damage():
            reason = early_stopping_resume.restore_early_stopping(
                trainer, checkpoint, state["watched"], state.get("counted", False)
            )
        if reason:
            raise ConfigError(
                f"EarlyStopping has stopped this fit and would immediately stop it again: {reason}\n"
                "To resume, increase its patience, change its thresholds, or remove it."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        state, self._restored = self._restored, None
        if state is None:
            return
        with _report_damage():
            rank_state = state["processes"][trainer.global_rank % len(state["processes"])]
            if state["within"]:
                validated = lightning_internals.discard_started_batches(trainer)
                self._validated = None if state.get("validating", True) else validated
                if isinstance(pl_module, ImageClassifier):
                    pl_module.epoch_metrics("train").merge(rank_state["train"])
            for config in trainer.lr_scheduler_configs:
                if config.reduce_on_plateau and state["watched"] and not state["within"]:
                    config.scheduler.step(state["watched"][str(config.monitor)])
                    lightning_internals.count_scheduler_step(trainer)
            restore_rng_state(rank_state["chance"])

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._accumulation = self._validated = None  # not called for the resumed, unfinished epoch

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._accumulation is not None:
            trainer.accumulate_grad_batches, self._accumulation = self._accumulation, None
        if self._validated is not None:  # Lightning counts the epoch's last validation a second time
            lightning_internals.set_validated_batches(trainer, self._validated)
            self._validated = None
        reseed(pl_module.device, run_seed(), "step", trainer.current_epoch, batch_idx, trainer.global_rank)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # At the end of a resumed, unfinished epoch, Lightning would not step ReduceLROnPlateau.
        lightning_internals.end_restart(trainer)


@contextmanager
def _report_damage() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a damaged state can raise almost anything
        raise damaged_checkpoint(
            f"The checkpoint is damaged: its training state cannot be restored ({abbreviate(error)})."
        ) from error


def _batch_settings(trainer: pl.Trainer) -> dict[str, int]:
    size = getattr(getattr(trainer, "datamodule", None), "batch_size", 0)
    return {"images": size, "processes": trainer.world_size, "accumulated": trainer.accumulate_grad_batches}


def _data_digest(trainer: pl.Trainer) -> str | None:
    """SHA-256 of the class names and of the labels of each split; no image is read."""
    data: Any = getattr(trainer, "datamodule", None)
    if not isinstance(data, ImageDataModule):
        return None
    labels = {name: [sample.label for sample in samples] for name, samples in sorted(data.splits.items())}
    return hashlib.sha256(json.dumps([data.classes, labels]).encode()).hexdigest()


def _describe(settings: Mapping[str, int]) -> str:
    return (
        f"data.batch_size {settings['images']}, world size {settings['processes']} and "
        f"trainer.accumulate_grad_batches {settings['accumulated']}"
    )


def _monitored_values(trainer: pl.Trainer) -> dict[str, float]:
    """The last value of each metric that ReduceLROnPlateau or EarlyStopping monitors."""
    names = [str(config.monitor) for config in trainer.lr_scheduler_configs if config.reduce_on_plateau]
    names += [callback.monitor for callback in early_stopping_resume.early_stopping_callbacks(trainer)]
    return {name: float(trainer.callback_metrics[name]) for name in names if name in trainer.callback_metrics}
