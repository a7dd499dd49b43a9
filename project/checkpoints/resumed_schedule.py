"""The cut of a checkpoint of a fit with staged unfreezing, and whether another schedule can continue from there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from project.checkpoints.metadata import completed_epochs
from project.errors import CheckpointError, ConfigError
from project.models.cut import Cut
from project.models.unfreezing import UnfreezingSchedule, entry_name


def saved_cut(checkpoint: Mapping[str, Any], schedule: UnfreezingSchedule) -> Cut:
    """The cut with which a checkpoint was saved.

    Args:
        checkpoint: From :func:`project.checkpoints.reader.read_checkpoint`.
        schedule: That of the model.

    Raises:
        CheckpointError: The schedule has no such cut.
    """
    stages = checkpoint["transfer"]["frozen"]["stages"]
    cut = next((cut for cut in schedule.cuts if list(cut.frozen) == stages), None)
    if cut is None:
        raise CheckpointError(
            "model.schedule has no entry with the stages that the checkpoint trains. Omit --model.schedule to use the "
            "checkpoint's."
        )
    return cut


def validate_schedule(checkpoint: Mapping[str, Any], schedule: UnfreezingSchedule, cut: Cut) -> None:
    """Check that a fit can follow a schedule after it is resumed.

    Args:
        checkpoint: See :func:`saved_cut`.
        schedule: That of the model, which may differ from that of the checkpoint.
        cut: From :func:`saved_cut`.

    Raises:
        ConfigError: The schedule trains other stages at its end, or would freeze trained stages again.
    """
    saved, last, epoch = (
        checkpoint["transfer"].get("last_cut"),
        entry_name(schedule.cuts[-1]),
        completed_epochs(checkpoint),
    )
    if saved != last:
        raise ConfigError(
            f"model.schedule ends with {last}, and that of the checkpoint with {saved}: a resumed fit cannot change "
            "which stages it trains.\nKeep the last entry, or start a new fit."
        )
    planned = schedule.cut_in(epoch)
    if planned is not None and len(planned.frozen) > len(cut.frozen):
        raise ConfigError(
            f"model.schedule: {entry_name(cut)} would begin after epoch {epoch}, but the checkpoint trains it already, "
            "and trained stages cannot be frozen again.\nLet it begin earlier, or start a new fit."
        )
