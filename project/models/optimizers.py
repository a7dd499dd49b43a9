"""Optimizers with the project's own defaults."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class ArticleSGD(torch.optim.SGD):
    """SGD with the article's learning rate and momentum as defaults, unlike ``torch.optim.SGD``.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        momentum: Momentum factor.
        kwargs: Other arguments of ``torch.optim.SGD``.
    """

    def __init__(self, params: Iterable[Any], lr: float = 0.001, momentum: float = 0.9, **kwargs: Any) -> None:
        super().__init__(params, lr=lr, momentum=momentum, **kwargs)
