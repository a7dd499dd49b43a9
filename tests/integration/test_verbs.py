"""The command line from end to end, on images that the tests make."""

import csv
import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from lightning_utilities.core.imports import RequirementCache

from project import ImageClassifier, load
from project.cli.main import main
from project.cli.transfer_cli import reserve_version
from project.models.backbone import load_backbone
from tests.conftest import draw, scalars

Fit = Callable[..., int]


def test_a_run_is_one_folder_with_config_checkpoints_and_events(trained: Path) -> None:
    assert sorted(path.name for path in (trained / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    assert yaml.safe_load((trained / "config.yaml").read_text())["model"]["backbone"] == "resnet18"
    assert list(trained.glob("events.out.tfevents.*"))
    assert [path.name for path in trained.parents[2].iterdir()] == ["runs"], "nothing is written beside runs/"


def test_dashboard_has_loss_metrics_learning_rate_throughput_and_counts(trained: Path) -> None:
    events = scalars(trained)
    expected = {
        *("train/loss", "train/accuracy", "val/loss", "val/accuracy", "val/f1", "val/ece", "lr-AdamW/head"),
        *("train/images_per_second", "parameters/trainable", "parameters/frozen"),
        *(f"val/recall_of/{name}" for name in ("blue", "green", "red")),
    }
    assert expected <= set(events.Tags()["scalars"])
    assert [event.value for event in events.Scalars("parameters/trainable")] == [512 * 3 + 3]
    assert len(events.Scalars("val/accuracy")) == 3
    assert events.Scalars("lr-AdamW/head")[0].value == pytest.approx(0.01)
    assert "SHA-256" in str(events.Tensors("frozen/text_summary")[0].tensor_proto.string_val)


def test_colours_are_learnt(trained: Path) -> None:
    assert max(event.value for event in scalars(trained).Scalars("val/accuracy")) == 1.0


def test_frozen_backbone_is_bit_identical_after_fit(trained: Path, weights: Path) -> None:
    pretrained = load_backbone("resnet18", str(weights))
    checkpoint = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["transfer"]["frozen"] == {
        "stages": ["stem", "layer1", "layer2", "layer3", "layer4"],
        "sha256": pretrained.sha256,
    }
    assert checkpoint["transfer"]["backbone"]["sha256"] == pretrained.sha256


def test_fit_prints_the_fingerprint_before_and_after_and_a_result(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit() == 0
    out = capsys.readouterr().out
    digits = torch.load("runs/photos/version_0/checkpoints/last.ckpt", weights_only=True)["transfer"]["frozen"][
        "sha256"
    ]
    flat = "".join(character for character in out if character not in "│\n ")
    assert flat.count(digits) == 2
    for words in ("best val/accuracy", "runs/photos/version_0/checkpoints/best.ckpt", "load(", "images/s", "unchanged"):
        assert words.replace(" ", "") in flat


def test_a_frozen_part_that_changes_is_an_error(
    fit: Fit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(self: ImageClassifier) -> None:
        self.backbone.stages["layer2"][0][0].bn1.running_mean += 1e-3

    monkeypatch.setattr(ImageClassifier, "on_train_epoch_start", spoil)
    assert fit() == 2
    assert "frozen part of resnet18 has changed" in capsys.readouterr().err


def test_a_frozen_part_that_is_not_what_was_loaded_is_an_error(
    fit: Fit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(self: ImageClassifier, stage: str) -> None:
        setup(self, stage)
        with torch.no_grad():
            self.backbone.stages["layer1"][0][0].conv1.weight[0, 0, 0, 0] += 1e-6

    setup = ImageClassifier.setup
    monkeypatch.setattr(ImageClassifier, "setup", spoil)
    assert fit("--model.trainable", "layer4") == 2
    assert "has changed before training" in capsys.readouterr().err


def test_a_second_fit_keeps_the_first(fit: Fit) -> None:
    assert fit() == 0
    first = Path("runs/photos/version_0/checkpoints/best.ckpt").read_bytes()
    assert fit() == 0
    assert Path("runs/photos/version_0/checkpoints/best.ckpt").read_bytes() == first
    assert Path("runs/photos/version_1/checkpoints/best.ckpt").exists()


def test_a_run_without_a_logger_has_a_folder_all_the_same(fit: Fit) -> None:
    for number in range(2):
        assert fit("--trainer.logger", "false") == 0
        kept = sorted(str(path.relative_to("runs")) for path in Path("runs/photos").rglob("*") if path.is_file())
        assert len(kept) == 4 * (number + 1), kept
    assert "photos/version_1/config.yaml" in kept and "photos/version_1/model_card.md" in kept
    assert "photos/version_1/checkpoints/best.ckpt" in kept


def test_a_logger_of_the_users_has_the_run_in_its_folder(fit: Fit) -> None:
    assert fit("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs") == 0
    folder = Path("logs/lightning_logs/version_0")
    assert {path.name for path in folder.iterdir()} >= {"metrics.csv", "config.yaml", "checkpoints"}
    assert not Path("runs").exists()


def test_a_logger_that_lacks_something_says_what(fit: Fit, refused: Callable[[int], str]) -> None:
    assert (
        refused(fit("--trainer.logger", "CSVLogger"))
        == "error: trainer.logger: CSVLogger needs save_dir. Say it with --trainer.logger.save_dir VALUE\n"
    )
    assert "--trainer.logger.name" in refused(
        fit("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs", "--name", "mine")
    )


def test_a_logger_whose_library_is_missing_names_it(
    fit: Fit, refused: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = RequirementCache("wandb>=99999")
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", missing)
    said = refused(fit("--trainer.logger", "WandbLogger"))
    assert "Requirement 'wandb>=99999' not met" in said and "wandb" in said and said.count("\n") == 1


def test_a_checkpoint_of_the_users_does_not_hide_the_best(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    own = ["--trainer.callbacks", "ModelCheckpoint", "--trainer.callbacks.every_n_epochs", "2"]
    assert fit(*own, "--trainer.max_epochs", "2") == 0
    out = capsys.readouterr().out
    assert "best val/accuracy" in out and 'load("runs/photos/version_0/checkpoints/best.ckpt")' in out


def test_the_epoch_is_logged_where_something_else_is(fit: Fit) -> None:
    assert fit("--trainer.max_epochs", "2") == 0
    run = Path("runs/photos/version_0")
    steps = [event.step for event in scalars(run).Scalars("epoch")]
    known = {event.step for tag in ("train/loss", "val/loss") for event in scalars(run).Scalars(tag)}
    assert steps == sorted(steps) and set(steps) <= known


def test_classes_called_as_metrics_are(tmp_path: Path, fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate(("loss", "accuracy")):
        for split in ("train", "val"):
            draw(tmp_path / "odd" / split / name / "a.png", (250 * number, 9, 9), number)
            draw(tmp_path / "odd" / split / name / "b.png", (250 * number, 9, 9), number + 7)
    assert fit("--data.root", str(tmp_path / "odd")) == 0
    (line,) = (each for each in capsys.readouterr().out.splitlines() if each.startswith("Epoch 1/1: "))
    assert "_of/" not in line and "val/recall_of/loss" in scalars(Path("runs/odd/version_0")).scalars.Keys()


def test_early_stopping_is_told(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    stopping = ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "val/loss"]
    assert fit(*stopping, "--trainer.callbacks.stopping_threshold", "1000", "--trainer.max_epochs", "3") == 0
    assert "ended: early. Stopping threshold reached: val/loss" in capsys.readouterr().out


def test_images_that_are_held_out_otherwise_than_in_the_fit_are_told(
    fit: Fit, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit("--data.root", str(photos / "train")) == 0
    again = ["validate", "--ckpt_path", "best", "--data.root", str(photos / "train"), "--data.num_workers", "0"]
    capsys.readouterr()
    assert main(again) == 0
    assert "held images out otherwise" not in capsys.readouterr().out
    assert main([*again, "--data.val_fraction", "0.5"]) == 0
    assert "held images out otherwise (data.val_fraction was 0.2)" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["one a class", "two a class, of which test takes one", "one group a class"])
def test_where_nothing_can_be_held_out_it_says_why(
    kind: str, tmp_path: Path, fit: Fit, refused: Callable[[int], str]
) -> None:
    flags, lines = ["--data.root", str(tmp_path / "few")], ["path,label,group"]
    for number in range(3):
        for copy in range(1 if kind == "one a class" else 2):
            draw(tmp_path / "few" / str(number) / f"{copy}.png", (80 * number, 90 * copy, 9), number + copy)
            lines.append(f"few/{number}/{copy}.png,{number},{number}")
    if "group" in kind:
        (tmp_path / "few.csv").write_text("\n".join(lines))
        flags = ["--data.root", str(tmp_path / "few.csv")]
    said = refused(fit(*flags, "--data.test_fraction", "0" if "two" not in kind else "0.2"))
    assert "No image can be held out for val: train keeps one of each class, copies and groups stay together" in said
    assert "a folder beside train/; in a table, a column split" in said


def test_the_config_of_a_run_runs_again(fit: Fit) -> None:
    assert fit() == 0
    assert main(["fit", "-c", "runs/photos/version_0/config.yaml"]) == 0
    assert Path("runs/photos/version_1/checkpoints/best.ckpt").exists()


def test_two_fits_at_once_never_get_one_folder(tmp_path: Path) -> None:
    (tmp_path / "version_7").mkdir()
    (tmp_path / "version_x").mkdir()
    assert [reserve_version(tmp_path) for _ in range(3)] == [8, 9, 10]


def test_the_second_node_makes_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_RANK", "1")  # of Lightning's own launcher, before it knows the ranks
    assert reserve_version(tmp_path / "photos") is None and not [*tmp_path.iterdir()]


def test_name_of_the_run_can_be_given(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--name", "my [bold] one", "--trainer.default_root_dir", "elsewhere") == 0
    assert Path("elsewhere/my [bold] one/version_0/checkpoints/best.ckpt").exists()
    reload = 'load("elsewhere/my [bold] one/version_0/checkpoints/best.ckpt").predict(["a.jpg"])'
    assert reload in capsys.readouterr().out, "on one line, to be copied"


def test_checkpoint_of_resnet50_with_ten_classes_is_under_1_mb(here: Path) -> None:
    for number in range(10):
        for index in range(2):
            draw(here / "ten" / f"class{number}" / f"{index}.png", (20 * number, 100, 100), index)
    with pytest.warns(UserWarning, match="random weights"):
        code = main(
            [
                *("fit", "--model.weights", "null", "--model.image_size", "32", "--data.root", "ten"),
                *("--data.num_workers", "0", "--trainer.max_epochs", "1", "--data.val_fraction", "0.5"),
            ]
        )
    assert code == 0
    path = Path("runs/ten/version_0/checkpoints/best.ckpt")
    assert path.stat().st_size < 1_000_000
    with pytest.warns(UserWarning, match="random weights"):
        assert len(load(path).classes_) == 10


@pytest.mark.parametrize("trainable", ["head", "layer4", "all"])
def test_reloads_to_bit_equal_logits(fit: Fit, trainable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[ImageClassifier] = []
    monkeypatch.setattr(ImageClassifier, "on_fit_end", lambda self: kept.append(self), raising=False)
    assert fit("--model.trainable", trainable, "--trainer.max_epochs", "2") == 0
    path = "runs/photos/version_0/checkpoints/last.ckpt"
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = kept[0].eval()(images)
        assert torch.equal(load(path).model(images), logits)
        assert torch.equal(ImageClassifier.load_from_checkpoint(path).eval()(images), logits)
    names = torch.load(path, weights_only=True)["state_dict"].keys()
    stages = {"head": set(), "layer4": {"layer4"}, "all": {"stem", "layer1", "layer2", "layer3", "layer4"}}[trainable]
    assert {name.split(".")[2] for name in names if name.startswith("backbone")} == stages


def test_validate_gives_what_fit_gave(run: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = max(event.value for event in scalars(run).Scalars("val/accuracy"))
    flags = ["--data.root", str(photos), "--data.num_workers", "0"]
    assert main(["validate", "--ckpt_path", str(run / "checkpoints" / "best.ckpt"), *flags]) == 0
    out = capsys.readouterr().out
    assert "val/accuracy" in out and f"{best}" in out
    assert [path.name for path in run.parent.iterdir()] == ["version_0"], "validate writes no run"


def test_test_uses_the_test_split_with_the_config_of_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ckpt = str(run / "checkpoints" / "best.ckpt")
    assert main(["test", "-c", str(run / "config.yaml"), "--ckpt_path", ckpt]) == 0
    assert "test/accuracy" in capsys.readouterr().out


def test_predict_writes_a_row_an_image(run: Path, photos: Path) -> None:
    ckpt = str(run / "checkpoints" / "best.ckpt")
    flags = ["--data.predict", str(photos / "test"), "--data.num_workers", "0", "--output", "out/p.csv"]
    assert main(["predict", "--ckpt_path", ckpt, *flags]) == 0
    with Path("out/p.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [str(path) for path in sorted((photos / "test").rglob("*.png"))]
    assert all(row["predicted"] == Path(row["path"]).parent.name for row in rows)
    for row in rows:
        values = [float(row[key]) for key in ("probability", "top2_probability", "top3_probability")]
        assert values == sorted(values, reverse=True)
        assert sum(values) == pytest.approx(1, abs=1e-4)
    probabilities = load(ckpt).predict_proba([row["path"] for row in rows])
    assert [f"{value:.6f}" for value in probabilities.max(1)] == [row["probability"] for row in rows]
    assert [path.name for path in Path("out").iterdir()] == ["p.csv"], "no temporary file is left"


def test_flags_beat_the_checkpoints_hyper_parameters(run: Path, fit: Fit) -> None:
    last = str(run / "checkpoints" / "last.ckpt")
    flags = ["--model.optimizer", "AdamW", "--model.optimizer.lr", "0.002", "--trainer.max_epochs", "4"]
    assert fit("--ckpt_path", last, "--model.label_smoothing", "0.1", *flags) == 0
    resumed = Path("runs/photos/version_1")
    kept = torch.load(resumed / "checkpoints" / "last.ckpt", weights_only=True)
    assert kept["hyper_parameters"]["label_smoothing"] == 0.1
    assert kept["epoch"] == 3
    assert kept["optimizer_states"][0]["param_groups"][0]["lr"] == 0.002
    assert scalars(resumed).Scalars("lr-AdamW/head")[0].value == pytest.approx(0.002)


def test_a_resume_without_flags_takes_all_from_the_checkpoint(run: Path, photos: Path) -> None:
    last = str(run / "checkpoints" / "last.ckpt")
    data = ["--data.root", str(photos), "--data.num_workers", "0", "--trainer.max_epochs", "4"]
    assert main(["fit", "--ckpt_path", last, *data]) == 0
    config = yaml.safe_load(Path("runs/photos/version_1/config.yaml").read_text())
    assert config["model"]["backbone"] == "resnet18"
    assert config["model"]["optimizer"]["init_args"]["lr"] == 0.01


def test_a_checkpoint_named_in_a_config_file_gives_its_hyper_parameters_too(run: Path, photos: Path) -> None:
    settings = {"ckpt_path": str(run / "checkpoints/best.ckpt"), "data": {"root": str(photos), "num_workers": 0}}
    Path("mine.yaml").write_text(yaml.safe_dump(settings))
    assert main(["validate", "-c", "mine.yaml"]) == 0


def test_one_argument_of_the_checkpoints_scheduler_can_be_changed(fit: Fit) -> None:
    scheduler = ["--model.scheduler", "StepLR", "--model.scheduler.step_size", "1", "--model.scheduler.gamma", "0.5"]
    assert fit(*scheduler, "--trainer.max_epochs", "2") == 0
    last = "runs/photos/version_0/checkpoints/last.ckpt"
    assert fit("--ckpt_path", last, "--model.scheduler.gamma", "0.1", "--trainer.max_epochs", "4") == 0
    kept = torch.load("runs/photos/version_1/checkpoints/last.ckpt", weights_only=True)
    assert kept["hyper_parameters"]["scheduler"]["init_args"]["gamma"] == kept["lr_schedulers"][0]["gamma"] == 0.1
    rates = [event.value for event in scalars(Path("runs/photos/version_1")).Scalars("lr-ArticleSGD/head")]
    assert rates[1] / rates[0] == pytest.approx(0.1, rel=1e-4)


def test_compiled_as_one_graph_a_half(
    fit: Fit, photos: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Full, last and evaluation batches differ in size: compiled stage by stage, they ran over dynamo's cache limit.
    # That is dynamo's, so inductor, which takes 40 s, is left out.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    with caplog.at_level("WARNING"):
        flags = ["--model.compile", "true", "--data.batch_size", "7", "--trainer.max_epochs", "2"]
        assert fit(*flags, "--model.trainable", "layer4") == 0
    assert not [record for record in caplog.records if "recompile" in record.getMessage()]


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("32-true", torch.float32)])
@pytest.mark.parametrize("cache", ["on", "off"])
def test_precision_on_cpu(precision: str, dtype: torch.dtype, cache: str, fit: Fit, products: set[torch.dtype]) -> None:
    assert fit("--trainer.precision", precision, "--features.cache", cache) == 0
    assert products == {dtype}


def test_options_of_loss_and_scheduler(fit: Fit) -> None:
    scheduler = ["--model.scheduler", "CosineAnnealingLR", "--model.scheduler.T_max", "2"]
    head = ["--model.head", "project.models.heads.MLPHead", "--model.head.hidden", "8"]
    loss = ["--model.label_smoothing", "0.1", "--model.class_weights", "[1, 2, 3]", "--data.augment", "standard"]
    assert fit("--trainer.max_epochs", "2", *scheduler, *head, *loss) == 0
    rates = [event.value for event in scalars(Path("runs/photos/version_0")).Scalars("lr-ArticleSGD/head")]
    assert rates[0] == pytest.approx(0.001) and rates[-1] < 0.001
    assert load("runs/photos/version_0/checkpoints/last.ckpt").model.head[1].out_features == 8


#: Those of published sets run in tests/data/test_published.py, on small copies of the sets.
CONFIGS = [path for path in sorted(Path("configs").resolve().glob("*.yaml")) if "torchvision" not in path.read_text()]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_runs(config: Path, fit: Fit, photos: Path, weights: Path) -> None:
    flags = ["--trainer.accelerator", "cpu", "--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1"]
    if config.stem == "quickstart":  # whole as it is, but for the length
        assert main(["fit", "-c", str(config), *flags, "--trainer.max_epochs", "1", "--data.num_workers", "0"]) == 0
    else:  # on a small network that needs no download
        assert (
            fit(
                "-c",
                str(config),
                "--model.backbone",
                "resnet18",
                "--model.weights",
                str(weights),
                "--data.root",
                str(photos),
                *flags,
            )
            == 0
        )


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_every_flag_is_documented(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([verb, "--help"])
    out = capsys.readouterr().out
    flags = [line for line in out.splitlines() if line.strip().startswith(("--model.", "--data."))]
    assert len(flags) > 20
    lines = out.splitlines()
    for line in flags:
        following = lines[lines.index(line) + 1] if lines.index(line) + 1 < len(lines) else ""
        words = line.strip().split(maxsplit=1)
        assert len(words) > 1 or not following.strip().startswith("--"), f"{words[0]} has no help"
