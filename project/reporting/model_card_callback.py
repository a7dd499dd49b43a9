"""ModelCardCallback: writes ``model_card.md`` into the folder of a run."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from project.callbacks.answer_calibration import AnswerCalibration
from project.callbacks.model_checkpoint import BestCheckpoint, LastCheckpoint
from project.classifier import ImageClassifier
from project.data.datamodule import ImageDataModule
from project.evaluation.summary import EvaluationSummary
from project.reporting.limitations import pluralize
from project.reporting.markdown import code
from project.reporting.model_card import CardContent, render_card
from project.reporting.run_description import (
    format_augmentation,
    format_class,
    format_drift,
    head_method,
    starting_checkpoint,
    trained_parameters,
    trained_parts,
)
from project.runtime.atomic_write import atomic_write
from project.runtime.console import print_rank_zero
from project.runtime.lightning_internals import find_callback
from project.runtime.logger_adapters import log_text
from project.runtime.seeding import run_seed
from project.runtime.signals import Interrupted
from project.runtime.system import REPORTED_PACKAGES, cores, installed_versions

FILENAME = "model_card.md"


class ModelCardCallback(pl.Callback):
    """Writes the model card when a fit ends or is interrupted, and logs it to all loggers."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epochs = pluralize(trainer.current_epoch, "epoch")
        if trainer.max_epochs is not None and trainer.current_epoch < trainer.max_epochs:
            epochs = f"{trainer.current_epoch} of {pluralize(trainer.max_epochs, 'epoch')}"
        self._write(trainer, pl_module, epochs, "before and after training")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        # The best checkpoint of an interrupted fit may be the final model, so it gets a card too.
        if isinstance(exception, Interrupted) and trainer.state.fn == "fit":
            self._write(trainer, pl_module, f"interrupted in epoch {trainer.current_epoch + 1}", "before training")

    def _write(self, trainer: pl.Trainer, module: pl.LightningModule, duration: str, hashed: str) -> None:
        data, path = getattr(trainer, "datamodule", None), card_path(trainer)
        if not trainer.is_global_zero or path is None or not isinstance(module, ImageClassifier):
            return
        if not isinstance(data, ImageDataModule) or data.source is None:
            return
        text = render_card(_content(trainer, module, data, duration, hashed))
        try:
            with atomic_write(path) as temporary:
                # Class names may contain surrogates, which UTF-8 cannot encode.
                temporary.write_text(text, "utf-8", "backslashreplace")
        except OSError as error:  # must not fail a fit whose checkpoints are saved
            print_rank_zero(f"Cannot write the model card {path}: {error.strerror}.")
        log_text(trainer, "model_card", text.partition("\n---\n")[2])


def card_path(trainer: pl.Trainer) -> Path | None:
    """Path of the model card of a fit; ``None`` if the fit saves no checkpoints."""
    last = find_callback(trainer, LastCheckpoint)
    return None if last is None else last.path.parent.parent / FILENAME


def _content(
    trainer: pl.Trainer, module: ImageClassifier, data: ImageDataModule, duration: str, hashed: str
) -> CardContent:
    best, calibration = find_callback(trainer, BestCheckpoint), find_callback(trainer, AnswerCalibration)
    evaluation = best.evaluation if best is not None else None
    # Of the checkpoint: with a schedule, fewer stages are frozen at the end of the fit.
    frozen = best.frozen if best is not None and best.frozen is not None else module.identity()["frozen"]
    return CardContent(
        name=f"{data.name} on {module.backbone.name}",
        dataset=str(data.name),
        classes=module.classes,
        class_counts=data.class_counts,
        sections={
            "data": _data_section(module, data),
            "backbone": _backbone_section(module, frozen, hashed),
            "training": _training_section(trainer, module, data, frozen["stages"], duration)
            | _specialization(evaluation),
            "versions": _environment_section(trainer),
        },
        evaluation=evaluation,
        epochs=trainer.current_epoch,
        validations=0 if best is None else best.validations,
        notes=_notes(module, data, best, starting_checkpoint(trainer, module)),
        base_model=module.backbone.origin.repository,
        has_validation=best is not None,
        gain=None if best is None else best.gain,
        answers=None if calibration is None else calibration.answers,
        answers_note="" if calibration is None else calibration.note,
        checkpoint=f"checkpoints/{'last' if evaluation is None else 'best'}.ckpt",
    )


