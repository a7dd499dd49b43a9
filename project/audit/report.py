"""The ``check`` verb: runs the data checks and reports them as a table and as JSON."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from json import dumps
from pathlib import Path

from rich.table import Table

from project.audit.checks import LEVELS, Audit, audit
from project.audit.label_issues import Suspect, suspects_of
from project.data.datamodule import ImageDataModule
from project.errors import ConfigError
from project.features.frozen_prefix import PrefixSpec
from project.features.provider import RowProvider
from project.runtime.atomic_write import atomic_write
from project.runtime.console import print_rank_zero

MAX_NAMES = 3  # per finding, in the table


def check(
    data: ImageDataModule | None,
    prefix: PrefixSpec | None = None,
    provider: RowProvider | None = None,
    json: str | None = None,
    fix: str | None = None,
    top: int = 20,
) -> bool:
    """Check the data: decode every image, and report what would make training fail or results wrong.

    Args:
        data: The data.
        prefix: Computes features with the frozen backbone, to find label issues; ``None`` skips that.
        provider: Stores the features.
        json: Write the full report to this JSON file.
        fix: Write a manifest without the bad images to this CSV file, for data.root. No image is changed.
        top: Maximum number of suspects.

    Returns:
        Whether no problem was found.

    Raises:
        ConfigError: No data was specified, or a file cannot be written.
        DataError: The manifest cannot be made, or no image can be read.
    """
    data = data or ImageDataModule()
    result = check_images(data, json, fix)
    if prefix is not None and provider is not None:
        report_suspects(result, suspects_of(prefix, data, result.infos, provider, top), json)
    return result.clean


def check_images(data: ImageDataModule, json: str | None = None, fix: str | None = None) -> Audit:
    """Read all images of the data, and print the findings.

    Args:
        data: The data. It is checked even if it cannot be trained on.
        json: JSON file for the full report.
        fix: CSV file for a manifest without the bad images.

    Raises:
        ConfigError: No data was specified, or a file cannot be written.
        DataError: The manifest cannot be made.
    """
    source = data.source
    if source is None:
        raise ConfigError("No data. Pass an image folder with --data.root PATH (PATH/CLASS/*.jpg).")
    paths = {flag: Path(file).expanduser() for flag, file in (("--json", json), ("--fix", fix)) if file is not None}
    for flag, path in paths.items():  # fail before all images are read
        if path.is_dir():
            raise ConfigError(f"{flag}: {path} is a folder. Pass a file.")
        if not os.access(path.absolute().parent, os.W_OK):
            raise ConfigError(f"{flag}: cannot write {path}: its folder does not exist or is not writable.")
    if fix is not None and data.root is not None and paths["--fix"].resolve() == Path(data.root).resolve():
        raise ConfigError(f"--fix: {fix} is data.root itself. Use another file.")
    start = time.perf_counter()
    samples = [sample for split in source.splits.values() for sample in split]
    infos = {sample.name: info for sample, info in zip(samples, data.image_infos(samples), strict=True)}
    result = audit(source, infos)
    _print_findings(result, time.perf_counter() - start)
    if json is not None:
        _write_json(result, None, paths["--json"])
    if fix is not None:
        count = result.write_manifest(paths["--fix"])
        print_rank_zero(f"{fix}: wrote {count} images, left out {len(result.bad)}. Train on it with --data.root {fix}")
    return result


def _print_findings(result: Audit, seconds: float) -> None:
    counts = {level: sum(finding.level == level for finding in result.findings) for level in LEVELS}
    if result.findings:
        table = Table(title=f"Check of {result.source}", title_justify="left", show_lines=True)
        table.add_column("", no_wrap=True)
        table.add_column("finding", no_wrap=True)
        table.add_column("details", overflow="fold")
        for finding in result.findings:
            names = [name for name in finding.names[:MAX_NAMES] if name not in finding.text]
            if names and len(finding.names) > MAX_NAMES:
                names.append(f"and {len(finding.names) - MAX_NAMES} more: list all with --json report.json")
            table.add_row(finding.level, finding.kind, "\n".join([finding.text, *names]))
        print_rank_zero(table)
    splits = {split: sum(count[split] for count in result.counts.values()) for split in ("train", "val", "test")}
    parts = ", ".join(f"{count} {split}" for split, count in splits.items() if count)
    problems = counts["refused"] + counts["problem"]
    print_rank_zero(
        f"{result.source}: {len(result.rows)} images ({parts}) of {len(result.counts)} "
        f"{'class' if len(result.counts) == 1 else 'classes'} in {seconds:.1f} s. "
        f"Problems: {problems}. Notes: {counts['note']}."
    )


def report_suspects(result: Audit, suspects: Sequence[Suspect], json: str | None = None) -> None:
    """Print the images with suspect labels.

    Args:
        result: Result of the data checks.
        suspects: The images.
        json: JSON file for the full report, with the suspects.

    Raises:
        ConfigError: The file cannot be written.
    """
    if json is not None:
        _write_json(result, suspects, Path(json).expanduser())
    if not suspects:
        print_rank_zero("No suspect labels: no image looks more like another class than like its own.")
        return
    table = Table(title="Suspect labels, most suspect first", title_justify="left")
    for column in ("label", "looks like", "margin"):
        table.add_column(column, no_wrap=True)
    table.add_column("image, and the most similar image of that class", overflow="fold")
    for suspect in suspects:
        table.add_row(suspect.label, suspect.looks_like, f"{suspect.score:.2f}", f"{suspect.name}\n{suspect.neighbour}")
    print_rank_zero(table)


def _write_json(result: Audit, suspects: Sequence[Suspect] | None, path: Path) -> None:
    """Write the full report; ``suspects`` is ``None`` if label issues were not checked.

    Raises:
        ConfigError: The file cannot be written.
    """
    content = result.as_dict()
    if suspects is not None:
        content["suspects"] = [suspect._asdict() for suspect in suspects]
    try:
        # A file name that is not valid UTF-8 is escaped.
        with atomic_write(path) as temporary:
            temporary.write_text(dumps(content, indent=1, ensure_ascii=False), "utf-8", "backslashreplace")
    except OSError as error:
        raise ConfigError(f"--json: cannot write {path}: {error.strerror}.") from error
