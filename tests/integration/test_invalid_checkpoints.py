"""Invalid checkpoints: every verb and ``load`` refuses them with a message that names the invalid entry."""

import copy
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from project import load
from project.cli.main import main
from project.errors import CheckpointError

Checkpoint = dict[str, Any]
Edit = Callable[[Checkpoint], Any]


def put(path: str, value: Any) -> Edit:
    """Set the value of a path such as ``transfer/classes``."""

    def edit(checkpoint: Checkpoint) -> None:
        container, key = _locate(checkpoint, path)
        container[key] = value

    return edit


def drop(path: str) -> Edit:
    """Remove a path."""

    def edit(checkpoint: Checkpoint) -> None:
        container, key = _locate(checkpoint, path)
        del container[key]

    return edit


def _locate(checkpoint: Checkpoint, path: str) -> tuple[Any, str | int]:
    """The container of a path, and its key or index."""
    container: Any = checkpoint
    *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    for parent in parents:
        container = container[parent]
    return container, last


SHA = "transfer/backbone/sha256"
#: Invalid model entries, refused by all verbs and by ``load``: edit, and texts of the message.
MODEL: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "missing tensor": (drop("state_dict/head.bias"), ("lacks tensor 'head.bias'",)),
    "unexpected tensor": (put("state_dict/head.more", torch.zeros(1)), ("unexpected tensor 'head.more'",)),
    "tensor of another shape": (put("state_dict/head.bias", torch.zeros(4)), ("head.bias", "(4,), expected (3,)")),
    "tensor of another type": (
        put("state_dict/head.bias", torch.zeros(3, dtype=torch.int64)),
        ("head.bias", "int64"),
    ),
    "complex tensor": (put("state_dict/head.bias", torch.zeros(3, dtype=torch.cfloat)), ("head.bias", "complex64")),
    "sparse tensor": (put("state_dict/head.bias", torch.zeros(3).to_sparse()), ("head.bias", "dense")),
    "tensor without values": (put("state_dict/head.bias", torch.zeros(3, device="meta")), ("head.bias", "dense")),
    "list instead of a tensor": (put("state_dict/head.bias", [0.0, 0.0, 0.0]), ("head.bias", "not a dense tensor")),
    "tensor name that is not text": (put("state_dict/5", torch.zeros(3)), ("unexpected tensor 5",)),
    "missing state_dict": (drop("state_dict"), ("state_dict is missing",)),
    "state_dict that is a list": (put("state_dict", []), ("state_dict is of type list",)),
    "missing hyper_parameters": (drop("hyper_parameters"), ("hyper_parameters is missing",)),
    "missing hyper_parameters.backbone": (drop("hyper_parameters/backbone"), ("hyper_parameters.backbone is missing",)),
    "backbone that is a number": (put("hyper_parameters/backbone", 18), ("backbone", "int")),
    "weights that are a list": (put("hyper_parameters/weights", ["a"]), ("weights", "list")),
    "head that is None": (put("hyper_parameters/head", None), ("head", "NoneType")),
    "negative image size": (put("hyper_parameters/image_size", -1), ("image_size", "-1")),
    "too large image size": (put("hyper_parameters/image_size", 10**9), ("image_size", "4096")),
    "image size beyond 64 bits": (put("hyper_parameters/image_size", 10**30), ("image_size", "4096")),
    "label smoothing that is text": (put("hyper_parameters/label_smoothing", "a"), ("label_smoothing", "'a'")),
    "flag that is a tensor": (put("hyper_parameters/channels_last", torch.zeros(3, 512)), ("model.channels_last",)),
    "head that is a tensor": (put("hyper_parameters/head", torch.zeros(3, 512)), ("hyper_parameters.head", "Tensor")),
    "unknown argument of the head": (put("hyper_parameters/head/init_args/more", 1), ("model.head", "more")),
    "class names that are numbers": (put("hyper_parameters/classes", [1, 2, 3]), ("classes", "int")),
    "missing epoch": (drop("epoch"), ("epoch is missing",)),
    "epoch that is text": (put("epoch", "three"), ("epoch", "str")),
    "missing transfer": (drop("transfer"), ("was not written by this project's fit",)),
    "missing transfer.backbone": (drop("transfer/backbone"), ("transfer.backbone is missing",)),
    "transfer.backbone that is None": (put("transfer/backbone", None), ("transfer.backbone", "NoneType")),
    "missing fingerprint": (drop(SHA), ("transfer.backbone.sha256 is missing",)),
    "fingerprint that is a number": (put(SHA, 5), ("sha256", "int")),
    "another fingerprint": (put(SHA, "0" * 64), ("backbones differ", "000000000000")),
    "classes in another order": (put("transfer/classes", ["red", "green", "blue"]), ("['red', 'green', 'blue']",)),
    "other classes": (put("transfer/classes", ["a", "b", "c"]), ("['a', 'b', 'c']", "['blue', 'green', 'red']")),
    "classes that are text": (put("transfer/classes", "red"), ("transfer.classes", "str")),
    "another image size": (
        put("transfer/preprocessing/crop", 64),
        ("crop is 64 in the checkpoint and 32 in the model",),
    ),
    "another mean": (put("transfer/preprocessing/mean", [0.4, 0.4, 0.4]), ("mean is [0.4, 0.4, 0.4]",)),
    "preprocessing that is a list": (put("transfer/preprocessing", []), ("transfer.preprocessing", "list")),
    "another format": (put("transfer/format", 2), ("this version",)),
    "format that is text": (put("transfer/format", "1"), ("format", "str")),
}
STATE = "optimizer_states/0/state/0"
FIT = "loops/fit_loop"
#: Invalid training entries, refused by a resume only.
TRAINING: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "momentum of another shape": (put(f"{STATE}/exp_avg", torch.zeros(5)), ("optimizer",)),
    "momentum that is text": (put(f"{STATE}/exp_avg", "a"), ("optimizer",)),
    "missing momentum": (drop(f"{STATE}/exp_avg"), ("optimizer", "exp_avg")),
    "step that is text": (put(f"{STATE}/step", "a"), ("optimizer",)),
    "missing parameter groups": (drop("optimizer_states/0/param_groups"), ("optimizer", "param_groups")),
    "additional parameter group": (
        lambda c: c["optimizer_states"][0]["param_groups"].append({"params": []}),
        ("optimizer",),
    ),
    "learning rate that is text": (put("optimizer_states/0/param_groups/0/lr", "a"), ("optimizer",)),
    "missing learning rate": (drop("optimizer_states/0/param_groups/0/lr"), ("optimizer", "lr")),
    "unknown parameters in a group": (put("optimizer_states/0/param_groups/0/params", [0, 1, 2]), ("optimizer",)),
    "optimizer states that are numbers": (put("optimizer_states", [5]), ("damaged",)),
    "optimizer states that are text": (put("optimizer_states", "a"), ("damaged",)),
    "missing optimizer states": (drop("optimizer_states"), ("damaged",)),
    "scheduler state that replaces a method": (put("lr_schedulers/0/get_lr", 5), ("scheduler",)),
    "scheduler epoch that is text": (put("lr_schedulers/0/last_epoch", "a"), ("scheduler",)),
    "scheduler state that is a number": (put("lr_schedulers", [5]), ("damaged",)),
    "missing loops": (drop("loops"), ("damaged",)),
    "loops that are text": (put("loops", "a"), ("damaged",)),
    "missing epoch progress": (drop(f"{FIT}/epoch_progress"), ("number of completed epochs",)),
    "progress that is text": (put(f"{FIT}/epoch_progress/current/completed", "a"), ("epoch_progress", "'a'")),
    "progress that is a tensor": (put(f"{FIT}/epoch_progress/current/completed", torch.zeros(3, 512)), ("tensor",)),
    "negative progress": (put(f"{FIT}/epoch_progress/current/completed", -3), ("epoch_progress", "-3")),
    "callbacks that are a list": (put("callbacks", []), ("callbacks",)),
    "callback state that is a number": (put("callbacks/EarlyStopping", 5), ("callbacks",)),
}


