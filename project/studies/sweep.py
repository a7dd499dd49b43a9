"""The ``sweep`` verb: trains many heads at once on stored features; held-out training images choose the best."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from project.classifier import ImageClassifier
from project.config.class_path import ClassSpec
from project.data.datamodule import ImageDataModule
from project.errors import ConfigError, ModelError
from project.features.provider import RowProvider, row_memory_budget
from project.models.head_solver import FOLDS
from project.models.heads import LinearHead
from project.models.readout import FeatureKind
from project.runtime.atomic_write import atomic_write
from project.runtime.console import print_rank_zero, progress_counter
from project.runtime.seeding import run_seed
from project.studies.candidates import LabelledRows, Recipe, make_head, solve_candidate, train_population
from project.studies.search_space import SAMPLERS, HeadSettings, SamplerName, SearchSpace
from project.studies.trials import WINNER, Rule, Trial, best_epoch, choose, report, write

SMALL = 1000  # training images; with fewer, a single fold has too few
HELD_OUT_IF_SMALL = 3  # folds; all five would take longer than three fits
STATE = "sweep.json"


def sweep(
    model: ImageClassifier,
    data: ImageDataModule,
    device: torch.device,
    precision: str,
    provider: RowProvider,
    folder: Callable[[Callable[[Path], bool]], Path],
    space: SearchSpace,
    count: int = 64,
    sampler: SamplerName = "grid",
    epochs: int = 20,
    folds: int | None = None,
    rule: Rule = "simplest",
) -> tuple[Path, Trial]:
    """Train many heads on stored features, choose the best on held-out training images, and train it with ``fit``.

    Each head is trained by AdamW; its number of epochs is that with the highest accuracy. The solved head of each kind
    of features is compared with them. Validation images are not used.

    Args:
        model: Its backbone computes the features.
        data: The data.
        device: Device of the features.
        precision: Lightning's name of the precision of the features.
        provider: Provides the features.
        folder: Finds the folder of a sweep, given whether a folder belongs to this one, or creates it.
        space: Values to combine.
        count: Maximum number of heads to train.
        sampler: grid combines all values, or a balanced sample of the combinations; optuna samples with its
            tree-structured Parzen estimator (install optuna).
        epochs: Maximum number of epochs of a head.
        folds: How many of five folds of the training images are held out in turn, from 1 to 5; by default 3, but 1
            for more than 1,000 images.
        rule: highest fits the head with the highest accuracy; simplest fits the solved head instead if its accuracy is
            within one standard error of the highest.

    Returns:
        The folder with the results, and the trial to fit.

    Raises:
        ConfigError: A setting is out of range or not supported.
    """
    space.validate()
    _validate(model, data, count, epochs, folds)
    model.use_data(data, precision, trains=True)
    rows, kinds = _read(model, data, device, precision, provider, space)
    space.features = kinds
    held_out = folds or (HELD_OUT_IF_SMALL if len(rows.labels) <= SMALL else 1)
    held_out = min(held_out, int(rows.folds.max()) + 1)
    recipe = Recipe(model.task, data.batch_size, epochs, run_seed())
    identity = _identity(model, data, rows, space, [count, sampler, held_out], recipe)
    target = folder(lambda candidate: _state(candidate).get("identity") == identity)
    results = _Results(target / STATE, identity)
    print_rank_zero(
        f"Sweep: up to {count} heads, and the solved head of {' and '.join(kinds)} features, on {len(rows.labels):,} "
        f"training images; scored on {held_out} of {int(rows.folds.max()) + 1} held-out folds. Validation images are "
        "not used."
    )
    start = time.perf_counter()
    trials = [_solved(kind, rows, model, held_out, results) for kind in kinds]
    drawn = SAMPLERS[sampler](space, count, recipe.seed)
    while settings := drawn.ask():
        trained = _train(settings, rows, held_out, recipe, results)
        drawn.tell([trial.accuracy for trial in trained])
        trials += trained
    trials.sort(key=lambda trial: (-trial.accuracy, trial.loss))
    chosen = choose(trials, rule)
    report(trials, chosen, time.perf_counter() - start)
    write(target, trials)
    return target, chosen


def _validate(model: ImageClassifier, data: ImageDataModule, count: int, epochs: int, folds: int | None) -> None:
    for name, value in (("count", count), ("epochs", epochs)):
        if value < 1:
            raise ConfigError(f"--{name} must be at least 1, not {value}.")
    if folds is not None and not 1 <= folds <= FOLDS:
        raise ConfigError(f"--folds must be from 1 to {FOLDS}, not {folds}.")
    if model.cut.trainable:
        raise ConfigError("sweep trains heads on features of the frozen backbone. Use --model.trainable head.")
    if data.mixes or data.augment != "none":
        raise ConfigError(
            "sweep trains on stored features of the images themselves. Remove data.augment, mixup and cutmix."
        )


def _read(
    model: ImageClassifier,
    data: ImageDataModule,
    device: torch.device,
    precision: str,
    provider: RowProvider,
    space: SearchSpace,
) -> tuple[LabelledRows, list[FeatureKind]]:
    """Features of the training images, and the kinds of the search space that the backbone provides."""
    assert data.source is not None  # the command line requires data
    samples, missing = data.splits["train"], []
    features: dict[FeatureKind, torch.Tensor] = {}
    budget, width = row_memory_budget(device), 0
    model.to(device)
    for kind in dict.fromkeys(space.features):
        try:
            model.backbone.set_features(kind)
        except ModelError as error:
            missing.append(str(error))
            continue
        width += model.backbone.feature_dim
        if len(samples) * width * 4 > budget:
            raise ConfigError(
                f"sweep holds the features in memory: {len(samples):,} rows of {width:,} exceed {budget / 1e9:.1f} GB. "
                "Use --space.features [last], or --data.per_class."
            )
        for head in space.head:  # a wrong argument ends the sweep before features are computed
            make_head(ClassSpec.of(head), model.backbone.feature_dim, len(model.classes))
        prefix = model.prefix_spec(device, precision)
        features[kind] = provider.encode_samples(prefix, data.source, samples).to(device)
    if not features:
        raise ConfigError(missing[0])
    if missing:
        print_rank_zero(f"Sweep: {missing[0].partition(':')[2].strip()}")
    labels, balance = data.training_labels, data.class_balance
    class_weights = None if model.loss_weights is None else model.loss_weights.to(device)
    importance = balance.draws.to(device) * (1 if class_weights is None else class_weights)
    folds = data.training_folds(FOLDS)
    if int(folds.max()) < 1:
        raise ConfigError(
            "sweep cannot hold out training images: those of each class are one image, near-duplicates or one group. "
            "Add images."
        )
    sampling = balance.sampling_weights(labels)
    rows = LabelledRows(features, labels.to(device), folds, len(model.classes), class_weights, sampling, importance)
    return rows, [*features]


def _identity(
    model: ImageClassifier,
    data: ImageDataModule,
    rows: LabelledRows,
    space: SearchSpace,
    options: list[Any],
    recipe: Recipe,
) -> str:
    """Identifies a sweep: an interrupted one with the same identity is continued."""
    assert data.source is not None
    digests = [hashlib.sha256(part.cpu().numpy().tobytes()).digest() for part in rows.features.values()]
    content = {
        "features": hashlib.sha256(b"".join(digests)).hexdigest(),
        "data": [data.source.name, list(data.source.classes), rows.labels.tolist(), rows.folds.tolist()],
        "weights": [rows.importance.tolist(), data.balance],
        "space": {**asdict(space), "head": [ClassSpec.of(head).as_dict() for head in space.head]},
        "recipe": [recipe.batch_size, recipe.epochs, recipe.seed],
        "options": options,
        "backbone": model.backbone.sha256,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _state(folder: Path) -> dict[str, Any]:
    """State of an unfinished sweep; empty if there is none."""
    file = folder / STATE
    if (folder / WINNER).exists() or not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text())
    except ValueError:
        content = None
    if isinstance(content, dict) and isinstance(content.get("scores"), dict):
        return content
    print_rank_zero(f"Sweep: {file} is damaged and ignored")
    return {}


class _Results:
    """Scores of the candidates that are done, in a JSON file that survives the process.

    Args:
        file: The file.
        identity: Identity of the sweep.
    """

    def __init__(self, file: Path, identity: str) -> None:
        self._file, self._identity = file, identity
        state = _state(file.parent)
        self._scores: dict[str, Any] = state.get("scores", {}) if state.get("identity") == identity else {}
        if self._scores:
            print_rank_zero(f"Sweep: continues {file.parent}, where {len(self._scores)} populations are trained")

    def get(self, key: str, shape: tuple[int, ...], compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Scores of a shape under a key; computed and saved if they are missing or damaged."""
        with contextlib.suppress(KeyError, TypeError, ValueError):
            scores = torch.tensor(self._scores[key], dtype=torch.float64)
            if scores.shape == shape:
                return scores
        scores = compute()
        self._scores[key] = scores.tolist()
        with atomic_write(self._file) as temporary:
            temporary.write_text(json.dumps({"identity": self._identity, "scores": self._scores}))
        return scores


