"""Checkpoints of a fit: ``best.ckpt`` and ``last.ckpt``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from project.checkpoints.metadata import completed_epochs
from project.checkpoints.reader import read_checkpoint
from project.classifier import ImageClassifier
from project.errors import CheckpointError
from project.evaluation.summary import EvaluationSummary
from project.runtime import lightning_internals
from project.runtime.atomic_write import atomic_write
from project.runtime.console import print_rank_zero

KEY = "best"
#: Entries of a checkpoint's identity that all runs of a fit have in common. A resumed fit may have another length, and
#: other versions of the libraries.
SAME_FIT = ("classes", "preprocessing", "features", "backbone", "last_cut")


class _EpochCheckpoint(ModelCheckpoint):
    """Saves at the end of each training epoch, and after each validation within an epoch.

    Lightning's ModelCheckpoint saves only after validations if not every epoch ends with one, and omits other epochs.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(save_on_train_epoch_end=True, enable_version_counter=False, **options)

    @property
    def state_key(self) -> str:
        """Key of the state in checkpoints: with the names ``Best`` and ``Last``, so that older checkpoints resume."""
        return super().state_key.replace(type(self).__qualname__, type(self).__qualname__.removesuffix("Checkpoint"), 1)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_last_batch:
            self.on_train_epoch_end(trainer, pl_module)


class BestCheckpoint(_EpochCheckpoint):
    """Writes ``best.ckpt`` at the epoch with the best validation accuracy, including epochs before a resume.

    Attributes:
        evaluation: Validation results of that epoch; ``None`` if they are unknown.
        validations: Number of validations from which the best was chosen.
        frozen: Names and SHA-256 of the frozen stages in that epoch, as in checkpoints; ``None`` if unknown.
    """

    def __init__(self) -> None:
        super().__init__(filename="best", monitor="val/accuracy", mode="max")
        lightning_internals.save_before_training(self)  # a solved head may be the best
        self._previous: tuple[Path, torch.Tensor] | None = None  # best checkpoint before the resume, and its score
        self._is_rank_zero = True
        self.evaluation: EvaluationSummary | None = None
        self.validations = 0
        self.frozen: Mapping[str, Any] | None = None
        self._previous_epochs = 0
        self._previous_evaluation: EvaluationSummary | None = None
        self._evaluated_score: torch.Tensor | None = None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.validations += trainer.state.fn == "fit" and not trainer.sanity_checking
        super().on_validation_end(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.best_model_score is not self._evaluated_score:  # this is a new best epoch
            self._evaluated_score = self.best_model_score
            self.evaluation = _evaluation(trainer, pl_module)
            self.frozen = pl_module.identity()["frozen"] if isinstance(pl_module, ImageClassifier) else None
        if self.evaluation is not None and self.evaluation.epoch is not None:
            checkpoint[KEY] = self.evaluation.state()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Find the previous best checkpoint of the same fit, in the folder of the resumed one."""
        # The path in the checkpoint is ignored: an untrusted checkpoint could name any file.
        path = Path(str(trainer.ckpt_path)).with_name("best.ckpt")
        self._is_rank_zero = trainer.is_global_zero
        if not path.is_file() or path.is_symlink():
            return
        try:
            best = read_checkpoint(path)
            score = best["callbacks"][self.state_key]["best_model_score"]
            saved, found = checkpoint["transfer"], best["transfer"]
            same = all(found.get(key) == saved.get(key) for key in SAME_FIT)
            # With a schedule, the cut moves during the fit.
            same = same and (found["frozen"] == saved["frozen"] or saved.get("last_cut") is not None)
            if isinstance(pl_module, ImageClassifier):  # accuracies of other validation images cannot be compared
                same = same and _has_same_validation(found.get("split") or {}, pl_module.split())
        except (CheckpointError, AttributeError, KeyError, TypeError):
            same = False
        if same and isinstance(score, torch.Tensor) and score.numel() == 1:
            self._previous, self._previous_epochs = (path, score), completed_epochs(checkpoint)
            self.frozen = found["frozen"]
            self._previous_evaluation = EvaluationSummary.from_state(best.get(KEY), len(best["transfer"]["classes"]))
        else:
            print_rank_zero(
                f"Checkpoint: {path} is ignored (damaged, or from another fit or split); "
                "best.ckpt considers only new epochs"
            )

    def state_dict(self) -> dict[str, Any]:
        """State of ModelCheckpoint, and the number of validations."""
        return {**super().state_dict(), "validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy the previous best checkpoint to this run's folder, and restore its score and its number of validations.

        Checkpoints of earlier versions have no such number; it is then the number of epochs.
        """
        if self._previous is None:
            return
        assert self.dirpath is not None  # Lightning sets it before it restores states
        previous, score = self._previous
        copy = Path(self.dirpath) / previous.name
        if self._is_rank_zero and not (copy.exists() and copy.samefile(previous)):
            with atomic_write(copy) as temporary:
                temporary.write_bytes(previous.read_bytes())
        count, path = state_dict.get("validations"), str(copy)
        self.validations = count if type(count) is int and count >= 0 else self._previous_epochs
        self.best_model_score = self.kth_value = self._evaluated_score = score
        self.evaluation = self._previous_evaluation or EvaluationSummary(None, {str(self.monitor): float(score)})
        self.best_model_path = self.kth_best_model_path = path
        self.best_k_models = {path: score}
        current = state_dict.get("current_score")
        self.current_score = current if isinstance(current, torch.Tensor) else None


def _has_same_validation(saved: Mapping[str, Any], current: Mapping[str, Any]) -> bool:
    """Whether saved split settings, of which earlier versions had fewer, give the same validation images."""
    return all(current.get(key) == value for key, value in saved.items() if key != "per_class")


def _evaluation(trainer: pl.Trainer, module: pl.LightningModule) -> EvaluationSummary:
    """Validation metrics, confusion matrix and calibration of the current epoch."""
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    counts = module.epoch_metrics("val").counts if isinstance(module, ImageClassifier) else None
    epoch = lightning_internals.epochs(trainer).ready - 1  # -1 before the first epoch
    if counts is None:
        return EvaluationSummary(epoch, metrics)
    confusion = counts.confusion.int().numpy()  # int32 halves its size in the checkpoint
    return EvaluationSummary(epoch, metrics, counts.images, confusion, counts.calibration.numpy())


class LastCheckpoint(_EpochCheckpoint):
    """Writes ``last.ckpt`` at the end of each epoch, and when a fit is interrupted.

    ModelCheckpoint's ``save_last=True`` would write it only together with a new best checkpoint.
    """

    def __init__(self) -> None:
        super().__init__(filename="last")
        lightning_internals.save_before_training(self)  # there may be no epochs

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if not lightning_internals.epochs(trainer).ready:  # neither an epoch nor, perhaps, a validation
            self.on_train_epoch_end(trainer, pl_module)

    @property
    def path(self) -> Path:
        """Path of ``last.ckpt``, which may not exist yet."""
        return Path(self.dirpath or ".") / "last.ckpt"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Ignore the saved state: each run writes its own ``last.ckpt``."""
