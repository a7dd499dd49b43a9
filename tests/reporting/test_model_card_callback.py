"""Each run writes a model card with its own measurements."""

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


def test_card_reports_the_logged_metrics_of_the_best_epoch(trained: Path) -> None:
    model_card = ModelCard.load(trained / "model_card.md")
    results = {result.metric_name: result.metric_value for result in model_card.data.eval_results}
    events = scalars(trained)
    accuracy = [event.value for event in events.Scalars("val/accuracy")]
    best = accuracy.index(max(accuracy))
    for name, tag in (("Accuracy", "val/accuracy"), ("Macro F1", "val/f1"), ("Loss", "val/loss")):
        assert results[name] == pytest.approx(events.Scalars(tag)[best].value, abs=1e-6), name
    assert f"Results of the best epoch ({best + 1} of 3) on 12 validation images." in model_card.text
    assert "| **All** | **24** | **12** | **12** |" in model_card.text
    checkpoint = torch.load(trained / "checkpoints/best.ckpt", weights_only=True)
    for sha256 in (checkpoint["transfer"]["backbone"]["sha256"], checkpoint["transfer"]["frozen"]["sha256"]):
        assert sha256 in model_card.text
    assert checkpoint["best"]["epoch"] == best and checkpoint["best"]["images"] == 12
    assert "AdamW(lr=0.01" in model_card.text and "291 of 372,979" in model_card.text
    logged = events.Tensors("model_card/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "## Limitations" in logged and not logged.startswith("---")


def test_code_in_the_card_loads_the_checkpoint(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    (path,) = re.findall(r'load\("(.+?)"\)', Path("model_card.md").read_text())
    assert load(path).classes_ == ["blue", "green", "red"]


def test_data_fingerprint_depends_on_content_and_labels_only(fit: Fit, album: Path) -> None:
    def fingerprints(version: int) -> list[str]:
        text = Path(f"runs/album/version_{version}/model_card.md").read_text()
        return re.findall(r"SHA-256 of (?:train|val): `(\w{64})`", text)

    assert fit("--data.root", str(album)) == 0
    (album / "train/blue/0.png").rename(album / "train/blue/other.png")
    assert fit("--data.root", str(album)) == 0
    (album / "train/blue/1.png").rename(album / "train/red/other.png")
    assert fit("--data.root", str(album)) == 0
    assert len(set(fingerprints(0))) == 2 and fingerprints(0) == fingerprints(1)
    assert fingerprints(2)[0] != fingerprints(1)[0] and fingerprints(2)[1] == fingerprints(1)[1]


def test_card_of_a_fit_without_cache_or_validation_says_so(fit: Fit) -> None:
    assert fit("--features.cache", "off", "--trainer.limit_val_batches", "0") == 0
    text = Path("runs/photos/version_0/model_card.md").read_text()
    assert "SHA-256: not computed" in text and "no validation ran" in text and "checkpoints/last.ckpt" in text


def test_resumed_fit_reports_the_best_epoch_of_the_earlier_run(run: Path, photos: Path) -> None:
    last = run / "checkpoints/last.ckpt"
    data = ["--data.root", str(photos), "--data.num_workers", "0", "--trainer.max_epochs", "4"]
    assert main(["fit", "--ckpt_path", str(last), *data]) == 0
    before, after = (ModelCard.load(run.with_name(name) / "model_card.md") for name in ("version_0", "version_1"))
    assert [result.metric_value for result in after.data.eval_results] == [
        result.metric_value for result in before.data.eval_results
    ]
    assert "of 4) on 12" in after.text
    for part in ("### Calibration", "### Per-class recall"):
        assert after.text.partition(part)[2].split("\n##")[0] == before.text.partition(part)[2].split("\n##")[0] != ""


SUMMARY = {"epoch": 0, "images": 1, "metrics": {"val/accuracy": 1.0}, "calibration": torch.ones(10, 3)}


@pytest.mark.parametrize("confusion", [torch.ones(7, 7), -torch.ones(3, 3), "many"])
def test_malformed_confusion_of_a_checkpoint_is_ignored(confusion: object, run: Path, photos: Path) -> None:
    last, best = (run / f"checkpoints/{name}.ckpt" for name in ("last", "best"))
    torch.save({**torch.load(best, weights_only=True), "best": {**SUMMARY, "confusion": confusion}}, best)
    data = ["--data.root", str(photos), "--data.num_workers", "0", "--trainer.max_epochs", "4"]
    assert main(["fit", "--ckpt_path", str(last), *data]) == 0
    assert "no per-class results" in (run.with_name("version_1") / "model_card.md").read_text()


@pytest.mark.parametrize("summary", [None, [], {"epoch": 0}, {"epoch": 0, "images": 1, "metrics": {"val/f1": "much"}}])
def test_malformed_summary_of_a_checkpoint_is_ignored(summary: object, run: Path, photos: Path) -> None:
    last, best = (run / f"checkpoints/{name}.ckpt" for name in ("last", "best"))
    torch.save({**torch.load(best, weights_only=True), "best": summary}, best)
    data = ["--data.root", str(photos), "--data.num_workers", "0", "--trainer.max_epochs", "4"]
    assert main(["fit", "--ckpt_path", str(last), *data]) == 0
    model_card = ModelCard.load(run.with_name("version_1") / "model_card.md")
    assert "no per-class results" in model_card.text
    results = [(result.metric_type, result.metric_value) for result in model_card.data.eval_results]
    assert results == [("accuracy", 1.0)]


def test_interrupted_fit_has_a_card(here: Path, photos: Path, weights: Path) -> None:
    flags = [*SMALL, "--model.weights", str(weights), "--data.root", str(photos), "--trainer.max_epochs", "9"]
    stopped = start(here, ["fit", *flags], {"step": 2, "number": signal.SIGTERM})
    assert stopped.wait() == 143, stopped.output
    text = (here / "runs/photos/version_0/model_card.md").read_text()
    assert "interrupted in epoch 3, 2 steps" in text or "interrupted in epoch 3, 3 steps" in text
    assert "(before training)" in text


def test_card_of_a_fit_that_ended_before_its_first_validation_says_so(fit: Fit) -> None:
    assert fit("--data.batch_size", "4", "--trainer.max_steps", "1") == 0
    text = Path("runs/photos/version_0/model_card.md").read_text()
    assert "Not evaluated: training ended before the first validation finished." in text
