"""Contract tests of the private and undocumented Lightning API in lightning_internals."""

import ast
import importlib
import inspect
import pkgutil
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies.launchers import subprocess_script
from torch.utils.data import DataLoader, TensorDataset

import project
from project.runtime import lightning_internals
from project.runtime.lightning_internals import Progress

CHANGED = f"Lightning {pl.__version__} has changed what project/runtime/lightning_internals.py relies on: "
BATCHES = 4


class TinyModel(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.layer(batch[0]).square().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val"}}


class TinyData(pl.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.ones(BATCHES, 2)), num_workers=0)

    val_dataloader = train_dataloader


class Recorder(Callback):
    """Calls a function of the trainer in each hook, and records the results."""

    def __init__(self, **hooks: Any) -> None:
        self.results: dict[str, list[Any]] = {name: [] for name in hooks}
        for name, function in hooks.items():
            setattr(self, name, self._hook(name, function))

    def _hook(self, name: str, function: Any) -> Any:
        return lambda trainer, *args: self.results[name].append(function(trainer))


@pytest.fixture
def trainer(tmp_path: Path) -> Any:
    def make(*callbacks: Callback, **options: Any) -> pl.Trainer:
        defaults: dict[str, Any] = {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "logger": False}
        silent = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        return pl.Trainer(**defaults | silent | {"default_root_dir": tmp_path, "callbacks": [*callbacks]} | options)

    return make


pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*isinstance.treespec.*")


class Parameterless(TinyModel):
    def __init__(self) -> None:
        super().__init__()
        self.layer.requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return []


def run_fit(trainer: Any, *callbacks: Callback, ckpt_path: Any = None, **options: Any) -> pl.Trainer:
    fit_trainer: pl.Trainer = trainer(*callbacks, num_sanity_val_steps=0, **options)
    fit_trainer.fit(TinyModel(), datamodule=TinyData(), ckpt_path=ckpt_path, weights_only=True)
    return fit_trainer


def test_training_batches_are_counted_before_and_after_each(trainer: Any) -> None:
    recorder = Recorder(
        on_train_batch_start=lightning_internals.training_batches,
        on_train_batch_end=lightning_internals.training_batches,
    )
    run_fit(trainer, recorder, max_epochs=1)
    assert recorder.results == {
        "on_train_batch_start": [Progress(n + 1, n, n) for n in range(BATCHES)],
        "on_train_batch_end": [Progress(n + 1, n + 1, n) for n in range(BATCHES)],
    }, f"{CHANGED}fit_loop.epoch_loop.batch_progress"


def test_epochs_are_counted(trainer: Any) -> None:
    recorder = Recorder(on_train_batch_start=lightning_internals.epochs, on_train_end=lightning_internals.epochs)
    run_fit(trainer, recorder)
    expected = [Progress(epoch + 1, epoch, epoch) for epoch in range(2) for _ in range(BATCHES)]
    assert recorder.results["on_train_batch_start"] == expected, f"{CHANGED}fit_loop.epoch_progress"
    assert recorder.results["on_train_end"] == [Progress(2, 2, 2)], f"{CHANGED}fit_loop.epoch_progress"


def test_validation_batches_are_counted(trainer: Any) -> None:
    count = lightning_internals.validation_batches
    recorder = Recorder(on_validation_batch_start=count, on_validation_end=count)
    run_fit(trainer, recorder, max_epochs=1)
    assert recorder.results == {
        "on_validation_batch_start": [Progress(n + 1, n, n) for n in range(BATCHES)],
        "on_validation_end": [Progress(BATCHES, BATCHES, BATCHES)],
    }, f"{CHANGED}val_loop.batch_progress"


