"""Compare the head solver with scikit-learn's LogisticRegressionCV, and its products with the machine's limit.

    python -m tests.benchmarks.head_solver --data DIR
    python -m tests.benchmarks.head_solver --ceiling

``DIR`` contains data sets such as ``flowers5/{train,val}/CLASS/*.jpg``; ``digits`` are those of scikit-learn.
Both solvers get the same features (EfficientNet-Lite0 with ImageNet weights), scaled as ours, and the same folds and
penalties; scikit-learn also selects by the held-out loss. Further columns give the scores of scikit-learn's
``LogisticRegression`` with our penalty and a tolerance of 1e-8, and those of ``LogisticRegressionCV`` on standardized
features. Seconds are those of the solvers alone, for ours the median of three runs. ``--ceiling`` solves 10 penalties
and 5 folds of 10,000 random rows of 2,048 features and 100 classes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tests.benchmarks.data_sets import ALL, NETWORK, WEIGHTS, data_sets, encode
from tests.benchmarks.measure import print_table, progress

FOLDS = 5
Rows = tuple[torch.Tensor, torch.Tensor]  # features and labels


def features(root: Path, size: int, store: Path) -> tuple[Rows, Rows, torch.Tensor]:
    """Features and labels of train and of val, and the fold of each training image."""
    from project.classifier import ImageClassifier
    from project.data.datamodule import ImageDataModule

    data = ImageDataModule(str(root))
    model = ImageClassifier(f"timm/{NETWORK}", WEIGHTS, image_size=size)
    parts = encode(model, data, store)
    return parts["train"], parts["val"], data.training_folds(FOLDS)


class Scores(NamedTuple):
    """Accuracy and mean negative log-likelihood on the validation images."""

    accuracy: float
    loss: float

    def __str__(self) -> str:
        return f"{self.accuracy:.4f}, {self.loss:.4f}"


class Comparison(NamedTuple):
    """Our head and scikit-learn's; the penalties, and the seconds of the solvers.

    Attributes:
        ours: Scores of our head.
        theirs: Scores of LogisticRegressionCV on features that are scaled as ours: it solves the same problem.
        exact: Scores of LogisticRegression on these features with our penalty, with a tolerance of 1e-8.
        standardized: Scores of LogisticRegressionCV on features with a standard deviation of 1, as is usual.
        penalties: Chosen by ours, by scikit-learn on the same problem.
        seconds: Of ours; of scikit-learn on the same problem, without and with ``n_jobs=2``.
    """

    ours: Scores
    theirs: Scores
    exact: Scores
    standardized: Scores
    penalties: tuple[float, float]
    seconds: tuple[float, float, float]


def compare(train: Rows, val: Rows, folds: torch.Tensor) -> Comparison:
    """Compare our solver with scikit-learn's on one data set."""
    from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
    from sklearn.model_selection import PredefinedSplit

    from project.models.head_bank import TrainingRows
    from project.models.head_solver import solve_head
    from project.task import SingleLabel

    task, (x, y), (x_val, y_val) = SingleLabel(), train, val
    classes = int(y.max()) + 1
    rows = TrainingRows(x.__getitem__, y, folds, lambda labels: task.target_weights(labels, classes, None, 0.0))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        solution = solve_head(rows, task, classes, FOLDS)
        times.append(time.perf_counter() - start)
    logits = torch.nn.functional.linear(x_val, solution.weight, solution.bias)
    deviation = x.double().std(0, correction=0)
    varies = deviation > 1e-6 * x.double().square().mean(0).sqrt()
    deviation = deviation.where(varies, 1.0)  # constant features have no effect

    def scaled_by(scale: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        scaled, scaled_val = (((part - x.double().mean(0)) / scale).numpy() for part in (x, x_val))
        return scaled, scaled_val

    def fit(scale: torch.Tensor, jobs: int | None) -> tuple[Scores, float, float]:
        scaled, scaled_val = scaled_by(scale)
        start = time.perf_counter()
        model = LogisticRegressionCV(
            Cs=[1 / score.penalty for score in solution.scores],
            cv=PredefinedSplit(folds.numpy()),
            scoring="neg_log_loss",
            max_iter=1000,
            n_jobs=jobs,
        ).fit(scaled, y.numpy())
        seconds = time.perf_counter() - start
        return scores(model.predict_proba(scaled_val), y_val.numpy()), 1 / np.atleast_1d(model.C_)[0], seconds

    scale = (deviation * deviation[varies].mean()).sqrt()
    theirs, penalty, alone = fit(scale, None)
    _, _, parallel = fit(scale, 2)
    standardized, _, _ = fit(deviation, 2)
    scaled, scaled_val = scaled_by(scale)
    exact = LogisticRegression(C=1 / solution.penalty, tol=1e-8, max_iter=100_000).fit(scaled, y.numpy())
    return Comparison(
        scores(logits.softmax(1).numpy(), y_val.numpy()),
        theirs,
        scores(exact.predict_proba(scaled_val), y_val.numpy()),
        standardized,
        (solution.penalty, penalty),
        (statistics.median(times), alone, parallel),
    )


def scores(probabilities: np.ndarray, labels: np.ndarray) -> Scores:
    """Scores of predicted probabilities ``(N, C)``."""
    of_label = probabilities[np.arange(len(labels)), labels]
    return Scores(float((probabilities.argmax(1) == labels).mean()), float(-np.log(of_label).mean()))


def ceiling() -> list[str]:
    """Rate of the products of rows and heads over the whole solution, and of a large matrix product."""
    from project.models import head_bank
    from project.models.head_bank import TrainingRows
    from project.models.head_solver import solve_head
    from project.task import SingleLabel

    count, width, classes = 10_000, 2_048, 100
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(count) % classes
    centers = torch.randn(classes, width, generator=generator) * torch.logspace(0, -1.5, width)
    x = centers[y] + 4 * torch.randn(count, width, generator=generator) * torch.logspace(0, -1.5, width)
    task, flop = SingleLabel(), [0]

    def counted(function: Any, products: int) -> Any:
        def call(self: Any, parameters: torch.Tensor, *args: Any) -> Any:
            flop[0] += 2 * products * count * parameters.numel()
            return function(self, parameters, *args)

        return call

    for name, products in (("_objective", 2), ("_curvature", 2), ("held_out_scores", 1)):
        setattr(head_bank.HeadBank, name, counted(getattr(head_bank.HeadBank, name), products))
    rows = TrainingRows(
        x.__getitem__,
        y,
        torch.arange(count) // classes % FOLDS,
        lambda labels: task.target_weights(labels, classes, None, 0.0),
    )
    start = time.perf_counter()
    solution = solve_head(rows, task, classes, FOLDS)
    seconds = time.perf_counter() - start
    left = torch.randn(4096, 4096)
    left @ left
    start = time.perf_counter()
    left @ left
    limit = 2 * 4096**3 / (time.perf_counter() - start)
    rate = flop[0] / seconds
    return [
        f"{len(solution.scores)}",
        f"{seconds:.1f}",
        f"{rate / 1e9:.0f}",
        f"{limit / 1e9:.0f}",
        f"{rate / limit:.0%}",
        f"{solution.converged}",
    ]


def main() -> None:
    """Print one row per data set, or the rate of the products."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that contains the data sets")
    parser.add_argument("--sets", nargs="+", default=ALL)
    parser.add_argument("--ceiling", action="store_true", help="measure the rate of the matrix products")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.ceiling:
        print_table(["penalties", "seconds", "GFLOP/s", "limit, GFLOP/s", "of the limit", "converged"], [ceiling()])
    if options.data is None:
        return
    table = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, root, size in data_sets(options.data, options.sets, folder):
            train, val, folds = features(root, size, folder / "store")
            found = compare(train, val, folds)
            seconds, *others = found.seconds
            table.append(
                [
                    f"{name} ({len(train[0]):,} / {len(val[0]):,})",
                    *(str(one) for one in (found.ours, found.theirs, found.exact, found.standardized)),
                    ", ".join(f"{penalty:.3g}" for penalty in found.penalties),
                    f"{seconds:.2f}",
                    *(f"{other:.2f} ({other / seconds:.1f} x)" for other in others),
                ]
            )
            progress(" | ".join(table[-1]))
    columns = ["data set (train / val)", "ours: accuracy, loss", "scikit-learn", "converged", "standardized"]
    print_table([*columns, "penalties", "ours, s", "scikit-learn, s", "with n_jobs=2, s"], table)


if __name__ == "__main__":
    main()
