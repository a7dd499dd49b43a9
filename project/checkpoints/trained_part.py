"""The trained part of a checkpoint, for a model whose fit has ended."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from project.checkpoints.reader import read_checkpoint
from project.runtime.distributed import ProcessGroup

Tensors = Mapping[str, torch.Tensor]


def read_on_rank_zero(path: str, *keys: str) -> dict[str, Any]:
    """Entries of a checkpoint that rank zero reads, on all ranks. Collective: all ranks must call it.

    Args:
        path: The checkpoint.
        keys: Names of the entries; those that it lacks are left out.

    Raises:
        CheckpointError: It cannot be read.
    """
    ranks, entries = ProcessGroup(), {}
    with ranks.propagate_errors():
        if ranks.rank == 0:
            checkpoint = read_checkpoint(path)
            entries = {key: checkpoint[key] for key in keys if key in checkpoint}
    return ranks.gather(entries)[0]


@torch.no_grad()
def copy_tensors(values: Tensors, targets: Tensors) -> None:
    """Copy tensors into those of the same names."""
    for name, tensor in targets.items():
        tensor.copy_(values[name])


@contextmanager
def other_weights(values: Tensors, targets: Tensors) -> Iterator[None]:
    """Replace tensors in this context, and restore them afterwards."""
    before = {name: tensor.detach().cpu().clone() for name, tensor in targets.items()}
    try:
        copy_tensors(values, targets)
        yield
    finally:
        copy_tensors(before, targets)
