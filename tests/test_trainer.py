"""Trainer: Lightning's Trainer with this project's callbacks and checkpoint I/O."""

import inspect
from pathlib import Path

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import RichProgressBar, Timer

from project import ImageClassifier
from project.callbacks.answer_calibration import AnswerCalibration
from project.callbacks.exact_resume import ExactResume
from project.callbacks.interpolation import Interpolation
from project.callbacks.progress_bar import FitProgressBar
from project.callbacks.solved_head import SolvedHead
from project.callbacks.staged_unfreezing import StagedUnfreezing
from project.checkpoints.io import AtomicCheckpointIO
from project.data.datamodule import ImageDataModule
from project.trainer import Trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*isinstance.treespec.*")


@pytest.fixture
def options(tmp_path: Path) -> dict[str, object]:
    """Arguments of a trainer that writes nothing."""
    return {
        **{"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False},
        **{"enable_model_summary": False, "default_root_dir": tmp_path},
    }


def test_predict_returns_the_same_as_lightning(run: Path, photos: Path, options: dict[str, object]) -> None:
    model = ImageClassifier.load_from_checkpoint(run / "checkpoints" / "best.ckpt")
    data = ImageDataModule(predict=str(photos / "test"), num_workers=0, batch_size=5)
    trainer = Trainer(**options, enable_progress_bar=False)
    predictions = trainer.predict(model, datamodule=data)
    assert predictions is not None
    assert [len(paths) for paths, _ in predictions] == [5, 5, 2]
    assert [tuple(probabilities.shape) for _, probabilities in predictions] == [(5, 3), (5, 3), (2, 3)]
    assert trainer.predict(model, datamodule=data, return_predictions=False) is None


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_methods_have_the_signatures_of_lightning(verb: str) -> None:
    assert inspect.signature(getattr(Trainer, verb)) == inspect.signature(getattr(pl.Trainer, verb))
    assert not hasattr(Trainer, "check")
    assert not hasattr(Trainer, "demo")


def test_trainer_adds_its_callbacks_to_the_users(options: dict[str, object]) -> None:
    user_callbacks = [Timer(), pl.Callback()]
    trainer = Trainer(**options, callbacks=user_callbacks)
    types = [type(callback) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    assert types == [
        ExactResume,
        StagedUnfreezing,
        Timer,
        pl.Callback,
        FitProgressBar,
        Interpolation,
        AnswerCalibration,
        SolvedHead,
    ]
    assert len(user_callbacks) == 2, "the caller's list is unchanged"
    assert isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO)


def test_progress_bar_can_be_disabled_or_replaced(options: dict[str, object]) -> None:
    assert Trainer(**options, enable_progress_bar=False).progress_bar_callback is None
    custom_bar = RichProgressBar()
    assert Trainer(**options, callbacks=custom_bar).progress_bar_callback is custom_bar


def test_barebones_trainer_has_no_progress_bar() -> None:
    assert Trainer(barebones=True, accelerator="cpu").progress_bar_callback is None
