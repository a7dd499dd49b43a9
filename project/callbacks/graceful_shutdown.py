"""SIGTERM and SIGINT in a fit: saved at the next batch, in all processes, and told how to go on."""

from __future__ import annotations

import contextlib
import shlex
import signal
import subprocess
from typing import Any

import lightning.pytorch as pl
import torch

from project.callbacks.model_checkpoint import LastCheckpoint
from project.runtime import lightning_internals
from project.runtime.signals import Interrupted, SignalHandler


class GracefulShutdown(pl.Callback):
    """Ends a fit between two batches, of training or of validation, with ``last.ckpt`` written.

    Handlers are put in place whenever a loop begins: Lightning has just put its own there, and its handler of SIGTERM
    waits for the other processes wherever they are, which may be for ever.

    Args:
        signals: What has been received.
        command: The command line that goes on with the fit, but for the checkpoint.
    """

    def __init__(self, signals: SignalHandler, command: str) -> None:
        self._signals = signals
        self._command = command
        self._leaving: list[subprocess.Popen[bytes]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._signals.install()
        self._signals.awaited = True

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._signals.install()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._signals.install()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._signals.install()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:  # gradients are not saved
            self._stop_if_asked(trainer)

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._signals.awaited:  # not while Lightning tries a batch or two before it begins
            self._stop_if_asked(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._signals.awaited = False
        if isinstance(exception, Interrupted):
            for process in lightning_internals.release_subprocesses(trainer):  # they wait for this one
                process.kill()
            for process in self._leaving:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(3)

    def _stop_if_asked(self, trainer: pl.Trainer) -> None:
        number = self._signals.received
        if trainer.world_size > 1:  # whichever process it was that received it
            asked = torch.tensor(number, device=trainer.strategy.root_device)
            number = int(trainer.strategy.reduce(asked, reduce_op="max"))
        if not number:
            return
        name = signal.Signals(number).name
        last = next((each.path for each in trainer.checkpoint_callbacks if isinstance(each, LastCheckpoint)), None)
        if last is None:
            raise Interrupted(number, f"Stopped by {name}. Nothing was saved, as this fit keeps no last.ckpt.")
        self._leaving = lightning_internals.release_subprocesses(trainer)
        trainer.save_checkpoint(last, weights_only=False)
        done = lightning_internals.training_batches(trainer).completed
        raise Interrupted(
            number,
            f"Stopped by {name} after batch {done} of epoch {trainer.current_epoch}, which is saved. Go on with:\n"
            f"{self._command} --ckpt_path {shlex.quote(str(last))}",
        )
