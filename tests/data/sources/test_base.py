"""Decoder names, which are part of feature store keys."""

import pytest
from PIL import Image

from project.data.sources import Digits, Files, Folder, HuggingFace, Manifest, Shards, Source, Torchvision
from project.data.sources.base import Sample, decoder_name


class CustomSource(Source):
    """A user's source with its own decoder."""

    def content(self, sample: Sample) -> bytes:
        return b""

    def decode(self, content: bytes, sample: Sample, min_size: int = 0) -> Image.Image:
        return Image.new("RGB", (1, 1))


@pytest.mark.parametrize("kind", [Files, Folder, HuggingFace, Manifest, Shards, Torchvision])
def test_file_decoders_keep_their_name_in_store_keys(kind: type[Source]) -> None:
    assert decoder_name(kind.__new__(kind)) == "project.data.sources.Encoded.decode"


def test_other_decoders_have_names_of_their_own() -> None:
    assert decoder_name(Digits.__new__(Digits)) == "project.data.sources.Digits.decode"
    assert decoder_name(CustomSource()) == f"{__name__}.CustomSource.decode"
