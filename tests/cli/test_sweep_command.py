"""What sweep refuses on the command line before it reads anything."""

from collections.abc import Callable
from pathlib import Path

import pytest

from project.cli.main import main


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--trainer.max_steps", "9"], "sweep does not support trainer.max_steps, which its candidates would not have"),
        (["--trainer.max_time", "00:01:00:00"], "sweep does not support trainer.max_time"),
        (["--space.head", "[nope]"], "error: space.head: there is no class nope."),
        (["--space.head", "[MLPHead, LinaerHead]"], "there is no class LinaerHead. Did you mean 'LinearHead'"),
        (["--space.head", "[{class_path: MLPHaed}]"], "there is no class MLPHaed. Did you mean 'MLPHead'"),
        (["--space.head", "MLPHead"], "space.head: expected list"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_settings_are_refused_by_name(
    flags: list[str], text: str, here: Path, photos: Path, refused: Callable[[int], str]
) -> None:
    assert text in refused(main(["sweep", "--data.root", str(photos), "--model.weights", "no/such.pth", *flags]))
