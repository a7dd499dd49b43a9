"""Writing a checkpoint so that a kill or a full disk loses nothing, and reading it so that nothing in it runs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from project.errors import CheckpointError
from project.runtime.atomic_write import replacing


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's plugin for checkpoints, whose files are at any moment the old ones or the new ones, whole.

    Lightning's own stages them in ``$TMPDIR`` and copies them over the old ones, without a flush: on another file
    system, a kill on the way destroys both (issues 21253, 21800).
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint beside its place, flush it to the disk, and give it its name.

        Args:
            checkpoint: What Lightning has put together.
            path: A file; or the address of an object in a store, which is for fsspec to write.
            storage_options: None, for a file.

        Raises:
            CheckpointError: It cannot be written; the file that was there before still is.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        content = io.BytesIO()  # torch's own writer, on a full disk, does not say what the system said
        torch.save(checkpoint, content)
        target = Path(path)
        try:
            with replacing(target) as temporary:
                temporary.write_bytes(content.getbuffer())
        except OSError as error:
            before = "What it held before is whole." if target.exists() else "There was none before."
            raise CheckpointError(
                f"The checkpoint {path} cannot be written: {error.strerror}. {before}\n"
                "Make room, or name another folder with --trainer.default_root_dir PATH."
            ) from error

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True) -> Any:
        """Read a checkpoint's plain types and tensors, whatever ``weights_only`` says: nothing in it is executed."""
        return super().load_checkpoint(path, map_location, weights_only=True)
