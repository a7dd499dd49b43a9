"""The ``sweep`` verb: candidates, scores on held-out training images, the fit of the winner, and interruptions."""

import csv
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional

from project import load
from project.checkpoints.reader import read_checkpoint
from project.classifier import ImageClassifier
from project.cli.main import main
from project.config.class_path import ClassSpec
from project.data.datamodule import ImageDataModule
from project.data.samplers import EpochOrder
from project.errors import ConfigError
from project.features.provider import RowProvider
from project.models.heads import LinearHead
from project.runtime.seeding import reseed
from project.studies import sweep as sweep_module
from project.studies.candidates import LabelledRows, Recipe, solve_candidate, train_population, validate_head
from project.studies.search_space import HeadSettings, SearchSpace
from project.studies.trials import Rule, Trial, best_epoch, choose, report, write_winner
from project.task import SingleLabel
from tests import forked
from tests.conftest import BACKBONE, FEATURES, SMALL, STORED

CPU = torch.device("cpu")
LINEAR = ClassSpec.of(LinearHead)
#: Flags of a small sweep: four heads of two populations.
TINY = [*SMALL, *STORED, "--count", "4", "--epochs", "2", "--folds", "2", "--data.batch_size", "8"]
TINY += ["--space.head", "[project.models.heads.LinearHead]", "--space.lr", "[0.001, 0.1]", "--rule", "highest"]


@pytest.fixture
def tiny(here: Path, photos: Path, weights: Path) -> list[str]:
    return ["sweep", *TINY, "--model.weights", str(weights), "--data.root", str(photos)]


