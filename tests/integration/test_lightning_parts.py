"""Every callback, flag, logger and profiler of Lightning works, or is refused by name with the way that works."""

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
#: Arguments that a callback needs.
ARGUMENTS: dict[str, Sequence[str]] = {
    "EarlyStopping": ["monitor=val/loss"],
    "GradientAccumulationScheduler": ["scheduling={0: 2}"],
    "ModelPruning": ["pruning_fn=l1_unstructured"],
    "OnExceptionCheckpoint": ["dirpath=here"],
    "StochasticWeightAveraging": ["swa_lrs=0.01"],
    "Timer": ["interval=epoch"],
}
#: Words of the refusal.
REFUSED = {
    "BackboneFinetuning": "Use --model.trainable layer4",
    "EMAWeightAveraging": "averages weights from before there is a head",
    "LearningRateFinder": "Set --model.optimizer.lr",
    "ModelPruning": "would change frozen weights",
    "StochasticWeightAveraging": "averages weights from before there is a head",
    "WeightAveraging": "averages weights from before there is a head",
}
#: Abstract, or made of a function, which no flag can give.
NOT_TRIED = {"BaseFinetuning", "Callback", "LambdaCallback", "ThroughputMonitor"}
#: The trainer's flags, with the refusal where there is one.
FLAGS: dict[str, tuple[Sequence[str], str]] = {
    "barebones": (["true"], "trainer.barebones leaves out the log and the checkpoints"),
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
    "sync_batchnorm": (["true"], ""),
    "enable_model_summary": (["true"], ""),
    "enable_checkpointing": (["false"], ""),
    "enable_autolog_hparams": (["false"], ""),
    "check_val_every_n_epoch": (["2"], ""),
    "log_every_n_steps": (["1"], ""),
    "model_registry": (["x"], ""),
}
OPTIMIZERS = {
    "sparse": (["SparseAdam"], "SparseAdam takes sparse gradients alone"),
    "two-dimensional": (["torch.optim.Muon"], "Muon only supports 2D parameters"),
    "fused, scaled and clipped": (
        [
            *("AdamW", "--model.optimizer.fused", "true", "--trainer.precision", "16-mixed"),
            "--trainer.gradient_clip_val=1",
        ],
        "does not allow for gradient clipping",
    ),
}
#: Loggers that need an account or a library; those that are installed are tried in tests/reporting.
ELSEWHERE = {"CometLogger", "MLFlowLogger", "NeptuneLogger", "WandbLogger", "LitLogger"}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", sorted(set(lightning_callbacks.__all__) - NOT_TRIED - {"BatchSizeFinder"}))
def test_a_callback(name: str, fit: Fit, refused: Callable[[int], str]) -> None:
    more = [f"--trainer.callbacks.{argument}" for argument in ARGUMENTS.get(name, ())]
    code = fit(f"--trainer.callbacks+={CALLBACK}.{name}", *more)
    if name in REFUSED:
        said = refused(code)
        assert f"trainer.callbacks: {name} " in said and REFUSED[name] in said
    else:
        assert code == 0


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_of_the_trainer(name: str, fit: Fit, refused: Callable[[int], str]) -> None:
    values, words = FLAGS[name]
    code = fit(f"--trainer.{name}", *values)
    assert words in refused(code) if words else code == 0


def test_every_flag_is_tried() -> None:
    tried = {*FLAGS, "accelerator", "num_nodes", "logger", "callbacks", "max_epochs", "default_root_dir", "profiler"}
    tried |= {"enable_progress_bar", "gradient_clip_algorithm", "limit_test_batches", "limit_predict_batches"}
    assert tried == set(inspect.signature(Trainer).parameters)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_that_cannot_train_this(name: str, fit: Fit, refused: Callable[[int], str]) -> None:
    flags, words = OPTIMIZERS[name]
    assert words in refused(fit("--model.optimizer", *flags))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["simple", "advanced", "pytorch", "PassThroughProfiler"])
def test_a_profiler(name: str, fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--trainer.profiler", f"lightning.pytorch.profilers.{name}" if name[0].isupper() else name) == 0
    capsys.readouterr()


@pytest.mark.parametrize("name", sorted(set(lightning_loggers.__all__) - ELSEWHERE - {"Logger"}))
def test_a_logger(name: str, fit: Fit) -> None:
    assert fit("--trainer.logger", f"lightning.pytorch.loggers.{name}", "--trainer.logger.save_dir", "logs") == 0


@pytest.mark.filterwarnings("ignore:model.weights is null")
def test_the_tuner_is_refused_from_python_too(here: object, photos: object) -> None:
    model = ImageClassifier("resnet18", None, image_size=32)
    with pytest.raises(ConfigError, match="LearningRateFinder looks for a learning rate"):
        Tuner(Trainer(max_epochs=1, accelerator="cpu", logger=False)).lr_find(
            model, datamodule=ImageDataModule(str(photos), num_workers=0)
        )
