"""Dashboards of real fits: equal with stored and live features, in any logger, cheap, and never fatal to a fit."""

import json
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from tensorboard.util.tensor_util import make_ndarray

from project import ImageClassifier
from project.data.sources.base import Sample, Source
from project.evaluation import plots
from project.evaluation.confusion import ImagePredictions
from project.evaluation.predictions import PredictionCollector, ValidationPredictions
from project.reporting import figures
from project.reporting.dashboard import Dashboard
from project.reporting.figure_logger import FigureLogger
from project.reporting.thumbnails import Thumbnails
from project.runtime import logger_adapters
from project.runtime.logger_adapters import EmbeddingPoints
from tests.conftest import COLOURS, FIGURES, SMALL, scalars
from tests.forked import run_ranks, start

Fit = Callable[..., int]
RUN = Path("runs/photos/version_0")
IMAGE_TAGS = {
    *("train/input", "val/confusion_shares", "val/confusion_counts", "val/each_class", "val/reliability"),
    *("val/mistakes_most_confident", "val/least_confident"),
}


@pytest.fixture
def fit(fit: Fit) -> Fit:
    """Runs a small fit with figures on its dashboard."""
    return lambda *flags: fit(*FIGURES, *flags)


def tags(run: Path) -> dict[str, set[str]]:
    return {kind: set(names) for kind, names in scalars(run).Tags().items() if isinstance(names, list)}


def positives(run: Path) -> dict[str, int]:
    """Number of positives in the precision-recall curve of each class."""
    events = scalars(run)
    curves = {name: events.Tensors(f"pr/{name}")[-1].tensor_proto for name in COLOURS}
    return {name: int(make_ndarray(curve)[0, 0]) for name, curve in curves.items()}


def random_predictions(classes: int, images: int, points: int = 0, width: int = 64) -> ValidationPredictions:
    generator = torch.Generator().manual_seed(0)
    collector = PredictionCollector(images, points, classes)
    features = torch.rand(images, width, generator=generator)
    probabilities = torch.rand(images, classes, generator=generator).softmax(1)
    collector.update(probabilities, features)
    labels = torch.randint(0, classes, (images,), generator=generator)
    return collector.compute(ImagePredictions(*probabilities.max(1), labels, labels >= 0))


class Noise(Source):
    """Incompressible images."""

    name = "noise"
    splits = {"val": [Sample(str(number), 0) for number in range(500)]}  # noqa: RUF012

    def content(self, sample: Sample) -> bytes:
        return sample.name.encode()

    def decode(self, content: bytes, sample: Sample, min_size: int = 0) -> Image.Image:
        noise = np.random.default_rng(int(sample.name)).integers(0, 256, (120, 160, 3), dtype=np.uint8)
        return Image.fromarray(noise)


@pytest.mark.parametrize("trainable", ["head", "layer4"])
def test_live_and_stored_training_log_the_same_dashboard(fit: Fit, trainable: str) -> None:
    flags = ["--model.trainable", trainable, "--data.augment", "flip", "--trainer.max_epochs", "2"]
    for cache in ("on", "off"):
        assert fit("--features.cache", cache, "--features.folder", "store", *flags) == 0
    stored, live = tags(RUN), tags(RUN.with_name("version_1"))
    assert stored["images"] - {"val/mistakes_most_confident"} == IMAGE_TAGS - {"val/mistakes_most_confident"}
    only_stored = {"features/rows_reused", "features/rows_computed", "features/text_summary"}
    for kind in ("scalars", "images", "tensors"):
        assert stored[kind] - only_stored == live[kind], kind
    for run in (RUN, RUN.with_name("version_1")):
        assert positives(run) == dict.fromkeys(COLOURS, 4)
        values = np.loadtxt(next(run.glob("projector/*/tensors.tsv")))
        assert values.shape == (12, 12) and np.isfinite(values).all()


def test_without_figures_only_scalars_and_texts_are_logged(fit: Fit) -> None:
    assert fit("--dashboard.figures", "false") == 0
    logged = tags(RUN)
    assert not logged["images"] and not list(RUN.glob("projector*"))
    assert {"result/best_accuracy", "train/images_per_second"} <= logged["scalars"]
    assert {"config/text_summary", "data/text_summary"} <= logged["tensors"]


def test_zero_points_disable_the_projector(fit: Fit) -> None:
    assert fit("--dashboard.points", "0") == 0
    assert "val/reliability" in tags(RUN)["images"] and not list(RUN.glob("projector*"))


