"""Interpolation of the weights between the start and the best epoch of a fit."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch

from project.callbacks.drift import METRIC, Drift
from project.callbacks.model_checkpoint import BestCheckpoint, correct_images
from project.checkpoints.compatibility import validate_tensors
from project.checkpoints.trained_part import Tensors, copy_tensors, read_on_rank_zero
from project.classifier import ImageClassifier
from project.errors import ConfigError, damaged_checkpoint
from project.evaluation.candidates import STAGES, Weights
from project.evaluation.epoch_metrics import EpochMetrics
from project.evaluation.step_outputs import StepOutput
from project.evaluation.summary import EvaluationSummary
from project.models.backbone import stage_prefix
from project.models.pretrained import pretrained_stages
from project.runtime import lightning_internals
from project.runtime.console import print_rank_zero
from project.runtime.logger_adapters import log_text

ALPHAS = tuple(step / 10 for step in range(11))


@dataclass(frozen=True)
class Curve:
    """Validation results between the start and the end of a fit.

    Attributes:
        evaluations: One for each of :data:`ALPHAS`.
        chosen: The best of them.
        end: Name of the end, such as "epoch 3".
    """

    evaluations: Sequence[EvaluationSummary]
    chosen: EvaluationSummary
    end: str


class Interpolation(pl.Callback):
    """After a fit, validates weights between its start and its best epoch, and keeps the best in ``best.ckpt``.

    With ``interpolate: auto`` of :class:`~project.classifier.ImageClassifier`, the weights ``(1 - alpha) * start +
    alpha * end`` of the trained part are validated for alpha = 0, 0.1, ... 1. The start is the trained part before the
    first step: usually pretrained stages and a solved head. The end is the best epoch, or the last one if no epoch is
    better than the start. Parameters and floating-point buffers are interpolated; other buffers are those of the end.
    The choice is by accuracy, then by loss, then for the smaller alpha.

    Source: M. Wortsman et al., "Robust fine-tuning of zero-shot models" (WiSE-FT), arXiv:2109.01903.

    Checkpoints of the fit contain the tensors of the start that are not pretrained, such as the head.

    Attributes:
        curve: Result of the fit; ``None`` before it ends.
    """

    def __init__(self) -> None:
        self.curve: Curve | None = None
        self._is_active = False
        self._pretrained: Tensors = {}
        self._own: Tensors | None = None  # tensors of the start that are not pretrained
        self._validation_start = self._validation_seconds = 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.curve, self._own, self._pretrained, self._is_active = None, None, {}, False
        if not isinstance(pl_module, ImageClassifier) or pl_module.hparams["interpolate"] == "off":
            return
        if getattr(trainer, "fast_dev_run", False):
            print_rank_zero("Interpolation: none, because trainer.fast_dev_run writes no checkpoint")
            return
        _refuse_without_effect(trainer, pl_module)
        # Before Lightning restores a checkpoint, so that the pretrained weights are usually still in place.
        stages = pretrained_stages(pl_module.backbone, pl_module.cut.trainable) or {}
        self._pretrained = {
            f"{stage_prefix(name)}{key}": tensor.cpu()
            for name, module in stages.items()
            for key, tensor in module.state_dict().items()
        }
        self._is_active = True

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._is_active and self._own is not None:
            assert isinstance(pl_module, ImageClassifier)
            self._start(pl_module)  # checks the tensors of the checkpoint

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._is_active or self._own is not None:
            return
        assert isinstance(pl_module, ImageClassifier)
        if trainer.global_step:
            raise ConfigError(
                "model.interpolate auto: the checkpoint does not contain the start of its fit, which had interpolate "
                "off.\nRemove model.interpolate, or start a new fit without --ckpt_path."
            )
        self._own = {
            name: tensor.detach().cpu().clone()
            for name, tensor in pl_module.trained_tensors().items()
            if name not in self._pretrained or not torch.equal(tensor.cpu(), self._pretrained[name])
        }

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validation_start = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validation_seconds = time.perf_counter() - self._validation_start

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._is_active:
            return
        assert isinstance(pl_module, ImageClassifier)
        best = lightning_internals.find_callback(trainer, BestCheckpoint)
        assert best is not None  # see _refuse_without_effect
        if not best.best_model_path or not trainer.global_step:
            print_rank_zero("Interpolation: none, because the fit has ended before its first validation or step")
            return
        self.curve = self._interpolate(trainer, pl_module, best)
        _report(trainer, self.curve)

    def _interpolate(self, trainer: pl.Trainer, module: ImageClassifier, best: BestCheckpoint) -> Curve:
        """Validate the weights, and update ``best.ckpt``."""
        _print_cost(trainer, module, self._validation_seconds)
        state, start = module.trained_tensors(), self._start(module)
        last = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
        epoch = None if best.evaluation is None else best.evaluation.epoch
        start_is_best = epoch == -1
        if start_is_best:
            epoch = lightning_internals.epochs(trainer).ready - 1
        end = last if start_is_best else read_on_rank_zero(best.best_model_path, "state_dict")["state_dict"]
        # The moving average, if it is the better one of the best epoch.
        weights = "raw" if start_is_best or best.evaluation is None else best.evaluation.weights
        evaluations = []
        try:
            for alpha in ALPHAS:
                copy_tensors(interpolate(start, end, alpha), state)
                evaluations.append(_evaluate(trainer, module, epoch, alpha, weights))
        finally:
            copy_tensors(last, state)
        chosen = max(evaluations, key=lambda evaluation: (*_quality(evaluation), -(evaluation.interpolated or 0.0)))
        best.validations += len(ALPHAS)
        if _quality(chosen) > _quality(evaluations[0 if start_is_best else -1]):
            best.write_interpolated(trainer, interpolate(start, end, chosen.interpolated or 0.0), chosen)
        return Curve(evaluations, chosen, "the best epoch" if epoch is None else f"epoch {epoch + 1}")

    def _start(self, module: ImageClassifier) -> Tensors:
        """The trained part before the first step, on the CPU.

        Raises:
            CheckpointError: The tensors from the checkpoint do not fit the model.
        """
        state = module.trained_tensors()
        start = {**{name: self._pretrained[name] for name in state if name in self._pretrained}, **(self._own or {})}
        validate_tensors(state, start)
        return start

    def state_dict(self) -> dict[str, Any]:
        """The tensors of the start that are not pretrained."""
        return {} if self._own is None else {"start": dict(self._own)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the start.

        Raises:
            CheckpointError: The state is damaged.
        """
        start = state_dict.get("start")
        if not isinstance(start, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in start.values()):
            raise damaged_checkpoint("The checkpoint is damaged: the start of its fit is not a dict of tensors.")
        self._own = start

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._pretrained, self._own, self._is_active = {}, None, False


