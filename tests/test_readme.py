"""What the README says of flags, files and numbers holds."""

import re
from pathlib import Path

import pytest

from project.cli.main import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
VERBS = re.findall(r"python -m project (\w+)", README)


def test_the_two_commands_are_where_ci_takes_them_from() -> None:
    for mark, words in (("train", "-m project fit -c configs/quickstart.yaml"), ("test", "-m pytest")):
        command = re.search(rf"<!-- command: {mark} -->\n```bash\n(.+)\n```", README)
        assert command and words in command[1], "each one line to paste"


def test_no_figure_is_left_to_be_filled_in() -> None:
    assert not re.findall(r"^[A-Z]{4,}$|TODO|XXX", README, re.MULTILINE)


def test_files_it_names_are_there() -> None:
    for path in re.findall(r"(?:configs|docs|notebooks)/[\w./]+\.\w+", README):
        assert (ROOT / path).is_file(), path


def test_keys_and_flags_it_names_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    known = ""
    for line in [*([verb, "--help"] for verb in sorted(set(VERBS))), ["fit", "--trainer.help"]]:
        with pytest.raises(SystemExit):
            main(line)
        known += capsys.readouterr().out
    flags = set(re.findall(r"--(?:model|data|trainer)\.[\w.]+|--(?:output|ckpt_path|debug)", README))
    keys = {f"--{key}" for key in re.findall(r"`((?:model|data)\.\w+)`", README)}
    of_a_class = ("--data.source.", "--trainer.logger.")  # arguments of the class that it names
    flags = {flag for flag in flags if not flag.startswith(of_a_class) and not flag.endswith(".help")}
    assert len(flags | keys) > 15
    for flag in flags | keys:
        assert f"{flag.rstrip('.')} " in known.replace("\n", " "), flag
