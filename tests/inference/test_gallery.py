"""Gallery, the data of a run, and the heat map overlay."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from project import Classifier, ImageDataModule, load
from project.data.sources.relabeled import Relabeled
from project.errors import ConfigError, DataError
from project.features.provider import RowProvider
from project.inference.gallery import Gallery, data_of
from project.inference.heatmap_overlay import overlay
from tests.conftest import row_counts


@pytest.fixture(scope="module")
def classifier(trained: Path) -> Classifier:
    return load(trained / "checkpoints/best.ckpt")


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> RowProvider:
    return RowProvider("torch", "auto", 1.0, tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def gallery(classifier: Classifier, trained: Path, provider: RowProvider) -> Gallery:
    return Gallery(classifier, data_of(trained / "checkpoints/best.ckpt"), provider=provider)


def test_features_and_probabilities_equal_those_of_the_classifier(gallery: Gallery, classifier: Classifier) -> None:
    paths = [sample.name for sample in gallery.samples]
    assert len(paths) == 24
    np.testing.assert_allclose(gallery.features, classifier.features(paths), atol=1e-5)
    np.testing.assert_allclose(gallery.probabilities, classifier.predict_proba(paths), atol=1e-5)
    assert [classifier.classes_[label] for label in gallery.labels] == [Path(path).parent.name for path in paths]


def test_stored_features_are_reused(
    gallery: Gallery, classifier: Classifier, provider: RowProvider, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Gallery(classifier, ImageDataModule(str(photos)), "train", provider=provider)
    assert row_counts(capsys.readouterr().out) == [(24, 0)]


def test_nearest_neighbour_of_an_image_is_itself(gallery: Gallery, classifier: Classifier) -> None:
    results = gallery.nearest(classifier.features([gallery.samples[7].name, gallery.samples[20].name]), 3)
    assert [neighbours[0].sample for neighbours in results] == [gallery.samples[7], gallery.samples[20]]
    for neighbours in results:
        assert neighbours[0].similarity == pytest.approx(1, abs=1e-4)
        assert len({neighbour.sample.label for neighbour in neighbours}) == 1
        similarities = [neighbour.similarity for neighbour in neighbours]
        assert similarities == sorted(similarities, reverse=True)


def test_count_is_limited_to_the_number_of_images(gallery: Gallery) -> None:
    assert len(gallery.nearest(gallery.features[:1], 1000)[0]) == 24


def test_mistakes_are_sorted_by_confidence(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not len(gallery.mistakes())
    monkeypatch.setattr(gallery, "labels", (gallery.labels + (np.arange(24) % 5 == 0)) % 3)
    wrong = gallery.mistakes()
    assert sorted(wrong.tolist()) == [0, 5, 10, 15, 20]
    assert (np.diff(gallery.probabilities[wrong].max(1)) <= 0).all()


def test_data_with_other_classes_is_refused(classifier: Classifier, photos: Path) -> None:
    data = ImageDataModule(str(photos))
    assert data.source is not None
    other = ImageDataModule(source=Relabeled(data.source, {"warm": ["red"], "cold": ["green", "blue"]}))
    with pytest.raises(DataError, match="classes of photos-warm-cold differ from the model's"):
        Gallery(classifier, other)


def test_data_of_a_run_has_the_splits_of_the_run(run: Path, photos: Path) -> None:
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(str(photos), str(photos / "train")).replace("n: 0.2", "n: 0.5"))
    splits = data_of(run / "checkpoints/best.ckpt").splits
    assert len(splits["train"]) == len(splits["val"]) == 12


def test_missing_data_and_invalid_config_are_refused(run: Path, photos: Path) -> None:
    config = run / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace(str(photos), "gone"))
    with pytest.raises(DataError, match="gone"):
        data_of(run / "checkpoints/best.ckpt").splits  # noqa: B018
    config.write_text("data: []")
    with pytest.raises(ConfigError, match="not the config of a run"):
        data_of(run / "checkpoints/best.ckpt")
    config.unlink()
    with pytest.raises(ConfigError, match=r"config.yaml is missing"):
        data_of(run / "checkpoints/best.ckpt")


def test_config_cannot_instantiate_other_classes(run: Path, photos: Path) -> None:
    config = run / "config.yaml"
    source = "source: {class_path: subprocess.Popen, init_args: {args: [touch, made]}}"
    config.write_text(config.read_text().replace(f"root: {photos}", "root: null").replace("source: null", source))
    with pytest.raises(ConfigError, match="Popen"):
        data_of(run / "checkpoints/best.ckpt")
    assert not Path("made").exists()


def test_overlay_colors_only_hot_pixels() -> None:
    image = Image.new("RGB", (4, 4), (10, 200, 30))
    heat = np.zeros((4, 4), np.float32)
    heat[0, 0] = 1
    pixels = np.asarray(overlay(image, heat))
    assert not np.ptp(pixels.reshape(-1, 3)[1:]).any() and np.ptp(pixels[0, 0]) > 50
