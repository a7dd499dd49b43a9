"""Rows of images on demand: from the store, and computed where it lacks them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from project.errors import ConfigError
from project.models.backbone import Backbone
from project.models.cut import Cut
from project.runtime.console import print_rank_zero, progress_counter
from project.runtime.system import memory_limit

if TYPE_CHECKING:  # what a fit alone needs is imported when one begins
    from project.data.sources.base import Sample, Source
    from project.features.builder import Progress, Provided
    from project.features.engine_options import EngineFactory, EngineOption
    from project.features.views import View, Views
    from project.runtime.distributed import ProcessGroup

CALIBRATION = 128  # images that int8 is calibrated on
EngineName = Literal["auto", "torch", "compile", "onnxruntime"]
PrecisionName = Literal["auto", "fp32", "bf16", "fp16", "int8"]


@dataclass(frozen=True)
class RowComputation:
    """A frozen computation, and where and how it computes rows.

    Attributes:
        backbone: Whose frozen stages.
        cut: Where they end.
        encode: Images on the device to rows, as the live model does it.
        layout: Memory format that ``encode`` gives its images: channels_last or contiguous.
        device: Where to compute.
        precision: Lightning's name of the precision, such as 32-true or bf16-mixed.
    """

    backbone: Backbone
    cut: Cut
    encode: Callable[[torch.Tensor], torch.Tensor]
    layout: str
    device: torch.device
    precision: str


@dataclass
class StoredFeatures:
    """The stored rows of a fit, for reports on it.

    Attributes:
        fingerprints: SHA-256 of train and val, images and labels.
        in_both: Number of images that are in train and in val.
        examples: A few training images, each in all its views, while the fit runs.
        computed_by: What has computed the rows, and of how many views of an image.
    """

    fingerprints: Mapping[str, str]
    in_both: int
    examples: Sequence[Sequence[View]] = ()
    computed_by: str = ""


class RowProvider:
    """Provides rows of images: what is stored is read, what is not is computed and stored.

    Args:
        engine: What computes: torch, compile, onnxruntime, or auto.
        precision: Of the computation, or auto.
        budget: Gigabytes that all stored rows may take.
        root: Folder of the store.

    Raises:
        ConfigError: The budget is out of its range.
    """

    def __init__(self, engine: EngineName, precision: PrecisionName, budget: float, root: Path) -> None:
        if not 0 < budget < math.inf:
            raise ConfigError(f"features.budget has to be more than 0 gigabytes, not {budget:g}.")
        self._engine = engine
        self._precision = None if precision == "auto" else precision
        self._budget = round(budget * 1e9)
        self._root = root

    def provide(
        self, computation: RowComputation, source: Source, views: Views, typical: Views
    ) -> tuple[Provided, EngineFactory]:
        """Have a row of each view.

        Args:
            computation: What makes the rows.
            source: Reads the images.
            views: Each key once.
            typical: What int8 is calibrated on.

        Raises:
            OverBudgetError: They alone take more than the budget.
            StoreError: They cannot be stored.
            DataError: An image cannot be read.
        """
        from project.features.builder import RowBuilder
        from project.features.engine_options import EngineFactory
        from project.features.views import load_image
        from project.runtime.distributed import ProcessGroup

        ranks = ProcessGroup()

        def calibration() -> torch.Tensor:
            return torch.stack([load_image(source, view) for view in thinned(typical)])

        engines = EngineFactory(
            self._root,
            computation.backbone,
            computation.cut,
            computation.encode,
            computation.device,
            " ".join([source.name, *source.classes]),
            calibration,
            computation.layout,
        )
        options = self._options(engines, computation.precision, ranks)
        with _progress(len(views), ranks, engines.left_out) as progress:
            provided = RowBuilder(
                views,
                source,
                options,
                computation.backbone,
                computation.cut,
                computation.device,
                self._root,
                self._budget,
                ranks,
                progress,
            ).build()
        if provided.damaged:
            print_rank_zero(f"Features: {provided.damaged} corrupt cache files were discarded and recomputed")
        print_rank_zero(f"Features: {provided}")
        return provided, engines

    def rows_of(self, computation: RowComputation, source: Source, samples: Sequence[Sample]) -> torch.Tensor:
        """What the frozen prefix makes of images, without augmentation; what is stored is not computed again.

        Args:
            computation: What makes them.
            source: Reads the images.
            samples: N samples.

        Returns:
            Rows ``(N, ...)``, float32, on the CPU.
        """
        from project.data.transforms import evaluation
        from project.features.row_loader import open_rows
        from project.features.views import digest_images, distinct, image_views
        from project.runtime.distributed import ProcessGroup

        digests = digest_images(source, samples, ProcessGroup())
        plain = image_views(source, samples, digests, evaluation(computation.backbone.preprocessing), [""])
        views, [[place]] = distinct([plain])
        provided, _ = self.provide(computation, source, views, views)
        cpu = torch.device("cpu")
        rows = open_rows(provided.option.space, views.keys, provided.found, memory(cpu), cpu)
        try:
            return rows[torch.from_numpy(place.astype(np.int64))].float()
        finally:
            rows.close()

    def _options(self, engines: EngineFactory, trainer_precision: str, ranks: ProcessGroup) -> list[EngineOption]:
        options: list[EngineOption] = []
        for turn in range(2):  # what is exported and calibrated is written by one process, then read by the others
            with ranks.together():
                if (ranks.rank == 0) == (turn == 0):
                    options = engines.options(self._engine, self._precision, trainer_precision)
        return options


def thinned(views: Views) -> Views:
    """As many of some views as int8 is calibrated on, from all over them."""
    return views[:: -(-len(views) // CALIBRATION)]


@contextmanager
def _progress(count: int, ranks: ProcessGroup, left_out: str) -> Iterator[Progress]:
    """A bar on a terminal, lines elsewhere; from the first process."""
    from project.features.builder import Progress

    done, total = 0, 0
    with progress_counter("Features", ranks.rank == 0) as show:

        def begins(option: EngineOption, reason: str, computed: int, mine: int) -> None:
            nonlocal total
            total = mine
            show(0, total)
            print_rank_zero(f"Features: {computed} of {count} rows to compute, by {option} ({reason}{left_out})")

        def advance(more: int) -> None:
            nonlocal done
            done += more
            show(done, total)

        yield Progress(
            begins,
            advance,
            lambda: print_rank_zero("Features: another process is computing these rows; waiting for it"),
        )


def memory(device: torch.device, processes: int = 1) -> int:
    """Bytes that rows may take of the device's memory: half of what is free on a GPU, a quarter of all on a CPU.

    Of a container, all is what it may use.

    Args:
        device: Where they are held.
        processes: Of this run on this machine. They share its memory, while each has a GPU of its own.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    return memory_limit() // 4 // processes
