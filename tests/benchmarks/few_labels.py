"""Compare heads on few training images of each class, on stored features of EfficientNet-Lite0 with ImageNet weights.

    python -m tests.benchmarks.few_labels --data DIR

``DIR`` contains data sets such as ``flowers5/{train,val}/CLASS/*.jpg``; ``digits`` are those of scikit-learn. The
features of a data set are computed once. Each cell is the mean validation accuracy over the seeds of
``data.split_seed``, which choose the images of ``data.per_class``. Validation images choose nothing. The cosine head is
trained for ten epochs of AdamW with learning rate 0.001 and batches of 32.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import torch
from torch import nn

from tests.benchmarks.data_sets import ALL, NETWORK, WEIGHTS, data_sets, encode
from tests.benchmarks.measure import print_table, progress

FOLDS, EPOCHS = 5, 10
Rows = tuple[torch.Tensor, torch.Tensor]
#: Features and labels of the training images, their cross-validation folds, and the number of classes.
Problem = tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]


class Features:
    """Features of a data set, computed once.

    Args:
        root: The data set.
        size: Input size in pixels.
        store: Folder of the feature store.
    """

    def __init__(self, root: Path, size: int, store: Path) -> None:
        from project.classifier import ImageClassifier
        from project.data.datamodule import ImageDataModule

        self._root = root
        data = ImageDataModule(str(root))
        model = ImageClassifier(f"timm/{NETWORK}", WEIGHTS, image_size=size)
        self.classes = len(data.classes or ())
        self._rows = {}
        for name, (rows, _) in encode(model, data, store).items():
            self._rows |= {sample.name: row for sample, row in zip(data.splits[name], rows, strict=True)}
        self.val = self._of(data.splits["val"])

    def _of(self, samples: list) -> Rows:
        labels = torch.tensor([sample.label for sample in samples])
        return torch.stack([self._rows[sample.name] for sample in samples]), labels

    def problem(self, per_class: int | None, seed: int) -> Problem:
        """The training rows of ``data.per_class`` and ``data.split_seed``."""
        from project.data.datamodule import ImageDataModule

        data = ImageDataModule(str(self._root), per_class=per_class, split_seed=seed)
        with contextlib.redirect_stdout(io.StringIO()):
            return *self._of(data.splits["train"]), data.training_folds(FOLDS), self.classes


def solved(problem: Problem, edges: list[str]) -> nn.Module:
    """The solved linear head; records whether its penalty is the outermost one that was compared."""
    from project.models.head_bank import TrainingRows
    from project.models.head_solver import solve_head
    from project.task import SingleLabel

    x, y, folds, classes = problem
    task, head = SingleLabel(), nn.Linear(x.shape[1], classes)
    rows = TrainingRows(x.__getitem__, y, folds, lambda labels: task.target_weights(labels, classes, None, 0.0))
    solution = solve_head(rows, task, classes, int(folds.max()) + 1)
    outermost = solution.scores[:1] + solution.scores[-1:]
    edges.append("fixed" if not solution.scores else "edge" if solution.chosen in outermost else "inside")
    head.weight.data, head.bias.data = solution.weight, solution.bias
    return head


def fitted(kind: str) -> Callable[[Problem], nn.Module]:
    """A head that computes itself."""
    from project.models import heads

    def head(problem: Problem) -> nn.Module:
        module = getattr(heads, kind)(problem[0].shape[1], problem[3])
        module.fit([problem[:2]])
        return module

    return head


def trained(start: Callable[[Problem], nn.Module]) -> Callable[[Problem], nn.Module]:
    """A head after ten epochs."""

    def head(problem: Problem) -> nn.Module:
        torch.manual_seed(0)
        module, (x, y, *_) = start(problem), problem
        optimizer = torch.optim.AdamW(module.parameters(), 0.001)
        for _ in range(EPOCHS):
            for indices in torch.randperm(len(y)).split(32):
                optimizer.zero_grad()
                nn.functional.cross_entropy(module(x[indices]), y[indices]).backward()
                optimizer.step()
        return module

    return head


def random_cosine(problem: Problem) -> nn.Module:
    """A cosine head with random weights."""
    from project.models.heads import CosineHead

    return CosineHead(problem[0].shape[1], problem[3])


def accuracy(head: nn.Module, val: Rows) -> float:
    """Accuracy of a head."""
    with torch.no_grad():
        return float((head(val[0]).argmax(1) == val[1]).float().mean())


def main() -> None:
    """Print one row per data set and number of images, and how often the penalty was at the end of its range."""
    from project.evaluation.confidence_intervals import wilson

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that contains the data sets")
    parser.add_argument("--sets", nargs="+", default=ALL)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--per-class", nargs="+", type=int, default=[1, 2, 5, 10, 0], help="images; 0 for all")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    edges: list[str] = []
    heads: dict[str, Callable[[Problem], nn.Module]] = {
        "solved linear": lambda problem: solved(problem, edges),
        "prototypes": fitted("PrototypeHead"),
        "kNN": fitted("KNNHead"),
        "cosine, class means": fitted("CosineHead"),
        "the same, trained": trained(fitted("CosineHead")),
        "cosine, random, trained": trained(random_cosine),
    }
    table = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, root, size in data_sets(options.data, options.sets, folder):
            features = Features(root, size, folder / "store")
            for count in options.per_class:
                edges.clear()
                start = time.perf_counter()
                seeds = range(options.seeds if count else 1)
                problems = [features.problem(count or None, seed) for seed in seeds]
                cells = []
                for head in heads.values():
                    share = mean(accuracy(head(problem), features.val) for problem in problems)
                    low, high = wilson(share * len(features.val[1]), len(features.val[1]))
                    cells.append(f"{share:.3f} ({low:.3f} to {high:.3f})")
                table.append([name, str(count or "all"), *cells, ", ".join(edges)])
                progress(f"{' | '.join(table[-1])}; {time.perf_counter() - start:.1f} s")
    print_table(["data set", "images of each class", *heads, "penalty"], table)


if __name__ == "__main__":
    main()
