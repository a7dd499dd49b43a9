"""What all sources share."""

import pytest
from PIL import Image

from project.data.sources import Digits, Files, Folder, HuggingFace, Manifest, Shards, Source, Torchvision
from project.data.sources.base import Sample, decoder_name


class Own(Source):
    """A source of the user's, which decodes in a way of its own."""

    def content(self, sample: Sample) -> bytes:
        return b""

    def decode(self, content: bytes, sample: Sample, min_size: int = 0) -> Image.Image:
        return Image.new("RGB", (1, 1))


@pytest.mark.parametrize("kind", [Files, Folder, HuggingFace, Manifest, Shards, Torchvision])
def test_decoders_keep_the_names_that_keys_of_rows_have(kind: type[Source]) -> None:
    assert decoder_name(kind.__new__(kind)) == "project.data.sources.Encoded.decode"


def test_a_decoder_of_its_own_has_a_name_of_its_own() -> None:
    assert decoder_name(Digits.__new__(Digits)) == "project.data.sources.Digits.decode"
    assert decoder_name(Own()) == f"{__name__}.Own.decode"
