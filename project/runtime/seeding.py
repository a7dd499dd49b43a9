"""Seeds derived from a position, such as an epoch and a batch, and the states of the random number generators."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def run_seed() -> int:
    """The run's seed, set by Lightning's ``seed_everything``; 0 if unset."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def derive_seed(*key: object) -> int:
    """Derive a seed from a key, such as the run's seed, an epoch and an image index.

    Returns:
        The first 64 bits of the key's SHA-256, as a signed integer.
    """
    return seed_from_digest(hashlib.sha256(" ".join(map(str, key)).encode()).digest())


def seed_from_digest(digest: bytes) -> int:
    """The first 64 bits of a digest, as a signed integer."""
    return int.from_bytes(digest[:8], "little", signed=True)


def shuffle_seed(seed: int, epoch: int) -> int:
    """Seed of the shuffle of an epoch.

    Not :func:`derive_seed`, so that a fit resumed from a checkpoint of an earlier version keeps its order.

    Args:
        seed: Seed of the run.
        epoch: Epoch, from 0.
    """
    return (seed * 1_000_003 + epoch) % 2**63


def reseed(device: torch.device, *key: object) -> None:
    """Seed torch (CPU and the training device), numpy and random.

    Args:
        device: Device of the model; must be the current one of its type.
        key: Key of the seed; see :func:`derive_seed`.
    """
    seed = derive_seed(*key)
    # Not torch.manual_seed: it records a stack trace for each unused device type, which takes as long as a training
    # step on stored rows.
    torch.default_generator.manual_seed(seed)
    if device.type not in ("cpu", "xla"):  # XLA does not use a torch generator
        torch.get_device_module(device).manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def rng_state() -> dict[str, Any]:
    """RNG states of torch, CUDA, ``random`` and NumPy in this process, in plain types."""
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "random": [version, list(words), gauss],
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
    }


def restore_rng_state(state: Mapping[str, Any]) -> None:
    """Restore the RNG states from :func:`rng_state`."""
    torch.set_rng_state(state["torch"].cpu())
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([tensor.cpu() for tensor in state["cuda"]])
    version, words, gauss = state["random"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
