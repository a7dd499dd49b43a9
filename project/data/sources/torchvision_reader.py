"""Open the splits of a torchvision data set, and read its labels, paths and images."""

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

#: Attributes in which torchvision's data sets store their labels and file paths.
LABEL_ATTRIBUTES = ("targets", "_labels", "labels", "y", "samples", "imgs", "_samples")
PATH_ATTRIBUTES = ("samples", "imgs", "_samples", "_image_files", "_images")

#: Data sets are not thread-safe: some seek in one shared file or draw from torch's global generator.
ITEM_LOCK = threading.Lock()


def bound_class(factory: Callable[..., Any]) -> Callable[..., Any]:
    """The class or function whose arguments :func:`functools.partial` has bound."""
    if not isinstance(factory, functools.partial):
        return factory
    # jsonargparse binds the class as the last argument of an internal function.
    return next((part for part in factory.args[::-1] if isinstance(part, type)), factory.func)


def open_splits(factory: Callable[..., VisionDataset]) -> dict[str, VisionDataset]:
    """Open a data set in all its splits.

    A class with an argument ``train`` has train and test; one with an argument ``split`` has the splits whose standard
    names it accepts. If that argument has a value other than its default, only that split is opened, as train.

    Args:
        factory: The class, with its arguments bound by :func:`functools.partial`.

    Returns:
        Data sets by ``train`` and, if they exist, ``val`` and ``test``.

    Raises:
        DataError: The data set does not exist, or cannot be downloaded or read.
    """
    kind = bound_class(factory)
    bound = factory.keywords if isinstance(factory, functools.partial) else {}
    if isinstance(bound.get("root"), str):
        factory = functools.partial(factory, root=str(Path(bound["root"]).expanduser()))
    name = getattr(kind, "__name__", str(kind))
    parameters = _parameters(kind)
    download = bool(bound.get("download")) if "download" in parameters else None

    def try_open(arguments: dict[str, Any]) -> VisionDataset | None:
        """Open a split; ``None`` if the class does not have it."""
        try:
            dataset = factory(**arguments)
        except Exception as error:  # a data set may raise anything
            # torchvision's message: Unknown value 'val' for argument split.
            if type(error) is ValueError and "split" in arguments and repr(arguments["split"]) in str(error):
                return None
            raise DataError(f"data.source: {name} {_failure(error, download)}") from error
        if not isinstance(dataset, VisionDataset) or type(dataset) is VisionDataset:
            raise DataError(
                f"data.source: {name} is not a torchvision data set. Pass one, such as torchvision.datasets.CIFAR10."
            )
        return dataset

    key = next((key for key in ("train", "split") if key in parameters), "")
    default = parameters[key].default if key else None
    candidates: dict[str, list[dict[str, Any]]] = {"train": [{}]}
    if key == "train" and bound.get(key, default) == default:
        candidates = {"train": [{key: True}], "test": [{key: False}]}
    elif key == "split" and bound.get(key, default) == default:
        candidates = {
            split: [{key: alias} for alias, meaning in SPLITS.items() if meaning == split] for split in SPLITS.values()
        }
        if default is not inspect.Parameter.empty:
            candidates["train"].append({key: default})
    opened: dict[str, VisionDataset] = {}
    with _download_lock(bound.get("root")) if download else contextlib.nullcontext():
        for split, attempts in candidates.items():
            for arguments in attempts:
                if (dataset := try_open(arguments)) is not None:
                    opened[split] = dataset
                    break
    if "train" not in opened:
        raise DataError(f"data.source: {name} has no train split with a standard name. Select one with split.")
    return opened


@contextlib.contextmanager
def _download_lock(root: object) -> Iterator[None]:
    """Let one process at a time download into a folder. torchvision has no lock, and unpacks incomplete downloads."""
    from filelock import FileLock

    if not isinstance(root, (str, os.PathLike)):  # missing, or an error that torchvision reports
        yield
        return
    folder = Path(root).expanduser()
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(folder / ".downloading.lock"))
        except OSError as error:
            if folder.is_dir():  # it may hold the data already; otherwise torchvision reports the error
                text = f"{folder} cannot be locked ({error}). Download the data set with one process at a time."
                warnings.warn(text, stacklevel=2)
        yield


