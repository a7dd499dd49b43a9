"""What Lightning keeps private or undocumented, and this project relies on: a contract test for each function."""

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
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.strategies.launchers import subprocess_script
from torch.utils.data import DataLoader, TensorDataset

import project
from project.runtime import lightning_internals
from project.runtime.lightning_internals import Progress

CHANGED = f"Lightning {pl.__version__} has changed what project/runtime/lightning_internals.py relies on: "
BATCHES = 4


class Tiny(pl.LightningModule):
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


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.ones(BATCHES, 2)), num_workers=0)

    val_dataloader = train_dataloader


class Spy(Callback):
    """Calls a function in a hook, and keeps what it returns each time."""

    def __init__(self, **hooks: Any) -> None:
        self.seen: dict[str, list[Any]] = {name: [] for name in hooks}
        for name, look in hooks.items():
            setattr(self, name, self._hook(name, look))

    def _hook(self, name: str, look: Any) -> Any:
        return lambda trainer, *given: self.seen[name].append(look(trainer))


@pytest.fixture
def trainer(tmp_path: Path) -> Any:
    def make(*callbacks: Callback, **options: Any) -> pl.Trainer:
        defaults: dict[str, Any] = {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "logger": False}
        silent = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        return pl.Trainer(**defaults | silent | {"default_root_dir": tmp_path, "callbacks": [*callbacks]} | options)

    return make


pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*isinstance.treespec.*")


def fitted(trainer: Any, *callbacks: Callback, ckpt_path: Any = None, **options: Any) -> pl.Trainer:
    made: pl.Trainer = trainer(*callbacks, num_sanity_val_steps=0, **options)
    made.fit(Tiny(), datamodule=Data(), ckpt_path=ckpt_path, weights_only=True)
    return made


def test_training_batches_are_counted_before_and_after_each(trainer: Any) -> None:
    spy = Spy(
        on_train_batch_start=lightning_internals.training_batches,
        on_train_batch_end=lightning_internals.training_batches,
    )
    fitted(trainer, spy, max_epochs=1)
    assert spy.seen == {
        "on_train_batch_start": [Progress(n + 1, n, n) for n in range(BATCHES)],
        "on_train_batch_end": [Progress(n + 1, n + 1, n) for n in range(BATCHES)],
    }, f"{CHANGED}fit_loop.epoch_loop.batch_progress"


def test_epochs_are_counted(trainer: Any) -> None:
    spy = Spy(on_train_batch_start=lightning_internals.epochs, on_train_end=lightning_internals.epochs)
    fitted(trainer, spy)
    expected = [Progress(epoch + 1, epoch, epoch) for epoch in range(2) for _ in range(BATCHES)]
    assert spy.seen["on_train_batch_start"] == expected, f"{CHANGED}fit_loop.epoch_progress"
    assert spy.seen["on_train_end"] == [Progress(2, 2, 2)], f"{CHANGED}fit_loop.epoch_progress"


def test_a_validation_that_is_over_has_completed_all_that_it_began(trainer: Any) -> None:
    look = lightning_internals.validation_batches
    spy = Spy(on_validation_batch_start=look, on_validation_end=look)
    fitted(trainer, spy, max_epochs=1)
    assert spy.seen == {
        "on_validation_batch_start": [Progress(n + 1, n, n) for n in range(BATCHES)],
        "on_validation_end": [Progress(BATCHES, BATCHES, BATCHES)],
    }, f"{CHANGED}val_loop.batch_progress"


@pytest.mark.parametrize(("interval", "count"), [(1.0, 1), (0.5, 2), (1, 4)])
def test_validations_of_an_epoch_are_known(trainer: Any, interval: Any, count: int) -> None:
    spy = Spy(on_train_start=lightning_internals.validations_per_epoch)
    fitted(trainer, spy, max_epochs=1, val_check_interval=interval)
    assert spy.seen["on_train_start"] == [count], f"{CHANGED}Trainer.val_check_batch"


def test_gradients_are_accumulated_until_the_step_which_the_logging_step_counts(trainer: Any) -> None:
    spy = Spy(
        on_train_batch_end=lambda t: (lightning_internals.accumulates_gradients(t), lightning_internals.logging_step(t))
    )
    fitted(trainer, spy, max_epochs=1, accumulate_grad_batches=2)
    # Lightning counts a step after the hooks of its batch.
    expected = [(True, 0), (False, 0), (True, 1), (False, 1)]
    assert spy.seen["on_train_batch_end"] == expected, f"{CHANGED}_should_accumulate or _batches_that_stepped"


