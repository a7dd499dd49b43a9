"""A folder of classes as a source."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from project.data.image_io import HEIC, SUFFIXES, Listing, list_images
from project.data.sources.base import SPLITS, Finding, Sample, quote_names
from project.data.sources.files import Files
from project.data.sources.findings import composed, name_findings
from project.errors import DataError, nearest


class Folder(Files):
    """``root/CLASS/*`` or ``root/{train,val,test}/CLASS/*``. Classes are in order of their names.

    Args:
        root: The folder.
    """

    def __init__(self, root: str) -> None:
        self._root = root

    @functools.cached_property
    def name(self) -> str:  # type: ignore[override]  # cached, so that it can be set as well
        """Name of the folder that the path leads to."""
        return Path(self._root).expanduser().resolve().name

    def _prepare(self) -> None:
        root = self._root
        top = Path(root).expanduser()
        if not top.is_dir():
            raise DataError(
                f"data.root: there is no folder {root}. Name one that holds a folder of images for each class."
            )
        findings: list[Finding] = []
        places: dict[str, Path] = {}
        for child in _folders(top):
            split = SPLITS.get(child.name.lower())
            if split in places:
                text = f"data.root: {places[split]} and {child} are both the {split} split. Keep one."
                findings.append(Finding("refused", "split twice", text, (str(child),)))
            elif split:
                places[split] = child
        if places and "train" not in places:
            text = f"data.root: {root} has {', '.join(sorted(places))}, but no folder train. Add train/CLASS/*.jpg."
            findings.append(Finding("refused", "no train", text))
        places = places or {"train": top}
        listings: dict[str, dict[str, Listing]] = {
            split: {child.name: list_images(child) for child in _folders(places[split])}
            for split in ("train", "val", "test")
            if split in places
        }
        spelt = {composed(name): name for name in listings.get("train", {})}
        for split, listing in listings.items():  # a file system may hold an accent as a character of its own
            if split != "train" and len({*map(composed, listing)}) == len(listing):
                listings[split] = {spelt.get(composed(name), name): found for name, found in listing.items()}
        self.classes = tuple(sorted({name for listing in listings.values() for name in listing}))
        self.splits = {
            split: [
                Sample(str(file), self.classes.index(name)) for name, found in listing.items() for file in found.images
            ]
            for split, listing in listings.items()
        }
        if "train" in places:
            findings += _class_findings(places, listings)
        self.findings = (
            *findings,
            *name_findings(self.classes),
            *_file_findings(top, listings),
            *_left_out(top, list(places.values())),
        )


def _class_findings(places: Mapping[str, Path], listings: Mapping[str, Mapping[str, Listing]]) -> Iterator[Finding]:
    train, known = places["train"], listings["train"]
    layout = f"It should hold a folder of images for each class: {train}/CLASS/*.jpg"
    if not known:
        count = len(list_images(train).images)
        text = f"data.root: {train} has {count or 'no'} images and no folders of classes. {layout}"
        yield Finding("refused", "no classes", text)
    elif len(known) == 1:
        text = f"data.root: {train} has one class only, {next(iter(known))!r}; two are needed. {layout}"
        yield Finding("refused", "one class", text)
    for split, listing in listings.items():
        if listing and not any(found.images for found in listing.values()):
            text = (
                f"data.root: there are no images in {places[split]}. {_heic(listing.values())}Add some, or remove it."
            )
            yield Finding("refused", "empty split", text)
            continue
        for name, found in listing.items():
            folder = places[split] / name
            if name not in known:
                text = (
                    f"data.root: class {name!r} is in {split} only ({folder}), so nothing could learn it. "
                    f"{nearest(name, known)}Put images of it into train, or remove it."
                )
                yield Finding("refused", "class in one split", text, (str(folder),))
            elif not found.images and split == "train":
                text = f"data.root: class {name!r} has no images in {folder}. {_heic([found])}Add some, or remove it."
                yield Finding("refused", "empty class", text, (str(folder),))
        if split != "train":
            lacking = [name for name in known if not (name in listing and listing[name].images)]
            if lacking:
                text = f"{split} has no images of {quote_names(lacking)}, so their accuracy cannot be measured."
                yield Finding("problem", "class in one split", text)


def _file_findings(top: Path, listings: Mapping[str, Mapping[str, Listing]]) -> Iterator[Finding]:
    found = [one for listing in listings.values() for one in listing.values()]
    for loop in (path for one in found for path in one.loops):
        yield Finding("problem", "symlink loop", f"{loop} links to a folder above it. Remove the link.", (str(loop),))
    for path in (path for one in found for path in one.closed):
        text = f"{path} cannot be opened: it is a link to a folder that is gone, or a folder that may not be listed."
        yield Finding("problem", "closed folder", text, (str(path),))
    hidden = [str(path) for one in found for path in one.hidden]
    hidden += [str(child) for child in top.iterdir() if child.is_dir() and child.name.startswith((".", "__"))]
    if hidden:
        yield Finding("note", "hidden files", f"{len(hidden)} hidden files or folders are left out.", tuple(hidden))
    others = [path for one in found for path in one.others]
    if others:
        kinds = Counter(path.suffix.lower() or "no suffix" for path in others).most_common(5)
        text = f"{len(others)} files have no name of an image that can be read, and are left out: "
        text += ", ".join(f"{count} {kind}" for kind, count in kinds)
        text += f". {_heic(found)}".rstrip()
        yield Finding("note", "other files", text, tuple(map(str, others)))


def _heic(listings: Iterable[Listing]) -> str:
    """What to install, where there are photographs of iPhones; or nothing."""
    count = sum(path.suffix.lower() in HEIC for found in listings for path in found.others)
    return f"To read the {count} HEIC files there: pip install pillow-heif. " if count else ""


def _left_out(top: Path, places: Sequence[Path]) -> Iterator[Finding]:
    """What is beside the folders that are read."""
    beside: list[Path] = []
    for place in [top, *(place for place in places if place != top)]:
        for child in sorted(place.iterdir()):
            if child.is_symlink() and not child.exists():
                yield Finding(
                    "problem", "dangling link", f"{child} links to {child.readlink()}, which is gone.", (str(child),)
                )
            elif child.is_dir():
                if (
                    top not in places
                    and place == top
                    and child not in places
                    and not child.name.startswith((".", "__"))
                ):
                    beside.append(child)
            elif child.suffix.lower() in SUFFIXES:
                beside.append(child)
    if beside:
        text = f"{len(beside)} folders or images are beside the splits or the classes, and are left out."
        yield Finding("note", "left out", text, tuple(map(str, beside)))


def _folders(parent: Path) -> list[Path]:
    return sorted(child for child in parent.iterdir() if child.is_dir() and not child.name.startswith((".", "__")))
