"""The help of a verb fits on a page, and says where the rest is."""

import pytest

from project.cli.main import main
from project.cli.short_help import requested_help


def shown(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(args)
    assert not ended.value.code
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict", "check", "demo"])
def test_it_is_short_and_has_data_and_model_first(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = shown(capsys, verb, "--help")
    lines = said.splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 110
    places = [said.index(word) for word in ("--data.root", "--model.backbone", "--features.cache", "Trainer:")]
    assert places == sorted(places)
    assert f"usage: python -m project {verb} " in said and "max_epochs" in said and "--trainer.help" in said


def test_a_short_flag_is_enough(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, "fit", "-h") == shown(capsys, "fit", "--help")


def test_every_flag_of_ours_is_there_and_all_is_said_of_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    short, full = shown(capsys, "fit", "--help"), shown(capsys, "fit", "--model.help")
    for flag in ("backbone", "weights", "trainable", "head", "optimizer", "scheduler", "scheduler_interval", "compile"):
        assert f"--model.{flag} " in short and f"--model.{flag} " in full
    assert len(full.splitlines()) > 20 and "--data.root" not in full
    trainer = shown(capsys, "fit", "--trainer.help")
    assert "--trainer.max_epochs" in trainer and "--model.backbone" not in trainer


def test_help_on_a_class_stays_the_parsers_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert requested_help(["fit", "--model.optimizer.help", "AdamW"]) is None
    assert "weight_decay" in shown(capsys, "fit", "--model.optimizer.help", "AdamW")
