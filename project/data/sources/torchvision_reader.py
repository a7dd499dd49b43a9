"""torchvision's data sets for classification: opening their splits, and what they keep of their images."""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
import os
import reprlib
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from torchvision.datasets import VisionDataset

from project.data.sources.base import SPLITS
from project.errors import DataError

#: Where they keep the labels, and the paths of their files.
LABELS = ("targets", "_labels", "labels", "y", "samples", "imgs", "_samples")
PATHS = ("samples", "imgs", "_samples", "_image_files", "_images")

#: They may seek in one file, or draw from torch's one generator, so one thread at a time reads their items.
READING = threading.Lock()


def bound_class(factory: Callable[..., Any]) -> Callable[..., Any]:
    """The class or function whose arguments :func:`functools.partial` has bound."""
    if not isinstance(factory, functools.partial):
        return factory
    # The command line's parser binds the class as the last argument of a function of its own.
    return next((part for part in factory.args[::-1] if isinstance(part, type)), factory.func)


def open_splits(factory: Callable[..., VisionDataset]) -> dict[str, VisionDataset]:
    """Open a data set in all its splits.

    With an argument ``train`` that is train and test; with an argument ``split``, what has one of the usual names. If
    that argument is given a value other than its default, only that split is opened, as train.

    Args:
        factory: The class, with its arguments bound by :func:`functools.partial`.

    Returns:
        By ``train`` and, where there are such, ``val`` and ``test``.

    Raises:
        DataError: It is not there, or cannot be downloaded or read.
    """
    kind = bound_class(factory)
    given = factory.keywords if isinstance(factory, functools.partial) else {}
    if isinstance(given.get("root"), str):
        factory = functools.partial(factory, root=str(Path(given["root"]).expanduser()))
    name = getattr(kind, "__name__", str(kind))
    parameters = _parameters(kind)
    download = bool(given.get("download")) if "download" in parameters else None

    def opened(**which: Any) -> VisionDataset | None:
        try:
            found = factory(**which)
        except Exception as error:  # whatever a class of any package raises
            # "Unknown value 'val' for argument split": there is no such split.
            if type(error) is ValueError and "split" in which and repr(which["split"]) in str(error):
                return None
            raise DataError(f"data.source: {name} {_why(error, download)}") from error
        if not isinstance(found, VisionDataset) or type(found) is VisionDataset:
            raise DataError(f"data.source: {name} is no data set. Name one, such as torchvision.datasets.CIFAR10.")
        return found

    key = next((key for key in ("train", "split") if key in parameters), "")
    default = parameters[key].default if key else None
    ways: dict[str, list[dict[str, Any]]] = {"train": [{}]}
    if key == "train" and given.get(key, default) == default:
        ways = {"train": [{key: True}], "test": [{key: False}]}
    elif key == "split" and given.get(key, default) == default:
        ways = {split: [{key: word} for word, means in SPLITS.items() if means == split] for split in SPLITS.values()}
        if default is not inspect.Parameter.empty:
            ways["train"].append({key: default})
    with _alone(given.get("root")) if download else contextlib.nullcontext():
        tried = {
            split: next((one for way in those if (one := opened(**way)) is not None), None)
            for split, those in ways.items()
        }
    if tried["train"] is None:
        raise DataError(f"data.source: {name} has no split of a usual name to train on. Name one with split.")
    return {split: one for split, one in tried.items() if one is not None}


@contextlib.contextmanager
def _alone(root: object) -> Iterator[None]:
    """One process at a time downloads into a folder; torchvision has no lock, and unpacks half of another's file."""
    from filelock import FileLock

    if not isinstance(root, (str, os.PathLike)):  # none, or what torchvision is to refuse
        yield
        return
    folder = Path(root).expanduser()
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(folder / ".downloading.lock"))
        except OSError as error:
            if folder.is_dir():  # what is there can be read all the same; what is not, torchvision complains of
                what = f"{folder} cannot be locked ({error}): have it downloaded by one process at a time."
                warnings.warn(what, stacklevel=2)
        yield