def test_a_checkpoint_within_an_epoch_resumes_at_its_batch_with_the_same_counts(trainer: Any, tmp_path: Path) -> None:
    path = tmp_path / "within.ckpt"

    class Save(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch == 1 and batch_idx == 2:
                trainer.save_checkpoint(path)

        def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
            lightning_internals.make_resumable(checkpoint, False, lightning_internals.accumulates_gradients(trainer))

    whole = Spy(on_train_batch_end=lightning_internals.logging_step)
    fitted(trainer, Save(), whole)
    checkpoint = torch.load(path, weights_only=True)
    assert lightning_internals.epochs_of_checkpoint(checkpoint) == 1, f"{CHANGED}the loops' state in a checkpoint"

    look = lightning_internals
    resumed = Spy(
        on_load_checkpoint=look.is_restoring,
        on_train_start=lambda t: (
            look.is_restoring(t),
            look.is_resuming_epoch(t),
            look.training_batches(t).processed,
            look.discard_started_batches(t),
        ),
        on_train_batch_end=look.logging_step,
        on_train_epoch_end=lambda t: (look.is_resuming_epoch(t), look.end_restart(t), look.is_resuming_epoch(t)),
    )
    with pytest.warns(UserWarning, match="is not resumable"):  # as this loader, unlike the project's, starts again
        fitted(trainer, resumed, ckpt_path=path)
    assert resumed.seen["on_load_checkpoint"] == [True], f"{CHANGED}_checkpoint_connector._loaded_checkpoint"
    assert resumed.seen["on_train_start"] == [(False, True, 2, 0)], f"{CHANGED}fit_loop.restarting or batch_progress"
    expected = whole.seen["on_train_batch_end"][-2:]
    assert resumed.seen["on_train_batch_end"] == expected, f"{CHANGED}epoch_loop.reset(), _batches_that_stepped"
    assert resumed.seen["on_train_epoch_end"] == [(True, None, False)], f"{CHANGED}fit_loop._restarting"


def test_a_checkpoint_within_a_validation_repeats_the_validation(trainer: Any, tmp_path: Path) -> None:
    path = tmp_path / "validating.ckpt"

    class Save(Callback):
        def on_validation_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                trainer.save_checkpoint(path)

        def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
            lightning_internals.make_resumable(checkpoint, trainer.validating, False)

    fitted(trainer, Save(), max_epochs=1)
    spy = Spy(
        on_train_start=lightning_internals.discard_started_batches,
        on_validation_batch_start=lambda trainer: lightning_internals.validation_batches(trainer).ready,
        on_train_batch_start=lambda trainer: trainer.current_epoch,
    )
    fitted(trainer, spy, ckpt_path=path, max_epochs=1)
    assert spy.seen["on_validation_batch_start"] == [1, 2, 3, 4], f"{CHANGED}val_loop.batch_progress"
    assert not spy.seen["on_train_batch_start"], f"{CHANGED}a training epoch that only lacks its validation"


def test_validated_batches_and_scheduler_steps_can_be_set(trainer: Any) -> None:
    made = trainer()
    loop = made.fit_loop.epoch_loop
    lightning_internals.set_validated_batches(made, 3)
    total = loop.val_loop.batch_progress.total
    assert (total.ready, total.started, total.processed, total.completed) == (3, 3, 3, 3), f"{CHANGED}progress"
    lightning_internals.count_scheduler_step(made)
    assert loop.scheduler_progress.total.completed == 1, f"{CHANGED}epoch_loop.scheduler_progress"


def test_the_state_of_a_loop_is_what_a_checkpoint_has_of_it(trainer: Any, tmp_path: Path) -> None:
    spy = Spy(on_train_start=lightning_internals.loop_state)
    made = fitted(trainer, spy, max_epochs=1)
    made.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["loops"]["fit_loop"]
    (state,) = spy.seen["on_train_start"]
    assert state.keys() == {"fit_loop"}, f"{CHANGED}the names of the loops"
    assert state["fit_loop"].keys() == saved.keys(), f"{CHANGED}the loops' state in a checkpoint"
    assert lightning_internals.loop_state(trainer()) == {}


def test_the_training_loader_is_known_before_training(trainer: Any) -> None:
    loader, spy = Data().train_dataloader(), Spy(on_fit_start=lightning_internals.training_loader)
    trainer(spy, max_epochs=1).fit(Tiny(), loader, loader)
    assert spy.seen["on_fit_start"] == [loader], f"{CHANGED}fit_loop.setup_data()"


def test_what_gives_the_validation_loader_is_known(trainer: Any) -> None:
    data, spy = Data(), Spy(on_train_start=lightning_internals.validation_data)
    trainer(spy, max_epochs=1).fit(Tiny(), datamodule=data)
    assert spy.seen["on_train_start"] == [data], f"{CHANGED}_data_source"
    loader = data.train_dataloader()
    spy = Spy(on_train_start=lightning_internals.validation_data)
    trainer(spy, max_epochs=1).fit(Tiny(), loader, loader)
    assert spy.seen["on_train_start"] == [loader], f"{CHANGED}_data_source"


def test_subprocesses_are_released() -> None:
    launcher = subprocess_script._SubprocessScriptLauncher(None, 1, 1)  # type: ignore[arg-type]
    launcher.procs.append("a process")  # type: ignore[arg-type]
    made: Any = SimpleNamespace(strategy=SimpleNamespace(launcher=launcher))
    assert lightning_internals.release_subprocesses(made) == ["a process"], f"{CHANGED}launcher.procs"
    assert launcher.procs == [], f"{CHANGED}launcher.procs"
    assert lightning_internals.release_subprocesses(SimpleNamespace(strategy=SimpleNamespace(launcher=None))) == []


@pytest.mark.parametrize("after_training", [True, False])
def test_when_early_stopping_checks_is_known(trainer: Any, after_training: bool) -> None:
    stopping = EarlyStopping("val", check_on_train_epoch_end=after_training)
    fitted(trainer, stopping, max_epochs=1)
    assert lightning_internals.checks_after_training_epoch(stopping) is after_training, f"{CHANGED}EarlyStopping"


def test_early_stopping_can_be_asked_about_a_value() -> None:
    stopping = EarlyStopping("val", patience=1, mode="min")
    answers = [lightning_internals.would_stop(stopping, value) for value in (1.0, 0.5, 0.7)]
    assert answers == [False, False, True], f"{CHANGED}EarlyStopping._evaluate_stopping_criteria()"


def test_a_module_without_a_trainer_has_none(trainer: Any) -> None:
    module, made = Tiny(), trainer(max_epochs=1)
    assert lightning_internals.attached_trainer(module) is None, f"{CHANGED}LightningModule.trainer"
    made.fit(module, datamodule=Data())
    assert lightning_internals.attached_trainer(module) is made


# --- nothing else uses what is private or undocumented

#: The modules that may.
HOME = {"project.runtime.lightning_internals", "project.runtime.lightning_cli"}
#: Attributes without an underscore that Lightning does not document.
UNDOCUMENTED = {
    *("fit_loop", "validate_loop", "test_loop", "predict_loop", "epoch_loop", "val_loop", "launcher", "procs"),
    *("batch_progress", "epoch_progress", "scheduler_progress", "val_check_batch", "restarting"),
}
#: Private names of other libraries, or of the standard library.
OTHERS = {
    "_strip_protocol",
    "_asdict",
    "_replace",
    "_exit",
    "_inductor",
    "_sample_dirichlet",
    "_standard_gamma",
    "_get_file_writer",
}


def modules() -> list[str]:
    found = [module.name for module in pkgutil.walk_packages(project.__path__, "project.")]
    return [name for name in found if name not in HOME and name != "project.__main__"]


def private_of_lightning(kind: type) -> set[str]:
    """Private names of the Lightning classes that a class inherits from, those that they set in methods included."""
    found: set[str] = set()
    for base in kind.__mro__:
        if base.__module__.startswith(("lightning.", "jsonargparse.")):
            found |= {name for name in vars(base) if name.startswith("_") and not name.startswith("__")}
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
            found |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_of_self(node)}
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