def test_a_validation_before_training_runs_all_hooks_and_leaves_no_trace(trainer: Any) -> None:
    before = Recorder(on_train_start=lightning_internals.validate_before_training)
    counts = Recorder(
        on_validation_end=lambda trainer: (trainer.state.stage.value, trainer.global_step, trainer.current_epoch),
        on_train_batch_start=lambda trainer: trainer.state.stage.value,
        on_train_end=lambda trainer: trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.completed,
    )
    run_fit(trainer, before, counts, max_epochs=1)
    why = f"{CHANGED}val_loop.run() or _reset_progress()"
    assert counts.results["on_validation_end"] == [("validate", 0, 0), ("validate", BATCHES, 0)], why
    assert counts.results["on_train_batch_start"] == ["train"] * BATCHES, why
    assert counts.results["on_train_end"] == [BATCHES], why


class Returning(TinyModel):
    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return self.training, torch.is_grad_enabled(), self.trainer.training, self.trainer.validating, batch_idx

    def on_validation_epoch_end(self) -> None:
        self.log("val", 0.0)


def test_validation_steps_run_without_hooks(trainer: Any) -> None:
    outputs: list[Any] = []
    calls = Recorder(
        on_train_end=lambda trainer: lightning_internals.run_validation_steps(
            trainer, lambda batch, output: outputs.append((len(batch), *output))
        ),
        on_validation_batch_start=lambda trainer: None,
    )
    after = Recorder(on_train_end=lambda trainer: (trainer.training, trainer.lightning_module.training))
    trainer(calls, after, max_epochs=1, limit_val_batches=3).fit(Returning(), datamodule=TinyData())
    assert outputs == [(1, False, False, False, True, index) for index in range(3)], f"{CHANGED}val_loop"
    assert len(calls.results["on_validation_batch_start"]) == 2 + 3, "those of the sanity check and of the epoch"
    assert after.results["on_train_end"] == [(True, True)]


def test_validation_batches_are_loaded_before_the_first_validation(trainer: Any) -> None:
    def load(trainer: Any) -> tuple[bool, int]:
        return lightning_internals.load_validation_batches(trainer), int(sum(trainer.num_val_batches))

    loaded = Recorder(on_train_start=load)
    trainer(loaded, max_epochs=1, num_sanity_val_steps=0, limit_val_batches=2).fit(Returning(), datamodule=TinyData())
    assert loaded.results["on_train_start"] == [(True, 2)], f"{CHANGED}val_loop.setup_data()"


def test_a_checkpoint_can_be_saved_before_the_first_step(trainer: Any, tmp_path: Path) -> None:
    for name, allowed in (("without", False), ("with", True)):
        checkpoint = ModelCheckpoint(
            tmp_path / name, monitor="val", filename="{step}", save_top_k=-1, save_on_train_epoch_end=False
        )
        if allowed:
            lightning_internals.save_before_training(checkpoint)
        before = Recorder(on_train_start=lightning_internals.validate_before_training)
        run_fit(trainer, before, checkpoint, max_epochs=1, enable_checkpointing=True, logger=False)
        saved = (tmp_path / name / "step=0.ckpt").exists()
        assert saved is allowed, f"{CHANGED}ModelCheckpoint._last_global_step_saved"