def trials(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def test_sweep_ends_with_an_ordinary_fit_of_its_winner(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tiny) == 0
    runs = Path("runs/photos")
    rows = trials(runs / "version_0")
    assert len(rows) == 6, "four trained heads, and the solved head of two kinds of features"
    assert {(row["features"], row["lr"] == "solved") for row in rows} == {
        (kind, solved) for kind in ("last", "stages") for solved in (False, True)
    }
    ranked = [(-float(row["accuracy"]), float(row["loss"])) for row in rows]
    assert ranked == sorted(ranked)
    assert (runs / "version_0" / "sweep.png").stat().st_size > 1000
    assert len(list((runs / "version_0" / "trials").glob("rank_*/events*"))) == 6

    config = yaml.safe_load((runs / "version_0" / "winner.yaml").read_text())
    parameters = read_checkpoint(runs / "version_1" / "checkpoints" / "last.ckpt")["hyper_parameters"]
    assert parameters["features"] == config["model"]["features"] == rows[0]["features"]
    if rows[0]["lr"] != "solved":
        assert parameters["optimizer"]["init_args"]["lr"] == float(rows[0]["lr"])
        assert config["trainer"]["max_epochs"] == int(rows[0]["epochs"])
    classifier = load(runs / "version_1" / "checkpoints" / "best.ckpt")
    assert classifier.classes_ == ["blue", "green", "red"]
    output = capsys.readouterr().out
    assert "4 heads, and the solved head of last and stages features, on 24 training images" in output
    assert "scored on 2 of 5 held-out folds" in output
    assert "Result:" in output
    assert not (runs / "version_2").exists()


def test_validation_images_have_no_effect_on_the_choice(tiny: list[str], album: Path) -> None:
    first, second = Path("a"), Path("b")
    flags = ["--trainer.limit_val_batches", "0", "--data.root"]
    assert main([*tiny[:-2], *flags, str(album), "--trainer.default_root_dir", str(first)]) == 0
    red, blue = album / "val" / "red", album / "val" / "blue"
    shutil.move(red, album / "other")
    shutil.move(blue, red)
    shutil.move(album / "other", blue)
    assert main([*tiny[:-2], *flags, str(album), "--trainer.default_root_dir", str(second)]) == 0
    assert trials(first / "album" / "version_0") == trials(second / "album" / "version_0")


def kill_in_the_third_population() -> None:
    """Kill the process with SIGKILL after two populations."""
    train, done = sweep_module.train_population, []

    def killed(*arguments: Any) -> torch.Tensor:
        if len(done) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(None)
        return train(*arguments)

    sweep_module.train_population = killed


def test_killed_sweep_continues_with_equal_bits(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tiny) == 0
    whole = Path("runs/photos/version_0")
    shutil.move("runs", "whole")
    run = forked.start(Path.cwd(), tiny, prepare=kill_in_the_third_population)
    assert run.wait(120) == -signal.SIGKILL
    assert not (whole / "sweep.csv").exists()
    capsys.readouterr()
    assert main(tiny) == 0
    assert "Sweep: continues runs/photos/version_0, where 4 groups of heads are done" in capsys.readouterr().out
    for name in ("sweep.csv", "sweep.json", "winner.yaml"):
        assert (whole / name).read_bytes() == ("whole" / whole.relative_to("runs") / name).read_bytes(), name
    states = [
        read_checkpoint(folder / "photos/version_1/checkpoints/last.ckpt")["state_dict"]
        for folder in (Path("whole"), Path("runs"))
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    ("rule", "accuracies", "chosen"),
    [
        ("simplest", (0.90, 0.88), 1),  # a standard error of 3 points
        ("simplest", (0.90, 0.80), 0),
        ("highest", (0.90, 0.88), 0),
    ],
)
def test_rules_of_the_choice(rule: Rule, accuracies: tuple[float, float], chosen: int) -> None:
    rates = (0.1, None)
    trials = [
        Trial(HeadSettings(LINEAR, "last", lr, None, 0.0), 0, accuracy, 0.3, 100, 100)
        for lr, accuracy in zip(rates, accuracies, strict=True)
    ]
    assert choose(trials, rule) is trials[chosen]


def test_report_names_the_held_out_images_and_their_precision(capsys: pytest.CaptureFixture[str]) -> None:
    settings, weights = HeadSettings(LINEAR, "last", 0.1, 0.0, 0.0), torch.tensor([1.0] * 50 + [3.0] * 50).double()
    trials = [
        best_epoch(settings, torch.tensor([[[accuracy, 0.3]]], dtype=torch.float64), weights)
        for accuracy in (0.9, 0.88, 0.86)
    ]
    report(trials, trials[0], 1.0)
    output = " ".join(capsys.readouterr().out.split())
    assert (
        "scored on 100 held-out images (whose weights make them as precise as 80); 1 others are within one " in output
    )
    assert "one standard error (0.0335) of the best" in output
    equal = best_epoch(settings, torch.tensor([[[1.0, 0.3]]], dtype=torch.float64), torch.ones(100).double())
    report([equal], equal, 1.0)
    output = " ".join(capsys.readouterr().out.split())
    assert "scored on 100 held-out images; 0 others are within one standard error (0.0000) of the best" in output


def test_the_winner_is_written_without_changing_the_config(tmp_path: Path) -> None:
    config = {"model": {"trainable": "head"}, "trainer": {"max_epochs": 7}}
    trial = Trial(HeadSettings(LINEAR, "last", 0.1, 0.0, 0.0), 3, 0.9, 0.3, 100, 100)
    written = yaml.safe_load(write_winner(tmp_path, config, trial).read_text())
    assert written["trainer"] == {"max_epochs": 3} and written["model"]["trainable"] == "head"
    assert config == {"model": {"trainable": "head"}, "trainer": {"max_epochs": 7}}


def test_sweep_with_other_settings_starts_anew(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (Path("runs/photos/version_0")).mkdir(parents=True)
    Path("runs/photos/version_0/sweep.json").write_text('{"identity": "another", "scores": {"x": [1]}}')
    assert main([*tiny, "--space.features", "[last]", "--folds", "1", "--epochs", "1"]) == 0
    assert "continues" not in capsys.readouterr().out
    assert len(trials(Path("runs/photos/version_1"))) == 5


def test_backbone_without_stages_is_reported(
    here: Path, photos: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    flags = [*TINY, "--epochs", "1", "--folds", "1", "--model.backbone", "timm/selecsls42"]
    assert main(["sweep", *flags, "--model.weights", "null", "--data.root", str(photos)]) == 0
    assert "Sweep: timm/selecsls42 does not provide features stages, only last" in capsys.readouterr().out
    assert {row["features"] for row in trials(Path("runs/photos/version_0"))} == {"last"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--count", "0"], "--count must be at least 1"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--folds", "6"], "--folds must be from 1 to 5"),
        (["--model.trainable", "layer4"], "Use --model.trainable head"),
        (["--data.augment", "flip"], "Remove data.augment"),
        (["--space.features", "[cls, last4]"], "does not provide features cls, last4, only last, stages. Use one"),
        (["--space.lr", "[]"], "space.lr is empty"),
        (["--space.lr", "[.nan]"], "space.lr must be more than 0 and finite"),
        (["--space.weight_decay", "[.inf]"], "space.weight_decay must be at least 0 and finite"),
        (["--space.label_smoothing", "[0, 0.0]"], "has a value twice"),
        (["--space.head", "[{class_path: project.models.heads.MLPHead, init_args: {hidden: -3}}]"], "space.head"),
        (["--trainer.accelerator", "cpu", "--trainer.devices", "2"], "--trainer.devices 1"),
        (["--features.cache", "off"], "features.cache off"),
        (["--trainer.gradient_clip_val", "1"], "trainer.gradient_clip_val"),
        (["--trainer.fast_dev_run", "true"], "trainer.fast_dev_run"),
        (["--space.head", "[project.models.heads.PrototypeHead]"], "PrototypeHead has no parameters to train"),
        (["--space.head", "[torch.nn.Bilinear]"], "space.head"),
        (["--model.class_weights", "[0, 0, 0]"], "model.class_weights is 0 for the classes of all held-out images"),
        (["--data.balance", "loss", "--model.class_weights", "[1, 1, 1]"], "exclude each other"),
        (["--model.class_weights", "[1, 1]"], "2 weights for 3 classes"),
        (["--model.classes", "[a, b]"], "are not the model's"),
        (["--trainer.precision", "bf16-true"], "would round the frozen weights"),
        (["--sampler", "random"], "sampler"),
        (["--ckpt_path", "best.ckpt"], "ckpt_path"),
    ],
)
def test_impossible_settings_are_refused(
    flags: list[str], message: str, tiny: list[str], refused: Callable[[int], str]
) -> None:
    assert message in refused(main([*tiny, *flags]))
    assert not Path("runs").exists() and not Path("store").exists()