def _parameters(kind: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The arguments of a class, and those that it hands on to the classes that it is made from."""
    found: dict[str, inspect.Parameter] = {}
    for base in kind.__mro__ if isinstance(kind, type) else (kind,):
        here = inspect.signature(base).parameters
        found = {**here, **found}
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in here.values()):
            break
    return found


def _why(error: Exception, download: bool | None) -> str:
    """What is wrong, and how to mend it; ``download`` is whether it was asked for, ``None`` where there is none."""
    what = " ".join(str(error).replace("You can use download=True to download it", "").split()).rstrip(".")
    what = what or type(error).__name__
    if isinstance(error, ImportError):
        return f"needs a package that is not there: {what}. Install it: pip install {error.name}"
    if download is None or not isinstance(error, (RuntimeError, OSError)):
        return f"cannot be opened: {what}. Check its arguments, and its files."
    if download:
        return f"cannot be downloaded: {what}. Check the network, or put its files under root yourself."
    return f"cannot be opened: {what}. Add download: true to fetch it, or say with root where it is."


def labels_and_paths(dataset: VisionDataset, where: str) -> tuple[list[int | None], list[str] | None]:
    """The labels of a data set and the paths of its files, without reading them where it keeps both.

    What it keeps is taken if the first and the last item of the data set agree with it.

    Args:
        dataset: The data set, N images.
        where: What to call it in an error.

    Returns:
        N labels, ``None`` for an image that has none; and N paths, or ``None`` if its images are not just files.

    Raises:
        DataError: It is not for classification.
    """
    if getattr(dataset, "transforms", None) is not None:
        raise DataError(f"data.source: leave out the transforms of {where}: data.augment is what changes images here.")
    if list(getattr(dataset, "_target_types", ["category"])) != ["category"]:
        raise DataError(f"data.source: of the target_types of {where} only category is for classification.")
    labels, paths = _kept_labels(dataset), _kept_paths(dataset)
    for number in {0, len(dataset) - 1} if len(dataset) else ():
        try:
            item = _item(dataset, number, where)
        except DataError:
            continue  # damaged or gone: it is told of when all images are read
        image, label = _pair(item, where)
        if labels and labels[number] != label:
            labels = None
        if paths and not _same(paths[number], image):
            paths = None
    if labels is None:
        labels = [_pair(_item(dataset, number, where), where)[1] for number in range(len(dataset))]
    return labels, paths


def read_item(dataset: VisionDataset, number: int, where: str) -> Image.Image:
    """An image as the data set gives it; may be called from several threads.

    Raises:
        DataError: It cannot be read.
    """
    return _pair(_item(dataset, number, where), where)[0]


def class_name(dataset: VisionDataset, label: int) -> str:
    """What a data set calls a class; its number, where it has no name."""
    names = getattr(dataset, "classes", None) or getattr(dataset, "categories", None)
    if not isinstance(names, (list, tuple)) or label >= len(names):
        return str(label)
    return ", ".join(names[label]) if isinstance(names[label], tuple) else str(names[label])  # ImageNet's synonyms


def _kept_labels(dataset: VisionDataset) -> list[int | None] | None:
    for name in LABELS:
        kept = getattr(dataset, name, ())
        with contextlib.suppress(TypeError, LookupError):  # something else goes by that name
            values = kept.tolist() if hasattr(kept, "tolist") else kept
            labels = [_label(value[1] if isinstance(value, tuple) else value) for value in values]
            if len(labels) == len(dataset):
                return labels
    return None


def _kept_paths(dataset: VisionDataset) -> list[str] | None:
    for name in PATHS:
        kept = getattr(dataset, name, None)
        if isinstance(kept, list):
            paths = [entry[0] if isinstance(entry, tuple) else entry for entry in kept]
            if all(isinstance(path, (str, Path)) for path in paths) and len(set(paths)) == len(dataset):
                return list(map(str, paths))
    return None


def _label(value: Any) -> int | None:
    """A class's number; none and a negative one stand for no label."""
    return None if value is None or operator.index(value) < 0 else operator.index(value)


def _item(dataset: VisionDataset, number: int, where: str) -> Any:
    try:
        with READING:
            item = dataset[number]
            if isinstance(item, tuple) and item and isinstance(item[0], Image.Image):
                item[0].load()  # some are given as they were opened
            return item
    except Exception as error:  # whatever comes of damaged files
        raise DataError(f"{where} cannot be read: {str(error) or type(error).__name__}. Mend or remove it.") from error


def _pair(item: Any, where: str) -> tuple[Image.Image, int | None]:
    with contextlib.suppress(TypeError, ValueError):
        image, label = item
        if isinstance(image, Image.Image):
            return image, _label(label)
    raise DataError(
        f"data.source: {where} is not for classification: an item of it is {reprlib.repr(item)[:200]}, "
        "and not an image with the number of its class."
    )


def _same(path: str, image: Image.Image) -> bool:
    try:
        with Image.open(path) as own:
            return own.convert("RGB").tobytes() == image.convert("RGB").tobytes()
    except OSError:  # not where the data set has the image from
        return False