def test_a_checkpoint_callback_can_monitor_other_values(trainer: Any, tmp_path: Path) -> None:
    class Negated(lightning_internals.ModelCheckpointOfCandidates):
        def monitored(self, metrics: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {**metrics, "val": -metrics["val"]}

    checkpoint = Negated(tmp_path, monitor="val")
    run_fit(trainer, checkpoint, max_epochs=1, enable_checkpointing=True, logger=False)
    assert checkpoint.best_model_score is not None, f"{CHANGED}ModelCheckpoint._monitor_candidates()"
    assert checkpoint.best_model_score < 0, f"{CHANGED}ModelCheckpoint._monitor_candidates()"


@pytest.mark.parametrize(("interval", "count"), [(1.0, 1), (0.5, 2), (1, 4)])
def test_validations_per_epoch_are_counted(trainer: Any, interval: Any, count: int) -> None:
    recorder = Recorder(on_train_start=lightning_internals.validations_per_epoch)
    run_fit(trainer, recorder, max_epochs=1, val_check_interval=interval)
    assert recorder.results["on_train_start"] == [count], f"{CHANGED}Trainer.val_check_batch"


def test_logging_step_counts_steps_after_gradient_accumulation(trainer: Any) -> None:
    recorder = Recorder(
        on_train_batch_end=lambda t: (lightning_internals.accumulates_gradients(t), lightning_internals.logging_step(t))
    )
    run_fit(trainer, recorder, max_epochs=1, accumulate_grad_batches=2)
    # Lightning counts a step after the end hooks of its batch.
    expected = [(True, 0), (False, 0), (True, 1), (False, 1)]
    assert recorder.results["on_train_batch_end"] == expected, f"{CHANGED}_should_accumulate or _batches_that_stepped"


def test_checkpoint_within_an_epoch_resumes_at_its_batch_with_the_same_counts(trainer: Any, tmp_path: Path) -> None:
    path = tmp_path / "within.ckpt"

    class Save(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch == 1 and batch_idx == 2:
                trainer.save_checkpoint(path)

        def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
            lightning_internals.make_resumable(checkpoint, False, lightning_internals.accumulates_gradients(trainer))

    uninterrupted = Recorder(on_train_batch_end=lightning_internals.logging_step)
    run_fit(trainer, Save(), uninterrupted)
    checkpoint = torch.load(path, weights_only=True)
    assert lightning_internals.epochs_of_checkpoint(checkpoint) == 1, f"{CHANGED}the loops' state in a checkpoint"

    internals = lightning_internals
    resumed = Recorder(
        on_load_checkpoint=internals.is_restoring,
        on_train_start=lambda t: (
            internals.is_restoring(t),
            internals.is_resuming_epoch(t),
            internals.training_batches(t).processed,
            internals.discard_started_batches(t),
        ),
        on_train_batch_end=internals.logging_step,
        on_train_epoch_end=lambda t: (
            internals.is_resuming_epoch(t),
            internals.end_restart(t),
            internals.is_resuming_epoch(t),
        ),
    )
    with pytest.warns(UserWarning, match="is not resumable"):  # this loader, unlike the project's, restarts
        run_fit(trainer, resumed, ckpt_path=path)
    assert resumed.results["on_load_checkpoint"] == [True], f"{CHANGED}_checkpoint_connector._loaded_checkpoint"
    assert resumed.results["on_train_start"] == [(False, True, 2, 0)], f"{CHANGED}fit_loop.restarting or batch_progress"
    expected = uninterrupted.results["on_train_batch_end"][-2:]
    assert resumed.results["on_train_batch_end"] == expected, f"{CHANGED}epoch_loop.reset(), _batches_that_stepped"
    assert resumed.results["on_train_epoch_end"] == [(True, None, False)], f"{CHANGED}fit_loop._restarting"


def test_checkpoint_within_a_validation_repeats_the_validation(trainer: Any, tmp_path: Path) -> None:
    path = tmp_path / "validating.ckpt"

    class Save(Callback):
        def on_validation_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                trainer.save_checkpoint(path)

        def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
            lightning_internals.make_resumable(checkpoint, trainer.validating, False)

    run_fit(trainer, Save(), max_epochs=1)
    recorder = Recorder(
        on_train_start=lightning_internals.discard_started_batches,
        on_validation_batch_start=lambda trainer: lightning_internals.validation_batches(trainer).ready,
        on_train_batch_start=lambda trainer: trainer.current_epoch,
    )
    run_fit(trainer, recorder, ckpt_path=path, max_epochs=1)
    assert recorder.results["on_validation_batch_start"] == [1, 2, 3, 4], f"{CHANGED}val_loop.batch_progress"
    assert not recorder.results["on_train_batch_start"], f"{CHANGED}a training epoch that only lacks its validation"


def test_validated_batches_and_scheduler_steps_can_be_set(trainer: Any) -> None:
    new_trainer = trainer()
    loop = new_trainer.fit_loop.epoch_loop
    lightning_internals.set_validated_batches(new_trainer, 3)
    total = loop.val_loop.batch_progress.total
    assert (total.ready, total.started, total.processed, total.completed) == (3, 3, 3, 3), f"{CHANGED}progress"
    lightning_internals.count_scheduler_step(new_trainer)
    assert loop.scheduler_progress.total.completed == 1, f"{CHANGED}epoch_loop.scheduler_progress"


def test_loop_state_has_the_form_of_a_checkpoint(trainer: Any, tmp_path: Path) -> None:
    recorder = Recorder(on_train_start=lightning_internals.loop_state)
    fit_trainer = run_fit(trainer, recorder, max_epochs=1)
    fit_trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["loops"]["fit_loop"]
    (state,) = recorder.results["on_train_start"]
    assert state.keys() == {"fit_loop"}, f"{CHANGED}the names of the loops"
    assert state["fit_loop"].keys() == saved.keys(), f"{CHANGED}the loops' state in a checkpoint"
    assert lightning_internals.loop_state(trainer()) == {}


def test_training_loader_is_available_before_training(trainer: Any) -> None:
    loader, recorder = TinyData().train_dataloader(), Recorder(on_fit_start=lightning_internals.training_loader)
    trainer(recorder, max_epochs=1).fit(TinyModel(), loader, loader)
    assert recorder.results["on_fit_start"] == [loader], f"{CHANGED}fit_loop.setup_data()"


def test_validation_data_is_the_data_module_or_the_loader(trainer: Any) -> None:
    data, recorder = TinyData(), Recorder(on_train_start=lightning_internals.validation_data)
    trainer(recorder, max_epochs=1).fit(TinyModel(), datamodule=data)
    assert recorder.results["on_train_start"] == [data], f"{CHANGED}_data_source"
    loader = data.train_dataloader()
    recorder = Recorder(on_train_start=lightning_internals.validation_data)
    trainer(recorder, max_epochs=1).fit(TinyModel(), loader, loader)
    assert recorder.results["on_train_start"] == [loader], f"{CHANGED}_data_source"


def test_subprocesses_are_released() -> None:
    launcher = subprocess_script._SubprocessScriptLauncher(None, 1, 1)  # type: ignore[arg-type]
    launcher.procs.append("a process")  # type: ignore[arg-type]
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(launcher=launcher))
    assert lightning_internals.release_subprocesses(trainer) == ["a process"], f"{CHANGED}launcher.procs"
    assert launcher.procs == [], f"{CHANGED}launcher.procs"
    assert lightning_internals.release_subprocesses(SimpleNamespace(strategy=SimpleNamespace(launcher=None))) == []


@pytest.mark.parametrize("after_training", [True, False])
def test_time_of_early_stopping_checks_is_known(trainer: Any, after_training: bool) -> None:
    stopping = EarlyStopping("val", check_on_train_epoch_end=after_training)
    run_fit(trainer, stopping, max_epochs=1)
    assert lightning_internals.checks_after_training_epoch(stopping) is after_training, f"{CHANGED}EarlyStopping"


def test_early_stopping_can_be_evaluated_for_a_value() -> None:
    stopping = EarlyStopping("val", patience=1, mode="min")
    decisions = [lightning_internals.would_stop(stopping, value) for value in (1.0, 0.5, 0.7)]
    assert decisions == [False, False, True], f"{CHANGED}EarlyStopping._evaluate_stopping_criteria()"


def test_logged_hyperparameter_can_be_changed() -> None:
    class Model(pl.LightningModule):
        def __init__(self, rate: float) -> None:
            super().__init__()
            self.save_hyperparameters()

    model = Model(0.1)
    lightning_internals.set_logged_hyperparameter(model, "rate", 0.2)
    assert model.hparams_initial == {"rate": 0.2}, CHANGED + "LightningModule._hparams_initial"


def test_callbacks_are_found_by_class(trainer: Any) -> None:
    recorder = Recorder()
    fit_trainer = trainer(pl.Callback(), recorder, Recorder(), max_epochs=1)
    assert lightning_internals.find_callback(fit_trainer, Recorder) is recorder, f"{CHANGED}Trainer.callbacks"
    assert lightning_internals.find_callback(fit_trainer, EarlyStopping) is None


def test_attached_trainer_is_none_without_a_trainer(trainer: Any) -> None:
    module, fit_trainer = TinyModel(), trainer(max_epochs=1)
    assert lightning_internals.attached_trainer(module) is None, f"{CHANGED}LightningModule.trainer"
    fit_trainer.fit(module, datamodule=TinyData())
    assert lightning_internals.attached_trainer(module) is fit_trainer


# --- no other module uses private or undocumented Lightning API

#: Modules that may use it.
WRAPPERS = {f"project.runtime.{name}" for name in ("lightning_internals", "lightning_cli", "jsonargparse_internals")}
#: Undocumented attributes without an underscore.
UNDOCUMENTED = {
    *("fit_loop", "validate_loop", "test_loop", "predict_loop", "epoch_loop", "val_loop", "launcher", "procs"),
    *("batch_progress", "epoch_progress", "scheduler_progress", "val_check_batch", "restarting"),
}
#: Private names of other libraries and the standard library.
OTHER_LIBRARIES = {
    "_strip_protocol",
    "_asdict",
    "_replace",
    "_exit",
    "_inductor",
    "_sample_dirichlet",
    "_standard_gamma",
    "_get_file_writer",
    *("_parameters", "_buffers", "_modules"),  # torch.nn.Module
    "_pos_embed",  # timm
    "_check",  # torch, documented for torch.export
}


def modules() -> list[str]:
    names = [module.name for module in pkgutil.walk_packages(project.__path__, "project.")]
    return [name for name in names if name not in WRAPPERS and name != "project.__main__"]


def private_of_lightning(kind: type) -> set[str]:
    """Private names that a class inherits from Lightning classes, including attributes set in methods."""
    names: set[str] = set()
    for base in kind.__mro__:
        if base.__module__.startswith(("lightning.", "jsonargparse.")):
            names |= {name for name in vars(base) if name.startswith("_") and not name.startswith("__")}
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
            names |= {
                node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_self_attribute(node)
            }
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def is_self_attribute(node: ast.Attribute) -> bool:
    value = node.value
    is_super = isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "super"
    return is_super or (isinstance(value, ast.Name) and value.id in ("self", "cls"))


def uses(tree: ast.AST, module: Any) -> list[str]:
    """Private and undocumented Lightning names in a module's source."""
    names_used = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            is_private = (
                node.attr.startswith("_") and not node.attr.startswith("__") and node.attr not in OTHER_LIBRARIES
            )
            if (is_private and not is_self_attribute(node)) or node.attr in UNDOCUMENTED:
                names_used.append(node.attr)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in UNDOCUMENTED:
            names_used.append(node.value)
        if isinstance(node, ast.ClassDef) and module is not None:
            kind = getattr(module, node.name, None)
            inherited = private_of_lightning(kind) if isinstance(kind, type) else set()
            names = {
                child.attr for child in ast.walk(node) if isinstance(child, ast.Attribute) and is_self_attribute(child)
            }
            names |= {child.name for child in node.body if isinstance(child, ast.FunctionDef)}
            names_used += names & inherited
    return names_used


@pytest.mark.parametrize("name", modules())
def test_private_lightning_api_is_used_in_one_place_only(name: str) -> None:
    module = importlib.import_module(name)
    names_used = uses(ast.parse(inspect.getsource(module) or "pass"), module)
    assert not names_used, (
        f"{name} uses {', '.join(names_used)}: add a function to project/runtime/lightning_internals.py"
    )


@pytest.mark.parametrize(
    "source",
    [
        "trainer.fit_loop.max_epochs",
        "trainer._checkpoint_connector",
        "getattr(trainer, 'fit_loop')",
        "class Stop(EarlyStopping):\n    def _evaluate_stopping_criteria(self):\n        pass",
        "class Stop(EarlyStopping):\n    def look(self):\n        return self._check_on_train_epoch_end",
    ],
)
def test_search_finds_private_names(source: str) -> None:
    scope: dict[str, Any] = {"EarlyStopping": EarlyStopping}
    if source.startswith("class"):
        exec(source, scope)
    assert uses(ast.parse(source), SimpleNamespace(**scope))


def test_a_fit_without_epochs_has_the_hooks_of_training(trainer: Any) -> None:
    hooks: dict[str, Any] = {
        name: lambda _: None for name in ("on_train_start", "on_train_epoch_start", "on_train_end")
    }
    for setting in ({"max_epochs": 0}, {"max_epochs": 2}):
        recorder = Recorder(on_fit_start=lambda fit: fit.max_epochs and lightning_internals.run_no_epochs(fit), **hooks)
        fit_trainer = trainer(recorder, num_sanity_val_steps=0, **setting)
        lightning_internals.start_without_epochs(fit_trainer)
        fit_trainer.fit(TinyModel(), datamodule=TinyData())
        counts = {name: len(results) for name, results in recorder.results.items()}
        expected = {"on_fit_start": 1, "on_train_start": 1, "on_train_epoch_start": 0, "on_train_end": 1}
        assert counts == expected, CHANGED + "fit_loop.run(), skip, done or max_epochs"


def test_other_fits_are_not_changed(trainer: Any) -> None:
    recorder = Recorder(on_train_epoch_start=lambda _: None)
    fit_trainer = trainer(recorder, num_sanity_val_steps=0)
    lightning_internals.start_without_epochs(fit_trainer)
    fit_trainer.fit(TinyModel(), datamodule=TinyData())
    assert len(recorder.results["on_train_epoch_start"]) == 2, CHANGED + "fit_loop.skip"


def test_the_next_validation_counts_its_batches_anew(trainer: Any) -> None:
    batches: list[int] = []

    class Data(TinyData):
        def val_dataloader(self) -> DataLoader[Any]:
            batches.append(len(batches) + 1)
            return DataLoader(TensorDataset(torch.ones(batches[-1], 2)), num_workers=0)

    recorder = Recorder(
        on_train_epoch_start=lambda fit: fit.current_epoch and lightning_internals.reload_validation_data(fit),
        on_validation_end=lambda fit: lightning_internals.validation_batches(fit).ready,
    )
    fit_trainer = trainer(recorder, num_sanity_val_steps=0)
    fit_trainer.fit(TinyModel(), datamodule=Data())
    assert recorder.results["on_validation_end"] == [1, 2], CHANGED + "val_loop._combined_loader"


def test_a_module_without_trainable_parameters_is_not_wrapped(trainer: Any) -> None:
    wrapped: list[bool] = []

    class Unwrapped(Parameterless):
        def setup(self, stage: str) -> None:
            lightning_internals.skip_ddp(self.trainer)

        def on_fit_start(self) -> None:
            wrapped.append(self.trainer.strategy.model is not self)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", self.layer(batch[0]).mean(), sync_dist=True)

    fit_trainer = trainer(strategy="ddp", max_epochs=0, num_sanity_val_steps=0)
    fit_trainer.fit(Unwrapped(), datamodule=TinyData())
    assert wrapped == [False], CHANGED + "DDPStrategy.configure_ddp()"


def test_the_wrapper_of_a_module_is_renewed(trainer: Any) -> None:
    renewed: list[bool] = []

    class Joining(TinyModel):
        def __init__(self) -> None:
            super().__init__()
            self.layer.weight.requires_grad_(False)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", self.layer(batch[0]).mean(), sync_dist=True)

        def on_train_epoch_start(self) -> None:
            before = self.trainer.strategy.model
            self.layer.weight.requires_grad_(self.current_epoch > 0)
            lightning_internals.renew_ddp(self.trainer)
            model: Any = self.trainer.strategy.model
            assert not hasattr(before, "reducer") and model.module is self, CHANGED + "DistributedDataParallel.reducer"
            renewed.append(model is not before)

    fit_trainer = trainer(strategy="ddp", num_sanity_val_steps=0)
    fit_trainer.fit(Joining(), datamodule=TinyData())
    assert renewed == [True, True], CHANGED + "DDPStrategy.configure_ddp()"