@pytest.fixture(scope="module")
def last(trained: Path) -> bytes:
    """Content of a valid last.ckpt."""
    return (trained / "checkpoints/last.ckpt").read_bytes()


@pytest.fixture
def write_edited(last: bytes, here: Path) -> Callable[[Edit], str]:
    """Writes an edited copy of the checkpoint, with a scheduler; returns its path."""

    def write(edit: Edit) -> str:
        checkpoint = torch.load(io.BytesIO(last), weights_only=True)
        scheduler = {
            "class_path": "torch.optim.lr_scheduler.StepLR",
            "init_args": {"step_size": 2, "gamma": 0.1, "last_epoch": -1},
        }
        checkpoint["hyper_parameters"]["scheduler"] = scheduler
        optimizer = torch.optim.SGD([torch.zeros(1)])
        state = copy.deepcopy(torch.optim.lr_scheduler.StepLR(optimizer, 2).state_dict())
        checkpoint["lr_schedulers"] = [state]
        edit(checkpoint)
        torch.save(checkpoint, "bad.ckpt")
        return "bad.ckpt"

    return write


def test_valid_checkpoint_is_accepted(write_edited: Callable[[Edit], str], photos: Path) -> None:
    path = write_edited(lambda checkpoint: None)
    load(path)
    assert main(["fit", "--ckpt_path", path, "--data.root", str(photos), "--trainer.max_epochs", "4"]) == 0


