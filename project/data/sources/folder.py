"""An image folder as a source."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from project.data.image_io import HEIC, SUFFIXES, Listing, list_images
from project.data.sources.base import SPLITS, Finding, Sample
from project.data.sources.files import Files
from project.data.sources.findings import missing_classes, name_findings, train_spelling
from project.errors import DataError, did_you_mean


class Folder(Files):
    """An image folder: ``root/CLASS/*`` or ``root/{train,val,test}/CLASS/*``. Classes are sorted by name.

    Args:
        root: Path of the folder.
    """

    def __init__(self, root: str) -> None:
        self._root = root

    @functools.cached_property
    def name(self) -> str:  # type: ignore[override]  # a cached property can be set too
        """Name of the folder."""
        return Path(self._root).expanduser().resolve().name

    def _prepare(self) -> None:
        root = Path(self._root).expanduser()
        if not root.is_dir():
            raise DataError(
                f"data.root: there is no folder {self._root}. Pass one that contains a folder of images per class."
            )
        findings: list[Finding] = []
        folders: dict[str, Path] = {}
        for child in _subfolders(root):
            split = SPLITS.get(child.name.lower())
            if split in folders:
                text = f"data.root: {folders[split]} and {child} are both the {split} split. Keep one."
                findings.append(Finding("refused", "split twice", text, (str(child),)))
            elif split:
                folders[split] = child
        if folders and "train" not in folders:
            names = ", ".join(sorted(folders))
            text = f"data.root: {self._root} has {names}, but no train folder. Add train/CLASS/*.jpg."
            findings.append(Finding("refused", "no train", text))
        folders = folders or {"train": root}
        listings: dict[str, dict[str, Listing]] = {
            split: {child.name: list_images(child) for child in _subfolders(folders[split])}
            for split in ("train", "val", "test")
            if split in folders
        }
        spelling = train_spelling(listings)
        listings = {
            split: {spelling[split][name]: listing for name, listing in by_class.items()}
            for split, by_class in listings.items()
        }
        self.classes = tuple(sorted({name for by_class in listings.values() for name in by_class}))
        index = {name: number for number, name in enumerate(self.classes)}
        self.splits = {
            split: [Sample(str(path), index[name]) for name, listing in by_class.items() for path in listing.images]
            for split, by_class in listings.items()
        }
        if "train" in folders:
            findings += _class_findings(folders, listings)
        self.findings = (
            *findings,
            *name_findings(self.classes),
            *_file_findings(root, [listing for by_class in listings.values() for listing in by_class.values()]),
            *_outside_findings(root, list(folders.values())),
        )


def _class_findings(folders: Mapping[str, Path], listings: Mapping[str, Mapping[str, Listing]]) -> Iterator[Finding]:
    train, classes = folders["train"], listings["train"]
    layout = f"Expected one folder of images per class: {train}/CLASS/*.jpg"
    if not classes:
        count = len(list_images(train).images)
        text = f"data.root: {train} has {count or 'no'} images and no class folders. {layout}"
        yield Finding("refused", "no classes", text)
    elif len(classes) == 1:
        text = f"data.root: {train} has only one class, {next(iter(classes))!r}; at least two are needed. {layout}"
        yield Finding("refused", "one class", text)
    for split, by_class in listings.items():
        if by_class and not any(listing.images for listing in by_class.values()):
            hint = _heic_hint(by_class.values())
            text = f"data.root: {folders[split]} contains no images. {hint}Add some, or remove it."
            yield Finding("refused", "empty split", text)
            continue
        for name, listing in by_class.items():
            folder = folders[split] / name
            if name not in classes:
                text = (
                    f"data.root: class {name!r} is only in {split} ({folder}), not in train. "
                    f"{did_you_mean(name, classes)}Add training images to it, or remove it."
                )
                yield Finding("refused", "class in one split", text, (str(folder),))
            elif not listing.images and split == "train":
                hint = _heic_hint([listing])
                text = f"data.root: class {name!r} has no images in {folder}. {hint}Add some, or remove it."
                yield Finding("refused", "empty class", text, (str(folder),))
        if split != "train":
            missing = [name for name in classes if not (name in by_class and by_class[name].images)]
            if missing:
                yield missing_classes(split, missing)


def _file_findings(root: Path, listings: Sequence[Listing]) -> Iterator[Finding]:
    for path in (path for listing in listings for path in listing.loops):
        text = f"{path} is a link to a folder that contains it. Remove the link."
        yield Finding("problem", "symlink loop", text, (str(path),))
    for path in (path for listing in listings for path in listing.closed):
        text = f"{path} cannot be opened: it is a broken link, or a folder without read permission."
        yield Finding("problem", "closed folder", text, (str(path),))
    hidden = [str(path) for listing in listings for path in listing.hidden]
    hidden += [str(child) for child in root.iterdir() if child.is_dir() and _is_hidden(child)]
    if hidden:
        yield Finding("note", "hidden files", f"{len(hidden)} hidden files or folders are skipped.", tuple(hidden))
    others = [path for listing in listings for path in listing.others]
    if others:
        suffixes = Counter(path.suffix.lower() or "no suffix" for path in others).most_common(5)
        counts = ", ".join(f"{count} {suffix}" for suffix, count in suffixes)
        text = f"{len(others)} files of unsupported types are skipped: {counts}. {_heic_hint(listings)}"
        yield Finding("note", "other files", text.rstrip(), tuple(map(str, others)))


def _heic_hint(listings: Iterable[Listing]) -> str:
    """How to read HEIC files among the skipped files; empty if there are none."""
    count = sum(path.suffix.lower() in HEIC for listing in listings for path in listing.others)
    return f"To read the {count} HEIC files there: pip install pillow-heif. " if count else ""


def _outside_findings(root: Path, folders: Sequence[Path]) -> Iterator[Finding]:
    """Find broken links, and images and folders outside the class folders; ``folders`` are those of the splits."""
    outside: list[Path] = []
    for parent in dict.fromkeys((root, *folders)):
        for child in sorted(parent.iterdir()):
            if child.is_symlink() and not child.exists():
                text = f"{child} links to {child.readlink()}, which does not exist."
                yield Finding("problem", "dangling link", text, (str(child),))
            elif child.is_dir():
                if parent not in folders and child not in folders and not _is_hidden(child):
                    outside.append(child)
            elif child.suffix.lower() in SUFFIXES:
                outside.append(child)
    if outside:
        text = f"{len(outside)} folders or images outside the split and class folders are skipped."
        yield Finding("note", "left out", text, tuple(map(str, outside)))


def _subfolders(parent: Path) -> list[Path]:
    return sorted(child for child in parent.iterdir() if child.is_dir() and not _is_hidden(child))


def _is_hidden(path: Path) -> bool:
    return path.name.startswith((".", "__"))
