"""Checkpoint I/O: atomic, durable writes and safe reads."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from project.checkpoints import hub
from project.errors import CheckpointError
from project.runtime.atomic_write import atomic_write


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint plugin with atomic writes: a file is always the complete old or the complete new one.

    Lightning stages a checkpoint in ``$TMPDIR`` and copies it over the old one without fsync. Across file systems, a
    kill during the copy destroys both (issues 21253, 21800).
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint to a temporary file in the same folder, fsync it, and rename it.

        Args:
            checkpoint: Lightning's checkpoint.
            path: A file, or a URL, which Lightning's fsspec writer handles.
            storage_options: For a URL.

        Raises:
            CheckpointError: The file cannot be written; a previous file is left intact.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        content = io.BytesIO()  # on a full disk, torch's own file writer hides the system's error message
        torch.save(checkpoint, content)
        target = Path(path)
        try:
            with atomic_write(target) as temporary:
                temporary.write_bytes(content.getbuffer())
        except OSError as error:
            previous = "The previous file is intact." if target.exists() else "There is no previous file."
            raise CheckpointError(
                f"The checkpoint {path} cannot be written: {error.strerror}. {previous}\n"
                "Free some space, or choose another folder with --trainer.default_root_dir PATH."
            ) from error

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True) -> Any:
        """Read a checkpoint's tensors and plain types. ``weights_only`` is ignored: no code is ever executed."""
        if str(path).startswith(hub.SCHEME):  # fsspec has another protocol of this name
            return hub.download(str(path))
        return super().load_checkpoint(path, map_location, weights_only=True)
