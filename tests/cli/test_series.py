"""A series of fits: its command lines, and what it refuses."""

from typing import Any

import pytest
from jsonargparse import Namespace

from project.cli.series import Series, repetition_command
from project.errors import ConfigError


def section(**changes: Any) -> Namespace:
    values: dict[str, Any] = {"folds": 3, "seeds": 1, "seed_everything": 7, "ckpt_path": None, "data.fold": None}
    values |= {"data.split_seed": 4, "trainer.fast_dev_run": False, "trainer.limit_val_batches": None}
    result = Namespace()
    for key, value in (values | changes).items():
        result[key] = value
    return result


def test_each_seed_has_all_folds_and_splits_of_its_own() -> None:
    series = Series.of(section(seeds=2))
    assert series is not None and len(series) == 6
    given = ["fit", "--folds=3", "--data.root", "photos", "--seeds", "2"]
    repetitions = [*series.repetitions(given)]
    assert [(item.number, item.fold, item.seed) for item in repetitions] == [
        *((1, "1/3", 7), (2, "2/3", 7), (3, "3/3", 7)),
        *((4, "1/3", 8), (5, "2/3", 8), (6, "3/3", 8)),
    ]
    last = ["--seed_everything", "8", "--data.split_seed", "5", "--data.fold", "3/3"]
    assert repetitions[-1].args == ["fit", "--data.root", "photos", *last]
    command = "python -m project --allow_imports mine fit --folds=3 --data.root photos --seeds 2"
    expected = f"python -m project --allow_imports mine fit --data.root photos {' '.join(last)}"
    assert repetition_command(command, given, repetitions[-1].args) == expected


def test_seeds_without_folds_keep_the_hold_out() -> None:
    series = Series.of(section(folds=None, seeds=2))
    assert series is not None
    first, second = series.repetitions(["fit", "--seeds", "2"])
    assert first.fold is None and "--data.fold" not in second.args
    assert second.args[-4:] == ["--seed_everything", "8", "--data.split_seed", "5"]


def test_flags_of_a_config_file_are_overridden() -> None:
    series = Series.of(section())
    assert series is not None
    first = next(series.repetitions(["fit", "-c", "folds.yaml"]))
    assert first.args[:7] == ["fit", "-c", "folds.yaml", "--folds", "null", "--seeds", "1"]
    with_flag = next(series.repetitions(["fit", "--config=seeds.yaml", "--folds", "3"]))
    assert with_flag.args[:6] == ["fit", "--config=seeds.yaml", "--folds", "null", "--seeds", "1"]


def test_a_single_fit_is_no_series() -> None:
    assert Series.of(section(folds=None)) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"folds": 1}, "--folds must be at least 2, got 1"),
        ({"seeds": 0}, "--seeds must be at least 1, got 0"),
        ({"data.fold": "1/3"}, "--folds and --data.fold exclude each other"),
        ({"ckpt_path": "last"}, "--folds and --ckpt_path exclude each other"),
        ({"folds": None, "seeds": 2, "ckpt_path": "a.ckpt"}, "--seeds and --ckpt_path exclude each other"),
        ({"trainer.fast_dev_run": True}, "--trainer.fast_dev_run"),
        ({"trainer.limit_val_batches": 0}, "--trainer.limit_val_batches 0"),
        ({"seed_everything": True}, "--seed_everything without a number"),
        ({"seeds": 3, "seed_everything": 2**32 - 2}, "--seed_everything must be from 0 to 4294967295, not 4294967296"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_contradictions_are_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Series.of(section(**changes))
