"""Which checkpoints a fit keeps: the best epoch's, and the last one's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from project.atomic import replacing


class Best(ModelCheckpoint):
    """``best.ckpt``: of the epoch with the best validation accuracy, over all that a resumed fit has been through."""

    def __init__(self) -> None:
        super().__init__(filename="best", monitor="val/accuracy", mode="max", enable_version_counter=False)
        self._before: Path | None = None
        self._writes = True

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Not at the path that the checkpoint names: it may come from anywhere, and name any file.
        self._before = Path(str(trainer.ckpt_path)).with_name("best.ckpt")
        self._writes = trainer.is_global_zero

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the best checkpoint so far along into this fit's own folder, and its score."""
        score = state_dict["best_model_score"]
        if score is None or self._before is None or not self._before.is_file():
            return
        assert self.dirpath is not None  # Lightning sets it up before it restores anything
        here = Path(self.dirpath) / self._before.name
        if self._writes and not (here.exists() and here.samefile(self._before)):
            with replacing(here) as temporary:
                temporary.write_bytes(self._before.read_bytes())
        path = str(here)
        self.best_model_score = self.kth_value = score
        self.best_model_path = self.kth_best_model_path = path
        self.best_k_models = {path: score}


class Last(ModelCheckpoint):
    """``last.ckpt``: of each epoch's end, and of where a fit was interrupted.

    A callback of its own: ``save_last=True`` writes it only in epochs that are also the best so far.
    """

    def __init__(self) -> None:
        super().__init__(filename="last", enable_version_counter=False)

    @property
    def path(self) -> Path:
        """Where it is, or is to be."""
        return Path(self.dirpath or ".") / "last.ckpt"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Begin anew: this fit has a ``last.ckpt`` of its own."""
