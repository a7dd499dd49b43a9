"""Engines that can compute the rows of a prefix, and the space that each one fills."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from project.errors import ConfigError, EngineError
from project.features import onnx_export
from project.features.engines import DTYPES, Engine, EngineName, ExactEngine, OnnxEngine, Precision, TorchEngine
from project.features.frozen_prefix import FrozenPrefix, PrefixSpec
from project.features.shard import file_sha256
from project.features.store import Space
from project.runtime.system import installed_versions

FORMAT = 1  # version of the meaning of a row
#: Approximate seconds to build an engine, measured with ResNet50 on two cores of a server CPU.
STARTUP_SECONDS = {"torch": 0.3, "compile": 20.0, "onnxruntime": 6.0}
#: Row precisions that a trainer precision allows: full precision unless listed.
ALLOWED: Mapping[str, tuple[Precision, ...]] = {"bf16": ("bf16", "fp32"), "16": ("fp16", "fp32")}
ONNX_PACKAGES = ("onnxruntime", "onnx", "onnxscript")
INSTALL_ONNX = "pip install 'frozen-backbone[onnx]'"


@dataclass(frozen=True)
class EngineOption:
    """An engine that can be used, and the space of its rows.

    Attributes:
        name: Name of the engine.
        precision: Precision of the computation.
        space: Where its rows are stored.
        startup: Approximate seconds to build it.
        build: Builds the engine.
    """

    name: EngineName
    precision: Precision
    space: Space
    startup: float
    build: Callable[[], Engine]

    def __str__(self) -> str:
        return f"{self.name} {self.precision}"


def allowed_precisions(precision: Precision | None, trainer_precision: str) -> tuple[Precision, ...]:
    """Precisions that an engine may have.

    Args:
        precision: The requested one; ``None`` for those that the trainer's precision allows.
        trainer_precision: Such as ``bf16-mixed``.
    """
    return (precision,) if precision else ALLOWED.get(trainer_precision.partition("-")[0], ("fp32",))


class EngineFactory:
    """Builds the engines of one frozen prefix.

    Args:
        root: Folder of the store, which also holds exported networks.
        prefix: The frozen prefix.
        task: Identifies the data that int8 is calibrated on: each task has its own calibration.
        calibration: Returns the calibration images for int8, uint8 ``(N, 3, H, W)``.

    Attributes:
        network: Description of the prefix and the library versions; part of every space's description.
        skipped: Why :meth:`options` has skipped an engine, as the end of a message; empty if it has not.
    """

    def __init__(self, root: Path, prefix: PrefixSpec, task: str, calibration: Callable[[], torch.Tensor]) -> None:
        self._root = root
        self._prefix = prefix
        self._task = task
        self._calibration = calibration
        self.skipped = ""
        backbone, cut = prefix.backbone, prefix.cut
        self.network: dict[str, Any] = {
            "format": FORMAT,
            "backbone": backbone.name,
            "stages": backbone.recorded_stages(cut),
            "sha256": backbone.fingerprint(cut),
            # Omitted for last, so that rows stay valid that were stored before there were other features.
            **({} if backbone.features == "last" else {"features": backbone.features}),
            "preprocessing": backbone.preprocessing.as_dict(),
            "versions": _versions("torch", "torchvision", "pillow", *(["timm"] if "timm/" in backbone.name else [])),
        }

    def options(self, engine: EngineName | Literal["auto"], precision: Precision | None) -> list[EngineOption]:
        """Engines that match a request, in order of preference.

        Args:
            engine: Name of an engine, or ``auto``.
            precision: A precision, or ``None`` for those that the trainer's precision allows.

        Raises:
            ConfigError: No engine matches.
        """
        device = self._prefix.device.type
        cpu = device == "cpu"
        wanted = allowed_precisions(precision, self._prefix.precision)
        if cpu and not precision:
            wanted = tuple(p for p in wanted if p != "fp16")
        supported: dict[EngineName, tuple[Precision, ...]] = {
            "torch": ("fp32", "bf16") if cpu else ("fp32", "bf16", "fp16"),
            "onnxruntime": ("fp32", "int8") if cpu else (),
            "compile": ("fp32", "bf16") if cpu else ("fp32", "bf16", "fp16"),
        }
        names = list(supported) if engine == "auto" else [engine]
        missing = [name for name in ONNX_PACKAGES if find_spec(name) is None]
        needs = f"needs {', '.join(missing)}: {INSTALL_ONNX}"
        if missing and engine == "auto" and precision != "int8":
            names.remove("onnxruntime")
            if set(wanted) & set(supported["onnxruntime"]):
                self.skipped = f"; onnxruntime skipped, {needs}"
        pairs = [(name, kind) for kind in wanted for name in names if kind in supported[name]]
        if not pairs:
            alternatives = " or ".join(sorted({kind for name in names for kind in supported[name]})) or "none"
            raise ConfigError(
                f"features.engine {engine} does not support precision {' or '.join(wanted)} on {device}. "
                f"Supported: {alternatives}."
            )
        if missing and any(name == "onnxruntime" for name, _ in pairs):
            raise ConfigError(f"features.engine onnxruntime {needs}")
        return [self._option(name, kind) for name, kind in pairs]

    def _option(self, name: EngineName, precision: Precision) -> EngineOption:
        prefix, startup = self._prefix, STARTUP_SECONDS[name]
        made_by: dict[str, Any] = {"engine": name, "precision": precision, "device": prefix.device.type}
        quantized = self._quantized() if precision == "int8" else None

        def build() -> Engine:
            if name == "onnxruntime":
                return OnnxEngine(quantized or self._exported())
            if name == "torch" and precision == "fp32":
                return ExactEngine(prefix.encode, prefix.device)
            copy = FrozenPrefix(prefix.backbone, prefix.cut, DTYPES[precision])
            return TorchEngine(copy, prefix.device, compiled=name == "compile")

        if name == "onnxruntime":
            made_by["versions"] = _versions(*ONNX_PACKAGES)
            startup = 0.3 if _is_intact(self._network_file("")) else startup
            if quantized:  # the calibration determines the rows, so it is part of their space
                made_by["calibrated"] = file_sha256(quantized)
        elif name == "torch" and precision == "fp32":
            made_by["layout"] = prefix.layout  # another memory format sums in another order
        return EngineOption(name, precision, Space(self._root, {**self.network, "made_by": made_by}), startup, build)

    def reference(self) -> Engine:
        """An engine in full precision, to compare int8 with."""
        return OnnxEngine(self._exported())

    def _network_file(self, kind: str) -> Path:
        text = json.dumps([self.network, _versions(*ONNX_PACKAGES), kind], sort_keys=True)
        return self._root / "networks" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.onnx"

    def _exported(self) -> Path:
        file = self._network_file("")
        if not _is_intact(file):
            prefix = FrozenPrefix(self._prefix.backbone, self._prefix.cut, layout=torch.contiguous_format)
            with _writing(file):
                onnx_export.export(prefix, self._prefix.backbone.preprocessing.crop, file)
        return file

    def _quantized(self) -> Path:
        file = self._network_file(f"int8 {self._task}")
        if not _is_intact(file):
            exported, images = self._exported(), self._calibration()
            with _writing(file):
                onnx_export.quantize(exported, images, file)
        return file


def _is_intact(file: Path) -> bool:
    """Whether an exported network matches its checksum: a corrupt one would store wrong rows under valid keys."""
    checksum = file.with_suffix(".sha256")
    return file.exists() and checksum.exists() and checksum.read_text() == file_sha256(file)


@contextmanager
def _writing(file: Path) -> Iterator[None]:
    """Context in which an exported network is written; its checksum is written on exit."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield
        file.with_suffix(".sha256").write_text(file_sha256(file))
    except OSError as error:
        raise EngineError(
            f"features.engine: the exported network cannot be written to {file.parent}: {error.strerror or error}.\n"
            "Free disk space, use another folder (--features.folder PATH), or another engine (--features.engine torch)."
        ) from error


def _versions(*packages: str) -> dict[str, str]:
    # A package may be installed under another name, such as onnxruntime-gpu.
    return dict.fromkeys(packages, "unknown") | installed_versions(packages)
