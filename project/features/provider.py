"""Row provider: reads rows of images from the feature store; computes and stores missing ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from project.errors import ConfigError
from project.features.frozen_prefix import PrefixSpec
from project.runtime.console import print_rank_zero, progress_counter
from project.runtime.system import memory_limit

if TYPE_CHECKING:  # imported when a fit begins, to keep start-up fast
    from project.data.sources.base import Sample, Source
    from project.features.builder import BuildResult
    from project.features.engine_options import EngineFactory, EngineOption
    from project.features.engines import Engine
    from project.features.store import Space
    from project.features.views import View, Views
    from project.runtime.distributed import ProcessGroup

CALIBRATION_IMAGES = 128  # images to calibrate int8 on
SERVED_IMAGES = 10_000  # images that an engine is chosen for if their number is not known
#: With fewer images, an engine is neither measured nor exported.
FEW_IMAGES = 64
EngineSetting = Literal["auto", "torch", "compile", "onnxruntime"]
PrecisionSetting = Literal["auto", "fp32", "bf16", "fp16", "int8"]


@dataclass
class StoredFeatures:
    """The stored rows that a fit uses, for its reports.

    Attributes:
        fingerprints: SHA-256 of the images and labels of train and val.
        overlap: Number of images that are in both train and val.
        examples: All views of a few training images, during the fit.
        computed_by: The engine, and the number of views per image.
    """

    fingerprints: Mapping[str, str]
    overlap: int
    examples: Sequence[Sequence[View]] = ()
    computed_by: str = ""


class RowProvider:
    """Provides rows of images: reads stored rows; computes and stores missing ones.

    Args:
        engine: ``torch``, ``compile``, ``onnxruntime``, or ``auto`` for the fastest.
        precision: Precision of the computation, or ``auto`` for any that the trainer's precision allows.
        budget: Gigabytes that the store may take.
        root: Folder of the store.

    Raises:
        ConfigError: The budget is not positive.
    """

    def __init__(self, engine: EngineSetting, precision: PrecisionSetting, budget: float, root: Path) -> None:
        if not 0 < budget < math.inf:
            raise ConfigError(f"features.budget must be more than 0 gigabytes, not {budget:g}.")
        #: Requested engine, and precision of the computation; ``None`` for any that the trainer's precision allows.
        self.engine: EngineSetting = engine
        self.precision = None if precision == "auto" else precision
        #: Bytes that the store may take.
        self.budget = round(budget * 1e9)
        self._root = root

    def row_bytes(self, prefix: PrefixSpec) -> int:
        """Minimum size of a row in bytes.

        Args:
            prefix: The frozen prefix.
        """
        from project.features.engine_options import allowed_precisions
        from project.features.engine_selection import cost
        from project.features.engines import DTYPES

        precisions = allowed_precisions(self.precision, prefix.precision)
        dtypes = [DTYPES.get(precision, torch.float32) for precision in precisions]  # int8 engines output float32
        itemsize = min(dtype.itemsize for dtype in dtypes)
        return math.prod(cost(prefix.backbone, prefix.cut, prefix.device).shape) * itemsize

    def provide(
        self, prefix: PrefixSpec, source: Source, views: Views, calibration_views: Views
    ) -> tuple[BuildResult, EngineFactory]:
        """Locate or compute a row for each view.

        Args:
            prefix: The frozen prefix.
            source: Reads the images.
            views: Views without duplicate keys.
            calibration_views: Views to calibrate int8 on: see :func:`calibration_subset`.

        Returns:
            Where the rows are stored, and the factory of their engine.

        Raises:
            OverBudgetError: The rows exceed the budget.
            StoreError: The rows cannot be stored.
            DataError: An image cannot be read.
        """
        from project.features.builder import RowBuilder
        from project.features.engine_options import EngineFactory
        from project.features.views import load_image
        from project.runtime.distributed import ProcessGroup

        ranks = ProcessGroup()

        def calibration() -> torch.Tensor:
            return torch.stack([load_image(source, view) for view in calibration_views])

        engines = EngineFactory(self._root, prefix, " ".join([source.name, *source.classes]), calibration)
        options = self._options(engines, ranks)
        with progress_counter("Features", ranks.rank == 0) as on_progress:
            result = RowBuilder(
                views, source, options, prefix, self._root, self.budget, ranks, on_progress, engines.skipped
            ).build()
        if result.corrupt:
            print_rank_zero(f"Features: {result.corrupt} corrupt cache files were discarded and recomputed")
        print_rank_zero(f"Features: {result}")
        return result, engines

    def encode_samples(self, prefix: PrefixSpec, source: Source, samples: Sequence[Sample]) -> torch.Tensor:
        """Rows of images without augmentation; missing ones are computed and stored.

        Args:
            prefix: The frozen prefix.
            source: Reads the images.
            samples: N samples.

        Returns:
            Rows ``(N, ...)``, float32, on the CPU.
        """
        from project.data.transforms import evaluation
        from project.features.row_loader import open_rows
        from project.features.views import deduplicate, digest_images, image_views
        from project.runtime.distributed import ProcessGroup

        digests = digest_images(source, samples, ProcessGroup())
        plain = image_views(source, samples, digests, evaluation(prefix.backbone.preprocessing), [""])
        views, [[index]] = deduplicate([plain])
        result, _ = self.provide(prefix, source, views, calibration_subset(views))
        cpu = torch.device("cpu")
        rows = open_rows(result.option.space, views.keys, result.locations, row_memory_budget(cpu), cpu)
        try:
            return rows[torch.from_numpy(index.astype(np.int64))].float()
        finally:
            rows.close()

    def select(self, prefix: PrefixSpec, images: torch.Tensor) -> tuple[EngineOption, Engine, str]:
        """Choose and build an engine for images that are not known yet. No rows are stored.

        ``auto`` omits torch.compile, which takes long to start and computes a full batch for a single image.

        Args:
            prefix: The frozen prefix.
            images: Images to measure engines with, uint8 ``(B, 3, H, W)``.

        Returns:
            The option, its engine, and the reason for the choice.

        Raises:
            ConfigError: No engine matches the settings; int8 never does, as it needs calibration images.
            EngineError: The engine cannot be built.
        """
        from project.features.builder import build_engine
        from project.features.engine_options import EngineFactory
        from project.features.engine_selection import choose_for_prefix

        if self.precision == "int8":
            raise ConfigError("features.precision int8 needs training images to calibrate it. Use another precision.")
        engines = EngineFactory(self._root, prefix, "", lambda: images)
        options = engines.options(self.engine, self.precision)
        if self.engine == "auto":
            options = [option for option in options if option.name != "compile"]
        choice = choose_for_prefix(prefix, self._root, options, [SERVED_IMAGES] * len(options), lambda: images)
        option = options[choice.index]
        engine, _ = build_engine(option, choice.engine, images[:1])
        return option, engine, choice.reason + engines.skipped

    def prediction_engine(
        self,
        prefix: PrefixSpec,
        task: str,
        images: Callable[[int], torch.Tensor],
        count: int,
        earlier: str | None,
        stored: Callable[[Space], float],
    ) -> tuple[Engine, EngineOption]:
        """Choose and build an engine for images to predict. In a distributed run, rank zero chooses.

        Args:
            prefix: The frozen prefix.
            task: Identifies the images, on which int8 is calibrated.
            images: Returns the first images in the preprocessing of the backbone, uint8 ``(N, 3, H, W)``, given N.
            count: Number of images to compute, on all ranks.
            earlier: Engine of an interrupted run that this one continues; ``None`` for a new run.
            stored: Returns the share of the images whose rows are in a space, so that they need not be computed.

        Returns:
            The engine, and its option.

        Raises:
            ConfigError: No engine matches the settings, or the earlier one is not available any more.
            EngineError: The engine cannot be built.
        """
        from project.features.builder import MEASURED_IMAGES, build_engine
        from project.features.engine_options import EngineFactory
        from project.features.engine_selection import choose_for_prefix
        from project.runtime.distributed import ProcessGroup

        ranks = ProcessGroup()
        engines = EngineFactory(self._root, prefix, task, lambda: images(CALIBRATION_IMAGES))
        options = self._options(engines, ranks)
        names = [str(option) for option in options]
        if earlier is not None and earlier not in names:
            raise ConfigError(
                f"The earlier part was predicted with {earlier}, which is not available now ({', '.join(names)} are)."
            )
        index, engine, reason = 0, None, "few images"
        with ranks.propagate_errors():
            if earlier is not None:
                index, reason = names.index(earlier), "as in the earlier part"
            elif len(options) == 1:
                reason = "the only candidate"
            elif ranks.rank == 0 and count >= FEW_IMAGES:
                missing = [max(round(count / ranks.size * (1 - stored(option.space))), 1) for option in options]
                choice = choose_for_prefix(prefix, self._root, options, missing, lambda: images(MEASURED_IMAGES))
                index, engine, reason = choice.index, choice.engine, choice.reason
        index = ranks.gather(index)[0]
        with ranks.propagate_errors():
            engine, _ = build_engine(options[index], engine, images(1))
        print_rank_zero(f"Features: {options[index]} ({reason}{engines.skipped})")
        return engine, options[index]

    def _options(self, engines: EngineFactory, ranks: ProcessGroup) -> list[EngineOption]:
        """Engine options; rank zero first, as it writes the exported and calibrated networks that others read."""
        options: list[EngineOption] = []
        for is_turn_of_rank_zero in (True, False):
            with ranks.propagate_errors():
                if (ranks.rank == 0) == is_turn_of_rank_zero:
                    options = engines.options(self.engine, self.precision)
        return options


def calibration_subset(views: Views) -> Views:
    """Evenly spaced views, as many as int8 is calibrated on."""
    return views[:: -(-len(views) // CALIBRATION_IMAGES)]


def row_memory_budget(device: torch.device, processes: int = 1) -> int:
    """Bytes that rows may take in memory: half of a GPU's free memory, or a quarter of the CPU memory.

    The limit of a container counts as its CPU memory.

    Args:
        device: Device that holds the rows.
        processes: Processes of this run on this machine. They share CPU memory; each has its own GPU.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    return memory_limit() // 4 // processes
