"""Help of the verbs: short with --help, in full with --GROUP.help."""

import pytest

from project.cli.main import main
from project.cli.short_help import requested_help


def help_output(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as exit_info:
        main(args)
    assert not exit_info.value.code
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def _narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict", "check", "demo"])
def test_help_is_short_and_lists_data_and_model_first(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_output(capsys, verb, "--help")
    lines = text.splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 110
    positions = [text.index(name) for name in ("--data.root", "--model.backbone", "--features.cache", "Trainer:")]
    assert positions == sorted(positions)
    assert f"usage: python -m project {verb} " in text and "max_epochs" in text and "--trainer.help" in text


def test_short_help_flag_equals_the_long_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert help_output(capsys, "fit", "-h") == help_output(capsys, "fit", "--help")


def test_help_lists_every_flag_and_group_help_describes_one_group(capsys: pytest.CaptureFixture[str]) -> None:
    short, full = help_output(capsys, "fit", "--help"), help_output(capsys, "fit", "--model.help")
    for flag in ("backbone", "weights", "trainable", "head", "optimizer", "scheduler", "scheduler_interval", "compile"):
        assert f"--model.{flag} " in short and f"--model.{flag} " in full
    assert len(full.splitlines()) > 20 and "--data.root" not in full
    trainer = help_output(capsys, "fit", "--trainer.help")
    assert "--trainer.max_epochs" in trainer and "--model.backbone" not in trainer


def test_class_help_is_left_to_the_parser(capsys: pytest.CaptureFixture[str]) -> None:
    assert requested_help(["fit", "--model.optimizer.help", "AdamW"]) is None
    assert "weight_decay" in help_output(capsys, "fit", "--model.optimizer.help", "AdamW")