def interpolate(start: Tensors, end: Tensors, alpha: float) -> dict[str, torch.Tensor]:
    """Interpolate between two states of a model; exact for alpha 0 and 1.

    Args:
        start: Tensors by name.
        end: Tensors of the same names, shapes and types. Those that are not floating-point numbers are used unchanged.
        alpha: Weight of the end, in [0, 1].
    """
    return {
        name: torch.lerp(start[name].to(tensor.dtype), tensor, alpha) if tensor.is_floating_point() else tensor
        for name, tensor in end.items()
    }


def _refuse_without_effect(trainer: pl.Trainer, module: ImageClassifier) -> None:
    """Raise if the fit cannot interpolate."""
    best = lightning_internals.find_callback(trainer, BestCheckpoint)
    reasons = {
        "only the head is trained. Set --model.trainable, such as layer4": not module.cut.trainable,
        "this fit has no validation (trainer.limit_val_batches=0) to choose by. Add it": not trainer.enable_validation,
        "nothing is trained (trainer.max_epochs=0). Increase it": trainer.max_epochs == 0,
        "this fit writes no best.ckpt. Set --trainer.enable_checkpointing true": best is None,
    }
    reason = next((reason for reason, applies in reasons.items() if applies), None)
    if reason is not None:
        raise ConfigError(f"model.interpolate auto has no effect, because {reason}, or remove model.interpolate.")


