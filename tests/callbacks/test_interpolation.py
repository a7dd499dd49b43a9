"""Weights between the start and the best epoch of a fit are validated, and the best are kept."""

import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from project import load
from project.callbacks import interpolation
from project.callbacks.interpolation import ALPHAS, Curve, interpolate
from project.cli.main import main
from project.models.loading import load_backbone
from tests.conftest import BACKBONE, FIGURES, SMALL, SOLVED, STORED, scalars
from tests.forked import run_ranks, start
from tests.integration.test_fine_tuning import SPOILED

Fit = Callable[..., int]
VERSION = Path("runs/photos/version_0")
STEPS = ["--model.optimizer", "AdamW", "--model.optimizer.lr", "0.003", "--data.batch_size", "8"]
AUTO = [*STORED, "--model.trainable", "layer4", "--model.interpolate", "auto", "--trainer.max_epochs", "2", *STEPS]


@pytest.fixture
def curves(monkeypatch: pytest.MonkeyPatch) -> list[Curve]:
    """Curves of the fits in this process."""
    found: list[Curve] = []
    report = interpolation._report
    monkeypatch.setattr(
        interpolation, "_report", lambda trainer, curve: (found.append(curve), report(trainer, curve))[1]
    )
    return found


def checkpoint(name: str = "best", version: Path = VERSION) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(version / f"checkpoints/{name}.ckpt", weights_only=True)
    return state


