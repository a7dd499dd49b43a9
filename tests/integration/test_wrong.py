"""Checkpoints that are not what they should be: each is told by name, by every verb, before anything is lost."""

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from project import load
from project.cli.main import main
from project.errors import CheckpointError

Checkpoint = dict[str, Any]
Damage = Callable[[Checkpoint], Any]


def put(path: str, value: Any) -> Damage:
    """Put a value at a place such as ``transfer.classes``."""

    def change(checkpoint: Checkpoint) -> None:
        *above, last = path.split("/")
        inner: Any = checkpoint
        for key in above:
            inner = inner[int(key) if isinstance(inner, list) or key.isdigit() else key]
        inner[int(last) if last.isdigit() else last] = value

    return change


def drop(path: str) -> Damage:
    """Remove a key."""

    def change(checkpoint: Checkpoint) -> None:
        *above, last = path.split("/")
        inner: Any = checkpoint
        for key in above:
            inner = inner[int(key) if isinstance(inner, list) or key.isdigit() else key]
        del inner[int(last) if last.isdigit() else last]

    return change


SHA = "transfer/backbone/sha256"
#: Of the model, and so told by all verbs and by load: what is done to it, and what the message has to say.
MODEL: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "a missing tensor": (drop("state_dict/head.bias"), ("lacks tensor 'head.bias'",)),
    "an unexpected tensor": (put("state_dict/head.more", torch.zeros(1)), ("unexpected tensor 'head.more'",)),
    "a tensor of another shape": (put("state_dict/head.bias", torch.zeros(4)), ("head.bias", "(4,), not (3,)")),
    "a tensor of another type": (
        put("state_dict/head.bias", torch.zeros(3, dtype=torch.int64)),
        ("head.bias", "int64"),
    ),
    "a complex tensor": (put("state_dict/head.bias", torch.zeros(3, dtype=torch.cfloat)), ("head.bias", "complex64")),
    "a sparse tensor": (put("state_dict/head.bias", torch.zeros(3).to_sparse()), ("head.bias", "dense")),
    "a tensor without values": (put("state_dict/head.bias", torch.zeros(3, device="meta")), ("head.bias", "dense")),
    "a list for a tensor": (put("state_dict/head.bias", [0.0, 0.0, 0.0]), ("head.bias", "no dense tensor")),
    "a name of a tensor that is no text": (put("state_dict/5", torch.zeros(3)), ("unexpected tensor 5",)),
    "no state_dict": (drop("state_dict"), ("state_dict is missing",)),
    "a state_dict that is none": (put("state_dict", []), ("state_dict is of type list",)),
    "no hyper-parameters": (drop("hyper_parameters"), ("hyper_parameters is missing",)),
    "no backbone among them": (drop("hyper_parameters/backbone"), ("hyper_parameters.backbone is missing",)),
    "a backbone that is a number": (put("hyper_parameters/backbone", 18), ("backbone", "int")),
    "weights that are a list": (put("hyper_parameters/weights", ["a"]), ("weights", "list")),
    "a head that is none": (put("hyper_parameters/head", None), ("head", "NoneType")),
    "an image of no size": (put("hyper_parameters/image_size", -1), ("image_size", "-1")),
    "an image of a great size": (put("hyper_parameters/image_size", 10**9), ("image_size", "4096")),
    "a size beyond machine numbers": (put("hyper_parameters/image_size", 10**30), ("image_size", "4096")),
    "smoothing that is text": (put("hyper_parameters/label_smoothing", "a"), ("label_smoothing", "'a'")),
    "a flag that is a tensor": (put("hyper_parameters/channels_last", torch.zeros(3, 512)), ("model.channels_last",)),
    "a head that is a tensor": (put("hyper_parameters/head", torch.zeros(3, 512)), ("hyper_parameters.head", "Tensor")),
    "arguments that a head does not take": (put("hyper_parameters/head/init_args/more", 1), ("model.head", "more")),
    "class names that are numbers": (put("hyper_parameters/classes", [1, 2, 3]), ("classes", "int")),
    "no epoch": (drop("epoch"), ("epoch is missing",)),
    "an epoch that is text": (put("epoch", "three"), ("epoch", "str")),
    "no transfer": (drop("transfer"), ("not a checkpoint that fit wrote",)),
    "no backbone in it": (drop("transfer/backbone"), ("transfer.backbone is missing",)),
    "nothing for a backbone": (put("transfer/backbone", None), ("transfer.backbone", "NoneType")),
    "no fingerprint": (drop(SHA), ("transfer.backbone.sha256 is missing",)),
    "a fingerprint that is a number": (put(SHA, 5), ("sha256", "int")),
    "another fingerprint": (put(SHA, "0" * 64), ("another backbone", "000000000000")),
    "classes in another order": (put("transfer/classes", ["red", "green", "blue"]), ("['red', 'green', 'blue']",)),
    "other classes": (put("transfer/classes", ["a", "b", "c"]), ("['a', 'b', 'c']", "['blue', 'green', 'red']")),
    "classes that are text": (put("transfer/classes", "red"), ("transfer.classes", "str")),
    "another size of images": (put("transfer/preprocessing/crop", 64), ("crop 64, not 32",)),
    "another mean": (put("transfer/preprocessing/mean", [0.5, 0.5, 0.5]), ("mean [0.5, 0.5, 0.5]",)),
    "no preprocessing": (put("transfer/preprocessing", []), ("transfer.preprocessing", "list")),
    "another format": (put("transfer/format", 2), ("this version",)),
    "a format that is text": (put("transfer/format", "1"), ("format", "str")),
}
STATE = "optimizer_states/0/state/0"
FIT = "loops/fit_loop"
BEST = "callbacks/BEST"
#: Of the training, and so told by a resume alone.
TRAINING: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "a momentum of another shape": (put(f"{STATE}/exp_avg", torch.zeros(5)), ("optimizer",)),
    "a momentum that is text": (put(f"{STATE}/exp_avg", "a"), ("optimizer",)),
    "no momentum": (drop(f"{STATE}/exp_avg"), ("optimizer", "exp_avg")),
    "a step that is text": (put(f"{STATE}/step", "a"), ("optimizer",)),
    "no groups": (drop("optimizer_states/0/param_groups"), ("optimizer", "param_groups")),
    "a group too many": (lambda c: c["optimizer_states"][0]["param_groups"].append({"params": []}), ("optimizer",)),
    "a rate that is text": (put("optimizer_states/0/param_groups/0/lr", "a"), ("optimizer",)),
    "no rate": (drop("optimizer_states/0/param_groups/0/lr"), ("optimizer", "lr")),
    "parameters of nobody's": (put("optimizer_states/0/param_groups/0/params", [0, 1, 2]), ("optimizer",)),
    "states that are none": (put("optimizer_states", [5]), ("damaged",)),
    "states that are text": (put("optimizer_states", "a"), ("damaged",)),
    "no states": (drop("optimizer_states"), ("damaged",)),
    "a scheduler's method": (put("lr_schedulers/0/get_lr", 5), ("scheduler",)),
    "a scheduler's count": (put("lr_schedulers/0/last_epoch", "a"), ("scheduler",)),
    "a scheduler that is none": (put("lr_schedulers", [5]), ("damaged",)),
    "no loops": (drop("loops"), ("damaged",)),
    "loops that are text": (put("loops", "a"), ("damaged",)),
    "no progress": (drop(f"{FIT}/epoch_progress"), ("how many epochs",)),
    "progress that is text": (put(f"{FIT}/epoch_progress/current/completed", "a"), ("epoch_progress", "'a'")),
    "progress that is a tensor": (put(f"{FIT}/epoch_progress/current/completed", torch.zeros(3, 512)), ("tensor",)),
    "progress below nothing": (put(f"{FIT}/epoch_progress/current/completed", -3), ("epoch_progress", "-3")),
    "callbacks that are none": (put("callbacks", []), ("callbacks",)),
    "a callback that is none": (put("callbacks/EarlyStopping", 5), ("callbacks",)),
}