def is_of_self(node: ast.Attribute) -> bool:
    value = node.value
    is_super = isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "super"
    return is_super or (isinstance(value, ast.Name) and value.id in ("self", "cls"))


def uses(tree: ast.AST, module: Any) -> list[str]:
    """Private and undocumented names of Lightning that a module's source uses."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            private = node.attr.startswith("_") and not node.attr.startswith("__") and node.attr not in OTHERS
            if (private and not is_of_self(node)) or node.attr in UNDOCUMENTED:
                found.append(node.attr)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in UNDOCUMENTED:
            found.append(node.value)
        if isinstance(node, ast.ClassDef) and module is not None:
            kind = getattr(module, node.name, None)
            inherited = private_of_lightning(kind) if isinstance(kind, type) else set()
            names = {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute) and is_of_self(each)}
            names |= {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
            found += names & inherited
    return found


@pytest.mark.parametrize("name", modules())
def test_private_lightning_is_used_in_one_place(name: str) -> None:
    module = importlib.import_module(name)
    found = uses(ast.parse(inspect.getsource(module) or "pass"), module)
    assert not found, f"{name} uses {', '.join(found)}: put a function into project/runtime/lightning_internals.py"


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
def test_the_search_finds_what_it_looks_for(source: str) -> None:
    scope: dict[str, Any] = {"EarlyStopping": EarlyStopping}
    if source.startswith("class"):
        exec(source, scope)
    assert uses(ast.parse(source), SimpleNamespace(**scope))
