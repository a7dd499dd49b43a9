"""Every callback, trainer flag, logger and profiler of Lightning works, or is refused with an alternative."""

import inspect
from collections.abc import Callable, Sequence

import lightning.pytorch.callbacks as lightning_callbacks
import lightning.pytorch.loggers as lightning_loggers
import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.tuner import Tuner

from project.classifier import ImageClassifier
from project.data.datamodule import ImageDataModule
from project.errors import ConfigError

Fit = Callable[..., int]
CALLBACK = "lightning.pytorch.callbacks"
#: Required arguments of callbacks.
ARGUMENTS: dict[str, Sequence[str]] = {
    "EarlyStopping": ["monitor=val/loss"],
    "GradientAccumulationScheduler": ["scheduling={0: 2}"],
    "ModelPruning": ["pruning_fn=l1_unstructured"],
    "OnExceptionCheckpoint": ["dirpath=here"],
    "StochasticWeightAveraging": ["swa_lrs=0.01"],
    "Timer": ["interval=epoch"],
}
#: Refused callbacks, with a text of the message.
REFUSED = {
    "BackboneFinetuning": "Use --model.schedule '{0: head, 3: layer4}'",
    "EMAWeightAveraging": "Use --model.ema 0.999 instead",
    "LearningRateFinder": "Use fit --lr_find",
    "ModelPruning": "would change frozen weights",
    "StochasticWeightAveraging": "Use --model.ema 0.999 instead",
    "WeightAveraging": "Use --model.ema 0.999 instead",
}
#: Abstract callbacks, and those whose arguments are functions.
SKIPPED = {"BaseFinetuning", "Callback", "LambdaCallback", "ThroughputMonitor"}
#: Trainer flags: value, and a text of the message if it is refused.
TRAINER_FLAGS: dict[str, tuple[Sequence[str], str]] = {
    "barebones": (["true"], "trainer.barebones is not supported"),
    "limit_train_batches": (["0.5"], "0.5"),
    "val_check_interval": (["100"], "val_check_interval"),
    "devices": (["0"], "devices"),
    "strategy": (["fsdp"], "requires a GPU"),
    "plugins": (["x"], "trainer.plugins"),
    "precision": (["bf16-true"], "Use bf16-mixed"),
    "detect_anomaly": (["true"], ""),
    "fast_dev_run": (["true"], ""),
    "overfit_batches": (["1"], ""),
    "limit_val_batches": (["0"], ""),
    "max_steps": (["3"], ""),
    "min_epochs": (["1"], ""),
    "min_steps": (["1"], ""),
    "max_time": (["00:00:01:00"], ""),
    "deterministic": (["warn"], ""),
    "benchmark": (["true"], ""),
    "gradient_clip_val": (["0.5", "--trainer.gradient_clip_algorithm", "value"], ""),
    "accumulate_grad_batches": (["2"], ""),
    "num_sanity_val_steps": (["2"], ""),
    "reload_dataloaders_every_n_epochs": (["1"], ""),
    "inference_mode": (["false"], ""),
    "use_distributed_sampler": (["false"], ""),
    "sync_batchnorm": (["true", "--model.backbone", "resnet18", "--model.weights", "null"], ""),  # not with timm
    "enable_model_summary": (["true"], ""),
    "enable_checkpointing": (["false"], ""),
    "enable_autolog_hparams": (["false"], ""),
    "check_val_every_n_epoch": (["2"], ""),
    "log_every_n_steps": (["1"], ""),
    "model_registry": (["x"], ""),
}
OPTIMIZERS = {
    "sparse": (["SparseAdam"], "SparseAdam needs sparse gradients"),
    "two-dimensional": (["torch.optim.Muon"], "Muon only supports 2D parameters"),
    "fused, scaled and clipped": (
        [
            *("AdamW", "--model.optimizer.fused", "true", "--trainer.precision", "16-mixed"),
            "--trainer.gradient_clip_val=1",
        ],
        "does not allow for gradient clipping",
    ),
}
#: Loggers that need an account or a library; tests/reporting covers the installed ones.
COVERED_ELSEWHERE = {"CometLogger", "MLFlowLogger", "NeptuneLogger", "WandbLogger", "LitLogger"}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", sorted(set(lightning_callbacks.__all__) - SKIPPED - {"BatchSizeFinder"}))
def test_callback_works_or_is_refused(name: str, fit: Fit, refused: Callable[[int], str]) -> None:
    arguments = [f"--trainer.callbacks.{argument}" for argument in ARGUMENTS.get(name, ())]
    code = fit(f"--trainer.callbacks+={CALLBACK}.{name}", *arguments)
    if name in REFUSED:
        message = refused(code)
        assert f"trainer.callbacks: {name} " in message and REFUSED[name] in message
    else:
        assert code == 0


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", TRAINER_FLAGS)
def test_trainer_flag_works_or_is_refused(name: str, fit: Fit, refused: Callable[[int], str]) -> None:
    values, text = TRAINER_FLAGS[name]
    code = fit(f"--trainer.{name}", *values)
    assert text in refused(code) if text else code == 0


def test_every_trainer_flag_is_covered() -> None:
    covered = {
        *TRAINER_FLAGS,
        "accelerator",
        "num_nodes",
        "logger",
        "callbacks",
        "max_epochs",
        "default_root_dir",
        "profiler",
    }
    covered |= {"enable_progress_bar", "gradient_clip_algorithm", "limit_test_batches", "limit_predict_batches"}
    assert covered == set(inspect.signature(Trainer).parameters)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_unsupported_optimizer_is_refused(name: str, fit: Fit, refused: Callable[[int], str]) -> None:
    flags, text = OPTIMIZERS[name]
    assert text in refused(fit("--model.optimizer", *flags))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["simple", "advanced", "pytorch", "PassThroughProfiler"])
def test_profiler_works(name: str, fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--trainer.profiler", f"lightning.pytorch.profilers.{name}" if name[0].isupper() else name) == 0
    capsys.readouterr()


@pytest.mark.parametrize("name", sorted(set(lightning_loggers.__all__) - COVERED_ELSEWHERE - {"Logger"}))
def test_logger_works(name: str, fit: Fit) -> None:
    assert fit("--trainer.logger", f"lightning.pytorch.loggers.{name}", "--trainer.logger.save_dir", "logs") == 0


@pytest.mark.filterwarnings("ignore:model.weights is null")
def test_tuner_is_refused_in_python(here: object, photos: object) -> None:
    model = ImageClassifier("resnet18", None, image_size=32)
    with pytest.raises(ConfigError, match="LearningRateFinder needs a learning_rate attribute"):
        Tuner(Trainer(max_epochs=1, accelerator="cpu", logger=False)).lr_find(
            model, datamodule=ImageDataModule(str(photos), num_workers=0)
        )