class Branching(nn.Linear):
    """A head that decides by the values of its parameters."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward(features) if self.weight.sum() > 0 else len(features)


def test_heads_that_cannot_be_trained_together_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"space.head: Branching cannot be trained in a batch with others \(."):
        validate_head(ClassSpec.of(Branching), 8, 3, CPU)


class Unhelpful(LinearHead):
    """A head that raises an error of an unexpected class, in training only."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.training:
            raise TypeError
        return super().forward(features)


def test_heads_that_fail_in_training_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"space.head: Unhelpful cannot be trained in a batch with others \(TypeE"):
        validate_head(ClassSpec.of(Unhelpful), 8, 3, CPU)


def test_features_that_exceed_the_memory_are_refused(
    tiny: list[str], refused: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    features = 24 * 4 * FEATURES  # bytes
    flags = [*tiny, "--space.features", "[last]", "--count", "1", "--epochs", "1", "--folds", "1"]
    monkeypatch.setattr(sweep_module, "row_memory_budget", lambda device: 4 * features - 1)
    assert "24 images in memory, and the solver copies of them" in refused(main(flags))
    assert not Path("runs").exists() and not Path("store").exists()
    monkeypatch.setattr(sweep_module, "row_memory_budget", lambda device: 4 * features)
    assert main(flags) == 0


def test_sweep_changes_neither_the_space_nor_the_features_of_the_model(here: Path, photos: Path, weights: Path) -> None:
    model = ImageClassifier(BACKBONE, str(weights), image_size=32)
    data = ImageDataModule(str(photos), num_workers=0)
    space = SearchSpace(head=[LinearHead], features=["cls", "last", "stages"], lr=[0.1])
    (here / "sweep").mkdir()
    provider = RowProvider("torch", "auto", 1.0, here / "store")
    sweep_module.sweep(
        model, data, torch.device("cpu"), "32-true", provider, lambda _: here / "sweep", space, count=1, epochs=1
    )
    assert space.features == ["cls", "last", "stages"]
    assert model.backbone.features == "last" and model.backbone.feature_dim == FEATURES
    model(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("balance", ["sampler", "loss"])
def test_imbalanced_classes_count_equally(
    balance: str, tiny: list[str], album: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3, 8):
        (album / f"train/red/{number}.png").unlink()
    flags = [*tiny[:-1], str(album), "--data.balance", balance, "--space.features", "[last]", "--folds", "5"]
    assert main(flags) == 0
    output = " ".join(capsys.readouterr().out.split())
    # Weights of 19 / 24 for the images of blue and green, and of 19 / 9 for those of red.
    assert "scored on 19 held-out images (whose weights make them as precise as 15)" in output


def test_settings_that_the_space_replaces_are_reported(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model.head", "project.models.heads.MLPHead", "--trainer.max_epochs", "7", "--epochs", "1"]
    assert main([*tiny, *flags, "--rule", "simplest", "--space.features", "[last]"]) == 0
    output = capsys.readouterr().out
    assert "Sweep: the search space replaces model.head, model.head_init, trainer.max_epochs" in output
    assert "Sweep: fits the solved head on last features" in output
    assert "Epoch 0, the solved head" in output and "Epoch 1" not in output, "exactly the candidate is fitted"


def test_damaged_state_is_reported_and_replaced(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (Path("runs/photos/version_0")).mkdir(parents=True)
    Path("runs/photos/version_0/sweep.json").write_text('{"identity": ')
    assert main([*tiny, "--space.features", "[last]", "--folds", "1", "--epochs", "1"]) == 0
    assert "version_0/sweep.json is damaged and ignored" in capsys.readouterr().out


@pytest.fixture
def rows() -> LabelledRows:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    features = torch.randn(60, 8, generator=generator) + 2 * functional.one_hot(labels, 8)
    return LabelledRows({"last": features}, labels, torch.arange(60) // 3 % 4, 4, 3, None, None, torch.ones(3))


def test_scores_are_those_of_the_held_out_fold(rows: LabelledRows) -> None:
    settings = [HeadSettings(LINEAR, "last", lr, 0.0, smoothing) for lr, smoothing in [(0.1, 0.0), (0.1, 0.2)]]
    recipe = Recipe(SingleLabel(), 16, 30, 0)
    both = train_population(settings, rows, 1, recipe)
    assert both.shape == (2, 30, 2)
    assert not torch.equal(both[0], both[1])
    assert both[0, -1, 0] > both[0, 0, 0]
    wrong = rows.labels.clone()
    wrong[rows.folds == 1] = (wrong[rows.folds == 1] + 1) % 3  # they must not affect the training
    other = train_population(settings, replace(rows, labels=wrong), 1, recipe)
    assert float(other[0, -1, 0]) < 0.3 < 0.7 < float(both[0, -1, 0])


def test_class_importance_weights_the_scores(rows: LabelledRows) -> None:
    assert solve_candidate("last", rows, SingleLabel()).shape == (4, 2)
    only_one = replace(rows, importance=torch.tensor([1.0, 0.0, 0.0]))
    assert torch.equal(solve_candidate("last", only_one, SingleLabel())[:, 0], torch.ones(4, dtype=torch.float64))


def test_no_accuracy_exceeds_1() -> None:
    """The sums of correct images and of all images have the same rounding errors."""
    labels = torch.arange(3000) % 3
    features, importance = 10 * functional.one_hot(labels, 3).float(), torch.tensor([0.3, 0.7, 1.9])
    rows = LabelledRows({"last": features}, labels, torch.arange(3000) // 3 % 2, 1, 3, None, None, importance)
    settings = [HeadSettings(LINEAR, "last", 0.1, 0.0, 0.0)]
    scores = train_population(settings, rows, 0, Recipe(SingleLabel(), 500, 5, 0))
    assert float(scores[0, -1, 0]) == 1
    trial = best_epoch(settings[0], scores[:1], rows.scored_weights)
    assert choose([trial], "simplest") is trial and trial.standard_error == 0


@pytest.mark.parametrize("class_weights", [None, torch.tensor([0.5, 1.0, 3.0])], ids=["equal", "class weights"])
@pytest.mark.parametrize("sampled", [False, True], ids=["shuffled", "sampler"])
def test_each_head_is_trained_as_if_alone(
    class_weights: torch.Tensor | None, sampled: bool, rows: LabelledRows
) -> None:
    """Two label smoothings at once, with the loss, order and scores of separate heads."""
    sampling = (1 / torch.tensor([10.0, 20.0, 30.0]))[rows.labels] if sampled else None
    importance = torch.ones(3) if class_weights is None else class_weights
    rows = replace(rows, class_weights=class_weights, sampling_weights=sampling, importance=importance)
    combinations = [(0.1, 0.0, 0.0), (0.03, 0.1, 0.2), (0.01, 0.01, 0.0), (0.1, 0.1, 0.2)]
    settings = [HeadSettings(LINEAR, "last", *combination) for combination in combinations]
    recipe, features = Recipe(SingleLabel(), 16, 4, 7), rows.features["last"]
    together = train_population(settings, rows, 2, recipe)

    reseed(CPU, recipe.seed, "sweep", LINEAR.class_path, "last", 2, "initial heads")
    heads = [LinearHead(8, 3) for _ in settings]
    train, held_out = torch.nonzero(rows.folds != 2)[:, 0], torch.nonzero(rows.folds == 2)[:, 0]
    order = EpochOrder(len(train), True, recipe.seed, None if sampling is None else sampling[train], batch_size=16)
    weights = importance[rows.labels[held_out]].double()
    for (lr, decay, smoothing), head, scores in zip(combinations, heads, together, strict=True):
        groups = [{"params": [head.weight]}, {"params": [head.bias], "weight_decay": 0}]
        optimizer = torch.optim.AdamW(groups, lr, weight_decay=decay)
        for epoch in range(recipe.epochs):
            for batch in torch.split(train[order(epoch).indices], recipe.batch_size):
                optimizer.zero_grad()
                functional.cross_entropy(
                    head(features[batch]), rows.labels[batch], class_weights, label_smoothing=smoothing
                ).backward()
                optimizer.step()
            logits = head(features[held_out]).detach()
            losses = functional.cross_entropy(logits, rows.labels[held_out], reduction="none")
            correct = (logits.argmax(1) == rows.labels[held_out]).double()
            expected = torch.stack([(weights * values).sum() / weights.sum() for values in (correct, losses)])
            torch.testing.assert_close(scores[epoch], expected, rtol=1e-4, atol=1e-5)


def test_diverged_heads_are_last(rows: LabelledRows) -> None:
    settings = [HeadSettings(LINEAR, "last", lr, 0.0, 0.0) for lr in (0.1, 1e38)]
    scores = train_population(settings, rows, 0, Recipe(SingleLabel(), 16, 3, 0))
    assert scores[1, -1].tolist() == [0.0, float("inf")]
    assert scores[0, -1].isfinite().all()