def assert_contains(message: str, texts: Iterable[str]) -> None:
    for text in texts:
        assert text in message


@pytest.mark.parametrize("name", MODEL)
def test_invalid_model_entry_is_refused_by_name(
    name: str, write_edited: Callable[[Edit], str], photos: Path, refused: Callable[[int], str]
) -> None:
    edit, texts = MODEL[name]
    path = write_edited(edit)
    verbs = (
        ["fit", "--data.root", str(photos), "--trainer.max_epochs", "9"],
        ["validate", "--data.root", str(photos)],
        ["predict", "--data.predict", str(photos)],
    )
    verb = verbs[list(MODEL).index(name) % len(verbs)]  # all verbs use the same checks, so the cases are distributed
    assert_contains(refused(main([*verb, "--ckpt_path", path])), texts)
    with pytest.raises(CheckpointError, match=r"bad\.ckpt") as exc_info:
        load(path)
    assert_contains(str(exc_info.value), texts)


@pytest.mark.parametrize("name", TRAINING)
def test_invalid_training_entry_is_refused_by_a_resume(
    name: str, write_edited: Callable[[Edit], str], photos: Path, refused: Callable[[int], str]
) -> None:
    edit, texts = TRAINING[name]
    path = write_edited(edit)
    fit = ["fit", "--data.root", str(photos), "--trainer.max_epochs", "9", "--ckpt_path", path]
    assert_contains(refused(main(fit)), texts)
    assert load(path).classes_ == ["blue", "green", "red"], "the model entries are valid"


def test_classes_in_another_order_than_the_data_are_refused(
    write_edited: Callable[[Edit], str], photos: Path, refused: Callable[[int], str]
) -> None:
    def reverse_classes(checkpoint: Checkpoint) -> None:
        checkpoint["hyper_parameters"]["classes"].reverse()
        checkpoint["transfer"]["classes"].reverse()

    path = write_edited(reverse_classes)
    for verb in (["fit", "--trainer.max_epochs", "9"], ["validate"]):
        message = refused(main([*verb, "--data.root", str(photos), "--ckpt_path", path]))
        assert "(blue, green, red) are not the model's (red, green, blue)" in message


def test_invalid_progress_of_validate_is_refused(
    write_edited: Callable[[Edit], str], photos: Path, refused: Callable[[int], str]
) -> None:
    path = write_edited(put("loops/validate_loop/batch_progress/total/ready", "a"))
    assert "validate_loop" in refused(main(["validate", "--data.root", str(photos), "--ckpt_path", path]))


@pytest.mark.parametrize(
    "value", ["a", "memory://bucket/a.ckpt", None], ids=["parent folder", "remote", "best_k_models"]
)
def test_resume_deletes_no_file_named_in_a_checkpoint(
    value: str, write_edited: Callable[[Edit], str], photos: Path, refused: Callable[[int], str]
) -> None:
    Path("precious").write_text("precious")
    folder = Path("runs/photos/version_0/checkpoints").absolute()
    target = f"{folder}/../../../../precious" if value != "memory://bucket/a.ckpt" else value

    def edit_paths(checkpoint: Checkpoint) -> None:
        for key, state in checkpoint["callbacks"].items():
            if key.startswith("Best"):
                if value is None:
                    state.pop("dirpath")
                    state.update(best_k_models={target: -1.0}, kth_best_model_path=target, kth_value=torch.tensor(-1.0))
                else:
                    state["best_model_path"] = target

    code = main(
        ["fit", "--data.root", str(photos), "--trainer.max_epochs", "5", "--ckpt_path", write_edited(edit_paths)]
    )
    assert Path("precious").exists()
    assert "not a normalized path" in refused(code)
