"""A learning-rate range test before a fit: ``fit --lr_find``."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch

from project.classifier import ImageClassifier
from project.config.class_path import ClassSpec
from project.errors import ConfigError
from project.models.optimizers import construct_optimizer
from project.models.schedules import RATES
from project.runtime import lightning_internals
from project.runtime.atomic_write import atomic_write
from project.runtime.console import print_rank_zero
from project.runtime.logger_adapters import add_image
from project.runtime.seeding import reseed, restore_rng_state, rng_state, run_seed

LOWEST, HIGHEST, STEPS = 1e-7, 10.0, 100
SMOOTHING = 0.8  # of the exponential moving average of the changes
COMPLETE = 0.9  # of the largest decrease of the loss
MIN_CHANGE = 0.01  # of the loss: a smaller change is noise
MIN_LOSS = 0.1  # loss to which the smallest change is relative, if that of the initial weights is lower
SAFETY = 10.0  # the rate is this factor below that of a rising loss, where the loss does not descend


class RangeTest(NamedTuple):
    """Curve of a range test.

    Attributes:
        rates: Learning rates, increasing, float64 ``(N,)``.
        changes: For each of them, the loss of a batch minus the loss of the initial weights on the same batch,
            smoothed, float64 ``(N,)``.
        start: Mean loss of the initial weights.
    """

    rates: np.ndarray
    changes: np.ndarray
    start: float


class LearningRateFinder(pl.Callback):
    """Finds the learning rate of a fit by a range test (Smith, arXiv:1506.01186), and uses it.

    Before the first step, the trained part is trained on training batches while the rate increases exponentially, and
    is then restored. Its loss is compared with that of the initial weights on the same batch, because the losses of
    different batches differ more than those of a solved head and a slightly changed one. The fit is afterwards
    identical to one with this rate in ``model.optimizer.lr``. A resumed fit keeps the rate of its checkpoint.
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not isinstance(pl_module, ImageClassifier):
            return
        optimizer = ClassSpec.from_dict(pl_module.hparams["optimizer"])
        if trainer.ckpt_path is not None:
            rate = optimizer.init_args.get("lr", "the optimizer's default")
            print_rank_zero(f"Learning rate: {rate}, as in the checkpoint; a resumed fit does not search")
            return
        _require_effect(trainer, pl_module, optimizer)
        start = time.perf_counter()
        with _restored(pl_module):
            test = _range_test(trainer, pl_module)
        rate, reason = suggest(test)
        head = trainer.optimizers[0].param_groups[-1]
        before = head.get("initial_lr", head["lr"])  # a schedule starts with another rate
        found = ClassSpec(optimizer.class_path, {**optimizer.init_args, "lr": rate}).as_dict()
        pl_module.hparams["optimizer"] = found
        lightning_internals.set_logged_hyperparameter(pl_module, "optimizer", found)
        trainer.strategy.setup_optimizers(trainer)
        seconds = time.perf_counter() - start
        print_rank_zero(f"Learning rate: {rate:g} instead of {before:g}, found in {seconds:.1f} s: {reason}")
        _report(trainer, test, rate)


def suggest(test: RangeTest) -> tuple[float, str]:
    """Choose a rate with two significant digits.

    It is the rate of the steepest descent, as in Lightning, before most of the descent is complete: after that, the
    curve shows mainly the differences between batches. If the loss does not decrease, because the initial weights are
    at an optimum, it is a tenth of the rate at which the loss rises.

    Args:
        test: The curve.

    Returns:
        The rate, and why it was chosen, as a clause.
    """
    lowest = test.changes.min()
    end = int(np.flatnonzero(test.changes <= COMPLETE * lowest)[0]) if lowest < 0 else 0
    noise = MIN_CHANGE * max(test.start, MIN_LOSS)
    if lowest < -noise and end > 0:
        slopes = np.gradient(test.changes[: end + 1])
        return _two_digits(test.rates[slopes.argmin()]), "the loss decreases fastest at this rate"
    rising = np.flatnonzero(test.changes > noise)
    limit = test.rates[rising[0] if len(rising) else -1]
    return _two_digits(limit / SAFETY), f"a tenth of {limit:.2g}, where the loss rises; it decreases at no rate"


def _two_digits(rate: float) -> float:
    return float(f"{rate:.1e}")


def _require_effect(trainer: pl.Trainer, module: ImageClassifier, optimizer: ClassSpec) -> None:
    scheduler = module.hparams["scheduler"]
    name = "" if scheduler is None else ClassSpec.from_dict(scheduler).name
    if not module.parameter_groups() or trainer.max_epochs == 0:
        raise ConfigError("--lr_find: this fit trains nothing. Remove it.")
    if name in RATES:
        raise ConfigError(
            f"--lr_find sets model.optimizer.lr, which {name} replaces by {' and '.join(RATES[name])}.\n"
            "Use another scheduler, such as project.models.schedules.WarmupCosine."
        )
    if optimizer.name == "LBFGS":
        raise ConfigError("--lr_find does not support LBFGS, whose steps evaluate the loss several times. Remove it.")
    if trainer.world_size > 1:
        raise ConfigError(
            f"--lr_find runs on one device, not on {trainer.world_size}. Find the rate with --trainer.devices 1, and "
            "set it with --model.optimizer.lr."
        )


