"""Class paths in configs: ``project.data.shards.Shards``. The code is in :mod:`project.data.sources`."""

from project.data.sources import Shards

__all__ = ["Shards"]
