"""All rows that a fit needs: those that are stored, and those that have to be computed first."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from project.data.sources.base import Source
from project.errors import EngineError, ProjectError, StoreError
from project.features.engine_options import Option
from project.features.engine_selection import Choice, Cost, Rates, choose, cost
from project.features.engines import DTYPES, Engine
from project.features.extraction import Image, extract, keys_of, load_image
from project.features.store import SHARD, Found, evict, unwritable
from project.models.backbone import Backbone
from project.models.cut import Cut
from project.runtime.distributed import Ranks

MEASURED = 32  # images that engines are measured with


class OverBudgetError(StoreError):
    """The rows of this fit alone take more than all may."""


@dataclass(frozen=True)
class Supplied:
    """Rows, all of them there.

    Attributes:
        found: Where they are.
        option: What made them.
        computed: How many were computed now.
        damaged: How many shards were not what they should have been, and were made anew.
        seconds: What the computation took.
        prepared: What it took to choose the engine and to build it.
        reason: Why this engine.
    """

    found: Found
    option: Option
    computed: int
    damaged: int
    seconds: float
    prepared: float
    reason: str


@dataclass(frozen=True)
class Progress:
    """What is told meanwhile.

    Attributes:
        begins: With the option, the reason for it, how many rows are computed, and how many of them by this process.
        done: With each batch's number of images.
        waits: When another process is building the same rows.
    """

    begins: Callable[[Option, str, int, int], None]
    done: Callable[[int], None]
    waits: Callable[[], None]


def supply(
    images: Sequence[Image],
    source: Source,
    options: Sequence[Option],
    backbone: Backbone,
    cut: Cut,
    device: torch.device,
    root: Path,
    budget: int,
    ranks: Ranks,
    progress: Progress,
) -> Supplied:
    """Have a row of each image.

    Each image is computed by one of the processes, once; then all of them find all rows.

    Args:
        images: Each key once, in the same order in all processes.
        source: Reads them.
        options: The engines to choose among.
        backbone: Whose frozen prefix.
        cut: Where the prefix ends.
        device: Where to compute.
        root: Folder of the store.
        budget: Bytes that the store may take.
        ranks: The processes.
        progress: What is told meanwhile.

    Raises:
        OverBudgetError: The rows alone take more than the budget.
        StoreError: The rows cannot be written, or not be seen by all processes.
        DataError: An image cannot be read.
    """
    start = time.perf_counter()
    keys = keys_of(images)
    lacking = [len(option.space.find(keys, verify=False).missing) for option in options]
    if all(lacking):
        _refuse_too_much(len(images), options, cost(backbone, cut, device), budget)
    ranks.gather(None)  # nobody computes before all have looked
    choice: Choice | None = None
    with ranks.together():
        if ranks.rank == 0:
            choice = _choose(options, lacking, images, source, backbone, cut, device, root)
    index, reason = ranks.gather(choice and (choice.index, choice.reason))[0] or (0, "")
    option = options[index]
    found = option.space.find(keys)
    damaged, computed, began = found.damaged, 0, start
    if any(ranks.gather(len(found.missing))):
        with contextlib.ExitStack() as held:
            with ranks.together():
                if ranks.rank == 0:
                    held.enter_context(option.space.building(progress.waits))
            _refuse_unshared(option, ranks)
            stored = option.space.find(keys, verify=False)
            missing = stored.missing
            ranks.gather(None)  # nobody writes before all have looked
            computed = len(missing)
            with ranks.together():
                mine = [images[i] for i in missing[ranks.part(len(missing))]]
                progress.begins(option, reason, computed, len(mine))
                if mine:
                    first = torch.stack([load_image(source, mine[0])])
                    engine, probe = _built(option, choice.engine if choice else None, first)
                    began = time.perf_counter()
                    progress.done(0)  # from here on, time goes by for the rows alone
                    row = probe.numel() * probe.element_size()
                    if ranks.rank == 0:
                        evict(root, budget - computed * row, {shard.path for shard in stored.shards})
                    shard = max(SHARD, len(images) * row // 256)
                    extract(engine, mine, source, option.space, shard, progress.done)
            found = option.space.find(keys)
            ranks.gather(None)
        if len(found.missing):
            raise StoreError(f"{len(found.missing)} rows are not in {option.space.path} although they were computed.")
    return Supplied(found, option, computed, damaged, time.perf_counter() - began, began - start, reason)


def _refuse_unshared(option: Option, ranks: Ranks) -> None:
    """See that all processes see the same folder, before hours are spent on rows that some would not find."""
    sign = option.space.path / f".seen-{ranks.gather(uuid.uuid4().hex)[0]}"
    with ranks.together():
        if ranks.rank == 0 and ranks.size > 1:
            try:
                sign.touch()
            except OSError as error:
                raise unwritable(option.space.path, error) from error
    try:
        with ranks.together():
            if ranks.size > 1 and not sign.exists():
                raise StoreError(
                    f"{option.space.path} of process {ranks.rank} is not that of process 0, on another node. Features "
                    "have to be in a folder that all nodes share: name one with --features.folder PATH"
                )
    finally:
        if ranks.rank == 0:
            sign.unlink(missing_ok=True)


def _refuse_too_much(count: int, options: Sequence[Option], one: Cost, budget: int) -> None:
    itemsize = min(DTYPES[option.precision].itemsize if option.precision in DTYPES else 4 for option in options)
    needed = count * one.elements * itemsize
    if needed > budget:
        raise OverBudgetError(
            f"{count} rows of {'x'.join(map(str, one.shape))} take {needed / 1e9:.3g} GB, and features.budget is "
            f"{budget / 1e9:.3g}"
        )


def _choose(
    options: Sequence[Option],
    lacking: Sequence[int],
    images: Sequence[Image],
    source: Source,
    backbone: Backbone,
    cut: Cut,
    device: torch.device,
    root: Path,
) -> Choice:
    def some() -> torch.Tensor:
        return torch.stack([load_image(source, image) for image in images[:MEASURED]])

    network = f"{backbone.name} to {cut.frozen[-1]} at {backbone.preprocessing.crop} px"
    flops = cost(backbone, cut, device).flops if all(lacking) and len(options) > 1 else 0
    return choose(options, lacking, some, flops, device, Rates(root / "rates.json", network, device))


def _built(option: Option, engine: Engine | None, images: torch.Tensor) -> tuple[Engine, torch.Tensor]:
    """The engine, and its first rows."""
    try:
        engine = engine or option.build()
        return engine, engine(images)
    except ProjectError:
        raise
    except Exception as error:  # whatever an exporter raises
        why = str(error).strip().partition("\n")[0][:150]
        raise EngineError(
            f"features.engine: {option.name} {option.precision} cannot be built for this network "
            f"({type(error).__name__}: {why}). Use another, such as torch, or auto."
        ) from error