def _evaluate(
    trainer: pl.Trainer, module: ImageClassifier, epoch: int | None, alpha: float, weights: Weights
) -> EvaluationSummary:
    """Validate the current weights, without logs. Collective: all ranks must call it."""
    metrics = EpochMetrics("val", module.task, module.classes)
    drift = lightning_internals.find_callback(trainer, Drift)

    def update(batch: Any, output: StepOutput) -> None:
        metrics.update(output.loss, output.probabilities, output.labels)
        if drift is not None:
            drift.update(trainer, module, output, batch)

    if drift is not None:
        drift.start(trainer, module)
    lightning_internals.run_validation_steps(trainer, update)
    for stage in STAGES.values():
        module.epoch_metrics(stage).reset()  # keeps the results of the fit's own validation
    values = {name: float(value) for name, value in metrics.compute(module.device).items()}
    similarity = None if drift is None else drift.compute(module)
    if similarity is not None:
        values[METRIC] = similarity
    assert metrics.counts is not None
    correct = correct_images(trainer, metrics)
    return EvaluationSummary.of(epoch, values, metrics.counts, weights=weights, correct=correct, interpolated=alpha)


def _quality(evaluation: EvaluationSummary) -> tuple[float, float]:
    """Accuracy and negative loss; larger is better. A NaN loss is the worst."""
    loss = evaluation.metrics["val/loss"]
    return evaluation.metrics["val/accuracy"], -loss if loss == loss else -float("inf")


def _print_cost(trainer: pl.Trainer, module: ImageClassifier, seconds: float) -> None:
    """Print what the validations cost if they run the whole backbone."""
    data: Any = getattr(trainer, "datamodule", None)
    loaders = getattr(data, "loaders", {})
    if "val" in loaders and loaders["val"].rows is not None:
        return
    counts = module.epoch_metrics("val").counts
    images = f"{counts.images:,} " if counts is not None else ""
    estimate = f", about {len(ALPHAS) * seconds:,.0f} s" if seconds else ""
    print_rank_zero(
        f"Interpolation: {len(ALPHAS)} validations run the backbone on {images}images{estimate}, because no features "
        "are stored"
    )


def _report(trainer: pl.Trainer, curve: Curve) -> None:
    """Print the choice, and log the curve as a table."""
    accuracies = [evaluation.metrics["val/accuracy"] for evaluation in curve.evaluations]
    best = lightning_internals.find_callback(trainer, BestCheckpoint)
    is_kept = best is not None and best.evaluation is curve.chosen
    print_rank_zero(
        f"Interpolation: alpha {curve.chosen.interpolated} between the start (0) and {curve.end} (1) has the best "
        f"val/accuracy, {curve.chosen.metrics['val/accuracy']:.4f}; the start has {accuracies[0]:.4f}, {curve.end} "
        f"{accuracies[-1]:.4f}; best.ckpt {'has these weights' if is_kept else 'is unchanged'}"
    )
    names = ["val/accuracy", "val/loss"] + ([METRIC] if METRIC in curve.chosen.metrics else [])
    lines = [f"| alpha | {' | '.join(names)} | |", f"|---:|{'---:|' * len(names)}---|"]
    for evaluation in curve.evaluations:
        values = " | ".join(f"{evaluation.metrics[name]:.4f}" for name in names)
        lines.append(f"| {evaluation.interpolated} | {values} | {'chosen' if evaluation is curve.chosen else ''} |")
    log_text(trainer, "interpolation", "\n".join([f"0: the start of the fit; 1: {curve.end}", "", *lines]))
