"""Length of fits, also of data whose length is unknown."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from project.runtime.fit_length import fit_length, steps_per_epoch

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*isinstance.treespec.*")


class Endless(IterableDataset[torch.Tensor]):
    """Zeros, without a length."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            yield torch.zeros(1)


class Module(pl.LightningModule):
    """Records the length of its fit when its optimizer is created, as schedules do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.lengths: list[int | None] = []

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return (self.weight * batch).sum()

    def configure_optimizers(self) -> Any:
        self.lengths = [fit_length(self.trainer, "epoch"), fit_length(self.trainer, "step")]
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("data", "limits", "lengths"),
    [
        (Endless(), {"max_steps": 3}, [None, 3]),
        (Endless(), {"max_steps": 3, "max_epochs": 2}, [2, 3]),
        (torch.zeros(8, 1), {"max_epochs": 2}, [2, 8]),
        (torch.zeros(8, 1), {"max_steps": 6}, [2, 6]),
        (torch.zeros(8, 1), {"max_steps": 3, "max_epochs": 2}, [1, 3]),
        (torch.zeros(8, 1), {"max_epochs": 0}, [1, 1]),
    ],
)
def test_lengths_of_fits(data: Any, limits: dict[str, int], lengths: list[int | None], tmp_path: Path) -> None:
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(**limits, **quiet, enable_model_summary=False, accelerator="cpu", default_root_dir=tmp_path)
    module = Module()
    trainer.fit(module, DataLoader(data, batch_size=2))
    assert module.lengths == lengths
    if "max_epochs" not in limits or limits["max_epochs"]:
        assert steps_per_epoch(trainer) == (float("inf") if isinstance(data, Endless) else 4)
