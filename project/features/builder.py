"""Row builder: locates the rows that a fit needs, and computes those that are missing."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from project.data.sources.base import Source
from project.errors import EngineError, ProjectError, StoreError
from project.features.engine_options import EngineOption
from project.features.engine_selection import EngineChoice, choose_for_prefix, cost
from project.features.engines import DTYPES, Engine
from project.features.extraction import extract
from project.features.frozen_prefix import PrefixSpec
from project.features.store import SHARD_BYTES, RowLocations, evict_shards, unwritable_error
from project.features.views import View, Views, load_image
from project.runtime.console import print_rank_zero
from project.runtime.distributed import ProcessGroup

MEASURED_IMAGES = 32  # images to measure engines with


class OverBudgetError(StoreError):
    """The rows of this fit exceed the budget of the store."""


@dataclass(frozen=True)
class BuildResult:
    """Complete rows, and how they were obtained.

    Attributes:
        locations: Where the rows are stored.
        option: The engine and the space of the rows.
        computed: Number of rows computed now; the others were stored.
        corrupt: Number of corrupt shards, whose rows were computed again.
        seconds: Seconds spent computing.
        setup_seconds: Seconds spent choosing and building the engine.
        reason: Why this engine was chosen.
    """

    locations: RowLocations
    option: EngineOption
    computed: int
    corrupt: int
    seconds: float
    setup_seconds: float
    reason: str

    @property
    def reused(self) -> int:
        """Number of rows that were already stored."""
        return len(self.locations.row) - self.computed

    def __str__(self) -> str:
        timing = ""
        if self.computed:
            timing = f" in {self.seconds:.1f} s ({self.computed / self.seconds:.0f} images/s"
            timing += f", after {self.setup_seconds:.1f} s to choose and build the engine)"
        return f"{self.reused} rows reused, {self.computed} computed{timing}; {self.option}"


@dataclass(frozen=True)
class RowBuilder:
    """Builds rows in five steps: look up, choose an engine, lock, compute, verify. Each rank computes a share.

    Attributes:
        views: Views without duplicate keys, in the same order on all ranks.
        source: Reads the images.
        options: Engines to choose from.
        prefix: The frozen prefix.
        root: Folder of the store.
        budget: Bytes that the store may take.
        ranks: All processes of the run.
        on_progress: Called with the number of rows computed so far and in total, on this rank.
        skipped: Why an engine is not among the options; appended to the log line.
        preloaded: Images that were loaded to measure an engine, by row key.
    """

    views: Views
    source: Source
    options: Sequence[EngineOption]
    prefix: PrefixSpec
    root: Path
    budget: int
    ranks: ProcessGroup
    on_progress: Callable[[int, int], None]
    skipped: str
    preloaded: dict[bytes, torch.Tensor] = field(default_factory=dict)

    def build(self) -> BuildResult:
        """Locate or compute a row for each view.

        Raises:
            OverBudgetError: The rows exceed the budget.
            StoreError: The rows cannot be written, or the folder is not shared by all ranks.
            DataError: An image cannot be read.
        """
        start = time.perf_counter()
        option, engine, reason = self.choose(self.look_up())
        locations, corrupt = option.space.find_intact(self.views.keys)
        computed, began = 0, start
        if any(self.ranks.gather(len(locations.missing))):
            with self.lock(option):
                computed, began = self.compute(option, engine, reason)
                locations, _ = option.space.find_intact(self.views.keys)
                self.ranks.gather(None)
        if len(locations.missing):
            raise StoreError(
                f"{len(locations.missing)} rows are missing from {option.space.path} although they were computed. "
                "Run again, or use another folder (--features.folder PATH)."
            )
        if self.ranks.rank == 0:
            option.space.refresh_index()
        return BuildResult(locations, option, computed, corrupt, time.perf_counter() - began, began - start, reason)

    def look_up(self) -> list[int]:
        """Number of rows missing from the space of each option.

        Raises:
            OverBudgetError: No space is complete, and the rows exceed the budget.
        """
        missing = [len(option.space.find(self.views.keys).missing) for option in self.options]
        if all(missing):
            self._check_budget()
        self.ranks.gather(None)  # barrier: no rank writes rows before all have looked them up
        return missing

    def choose(self, missing: Sequence[int]) -> tuple[EngineOption, Engine | None, str]:
        """Choose an option on rank zero: the option, its engine if already built, and the reason.

        Args:
            missing: Number of rows missing from the space of each option.
        """
        choice: EngineChoice | None = None
        with self.ranks.propagate_errors():
            if self.ranks.rank == 0:
                choice = choose_for_prefix(self.prefix, self.root, self.options, missing, self._first_images)
        index, reason = self.ranks.gather(choice and (choice.index, choice.reason))[0] or (0, "")
        return self.options[index], choice.engine if choice else None, reason

    @contextmanager
    def lock(self, option: EngineOption) -> Iterator[None]:
        """Lock an option's space, for all ranks, while rows are computed."""
        with contextlib.ExitStack() as stack:
            with self.ranks.propagate_errors():
                if self.ranks.rank == 0:
                    message = "Features: another process is computing these rows; waiting for it"
                    stack.enter_context(option.space.lock(lambda: print_rank_zero(message)))
            self._check_shared_folder(option)
            yield

    def compute(self, option: EngineOption, engine: Engine | None, reason: str) -> tuple[int, float]:
        """Compute this rank's share of the missing rows; rank zero then merges small shards.

        Args:
            option: Option whose space is locked.
            engine: The engine, if already built.
            reason: Why this option was chosen.

        Returns:
            Number of rows computed by all ranks, and when the computation began.
        """
        ranks, began = self.ranks, time.perf_counter()
        stored = option.space.find(self.views.keys)
        before = {*option.space.shards()}
        missing = stored.missing
        ranks.gather(None)  # barrier: no rank writes rows before all have looked them up
        shard_bytes = SHARD_BYTES
        with ranks.propagate_errors():
            share = self.views.take(missing[ranks.rank_slice(len(missing))])
            done = 0

            def on_batch(count: int) -> None:
                nonlocal done
                done += count
                self.on_progress(done, len(share))

            on_batch(0)
            print_rank_zero(
                f"Features: {len(missing)} of {len(self.views)} rows to compute with {option} ({reason}{self.skipped})"
            )
            if len(share):
                engine, row = build_engine(option, engine, self._load(share[0])[None])
                began = time.perf_counter()
                on_batch(0)  # the estimated time left excludes building the engine
                row_bytes = row.numel() * row.element_size()
                if ranks.rank == 0:
                    in_use = {shard.path for shard in stored.shards}
                    evict_shards(self.root, self.budget - len(missing) * row_bytes, in_use)
                shard_bytes = max(SHARD_BYTES, len(self.views) * row_bytes // 256)
                extract(engine, share, self.source, option.space, shard_bytes, on_batch, self.preloaded)
        with ranks.propagate_errors():
            if ranks.rank == 0:
                option.space.compact({*option.space.shards()} - before, shard_bytes)
        return len(missing), began

    def _first_images(self) -> torch.Tensor:
        return torch.stack([self._load(view) for view in self.views[:MEASURED_IMAGES]])

    def _load(self, view: View) -> torch.Tensor:
        """Load an image and keep it for the extraction."""
        if view.key not in self.preloaded:
            self.preloaded[view.key] = load_image(self.source, view)
        return self.preloaded[view.key]

    def _check_shared_folder(self, option: EngineOption) -> None:
        """Fail before hours of computation if some ranks would not see the rows of the others."""
        try:
            is_shared = self.ranks.shares(option.space.path)
        except OSError as error:
            raise unwritable_error(option.space.path, error) from error
        with self.ranks.propagate_errors():
            if not is_shared:
                raise StoreError(
                    f"{option.space.path} on the node of rank {self.ranks.rank} is not the folder of rank 0. "
                    "Store features in a folder that all nodes share: --features.folder PATH"
                )

    def _check_budget(self) -> None:
        image = cost(self.prefix.backbone, self.prefix.cut, self.prefix.device)
        sizes = [DTYPES[option.precision].itemsize if option.precision in DTYPES else 4 for option in self.options]
        needed = len(self.views) * math.prod(image.shape) * min(sizes)
        if needed > self.budget:
            raise OverBudgetError(
                f"{len(self.views)} rows of {'x'.join(map(str, image.shape))} take {needed / 1e9:.3g} GB, and "
                f"features.budget is {self.budget / 1e9:.3g}"
            )


def build_engine(option: EngineOption, engine: Engine | None, images: torch.Tensor) -> tuple[Engine, torch.Tensor]:
    """Build an engine unless it exists, and compute rows to test it.

    Args:
        option: The engine to build.
        engine: The engine, if already built.
        images: uint8 ``(B, 3, H, W)``.

    Returns:
        The engine, and the rows of the images.

    Raises:
        EngineError: The engine cannot be built.
    """
    try:
        engine = engine or option.build()
        return engine, engine(images)
    except ProjectError:
        raise
    except Exception as error:  # anything: exporters raise many types
        reason = str(error).strip().partition("\n")[0][:150]
        raise EngineError(
            f"features.engine: {option} cannot be built for this network ({type(error).__name__}: {reason}). "
            "Use another engine, such as torch, or auto."
        ) from error