def _notes(module: ImageClassifier, data: ImageDataModule, best: BestCheckpoint | None, start: str | None) -> list[str]:
    assert data.source is not None
    stored = module.stored_features
    # Only the kind of a finding: its text may contain paths.
    notes = [f"Data set issue: {finding.kind}." for finding in data.source.findings]
    if stored is not None and stored.overlap:
        notes.append(
            f"Byte-identical images in both train and val: {stored.overlap:,}. Validation metrics are too optimistic."
        )
    notes.append("Training does not check the data quality. Run python -m project check on the data set.")
    if module.backbone.adapter is not None:
        notes.append(
            f"Only an adapter ({module.adapter_description}) and the head were trained, "
            f"{pluralize(trained_parameters(module), 'parameter')}. On images that differ much from those of the "
            "pretraining, training whole stages may be more accurate."
        )
    if start is not None:
        notes.append(
            "Training started from a checkpoint of another fit, which may have been selected by some of the validation "
            "images."
        )
    if best is not None and best.evaluation is not None and best.evaluation.confusion is None:
        notes.append("The best epoch is from an earlier run, whose checkpoint has no per-class results.")
    return notes


def _data_section(module: ImageClassifier, data: ImageDataModule) -> dict[str, str]:
    fingerprints = {} if module.stored_features is None else module.stored_features.fingerprints
    section = {"Name": code(str(data.name)), "Source": type(data.source).__name__, "Splits": _split_method(data)}
    if not fingerprints:
        return section | {"SHA-256": "not computed, because features were not cached"}
    section |= {f"SHA-256 of {split}": code(digest) for split, digest in fingerprints.items()}
    return section | {"SHA-256 input": "image bytes and labels, independent of file names and order"}


def _split_method(data: ImageDataModule) -> str:
    settings, source = data.hold_out, data.source
    assert source is not None
    limit = f"; {settings.per_class} training images of each class are used" if settings.per_class else ""
    if settings.fold is not None:
        method = f"cross-validation, fold {settings.fold}, seed {settings.split_seed}"
    elif source.splits.get("val"):
        return f"predefined (train, val{', test' if source.splits.get('test') else ''}){limit}"
    else:
        method = f"held out from train: val {settings.val_fraction:g}, test {settings.test_fraction:g}"
        method += f", seed {settings.split_seed}"
    return f"{method}; near-duplicates and images of the same group stay in one split{limit}"


def _backbone_section(module: ImageClassifier, frozen: Mapping[str, Any], hashed: str) -> dict[str, str]:
    backbone, image = module.backbone, module.backbone.preprocessing
    weights = backbone.origin.weights or "random"
    resized = f"resized to {image.resize} x" if image.squash else "shorter edge resized to"
    return {
        "Architecture": code(backbone.name),
        # Only the name of a local file: its folder is private.
        "Weights": code(Path(weights).name if Path(weights).is_absolute() else weights),
        "Weights file": code(backbone.origin.source),
        "SHA-256 of the backbone": code(backbone.sha256),
        **_frozen_rows(module, frozen, hashed),
        "Input": f"{resized} {image.resize} px ({image.interpolation}), center crop {image.crop} x {image.crop} px",
    }


def _frozen_rows(module: ImageClassifier, frozen: Mapping[str, Any], hashed: str) -> dict[str, str]:
    stages, kind = ", ".join(frozen["stages"]) or "none", "stages"
    if module.backbone.adapter is not None:
        stages, kind = f"{stages}; in the others, all tensors except the adapter", "tensors"
    return {"Frozen stages": stages, f"SHA-256 of the frozen {kind} ({hashed})": code(frozen["sha256"])}