def _solved(kind: FeatureKind, rows: LabelledRows, model: ImageClassifier, held_out: int, results: _Results) -> Trial:
    head = ClassSpec.of(LinearHead)
    settings = HeadSettings(head, kind, None, None, 0.0)
    shape = (int(rows.folds.max()) + 1, 2)
    scores = results.get(f"solved {kind}", shape, lambda: solve_candidate(settings, rows, model.task))
    return best_epoch(settings, scores[:held_out, None], _effective_images(rows, held_out))


def _train(
    settings: Sequence[HeadSettings], rows: LabelledRows, held_out: int, recipe: Recipe, results: _Results
) -> list[Trial]:
    """Train candidates, those of one head class and kind of features together."""
    groups: dict[tuple[str, FeatureKind], list[HeadSettings]] = {}
    for one in settings:
        groups.setdefault((json.dumps(one.head.as_dict(), sort_keys=True), one.features), []).append(one)
    trials: dict[int, Trial] = {}
    images = _effective_images(rows, held_out)
    with progress_counter("Sweep") as on_progress:
        done, total = 0, len(groups) * held_out
        on_progress(0, total)
        for (head, kind), members in groups.items():
            scores = []
            for fold in range(held_out):
                key = json.dumps(
                    [head, kind, fold, [(one.lr, one.weight_decay, one.label_smoothing) for one in members]]
                )
                compute = functools.partial(train_population, members, rows, fold, recipe)
                scores.append(results.get(key, (len(members), recipe.epochs, 2), compute))
                done += 1
                on_progress(done, total)
            for index, one in enumerate(members):
                trials[id(one)] = best_epoch(one, torch.stack([score[index] for score in scores]), images)
    return [trials[id(one)] for one in settings]


def _effective_images(rows: LabelledRows, held_out: int) -> int:
    """Number of held-out images; with weights, the number of equally weighted ones (Kish's effective sample size)."""
    mask = (rows.folds >= 0) & (rows.folds < held_out)
    weights = rows.importance.cpu()[rows.labels.cpu()[mask]].double()
    return round(float(weights.sum() ** 2 / weights.square().sum()))
