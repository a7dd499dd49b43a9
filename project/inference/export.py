"""The command ``export``: writes a trained classifier to a file, and compares the file with the classifier."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from project.checkpoints.compatibility import versions
from project.checkpoints.reader import read_checkpoint
from project.classifier import ImageClassifier
from project.data.datamodule import ImageDataModule
from project.data.transforms import evaluation
from project.errors import CheckpointError, ConfigError, DataError
from project.evaluation.answers.calibration import Answers
from project.evaluation.answers.temperature import scaled
from project.evaluation.answers.unknown_images import distances
from project.inference.export_formats import FORMATS, ExportFormat, Runner, SplitOnnxFormat
from project.inference.exported_answers import answer_metadata
from project.inference.exported_network import ExportedNetwork
from project.inference.gallery import data_of
from project.inference.int8_export import CALIBRATION_IMAGES, write_int8
from project.inference.predictor import Classifier
from project.runtime.atomic_write import atomic_write
from project.runtime.console import print_rank_zero

#: Largest accepted difference of a probability between the file and ``load``. Both get the same pixels.
TOLERANCE = 1e-3
#: Splits in the order of preference: images that the fit has not trained on come first.
SPLITS = ("test", "val", "train")


class Comparison(NamedTuple):
    """Differences between an exported file and the classifier on the same images.

    Attributes:
        images: Number of images.
        largest: Largest difference of each output, by its name.
        same: Number of images with the same class.
    """

    images: int
    largest: dict[str, float]
    same: int

    def __str__(self) -> str:
        differences = [f"{name.replace('_', ' ')} that differ by at most {v:.1e}" for name, v in self.largest.items()]
        return f"on {self.images} images, the same class as load on {self.same}, and {' and '.join(differences)}"


def require(output: str, split: bool, int8: bool, images: int) -> None:
    """Check the flags before weights are loaded.

    Raises:
        ConfigError: The format is unknown, a package is missing, or a flag is out of range.
    """
    if images < 1:
        raise ConfigError(f"--images must be at least 1, not {images}: the file is compared with the classifier.")
    path = Path(output).expanduser()
    if path.suffix not in FORMATS or path.is_dir():
        raise ConfigError(f"--output must name a file that ends in {' or '.join(FORMATS)}, not {output!r}.")
    if split and path.suffix != ".onnx":
        raise ConfigError(f"--split writes ONNX files, not {path.suffix}. Use --output {path.with_suffix('.onnx')}")
    if int8 and (split or path.suffix != ".onnx"):
        raise ConfigError("--int8 writes a single ONNX file. Use --output NAME.onnx without --split.")
    requirement = _format(output, split).requirement
    if requirement is not None and importlib.util.find_spec(requirement[0]) is None:
        package, extra = requirement
        raise ConfigError(f"export to {path.suffix} requires {package}: pip install 'frozen-backbone[{extra}]'")


def _format(output: str, split: bool) -> ExportFormat:
    return SplitOnnxFormat() if split else FORMATS[Path(output).suffix]


def compare(run: Runner, classifier: Classifier, images: Sequence[Image.Image]) -> Comparison:
    """Run images one by one, each in its own size, in the file and in the classifier.

    Args:
        run: Runs the file.
        classifier: The classifier.
        images: RGB images, at least one.
    """
    largest, same = dict[str, float](), 0
    for image in images:
        pixels = np.array(image)[None]
        outputs, expected = run(pixels), {"probabilities": classifier.predict_proba(pixels)}
        answers = classifier.model.answers
        if len(outputs) > 1 and answers is not None:
            expected["calibrated_probabilities"] = scaled(expected["probabilities"], answers.temperature)
            expected["distances"] = distances(classifier.features(pixels), answers.rows)
        for name, values in expected.items():
            largest[name] = float(np.maximum(largest.get(name, 0.0), np.abs(outputs[name] - values).max()))  # keeps NaN
        same += classifier.names(outputs["probabilities"]) == classifier.names(expected["probabilities"])
    return Comparison(len(images), largest, same)


def metadata_of(model: ImageClassifier, answers: Answers | None) -> dict[str, Any]:
    """Plain values that an exported file contains: classes, preprocessing, identity of the backbone, and answers.

    Args:
        model: The classifier.
        answers: Its calibrated answers; ``None`` to leave them out.
    """
    backbone = model.backbone
    metadata = {
        "classes": list(model.classes),
        "preprocessing": backbone.preprocessing.as_dict(),
        "backbone": {"name": backbone.name, "weights": backbone.origin.source, "sha256": backbone.sha256},
        "versions": versions(),
    }
    return metadata if answers is None else metadata | {"answers": answer_metadata(answers)}


def export(
    model: ImageClassifier,
    ckpt_path: str | None = None,
    output: str = "model.onnx",
    split: bool = False,
    int8: bool = False,
    images: int = 32,
    data: ImageDataModule | None = None,
) -> None:
    """Export a trained classifier, preprocessing included, to a file that runs without this project.

    Args:
        model: The classifier.
        ckpt_path: Checkpoint of the trained model.
        output: File to write: NAME.onnx for ONNX Runtime, NAME.pt2 for PyTorch (torch.export).
        split: Write two ONNX files: NAME.backbone.onnx, which classifiers of several tasks on one backbone share, and
            NAME.head.onnx.
        int8: Use int8 arithmetic, which is faster on a CPU; calibrated on training images. Prints its accuracy and
            that of float32.
        images: Number of images on which the file is compared with the classifier.
        data: Their data; by default that in the config.yaml of the checkpoint's run.

    Raises:
        ConfigError: A flag is missing or invalid, there are no images, or the network cannot be exported.
        CheckpointError: The checkpoint is missing or damaged, or the file gives other probabilities.
    """
    if ckpt_path is None:
        raise ConfigError("export requires a trained model: pass its checkpoint with --ckpt_path FILE.")
    checkpoint = read_checkpoint(ckpt_path)
    model.on_load_checkpoint(checkpoint)
    model.load_state_dict(checkpoint["state_dict"])
    data = data if data is not None and data.source is not None else data_of(ckpt_path)
    file_format, target = _format(output, split), Path(output).expanduser()
    answers = None if int8 else model.answers  # thresholds hold for the outputs that they were calibrated on
    files, network = file_format.files(target), ExportedNetwork(model.cpu(), answers)
    preprocessing, metadata = model.backbone.preprocessing, metadata_of(model, answers)
    with _report_os_error(target), contextlib.ExitStack() as stack:
        temporary = [stack.enter_context(atomic_write(file)) for file in files]
        if int8:
            transform = evaluation(preprocessing)
            calibration = torch.stack(
                [transform(image) for image, _ in read_images(data, CALIBRATION_IMAGES, SPLITS[::-1])]
            )
            splits = [name for name in SPLITS if data.splits.get(name)]
            if len(splits) == 1:
                raise DataError(
                    f"--int8 calibrates on the images of one split and compares on another, but {data.name} has only "
                    f"{splits[0]}.\nPass --data.root FOLDER with train and val."
                )
            labelled = read_images(data, images, splits)
            text = str(write_int8(network, preprocessing, metadata, calibration, labelled, model.task, temporary[0]))
        else:
            file_format.write(network, preprocessing, metadata, temporary)
            pictures = [image for image, _ in read_images(data, images, SPLITS)]
            text = str(_verified(compare(file_format.runner(temporary), Classifier(model), pictures)))
        sizes = [file.stat().st_size for file in temporary]
    names = " and ".join(f"{file} ({size / 1e6:.3g} MB)" for file, size in zip(files, sizes, strict=True))
    print_rank_zero(f"Export: {names}; {text}; {_contents(model, answers)}.")


def _contents(model: ImageClassifier, answers: Answers | None) -> str:
    """What the file contains of calibrated answers, a clause."""
    if answers is not None:
        return "with calibrated answers"
    if model.answers is not None:
        return "without calibrated answers, which hold for float32 only"
    return "without calibrated answers, which the checkpoint does not have"


def _verified(comparison: Comparison) -> Comparison:
    """The comparison itself.

    Raises:
        CheckpointError: The file gives other probabilities.
    """
    for name, difference in comparison.largest.items():
        if not difference <= TOLERANCE:  # NaN is not
            raise CheckpointError(
                f"export: on {comparison.images} images, the {name} of the file differ by up to {difference:.1e}, "
                f"more than {TOLERANCE:.0e}. The file is deleted. Please report this."
            )
    return comparison


def read_images(data: ImageDataModule, count: int, splits: Sequence[str]) -> list[tuple[Image.Image, int]]:
    """Read evenly spaced images of the first split that has any, with their class indices.

    Args:
        data: The data.
        count: Maximum number of images.
        splits: Names of splits in the order of preference.

    Raises:
        DataError: The data has no images, or an image cannot be read.
    """
    samples = next((data.splits[name] for name in splits if data.splits.get(name)), None)
    if samples is None or data.source is None:
        raise DataError(f"{data.name} has no images to compare the exported file with. Pass --data.root FOLDER.")
    step = max(len(samples) // count, 1)
    return [(data.source.read(sample), sample.label) for sample in islice(samples[::step], count)]


@contextlib.contextmanager
def _report_os_error(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"--output: {target} cannot be written: {error.strerror}.") from error
