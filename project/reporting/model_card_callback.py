"""``model_card.md`` in a run's folder: what is known of a fit when it ends, put together for its card."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from project.callbacks.model_checkpoint import BestCheckpoint, LastCheckpoint
from project.classifier import ImageClassifier
from project.data.datamodule import ImageDataModule
from project.reporting.model_card import CardFacts, card, code
from project.runtime.atomic_write import replacing
from project.runtime.console import print_rank_zero
from project.runtime.logger_adapters import log_text
from project.runtime.seeding import run_seed
from project.runtime.signals import Interrupted
from project.runtime.system import cores

FILE = "model_card.md"
LIBRARIES = ("frozen-backbone", "torch", "torchvision", "lightning", "torchmetrics", "timm", "pillow", "onnxruntime")
UNKNOWN = "not computed, as images were not stored as features; it would have taken a pass over all files"


class ModelCardCallback(pl.Callback):
    """Writes the card of a fit when it ends or is interrupted, beside its checkpoints, and gives it to its loggers."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write it."""
        asked, had = trainer.max_epochs, trainer.current_epoch
        early = asked is not None and 0 <= had < asked
        self._write(trainer, pl_module, f"{had} of {asked} epochs" if early else f"{had} epoch(s)")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write it of a fit that was told to stop, as its best checkpoint may be all that there will be."""
        if isinstance(exception, Interrupted) and trainer.state.fn == "fit":
            self._write(trainer, pl_module, f"interrupted in epoch {trainer.current_epoch + 1}", "before training")

    def _write(
        self, trainer: pl.Trainer, module: pl.LightningModule, ended: str, checked: str = "before and after training"
    ) -> None:
        data = getattr(trainer, "datamodule", None)
        target = card_path(trainer)
        known = isinstance(module, ImageClassifier) and isinstance(data, ImageDataModule) and data.source is not None
        if not (trainer.is_global_zero and known) or target is None:
            return
        assert isinstance(module, ImageClassifier) and isinstance(data, ImageDataModule)
        text = card(_facts(trainer, module, data, ended, checked))
        try:
            with replacing(target) as temporary:
                # A class's name need not be text.
                temporary.write_text(text, "utf-8", "backslashreplace")
        except OSError as error:  # what was trained is saved, and worth more than what is said of it
            print_rank_zero(f"The model card {target} cannot be written: {error.strerror}.")
        log_text(trainer, "model_card", text.partition("\n---\n")[2])


def card_path(trainer: pl.Trainer) -> Path | None:
    """Where the card of a fit is, or is to be; ``None`` of one that keeps no checkpoint, and so no model."""
    kept = next((each for each in trainer.checkpoint_callbacks if isinstance(each, LastCheckpoint)), None)
    return None if kept is None else kept.path.parent.parent / FILE


def _facts(trainer: pl.Trainer, module: ImageClassifier, data: ImageDataModule, ended: str, checked: str) -> CardFacts:
    best = next((each for each in trainer.checkpoint_callbacks if isinstance(each, BestCheckpoint)), None)
    stored = module.stored_features
    measured = best.measured if best is not None else None
    known = [f"Known of the data before any image was read: {each.kind}." for each in data.source.findings]  # type: ignore[union-attr]
    if stored is not None and stored.in_both:
        known.append(f"{stored.in_both} images are in train and in val to the byte, so they were trained on.")
    known.append("The data itself was not examined by this fit: python -m project check does that.")
    if measured is not None and measured.confusion is None:
        known.append("The best epoch was in the fit that this one went on from, which kept no figures of each class.")
    return CardFacts(
        name=f"{data.name} on {module.backbone.name}",
        data=str(data.name),
        classes=module.classes,
        counts=data.class_counts,
        about={
            "data": _about_data(data, stored.fingerprints if stored is not None else {}),
            "backbone": _about_backbone(module, checked),
            "training": _about_training(trainer, module, data, stored.computed_by if stored is not None else "", ended),
            "versions": _versions(trainer),
        },
        scores=measured,
        epochs=trainer.current_epoch,
        validated=trainer.current_epoch // (trainer.check_val_every_n_epoch or 1),
        known=known,
        base_model=module.backbone.origin.repository,
        validates=best is not None,
        checkpoint=f"checkpoints/{'last' if measured is None else 'best'}.ckpt",
    )


def _about_data(data: ImageDataModule, fingerprints: Mapping[str, str]) -> dict[str, str]:
    how, source = data.hold_out, data.source
    assert source is not None
    own = [split for split in ("val", "test") if source.splits.get(split)]
    if how.fold is not None:
        held = f"fold {how.fold}, seed {how.split_seed}"
    else:
        held = f"val {how.val_fraction:g}, test {how.test_fraction:g} of train, seed {how.split_seed}"
        held = f"the data's own splits ({', '.join(['train', *own])})" if "val" in own else held
    held += "" if "val" in own and how.fold is None else "; images alike to the eye and those of a group stay together"
    prints = {f"SHA-256 of {split}": code(digits) for split, digits in fingerprints.items()}
    if prints:
        prints["what of"] = "each image's bytes and its class, in whatever order and under whatever names"
    return {
        "name": code(str(data.name)),
        "source": type(source).__name__,
        "held out": held,
        **(prints or {"SHA-256": UNKNOWN}),
    }


def _about_backbone(module: ImageClassifier, checked: str) -> dict[str, str]:
    backbone, image = module.backbone, module.backbone.preprocessing
    weights = module.backbone.origin.weights or "random"
    return {
        "network": code(backbone.name),
        # Of a file, its name: the folder is nobody's business.
        "weights": code(Path(weights).name if Path(weights).is_absolute() else weights),
        "their file": code(module.backbone.origin.source),
        "SHA-256 of all of it": code(backbone.sha256),
        "frozen stages": ", ".join(module.cut.frozen) or "none",
        f"SHA-256 of these, taken {checked}": code(module.frozen_sha256),
        "input": f"resized to {image.resize} ({image.interpolation}), of that the middle {image.crop} x {image.crop}",
    }


def _about_training(
    trainer: pl.Trainer, module: ImageClassifier, data: ImageDataModule, made: str, ended: str
) -> dict[str, str]:
    hparams: Any = module.hparams
    trains = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    every = sum(parameter.numel() for parameter in module.parameters())
    augment = data.augment if isinstance(data.augment, str) else "transforms of its own"
    accumulated = trainer.accumulate_grad_batches
    return {
        "trained": ", ".join([*module.cut.trainable, "head"]),
        "parameters": f"{trains:,} of {every:,} trained",
        "head": code(_call(hparams["head"])),
        "optimizer": code(_call(hparams["optimizer"])),
        "scheduler": code(_call(hparams["scheduler"])) if hparams["scheduler"] else "none",
        "loss": f"cross-entropy, label smoothing {hparams['label_smoothing']:g}, balance {data.balance}",
        "length": f"{ended}, {trainer.global_step:,} steps",
        "batch size": f"{data.batch_size} in each of {trainer.world_size} process(es), {accumulated} accumulated",
        "augmentation": f"{augment}{', images mixed' if data.mixes else ''}",
        "features": f"computed once by {made}" if made else "computed in every epoch",
        "precision": str(trainer.precision),
        "seed": str(run_seed()),
    }


def _versions(trainer: pl.Trainer) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    device = trainer.strategy.root_device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    machine = f"{platform.system()} {platform.machine()}, {cores()} cores, trained on {trainer.world_size} x {kind}"
    return {**found, "machine": machine, "written": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"}


def _call(described: Mapping[str, Any]) -> str:
    """``{"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}`` as ``SGD(lr=0.1)``."""
    given = (described.get("init_args") or {}).items()
    arguments = ", ".join(f"{key}={value!r}" for key, value in given if value is not None)
    return f"{described['class_path'].rpartition('.')[2]}({arguments})"