def _parameters(kind: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Parameters of a class, including those that ``**kwargs`` passes to its base classes."""
    parameters: dict[str, inspect.Parameter] = {}
    for base in kind.__mro__ if isinstance(kind, type) else (kind,):
        own = inspect.signature(base).parameters
        parameters = {**own, **parameters}
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in own.values()):
            break
    return parameters


def _failure(error: Exception, download: bool | None) -> str:
    """Why a data set cannot be opened, and how to fix it; ``download`` is ``None`` if it has no such argument."""
    reason = " ".join(str(error).replace("You can use download=True to download it", "").split()).rstrip(".")
    reason = reason or type(error).__name__
    if isinstance(error, ImportError):
        return f"needs a package that is not installed: {reason}. Install it: pip install {error.name}"
    if download is None or not isinstance(error, (RuntimeError, OSError)):
        return f"cannot be opened: {reason}. Check its arguments and its files."
    if download:
        return f"cannot be downloaded: {reason}. Check the network, or copy its files to root yourself."
    return f"cannot be opened: {reason}. Add download: true to download it, or set root to its folder."


def labels_and_paths(dataset: VisionDataset, where: str) -> tuple[list[int | None], list[str] | None]:
    """Labels and file paths of a data set, without reading its images if it stores both.

    Stored labels and paths are used only if they agree with the first and the last item.

    Args:
        dataset: The data set, N images.
        where: Name of the data set in errors.

    Returns:
        N labels, ``None`` for an image without one; and N paths, or ``None`` if the images are not unmodified files.

    Raises:
        DataError: The data set is not for classification.
    """
    if getattr(dataset, "transforms", None) is not None:
        raise DataError(f"data.source: remove the transforms of {where}; use data.augment to augment images.")
    if list(getattr(dataset, "_target_types", ["category"])) != ["category"]:
        raise DataError(f"data.source: the target_types of {where} must be category for classification.")
    labels, paths = _stored_labels(dataset), _stored_paths(dataset)
    for index in {0, len(dataset) - 1} if len(dataset) else ():
        try:
            item = _item(dataset, index, where)
        except DataError:
            continue  # a damaged or missing image; reported when all images are read
        image, label = _image_and_label(item, where)
        if labels and labels[index] != label:
            labels = None
        if paths and not _is_file_of(paths[index], image):
            paths = None
    if labels is None:
        labels = [_image_and_label(_item(dataset, index, where), where)[1] for index in range(len(dataset))]
    return labels, paths


def read_image(dataset: VisionDataset, index: int, where: str) -> Image.Image:
    """Read an image of a data set. Thread-safe.

    Raises:
        DataError: The image cannot be read.
    """
    return _image_and_label(_item(dataset, index, where), where)[0]


def class_name(dataset: VisionDataset, label: int) -> str:
    """Name of a class; its number if the data set does not name it."""
    names = getattr(dataset, "classes", None) or getattr(dataset, "categories", None)
    if not isinstance(names, (list, tuple)) or label >= len(names):
        return str(label)
    return ", ".join(names[label]) if isinstance(names[label], tuple) else str(names[label])  # ImageNet's synonyms


def _stored_labels(dataset: VisionDataset) -> list[int | None] | None:
    for name in LABEL_ATTRIBUTES:
        stored = getattr(dataset, name, ())
        with contextlib.suppress(TypeError, LookupError):  # the attribute is something else
            values = stored.tolist() if hasattr(stored, "tolist") else stored
            labels = [_label(value[1] if isinstance(value, tuple) else value) for value in values]
            if len(labels) == len(dataset):
                return labels
    return None


def _stored_paths(dataset: VisionDataset) -> list[str] | None:
    for name in PATH_ATTRIBUTES:
        stored = getattr(dataset, name, None)
        if isinstance(stored, list):
            paths = [entry[0] if isinstance(entry, tuple) else entry for entry in stored]
            if all(isinstance(path, (str, Path)) for path in paths) and len(set(paths)) == len(dataset):
                return list(map(str, paths))
    return None


def _label(value: Any) -> int | None:
    """Class index of an item; ``None`` and negative values mean unlabeled."""
    return None if value is None or operator.index(value) < 0 else operator.index(value)


def _item(dataset: VisionDataset, index: int, where: str) -> Any:
    try:
        with ITEM_LOCK:
            item = dataset[index]
            if isinstance(item, tuple) and item and isinstance(item[0], Image.Image):
                item[0].load()  # decode within the lock: some data sets return images that are only opened
            return item
    except Exception as error:  # damaged files raise many types
        reason = str(error) or type(error).__name__
        raise DataError(f"{where} cannot be read: {reason}. Repair or remove it.") from error


def _image_and_label(item: Any, where: str) -> tuple[Image.Image, int | None]:
    with contextlib.suppress(TypeError, ValueError):
        image, label = item
        if isinstance(image, Image.Image):
            return image, _label(label)
    raise DataError(
        f"data.source: {where} is not for classification: an item has to be a PIL image and a class index, "
        f"not {reprlib.repr(item)[:200]}. Pass another data set."
    )


def _is_file_of(path: str, image: Image.Image) -> bool:
    """Whether the file has the pixels of the image."""
    try:
        with Image.open(path) as stored:
            return stored.convert("RGB").tobytes() == image.convert("RGB").tobytes()
    except OSError:
        return False
