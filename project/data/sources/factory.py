"""Create a source from a path, a data set of torchvision, or a factory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from torchvision.datasets import VisionDataset

from project.data.sources.base import Source
from project.data.sources.folder import Folder
from project.data.sources.manifest import TABLES, Manifest
from project.data.sources.torchvision import Torchvision
from project.data.sources.torchvision_reader import bound_class

#: ``Callable`` comes first, so that jsonargparse parses a class path as a factory. If it instantiated the class while
#: parsing, an error of the constructor would be reported together with the mismatches of all the other types.
SourceArgument: TypeAlias = Callable[[], Source | VisionDataset] | Source | VisionDataset


def open_source(given: str | SourceArgument | None) -> Source | None:
    """Create a source; ``None`` if nothing is given.

    Args:
        given: Path of an image folder or a table; a source; a data set of torchvision; or a factory of either.
    """
    if given is None or isinstance(given, Source):
        return given
    if not isinstance(given, str):
        kind = None if isinstance(given, VisionDataset) else bound_class(given)
        return given() if isinstance(kind, type) and issubclass(kind, Source) else Torchvision(given)
    is_table = Path(given).suffix.lower() in TABLES and not Path(given).is_dir()
    return Manifest(given) if is_table else Folder(given)
