"""Dashboards of real fits: the same from stored rows and live, in any logger, cheap, and never a fit's end."""

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
from project.runtime.logger_adapters import Points
from tests.conftest import COLOURS, FIGURES, SMALL, scalars
from tests.forked import start
from tests.integration.launched import run_all

Fit = Callable[..., int]
RUN = Path("runs/photos/version_0")
PICTURES = {
    *("train/input", "val/confusion_shares", "val/confusion_counts", "val/each_class", "val/reliability"),
    *("val/mistakes_most_confident", "val/least_confident"),
}


@pytest.fixture
def fit(fit: Fit) -> Fit:
    """Runs a small fit whose dashboard has figures."""
    return lambda *flags: fit(*FIGURES, *flags)


def tags(run: Path) -> dict[str, set[str]]:
    return {kind: set(names) for kind, names in scalars(run).Tags().items() if isinstance(names, list)}


def positives(run: Path) -> dict[str, int]:
    """Of each class, how many images its precision-recall curve is of."""
    events = scalars(run)
    curves = {name: events.Tensors(f"pr/{name}")[-1].tensor_proto for name in COLOURS}
    return {name: int(make_ndarray(curve)[0, 0]) for name, curve in curves.items()}


def outcome(classes: int, images: int, points: int = 0, width: int = 64) -> ValidationPredictions:
    generator = torch.Generator().manual_seed(0)
    collector = PredictionCollector(images, points, classes)
    features = torch.rand(images, width, generator=generator)
    probabilities = torch.rand(images, classes, generator=generator).softmax(1)
    collector.batch(probabilities, features)
    labels = torch.randint(0, classes, (images,), generator=generator)
    return collector.outcome(ImagePredictions(*probabilities.max(1), labels, labels >= 0))


class Noise(Source):
    """Images that no compression makes small."""

    name = "noise"
    splits = {"val": [Sample(str(number), 0) for number in range(500)]}  # noqa: RUF012

    def content(self, sample: Sample) -> bytes:
        return sample.name.encode()

    def decode(self, content: bytes, sample: Sample, min_size: int = 0) -> Image.Image:
        noise = np.random.default_rng(int(sample.name)).integers(0, 256, (120, 160, 3), dtype=np.uint8)
        return Image.fromarray(noise)


@pytest.mark.parametrize("trainable", ["head", "layer4"])
def test_live_and_stored_training_have_the_same_dashboards(fit: Fit, trainable: str) -> None:
    flags = ["--model.trainable", trainable, "--data.augment", "flip", "--trainer.max_epochs", "2"]
    for cache in ("on", "off"):
        assert fit("--features.cache", cache, "--features.folder", "store", *flags) == 0
    stored, live = tags(RUN), tags(RUN.with_name("version_1"))
    assert stored["images"] - {"val/mistakes_most_confident"} == PICTURES - {"val/mistakes_most_confident"}
    only_stored = {"features/rows_reused", "features/rows_computed", "features/text_summary"}
    for kind in ("scalars", "images", "tensors"):
        assert stored[kind] - only_stored == live[kind], kind
    for run in (RUN, RUN.with_name("version_1")):
        assert positives(run) == dict.fromkeys(COLOURS, 4)
        values = np.loadtxt(next(run.glob("projector/*/tensors.tsv")))
        assert values.shape == (12, 12) and np.isfinite(values).all()


def test_without_figures_there_are_numbers_and_texts(fit: Fit) -> None:
    assert fit("--dashboard.figures", "false") == 0
    found = tags(RUN)
    assert not found["images"] and not list(RUN.glob("projector*"))
    assert {"result/best_accuracy", "train/images_per_second"} <= found["scalars"]
    assert {"config/text_summary", "data/text_summary"} <= found["tensors"]


def test_no_points_no_projector(fit: Fit) -> None:
    assert fit("--dashboard.points", "0") == 0
    assert "val/reliability" in tags(RUN)["images"] and not list(RUN.glob("projector*"))


def test_a_negative_number_of_points_is_refused(fit: Fit, refused: Callable[[int], str]) -> None:
    assert "dashboard.points has to be at least 0" in refused(fit("--dashboard.points", "-1"))


DRAWN = {"val/confusion_shares", "val/confusion_counts", "val/each_class", "val/reliability", "val/least_confident"}