def test_negative_number_of_points_is_refused(fit: Fit, refused: Callable[[int], str]) -> None:
    assert "dashboard.points must be at least 0" in refused(fit("--dashboard.points", "-1"))


VALIDATION_TAGS = {
    "val/confusion_shares",
    "val/confusion_counts",
    "val/each_class",
    "val/reliability",
    "val/least_confident",
}


@pytest.mark.parametrize(
    ("flags", "validations", "images"),
    [
        (["--trainer.limit_val_batches", "0"], 0, {"train/input"}),
        (["--trainer.limit_val_batches", "1"], 1, {"train/input", *VALIDATION_TAGS}),
        (["--trainer.val_check_interval", "0.5", "--data.batch_size", "4"], 2, {"train/input", *VALIDATION_TAGS}),
        (["--trainer.overfit_batches", "1"], 1, {"train/input", *VALIDATION_TAGS}),
        (["--data.mixup", "0.2"], 1, {"train/input", *VALIDATION_TAGS}),
        (["--model.trainable", "all"], 1, {"train/input", *VALIDATION_TAGS}),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_unusual_fits_log_what_is_available(fit: Fit, flags: list[str], validations: int, images: set[str]) -> None:
    assert fit(*flags, "--trainer.max_epochs", "1") == 0  # pytest turns warnings into errors
    logged = tags(RUN)
    assert logged["images"] - {"val/mistakes_most_confident"} == images
    assert {"train/loss", "train/images_per_second", "result/seconds"} <= logged["scalars"]
    assert len(scalars(RUN).Scalars("val/accuracy") if "val/accuracy" in logged["scalars"] else []) == validations
    assert ("result/best_accuracy" in logged["scalars"]) == bool(list(RUN.glob("projector/*"))) == bool(validations)


@pytest.mark.parametrize("flag", ["--trainer.logger=false", "--trainer.fast_dev_run=true"])
def test_without_a_logger_nothing_is_logged(fit: Fit, here: Path, flag: str) -> None:
    assert fit(flag) == 0
    assert not list(here.rglob("events*")) and not list(here.rglob("projector*"))


def test_throughput_excludes_setup_and_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, logged = [100.0], dict[str, float]()
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    dashboard, trainer, module = (
        Dashboard(figures=False),
        pl.Trainer(logger=False, barebones=True),
        pl.LightningModule(),
    )
    monkeypatch.setattr(module, "log_dict", logged.update)
    clock[0] += 50  # setup
    dashboard.on_train_start(trainer, module)  # starts the timer: a resumed epoch has no on_train_epoch_start
    for batch_idx in range(3):
        clock[0] += 2
        dashboard.on_train_batch_end(trainer, module, None, [torch.zeros(8)], batch_idx)
    dashboard.on_validation_start(trainer, module)
    clock[0] += 70
    dashboard.on_validation_end(trainer, module)
    dashboard.on_train_epoch_end(trainer, module)
    assert logged["train/images_per_second"] == dashboard.images_per_second == 3 * 8 / 6


def test_captions_of_mixed_images_name_both_classes() -> None:
    mixed = torch.tensor([[0.7, 0.0, 0.3], [0.0, 1.0, 0.0]])
    assert figures.class_captions(mixed, ["ants", "bees", "wasps"]) == ["ants 0.70\nwasps 0.30", "bees 1.00"]
    assert figures.class_captions(torch.tensor([1, 0]), ["ants", "bees"]) == ["bees", "ants"]
    long_names = [f"a {kind} with a very long name of its own" for kind in ("fly", "bee")]
    assert len(set(figures.class_captions(torch.tensor([0, 1]), long_names))) == 2


def test_failing_figure_warns_and_the_fit_continues(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("no ink")

    monkeypatch.setattr(plots, "reliability", fail)
    with pytest.warns(UserWarning, match=r"could not log val/reliability: ValueError: no ink"):
        assert fit() == 0
    assert {"val/confusion_counts", "val/least_confident"} <= tags(RUN)["images"], "other figures are logged"


def test_deleted_image_warns_and_the_fit_continues(fit: Fit, album: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def remove(self: ImageClassifier) -> None:
        (album / "val/red/0.png").unlink(missing_ok=True)

    monkeypatch.setattr(ImageClassifier, "on_train_epoch_start", remove)
    with pytest.warns(UserWarning, match=r"1 images cannot be read and are grey: .*val/red/0\.png"):
        assert fit("--data.root", str(album)) == 0
    assert tags(Path("runs/album/version_0"))["images"] >= {"val/confusion_counts", "val/least_confident"}
    assert len(next(Path("runs/album/version_0").glob("projector/*/metadata.tsv")).read_text().splitlines()) == 13


def test_figures_stay_within_the_time_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    figure_logger = FigureLogger(None, None)  # type: ignore[arg-type]
    drawn = []
    for epoch in range(1, 1001):
        clock[0] += 10
        if figure_logger.has_budget(epoch):
            drawn.append(epoch)
            with figure_logger.attempt("figures"):
                clock[0] += 2
            figure_logger._cost, figure_logger._drawn_at_epoch = 2.0, epoch
    assert drawn[:4] == [2, 8, 12, 18] and len(drawn) <= 18
    assert 2 * len(drawn) <= 0.05 * clock[0]


def test_figures_of_100_classes_and_the_projector_are_small(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, "", "")
    thumbnails, names = Thumbnails(Noise(), Noise.splits["val"]), [f"class {number}" for number in range(100)]
    predictions = random_predictions(100, 500, points=500)
    for name, draw in figures.validation_figures(predictions, names, thumbnails).items():
        logger_adapters.add_image(logger, name, draw(), 0)
    for name, curve in figures.precision_recall_curves(predictions, names).items():
        logger_adapters.add_pr_curve(logger, name, *curve, 0)
    logger.save()
    assert sum(path.stat().st_size for path in tmp_path.rglob("events*")) < 1_200_000
    logger_adapters.add_embedding(logger, "projector", figures.embedding_points(predictions, names, thumbnails), 0)
    assert sum(path.stat().st_size for path in tmp_path.rglob("projector/*/*")) < 3_000_000
    logger.finalize("success")


def test_projector_reads_images_within_its_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "SPRITE_SECONDS", 0.01)
    thumbnails = Thumbnails(Noise(), Noise.splits["val"])
    points = figures.embedding_points(random_predictions(3, 500, points=500), ["a", "b", "c"], thumbnails)
    assert points.thumbnails is not None
    assert 0 < len(points.thumbnails) == len(points.values) == len(points.metadata) < 500


def test_principal_components_preserve_distances() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(40, 6, generator=generator) @ torch.rand(6, 300, generator=generator)
    reduced, exact = (torch.pdist(points) for points in (figures.principal_components(features), features.double()))
    ratio = reduced / exact
    assert float(ratio.max() / ratio.min()) == pytest.approx(1, abs=1e-3)
    assert torch.isfinite(figures.principal_components(torch.ones(5, 8))).all(), "identical features too"


def test_csv_logger_gets_images_and_texts_as_files(fit: Fit) -> None:
    assert fit("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs") == 0
    folder = Path("logs/lightning_logs/version_0")
    images = {path.relative_to(folder / "figures").with_suffix("").as_posix() for path in folder.rglob("*.png")}
    assert images - {"val/mistakes_most_confident"} == IMAGE_TAGS - {"val/mistakes_most_confident"}
    assert "| blue | 8 | 4 | 4 |" in (folder / "texts/data.md").read_text()
    assert "result/best_accuracy" in (folder / "metrics.csv").read_text().splitlines()[0]
    assert (folder / "model_card.md").read_text().startswith("---\nlibrary_name: "), "the complete card, with header"
    assert (folder / "texts/model_card.md").is_file()


class Client:
    """Records the calls to MLflow's client and W&B's logger."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def log_image(self, *arguments: Any, **keywords: Any) -> None:
        self.calls.append((*arguments, *keywords.values()))

    log_text = log_image


def test_mlflow_and_wandb_adapters_call_the_documented_methods() -> None:
    picture, client = Image.new("RGB", (3, 3)), Client()

    class MLFlow(MLFlowLogger):
        def __init__(self) -> None:
            pass

        experiment, run_id = client, "7"  # type: ignore[assignment]

    class Wandb(WandbLogger):
        def __init__(self) -> None:
            pass

        log_image, log_text = client.log_image, client.log_text  # type: ignore[assignment]

    for logger in (MLFlow(), Wandb()):
        logger_adapters.add_image(logger, "val/a", picture, 5)
        logger_adapters.add_text(logger, "data", "words", 5)
        logger_adapters.add_embedding(
            logger, "projector", EmbeddingPoints(np.zeros((1, 1)), [], [[]], None), 5
        )  # not supported by either
    assert client.calls == [
        ("7", picture, "figures/val/a.png"),
        ("7", "words", "data.md"),
        ("val/a", [picture], 5),
        ("data", ["text"], [["words"]], 5),
    ]


def test_mlflow_logs_figures_and_texts(fit: Fit, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert fit("--trainer.logger", "MLFlowLogger", "--trainer.logger.tracking_uri", f"file:{here}/mlruns") == 0
    names = {path.name for path in Path("mlruns").rglob("*/artifacts/figures/**/*.png")}
    assert "reliability.png" in names and list(Path("mlruns").rglob("artifacts/data.md"))


def test_wandb_logs_figures_and_texts(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert fit("--trainer.logger", "WandbLogger", "--trainer.logger.save_dir", "logs") == 0
    assert list(Path("logs").rglob("media/images/val/reliability*.png"))
    (table,) = Path("logs").rglob("media/table/data_*.json")
    assert "blue" in json.loads(table.read_text())["data"][0][0]


@pytest.mark.parametrize("cache", ["on", "off"])
def test_two_ranks_log_one_dashboard_of_all_images(cache: str, album: Path, weights: Path) -> None:
    (album / "val/red/3.png").unlink()  # an odd number, so one rank has padding
    flags = [*SMALL, *FIGURES, "--model.weights", str(weights), "--data.root", "album", "--data.batch_size", "5"]
    flags += ["--features.cache", cache, "--trainer.max_epochs", "1"]
    flags += ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    for code, output in run_ranks(Path().resolve(), ["fit", *flags]):
        assert code == 0 and "Dashboard: could not log" not in output, output
    run = Path("runs/album/version_0")
    assert {"val/reliability", "val/least_confident", "train/input"} <= tags(run)["images"]
    assert positives(run) == {"blue": 4, "green": 4, "red": 3}, "each image once"
    assert len(next(run.glob("projector/*/metadata.tsv")).read_text().splitlines()) == 12


def test_resumed_fit_that_improves_logs_figures(fit: Fit) -> None:
    assert fit("--model.optimizer.lr", "0") == 0
    faster = ["--model.optimizer", "AdamW", "--model.optimizer.lr", "0.01", "--trainer.max_epochs", "8"]
    assert fit("--ckpt_path", "last", *faster) == 0
    first, second = scalars(RUN), scalars(RUN.with_name("version_1"))
    before, after = (max(event.value for event in run.Scalars("val/accuracy")) for run in (first, second))
    assert after > before, "a precondition of this test"
    assert "val/reliability" in tags(RUN.with_name("version_1"))["images"]


def test_resumed_fit_without_improvement_logs_no_figures(run: Path, fit: Fit) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert fit("--ckpt_path", str(run / "checkpoints/last.ckpt"), "--trainer.max_epochs", "5") == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert "val/reliability" in tags(run)["images"]
    assert "val/reliability" not in tags(run.with_name("version_1"))["images"]
    (best,) = scalars(run.with_name("version_1")).Scalars("result/best_accuracy")
    assert best.value >= max(event.value for event in scalars(run).Scalars("val/accuracy")), "including the earlier run"


def test_interrupted_fit_and_fit_without_validation_log_a_result(
    fit: Fit, here: Path, photos: Path, weights: Path
) -> None:
    assert fit("--trainer.limit_val_batches", "0") == 0
    assert {"result/last_train_loss", "result/seconds"} <= tags(RUN)["scalars"]
    flags = [*SMALL, *FIGURES, "--model.weights", str(weights), "--data.root", str(photos), "--trainer.max_epochs", "9"]
    stopped = start(here, ["fit", *flags], {"step": 3, "number": signal.SIGTERM})
    assert stopped.wait() == 143, stopped.output
    assert {"result/best_accuracy", "result/seconds"} <= tags(RUN.with_name("version_1"))["scalars"]


def test_many_classes_have_no_confusion_matrix() -> None:
    names = [f"class {number}" for number in range(figures.MAX_MATRIX_CLASSES + 1)]
    drawings = figures.validation_figures(random_predictions(len(names), 2000), names, None)
    assert set(drawings) == {"val/each_class", "val/reliability"}
    assert all(draw().size for draw in drawings.values())


def test_failing_text_warns_and_the_fit_continues(
    fit: Fit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(logger_adapters, "add_text", fails)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert fit() == 0
    messages = [str(warning.message) for warning in caught]
    assert "TensorBoardLogger could not log model_card: OSError: No space left on device" in messages
    assert (RUN / "model_card.md").is_file() and "To load it" in capsys.readouterr().out