@contextmanager
def _restored(module: ImageClassifier) -> Iterator[None]:
    """Restore the trained part, its gradients and the random numbers on exit."""
    random_state = rng_state()
    trained = [*(module.backbone.stages[name] for name in module.cut.trainable), module.head]
    tensors = [tensor for part in trained for tensor in (*part.parameters(), *part.buffers())]
    copies = [tensor.detach().clone() for tensor in tensors]
    mode = module.training
    try:
        module.train()
        yield
    finally:
        with torch.no_grad():
            for tensor, copy in zip(tensors, copies, strict=True):
                tensor.copy_(copy)
        module.zero_grad()
        module.train(mode)
        restore_rng_state(random_state)


def _range_test(trainer: pl.Trainer, module: ImageClassifier) -> RangeTest:
    hparams, groups = module.hparams, module.parameter_groups()
    spec = ClassSpec.from_dict(hparams["optimizer"])
    one = ClassSpec(spec.class_path, {**spec.init_args, "lr": 1.0}).as_dict()
    optimizer, _ = construct_optimizer({**hparams, "optimizer": one, "scheduler": None}, groups)
    shares = [group["lr"] for group in optimizer.param_groups]
    initial = [parameter.detach().clone() for group in groups for parameter in group["params"]]
    rates, changes, losses, average = [], [], [], 0.0
    for step, batch in enumerate(itertools.islice(_batches(trainer), STEPS)):
        rate = LOWEST * (HIGHEST / LOWEST) ** (step / (STEPS - 1))
        for group, share in zip(optimizer.param_groups, shares, strict=True):
            group["lr"] = rate * share
        with torch.no_grad(), _swapped(groups, initial):
            losses.append(float(_loss(trainer, module, batch, step)))
        loss = _loss(trainer, module, batch, step)
        change = float(loss.detach()) - losses[-1]
        average = SMOOTHING * average + (1 - SMOOTHING) * change
        smoothed = average / (1 - SMOOTHING ** (step + 1))
        if not math.isfinite(smoothed) or smoothed > math.log(max(len(module.classes), 2)):
            break
        rates.append(rate)
        changes.append(smoothed)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        module.configure_gradient_clipping(optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm)
        optimizer.step()
    if len(rates) < 2:
        raise ConfigError("--lr_find: the loss diverges at the lowest rates already. Set --model.optimizer.lr instead.")
    # A loss is computed before the step with its rate, so it shows the effect of the previous rate.
    return RangeTest(np.array(rates[:-1]), np.array(changes[1:]), float(np.mean(losses)))


def _batches(trainer: pl.Trainer) -> Iterator[Any]:
    """Training batches on the device, without end; those of an ImageDataModule repeat the first epoch."""
    while True:
        for batch in lightning_internals.training_loader(trainer):
            yield trainer.strategy.batch_to_device(batch)


def _loss(trainer: pl.Trainer, module: ImageClassifier, batch: Any, step: int) -> torch.Tensor:
    reseed(module.device, run_seed(), "lr_find", step)  # the same dropout for both weights
    with trainer.precision_plugin.train_step_context():
        return module.training_step(batch, step)


@contextmanager
def _swapped(groups: Sequence[Any], values: Sequence[torch.Tensor]) -> Iterator[None]:
    """Context in which the parameters have other values."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    own = [parameter.data for parameter in parameters]
    try:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value
        yield
    finally:
        for parameter, value in zip(parameters, own, strict=True):
            parameter.data = value


def _report(trainer: pl.Trainer, test: RangeTest, rate: float) -> None:
    """Log the curve as a figure, and write it to the run folder."""
    if not trainer.loggers and trainer.fast_dev_run:  # type: ignore[attr-defined]  # there is no run folder
        return
    from project.evaluation import plots

    image = plots.render(plots.learning_rates(test.rates, test.changes, rate))
    for logger in trainer.loggers:
        add_image(logger, "lr_find", image, 0)
    if trainer.log_dir is not None:
        with atomic_write(Path(trainer.log_dir) / "lr_find.png") as path:
            image.save(path)
        lines = [f"{lr:.6g},{change:.6g}" for lr, change in zip(test.rates, test.changes, strict=True)]
        with atomic_write(Path(trainer.log_dir) / "lr_find.csv") as path:
            path.write_text("\n".join(["lr,change_of_loss", *lines, ""]))
