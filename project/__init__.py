"""One frozen backbone, many specialised heads: transfer learning with PyTorch Lightning."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from project.classifier import ImageClassifier
    from project.data.datamodule import ImageDataModule
    from project.inference.predictor import Classifier, Classifiers, load
    from project.trainer import Trainer

__all__ = ["Classifier", "Classifiers", "ImageClassifier", "ImageDataModule", "Trainer", "load"]

_MODULES = {
    "Classifier": "project.inference.predictor",
    "Classifiers": "project.inference.predictor",
    "ImageClassifier": "project.classifier",
    "ImageDataModule": "project.data.datamodule",
    "Trainer": "project.trainer",
    "load": "project.inference.predictor",
}


def __getattr__(name: str) -> Any:
    # Torch and Lightning take seconds to import, so they are imported on first use of a name.
    if name not in _MODULES:
        raise AttributeError(f"module 'project' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
