"""Checkpoints on the Hugging Face Hub: the trained tensors as safetensors, everything else as JSON.

An address is ``hf://USER/NAME``, optionally with a revision: ``hf://USER/NAME@REVISION``.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from project.errors import CheckpointError, ConfigError
from project.runtime.process_state import process_state

SCHEME = "hf://"
CONFIG, TENSORS, CARD = "config.json", "model.safetensors", "README.md"
FORMAT = 1
#: Entries of a checkpoint that inference and a new fit need, besides the tensors.
ENTRIES = ("epoch", "global_step", "pytorch-lightning_version", "hyper_parameters", "transfer", "loops")
#: Entry with the calibrated answers, of plain values and tensors; a checkpoint may have none.
ANSWERS = "answers"
ADDRESS = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
TIMEOUT = 10  # seconds


class Address(NamedTuple):
    """A repository on the hub.

    Attributes:
        name: ``USER/NAME``.
        revision: Branch, tag or commit; ``None`` for the main branch.
    """

    name: str
    revision: str | None

    @classmethod
    def parse(cls, text: str) -> Address:
        """Parse an address, with or without ``hf://``.

        Raises:
            ConfigError: It is not of the form USER/NAME or USER/NAME@REVISION.
        """
        match = ADDRESS.fullmatch(text.removeprefix(SCHEME))
        if match is None:
            raise ConfigError(f"{text!r} is not an address on the Hugging Face Hub. Use {SCHEME}USER/NAME.")
        return cls(match["name"], match["revision"])


def require_hub() -> None:
    """Check that ``huggingface_hub`` is installed.

    Raises:
        ConfigError: It is not.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ConfigError(f"{SCHEME} requires huggingface_hub. Install it: pip install 'frozen-backbone[hub]'")


def request_errors() -> tuple[type[Exception], ...]:
    """Errors of a request to the hub: those of huggingface_hub, and those of the HTTP client that its version uses."""
    from huggingface_hub.errors import HfHubHTTPError

    client = (base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception))
    return (HfHubHTTPError, OSError, ValueError, *client)


def to_files(checkpoint: Mapping[str, Any], card: str) -> dict[str, bytes]:
    """The files of a repository.

    Args:
        checkpoint: From :func:`project.checkpoints.reader.read_checkpoint`.
        card: The model card in Markdown.
    """
    state, answers = dict(checkpoint["state_dict"]), dict(checkpoint.get(ANSWERS) or {})
    for name in [name for name, value in answers.items() if isinstance(value, torch.Tensor)]:
        state[f"{ANSWERS}.{name}"] = answers.pop(name)
    tensors = save_tensors({name: value.contiguous() for name, value in state.items()})
    entries = copy.deepcopy({name: checkpoint[name] for name in ENTRIES}) | ({ANSWERS: answers} if answers else {})
    for part in (entries["hyper_parameters"], entries["transfer"]["backbone"]):
        part["weights"] = _without_folder(part["weights"])
    config = {
        "library_name": "frozen-backbone",
        "format": FORMAT,
        "sha256": hashlib.sha256(tensors).hexdigest(),
        "checkpoint": entries,
    }
    return {CONFIG: json.dumps(config, indent=1).encode(), TENSORS: tensors, CARD: card.encode()}


def _without_folder(weights: str | None) -> str | None:
    """The name of a weight file without its folder, which is private; other weights are unchanged."""
    return Path(weights).name if weights is not None and Path(weights).is_absolute() else weights


def from_files(folder: Path, address: str) -> dict[str, Any]:
    """Assemble a checkpoint from the files of a repository; its schema is not validated.

    Args:
        folder: Contains the files.
        address: Address for messages.

    Raises:
        CheckpointError: A file is missing or damaged, or this project has not written it.
    """
    try:
        config, content = json.loads((folder / CONFIG).read_bytes()), (folder / TENSORS).read_bytes()
        if config["library_name"] != "frozen-backbone" or config["format"] != FORMAT:
            raise KeyError("format")
        entries, expected = dict(config["checkpoint"]), config["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{address} is not a classifier that this version's push has written ({type(error).__name__}: {error})."
        ) from error
    if hashlib.sha256(content).hexdigest() != expected:
        raise CheckpointError(f"{address} is damaged: the SHA-256 of {TENSORS} differs from that in {CONFIG}.")
    try:
        tensors: dict[str, torch.Tensor] = load_tensors(content)
    except SafetensorError as error:
        raise CheckpointError(f"{address} is damaged: {TENSORS} cannot be read: {error}.") from error
    prefix = f"{ANSWERS}."
    if isinstance(entries.get(ANSWERS), dict):
        found = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        entries[ANSWERS] |= found
    return {**entries, "state_dict": {name: value for name, value in tensors.items() if not name.startswith(prefix)}}


def download(address: str) -> dict[str, Any]:
    """Download a checkpoint to the cache of ``huggingface_hub``, unless it is cached, and assemble it.

    Args:
        address: ``hf://USER/NAME``, optionally with ``@REVISION``.

    Raises:
        ConfigError: The address is invalid, or huggingface_hub is missing.
        CheckpointError: The repository does not exist, cannot be reached, or is damaged.
    """
    require_hub()
    repository = Address.parse(address)
    from huggingface_hub import hf_hub_download

    try:
        with process_state(log_levels={"huggingface_hub": logging.ERROR}):
            config = Path(hf_hub_download(repository.name, CONFIG, revision=repository.revision, etag_timeout=TIMEOUT))
            folder = config.parent  # named after the commit, which a push between the two downloads does not change
            hf_hub_download(repository.name, TENSORS, revision=folder.name, etag_timeout=TIMEOUT)
    except request_errors() as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{address} cannot be downloaded: {reason}") from error
    return from_files(folder, address)
