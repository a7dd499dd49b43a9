"""Construction of optimizers with their schedulers, and the default optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from project.config.class_path import ClassSpec
from project.errors import ConfigError
from project.models.parameter_groups import ALL, arrange_groups
from project.models.schedules import for_groups


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


def construct_optimizer(
    hparams: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]
) -> tuple[Optimizer, LRScheduler | None]:
    """Construct the optimizer and the scheduler from hyperparameters.

    Args:
        hparams: With ``optimizer`` and ``scheduler``, each as ``{"class_path": ..., "init_args": {...}}``; the
            scheduler may be ``None``. Optionally with ``lr_decay``.
        groups: The parameters to optimize, see :func:`project.models.parameter_groups.stage_groups`.

    Raises:
        ConfigError: A class does not accept its arguments, or the optimizer cannot work here.
    """
    spec = ClassSpec.from_dict(hparams["optimizer"])
    lr_decay: float = hparams.get("lr_decay", 1.0)  # earlier versions had none
    if spec.name == "SparseAdam":
        raise ConfigError("model.optimizer: SparseAdam needs sparse gradients, and these are dense. Use Adam.")
    if spec.name == "LBFGS":  # it accepts a single group
        if lr_decay != 1:
            raise ConfigError("model.lr_decay: LBFGS has one learning rate. Use another optimizer, or lr_decay 1.")
        groups = [{"name": ALL, "params": [parameter for group in groups for parameter in group["params"]]}]
    copies = [{"name": group["name"], "params": group["params"]} for group in groups]  # the optimizer adds settings
    optimizer = spec.construct("model.optimizer", Optimizer, copies)
    _refuse_capturable(optimizer)
    depths = arrange_groups(optimizer, groups, lr_decay)
    if hparams["scheduler"] is None:
        return optimizer, None
    schedule = for_groups(ClassSpec.from_dict(hparams["scheduler"]), depths, lr_decay)
    return optimizer, schedule.construct("model.scheduler", LRScheduler, optimizer)


def _refuse_capturable(optimizer: Optimizer) -> None:
    """Refuse ``capturable`` on devices without CUDA graphs: torch raises an AssertionError in the first step."""
    for group in optimizer.param_groups:
        devices = {parameter.device.type for parameter in group["params"]}
        if group.get("capturable") and not group.get("fused") and devices & {"cpu", "mps"}:
            raise ConfigError(
                f"model.optimizer: {type(optimizer).__name__} with capturable true needs a GPU.\n"
                "Set --model.optimizer.capturable false, or train on a GPU."
            )
