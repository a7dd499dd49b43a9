"""Optimizer states of earlier versions, and of other weight decays, are regrouped."""

import copy
from typing import Any

from project.checkpoints.compatibility import match_parameter_groups

GROUPS = [
    {"name": "layer4", "params": [None] * 3, "decayed": [False, True, False]},
    {"name": "head", "params": [None] * 2, "decayed": [True, False]},
]
STAGES = ["layer4", "head"]
SPLIT = ["layer4", "layer4 (no decay)", "head", "head (no decay)"]


def checkpoint_of(groups: list[dict[str, Any]], scheduler: dict[str, Any]) -> dict[str, Any]:
    return {"optimizer_states": [{"state": {}, "param_groups": groups}], "lr_schedulers": [scheduler]}


def groups_of(checkpoint: dict[str, Any]) -> list[tuple[str, list[int], float]]:
    groups = checkpoint["optimizer_states"][0]["param_groups"]
    return [(group["name"], group["params"], group["lr"]) for group in groups]


def test_unnamed_group_is_split_into_named_groups_once() -> None:
    scheduler = {"base_lrs": [0.1], "last_epoch": 5, "max_lrs": [1.0], "_schedulers": [{"base_lrs": [0.1]}]}
    checkpoint = checkpoint_of([{"lr": 0.05, "params": [0, 1, 2, 3, 4]}], scheduler)
    match_parameter_groups(checkpoint, GROUPS, STAGES)
    assert groups_of(checkpoint) == [("layer4", [0, 1, 2], 0.05), ("head", [3, 4], 0.05)]
    scheduler = checkpoint["lr_schedulers"][0]
    assert scheduler["base_lrs"] == [0.1, 0.1], "one learning rate per group"
    assert scheduler["max_lrs"] == [1.0, 1.0]
    assert scheduler["_schedulers"] == [{"base_lrs": [0.1, 0.1]}]
    converted = copy.deepcopy(checkpoint)
    match_parameter_groups(checkpoint, GROUPS, STAGES)
    assert checkpoint == converted, "named groups are left as they are"


def test_groups_of_stages_are_split_and_joined_with_the_state_of_each_parameter() -> None:
    stages = [{"name": "layer4", "lr": 0.1, "params": [0, 1, 2]}, {"name": "head", "lr": 0.2, "params": [3, 4]}]
    before = checkpoint_of(stages, {"base_lrs": [1.0, 2.0], "_last_lr": [0.1, 0.2]})
    checkpoint = copy.deepcopy(before)
    match_parameter_groups(checkpoint, GROUPS, SPLIT)
    assert groups_of(checkpoint) == [
        ("layer4", [1], 0.1),
        ("layer4 (no decay)", [0, 2], 0.1),
        ("head", [3], 0.2),
        ("head (no decay)", [4], 0.2),
    ]
    assert checkpoint["lr_schedulers"] == [{"base_lrs": [1.0, 1.0, 2.0, 2.0], "_last_lr": [0.1, 0.1, 0.2, 0.2]}]
    match_parameter_groups(checkpoint, GROUPS, STAGES)
    assert checkpoint == before


def test_groups_of_another_model_are_left_for_the_checks() -> None:
    for groups in ([{"name": "head", "lr": 0.1, "params": [0, 1]}], [{"name": "stem", "lr": 0.1, "params": [0]}]):
        checkpoint = checkpoint_of(groups, {})
        match_parameter_groups(checkpoint, GROUPS, SPLIT)
        assert checkpoint == checkpoint_of(groups, {})