@pytest.fixture(scope="module")
def last(trained: Path) -> bytes:
    """A checkpoint with a scheduler's state."""
    return (trained / "checkpoints/last.ckpt").read_bytes()


@pytest.fixture
def damaged(last: bytes, here: Path) -> Callable[[Damage], str]:
    """Writes a damaged copy of the checkpoint, and gives its path."""

    def write(change: Damage) -> str:
        checkpoint = torch.load(io.BytesIO(last), weights_only=True)
        scheduler = {
            "class_path": "torch.optim.lr_scheduler.StepLR",
            "init_args": {"step_size": 2, "gamma": 0.1, "last_epoch": -1},
        }
        checkpoint["hyper_parameters"]["scheduler"] = scheduler
        optimizer = torch.optim.SGD([torch.zeros(1)])
        state = copy.deepcopy(torch.optim.lr_scheduler.StepLR(optimizer, 2).state_dict())
        checkpoint["lr_schedulers"] = [state]
        change(checkpoint)
        torch.save(checkpoint, "bad.ckpt")
        return "bad.ckpt"

    return write


def test_undamaged_it_is_taken(damaged: Callable[[Damage], str], photos: Path) -> None:
    path = damaged(lambda checkpoint: None)
    load(path)
    assert main(["fit", "--ckpt_path", path, "--data.root", str(photos), "--trainer.max_epochs", "4"]) == 0


