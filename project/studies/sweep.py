"""The ``sweep`` verb: trains many heads at once on stored features; held-out training images choose the best."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from project.classifier import ImageClassifier
from project.config.class_path import ClassSpec
from project.data.datamodule import ImageDataModule
from project.errors import ConfigError
from project.features.provider import RowProvider, row_memory_budget
from project.models.head_solver import COPIES, FOLDS, solver_device
from project.models.heads import LinearHead
from project.models.readout import FeatureKind
from project.runtime.atomic_write import atomic_write
from project.runtime.console import print_rank_zero, progress_counter
from project.runtime.seeding import run_seed
from project.studies.candidates import LabelledRows, Recipe, solve_candidate, train_population, validate_head
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
    model.to(device)
    features = model.backbone.features
    try:
        space = _validate_space(space, model, len(data.splits["train"]), solver_device(device))
        rows = _labels(model, data, solver_device(device), folds)
        rows = replace(rows, features=_encode(space.features, model, data, device, precision, provider))
    finally:
        model.backbone.set_features(features)
    recipe = Recipe(model.task, data.batch_size, epochs, run_seed())
    identity = _identity(model, data, rows, space, [count, sampler, rows.held_out], recipe)
    target = folder(lambda candidate: _state(candidate).get("identity") == identity)
    results = _Results(target / STATE, identity)
    print_rank_zero(
        f"Sweep: up to {count} heads, and the solved head of {' and '.join(space.features)} features, on "
        f"{len(rows.labels):,} training images; scored on {rows.held_out} of {rows.fold_count} held-out folds. "
        "Validation images are not used."
    )
    start = time.perf_counter()
    trials = [_solved(kind, rows, model, results) for kind in space.features]
    drawn = SAMPLERS[sampler](space, count, recipe.seed)
    while settings := drawn.ask():
        trained = _train(settings, rows, recipe, results)
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
    if model.last_cut.trainable:
        raise ConfigError("sweep trains heads on features of the frozen backbone. Use --model.trainable head.")
    if data.mixes or data.augment != "none":
        raise ConfigError(
            "sweep trains on stored features of the images themselves. Remove data.augment, mixup and cutmix."
        )


def _validate_space(space: SearchSpace, model: ImageClassifier, images: int, device: torch.device) -> SearchSpace:
    """The search space with the kinds of features that the backbone provides, before any is computed."""
    available = model.backbone.available_features
    kinds, missing = ([kind for kind in space.features if (kind in available) is given] for given in (True, False))
    if missing:
        text = f"{model.backbone.name} does not provide features {', '.join(missing)}, only {', '.join(available)}"
        if not kinds:
            raise ConfigError(f"space.features: {text}. Use one of these.")
        print_rank_zero(f"Sweep: {text}")
    widths = []
    for kind in kinds:
        model.backbone.set_features(kind)
        widths.append(model.backbone.feature_dim)
    needed, budget = 4 * images * (sum(widths) + (COPIES - 1) * max(widths)), row_memory_budget(device)
    if needed > budget:
        raise ConfigError(
            f"sweep holds the features of {images:,} images in memory, and the solver copies of them: "
            f"{needed / 1e9:.2g} GB, more than {budget / 1e9:.2g} GB.\n"
            "Use --space.features [last], or fewer images with --data.per_class."
        )
    for head, width in itertools.product(space.head, widths):
        validate_head(ClassSpec.of(head), width, len(model.classes), device)
    return replace(space, features=kinds)


def _labels(model: ImageClassifier, data: ImageDataModule, device: torch.device, folds: int | None) -> LabelledRows:
    """Labels, folds and weights of the training images, without features."""
    labels, balance, fold_of = data.training_labels, data.class_balance, data.training_folds(FOLDS)
    if int(fold_of.max()) < 1:
        raise ConfigError(
            "sweep cannot hold out training images: those of each class are one image, near-duplicates or one group. "
            "Add images."
        )
    if folds is None:
        folds = HELD_OUT_IF_SMALL if len(labels) <= SMALL else 1
    class_weights = None if model.loss_weights is None else model.loss_weights.to(device)
    rows = LabelledRows(
        {},
        labels.to(device),
        fold_of,
        min(folds, int(fold_of.max()) + 1),
        len(model.classes),
        class_weights,
        balance.sampling_weights(labels),
        balance.draws.to(device) * (1 if class_weights is None else class_weights),
    )
    if not rows.scored_weights.any():
        raise ConfigError(
            "model.class_weights is 0 for the classes of all held-out images, so no candidate can be scored.\n"
            "Give more classes a weight of more than 0."
        )
    return rows


def _encode(
    kinds: Sequence[FeatureKind],
    model: ImageClassifier,
    data: ImageDataModule,
    device: torch.device,
    precision: str,
    provider: RowProvider,
) -> dict[FeatureKind, torch.Tensor]:
    """Features of the training images."""
    assert data.source is not None  # the command line requires data
    features = {}
    for kind in kinds:
        model.backbone.set_features(kind)
        encoded = provider.encode_samples(model.prefix_spec(device, precision), data.source, data.splits["train"])
        features[kind] = encoded.to(solver_device(device))
    return features


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
    digests = [hashlib.sha256(part.cpu().reshape(-1).numpy().data).digest() for part in rows.features.values()]
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
            print_rank_zero(f"Sweep: continues {file.parent}, where {len(self._scores)} groups of heads are done")

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


def _solved(kind: FeatureKind, rows: LabelledRows, model: ImageClassifier, results: _Results) -> Trial:
    settings = HeadSettings(ClassSpec.of(LinearHead), kind, None, None, 0.0)
    scores = results.get(f"solved {kind}", (rows.fold_count, 2), lambda: solve_candidate(kind, rows, model.task))
    return best_epoch(settings, scores[: rows.held_out, None], rows.scored_weights)


def _train(settings: Sequence[HeadSettings], rows: LabelledRows, recipe: Recipe, results: _Results) -> list[Trial]:
    """Train candidates, those of one head class and kind of features together."""
    groups: dict[tuple[str, FeatureKind], list[int]] = {}
    for index, one in enumerate(settings):
        groups.setdefault((json.dumps(one.head.as_dict(), sort_keys=True), one.features), []).append(index)
    trials: dict[int, Trial] = {}
    with progress_counter("Sweep") as on_progress:
        done, total = 0, len(groups) * rows.held_out
        on_progress(0, total)
        for (head, kind), indices in groups.items():
            members, scores = [settings[index] for index in indices], []
            for fold in range(rows.held_out):
                key = json.dumps(
                    [head, kind, fold, [(one.lr, one.weight_decay, one.label_smoothing) for one in members]]
                )
                compute = functools.partial(train_population, members, rows, fold, recipe)
                scores.append(results.get(key, (len(members), recipe.epochs, 2), compute))
                done += 1
                on_progress(done, total)
            for index, of_folds in zip(indices, torch.stack(scores, 1), strict=True):
                trials[index] = best_epoch(settings[index], of_folds, rows.scored_weights)
    return [trials[index] for index in range(len(settings))]
