"""Config files are checked, and come before the flags."""

from pathlib import Path

import pytest

from project.cli.argument_order import config_files_first
from project.cli.main import main
from project.errors import ConfigError


def test_config_files_come_after_the_verb_and_before_the_flags(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("data: {root: photos}")
    file = str(tmp_path / "a.yaml")
    assert config_files_first(["fit", "--name", "a", "-c", file]) == ["fit", "-c", file, "--name", "a"]
    assert config_files_first(["fit", "--name", "a", f"--config={file}"]) == ["fit", f"--config={file}", "--name", "a"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", " has no settings. A config has sections, such as data: {root: photos/}."),
        (b"# nothing yet\n", " has no settings."),
        (b"- a\n- b\n", " has no settings."),
        (b"data:\n  root: [a\nmodel: 1\n", ", line 3, column "),
        (b"data:\n\troot: a\n", ", line 2, column 1: invalid YAML: found character '\\t' that cannot start any token."),
        ("data: {root: Bäume}".encode("cp1252"), " is not UTF-8. Save it as UTF-8."),
        (b"data: \x00", ": invalid YAML: unacceptable character"),
    ],
    ids=["empty", "comment", "list", "bracket", "tab", "cp1252", "binary"],
)
@pytest.mark.parametrize("flag", ["-c {}", "--config={}"])
def test_config_file_that_is_not_a_mapping_is_refused_by_name(
    content: bytes, message: str, flag: str, tmp_path: Path
) -> None:
    file = tmp_path / "a.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        config_files_first(["fit", *flag.format(file).split()])
    assert str(caught.value).startswith(f"{file}{message}")


def test_message_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text("data: [a\n")
    assert main(["fit", "-c", str(tmp_path / "a.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}/a.yaml, line 2, column 1: invalid YAML")
    assert error.count("\n") == 2
