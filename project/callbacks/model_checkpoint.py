"""Checkpoints of a fit: ``best.ckpt`` and ``last.ckpt``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from project.checkpoints.metadata import completed_epochs
from project.checkpoints.reader import read_checkpoint
from project.classifier import ImageClassifier
from project.errors import CheckpointError
from project.evaluation.answers.calibration import KEY as ANSWERS
from project.evaluation.answers.calibration import Answers
from project.evaluation.candidates import STAGES, best_weights
from project.evaluation.epoch_metrics import EpochMetrics
from project.evaluation.gain import CorrectImages, Gain
from project.evaluation.summary import EvaluationSummary
from project.evaluation.validation_data import validation_module
from project.runtime import lightning_internals
from project.runtime.atomic_write import atomic_write
from project.runtime.console import print_rank_zero
from project.runtime.distributed import ProcessGroup

KEY = "best"
BEST = "best.ckpt"
#: The best epoch, if ``best.ckpt`` has interpolated weights. A fit is resumed with this one.
BEST_EPOCH = "best_epoch.ckpt"
#: Entries of a checkpoint's identity that all runs of a fit have in common. A resumed fit may have another length, and
#: other versions of the libraries.
SAME_FIT = ("classes", "preprocessing", "features", "backbone", "adapter", "last_cut")


class _EpochCheckpoint(lightning_internals.ModelCheckpointOfCandidates):
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

    If a validation also evaluates averaged weights, the checkpoint has the better of the two.

    Attributes:
        evaluation: Validation results of that epoch; ``None`` if they are unknown.
        initial: Which validation images the initial head classifies correctly, in epoch 0; ``None`` if the fit did not
            validate it, or did so on other loaders than those of an ImageDataModule.
        validations: Number of validations from which the best was chosen; one of averaged weights counts, too.
        frozen: Names and SHA-256 of the frozen stages in that epoch, as in checkpoints; ``None`` if unknown.
    """

    def __init__(self) -> None:
        super().__init__(filename="best", monitor="val/accuracy", mode="max")
        lightning_internals.save_before_training(self)  # a solved head may be the best
        self._previous: tuple[Path, torch.Tensor] | None = None  # best checkpoint before the resume, and its score
        self._is_rank_zero = True
        self.evaluation: EvaluationSummary | None = None
        self.initial: CorrectImages | None = None
        self._correct: CorrectImages | None = None  # of the latest validation
        self.validations = 0
        self.frozen: Mapping[str, Any] | None = None
        self._previous_epochs = 0
        self._previous_evaluation: EvaluationSummary | None = None
        self._evaluated_score: torch.Tensor | None = None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.validations += 1 + (isinstance(pl_module, ImageClassifier) and pl_module.validates_average)
            self._correct = _correct_images(trainer, pl_module)
            if not lightning_internals.epochs(trainer).ready:
                self.initial = self._correct
        super().on_validation_end(trainer, pl_module)

    def monitored(self, metrics: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Replace the accuracy of the raw weights by that of their average, if it is higher."""
        accuracy = metrics.get(f"{STAGES[best_weights(metrics)]}/accuracy")
        return metrics if accuracy is None else {**metrics, "val/accuracy": accuracy}

    @property
    def gain(self) -> Gain | None:
        """Gain in accuracy of the best epoch over the initial head; ``None`` if unknown, or without an epoch."""
        if self.evaluation is None or self.validations < 2:
            return None
        if self._correct and self.initial and self._correct.split != self.initial.split:  # no epoch to compare
            return None
        return Gain.between(self.evaluation.correct, self.initial, self.evaluation.epoch == -1)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.best_model_score is not self._evaluated_score:  # this is a new best epoch
            self._evaluated_score = self.best_model_score
            self.evaluation = _evaluation(trainer, pl_module, self._correct)
            checkpoint["weights"] = self.evaluation.weights  # this checkpoint is best.ckpt
            self.frozen = pl_module.identity()["frozen"] if isinstance(pl_module, ImageClassifier) else None
        if self.evaluation is not None and self.evaluation.epoch is not None:
            checkpoint[KEY] = self.evaluation.state()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Find the previous best checkpoint of the same fit, in the folder of the resumed one."""
        # The path in the checkpoint is ignored: an untrusted checkpoint could name any file.
        folder = Path(str(trainer.ckpt_path)).parent
        path = next((file for file in (folder / BEST_EPOCH, folder / BEST) if file.is_file()), folder / BEST)
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

    def write_interpolated(
        self, trainer: pl.Trainer, tensors: Mapping[str, torch.Tensor], evaluation: EvaluationSummary
    ) -> None:
        """Replace the weights in ``best.ckpt``; ``best_epoch.ckpt`` keeps the previous ones. Call it on all ranks.

        Args:
            trainer: The trainer of the fit.
            tensors: The trained part by name.
            evaluation: Its validation results.

        Raises:
            CheckpointError: The file cannot be read or written.
        """
        path, score = Path(self.best_model_path), torch.tensor(evaluation.metrics["val/accuracy"])
        self.evaluation = evaluation
        self.best_model_score = self.kth_value = self._evaluated_score = score
        self.best_k_models = {self.best_model_path: score}
        with ProcessGroup().propagate_errors():
            if trainer.is_global_zero:
                checkpoint = read_checkpoint(path)
                trainer.strategy.checkpoint_io.save_checkpoint(checkpoint, path.with_name(BEST_EPOCH))
                # No fit can resume from these weights, so the training state is left out.
                checkpoint |= {"state_dict": dict(tensors), "optimizer_states": [], "lr_schedulers": []}
                checkpoint.pop("average", None)
                checkpoint.pop(ANSWERS, None)  # those of the previous weights
                checkpoint["transfer"] |= {"interpolated": evaluation.interpolated, "weights": evaluation.weights}
                checkpoint[KEY] = evaluation.state()
                checkpoint["callbacks"] = {self.state_key: self.state_dict()}
                trainer.strategy.checkpoint_io.save_checkpoint(checkpoint, path)

    def write_answers(self, trainer: pl.Trainer, answers: Answers | None) -> None:
        """Add calibrated answers to ``best.ckpt``. Call it on all ranks.

        Args:
            trainer: The trainer of the fit.
            answers: Those of the weights in this file, on rank zero.

        Raises:
            CheckpointError: The file cannot be read or written.
        """
        with ProcessGroup().propagate_errors():
            if trainer.is_global_zero and answers is not None:
                checkpoint = {**read_checkpoint(self.best_model_path), ANSWERS: answers.state()}
                trainer.strategy.checkpoint_io.save_checkpoint(checkpoint, self.best_model_path)

    def state_dict(self) -> dict[str, Any]:
        """State of ModelCheckpoint, the number of validations, and the results of the initial head."""
        initial = None if self.initial is None else self.initial.state()
        return {**super().state_dict(), "validations": self.validations, "initial": initial}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy the previous best checkpoint to this run's folder, and restore its score and its number of validations.

        Checkpoints of earlier versions have no such number; it is then the number of epochs.
        """
        self.initial = CorrectImages.from_state(state_dict.get("initial"))
        if self._previous is None:
            return
        assert self.dirpath is not None  # Lightning sets it before it restores states
        previous, score = self._previous
        copy = Path(self.dirpath) / BEST
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


def correct_images(trainer: pl.Trainer, metrics: EpochMetrics) -> CorrectImages | None:
    """Which validation images are classified correctly; ``None`` on a user's own loaders. Collective.

    Args:
        trainer: The trainer of the fit.
        metrics: Metrics of a whole validation.
    """
    data = validation_module(trainer)
    if data is None:  # the images may have another order in each epoch
        return None
    return CorrectImages.gather(metrics.predictions, data.validation_fingerprint)


def _correct_images(trainer: pl.Trainer, module: pl.LightningModule) -> CorrectImages | None:
    """Which images the latest validation has classified correctly, with its best weights."""
    if not isinstance(module, ImageClassifier):
        return None
    return correct_images(trainer, module.epoch_metrics(STAGES[best_weights(trainer.callback_metrics)]))


def _evaluation(trainer: pl.Trainer, module: pl.LightningModule, correct: CorrectImages | None) -> EvaluationSummary:
    """Validation metrics, confusion matrix and calibration of the current epoch, of its best weights."""
    weights = best_weights(trainer.callback_metrics)
    stage, logged = STAGES[weights], trainer.callback_metrics
    metrics = {
        f"val/{name.removeprefix(f'{stage}/')}": float(value)
        for name, value in logged.items()
        if name.startswith(f"{stage}/")
    }
    if weights == "raw":  # the drift is that of the raw weights
        metrics |= {name: float(value) for name, value in logged.items() if name.startswith("drift/")}
    counts = module.epoch_metrics(stage).counts if isinstance(module, ImageClassifier) else None
    epoch = lightning_internals.epochs(trainer).ready - 1  # -1 before the first epoch
    if counts is None:
        return EvaluationSummary(epoch, metrics, weights=weights, correct=correct)
    return EvaluationSummary.of(epoch, metrics, counts, weights=weights, correct=correct)


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
