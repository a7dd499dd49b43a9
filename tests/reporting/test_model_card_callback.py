"""Each run has the card of what it has measured."""

import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from project.cli.main import main
from project.inference.predictor import load
from tests.conftest import SMALL, scalars
from tests.forked import start

Fit = Callable[..., int]


def test_a_card_says_what_the_run_has_logged_of_its_best_epoch(trained: Path) -> None:
    read = ModelCard.load(trained / "model_card.md")
    found = {each.metric_name: each.metric_value for each in read.data.eval_results}
    events = scalars(trained)
    accuracy = [event.value for event in events.Scalars("val/accuracy")]
    best = accuracy.index(max(accuracy))
    for name, tag in (("Accuracy", "val/accuracy"), ("Macro F1", "val/f1"), ("Loss", "val/loss")):
        assert found[name] == pytest.approx(events.Scalars(tag)[best].value, abs=1e-6), name
    assert f"Of the best epoch, {best + 1} of 3, on 12 validation images." in read.text
    assert "| **all** | **24** | **12** | **12** |" in read.text
    checkpoint = torch.load(trained / "checkpoints/best.ckpt", weights_only=True)
    for digits in (checkpoint["transfer"]["backbone"]["sha256"], checkpoint["transfer"]["frozen"]["sha256"]):
        assert digits in read.text
    assert checkpoint["best"]["epoch"] == best and checkpoint["best"]["images"] == 12
    assert "AdamW(lr=0.01" in read.text and "1,539 of 11,178,051 trained" in read.text
    shown = events.Tensors("model_card/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "## Limits" in shown and not shown.startswith("---")


def test_what_it_says_to_load_it_loads_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    (path,) = re.findall(r'load\("(.+?)"\)', Path("model_card.md").read_text())
    assert load(path).classes_ == ["blue", "green", "red"]


def test_data_has_the_same_fingerprint_wherever_it_lies(fit: Fit, album: Path) -> None:
    def prints(version: int) -> list[str]:
        text = Path(f"runs/album/version_{version}/model_card.md").read_text()
        return re.findall(r"SHA-256 of (?:train|val): `(\w{64})`", text)

    assert fit("--data.root", str(album)) == 0
    (album / "train/blue/0.png").rename(album / "train/blue/other.png")
    assert fit("--data.root", str(album)) == 0
    (album / "train/blue/1.png").rename(album / "train/red/other.png")
    assert fit("--data.root", str(album)) == 0
    assert len(set(prints(0))) == 2 and prints(0) == prints(1)
    assert prints(2)[0] != prints(1)[0] and prints(2)[1] == prints(1)[1]


def test_a_live_fit_says_that_its_data_was_not_hashed(fit: Fit) -> None:
    assert fit("--features.cache", "off", "--trainer.limit_val_batches", "0") == 0
    text = Path("runs/photos/version_0/model_card.md").read_text()
    assert "SHA-256: not computed" in text and "had no validation" in text and "checkpoints/last.ckpt" in text


def test_a_resumed_fit_knows_the_best_epoch_of_the_one_before(run: Path, photos: Path) -> None:
    last = run / "checkpoints/last.ckpt"
    data = ["--data.root", str(photos), "--data.num_workers", "0", "--trainer.max_epochs", "4"]
    assert main(["fit", "--ckpt_path", str(last), *data]) == 0
    before, after = (ModelCard.load(run.with_name(name) / "model_card.md") for name in ("version_0", "version_1"))
    assert [each.metric_value for each in after.data.eval_results] == [
        each.metric_value for each in before.data.eval_results
    ]
    assert "of 4, on 12" in after.text
    for part in ("### Calibration", "### Each class"):
        assert after.text.partition(part)[2].split("\n##")[0] == before.text.partition(part)[2].split("\n##")[0] != ""


HALF = {"epoch": 0, "images": 1, "metrics": {"val/accuracy": 1.0}, "calibration": torch.ones(10, 3)}


@pytest.mark.parametrize("confusion", [torch.ones(7, 7), -torch.ones(3, 3), "many"])
def test_counts_of_another_form_are_left_out(confusion: object, run: Path, photos: Path) -> None:
    last, best = (run / f"checkpoints/{name}.ckpt" for name in ("last", "best"))
    torch.save({**torch.load(best, weights_only=True), "best": {**HALF, "confusion": confusion}}, best)
    data = ["--data.root", str(photos), "--data.num_workers", "0", "--trainer.max_epochs", "4"]
    assert main(["fit", "--ckpt_path", str(last), *data]) == 0
    assert "kept no figures of each class" in (run.with_name("version_1") / "model_card.md").read_text()


@pytest.mark.parametrize("kept", [None, [], {"epoch": 0}, {"epoch": 0, "images": 1, "metrics": {"val/f1": "much"}}])
def test_what_a_checkpoint_says_in_another_form_is_not_believed(kept: object, run: Path, photos: Path) -> None:
    last, best = (run / f"checkpoints/{name}.ckpt" for name in ("last", "best"))
    torch.save({**torch.load(best, weights_only=True), "best": kept}, best)
    data = ["--data.root", str(photos), "--data.num_workers", "0", "--trainer.max_epochs", "4"]
    assert main(["fit", "--ckpt_path", str(last), *data]) == 0
    read = ModelCard.load(run.with_name("version_1") / "model_card.md")
    assert "kept no figures of each class" in read.text
    assert [(each.metric_type, each.metric_value) for each in read.data.eval_results] == [("accuracy", 1.0)]


def test_an_interrupted_fit_has_its_card(here: Path, photos: Path, weights: Path) -> None:
    flags = [*SMALL, "--model.weights", str(weights), "--data.root", str(photos), "--trainer.max_epochs", "9"]
    stopped = start(here, ["fit", *flags], {"step": 2, "number": signal.SIGTERM})
    assert stopped.wait() == 143, stopped.said
    text = (here / "runs/photos/version_0/model_card.md").read_text()
    assert "interrupted in epoch 3, 2 steps" in text or "interrupted in epoch 3, 3 steps" in text
    assert "taken before training" in text


def test_a_fit_that_ended_before_its_first_validation_says_so(fit: Fit) -> None:
    assert fit("--data.batch_size", "4", "--trainer.max_steps", "1") == 0
    text = Path("runs/photos/version_0/model_card.md").read_text()
    assert "None: it ended before its first validation was over." in text
