"""Hugging Face data sets as a source."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from project.data.image_io import read_bytes
from project.data.sources.base import SPLITS, Finding, Sample, quote_names
from project.data.sources.files import PublishedDataset
from project.errors import DataError, did_you_mean


class HuggingFace(PublishedDataset):
    """A Hugging Face data set, from a folder or from the hub. Code that comes with a data set is never run.

    Args:
        path: A folder written by ``save_to_disk``, or the name of a data set on the hub, such as ethz/food101.
        name: Name of the configuration.
        image: Column of the images; by default the only column of type ``Image``.
        label: Column of the labels, integers or strings; by default the only column of type ``ClassLabel``, or else
            the column ``label``.
        revision: Branch, tag or commit on the hub.
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
    def name(self) -> str:  # type: ignore[override]  # a cached property can be set too
        """Name of the folder, or of the data set without its owner."""
        return Path(self._path).expanduser().resolve().name

    def _prepare(self) -> None:
        path = self._path
        try:
            import datasets
        except ImportError as error:
            raise DataError(f"data.source: {path} needs a package: pip install 'frozen-backbone[hub]'") from error
        tables, skipped = _select_splits(_load(datasets, path, self._configuration, self._revision), path)
        findings: list[Finding] = []
        if skipped:
            text = f"The splits {quote_names(skipped)} are skipped: their names are not those of train, val or test."
            findings.append(Finding("note", "other splits", text, tuple(skipped)))
        features = tables["train"].features
        self._image_column = image = _image_column(self._columns[0], features, datasets.Image)
        label = _label_column(self._columns[1], features, datasets.ClassLabel)
        class_names: list[str] | None = getattr(features[label], "names", None)
        self._images: dict[str, Any] = {}
        rows: dict[str, list[tuple[str, Any]]] = {}
        for split, table in tables.items():
            try:
                unformatted = table.with_format(None)
                self._images[split] = unformatted.select_columns(image).cast_column(image, datasets.Image(decode=False))
                values = unformatted.select_columns(label)[:][label]
            except Exception as error:  # errors of pyarrow and datasets have no common base class
                reason = " ".join(str(error).split()).rstrip(".")
                raise DataError(
                    f"data.source: columns {image!r} and {label!r} of {split} of {path} are not images and labels: "
                    f"{reason}. Select other columns with data.source.image and data.source.label."
                ) from error
            if table.features[label] != features[label]:
                raise DataError(
                    f"data.source: column {label!r} of {path} has other classes in {split} than in train. "
                    "Cast it to the same type in all splits."
                )
            rows[split] = [
                (f"{self.name}/{split}/{number:05d}", _label(value, label, is_class_label=class_names is not None))
                for number, value in enumerate(values)
            ]
        self._set_samples(rows, class_names.__getitem__ if class_names else str, findings)

    def content(self, sample: Sample) -> bytes:
        """Bytes of the image file, from the data set or from disk."""
        _, split, number = sample.name.rsplit("/", 2)
        image = self._images[split][int(number)][self._image_column] or {}
        if image.get("bytes"):
            return bytes(image["bytes"])
        if image.get("path"):
            return read_bytes(image["path"])
        raise DataError(f"{sample.name} has no image. Remove it.")


def _load(datasets: Any, path: str, name: str | None, revision: str | None) -> Any:
    folder = Path(path).expanduser()
    if not folder.is_dir() and "/" not in path:
        # load_dataset would take a name such as "pandas" for a builder, which unpickles files of the working directory.
        raise DataError(
            f"data.source: there is no folder {path}. Pass a folder, or OWNER/NAME of a data set on the hub."
        )
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            return datasets.load_from_disk(str(folder))
        location = str(folder.resolve()) if folder.is_dir() else path
        return datasets.load_dataset(location, name, revision=revision, trust_remote_code=False)
    except Exception as error:  # errors of datasets, pyarrow, the hub client and the network have no common base class
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise DataError(
            f"data.source: {path} cannot be loaded: {reason}. "
            "Pass a folder written by save_to_disk, or a data set on the hub, and check the network."
        ) from error


def _select_splits(loaded: Any, path: str) -> tuple[dict[str, Any], list[str]]:
    """Tables by ``train``, ``val`` and ``test``, and the names of skipped splits. A single split is train."""
    if not isinstance(loaded, Mapping):
        return {"train": loaded}, []
    if len(loaded) == 1:
        return {"train": next(iter(loaded.values()))}, []
    names: dict[str, str] = {}
    for name in loaded:
        split = SPLITS.get(name.lower())
        if split in names:
            raise DataError(
                f"data.source: {names[split]!r} and {name!r} of {path} are both the {split} split. Rename one."
            )
        if split:
            names[split] = name
    if "train" not in names:
        raise DataError(f"data.source: {path} has splits {quote_names(loaded)}, but no train. Rename one to train.")
    skipped = [name for name in loaded if name not in names.values()]
    return {split: loaded[name] for split, name in names.items()}, skipped


def _image_column(given: str | None, features: Mapping[str, Any], image_type: type) -> str:
    candidates = [name for name, feature in features.items() if isinstance(feature, image_type)]
    return _select_column("image", given, features, candidates)


def _label_column(given: str | None, features: Mapping[str, Any], class_label_type: type) -> str:
    candidates = [name for name, feature in features.items() if isinstance(feature, class_label_type)]
    dtype = str(getattr(features.get("label"), "dtype", ""))
    if not candidates and dtype.startswith(("int", "uint", "string", "large_string")):
        candidates = ["label"]
    return _select_column("label", given, features, candidates)


def _select_column(role: str, given: str | None, features: Mapping[str, Any], candidates: list[str]) -> str:
    if given is not None:
        if given not in features:
            raise DataError(
                f"data.source.{role}: there is no column {given!r}. "
                f"{did_you_mean(given, features)}There are {quote_names(features)}."
            )
        return given
    if len(candidates) != 1:
        raise DataError(
            f"data.source: {quote_names(candidates) or 'no column'} could be the {role}. "
            f"Select one with data.source.{role}: there are {quote_names(features)}."
        )
    return candidates[0]


def _label(value: Any, column: str, is_class_label: bool) -> int | str | None:
    """A label; ``None`` for a missing one, which a ``ClassLabel`` stores as a negative number."""
    if value is None or value == "" or (is_class_label and value < 0):
        return None
    if not isinstance(value, (str, int)):
        raise DataError(f"data.source.label: labels must be strings or integers; {column} has {value!r}.")
    return value
