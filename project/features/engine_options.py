"""The engines that may compute the rows of a prefix, and the space that each would fill."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from project.errors import ConfigError
from project.features import onnx_export
from project.features.engines import DTYPES, Engine, EngineName, ExactEngine, OnnxEngine, Precision, TorchEngine
from project.features.frozen_prefix import FrozenPrefix
from project.features.store import Space, unwritable
from project.models.backbone import Backbone
from project.models.cut import Cut

FORMAT = 1  # of what a row means
#: Seconds to build: measured on two cores of a server CPU with ResNet50.
STARTUP = {"torch": 0.3, "compile": 20.0, "onnxruntime": 6.0}
#: What a trainer's precision allows rows to be computed in: full precision nothing less.
ALLOWED: Mapping[str, tuple[Precision, ...]] = {"bf16": ("bf16", "fp32"), "16": ("fp16", "fp32")}
ONNX = ("onnxruntime", "onnx", "onnxscript")
INSTALL_ONNX = "pip install 'frozen-backbone[onnx]'"


@dataclass(frozen=True)
class EngineOption:
    """An engine, and where its rows belong.

    Attributes:
        name: Of the engine.
        precision: That it computes in.
        space: Its rows.
        startup: Seconds that it takes to build, about.
        build: Makes it.
    """

    name: EngineName
    precision: Precision
    space: Space
    startup: float
    build: Callable[[], Engine]

    def __str__(self) -> str:
        return f"{self.name} {self.precision}"


class EngineFactory:
    """Makes the engines of one frozen prefix.

    Args:
        root: Folder of the store; exported networks are kept in it.
        backbone: Whose frozen prefix.
        cut: Where the prefix ends.
        encode: Images on the device to rows, as the live model does it.
        device: Where to compute.
        task: What int8 is calibrated for, in a word: another task has its own calibration.
        calibration: Makes the images that int8 is calibrated on, uint8 ``(N, 3, H, W)``.
        layout: Memory format that ``encode`` gives its images.
    """

    def __init__(
        self,
        root: Path,
        backbone: Backbone,
        cut: Cut,
        encode: Callable[[torch.Tensor], torch.Tensor],
        device: torch.device,
        task: str,
        calibration: Callable[[], torch.Tensor],
        layout: str,
    ) -> None:
        self._root = root
        self._backbone = backbone
        self._cut = cut
        self._encode = encode
        self._device = device
        self._task = task
        self._calibration = calibration
        self._layout = layout
        #: Why :meth:`options` left an engine out, to be added to a message; empty if it left out none.
        self.left_out = ""
        self.network: dict[str, Any] = {
            "format": FORMAT,
            "backbone": backbone.name,
            "stages": list(cut.frozen),
            "sha256": backbone.fingerprint(cut),
            "preprocessing": backbone.preprocessing.as_dict(),
            "versions": _versions("torch", "torchvision", "pillow", *(["timm"] if "timm/" in backbone.name else [])),
        }

    def options(
        self, engine: EngineName | Literal["auto"], precision: Precision | None, trainer: str
    ) -> list[EngineOption]:
        """The engines that fit what was asked for, the preferred first.

        Args:
            engine: A name, or ``auto``.
            precision: One, or ``None`` for what the trainer's allows.
            trainer: Lightning's name of the trainer's precision.

        Raises:
            ConfigError: None fits.
        """
        cpu = self._device.type == "cpu"
        wanted = (precision,) if precision else ALLOWED.get(trainer.partition("-")[0], ("fp32",))
        if cpu and not precision:
            wanted = tuple(p for p in wanted if p != "fp16")
        offered: dict[EngineName, tuple[Precision, ...]] = {
            "torch": ("fp32", "bf16") if cpu else ("fp32", "bf16", "fp16"),
            "onnxruntime": ("fp32", "int8") if cpu else (),
            "compile": ("fp32", "bf16") if cpu else ("fp32", "bf16", "fp16"),
        }
        names = list(offered) if engine == "auto" else [engine]
        lacking = [name for name in ONNX if find_spec(name) is None]
        if lacking and engine == "auto" and precision != "int8":
            names.remove("onnxruntime")
            if set(wanted) & set(offered["onnxruntime"]):
                self.left_out = f"; onnxruntime is left out, it needs {', '.join(lacking)}: {INSTALL_ONNX}"
        pairs = [(name, kind) for kind in wanted for name in names if kind in offered[name]]
        if not pairs:
            raise ConfigError(
                f"features.engine {engine} has no precision {' or '.join(wanted)} on {self._device.type}, but "
                f"{' or '.join(sorted({kind for name in names for kind in offered[name]})) or 'none'}."
            )
        if lacking and ("onnxruntime" in [name for name, _ in pairs]):
            raise ConfigError(f"features.engine onnxruntime needs {', '.join(lacking)}: {INSTALL_ONNX}")
        return [self._option(name, kind) for name, kind in pairs]

    def _option(self, name: EngineName, precision: Precision) -> EngineOption:
        made_by: dict[str, Any] = {"engine": name, "precision": precision, "device": self._device.type}
        startup = STARTUP[name]
        build: Callable[[], Engine]
        if name == "onnxruntime":
            made_by["versions"] = _versions(*ONNX)
            file = self._file("")
            startup = 0.3 if _is_sound(file) else startup
            build = lambda: OnnxEngine(self._exported())  # noqa: E731
            if precision == "int8":
                quantized = self._quantized()  # before its rows are looked for: they are those of its scales
                made_by["calibrated"] = hashlib.sha256(quantized.read_bytes()).hexdigest()
                build = lambda: OnnxEngine(quantized)  # noqa: E731
        elif name == "torch" and precision == "fp32":
            made_by["layout"] = self._layout  # another one sums in another order
            build = lambda: ExactEngine(self._encode, self._device)  # noqa: E731
        else:
            dtype = DTYPES[precision]
            build = lambda: TorchEngine(FrozenPrefix(self._backbone, self._cut, dtype), self._device, name == "compile")  # noqa: E731
        return EngineOption(name, precision, Space(self._root, {**self.network, "made_by": made_by}), startup, build)

    def reference(self) -> Engine:
        """An engine in full precision, to compare int8 with."""
        return OnnxEngine(self._exported())

    def _file(self, kind: str) -> Path:
        about = json.dumps([self.network, _versions(*ONNX), kind], sort_keys=True)
        return self._root / "networks" / f"{hashlib.sha256(about.encode()).hexdigest()[:32]}.onnx"

    def _exported(self) -> Path:
        file = self._file("")
        if not _is_sound(file):
            prefix = FrozenPrefix(self._backbone, self._cut, layout=torch.contiguous_format)
            with _kept(file):
                onnx_export.export(prefix, self._backbone.preprocessing.crop, file)
                _seal(file)
        return file

    def _quantized(self) -> Path:
        file = self._file(f"int8 {self._task}")
        if not _is_sound(file):
            exported, images = self._exported(), self._calibration()
            with _kept(file):
                onnx_export.quantize(exported, images, file)
                _seal(file)
        return file


def _is_sound(file: Path) -> bool:
    """Whether a network is what was written: a damaged one would fill the store with wrong rows under right keys."""
    seal = file.with_suffix(".sha256")
    return file.exists() and seal.exists() and seal.read_text() == hashlib.sha256(file.read_bytes()).hexdigest()


def _seal(file: Path) -> None:
    file.with_suffix(".sha256").write_text(hashlib.sha256(file.read_bytes()).hexdigest())


@contextmanager
def _kept(file: Path) -> Iterator[None]:
    """An error of the disk is one of the store's folder."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise unwritable(file.parent, error) from error


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a package under another name, such as a build of onnxruntime for one device
            found[name] = "unknown"
    return found
