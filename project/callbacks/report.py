"""What a fit says of itself: what is frozen before it begins, and a short table when it is done."""

from __future__ import annotations

import time
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.table import Table

from project.callbacks.dashboard import Dashboard
from project.classifier import ImageClassifier
from project.terminal import say


class Report(pl.Callback):
    """Says what trains and what is frozen when a fit begins, and what came of it at the end.

    Args:
        dashboard: Whose throughput and parameter counts are reported.
    """

    def __init__(self, dashboard: Dashboard) -> None:
        self._dashboard = dashboard
        self._began = time.perf_counter()
        self._seconds = 0.0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began = time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not isinstance(pl_module, ImageClassifier):
            return
        counts = self._dashboard.parameters
        trains = ", ".join([*pl_module.backbone.trainable_names, "head"])
        frozen = f"{_frozen(pl_module)} ({counts['frozen']:,} parameters), SHA-256 {pl_module.backbone.frozen_sha256}"
        say(f"Trains: {trains} ({counts['trainable']:,} parameters) for {len(pl_module.classes)} classes")
        say(f"Frozen: {frozen}")
        for logger in trainer.loggers:
            add_text = getattr(getattr(logger, "experiment", None), "add_text", None)
            if add_text is not None:
                add_text("frozen", frozen, trainer.global_step)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seconds = time.perf_counter() - self._began

    def show(self, trainer: pl.Trainer, model: ImageClassifier) -> None:
        """Print the result, once the progress bar is gone.

        Args:
            trainer: The trainer whose fit is done.
            model: What it trained.
        """
        table = Table(show_header=False, title="Result", title_justify="left")
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        saved, reload = trainer.checkpoint_callback, None
        if (
            isinstance(saved, ModelCheckpoint) and Path(saved.best_model_path).is_file()
        ):  # a resume knows an older run's
            path = Path(saved.best_model_path)
            path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
            if saved.best_model_score is not None:
                table.add_row(f"best {saved.monitor}", f"{float(saved.best_model_score):.4f}")
            table.add_row("checkpoint", f"{path} ({path.stat().st_size / 1000:.0f} kB)")
            reload = f'Reload it: from project import load; load("{path}").predict(["a.jpg"])'
        table.add_row("time", f"{self._seconds:.1f} s, {self._dashboard.images_per_second:.0f} training images/s")
        table.add_row("frozen", f"{_frozen(model)}{', unchanged' if model.backbone.frozen_names else ''}")
        table.add_row("SHA-256", f"{model.backbone.frozen_sha256} before and after")
        say(table)
        if reload:
            say(reload)  # on one line however narrow the terminal, to be copied


def _frozen(model: ImageClassifier) -> str:
    backbone = model.backbone
    if not backbone.frozen_names:
        return f"nothing of {backbone.name}"
    if not backbone.trainable_names:
        return f"all of {backbone.name}"
    return f"{', '.join(backbone.frozen_names)} of {backbone.name}"
