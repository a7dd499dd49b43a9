"""Graceful shutdown: on SIGTERM or SIGINT, a fit saves a checkpoint at the next batch and exits, on all ranks."""

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
    """Stops a fit between two batches, of training or validation, after writing ``last.ckpt``.

    The signal handlers are installed at the start of each loop, where Lightning has just installed its own, whose
    SIGTERM handler runs a collective and can deadlock.

    Args:
        signals: Receives the signals.
        command: Command line that resumes the fit, without ``--ckpt_path``.
    """

    def __init__(self, signals: SignalHandler, command: str) -> None:
        self._signals = signals
        self._command = command
        self._other_ranks: list[subprocess.Popen[bytes]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._signals.install()
        self._signals.deferred = True

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._signals.install()

    on_test_start = on_predict_start = on_validation_start

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:  # accumulated gradients are not saved
            self._stop_if_signaled(trainer)

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        if self._signals.deferred:  # not in the sanity check before training
            self._stop_if_signaled(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._signals.deferred = False
        if isinstance(exception, Interrupted):
            for process in lightning_internals.release_subprocesses(trainer):  # they are blocked in a collective
                process.kill()
            for process in self._other_ranks:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(3)

    def _stop_if_signaled(self, trainer: pl.Trainer) -> None:
        number = self._signals.received
        if trainer.world_size > 1:  # any rank may have received it
            received = torch.tensor(number, device=trainer.strategy.root_device)
            number = int(trainer.strategy.reduce(received, reduce_op="max"))
        if not number:
            return
        name = signal.Signals(number).name
        last = next((c.path for c in trainer.checkpoint_callbacks if isinstance(c, LastCheckpoint)), None)
        if last is None:
            raise Interrupted(number, f"Stopped by {name}. Nothing was saved: this fit does not write last.ckpt.")
        self._other_ranks = lightning_internals.release_subprocesses(trainer)
        trainer.save_checkpoint(last, weights_only=False)
        done = lightning_internals.training_batches(trainer).completed
        raise Interrupted(
            number,
            f"Stopped by {name} after batch {done} of epoch {trainer.current_epoch}; saved. Resume with:\n"
            f"{self._command} --ckpt_path {shlex.quote(str(last))}",
        )
