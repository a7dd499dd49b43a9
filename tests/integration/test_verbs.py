"""End-to-end tests of the command line, on generated images."""

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
from project.models.loading import load_backbone
from tests.conftest import BACKBONE, FEATURES, draw, scalars

Fit = Callable[..., int]


def test_run_folder_has_config_checkpoints_and_events(trained: Path) -> None:
    assert sorted(path.name for path in (trained / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    assert yaml.safe_load((trained / "config.yaml").read_text())["model"]["backbone"] == BACKBONE
    assert list(trained.glob("events.out.tfevents.*"))
    assert [path.name for path in trained.parents[2].iterdir()] == ["runs"], "nothing is written outside runs/"


def test_dashboard_has_loss_metrics_learning_rate_throughput_and_parameter_counts(trained: Path) -> None:
    events = scalars(trained)
    expected = {
        *("train/loss", "train/accuracy", "val/loss", "val/accuracy", "val/f1", "val/ece", "lr-AdamW/head"),
        *("train/images_per_second", "parameters/trainable", "parameters/frozen"),
        *(f"val/recall_of/{name}" for name in ("blue", "green", "red")),
    }
    assert expected <= set(events.Tags()["scalars"])
    assert [event.value for event in events.Scalars("parameters/trainable")] == [FEATURES * 3 + 3]
    assert len(events.Scalars("val/accuracy")) == 3
    assert events.Scalars("lr-AdamW/head")[0].value == pytest.approx(0.01)
    assert "SHA-256" in str(events.Tensors("frozen/text_summary")[0].tensor_proto.string_val)


def test_fit_learns_to_classify_colours(trained: Path) -> None:
    assert max(event.value for event in scalars(trained).Scalars("val/accuracy")) == 1.0


def test_frozen_backbone_is_bit_identical_after_fit(trained: Path, weights: Path) -> None:
    pretrained = load_backbone(BACKBONE, str(weights))
    checkpoint = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["transfer"]["frozen"] == {
        "stages": ["stem", "layer1", "layer2", "layer3", "layer4"],
        "sha256": pretrained.sha256,
    }
    assert checkpoint["transfer"]["backbone"]["sha256"] == pretrained.sha256


def test_fit_prints_the_fingerprint_before_and_after_and_the_result(
    fit: Fit, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit() == 0
    out = capsys.readouterr().out
    checkpoint = torch.load("runs/photos/version_0/checkpoints/last.ckpt", weights_only=True)
    text = "".join(character for character in out if character not in "│\n ")
    assert text.count(checkpoint["transfer"]["frozen"]["sha256"]) == 2
    for words in ("best val/accuracy", "runs/photos/version_0/checkpoints/best.ckpt", "load(", "images/s", "unchanged"):
        assert words.replace(" ", "") in text


def test_change_of_frozen_stages_during_training_is_an_error(
    fit: Fit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def modify(self: ImageClassifier) -> None:
        self.backbone.stages["layer2"][0][0].bn1.running_mean += 1e-3

    monkeypatch.setattr(ImageClassifier, "on_train_epoch_start", modify)
    assert fit() == 2
    assert f"frozen stages of {BACKBONE} changed during training" in capsys.readouterr().err


def test_change_of_frozen_stages_before_training_is_an_error(
    fit: Fit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def modify(self: ImageClassifier, stage: str) -> None:
        setup(self, stage)
        with torch.no_grad():
            self.backbone.stages["layer1"][0][0].conv1.weight[0, 0, 0, 0] += 1e-6

    setup = ImageClassifier.setup
    monkeypatch.setattr(ImageClassifier, "setup", modify)
    assert fit("--model.trainable", "layer4") == 2
    assert "changed before training" in capsys.readouterr().err


def test_second_fit_does_not_overwrite_the_first(fit: Fit) -> None:
    assert fit() == 0
    first = Path("runs/photos/version_0/checkpoints/best.ckpt").read_bytes()
    assert fit() == 0
    assert Path("runs/photos/version_0/checkpoints/best.ckpt").read_bytes() == first
    assert Path("runs/photos/version_1/checkpoints/best.ckpt").exists()


def test_run_without_logger_has_a_folder(fit: Fit) -> None:
    for number in range(2):
        assert fit("--trainer.logger", "false") == 0
        files = sorted(str(path.relative_to("runs")) for path in Path("runs/photos").rglob("*") if path.is_file())
        assert len(files) == 4 * (number + 1), files
    assert "photos/version_1/config.yaml" in files and "photos/version_1/model_card.md" in files
    assert "photos/version_1/checkpoints/best.ckpt" in files


def test_user_logger_sets_the_run_folder(fit: Fit) -> None:
    assert fit("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs") == 0
    folder = Path("logs/lightning_logs/version_0")
    assert {path.name for path in folder.iterdir()} >= {"metrics.csv", "config.yaml", "checkpoints"}
    assert not Path("runs").exists()


def test_logger_with_missing_or_conflicting_arguments_is_rejected(fit: Fit, refused: Callable[[int], str]) -> None:
    assert (
        refused(fit("--trainer.logger", "CSVLogger"))
        == "error: trainer.logger: CSVLogger needs save_dir. Set --trainer.logger.save_dir VALUE\n"
    )
    assert "--trainer.logger.name" in refused(
        fit("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs", "--name", "mine")
    )


def test_logger_with_missing_library_names_it(
    fit: Fit, refused: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = RequirementCache("wandb>=99999")
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", missing)
    message = refused(fit("--trainer.logger", "WandbLogger"))
    assert "Requirement 'wandb>=99999' not met" in message and message.count("\n") == 1


def test_user_model_checkpoint_does_not_replace_the_best_checkpoint(
    fit: Fit, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = ["--trainer.callbacks", "ModelCheckpoint", "--trainer.callbacks.every_n_epochs", "2"]
    assert fit(*callback, "--trainer.max_epochs", "2") == 0
    out = capsys.readouterr().out
    assert "best val/accuracy" in out and 'load("runs/photos/version_0/checkpoints/best.ckpt")' in out


def test_epoch_is_logged_only_at_steps_of_other_metrics(fit: Fit) -> None:
    assert fit("--trainer.max_epochs", "2") == 0
    run = Path("runs/photos/version_0")
    steps = [event.step for event in scalars(run).Scalars("epoch")]
    metric_steps = {event.step for tag in ("train/loss", "val/loss") for event in scalars(run).Scalars(tag)}
    assert steps == sorted(steps) and set(steps) <= metric_steps


def test_class_names_equal_to_metric_names(tmp_path: Path, fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate(("loss", "accuracy")):
        for split in ("train", "val"):
            draw(tmp_path / "odd" / split / name / "a.png", (250 * number, 9, 9), number)
            draw(tmp_path / "odd" / split / name / "b.png", (250 * number, 9, 9), number + 7)
    assert fit("--data.root", str(tmp_path / "odd")) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("Epoch 1/1: "))
    assert "_of/" not in line and "val/recall_of/loss" in scalars(Path("runs/odd/version_0")).scalars.Keys()


def test_early_stopping_is_reported(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    stopping = ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "val/loss"]
    assert fit(*stopping, "--trainer.callbacks.stopping_threshold", "1000", "--trainer.max_epochs", "3") == 0
    assert "stopped early: Stopping threshold reached: val/loss" in capsys.readouterr().out


def test_validate_warns_about_different_split_settings(
    fit: Fit, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit("--data.root", str(photos / "train")) == 0
    validate = ["validate", "--ckpt_path", "best", "--data.root", str(photos / "train"), "--data.num_workers", "0"]
    capsys.readouterr()
    assert main(validate) == 0
    assert "different split settings" not in capsys.readouterr().out
    assert main([*validate, "--data.val_fraction", "0.5"]) == 0
    assert "different split settings (data.val_fraction was 0.2)" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["one image per class", "two images per class", "one group per class"])
def test_data_set_too_small_for_a_split_is_rejected(
    kind: str, tmp_path: Path, fit: Fit, refused: Callable[[int], str]
) -> None:
    flags, lines = ["--data.root", str(tmp_path / "few")], ["path,label,group"]
    for number in range(3):
        for copy in range(1 if kind == "one image per class" else 2):
            draw(tmp_path / "few" / str(number) / f"{copy}.png", (80 * number, 90 * copy, 9), number + copy)
            lines.append(f"few/{number}/{copy}.png,{number},{number}")
    if "group" in kind:
        (tmp_path / "few.csv").write_text("\n".join(lines))
        flags = ["--data.root", str(tmp_path / "few.csv")]
    message = refused(fit(*flags, "--data.test_fraction", "0.2" if kind == "two images per class" else "0"))
    assert "too small for a val split: train keeps an image of each class, and near-duplicates and groups" in message
    assert "a folder beside train/, or a split column in the table" in message


def test_saved_config_reproduces_the_run(fit: Fit) -> None:
    assert fit() == 0
    assert main(["fit", "-c", "runs/photos/version_0/config.yaml"]) == 0
    assert Path("runs/photos/version_1/checkpoints/best.ckpt").exists()


def test_reserved_versions_are_unique(tmp_path: Path) -> None:
    (tmp_path / "version_7").mkdir()
    (tmp_path / "version_x").mkdir()
    assert [reserve_version(tmp_path) for _ in range(3)] == [8, 9, 10]


def test_second_node_reserves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_RANK", "1")  # set by the launcher, before ranks are known
    assert reserve_version(tmp_path / "photos") is None and not [*tmp_path.iterdir()]


def test_name_sets_the_run_folder(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--name", "my [bold] one", "--trainer.default_root_dir", "elsewhere") == 0
    assert Path("elsewhere/my [bold] one/version_0/checkpoints/best.ckpt").exists()
    reload = 'load("elsewhere/my [bold] one/version_0/checkpoints/best.ckpt").predict(["a.jpg"])'
    assert reload in capsys.readouterr().out, "on a single line, so that it can be copied"


def test_home_folder_of_the_runs_is_expanded(
    fit: Fit, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shell does not expand ``--trainer.default_root_dir=~/mine``, nor a config."""
    monkeypatch.setenv("HOME", str(here / "home"))
    assert fit("--trainer.default_root_dir=~/mine") == 0
    run = here / "home/mine/photos/version_0"
    assert (run / "checkpoints/best.ckpt").is_file() and [*run.glob("events*")]
    assert not (here / "~").exists()
    assert fit("--trainer.default_root_dir=~/mine", "--ckpt_path", "last", "--trainer.max_epochs", "2") == 0
    assert f"Checkpoint: {run}/checkpoints/last.ckpt" in capsys.readouterr().out


def test_checkpoint_of_resnet50_with_ten_classes_is_smaller_than_1_mb(here: Path) -> None:
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
def test_restored_checkpoint_gives_bit_identical_logits(
    fit: Fit, trainable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[ImageClassifier] = []
    monkeypatch.setattr(ImageClassifier, "on_fit_end", lambda self: models.append(self), raising=False)
    assert fit("--model.trainable", trainable, "--trainer.max_epochs", "2") == 0
    path = "runs/photos/version_0/checkpoints/last.ckpt"
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = models[0].eval()(images)
        assert torch.equal(load(path).model(images), logits)
        assert torch.equal(ImageClassifier.load_from_checkpoint(path).eval()(images), logits)
    names = torch.load(path, weights_only=True)["state_dict"].keys()
    stages = {"head": set(), "layer4": {"layer4"}, "all": {"stem", "layer1", "layer2", "layer3", "layer4"}}[trainable]
    assert {name.split(".")[2] for name in names if name.startswith("backbone")} == stages


def test_validate_reproduces_the_metrics_of_fit(run: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = max(event.value for event in scalars(run).Scalars("val/accuracy"))
    flags = ["--data.root", str(photos), "--data.num_workers", "0"]
    assert main(["validate", "--ckpt_path", str(run / "checkpoints" / "best.ckpt"), *flags]) == 0
    out = capsys.readouterr().out
    assert "val/accuracy" in out and f"{best}" in out
    assert [path.name for path in run.parent.iterdir()] == ["version_0"], "validate creates no run folder"


def test_test_verb_runs_with_the_config_of_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ckpt = str(run / "checkpoints" / "best.ckpt")
    assert main(["test", "-c", str(run / "config.yaml"), "--ckpt_path", ckpt]) == 0
    assert "test/accuracy" in capsys.readouterr().out


def test_predict_writes_one_row_per_image(run: Path, photos: Path) -> None:
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
    # Not bit-identical, as batches of another size are summed in another order.
    assert [float(row["probability"]) for row in rows] == pytest.approx(probabilities.max(1).tolist(), abs=2e-6)
    assert all(row["error"] == "" for row in rows)
    assert [path.name for path in Path("out").iterdir()] == ["p.csv"], "no temporary file remains"


def test_flags_override_the_hyper_parameters_of_the_checkpoint(run: Path, fit: Fit) -> None:
    last = str(run / "checkpoints" / "last.ckpt")
    flags = ["--model.optimizer", "AdamW", "--model.optimizer.lr", "0.002", "--trainer.max_epochs", "4"]
    assert fit("--ckpt_path", last, "--model.label_smoothing", "0.1", *flags) == 0
    resumed = Path("runs/photos/version_1")
    checkpoint = torch.load(resumed / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["label_smoothing"] == 0.1
    assert checkpoint["epoch"] == 3
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] == 0.002
    assert scalars(resumed).Scalars("lr-AdamW/head")[0].value == pytest.approx(0.002)


def test_resume_without_flags_uses_the_hyper_parameters_of_the_checkpoint(run: Path, photos: Path) -> None:
    last = str(run / "checkpoints" / "last.ckpt")
    data = ["--data.root", str(photos), "--data.num_workers", "0", "--trainer.max_epochs", "4"]
    assert main(["fit", "--ckpt_path", last, *data]) == 0
    config = yaml.safe_load(Path("runs/photos/version_1/config.yaml").read_text())
    assert config["model"]["backbone"] == BACKBONE
    assert config["model"]["optimizer"]["init_args"]["lr"] == 0.01


def test_ckpt_path_in_a_config_file_sets_the_hyper_parameters(run: Path, photos: Path) -> None:
    settings = {"ckpt_path": str(run / "checkpoints/best.ckpt"), "data": {"root": str(photos), "num_workers": 0}}
    Path("mine.yaml").write_text(yaml.safe_dump(settings))
    assert main(["validate", "-c", "mine.yaml"]) == 0


def test_resume_can_change_one_scheduler_argument(fit: Fit) -> None:
    scheduler = ["--model.scheduler", "StepLR", "--model.scheduler.step_size", "1", "--model.scheduler.gamma", "0.5"]
    assert fit(*scheduler, "--trainer.max_epochs", "2") == 0
    last = "runs/photos/version_0/checkpoints/last.ckpt"
    assert fit("--ckpt_path", last, "--model.scheduler.gamma", "0.1", "--trainer.max_epochs", "4") == 0
    checkpoint = torch.load("runs/photos/version_1/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["scheduler"]["init_args"]["gamma"] == 0.1
    assert checkpoint["lr_schedulers"][0]["gamma"] == 0.1
    rates = [event.value for event in scalars(Path("runs/photos/version_1")).Scalars("lr-ArticleSGD/head")]
    assert rates[1] / rates[0] == pytest.approx(0.1, rel=1e-4)


def test_compiled_backbone_does_not_exceed_the_recompile_limit(
    fit: Fit, photos: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Batch sizes differ: compiled stage by stage, they exceeded dynamo's cache limit.
    # The eager backend is enough to test that; inductor takes 40 s.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    with caplog.at_level("WARNING"):
        flags = ["--model.compile", "true", "--data.batch_size", "7", "--trainer.max_epochs", "2"]
        assert fit(*flags, "--model.trainable", "layer4") == 0
    assert not [record for record in caplog.records if "recompile" in record.getMessage()]


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("32-true", torch.float32)])
@pytest.mark.parametrize("cache", ["on", "off"])
def test_precision_sets_the_dtype_of_matrix_products(
    precision: str, dtype: torch.dtype, cache: str, fit: Fit, products: set[torch.dtype]
) -> None:
    assert fit("--trainer.precision", precision, "--features.cache", cache) == 0
    assert products == {dtype}


def test_loss_scheduler_and_head_options(fit: Fit) -> None:
    scheduler = ["--model.scheduler", "CosineAnnealingLR", "--model.scheduler.T_max", "2"]
    head = ["--model.head", "project.models.heads.MLPHead", "--model.head.hidden", "8"]
    loss = ["--model.label_smoothing", "0.1", "--model.class_weights", "[1, 2, 3]", "--data.augment", "standard"]
    assert fit("--trainer.max_epochs", "2", *scheduler, *head, *loss) == 0
    rates = [event.value for event in scalars(Path("runs/photos/version_0")).Scalars("lr-ArticleSGD/head")]
    assert rates[0] == pytest.approx(0.001) and rates[-1] < 0.001
    assert load("runs/photos/version_0/checkpoints/last.ckpt").model.head[1].out_features == 8


#: Configs of published data sets are tested with small copies of these sets in tests/data/sources.
CONFIGS = [path for path in sorted(Path("configs").resolve().glob("*.yaml")) if "torchvision" not in path.read_text()]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_runs(config: Path, fit: Fit, photos: Path, weights: Path) -> None:
    flags = ["--trainer.accelerator", "cpu", "--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1"]
    if config.stem in ("quickstart", "digits"):  # unchanged except that they read two batches of images
        flags += ["--trainer.max_epochs", "1", "--data.num_workers", "0", "--features.cache", "off"]
        assert main(["fit", "-c", str(config), *flags]) == 0
    else:  # with a small network that needs no download
        model = ["--model.backbone", BACKBONE, "--model.weights", str(weights)]
        assert fit("-c", str(config), *model, "--data.root", str(photos), *flags) == 0


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
