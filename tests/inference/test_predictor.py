"""``load`` and ``Classifier``."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from project import load
from project.data.image_arrays import to_images
from project.data.image_io import read_image
from project.data.transforms import evaluation
from project.errors import CheckpointError, DataError, WeightsError
from tests.conftest import FEATURES


def test_paths_pil_images_and_tensors_give_equal_predictions(trained: Path, photos: Path) -> None:
    classifier = load(trained / "checkpoints/best.ckpt")
    paths = sorted((photos / "test").rglob("*.png"))
    pictures = [Image.open(path).convert("RGB") for path in paths]
    tensors = torch.stack([pil_to_tensor(picture) for picture in pictures])
    expected = classifier.predict_proba(paths)
    for images in ([str(path) for path in paths], pictures, tensors):
        assert np.array_equal(classifier.predict_proba(images), expected)


def test_large_jpeg_is_decoded_at_the_size_of_training_from_paths_bytes_and_files(trained: Path, here: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((640, 480)).save("large.jpg")
    classifier = load(trained / "checkpoints/best.ckpt")
    transform = evaluation(classifier.model.backbone.preprocessing)
    expected = classifier.features([read_image("large.jpg", transform.min_size)])
    assert not np.array_equal(expected, classifier.features([Image.open("large.jpg")]))  # a PIL image keeps its size
    content = Path("large.jpg").read_bytes()
    for image in ("large.jpg", content, io.BytesIO(content)):
        assert np.array_equal(classifier.features([image]), expected)


def test_open_file_is_decoded_for_several_transforms() -> None:
    stream = io.BytesIO()
    Image.new("RGB", (640, 480)).save(stream, "JPEG")
    stream.seek(0)
    assert [image.size for image in to_images(stream, [32, 200, 32])] == [(80, 60), (320, 240), (80, 60)]


def test_outputs_have_the_documented_shapes(trained: Path, photos: Path) -> None:
    classifier = load(trained / "checkpoints/best.ckpt")
    paths = sorted((photos / "test").rglob("*.png"))
    probabilities = classifier.predict_proba(paths)
    assert classifier.classes_ == ["blue", "green", "red"]
    assert probabilities.shape == (12, 3) and probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-6)
    assert classifier.features(paths).shape == (12, FEATURES)
    assert classifier.predict(paths) == [path.parent.name for path in paths]


def test_predictions_do_not_depend_on_the_batch_size(trained: Path, photos: Path) -> None:
    classifier = load(trained / "checkpoints/best.ckpt")
    paths = sorted((photos / "test").rglob("*.png"))
    whole = classifier.predict_proba(paths)
    classifier.batch_size = 5
    np.testing.assert_allclose(classifier.predict_proba(paths), whole, atol=1e-5)


def test_empty_input_gives_empty_output(trained: Path) -> None:
    classifier = load(trained / "checkpoints/best.ckpt")
    assert classifier.predict([]) == []
    assert classifier.predict_proba([]).shape == (0, 3)
    assert classifier.features([]).shape == (0, FEATURES)


def test_weights_with_relative_path_load_from_any_working_directory(
    fit: Callable[..., int], weights: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(weights, "mine.pth")
    assert fit("--model.weights", "mine.pth") == 0
    path = Path("runs/photos/version_0/checkpoints/best.ckpt").resolve()
    monkeypatch.chdir("/")
    assert load(path).classes_ == ["blue", "green", "red"]
    (here / "mine.pth").rename(here / "moved.pth")
    with pytest.raises(WeightsError, match=r"best\.ckpt: .*mine\.pth.*weights=\.\.\."):
        load(path)
    assert load(path, weights=str(here / "moved.pth")).classes_ == ["blue", "green", "red"]


@pytest.mark.parametrize("classes", [["red"], [], ["red"] * 3, "red"])
def test_heat_maps_require_one_class_per_image(classes: object, trained: Path, photos: Path) -> None:
    images = [photos / "val/red/0.png", photos / "val/blue/0.png"]
    with pytest.raises(TypeError, match="one class name per image"):
        load(trained / "checkpoints/best.ckpt").heat_map(images, classes)


@pytest.mark.parametrize(
    "images", ["a.jpg", Path("a.jpg"), np.zeros((8, 8, 3)), torch.zeros(3, 8, 8, dtype=torch.uint8)]
)
def test_single_image_is_refused(images: object, trained: Path) -> None:
    with pytest.raises(TypeError, match="several images: a list"):
        load(trained / "checkpoints/best.ckpt").predict(images)


def test_batches_and_lists_give_equal_predictions(trained: Path) -> None:
    classifier, batch = load(trained / "checkpoints/best.ckpt"), torch.rand(5, 3, 40, 48)
    expected = classifier.predict_proba(batch)
    arrays = batch.movedim(1, -1).numpy()
    for images in (list(batch), arrays, list(arrays), (255 * batch).round().to(torch.uint8)):
        assert np.array_equal(classifier.predict_proba(images), expected)
    with pytest.raises(DataError, match=r"Float pixels must be in \[0, 1\]"):
        classifier.predict(batch * 2)


def test_changed_weights_are_refused(trained: Path, weights: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(trained / "checkpoints/best.ckpt", weights_only=True)
    state = torch.load(weights, weights_only=True)
    state["bn1.running_var"][3] *= 1.001
    torch.save(state, tmp_path / "other.pth")
    checkpoint["hyper_parameters"]["weights"] = str(tmp_path / "other.pth")
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"a\.ckpt: The backbones differ"):
        load(tmp_path / "a.ckpt")


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_missing_and_unexpected_tensors_are_refused(change: str, trained: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(trained / "checkpoints/best.ckpt", weights_only=True)
    if change == "missing":
        del checkpoint["state_dict"]["head.bias"]
    else:
        checkpoint["state_dict"]["head.more"] = torch.zeros(1)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="head.bias" if change == "missing" else "head.more"):
        load(tmp_path / "a.ckpt")


def test_heat_map_is_aligned_with_the_network_input(trained: Path, photos: Path) -> None:
    classifier = load(trained / "checkpoints/best.ckpt")
    paths = sorted((photos / "test").rglob("*.png"))[:5]
    whole = classifier.heat_map(paths)
    assert whole.shape == (5, 32, 32) and whole.dtype == np.float32
    assert [picture.size for picture in classifier.crop(paths)] == [(32, 32)] * 5
    np.testing.assert_array_equal(whole, classifier.heat_map(paths, classifier.predict(paths)))
    classifier.batch_size = 2
    other = classifier.heat_map(paths, ["red"] * 5)
    np.testing.assert_allclose(
        other, np.concatenate([classifier.heat_map([path], ["red"]) for path in paths]), atol=1e-4
    )
    assert classifier.heat_map([]).shape == (0, 32, 32)
    with pytest.raises(DataError, match=r"Unknown class 'pink'\. Classes: blue, green, red"):
        classifier.heat_map(paths, ["pink"] * 5)


def test_checkpoints_loaded_together_share_the_backbone(trained: Path, photos: Path) -> None:
    paths = [trained / f"checkpoints/{name}.ckpt" for name in ("best", "last")]
    first, second = load(paths)
    assert first.model.backbone.stages["layer4"] is second.model.backbone.stages["layer4"]
    assert first.model.head is not second.model.head
    images = [photos / "val/red/0.png", photos / "val/blue/0.png"]
    for path, classifier in zip(paths, (first, second), strict=True):
        assert np.array_equal(load(path).predict_proba(images), classifier.predict_proba(images))


def test_empty_list_of_checkpoints_is_refused() -> None:
    with pytest.raises(CheckpointError, match="Pass at least one"):
        load([])
