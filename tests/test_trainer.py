"""The trainer is Lightning's, with this project's callbacks and checkpoints."""

import inspect
from pathlib import Path

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import RichProgressBar, Timer

from project import ImageClassifier
from project.callbacks.exact_resume import ExactResume
from project.callbacks.progress_bar import Progress
from project.checkpoints.io import AtomicCheckpointIO
from project.data.datamodule import ImageDataModule
from project.trainer import Trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*isinstance.treespec.*")


@pytest.fixture
def options(tmp_path: Path) -> dict[str, object]:
    return {
        **{"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False},
        **{"enable_model_summary": False, "default_root_dir": tmp_path},
    }


def test_predict_returns_what_lightnings_does(run: Path, photos: Path, options: dict[str, object]) -> None:
    model = ImageClassifier.load_from_checkpoint(run / "checkpoints" / "best.ckpt")
    data = ImageDataModule(predict=str(photos / "test"), num_workers=0, batch_size=5)
    trainer = Trainer(**options, enable_progress_bar=False)
    found = trainer.predict(model, datamodule=data)
    assert found is not None
    assert [len(paths) for paths, _ in found] == [5, 5, 2]
    assert [tuple(probabilities.shape) for _, probabilities in found] == [(5, 3), (5, 3), (2, 3)]
    assert trainer.predict(model, datamodule=data, return_predictions=False) is None


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_methods_are_lightnings(verb: str) -> None:
    assert inspect.signature(getattr(Trainer, verb)) == inspect.signature(getattr(pl.Trainer, verb))
    assert not hasattr(Trainer, "check")
    assert not hasattr(Trainer, "demo")


def test_callbacks_are_those_passed_in_and_its_own(options: dict[str, object]) -> None:
    given = [Timer(), pl.Callback()]
    trainer = Trainer(**options, callbacks=given)
    assert [type(each) for each in trainer.callbacks] == [ExactResume, Timer, pl.Callback, Progress]  # type: ignore[attr-defined]
    assert len(given) == 2, "the caller's list is left alone"
    assert isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO)


def test_a_progress_bar_can_be_left_out_or_chosen(options: dict[str, object]) -> None:
    assert Trainer(**options, enable_progress_bar=False).progress_bar_callback is None
    chosen = RichProgressBar()
    assert Trainer(**options, callbacks=chosen).progress_bar_callback is chosen


def test_a_barebones_trainer_has_no_progress_bar() -> None:
    assert Trainer(barebones=True, accelerator="cpu").progress_bar_callback is None
