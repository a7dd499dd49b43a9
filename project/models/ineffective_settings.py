"""Settings of training that have no effect on a network, because of which stages are trained, are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from project.errors import ConfigError
from project.models.backbone import Backbone
from project.models.cut import Cut
from project.runtime.console import print_rank_zero


def validate_cut(hparams: Mapping[str, Any], cut: Cut) -> None:
    """Check the settings of an :class:`~project.classifier.ImageClassifier` that need a trained stage.

    Args:
        hparams: Its hyperparameters, in plain types.
        cut: The cut with all stages that a fit trains at its end.

    Raises:
        ConfigError: A setting has no effect.
    """
    if cut.trainable:
        return
    if hparams["adapter"] != "none":
        raise ConfigError(
            f"model.adapter {hparams['adapter']} has no effect with model.trainable {hparams['trainable']}, which "
            f"freezes all stages. Use --model.trainable all, or a stage such as {cut.frozen[-1]}."
        )
    if hparams["lr_decay"] != 1:
        raise ConfigError(
            "model.lr_decay has no effect, because only the head is trained. Set model.trainable to a stage, such as "
            "layer4, or remove lr_decay."
        )


def validate_fit(hparams: Mapping[str, Any], backbone: Backbone, cut: Cut, validates: bool) -> None:
    """Check the settings that only a fit uses. A ``batch_norm`` that is not wise is reported.

    Args:
        hparams: See :func:`validate_cut`.
        backbone: The network.
        cut: See :func:`validate_cut`.
        validates: Whether the fit has a validation.

    Raises:
        ConfigError: A setting has no effect.
    """
    given = {"l2_sp": hparams["l2_sp"] > 0, "batch_norm train": hparams["batch_norm"] == "train"}
    for name in (name for name, is_given in given.items() if is_given and not cut.trainable):
        raise ConfigError(
            f"model.{name} has no effect: no stage of {backbone.name} is trained.\n"
            f"Remove it, or train stages with --model.trainable {[*backbone.stages][-1]}."
        )
    if hparams["ema"] is not None and not validates:
        raise ConfigError(
            "model.ema has no effect without validation, which decides between the average and the last weights.\n"
            "Remove it, or remove trainer.limit_val_batches 0."
        )
    has_norms = backbone.has_trainable_batch_norm(cut)
    if given["batch_norm train"] and not has_norms:
        print_rank_zero(f"BatchNorm: the trained stages of {backbone.name} have none; model.batch_norm has no effect")
    elif has_norms and hparams["weights"] is None and not given["batch_norm train"]:
        remedy = "--model.batch_norm train" if backbone.adapter is None else "pretrained weights"
        print_rank_zero(
            "BatchNorm: the running statistics of random weights mean nothing, and model.batch_norm frozen keeps them; "
            f"use {remedy}"
        )
