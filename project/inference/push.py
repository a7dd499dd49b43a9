"""The command ``push``: uploads a trained classifier to the Hugging Face Hub."""

from __future__ import annotations

import logging
from pathlib import Path

from project.checkpoints.hub import SCHEME, Address, request_errors, require_hub, to_files
from project.checkpoints.reader import read_checkpoint
from project.errors import ConfigError
from project.runtime.console import print_rank_zero
from project.runtime.process_state import process_state

MODEL_CARD = "model_card.md"  # of a run


def require(repository: str | None) -> None:
    """Check the flags before the checkpoint is read.

    Raises:
        ConfigError: The repository is missing or invalid, or huggingface_hub is not installed.
    """
    if repository is None:
        raise ConfigError("push needs the repository: --repository USER/NAME.")
    try:
        address = Address.parse(repository)
    except ConfigError as error:
        raise ConfigError(f"--repository: {repository!r} is not of the form USER/NAME.") from error
    if address.revision is not None:
        raise ConfigError(f"--repository: push writes to the main branch. Remove the revision from {repository}.")
    require_hub()


def push(ckpt_path: str | None = None, repository: str | None = None, private: bool = True) -> None:
    """Upload a trained classifier to the Hugging Face Hub: safetensors, preprocessing and model card.

    Args:
        ckpt_path: Checkpoint of the trained model.
        repository: Repository on the hub, USER/NAME; it is created if it does not exist.
        private: Create the repository as a private one.

    Raises:
        ConfigError: A flag is missing or invalid, or the upload failed.
        CheckpointError: The checkpoint is missing or damaged.
    """
    require(repository)
    if ckpt_path is None:
        raise ConfigError("push needs a trained model: pass its checkpoint with --ckpt_path FILE.")
    assert repository is not None
    from huggingface_hub import CommitOperationAdd, HfApi

    files = to_files(read_checkpoint(ckpt_path), _card(Path(ckpt_path).expanduser()))
    name, api = Address.parse(repository).name, HfApi()
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    try:
        with process_state(log_levels={"huggingface_hub": logging.ERROR}):
            api.create_repo(name, private=private, exist_ok=True)
            api.create_commit(name, operations, commit_message=f"Classifier from {Path(ckpt_path).name}")
    except request_errors() as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"push to {name} failed: {reason}\nLog in with `hf auth login`, or set HF_TOKEN to a token that can write."
        ) from error
    size = sum(map(len, files.values())) / 1000
    print_rank_zero(f'Pushed: {SCHEME}{name} ({size:.0f} kB). To use it: project.load("{SCHEME}{name}")')


def _card(checkpoint: Path) -> str:
    """The model card of the checkpoint's run.

    Raises:
        ConfigError: The run has none.
    """
    path = checkpoint.resolve().parent.parent / MODEL_CARD
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(
            f"push needs the model card of the run, and {path} cannot be read: {reason}.\n"
            "Push a checkpoint in its run folder, runs/NAME/version_N/checkpoints."
        ) from error
