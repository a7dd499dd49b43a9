"""Which checkpoints a fit keeps: the best epoch's, and the last one's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from project.checkpoints.reader import read_checkpoint
from project.classifier import ImageClassifier
from project.errors import CheckpointError
from project.evaluation.summary import EvaluationSummary
from project.runtime.atomic_write import replacing
from project.runtime.console import print_rank_zero

KEY = "best"


class _EpochCheckpoint(ModelCheckpoint):
    """Saves at each epoch's end, where nothing of it is left to be done, and after validations within an epoch.

    Lightning's own saves at validations alone where not each epoch has one at its end, and loses the other epochs.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(save_on_train_epoch_end=True, enable_version_counter=False, **options)

    @property
    def state_key(self) -> str:
        """The name of the state in checkpoints: that of the first version's classes, ``Best`` and ``Last``."""
        return super().state_key.replace(type(self).__qualname__, type(self).__qualname__.removesuffix("Checkpoint"), 1)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_last_batch:
            self.on_train_epoch_end(trainer, pl_module)


class BestCheckpoint(_EpochCheckpoint):
    """``best.ckpt``: of the epoch with the best validation accuracy, over all that a resumed fit has been through.

    Attributes:
        measured: What that epoch came to; ``None`` where that is not known.
    """

    def __init__(self) -> None:
        super().__init__(filename="best", monitor="val/accuracy", mode="max")
        self._before: tuple[Path, torch.Tensor] | None = None
        self._writes = True
        self.measured: EvaluationSummary | None = None
        self._measured_before: EvaluationSummary | None = None
        self._measured_score: torch.Tensor | None = None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.best_model_score is not self._measured_score:  # so this is the best epoch so far
            self._measured_score = self.best_model_score
            self.measured = _measured(trainer, pl_module)
        of = self.measured
        if of is not None and of.epoch is not None:
            checkpoint[KEY] = of.state()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Look for the best checkpoint so far, of the same fit, beside the one that it goes on from."""
        # Not at the path that the checkpoint names: it may come from anywhere, and name any file.
        path = Path(str(trainer.ckpt_path)).with_name("best.ckpt")
        self._writes = trainer.is_global_zero
        if not path.is_file() or path.is_symlink():
            return
        try:
            best = read_checkpoint(path)
            score = best["callbacks"][self.state_key]["best_model_score"]
            same = best["transfer"] == checkpoint["transfer"]
        except (CheckpointError, KeyError, TypeError):
            same = False
        if same and isinstance(score, torch.Tensor) and score.numel() == 1:
            self._before = path, score
            self._measured_before = EvaluationSummary.from_state(best.get(KEY), len(best["transfer"]["classes"]))
        else:
            print_rank_zero(f"Checkpoint: {path} is not of this fit; the best one is looked for anew")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the best checkpoint so far along into this fit's own folder, and its score."""
        if self._before is None:
            return
        assert self.dirpath is not None  # Lightning sets it up before it restores anything
        before, score = self._before
        here = Path(self.dirpath) / before.name
        if self._writes and not (here.exists() and here.samefile(before)):
            with replacing(here) as temporary:
                temporary.write_bytes(before.read_bytes())
        path = str(here)
        self.best_model_score = self.kth_value = self._measured_score = score
        self.measured = self._measured_before or EvaluationSummary(None, {str(self.monitor): float(score)})
        self.best_model_path = self.kth_best_model_path = path
        self.best_k_models = {path: score}
        current = state_dict.get("current_score")
        self.current_score = current if isinstance(current, torch.Tensor) else None


def _measured(trainer: pl.Trainer, module: pl.LightningModule) -> EvaluationSummary:
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    counts = module.epoch_metrics("val").counts if isinstance(module, ImageClassifier) else None
    if counts is None:
        return EvaluationSummary(trainer.current_epoch, metrics)
    confusion = counts.confusion.int().numpy()  # in half the bytes: it is saved
    return EvaluationSummary(trainer.current_epoch, metrics, counts.images, confusion, counts.calibration.numpy())


class LastCheckpoint(_EpochCheckpoint):
    """``last.ckpt``: of each epoch's end, and of where a fit was interrupted.

    A callback of its own: ``save_last=True`` writes it only in epochs that are also the best so far.
    """

    def __init__(self) -> None:
        super().__init__(filename="last")

    @property
    def path(self) -> Path:
        """Where it is, or is to be."""
        return Path(self.dirpath or ".") / "last.ckpt"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Begin anew: this fit has a ``last.ckpt`` of its own."""
