"""What sweep refuses on the command line before it reads anything."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from project.cli.main import main
from tests.conftest import SMALL, STORED


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--trainer.max_steps", "9"], "sweep does not support trainer.max_steps, which its candidates would not have"),
        (["--model.interpolate", "auto"], "sweep does not support model.interpolate"),
        (["--model.schedule", "[head, layer4]"], "sweep does not support model.schedule"),
        (["--model.ema", "0.9"], "sweep does not support model.ema"),
        (["--model.batch_norm", "train"], "sweep does not support model.batch_norm train"),
        (["--model.l2_sp", "0.1"], "sweep does not support model.l2_sp"),
        (["--trainer.max_time", "00:01:00:00"], "sweep does not support trainer.max_time"),
        (["--space.head", "[nope]"], "error: space.head: there is no class nope."),
        (["--space.head", "[MLPHead, LinaerHead]"], "there is no class LinaerHead. Did you mean 'LinearHead'"),
        (["--space.head", "[{class_path: MLPHaed}]"], "there is no class MLPHaed. Did you mean 'MLPHead'"),
        (["--space.head", "MLPHead"], "space.head: expected a list such as [a, b], not MLPHead."),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_settings_are_refused_by_name(
    flags: list[str], text: str, here: Path, photos: Path, refused: Callable[[int], str]
) -> None:
    assert text in refused(main(["sweep", "--data.root", str(photos), "--model.weights", "no/such.pth", *flags]))


def test_solved_winner_is_fitted_without_the_scheduler_of_the_flags(here: Path, photos: Path, weights: Path) -> None:
    flags = [
        *SMALL,
        *STORED,
        "--model.weights",
        str(weights),
        "--data.root",
        str(photos),
        "--count",
        "1",
        "--epochs",
        "1",
    ]
    flags += ["--space.features", "[last]", "--rule", "simplest", "--model.scheduler", "CosineAnnealingLR"]
    assert main(["sweep", *flags]) == 0
    model = yaml.safe_load(Path("runs/photos/version_0/winner.yaml").read_text())["model"]
    assert (model["head_init"], model["scheduler"]) == ("solved", None)
