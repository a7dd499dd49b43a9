"""Seeds that come from where a thing stands, so that it is drawn the same way again whatever was drawn before it."""

from __future__ import annotations

import hashlib
import os
import random

import numpy as np
import torch


def run_seed() -> int:
    """The seed of the run, as Lightning's ``seed_everything`` has set it."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def seed_at(*place: object) -> int:
    """A seed for a place, such as a run's seed, an epoch and an image's number.

    Args:
        place: What tells this place from others.

    Returns:
        64 bits of its SHA-256, signed.
    """
    return seed_of(hashlib.sha256(" ".join(map(str, place)).encode()).digest())


def seed_of(digest: bytes) -> int:
    """A seed from a digest: its first 64 bits, signed."""
    return int.from_bytes(digest[:8], "little", signed=True)


def order_seed(seed: int, epoch: int) -> int:
    """The seed of the order of an epoch's images.

    Not :func:`seed_at`: a fit that is resumed from a checkpoint of an earlier version is to keep its order.

    Args:
        seed: Of the run.
        epoch: Which one, from 0.
    """
    return (seed * 1_000_003 + epoch) % 2**63


def reseed(device: torch.device, *place: object) -> None:
    """Seed all that draws in this process: torch on the CPU and on the device that trains, numpy and random.

    Args:
        device: That of the model, the current one of its kind.
        place: What tells this place from others.
    """
    seed = seed_at(*place)
    # Not torch.manual_seed: for each kind of device that is not in use it writes down where it was called from, which
    # takes as long as a step on stored rows.
    torch.default_generator.manual_seed(seed)
    if device.type not in ("cpu", "xla"):  # XLA draws from no generator of torch's
        torch.get_device_module(device).manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
