"""SHA-256 of parameters and buffers: the proof that a frozen part is bit for bit what it was."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from itertools import chain

import torch
from torch import nn


def fingerprint(modules: Iterable[tuple[str, nn.Module]]) -> str:
    """Hash the names, shapes, dtypes and bytes of all parameters and buffers.

    Where a tensor lies (device) and how (memory format) does not count, so a module has the same fingerprint on a GPU
    and in ``channels_last``.

    Args:
        modules: Named modules, in an order that is always the same.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for prefix, module in modules:
        for name, tensor in chain(module.named_parameters(), module.named_buffers()):
            value = tensor.detach().cpu().contiguous()
            digest.update(f"{prefix}.{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
