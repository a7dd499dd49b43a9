"""Checks of the files that ``predict`` will write."""

from __future__ import annotations

from pathlib import Path

from project.callbacks.prediction_formats import FORMATS
from project.callbacks.prediction_parts import parts_path
from project.errors import ConfigError


def require_output(output: str, features: Path | None = None) -> None:
    """Check the output files.

    Args:
        output: File of the predictions.
        features: File of the features, if there is one.

    Raises:
        ConfigError: A file is a folder, cannot exist or is of an unknown format, or a package is missing.
    """
    path = Path(output).expanduser()
    if not output or _is_folder("--output", path) or path.suffix not in FORMATS:
        known = f"{', '.join([*FORMATS][:-1])} or {[*FORMATS][-1]}"
        raise ConfigError(f"--output must name a file that ends in {known}, not {output!r}.")
    FORMATS[path.suffix].require()
    if features is None:
        return
    if features.suffix != ".safetensors" or _is_folder("--output_features", features):
        raise ConfigError(f"--output_features must name a file that ends in .safetensors, not {str(features)!r}.")
    if features.absolute().is_relative_to(parts_path(path).absolute()):
        raise ConfigError(
            f"--output_features: {features} is in the folder of parts, which is removed at the end. Use another folder."
        )


def _is_folder(flag: str, path: Path) -> bool:
    """Whether an output is a folder.

    Raises:
        ConfigError: No file can have this path.
    """
    try:
        return path.is_dir()
    except OSError as error:  # the name is too long, or its folder is closed
        raise ConfigError(f"{flag}: {path} cannot be written: {error.strerror}. Use another file.") from error
