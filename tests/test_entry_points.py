"""Console script of the package."""

import tomllib
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_console_script_runs_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["frozen-backbone"].partition(":")
    run = getattr(import_module(module), function)
    monkeypatch.setattr("sys.argv", ["frozen-backbone", "fit", "--no_such_flag", "1"])
    assert run() == 2
    assert "unknown flag --no_such_flag" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["frozen-backbone", "--help"])
    with pytest.raises(SystemExit) as exit_info:
        run()
    assert exit_info.value.code == 0
    assert capsys.readouterr().out.startswith("usage: python -m project VERB")
