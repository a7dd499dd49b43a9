"""Optimizer states of earlier versions are converted to named parameter groups."""

import copy
from typing import Any

from project.checkpoints.compatibility import name_parameter_groups

GROUPS = [{"name": "layer4", "params": [None] * 3}, {"name": "head", "params": [None] * 2}]


def test_unnamed_group_is_split_into_named_groups_once() -> None:
    checkpoint: dict[str, Any] = {
        "optimizer_states": [{"state": {}, "param_groups": [{"lr": 0.05, "params": [0, 1, 2, 3, 4]}]}],
        "lr_schedulers": [{"base_lrs": [0.1], "last_epoch": 5, "max_lrs": [1.0], "_schedulers": [{"base_lrs": [0.1]}]}],
    }
    name_parameter_groups(checkpoint, GROUPS)
    groups = checkpoint["optimizer_states"][0]["param_groups"]
    assert [(group["name"], group["params"], group["lr"]) for group in groups] == [
        ("layer4", [0, 1, 2], 0.05),
        ("head", [3, 4], 0.05),
    ]
    scheduler = checkpoint["lr_schedulers"][0]
    assert scheduler["base_lrs"] == [0.1, 0.1], "one learning rate per group"
    assert scheduler["max_lrs"] == [1.0, 1.0]
    assert scheduler["_schedulers"] == [{"base_lrs": [0.1, 0.1]}]
    converted = copy.deepcopy(checkpoint)
    name_parameter_groups(checkpoint, GROUPS)
    assert checkpoint == converted, "named groups are left as they are"
