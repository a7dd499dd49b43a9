"""Search spaces and samplers of a sweep."""

import dataclasses
import sys
from collections import Counter

import pytest

from project.errors import ConfigError
from project.models.heads import LinearHead
from project.studies.search_space import GridSampler, OptunaSampler, SearchSpace

SMALL = SearchSpace(head=[LinearHead], features=["last"], lr=[0.1, 0.01], weight_decay=[0.0], label_smoothing=[0.0])


def test_grid_combines_all_values() -> None:
    sampler = GridSampler(SMALL, 64, 0)
    assert sorted(settings.lr or 0 for settings in sampler.ask()) == [0.01, 0.1]
    assert sampler.ask() == []


def test_large_grid_is_sampled_with_equally_many_of_each_head_and_features() -> None:
    settings = GridSampler(SearchSpace(), 60, 0).ask()
    assert len({str(one) for one in settings}) == 60
    assert set(Counter((one.head.class_path, one.features) for one in settings).values()) == {10}
    for name in ("lr", "weight_decay", "label_smoothing"):
        counts = Counter(getattr(one, name) for one in settings).values()
        assert max(counts) - min(counts) <= 6, name
    assert GridSampler(SearchSpace(), 60, 0).ask() == settings
    assert GridSampler(SearchSpace(), 60, 1).ask() != settings


def test_optuna_learns_from_earlier_rounds() -> None:
    space = dataclasses.replace(SMALL, lr=[10.0**-n for n in range(20)])
    sampler, rounds = OptunaSampler(space, 62, 0), []
    while settings := sampler.ask():
        sampler.tell([float(one.lr == 1e-3) for one in settings])
        rounds.append([one.lr for one in settings])
    assert [len(part) for part in rounds] == [16, 16, 16, 14]
    assert rounds[-1].count(1e-3) > rounds[0].count(1e-3)


def test_missing_optuna_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match="pip install optuna"):
        OptunaSampler(SMALL, 1, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": []}, "space.lr is empty"),
        ({"lr": [0.0]}, "space.lr must be more than 0"),
        ({"lr": [0.1, 0.1]}, "space.lr has a value twice"),
        ({"weight_decay": [-1.0]}, "space.weight_decay must be at least 0"),
        ({"label_smoothing": [1.0]}, r"space.label_smoothing must be in \[0, 1\)"),
    ],
)
def test_invalid_values_are_refused(change: dict[str, list[float]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(SMALL, **change).validate()  # type: ignore[arg-type]
