"""Run folders: what a fit leaves that ends before it starts."""

from collections.abc import Callable
from pathlib import Path

Fit = Callable[..., int]


def test_trainer_that_cannot_be_created_leaves_no_folder(fit: Fit) -> None:
    assert fit("--trainer.devices", "0") == 2
    assert not any(Path("runs").rglob("*"))


def test_earlier_runs_stay(fit: Fit) -> None:
    earlier = Path("runs/photos/version_0/notes.txt")
    earlier.parent.mkdir(parents=True)
    earlier.write_text("accurate")
    assert fit("--trainer.devices", "0") == 2
    assert [path for path in Path("runs").rglob("*") if path.is_file()] == [earlier]
    assert [path.name for path in Path("runs/photos").iterdir()] == ["version_0"]
