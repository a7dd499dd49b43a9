"""From what names data to the source of it."""

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

#: What the parser makes of a class named as ``source`` is a factory, the first of these: an error of a class that it
#: made itself would come with those of all the other types.
SourceArgument: TypeAlias = Callable[[], Source | VisionDataset] | Source | VisionDataset


def open_source(given: str | SourceArgument | None) -> Source | None:
    """The source of some data; ``None`` of none.

    Args:
        given: A folder of classes or a table, by its path; a source; a data set of torchvision; or what makes either.

    Raises:
        DataError: It is not there, or cannot be read.
    """
    if given is None or isinstance(given, Source):
        return given
    if not isinstance(given, str):
        kind = None if isinstance(given, VisionDataset) else bound_class(given)
        return given() if isinstance(kind, type) and issubclass(kind, Source) else Torchvision(given)
    table = Path(given).suffix.lower() in TABLES and not Path(given).is_dir()
    return Manifest(given) if table else Folder(given)
