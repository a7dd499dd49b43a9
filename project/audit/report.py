"""``check``: what the data doctor found, as a table and as JSON."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from json import dumps
from pathlib import Path

from rich.table import Table

from project.audit.checks import Audit, audit
from project.audit.label_issues import Suspect, suspects_of
from project.data.datamodule import ImageDataModule
from project.errors import ConfigError
from project.features.provider import RowComputation, RowProvider
from project.runtime.console import print_rank_zero

SHOWN = 3  # names a finding


def check(
    data: ImageDataModule | None,
    computation: RowComputation | None = None,
    provider: RowProvider | None = None,
    json: str | None = None,
    fix: str | None = None,
    top: int = 20,
) -> bool:
    """Examine the data: read every image whole, and say what would spoil a result.

    Args:
        data: The data.
        computation: Of the frozen backbone that compares images; without it, no suspects are looked for.
        provider: Provides their rows.
        json: File for everything that was found, as JSON.
        fix: CSV file for a manifest without the bad images, to be given as data.root; no image is touched.
        top: How many of them.

    Returns:
        Whether there is no problem.

    Raises:
        ConfigError: No data was named, or a file cannot be written.
        DataError: No manifest can be made of the data, or no image can be read.
    """
    data = data or ImageDataModule()
    found = examine(data, json, fix)
    if computation is not None and provider is not None:
        report(found, suspects_of(computation, data, found.facts, provider, top), json)
    return found.clean


def examine(data: ImageDataModule, json: str | None = None, fix: str | None = None) -> Audit:
    """Read all images of the data, and print what there is to know of them.

    Args:
        data: The data; it need not be fit to be trained on.
        json: File for all of it.
        fix: CSV file for a manifest without the bad images.

    Raises:
        ConfigError: No data was named, or a file cannot be written.
        DataError: No manifest can be made of the data.
    """
    source = data.source
    if source is None:
        raise ConfigError("No data: name a folder of images with --data.root PATH (PATH/CLASS/*.jpg)")
    for flag, target in (("--json", json), ("--fix", fix)):  # rather than after all images have been read
        if target is not None and not os.access(Path(target).absolute().parent, os.W_OK):
            raise ConfigError(f"{flag}: {target} cannot be written: there is no folder for it that can be written to.")
    if fix is not None and data.root is not None and Path(fix).resolve() == Path(data.root).resolve():
        raise ConfigError(f"--fix: {fix} is data.root itself. Name another file.")
    began = time.perf_counter()
    samples = [sample for split in source.splits.values() for sample in split]
    facts = {sample.name: one for sample, one in zip(samples, data.facts(samples), strict=True)}
    found = audit(source, facts)
    _show(found, time.perf_counter() - began)
    if json is not None:
        _write_json(found, None, Path(json))
    if fix is not None:
        kept = found.write_manifest(Path(fix))
        print_rank_zero(f"{fix}: {kept} images, {len(found.bad)} left out. Train on it: --data.root {fix}")
    return found


def _show(found: Audit, seconds: float) -> None:
    """Print a table of the findings, and a line that sums them up."""
    counts = {level: sum(finding.level == level for finding in found.findings) for level in LEVELS}
    if found.findings:
        table = Table(title=f"Check of {found.source}", title_justify="left", show_lines=True)
        table.add_column("", no_wrap=True)
        table.add_column("what", no_wrap=True)
        table.add_column("where, and what to do", overflow="fold")
        for finding in found.findings:
            names = [name for name in finding.names[:SHOWN] if name not in finding.text]
            if names and len(finding.names) > SHOWN:
                names.append(f"and {len(finding.names) - SHOWN} more: --json report.json names all")
            table.add_row(finding.level, finding.kind, "\n".join([finding.text, *names]))
        print_rank_zero(table)
    splits = {split: sum(count[split] for count in found.counts.values()) for split in ("train", "val", "test")}
    parts = ", ".join(f"{count} {split}" for split, count in splits.items() if count)
    problems = counts["refused"] + counts["problem"]
    print_rank_zero(
        f"{found.source}: {len(found.rows)} images ({parts}) of {len(found.counts)} classes in {seconds:.1f} s. "
        f"{_many(problems, 'problem')}, {_many(counts['note'], 'note')}."
    )


def _many(count: int, what: str) -> str:
    return f"{count or 'no'} {what}{'' if count == 1 else 's'}"


LEVELS = ("refused", "problem", "note")


def report(found: Audit, suspects: Sequence[Suspect], json: str | None = None) -> None:
    """Print the images whose labels look wrong.

    Args:
        found: By the audit.
        suspects: The images.
        json: File for everything, them included.

    Raises:
        ConfigError: It cannot be written.
    """
    if json is not None:
        _write_json(found, suspects, Path(json))
    if not suspects:
        print_rank_zero("No suspect labels: every image looks most like its own class.")
        return
    table = Table(title="Suspect labels, the most suspect first", title_justify="left")
    for column in ("labelled", "looks like", "margin"):
        table.add_column(column, no_wrap=True)
    table.add_column("image, and the one of that class that is most like it", overflow="fold")
    for suspect in suspects:
        table.add_row(suspect.label, suspect.looks_like, f"{suspect.score:.2f}", f"{suspect.name}\n{suspect.neighbour}")
    print_rank_zero(table)


def _write_json(found: Audit, suspects: Sequence[Suspect] | None, path: Path) -> None:
    """Write everything that was found, names of all images included.

    Args:
        found: By the audit.
        suspects: Images whose labels look wrong; ``None`` if they were not looked for.
        path: Where to.

    Raises:
        ConfigError: It cannot be written.
    """
    try:
        everything = found.as_dict()
        if suspects is not None:
            everything["suspects"] = [suspect._asdict() for suspect in suspects]
        # A file's name need not be text: what is not is escaped, as JSON has it.
        path.write_text(dumps(everything, indent=1, ensure_ascii=False), "utf-8", "backslashreplace")
    except OSError as error:
        raise ConfigError(f"--json: {path} cannot be written: {error.strerror}.") from error
