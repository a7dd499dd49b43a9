"""SHA-256 of parameters and buffers, to prove that frozen stages are bit-identical."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import chain

import torch
from torch import nn


def fingerprint(modules: Iterable[tuple[str, nn.Module]]) -> str:
    """Hash the names, shapes, dtypes and bytes of all parameters and buffers of modules.

    The hash does not depend on device or memory format.

    Args:
        modules: Named modules, in a fixed order.

    Returns:
        64 hexadecimal digits.
    """
    return fingerprint_tensors(
        (f"{prefix}.{name}", tensor) for prefix, module in modules for name, tensor in named_tensors(module)
    )


def named_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters and buffers of a module by name."""
    yield from chain(module.named_parameters(), module.named_buffers())


def fingerprint_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Hash the names, shapes, dtypes and bytes of tensors, see :func:`fingerprint`.

    Args:
        tensors: Named tensors, in a fixed order.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
