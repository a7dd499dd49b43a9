"""Sources of labeled images. Configs use the class paths of this package, such as ``project.data.sources.Digits``."""

from project.data.sources.base import Finding, Sample, Source
from project.data.sources.digits import Digits
from project.data.sources.files import Encoded, Files
from project.data.sources.folder import Folder
from project.data.sources.huggingface import HuggingFace
from project.data.sources.manifest import Manifest
from project.data.sources.torchvision import Torchvision
from project.data.sources.webdataset import Shards

__all__ = [
    "Digits",
    "Encoded",
    "Files",
    "Finding",
    "Folder",
    "HuggingFace",
    "Manifest",
    "Sample",
    "Shards",
    "Source",
    "Torchvision",
]
