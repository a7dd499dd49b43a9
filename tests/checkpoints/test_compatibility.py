import pytest

from project.checkpoints.compatibility import let_flags_win


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


def test_without_a_change_a_scheduled_learning_rate_goes_on() -> None:
    kept = checkpoint()
    let_flags_win(kept, asked(lr=0.1))
    assert kept == checkpoint()


def test_a_new_learning_rate_is_taken_by_optimizer_and_scheduler() -> None:
    kept = checkpoint()
    let_flags_win(kept, asked(lr=0.01))
    assert kept["optimizer_states"][0]["param_groups"] == [{"lr": 0.01, "initial_lr": 0.01, "momentum": 0.9}]
    assert kept["lr_schedulers"][0]["base_lrs"] == [0.01]


def test_another_argument_leaves_the_learning_rate_alone() -> None:
    kept = checkpoint(momentum=0.9)
    let_flags_win(kept, asked(lr=0.1, momentum=0.5))
    assert kept["optimizer_states"][0]["param_groups"] == [{"lr": 0.05, "initial_lr": 0.1, "momentum": 0.5}]


@pytest.mark.parametrize("path", ["torch.optim.AdamW", "torch.optim.adamw.AdamW"])
def test_another_optimizer_begins_anew(path: str) -> None:
    kept = checkpoint()
    let_flags_win(kept, asked(path, lr=0.1))
    assert kept["optimizer_states"] == []


def test_a_new_argument_of_the_scheduler_is_taken() -> None:
    kept = checkpoint()
    flags = asked(lr=0.1)
    flags["scheduler"] = {**flags["scheduler"], "init_args": {"step_size": 1, "gamma": 0.1}}
    let_flags_win(kept, flags)
    assert kept["lr_schedulers"] == [{"base_lrs": [0.1], "last_epoch": 5, "gamma": 0.1, "step_size": 1}]
    assert kept["optimizer_states"] == checkpoint()["optimizer_states"]


@pytest.mark.parametrize("other", [None, {"class_path": "torch.optim.lr_scheduler.ConstantLR", "init_args": {}}])
def test_another_scheduler_begins_anew(other: object) -> None:
    kept = checkpoint()
    let_flags_win(kept, {**asked(lr=0.1), "scheduler": other})
    assert kept["lr_schedulers"] == []
