"""Learning rates by depth, weight decay, and Lightning's dictionary of a scheduler, in fits."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from project.classifier import ImageClassifier
from tests.conftest import STORED, scalars
from tests.integration.test_exact_resume import assert_identical

Fit = Callable[..., int]
ADAM = ["--model.optimizer", "AdamW", "--model.optimizer.lr", "0.01", "--data.batch_size", "8"]  # 3 steps an epoch
STAGES = ["--model.trainable", "layer3", "--model.lr_decay", "0.5"]
WARMUP = ["--model.scheduler", "project.models.schedules.WarmupCosine"]
COSINE = {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR", "init_args": {"eta_min": 1e-4}}


def checkpoint(version: int = 0) -> dict[str, Any]:
    path = Path(f"runs/photos/version_{version}/checkpoints/last.ckpt")
    return dict(torch.load(path, weights_only=True))


def scheduler_state(version: int = 0) -> dict[str, Any]:
    return dict(checkpoint(version)["lr_schedulers"][0])


def test_stages_with_warmup_clipping_and_accumulation(fit: Fit) -> None:
    batches = [
        "--trainer.accumulate_grad_batches=2",
        "--trainer.gradient_clip_val=0.1",
        "--trainer.log_every_n_steps=1",
    ]
    assert fit(*ADAM, *STAGES, *WARMUP, *batches, "--trainer.max_epochs", "3") == 0
    state = scheduler_state()
    assert (state["total_steps"], state["warmup_steps"], state["last_epoch"]) == (6, 1, 6)
    groups = checkpoint()["optimizer_states"][0]["param_groups"]
    names = [name + part for name in ("layer3", "layer4", "head") for part in ("", " (no decay)")]
    assert [group["name"] for group in groups] == names
    assert state["base_lrs"] == [0.0025, 0.0025, 0.005, 0.005, 0.01, 0.01]
    assert [group["weight_decay"] for group in groups] == [0.01, 0] * 3
    logged = scalars(Path("runs/photos/version_0"))
    rates = [[event.value for event in logged.Scalars(f"lr-AdamW/{name}")] for name in ("layer3", "layer4", "head")]
    assert all(rate > 0 for rate in rates[0])
    assert [rate * 4 for rate in rates[0]] == [rate * 2 for rate in rates[1]] == pytest.approx(rates[2])


def test_fit_without_weight_decay_has_one_group_per_stage(fit: Fit) -> None:
    assert fit("--model.trainable", "layer4") == 0
    assert [group["name"] for group in checkpoint()["optimizer_states"][0]["param_groups"]] == ["layer4", "head"]


def test_checkpoint_with_one_group_per_stage_resumes_exactly(fit: Fit) -> None:
    """Its decay of all parameters is kept, so the resumed fit is the one that was interrupted."""
    flags = [*ADAM, "--model.trainable", "layer4", "--model.optimizer.weight_decay", "0.5"]
    assert fit(*flags, *WARMUP, "--trainer.max_epochs", "2") == 0
    split = checkpoint()
    (state,) = split["optimizer_states"]
    for group in state["param_groups"]:
        group["weight_decay"] = 0.5
    torch.save(split, "split.ckpt")
    earlier = copy.deepcopy(split)
    del earlier["hyper_parameters"]["lr_decay"], earlier["hyper_parameters"]["scheduler_frequency"]
    (state,), (scheduler,) = earlier["optimizer_states"], earlier["lr_schedulers"]
    saved = {group["name"]: group for group in state["param_groups"]}
    state["param_groups"] = []
    for group in ImageClassifier.load_from_checkpoint("split.ckpt").parameter_groups():
        name = group["name"]
        ids = {decayed: iter(saved[name + ("" if decayed else " (no decay)")]["params"]) for decayed in (True, False)}
        params = [next(ids[decayed]) for decayed in group["decayed"]]
        state["param_groups"].append({**saved[name], "params": params})
    scheduler.update({key: value[::2] for key, value in scheduler.items() if isinstance(value, list)})
    torch.save(earlier, "earlier.ckpt")
    for name in ("split", "earlier"):
        resume = ["--ckpt_path", f"{name}.ckpt", "--data.batch_size", "8", "--trainer.max_epochs", "3"]
        assert fit(*resume, "--name", name) == 0
    expected, actual = (
        torch.load(f"runs/{name}/version_0/checkpoints/last.ckpt", weights_only=True) for name in ("split", "earlier")
    )
    assert_identical(actual["state_dict"], expected["state_dict"], "state_dict")
    assert_identical(actual["optimizer_states"], expected["optimizer_states"], "optimizer_states")
    assert {group["weight_decay"] for group in actual["optimizer_states"][0]["param_groups"]} == {0.5}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.lr_decay", "0.5"], "model.lr_decay has no effect, because only the head is trained"),
        (["--model.lr_decay", "0"], "model.lr_decay must be in (0, 1], not 0"),
        (["--model.lr_decay", "1.5"], "model.lr_decay must be in (0, 1], not 1.5"),
        ([*WARMUP, "--model.scheduler.total_steps", "5"], "WarmupCosine has total_steps 5, but the fit has 3 steps"),
        ([*WARMUP, "--model.scheduler.warmup", "4"], "a number of steps up to 3 (the length of the fit), not 4"),
        (["--model.scheduler_frequency", "2"], "model.scheduler_frequency has no effect without a scheduler"),
        ([*WARMUP, "--model.scheduler_frequency", "0"], "model.scheduler_frequency must be at least 1, not 0"),
        ([*WARMUP, "--model.scheduler_frequency", "4"], "is 4, but the fit has 3 steps"),
    ],
)
def test_setting_without_effect_is_refused_before_training(
    flags: list[str], message: str, fit: Fit, refused: Callable[[int], str]
) -> None:
    assert message in refused(fit(*ADAM, *flags))


def test_frequency_counts_optimizer_steps_of_the_fit(fit: Fit) -> None:
    flags = [*ADAM, *WARMUP, "--model.scheduler_frequency", "2", "--model.scheduler.warmup", "0"]
    assert fit(*flags, "--trainer.max_epochs", "3") == 0
    assert (scheduler_state()["total_steps"], scheduler_state()["last_epoch"]) == (4, 4)
    assert fit("--data.batch_size", "8", "--ckpt_path", "last", "--trainer.max_epochs", "4") == 0
    assert (scheduler_state(1)["total_steps"], scheduler_state(1)["last_epoch"]) == (6, 6)
    epochs = ["--model.scheduler_interval", "epoch", "--trainer.max_epochs", "5"]
    assert fit(*flags, *epochs) == 0
    assert (scheduler_state(2)["total_steps"], scheduler_state(2)["last_epoch"]) == (2, 2)


def test_lightnings_dictionary_sets_interval_and_frequency(fit: Fit, here: Path) -> None:
    dictionary = {"scheduler": COSINE, "interval": "step", "frequency": 2}
    model = {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}, "scheduler": dictionary}
    text = yaml.safe_dump({"model": model, "data": {"batch_size": 8}})
    (here / "c.yaml").write_text(text.replace("0.0001", "1e-4"))  # the parser reads it as a number
    assert fit("-c", "c.yaml", "--trainer.max_epochs", "2") == 0
    assert fit(*ADAM, "--model.scheduler", json.dumps(dictionary), "--trainer.max_epochs", "2") == 0
    assert fit(*ADAM, "--model", json.dumps({"scheduler": dictionary}), "--trainer.max_epochs", "2") == 0
    for version in range(3):
        state, hparams = scheduler_state(version), checkpoint(version)["hyper_parameters"]
        assert (state["T_max"], state["last_epoch"], state["eta_min"]) == (3, 3, 1e-4)
        assert (hparams["scheduler_interval"], hparams["scheduler_frequency"]) == ("step", 2)
        assert hparams["scheduler"]["class_path"] == COSINE["class_path"]
    assert fit("-c", "c.yaml", "--model.scheduler_interval", "epoch", "--model.scheduler_frequency", "1") == 0
    assert scheduler_state(3)["T_max"] == 1, "flags override a config file"
    saved = yaml.safe_load(Path("runs/photos/version_0/config.yaml").read_text())["model"]
    assert (saved["scheduler_interval"], saved["scheduler_frequency"]) == ("step", 2)


def test_lightnings_dictionary_sets_the_monitor(fit: Fit) -> None:
    plateau = {"scheduler": TORCH_PLATEAU, "monitor": "val/f1"}
    assert fit(*ADAM, *STORED, "--model.scheduler", json.dumps(plateau)) == 0
    assert checkpoint()["hyper_parameters"]["scheduler"]["init_args"]["monitor"] == "val/f1"


PLATEAU, TORCH_PLATEAU = "lightning.pytorch.cli.ReduceLROnPlateau", "torch.optim.lr_scheduler.ReduceLROnPlateau"


@pytest.mark.parametrize(
    ("dictionary", "more", "message"),
    [
        ({"scheduler": COSINE, "monitor": "val/loss"}, [], "monitor applies only to ReduceLROnPlateau, not to Cosine"),
        ({"scheduler": COSINE, "strict": False}, [], "the key strict is not supported"),
        (
            {"scheduler": COSINE, "interval": "step"},
            ["--model.scheduler_interval", "epoch"],
            "model.scheduler.interval is step, but model.scheduler_interval is epoch. Remove one of them.",
        ),
        ({"scheduler": TORCH_PLATEAU, "frequency": 2}, [], "ReduceLROnPlateau is stepped at each validation"),
        ({"scheduler": TORCH_PLATEAU, "interval": "step"}, [], "ReduceLROnPlateau is stepped once per epoch"),
        (
            {"scheduler": {"class_path": PLATEAU, "init_args": {"monitor": "val/f1"}}, "monitor": "val/loss"},
            [],
            "model.scheduler.monitor is val/loss, but that of ReduceLROnPlateau is val/f1",
        ),
        ({"scheduler": COSINE, "interval": "batch"}, [], "model.scheduler_interval: expected 'epoch', 'step'"),
    ],
)
def test_key_of_the_dictionary_without_effect_is_refused(
    dictionary: dict[str, Any], more: list[str], message: str, fit: Fit, refused: Callable[[int], str]
) -> None:
    assert message in refused(fit(*ADAM, "--model.scheduler", json.dumps(dictionary), *more))
