"""Class paths in configs: ``project.data.published.HuggingFace``. The code is in :mod:`project.data.sources`."""

from project.data.sources import HuggingFace, Torchvision

__all__ = ["HuggingFace", "Torchvision"]
