"""Data sets of Hugging Face as a source."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from project.data.image_io import read_bytes
from project.data.sources.base import SPLITS, Finding, Sample, quote_names
from project.data.sources.files import PublishedDataset
from project.errors import DataError, nearest


class HuggingFace(PublishedDataset):
    """A data set of Hugging Face, from a folder or from the hub. No code that comes with one is run.

    Args:
        path: A folder that ``save_to_disk`` has made; or the name of a data set on the hub, such as ethz/food101.
        name: Which of its configurations.
        image: Column of the images; by default the only one of that type.
        label: Column of the labels, which may be numbers or words; by default the only one of class labels.
        revision: Which of its versions on the hub: a branch, a tag or a commit.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        image: str | None = None,
        label: str | None = None,
        revision: str | None = None,
    ) -> None:
        self._path = path
        self._configuration = name
        self._columns = image, label
        self._revision = revision

    @functools.cached_property
    def name(self) -> str:  # type: ignore[override]  # cached, so that it can be set as well
        """Name of the folder, or of the data set without its owner."""
        return Path(self._path).expanduser().resolve().name

    def _prepare(self) -> None:
        path = self._path
        try:
            import datasets
        except ImportError as error:
            raise DataError(f"data.source: {path} needs a package: pip install 'frozen-backbone[hub]'") from error
        tables, left_out = _named(_load(datasets, path, self._configuration, self._revision), path)
        findings: list[Finding] = []
        if left_out:
            text = f"{quote_names(left_out)} are no names of a split that is known, and are left out."
            findings.append(Finding("note", "other splits", text, tuple(left_out)))
        features = tables["train"].features
        self._column = image = _column(self._columns[0], "image", features, datasets.Image)
        label = _column(self._columns[1], "label", features, datasets.ClassLabel)
        known: list[str] | None = getattr(features[label], "names", None)
        self._images: dict[str, Any] = {}
        rows: dict[str, list[tuple[str, Any]]] = {}
        for split, table in tables.items():
            try:
                plain = table.with_format(None)
                self._images[split] = plain.select_columns(image).cast_column(image, datasets.Image(decode=False))
                labels = plain.select_columns(label)[:][label]
            except Exception as error:  # those of pyarrow and of datasets have no base of their own
                what = " ".join(str(error).split()).rstrip(".")
                raise DataError(
                    f"data.source: {split} of {path}: {image!r} and {label!r} cannot be taken for images and labels: "
                    f"{what}. Name other columns with data.source.image and data.source.label."
                ) from error
            if table.features[label] != features[label]:
                raise DataError(
                    f"data.source: {split} of {path} numbers the classes in {label!r} otherwise than train."
                )
            names = (f"{self.name}/{split}/{number:05d}" for number in range(len(labels)))
            rows[split] = [(one, _label(value, label, bool(known))) for one, value in zip(names, labels, strict=True)]
        self._take(rows, known.__getitem__ if known else str, findings)

    def content(self, sample: Sample) -> bytes:
        """The bytes of the image's file.

        Raises:
            DataError: There are none.
        """
        _, split, number = sample.name.rsplit("/", 2)
        held = self._images[split][int(number)][self._column] or {}
        if held.get("bytes"):
            return bytes(held["bytes"])
        if held.get("path"):
            return read_bytes(held["path"])
        raise DataError(f"{sample.name} has no image. Remove it.")


def _load(datasets: Any, path: str, name: str | None, revision: str | None) -> Any:
    folder = Path(path).expanduser()
    if not folder.is_dir() and "/" not in path:  # such as pandas: a builder, which would unpickle what lies here
        raise DataError(f"data.source: {path} is no folder here. Name one, or a data set of the hub as OWNER/NAME.")
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            return datasets.load_from_disk(str(folder))
        known = str(folder.resolve()) if folder.is_dir() else path
        return datasets.load_dataset(known, name, revision=revision, trust_remote_code=False)
    except Exception as error:  # those of datasets, pyarrow, the hub's client and the network have no base of their own
        what = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise DataError(
            f"data.source: {path} cannot be loaded: {what}. "
            "Name a folder that save_to_disk has made, or a data set of the hub, and check the network."
        ) from error


def _named(loaded: Any, path: str) -> tuple[dict[str, Any], list[str]]:
    """Tables by ``train``, ``val`` and ``test``, and the names of those left out."""
    if not isinstance(loaded, Mapping):
        return {"train": loaded}, []
    if len(loaded) == 1:
        return {"train": next(iter(loaded.values()))}, []
    found: dict[str, str] = {}
    for name in loaded:
        split = SPLITS.get(name.lower())
        if split in found:
            raise DataError(f"data.source: {found[split]!r} and {name!r} of {path} are both the {split} split.")
        if split:
            found[split] = name
    if "train" not in found:
        raise DataError(
            f"data.source: {path} has {quote_names(loaded)}, and no split to train on. Call one of them train."
        )
    return {split: loaded[name] for split, name in found.items()}, [
        name for name in loaded if name not in found.values()
    ]


def _column(given: str | None, what: str, features: Mapping[str, Any], kind: type) -> str:
    if given is not None:
        if given not in features:
            raise DataError(
                f"data.source.{what}: there is no column {given!r}. "
                f"{nearest(given, features)}There are {quote_names(features)}."
            )
        return given
    fitting = [name for name, feature in features.items() if isinstance(feature, kind)]
    if len(fitting) != 1:
        raise DataError(
            f"data.source: {quote_names(fitting) or 'no column'} could be the {what}. "
            f"Name one with data.source.{what}: there are {quote_names(features)}."
        )
    return fitting[0]


def _label(value: Any, where: str, numbered: bool) -> Any:
    """A label as it is; ``None`` where there is none, for which a number of a class label is negative."""
    if value is None or value == "" or (numbered and value < 0):
        return None
    if not isinstance(value, (str, int)):
        raise DataError(f"data.source.label: {where} has labels such as {value!r}: words or whole numbers are needed.")
    return value