@pytest.mark.parametrize(
    ("flags", "validations", "images"),
    [
        (["--trainer.limit_val_batches", "0"], 0, {"train/input"}),
        (["--trainer.limit_val_batches", "1"], 1, {"train/input", *DRAWN}),
        (["--trainer.val_check_interval", "0.5", "--data.batch_size", "4"], 2, {"train/input", *DRAWN}),
        (["--trainer.overfit_batches", "1"], 1, {"train/input", *DRAWN}),
        (["--data.mixup", "0.2"], 1, {"train/input", *DRAWN}),
        (["--model.trainable", "all"], 1, {"train/input", *DRAWN}),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_fits_of_all_sorts_have_what_they_can(fit: Fit, flags: list[str], validations: int, images: set[str]) -> None:
    assert fit(*flags, "--trainer.max_epochs", "1") == 0  # any warning would be an error here
    found = tags(RUN)
    assert found["images"] - {"val/mistakes_most_confident"} == images
    assert {"train/loss", "train/images_per_second", "result/seconds"} <= found["scalars"]
    assert len(scalars(RUN).Scalars("val/accuracy") if "val/accuracy" in found["scalars"] else []) == validations
    assert ("result/best_accuracy" in found["scalars"]) == bool(list(RUN.glob("projector/*"))) == bool(validations)


@pytest.mark.parametrize("flag", ["--trainer.logger=false", "--trainer.fast_dev_run=true"])
def test_without_a_logger_nothing_is_logged(fit: Fit, here: Path, flag: str) -> None:
    assert fit(flag) == 0
    assert not list(here.rglob("events*")) and not list(here.rglob("projector*"))


def test_throughput_is_of_training_in_this_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, logged = [100.0], dict[str, float]()
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    dashboard, trainer, module = (
        Dashboard(figures=False),
        pl.Trainer(logger=False, barebones=True),
        pl.LightningModule(),
    )
    monkeypatch.setattr(module, "log_dict", logged.update)
    clock[0] += 50  # to set the fit up
    dashboard.on_train_start(trainer, module)  # within an epoch that is resumed there is no on_train_epoch_start
    for batch_idx in range(3):
        clock[0] += 2
        dashboard.on_train_batch_end(trainer, module, None, [torch.zeros(8)], batch_idx)
    dashboard.on_validation_start(trainer, module)
    clock[0] += 70
    dashboard.on_validation_end(trainer, module)
    dashboard.on_train_epoch_end(trainer, module)
    assert logged["train/images_per_second"] == dashboard.images_per_second == 3 * 8 / 6


def test_input_says_which_classes_a_mixed_image_has() -> None:
    mixed = torch.tensor([[0.7, 0.0, 0.3], [0.0, 1.0, 0.0]])
    assert figures.named(mixed, ["ants", "bees", "wasps"]) == ["ants 0.70\nwasps 0.30", "bees 1.00"]
    assert figures.named(torch.tensor([1, 0]), ["ants", "bees"]) == ["bees", "ants"]
    long = [f"a {kind} with a very long name of its own" for kind in ("fly", "bee")]
    assert len(set(figures.named(torch.tensor([0, 1]), long))) == 2


def test_a_figure_that_fails_is_told_once_and_the_fit_goes_on(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("no ink")

    monkeypatch.setattr(plots, "reliability", fail)
    with pytest.warns(UserWarning, match=r"lacks val/reliability, as that could not be logged: ValueError: no ink"):
        assert fit() == 0
    assert {"val/confusion_counts", "val/least_confident"} <= tags(RUN)["images"], "the others are there"


def test_an_image_that_has_gone_since_is_told_and_the_fit_goes_on(
    fit: Fit, album: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def remove(self: ImageClassifier) -> None:
        (album / "val/red/0.png").unlink(missing_ok=True)

    monkeypatch.setattr(ImageClassifier, "on_train_epoch_start", remove)
    with pytest.warns(UserWarning, match=r"1 images that the dashboard shows are grey: .*val/red/0\.png"):
        assert fit("--data.root", str(album)) == 0
    assert tags(Path("runs/album/version_0"))["images"] >= {"val/confusion_counts", "val/least_confident"}
    assert len(next(Path("runs/album/version_0").glob("projector/*/metadata.tsv")).read_text().splitlines()) == 13


def test_drawing_waits_for_its_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    painter = FigureLogger(None, None)  # type: ignore[arg-type]
    drawn = []
    for epoch in range(1, 1001):
        clock[0] += 10
        if painter.affords(epoch):
            drawn.append(epoch)
            with painter.attempt("figures"):
                clock[0] += 2
            painter._cost, painter._epochs = 2.0, epoch
    assert drawn[:4] == [2, 8, 12, 18] and len(drawn) <= 18
    assert 2 * len(drawn) <= 0.05 * clock[0]


def test_a_drawing_of_100_classes_is_a_megabyte_and_a_projector_three_at_most(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, "", "")
    thumbnails, names = Thumbnails(Noise(), Noise.splits["val"]), [f"class {number}" for number in range(100)]
    found = outcome(100, 500, points=500)
    for name, picture in figures.of_outcome(found, names, thumbnails).items():
        logger_adapters.image(logger, name, picture(), 0)
    for name, curve in figures.curves_of(found, names).items():
        logger_adapters.curves(logger, name, *curve, 0)
    logger.save()
    assert sum(path.stat().st_size for path in tmp_path.rglob("events*")) < 1_200_000
    logger_adapters.points(logger, "projector", figures.points_of(found, names, thumbnails), 0)
    assert sum(path.stat().st_size for path in tmp_path.rglob("projector/*/*")) < 3_000_000
    logger.finalize("success")


def test_points_are_as_many_as_there_is_time_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "SECONDS", 0.01)
    thumbnails = Thumbnails(Noise(), Noise.splits["val"])
    points = figures.points_of(outcome(3, 500, points=500), ["a", "b", "c"], thumbnails)
    assert points.thumbnails is not None
    assert 0 < len(points.thumbnails) == len(points.values) == len(points.metadata) < 500


def test_components_keep_distances() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(40, 6, generator=generator) @ torch.rand(6, 300, generator=generator)
    found, exact = (torch.pdist(points) for points in (figures.components(features), features.double()))
    ratio = found / exact
    assert float(ratio.max() / ratio.min()) == pytest.approx(1, abs=1e-3)
    assert torch.isfinite(figures.components(torch.ones(5, 8))).all(), "of images that are all alike too"


def test_a_csv_logger_has_pictures_and_texts_as_files(fit: Fit) -> None:
    assert fit("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs") == 0
    folder = Path("logs/lightning_logs/version_0")
    found = {path.relative_to(folder / "figures").with_suffix("").as_posix() for path in folder.rglob("*.png")}
    assert found - {"val/mistakes_most_confident"} == PICTURES - {"val/mistakes_most_confident"}
    assert "| blue | 8 | 4 | 4 |" in (folder / "texts/data.md").read_text()
    assert "result/best_accuracy" in (folder / "metrics.csv").read_text().splitlines()[0]
    assert (folder / "model_card.md").read_text().startswith("---\nlibrary_name: "), "the card itself, header and all"
    assert (folder / "texts/model_card.md").is_file()


class Client:
    """What MLflow's client and W&B's logger are asked to take."""

    def __init__(self) -> None:
        self.taken: list[tuple[Any, ...]] = []

    def log_image(self, *arguments: Any, **more: Any) -> None:
        self.taken.append((*arguments, *more.values()))

    log_text = log_image


def test_mlflow_and_wandb_are_asked_as_they_are_to_be_asked() -> None:
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
        logger_adapters.image(logger, "val/a", picture, 5)
        logger_adapters.text(logger, "data", "words", 5)
        logger_adapters.points(logger, "projector", Points(np.zeros((1, 1)), [], [[]], None), 5)  # neither takes any
    assert client.taken == [
        ("7", picture, "figures/val/a.png"),
        ("7", "words", "data.md"),
        ("val/a", [picture], 5),
        ("data", ["text"], [["words"]], 5),
    ]


def test_real_mlflow_takes_them(fit: Fit, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert fit("--trainer.logger", "MLFlowLogger", "--trainer.logger.tracking_uri", f"file:{here}/mlruns") == 0
    found = {path.name for path in Path("mlruns").rglob("*/artifacts/figures/**/*.png")}
    assert "reliability.png" in found and list(Path("mlruns").rglob("artifacts/data.md"))


def test_real_wandb_takes_them(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert fit("--trainer.logger", "WandbLogger", "--trainer.logger.save_dir", "logs") == 0
    assert list(Path("logs").rglob("media/images/val/reliability*.png"))
    (table,) = Path("logs").rglob("media/table/data_*.json")
    assert "blue" in json.loads(table.read_text())["data"][0][0]


@pytest.mark.parametrize("cache", ["on", "off"])
def test_two_processes_draw_once_and_of_all_images(cache: str, album: Path, weights: Path) -> None:
    (album / "val/red/3.png").unlink()  # an odd number, so one process has padding
    flags = [*SMALL, *FIGURES, "--model.weights", str(weights), "--data.root", "album", "--data.batch_size", "5"]
    flags += ["--features.cache", cache, "--trainer.max_epochs", "1"]
    flags += ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    ((code, said),) = run_all([["-m", "project", "fit", *flags]])
    assert code == 0 and "dashboard lacks" not in said, said
    run = Path("runs/album/version_0")
    assert {"val/reliability", "val/least_confident", "train/input"} <= tags(run)["images"]
    assert positives(run) == {"blue": 4, "green": 4, "red": 3}, "each image once, whichever process has had it"
    assert len(next(run.glob("projector/*/metadata.tsv")).read_text().splitlines()) == 12


def test_a_resumed_fit_that_is_better_draws_into_its_own_folder(fit: Fit) -> None:
    assert fit("--model.optimizer.lr", "0") == 0
    faster = ["--model.optimizer", "AdamW", "--model.optimizer.lr", "0.01", "--trainer.max_epochs", "8"]
    assert fit("--ckpt_path", "last", *faster) == 0
    first, second = scalars(RUN), scalars(RUN.with_name("version_1"))
    before, after = (max(event.value for event in each.Scalars("val/accuracy")) for each in (first, second))
    assert after > before, "or this test says nothing"
    assert "val/reliability" in tags(RUN.with_name("version_1"))["images"]


def test_a_resumed_fit_that_is_no_better_leaves_figures_where_they_were(run: Path, fit: Fit) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert fit("--ckpt_path", str(run / "checkpoints/last.ckpt"), "--trainer.max_epochs", "5") == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert "val/reliability" in tags(run)["images"]
    assert "val/reliability" not in tags(run.with_name("version_1"))["images"]
    (best,) = scalars(run.with_name("version_1")).Scalars("result/best_accuracy")
    assert best.value >= max(event.value for event in scalars(run).Scalars("val/accuracy")), "of the whole fit"


def test_an_interrupted_fit_and_one_without_validation_have_a_result(
    fit: Fit, here: Path, photos: Path, weights: Path
) -> None:
    assert fit("--trainer.limit_val_batches", "0") == 0
    assert {"result/last_train_loss", "result/seconds"} <= tags(RUN)["scalars"]
    flags = [*SMALL, *FIGURES, "--model.weights", str(weights), "--data.root", str(photos), "--trainer.max_epochs", "9"]
    stopped = start(here, ["fit", *flags], {"step": 3, "number": signal.SIGTERM})
    assert stopped.wait() == 143, stopped.said
    assert {"result/best_accuracy", "result/seconds"} <= tags(RUN.with_name("version_1"))["scalars"]


def test_of_a_great_many_classes_there_is_no_matrix(tmp_path: Path) -> None:
    names = [f"class {number}" for number in range(figures.MATRIX + 1)]
    pictures = figures.of_outcome(outcome(len(names), 2000), names, None)
    assert set(pictures) == {"val/each_class", "val/reliability"}
    assert all(picture().size for picture in pictures.values())


def test_a_text_that_cannot_be_logged_is_told_and_no_end_of_a_fit(
    fit: Fit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(logger_adapters, "text", fails)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert fit() == 0
    lacking = [str(each.message) for each in told if "could not be logged" in str(each.message)]
    assert "TensorBoardLogger lacks model_card, which could not be logged: OSError: No space left on device" in lacking
    assert (RUN / "model_card.md").is_file() and "Reload it" in capsys.readouterr().out
