import copy

import pytest

from project.checkpoints.compatibility import apply_flags, name_groups


def checkpoint(**arguments: object) -> dict:
    """A resume's checkpoint: one group of an optimizer, one scheduler."""
    return {
        "hyper_parameters": {
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, **arguments}},
            "scheduler": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1, "gamma": 0.5}},
        },
        "optimizer_states": [{"state": {}, "param_groups": [{"lr": 0.05, "initial_lr": 0.1, "momentum": 0.9}]}],
        "lr_schedulers": [{"base_lrs": [0.1], "last_epoch": 5, "gamma": 0.5, "step_size": 1}],
    }


def asked(path: str = "torch.optim.SGD", **arguments: object) -> dict:
    """Hyper-parameters with this optimizer and the checkpoint's scheduler."""
    scheduler = checkpoint()["hyper_parameters"]["scheduler"]
    return {"optimizer": {"class_path": path, "init_args": arguments}, "scheduler": scheduler}


def apply(kept: dict, flags: dict) -> None:
    """Apply flags to a checkpoint, with the groups of the optimizer that they ask for."""
    apply_flags(kept, flags, [{"name": "head", **flags["optimizer"]["init_args"]}])


def test_without_a_change_a_scheduled_learning_rate_goes_on() -> None:
    kept = checkpoint()
    apply(kept, asked(lr=0.1))
    assert kept == checkpoint()


def test_a_new_learning_rate_is_taken_by_optimizer_and_scheduler() -> None:
    kept = checkpoint()
    apply(kept, asked(lr=0.01))
    assert kept["optimizer_states"][0]["param_groups"] == [{"lr": 0.01, "initial_lr": 0.01, "momentum": 0.9}]
    assert kept["lr_schedulers"][0]["base_lrs"] == [0.01]


def test_another_argument_leaves_the_learning_rate_alone() -> None:
    kept = checkpoint(momentum=0.9)
    apply(kept, asked(lr=0.1, momentum=0.5))
    assert kept["optimizer_states"][0]["param_groups"] == [{"lr": 0.05, "initial_lr": 0.1, "momentum": 0.5}]


@pytest.mark.parametrize("path", ["torch.optim.AdamW", "torch.optim.adamw.AdamW"])
def test_another_optimizer_begins_anew(path: str) -> None:
    kept = checkpoint()
    apply(kept, asked(path, lr=0.1))
    assert kept["optimizer_states"] == []


def test_a_new_argument_of_the_scheduler_is_taken() -> None:
    kept = checkpoint()
    flags = asked(lr=0.1)
    flags["scheduler"] = {**flags["scheduler"], "init_args": {"step_size": 1, "gamma": 0.1}}
    apply(kept, flags)
    assert kept["lr_schedulers"] == [{"base_lrs": [0.1], "last_epoch": 5, "gamma": 0.1, "step_size": 1}]
    assert kept["optimizer_states"] == checkpoint()["optimizer_states"]


@pytest.mark.parametrize("other", [None, {"class_path": "torch.optim.lr_scheduler.ConstantLR", "init_args": {}}])
def test_another_scheduler_begins_anew(other: object) -> None:
    kept = checkpoint()
    apply(kept, {**asked(lr=0.1), "scheduler": other})
    assert kept["lr_schedulers"] == []


def two_groups() -> dict:
    """A resume's checkpoint whose groups have learning rates of their own."""
    kept = checkpoint()
    (group,) = kept["optimizer_states"][0]["param_groups"]
    kept["optimizer_states"][0]["param_groups"] = [
        {**group, "name": "layer4", "lr": 0.005, "initial_lr": 0.01},
        {**group, "name": "head"},
    ]
    kept["lr_schedulers"][0]["base_lrs"] = [0.01, 0.1]
    return kept


def test_a_flag_sets_each_group_by_its_name() -> None:
    kept = two_groups()
    # In another order, as a later version may have them.
    apply_flags(kept, asked(lr=1.0), [{"name": "head", "lr": 1.0}, {"name": "layer4", "lr": 0.2}])
    groups = {group["name"]: group for group in kept["optimizer_states"][0]["param_groups"]}
    assert (groups["head"]["lr"], groups["layer4"]["lr"]) == (1.0, 0.2)
    assert (groups["head"]["initial_lr"], groups["layer4"]["initial_lr"]) == (1.0, 0.2)


def test_a_state_without_names_gets_those_of_its_groups() -> None:
    kept = checkpoint()
    kept["optimizer_states"][0]["param_groups"][0]["params"] = [0, 1, 2, 3, 4]
    kept["lr_schedulers"][0] |= {"max_lrs": [1.0], "_schedulers": [{"base_lrs": [0.1]}]}
    name_groups(kept, [{"name": "layer4", "params": [None] * 3}, {"name": "head", "params": [None] * 2}])
    groups = kept["optimizer_states"][0]["param_groups"]
    assert [(group["name"], group["params"], group["lr"]) for group in groups] == [
        ("layer4", [0, 1, 2], 0.05),
        ("head", [3, 4], 0.05),
    ]
    assert kept["lr_schedulers"][0]["base_lrs"] == [0.1, 0.1], "a schedule has one for each group"
    assert kept["lr_schedulers"][0]["max_lrs"] == [1.0, 1.0]
    assert kept["lr_schedulers"][0]["_schedulers"] == [{"base_lrs": [0.1, 0.1]}]
    again = copy.deepcopy(kept)
    name_groups(kept, [{"name": "layer4", "params": [None] * 3}, {"name": "head", "params": [None] * 2}])
    assert kept == again