@pytest.mark.parametrize("name", MODEL)
def test_a_wrong_model_is_refused_by_name(
    name: str, damaged: Callable[[Damage], str], photos: Path, refused: Callable[[int], str]
) -> None:
    change, expected = MODEL[name]
    path = damaged(change)
    verbs = (
        ["fit", "--data.root", str(photos), "--trainer.max_epochs", "9"],
        ["validate", "--data.root", str(photos)],
        ["predict", "--data.predict", str(photos)],
    )
    verb = verbs[list(MODEL).index(name) % len(verbs)]  # all ask the same functions; each has its share of the cases
    said = refused(main([*verb, "--ckpt_path", path]))
    for words in expected:
        assert words in said
    with pytest.raises(CheckpointError, match=r"bad\.ckpt") as caught:
        load(path)
    for words in expected:
        assert words in str(caught.value)


@pytest.mark.parametrize("name", TRAINING)
def test_a_wrong_state_of_the_training_is_refused_by_a_resume(
    name: str, damaged: Callable[[Damage], str], photos: Path, refused: Callable[[int], str]
) -> None:
    change, expected = TRAINING[name]
    path = damaged(change)
    said = refused(main(["fit", "--data.root", str(photos), "--trainer.max_epochs", "9", "--ckpt_path", path]))
    for words in expected:
        assert words in said
    assert load(path).classes_ == ["blue", "green", "red"], "the model itself is whole"


def test_classes_in_another_order_than_the_datas(
    damaged: Callable[[Damage], str], photos: Path, refused: Callable[[int], str]
) -> None:
    def turn(checkpoint: Checkpoint) -> None:
        checkpoint["hyper_parameters"]["classes"].reverse()
        checkpoint["transfer"]["classes"].reverse()

    path = damaged(turn)
    for verb in (["fit", "--trainer.max_epochs", "9"], ["validate"]):
        said = refused(main([*verb, "--data.root", str(photos), "--ckpt_path", path]))
        assert "(blue, green, red) are not the model's (red, green, blue)" in said


def test_progress_of_another_verb_than_fit(
    damaged: Callable[[Damage], str], photos: Path, refused: Callable[[int], str]
) -> None:
    path = damaged(put("loops/validate_loop/batch_progress/total/ready", "a"))
    assert "validate_loop" in refused(main(["validate", "--data.root", str(photos), "--ckpt_path", path]))


@pytest.mark.parametrize("value", ["a", "memory://bucket/a.ckpt", None], ids=["climbing", "remote", "of the best"])
def test_a_resume_removes_no_file_that_a_checkpoint_names(
    value: str, damaged: Callable[[Damage], str], photos: Path, refused: Callable[[int], str]
) -> None:
    Path("precious").write_text("precious")
    folder = Path("runs/photos/version_0/checkpoints").absolute()
    target = f"{folder}/../../../../precious" if value != "memory://bucket/a.ckpt" else value

    def change(checkpoint: Checkpoint) -> None:
        for key, state in checkpoint["callbacks"].items():
            if key.startswith("Best"):
                if value is None:
                    state.pop("dirpath")
                    state.update(best_k_models={target: -1.0}, kth_best_model_path=target, kth_value=torch.tensor(-1.0))
                else:
                    state["best_model_path"] = target

    code = main(["fit", "--data.root", str(photos), "--trainer.max_epochs", "5", "--ckpt_path", damaged(change)])
    assert Path("precious").exists()
    assert "no plain path" in refused(code)