def _training_section(
    trainer: pl.Trainer, module: ImageClassifier, data: ImageDataModule, frozen: Sequence[str], duration: str
) -> dict[str, str]:
    hparams, decay = module.hparams, module.hparams["lr_decay"]
    engine = "" if module.stored_features is None else module.stored_features.computed_by
    total = sum(parameter.numel() for parameter in module.parameters())
    return {
        "Trained parts": trained_parts(module, frozen),
        **({} if module.unfreezing is None else {"Schedule": str(module.unfreezing)}),
        "Adapter": module.adapter_description,
        "Trained parameters": f"{trained_parameters(module, frozen):,} of {total:,}",
        "Head": code(format_class(hparams["head"])),
        "Initial head": _initial_head(trainer, module),
        "Optimizer": code(format_class(hparams["optimizer"])) if module.parameter_groups() else "none",
        "Learning rate scheduler": code(format_class(hparams["scheduler"])),
        **({} if decay == 1 else {"Learning rate by depth": f"times {decay:g} per stage towards the input"}),
        "Loss": f"cross-entropy, label smoothing {hparams['label_smoothing']:g}, class balancing: {data.balance}"
        f"{', L2-SP ' + format(hparams['l2_sp'], 'g') if hparams['l2_sp'] else ''}",
        **_stage_settings(module),
        "Duration": f"{duration}, {pluralize(trainer.global_step, 'step')}",
        "Batch size": f"{data.batch_size} per process, {pluralize(trainer.world_size, 'process', 'processes')}, "
        f"gradients accumulated over {pluralize(trainer.accumulate_grad_batches, 'batch', 'batches')}",
        "Data augmentation": f"{format_augmentation(data.augment)}{', MixUp or CutMix' if data.mixes else ''}",
        "Features": f"computed once, by {engine}" if engine else "computed in every epoch",
        "Precision": str(trainer.precision),
        "Random seed": str(run_seed()),
    }


def _stage_settings(module: ImageClassifier) -> dict[str, str]:
    """How BatchNorm was trained, and whether weights were averaged, if that applies."""
    settings, ema = {}, module.hparams["ema"]
    if module.backbone.has_trainable_batch_norm(module.cut):
        mode = module.hparams["batch_norm"]
        settings["BatchNorm of trained stages"] = (
            "batch statistics" if mode == "train" else "pretrained running statistics, unchanged"
        )
    if ema is not None:
        settings["Averaged weights"] = f"exponential moving average, decay {ema:g}"
    return settings


def _specialization(evaluation: EvaluationSummary | None) -> dict[str, str]:
    """How much of the pretrained network is left in the weights."""
    if evaluation is None:
        return {}
    alpha, similarity = evaluation.interpolated, format_drift(evaluation)
    end = "the best epoch" if evaluation.epoch is None else f"epoch {evaluation.epoch + 1}"
    interpolated = f"alpha {alpha} between the start of the fit (0) and {end} (1), chosen by validation"
    return {
        **({} if alpha is None else {"Interpolated weights": f"{interpolated} (WiSE-FT, arXiv:2109.01903)"}),
        **({} if similarity is None else {"Drift of the features": f"{similarity} (1 is unchanged; arXiv:1905.00414)"}),
    }


def _initial_head(trainer: pl.Trainer, module: ImageClassifier) -> str:
    start = starting_checkpoint(trainer, module)
    # Only the name of the file: its folder is private.
    return head_method(trainer) or ("random" if start is None else f"weights of {code(Path(start).name)}")


def _environment_section(trainer: pl.Trainer) -> dict[str, str]:
    section = {"Python": platform.python_version(), **installed_versions((*REPORTED_PACKAGES, "onnxruntime"))}
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    section["Hardware"] = (
        f"{trainer.world_size} x {name}, {cores()} CPU cores, {platform.system()} {platform.machine()}"
    )
    return section | {"Generated": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"}