def start_of(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of the start that a checkpoint contains."""
    (key,) = (key for key in state["callbacks"] if key.startswith("Interpolation"))
    start: dict[str, torch.Tensor] = state["callbacks"][key]["start"]
    return start


def table(version: Path = VERSION) -> str:
    text: str = scalars(version).Tensors("interpolation/text_summary")[0].tensor_proto.string_val[0].decode()
    return text


def prefer(monkeypatch: pytest.MonkeyPatch, alpha: float) -> None:
    """Let the fit choose an alpha, whatever its accuracy."""
    monkeypatch.setattr(interpolation, "_quality", lambda evaluation: (0.0, -abs(evaluation.interpolated - alpha)))


def test_the_ends_are_epoch_0_and_the_best_epoch(
    fit: Fit, curves: list[Curve], capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(*AUTO, *SOLVED, *FIGURES) == 0
    events, (curve,) = scalars(VERSION), curves
    best = checkpoint("best_epoch" if (VERSION / "checkpoints/best_epoch.ckpt").exists() else "best")["best"]["epoch"]
    places = {0: 0, -1: best + 1 if best >= 0 else -1}  # of the logged values
    for end, place in places.items():
        for name in ("val/accuracy", "val/loss", "val/f1", "drift/cka"):
            value = curve.evaluations[end].metrics[name]
            assert value == pytest.approx(events.Scalars(name)[place].value, rel=1e-5), (end, name)
    qualities = [(item.metrics["val/accuracy"], -item.metrics["val/loss"]) for item in curve.evaluations]
    assert [item.interpolated for item in curve.evaluations] == [*ALPHAS]
    assert curve.evaluations.index(curve.chosen) == qualities.index(max(qualities))
    assert events.Images("interpolation")
    assert table().count("chosen") == 1
    output = capsys.readouterr().out
    assert f"Interpolation: alpha {curve.chosen.interpolated} between the start (0) and epoch" in output
    assert "run the backbone" not in output
    assert f"from {3 + len(ALPHAS)} validations, so it is optimistic" in output
    assert len(events.Scalars("val/accuracy")) == 3, "interpolated weights are not logged as epochs"


def test_the_chosen_weights_are_those_of_best_ckpt(
    fit: Fit, curves: list[Curve], photos: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    prefer(monkeypatch, 0.6)
    assert fit(*AUTO, *SOLVED) == 0
    best, end, last, (curve,) = checkpoint(), checkpoint("best_epoch"), checkpoint("last"), curves
    assert best["transfer"]["interpolated"] == best["best"]["interpolated"] == 0.6
    assert "interpolated" not in end["transfer"]
    own = start_of(last)
    assert own.keys() == {"head.weight", "head.bias"}, "pretrained tensors are not stored again"
    pretrained = load_backbone(BACKBONE, str(weights), 32).stages.state_dict()
    for name, value in best["state_dict"].items():
        begin = own[name] if name in own else pretrained[name.removeprefix("backbone.stages.")]
        finish = end["state_dict"][name]
        if curve.end == "epoch 2" and end["best"]["epoch"] == -1:
            finish = last["state_dict"][name]
        expected = torch.lerp(begin, finish, 0.6) if value.is_floating_point() else finish
        assert torch.equal(value, expected), name
    output = capsys.readouterr().out
    assert "weights: interpolated: alpha 0.6 between the start (0) and this epoch (1)" in output
    assert "Interpolated weights: alpha 0.6 between" in (VERSION / "model_card.md").read_text()

    accuracy = curve.chosen.metrics["val/accuracy"]
    images = sorted((photos / "val").glob("*/*"))
    predicted = load(VERSION / "checkpoints/best.ckpt").predict(images)
    assert sum(name == path.parent.name for name, path in zip(predicted, images, strict=True)) / 12 == accuracy
    path = str(VERSION / "checkpoints/best.ckpt")
    assert main(["validate", "--ckpt_path", path, "--data.root", str(photos), "--data.num_workers", "0"]) == 0
    assert f"val/accuracy: {accuracy:.4f}" in capsys.readouterr().out
    assert (
        main(["predict", "--ckpt_path", path, "--data.predict", str(photos / "test"), "--data.num_workers", "0"]) == 0
    )


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_interpolation_ends_at_the_moving_average_if_it_is_the_best(
    adapter: str, fit: Fit, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    prefer(monkeypatch, 0.6)
    flags = [*AUTO, *SPOILED, "--model.adapter", adapter, "--model.ema", "0.9"]
    assert fit(*flags) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "interpolated: alpha 0.6 between the start (0) and the moving average of this epoch (1)" in output
    assert "is not better" not in output
    assert "of the moving average of the weights" in (VERSION / "model_card.md").read_text()
    best, end, last = checkpoint(), checkpoint("best_epoch"), checkpoint("last")
    assert [item["transfer"]["weights"] for item in (best, end, last)] == ["ema", "ema", "raw"]
    assert "average" not in best
    own = start_of(last)
    for name, value in own.items():
        assert torch.equal(best["state_dict"][name], torch.lerp(value, end["state_dict"][name], 0.6)), name
    load(VERSION / "checkpoints/best.ckpt")

    resumed = []
    for name in ("best_epoch", "last"):
        path = str(VERSION / f"checkpoints/{name}.ckpt")
        assert fit(*flags, "--ckpt_path", path, "--trainer.max_epochs", "3") == 0
        resumed.append(checkpoint("last", Path(f"runs/photos/version_{1 + len(resumed)}")))
    for part in ("state_dict", "average"):
        first, second = (item[part].get("tensors", item[part]) for item in resumed)
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_no_fit_resumes_interpolated_weights_but_the_epoch_behind_them(
    fit: Fit, refused: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefer(monkeypatch, 0.3)
    assert fit(*AUTO, *SOLVED) == 0
    more = ["--trainer.max_epochs", "3"]
    message = refused(fit(*AUTO, *more, "--ckpt_path", "best"))
    assert "best.ckpt: The checkpoint has interpolated weights" in message and "best_epoch.ckpt" in message
    assert fit(*AUTO, *SOLVED, *more, "--name", "whole") == 0
    expected = {name: checkpoint(name, Path("runs/whole/version_0")) for name in ("last", "best_epoch", "best")}
    for name in ("last", "best_epoch"):
        assert fit(*AUTO, *more, "--ckpt_path", str(VERSION / f"checkpoints/{name}.ckpt"), "--name", name) == 0
        for kind, state in expected.items():
            resumed = checkpoint(kind, Path("runs", name, "version_0"))["state_dict"]
            assert all(torch.equal(value, resumed[key]) for key, value in state["state_dict"].items()), (name, kind)


def test_without_stored_features_the_log_says_what_it_costs(
    fit: Fit, curves: list[Curve], capsys: pytest.CaptureFixture[str]
) -> None:
    live = ["--features.cache", "off", "--features.engine", "auto", "--trainer.max_epochs", "1"]
    assert fit(*AUTO, *live) == 0
    output = capsys.readouterr().out
    assert re.search(r"Interpolation: 11 validations run the backbone on 12 images, about [\d.,]+ s, because", output)
    best = curves[0].evaluations[-1].metrics["val/loss"]
    assert best == pytest.approx(scalars(VERSION).Scalars("val/loss")[-1].value, rel=1e-5)


def test_if_no_epoch_is_better_the_end_is_the_last_epoch(fit: Fit, curves: list[Curve]) -> None:
    assert fit(*AUTO, *SOLVED, "--model.optimizer.lr", "1") == 0  # destroys the features
    (curve,) = curves
    best = checkpoint("best_epoch" if (VERSION / "checkpoints/best_epoch.ckpt").exists() else "best")
    assert best["best"]["epoch"] == -1 and curve.end == "epoch 2"
    first, last = (curve.evaluations[place].metrics["val/loss"] for place in (0, -1))
    events = scalars(VERSION).Scalars("val/loss")
    assert first == pytest.approx(events[0].value, rel=1e-5)
    assert last == pytest.approx(events[-1].value, rel=1e-5)
    assert curve.chosen.metrics["val/accuracy"] >= curve.evaluations[0].metrics["val/accuracy"]


def test_a_killed_and_resumed_fit_gives_the_same_curve(tmp_path: Path, photos: Path, weights: Path) -> None:
    flags = ["fit", *SMALL, *SOLVED, *AUTO, "--model.weights", str(weights), "--data.root", str(photos)]
    whole = start(tmp_path, [*flags, "--name", "whole"])
    assert whole.wait() == 0, whole.output
    killed = start(tmp_path, flags, {"step": 4})
    assert killed.wait() == -signal.SIGKILL
    resumed = start(tmp_path, [*flags, "--ckpt_path", "last"])
    assert resumed.wait() == 0, resumed.output
    versions = tmp_path / "runs/whole/version_0", tmp_path / "runs/photos/version_1"
    assert table(versions[0]) == table(versions[1])
    first, second = (checkpoint("best", version) for version in versions)
    assert first["best"]["metrics"] == second["best"]["metrics"]
    assert all(torch.equal(value, second["state_dict"][name]) for name, value in first["state_dict"].items())


def test_a_start_that_is_not_pretrained_survives_a_resume(
    fit: Fit, curves: list[Curve], album: Path, weights: Path
) -> None:
    """A fit that starts from a checkpoint with a trained stage stores this stage in its own checkpoints."""
    shutil.move(album / "train/red", album.parent / "red")
    shutil.move(album / "val/red", album.parent / "red of val")
    shutil.move(album / "test/red", album.parent / "red of test")
    assert fit(*AUTO, "--data.root", str(album), "--model.interpolate", "off") == 0
    shutil.move(album.parent / "red", album / "train/red")
    shutil.move(album.parent / "red of val", album / "val/red")
    shutil.move(album.parent / "red of test", album / "test/red")
    old = Path("runs/album/version_0/checkpoints/last.ckpt")
    warm = [*AUTO, "--data.root", str(album), "--ckpt_path"]
    assert fit(*warm, str(old), "--trainer.max_epochs", "2") == 0
    last = Path("runs/album/version_1/checkpoints/last.ckpt")
    own = start_of(checkpoint("last", last.parents[1]))
    trained = torch.load(old, weights_only=True)["state_dict"]
    name = next(key for key in trained if key.startswith("backbone.stages.layer4.") and key.endswith("conv1.weight"))
    assert torch.equal(own[name], trained[name])
    assert fit(*warm, str(last), "--trainer.max_epochs", "3") == 0
    before, after = (curve.evaluations[0].metrics for curve in curves)
    assert before == after


def test_two_processes_take_part(tmp_path: Path, photos: Path, weights: Path) -> None:
    flags = ["fit", *SMALL, *SOLVED, *AUTO, "--model.weights", str(weights), "--data.root", str(photos)]
    flags += ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "4"]
    for code, output in run_ranks(tmp_path, flags):
        assert code == 0, output
    single = start(tmp_path, [*flags, "--trainer.devices", "1", "--trainer.strategy", "auto", "--name", "single"])
    assert single.wait() == 0, single.output
    starts = [
        re.search(r"\| 0\.0 \|.*", table(tmp_path / "runs" / name / "version_0")) for name in ("photos", "single")
    ]
    assert starts[0] and starts[1] and starts[0][0] == starts[1][0]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--model.trainable", "head"], "only the head is trained"),
        (["--trainer.limit_val_batches", "0"], "no validation"),
        (["--trainer.max_epochs", "0"], "nothing is trained"),
        (["--trainer.enable_checkpointing", "false"], "no best.ckpt"),
        (["--model.interpolate", "true"], "must be off or auto"),
    ],
)
def test_interpolation_without_effect_is_refused(
    flags: list[str], reason: str, fit: Fit, refused: Callable[[int], str]
) -> None:
    message = refused(fit(*AUTO, *flags))
    assert "model.interpolate" in message and reason in message


def test_a_fit_without_its_start_cannot_be_resumed_with_interpolation(
    fit: Fit, refused: Callable[[int], str], here: Path
) -> None:
    Path("off.yaml").write_text("model:\n  interpolate: off\n")  # a boolean in YAML
    assert fit("-c", "off.yaml", *AUTO[: AUTO.index("--model.interpolate")], *STEPS) == 0
    assert checkpoint()["hyper_parameters"]["interpolate"] == "off"
    assert not (VERSION / "checkpoints/best_epoch.ckpt").exists()
    message = refused(fit(*AUTO, "--ckpt_path", "last"))
    assert "does not contain the start of its fit" in message


def test_interpolation_is_exact_at_both_ends_and_keeps_integers() -> None:
    begin = {"weight": torch.tensor([1e-8, 3.0, 0.1]), "count": torch.tensor(2)}
    end = {"weight": torch.tensor([1e8, 0.3, 0.7]), "count": torch.tensor(5)}
    assert torch.equal(interpolate(begin, end, 0.0)["weight"], begin["weight"])
    assert torch.equal(interpolate(begin, end, 1.0)["weight"], end["weight"])
    half = interpolate(begin, end, 0.5)
    assert torch.allclose(half["weight"], torch.tensor([5e7, 1.65, 0.4])) and half["count"] == 5
