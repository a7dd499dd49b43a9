"""Class paths in configs: ``project.data.manifest.Manifest``. The code is in :mod:`project.data.sources`."""

from project.data.sources import Manifest

__all__ = ["Manifest"]
