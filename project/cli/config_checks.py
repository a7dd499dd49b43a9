"""Checks of a parsed configuration, before the data is opened and weights are read."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import torch
from jsonargparse import Namespace

from project.audit.label_issues import require_scikit_learn
from project.callbacks.prediction_columns import AnswerLimits
from project.callbacks.prediction_outputs import require_output
from project.errors import ConfigError
from project.inference import demo, export, push
from project.inference.serving import serve
from project.inference.serving.limits import RequestLimits

#: Verbs that work without a trained model.
WITHOUT_CHECKPOINT = ("fit", "check", "sweep")
#: Verbs that find the data of the run by themselves.
WITHOUT_DATA = ("demo", "export", "push", "serve")
#: Settings of the trainer with which a verb does nothing if they are 0.
LIMITS = {
    "fit": ("limit_train_batches", "max_steps"),
    "validate": ("limit_val_batches",),
    "test": ("limit_test_batches",),
    "predict": ("limit_predict_batches",),
}


def validate_seed(seed: object) -> None:
    """Check the value of ``--seed_everything``.

    Raises:
        ConfigError: It is a number that NumPy does not accept as a seed.
    """
    if type(seed) is int and not 0 <= seed < 2**32:
        raise ConfigError(f"--seed_everything must be from 0 to {2**32 - 1}, not {seed}.")


def validate_config(verb: str, config: Namespace) -> None:
    """Check the configuration of a verb.

    Args:
        verb: Name of the verb.
        config: Its configuration, before classes are instantiated.

    Raises:
        ConfigError: A required flag or package is missing, or flags contradict each other.
    """
    data, model, trainer = config.data, config.model, config.trainer
    accelerator = trainer["accelerator"]
    if accelerator in ("gpu", "cuda", "mps") and not torch.accelerator.is_available():
        raise ConfigError(f"trainer.accelerator: torch finds no {accelerator}. Use --trainer.accelerator cpu")
    if trainer["barebones"]:
        raise ConfigError(
            "trainer.barebones is not supported: it disables logs and checkpoints. To measure speed: "
            "--trainer.logger false --trainer.enable_checkpointing false"
        )
    if trainer["sync_batchnorm"] and model["backbone"].startswith("timm/"):
        raise ConfigError("trainer.sync_batchnorm would remove the activations in timm's BatchNorm. Remove it.")
    trains_stages = model["trainable"] != "head" or model["schedule"] is not None
    if trainer["sync_batchnorm"] and verb == "fit" and trains_stages and model["batch_norm"] == "frozen":
        raise ConfigError(
            "trainer.sync_batchnorm has no effect, because BatchNorm does not train. Add --model.batch_norm train, or "
            "remove it."
        )
    for limit in LIMITS.get(verb, ()):
        if trainer[limit] == 0:
            instead = " To validate the initial head: --trainer.max_epochs 0" if verb == "fit" else ""
            raise ConfigError(f"trainer.{limit} is 0, so {verb} would do nothing. Increase it.{instead}")
    if verb == "check" and config.suspects:
        require_scikit_learn()
    if verb == "demo":
        demo.require(config.port)
    if verb == "export":
        export.require(config.output, config.split, config.int8, config.images)
    if verb == "push":
        push.require(config.repository)
    if verb == "serve":
        limits = RequestLimits(**{field.name: config[field.name] for field in fields(RequestLimits)})
        serve.require(config.host, config.port, config.token_file, limits, config.batch_size, config.batch_wait)
    name = config.name
    if name and (Path(name).name != name or name == ".."):
        raise ConfigError(
            f"--name: {name!r} is not a single folder name. To change the parent: --trainer.default_root_dir"
        )
    if verb not in WITHOUT_CHECKPOINT and not config.ckpt_path:
        raise ConfigError(f"{verb} needs a trained model: --ckpt_path runs/NAME/version_N/checkpoints/best.ckpt")
    if verb == "predict":
        features = config.output_features
        require_output(config.output, None if features is None else Path(features).expanduser())
        AnswerLimits(config.coverage, config.max_error, config.false_alarms).require_fractions()
        if features is not None and isinstance(config.ckpt_path, list):
            raise ConfigError("--output_features takes a single checkpoint. Predict them separately.")
        if data["predict"] is None and data["root"] is None and data["source"] is None:
            raise ConfigError("Nothing to predict. Pass images or folders with --images PATH")
    elif verb not in WITHOUT_DATA and data["root"] is None and data["source"] is None:
        raise ConfigError("No data. Pass a folder of images with --data.root PATH (PATH/CLASS/*.jpg)")
