"""The schedule of staged unfreezing, and the warm-up of its stages."""

import inspect
import re
from collections.abc import Collection
from typing import Any

import pytest
import torch
from torch import nn

from project.errors import ProjectError
from project.models.cut import Cut
from project.models.unfreezing import UnfreezingSchedule, WarmUp, scaled_rates

STAGES = ["stem", "layer1", "layer2", "layer3", "layer4"]
#: Optimizers that accept no ordinary parameters, or that schedules refuse.
OTHERS = ("Optimizer", "SparseAdam", "LBFGS")
OPTIMIZERS = [name for name in torch.optim.__all__ if name[0].isupper() and name not in OTHERS]


def arguments(name: str) -> Collection[str]:
    """Names of the arguments of an optimizer."""
    return inspect.signature(getattr(torch.optim, name)).parameters


#: Each optimizer with its default implementation and with each other one that it has.
IMPLEMENTATIONS = [
    (name, implementation)
    for name in OPTIMIZERS
    for implementation in (None, "foreach", "fused")
    if implementation is None or implementation in arguments(name)
]


def parse(entries: Any, patience: int | None = None) -> UnfreezingSchedule:
    return UnfreezingSchedule.parse(entries, patience, lambda name, setting: Cut.at(STAGES, name, "resnet18", setting))


def test_epochs_choose_the_cut() -> None:
    schedule = parse({0: "head", 3: "layer4", 6: "layer3"})
    trained = [schedule.cut_in(epoch).trainable for epoch in (0, 2, 3, 5, 6, 99)]  # type: ignore[union-attr]
    assert trained == [(), (), ("layer4",), ("layer4",), ("layer3", "layer4"), ("layer3", "layer4")]
    assert str(schedule) == "head, layer4 after 3 epochs, layer3 after 6 epochs"


def test_a_list_has_no_epochs() -> None:
    schedule = parse(["head", "layer4", "all"])
    assert schedule.patience == 2 and schedule.cut_in(5) is None
    first, second, last = schedule.cuts
    assert [schedule.after(cut) for cut in (first, second, last)] == [second, last, last]
    assert "layer4" in str(schedule) and "after 2 validations without a lower val/loss" in str(schedule)


@pytest.mark.parametrize(
    ("entries", "patience", "message"),
    [
        ({0: "head", 2: "layer9"}, None, "model.schedule: resnet18 has no stage 'layer9'. Did you mean"),
        ({0: "layer3", 2: "layer4"}, None, "layer4 after layer3 trains no more stages than before"),
        (["head", "head"], None, "head after head trains no more stages"),
        ({0: "head", 4: "layer4", 2: "layer3"}, None, "the epochs must increase, not 0, 4, 2"),
        ({1: "head", 4: "layer4"}, None, "the first entry must begin after 0 epochs, not 1"),
        ({-1: "head", 4: "layer4"}, None, "the first entry must begin after 0 epochs, not -1"),
        ({0: "layer4"}, None, "model.schedule has one entry.* Add entries, or use --model.trainable layer4"),
        ([], None, "model.schedule has no entries"),
        (["head", "layer4"], 0, "model.schedule_patience must be at least 1, not 0"),
        ({0: "head", 3: "layer4"}, 2, "model.schedule_patience has no effect, because model.schedule names epochs"),
    ],
)
def test_nonsense_is_refused(entries: Any, patience: int | None, message: str) -> None:
    with pytest.raises(ProjectError) as error:
        parse(entries, patience)
    assert re.search(message, str(error.value)) and len(str(error.value).splitlines()) <= 2


def test_a_stage_that_would_never_be_trained_is_refused() -> None:
    schedule = parse({0: "head", 3: "layer4"})
    for epochs in (4, 0, -1, None):
        schedule.validate_length(epochs)
    with pytest.raises(ProjectError, match="layer4 would begin after 3 epochs, but the fit has 3"):
        schedule.validate_length(3)


def test_warm_up_is_linear() -> None:
    warm_up = WarmUp.of_epochs(0.5, 7, 6)
    assert [warm_up.factor(step) for step in range(7, 12)] == [0.25, 0.5, 0.75, 1, 1]
    assert WarmUp.of_epochs(0, 7, 6).factor(7) == 1
    assert WarmUp.of_epochs(0.1, 7, 6).factor(7) == 0.5  # at least one step


def test_scaled_rates_are_restored() -> None:
    groups = [{"name": name, "params": [nn.Parameter(torch.ones(1))]} for name in ("a", "a (no decay)", "b")]
    optimizer = torch.optim.SGD(groups, lr=0.3)
    with scaled_rates(optimizer, lambda stage: {"a": 0.1, "b": 1.0}[stage]):
        assert [group["lr"] for group in optimizer.param_groups] == [0.03, 0.03, 0.3]
    assert [group["lr"] for group in optimizer.param_groups] == [0.3] * 3


@pytest.mark.parametrize(("name", "implementation"), IMPLEMENTATIONS)
def test_optimizers_leave_stages_that_are_still_frozen(name: str, implementation: str | None) -> None:
    """Weight decay and momentum do not move parameters without a gradient, and they have no moments."""
    torch.manual_seed(0)
    frozen, trained = nn.Linear(3, 3, bias=False).requires_grad_(False), nn.Linear(3, 3, bias=False)
    groups = [{"name": "layer4", "params": [*frozen.parameters()]}, {"name": "head", "params": [*trained.parameters()]}]
    options: dict[str, Any] = {} if implementation is None else {implementation: True}
    if "weight_decay" in arguments(name):
        options["weight_decay"] = 0.1
    optimizer = getattr(torch.optim, name)(groups, lr=0.1, **options)
    before, inputs = frozen.weight.clone(), torch.randn(5, 3)
    moments = {key: value.clone() for key, value in optimizer.state.get(frozen.weight, {}).items()}
    for unfreezes in (False, False, True):
        frozen.requires_grad_(unfreezes)
        start = trained.weight.clone()
        optimizer.zero_grad()
        trained(frozen(inputs)).square().sum().backward()
        optimizer.step()
        assert not torch.equal(trained.weight, start)
        assert torch.equal(frozen.weight, before) is not unfreezes
        if not unfreezes:  # only Adagrad has a state from the start
            state = optimizer.state.get(frozen.weight, {})
            assert state.keys() == moments.keys()
            assert all(torch.equal(state[key], moments[key]) for key in moments)
