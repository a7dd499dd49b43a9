"""Checkpoints of networks that earlier versions did not divide into stages: their only stage was ``body``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from project.errors import CheckpointError
from project.models.backbone import Backbone, stage_prefix
from project.models.cut import WHOLE


def frozen_stages(checkpoint: Mapping[str, Any], backbone: Backbone) -> list[str]:
    """Names of the stages that the fit of a checkpoint has frozen.

    Args:
        checkpoint: Of the same network.
        backbone: The network.
    """
    stages: list[str] = checkpoint["transfer"]["frozen"]["stages"]
    return list(backbone.stages) if stages == [WHOLE] else stages


def divided_tensors(checkpoint: Mapping[str, Any], backbone: Backbone) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, with the names that they have in the stages of the network.

    Args:
        checkpoint: Of the same network; unchanged.
        backbone: The network.
    """
    tensors: dict[str, torch.Tensor] = checkpoint["state_dict"]
    if not _has_trained_whole(checkpoint, backbone):
        return tensors
    names = {
        f"{stage_prefix(WHOLE)}{name.removeprefix('network.')}": f"{stage_prefix(stage)}{name}"
        for stage, part in backbone.stages.items()
        for name in part.state_dict()
    }
    return {names.get(name, name): tensor for name, tensor in tensors.items()}


def require_divided(checkpoint: Mapping[str, Any], backbone: Backbone) -> None:
    """Refuse to resume a fit that has trained the network as a single stage: its optimizer has other groups.

    Raises:
        CheckpointError: The fit has trained the single stage.
    """
    if _has_trained_whole(checkpoint, backbone):
        raise CheckpointError(
            f"The fit of this checkpoint has trained {backbone.name} as a single stage. This version divides it into "
            "stages and cannot resume the fit.\nResume it with the version that wrote it; test and predict accept it."
        )


def _has_trained_whole(checkpoint: Mapping[str, Any], backbone: Backbone) -> bool:
    prefix = stage_prefix(WHOLE)
    return WHOLE not in backbone.stages and any(str(name).startswith(prefix) for name in checkpoint["state_dict"])
