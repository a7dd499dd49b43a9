"""All rows that a fit needs: those that are stored, and those that have to be computed first."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from project.data.sources.base import Source
from project.errors import EngineError, ProjectError, StoreError
from project.features.engine_options import EngineOption
from project.features.engine_selection import EngineChoice, RateFile, choose, cost
from project.features.engines import DTYPES, Engine
from project.features.extraction import extract
from project.features.store import SHARD, Found, evict_shards, unwritable
from project.features.views import View, Views, load_image
from project.models.backbone import Backbone
from project.models.cut import Cut
from project.runtime.distributed import ProcessGroup

MEASURED = 32  # images that engines are measured with


class OverBudgetError(StoreError):
    """The rows of this fit alone take more than all may."""


@dataclass(frozen=True)
class Provided:
    """Rows, all of them there, and how they came about.

    Attributes:
        found: Where they are.
        option: The engine that makes such rows.
        computed: How many were computed now.
        damaged: How many shards were damaged; their rows were computed again.
        seconds: What the computation took.
        prepared: Seconds that it took to choose the engine and to build it.
        reason: Why this engine.
    """

    found: Found
    option: EngineOption
    computed: int
    damaged: int
    seconds: float
    prepared: float
    reason: str

    @property
    def reused(self) -> int:
        """How many rows were stored already."""
        return len(self.found.shard) - self.computed

    def __str__(self) -> str:
        how = ""
        if self.computed:
            how = f" in {self.seconds:.1f} s ({self.computed / self.seconds:.0f} images/s"
            how += f", {self.prepared:.1f} s to choose and build the engine before)"
        return f"{self.reused} rows reused, {self.computed} computed{how}; {self.option}"


@dataclass(frozen=True)
class Progress:
    """What is reported meanwhile.

    Attributes:
        begins: With the option, the reason for it, how many rows are computed, and how many of them by this process.
        done: With each batch's number of images.
        waits: When another process is building the same rows.
    """

    begins: Callable[[EngineOption, str, int, int], None]
    done: Callable[[int], None]
    waits: Callable[[], None]


@dataclass(frozen=True)
class RowBuilder:
    """Builds rows in five steps: look up, choose, lock, compute, verify. Each row is computed by one process, once.

    Attributes:
        views: Each key once, in the same order in all processes.
        source: Reads the images.
        options: The engines to choose among.
        backbone: Whose frozen prefix.
        cut: Where the prefix ends.
        device: Where to compute.
        root: Folder of the store.
        budget: Bytes that the store may take.
        ranks: The processes.
        progress: What is reported meanwhile.
        known: Images that were read to measure an engine, by the keys of their rows.
    """

    views: Views
    source: Source
    options: Sequence[EngineOption]
    backbone: Backbone
    cut: Cut
    device: torch.device
    root: Path
    budget: int
    ranks: ProcessGroup
    progress: Progress
    known: dict[bytes, torch.Tensor] = field(default_factory=dict)

    def build(self) -> Provided:
        """Have a row of each view.

        Raises:
            OverBudgetError: The rows alone take more than the budget.
            StoreError: The rows cannot be written, or not be seen by all processes.
            DataError: An image cannot be read.
        """
        start = time.perf_counter()
        option, engine, reason = self.choose(self.look_up())
        found, damaged = self.verify(option)
        computed, began = 0, start
        if any(self.ranks.gather(len(found.missing))):
            with self.lock(option):
                computed, began = self.compute(option, engine, reason)
                found, _ = self.verify(option)
                self.ranks.gather(None)
        if len(found.missing):
            raise StoreError(f"{len(found.missing)} rows are not in {option.space.path} although they were computed.")
        if self.ranks.rank == 0:
            option.space.refresh_index()
        return Provided(found, option, computed, damaged, time.perf_counter() - began, began - start, reason)

    def look_up(self) -> list[int]:
        """How many rows the space of each option lacks.

        Raises:
            OverBudgetError: All lack some, and the rows alone take more than the budget.
        """
        missing = [len(option.space.find(self.views.keys).missing) for option in self.options]
        if all(missing):
            self._refuse_too_much()
        self.ranks.gather(None)  # nobody computes before all have looked
        return missing

    def choose(self, missing: Sequence[int]) -> tuple[EngineOption, Engine | None, str]:
        """The option to use, by rank zero; its engine where it is built already; and the reason.

        Args:
            missing: Rows that the space of each option lacks.
        """
        choice: EngineChoice | None = None
        with self.ranks.together():
            if self.ranks.rank == 0:
                network = f"{self.backbone.name} to {self.cut.frozen[-1]} at "
                network += f"{self.backbone.preprocessing.crop} px"
                measures = all(missing) and len(self.options) > 1
                flops = cost(self.backbone, self.cut, self.device).flops if measures else 0
                rates = RateFile(self.root / "rates.json", network, self.device)
                choice = choose(self.options, missing, self._first_images, flops, self.device, rates)
        index, reason = self.ranks.gather(choice and (choice.index, choice.reason))[0] or (0, "")
        return self.options[index], choice.engine if choice else None, reason

    @contextmanager
    def lock(self, option: EngineOption) -> Iterator[None]:
        """Hold an option's space, for all ranks, while rows are computed."""
        with contextlib.ExitStack() as held:
            with self.ranks.together():
                if self.ranks.rank == 0:
                    held.enter_context(option.space.building(self.progress.waits))
            self._refuse_unshared(option)
            yield

    def compute(self, option: EngineOption, engine: Engine | None, reason: str) -> tuple[int, float]:
        """Compute the rows that are missing, each rank its part, and merge the small shards that come of it.

        Args:
            option: Whose space is held.
            engine: The engine, if it is built already.
            reason: Why this option.

        Returns:
            How many rows were computed, and when the computation itself began.
        """
        ranks, began = self.ranks, time.perf_counter()
        stored = option.space.find(self.views.keys)
        before = {*option.space.shards()}
        missing = stored.missing
        ranks.gather(None)  # nobody writes before all have looked
        size = SHARD
        with ranks.together():
            mine = self.views.take(missing[ranks.part(len(missing))])
            self.progress.begins(option, reason, len(missing), len(mine))
            if len(mine):
                first = self._load(mine[0])[None]
                engine, probe = _built(option, engine, first)
                began = time.perf_counter()
                self.progress.done(0)  # from here on, time goes by for the rows alone
                row = probe.numel() * probe.element_size()
                if ranks.rank == 0:
                    evict_shards(self.root, self.budget - len(missing) * row, {shard.path for shard in stored.shards})
                size = max(SHARD, len(self.views) * row // 256)
                extract(engine, mine, self.source, option.space, size, self.progress.done, self.known)
        with ranks.together():
            if ranks.rank == 0:
                option.space.compact({*option.space.shards()} - before, size)
        return len(missing), began

    def verify(self, option: EngineOption) -> tuple[Found, int]:
        """Find rows whose shards are sound; those of damaged ones are missing.

        Returns:
            Where the rows are, and how many shards were damaged.
        """
        damaged: set[Path] = set()
        while True:
            found = option.space.find(self.views.keys, damaged)
            more = {*option.space.verify(found)}
            if not more:
                return found, len(damaged)
            damaged |= more
            option.space.quarantine(more)

    def _first_images(self) -> torch.Tensor:
        return torch.stack([self._load(view) for view in self.views[:MEASURED]])

    def _load(self, view: View) -> torch.Tensor:
        """Read an image before its turn, and keep it for that."""
        if view.key not in self.known:
            self.known[view.key] = load_image(self.source, view)
        return self.known[view.key]

    def _refuse_unshared(self, option: EngineOption) -> None:
        """See that all processes see the same folder, before hours are spent on rows that some would not find."""
        ranks = self.ranks
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
                        f"{option.space.path} of process {ranks.rank} is not that of process 0, on another node. "
                        "Features have to be in a folder that all nodes share: name one with --features.folder PATH"
                    )
        finally:
            if ranks.rank == 0:
                sign.unlink(missing_ok=True)

    def _refuse_too_much(self) -> None:
        one = cost(self.backbone, self.cut, self.device)
        kinds = [DTYPES[option.precision].itemsize if option.precision in DTYPES else 4 for option in self.options]
        needed = len(self.views) * one.elements * min(kinds)
        if needed > self.budget:
            raise OverBudgetError(
                f"{len(self.views)} rows of {'x'.join(map(str, one.shape))} take {needed / 1e9:.3g} GB, and "
                f"features.budget is {self.budget / 1e9:.3g}"
            )


def _built(option: EngineOption, engine: Engine | None, images: torch.Tensor) -> tuple[Engine, torch.Tensor]:
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
