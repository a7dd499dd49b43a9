"""Checks of the settings of training that need no network: their ranges, and which ones exclude each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from project.config.class_path import ClassSpec
from project.errors import ConfigError
from project.models.schedules import validate_steps
from project.models.unfreezing import WARMUP


def validate_training_settings(hparams: Mapping[str, Any]) -> None:
    """Check the settings of an :class:`~project.classifier.ImageClassifier`.

    Args:
        hparams: Its hyperparameters, in plain types.

    Raises:
        ConfigError: A setting is out of range, has no effect, or excludes another one.
    """
    if not 0 <= hparams["label_smoothing"] < 1:
        raise ConfigError(f"model.label_smoothing must be in [0, 1), not {hparams['label_smoothing']}.")
    if not 0 < hparams["lr_decay"] <= 1:
        raise ConfigError(f"model.lr_decay must be in (0, 1], not {hparams['lr_decay']}.")
    validate_steps(hparams)
    if hparams["ema"] is not None and not 0 < hparams["ema"] < 1:
        raise ConfigError(
            f"model.ema is a decay between 0 and 1, such as 0.999, not {hparams['ema']}. Null disables it."
        )
    if not 0 <= hparams["l2_sp"] < math.inf:
        raise ConfigError(f"model.l2_sp must be at least 0, not {hparams['l2_sp']}.")
    if hparams["interpolate"] is True:
        raise ConfigError("model.interpolate must be off or auto, not true.")
    _validate_adapter(hparams)
    _validate_schedule(hparams)


def _validate_adapter(hparams: Mapping[str, Any]) -> None:
    adapter = hparams["adapter"]
    if adapter != "none" and hparams["batch_norm"] == "train":
        raise ConfigError(
            f"model.batch_norm train would change running statistics, which model.adapter {adapter} keeps.\n"
            "Use --model.batch_norm frozen, or --model.adapter none."
        )
    if adapter == "lora" and hparams["l2_sp"]:
        raise ConfigError(
            "model.l2_sp pulls trained weights towards the pretrained ones, and model.adapter lora trains none of "
            "them.\nRemove model.l2_sp, or use --model.adapter none."
        )


def _validate_schedule(hparams: Mapping[str, Any]) -> None:
    warmup = hparams["schedule_warmup"]
    if not 0 <= warmup < math.inf:
        raise ConfigError(f"model.schedule_warmup must be at least 0 epochs, not {warmup}.")
    if hparams["schedule"] is None:
        unused = {"patience": hparams["schedule_patience"] is not None, "warmup": warmup != WARMUP}
        for name in (name for name, is_given in unused.items() if is_given):
            raise ConfigError(f"model.schedule_{name} has no effect without model.schedule. Remove it.")
        return
    for name, default in {"trainable": "head", "adapter": "none", "interpolate": "off"}.items():
        if hparams[name] != default:
            raise ConfigError(
                f"model.schedule and model.{name} {hparams[name]} exclude each other. Remove one of them "
                f"(--model.schedule null, or --model.{name} {default})."
            )
    if ClassSpec.from_dict(hparams["optimizer"]).name == "LBFGS":
        raise ConfigError(
            "model.schedule: LBFGS keeps one history for all parameters, so stages cannot join later. Use another "
            "optimizer."
        )
