import copy

from project.checkpoints.compatibility import name_groups


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
