"""A run's images with what its classifier makes of them."""

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
from tests.conftest import told


@pytest.fixture(scope="module")
def classifier(trained: Path) -> Classifier:
    return load(trained / "checkpoints/best.ckpt")


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> RowProvider:
    return RowProvider("torch", "auto", 1.0, tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def gallery(classifier: Classifier, trained: Path, provider: RowProvider) -> Gallery:
    return Gallery(classifier, data_of(trained / "checkpoints/best.ckpt"), provider=provider)


def test_it_is_what_the_classifier_makes_of_the_images(gallery: Gallery, classifier: Classifier) -> None:
    paths = [sample.name for sample in gallery.samples]
    assert len(paths) == 24
    np.testing.assert_allclose(gallery.features, classifier.features(paths), atol=1e-5)
    np.testing.assert_allclose(gallery.probabilities, classifier.predict_proba(paths), atol=1e-5)
    assert [classifier.classes_[label] for label in gallery.labels] == [Path(path).parent.name for path in paths]


def test_what_is_stored_is_not_computed_again(
    gallery: Gallery, classifier: Classifier, provider: RowProvider, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Gallery(classifier, ImageDataModule(str(photos)), "train", provider=provider)
    assert told(capsys.readouterr().out) == [(24, 0)]


def test_an_image_is_nearest_to_itself_and_to_its_class(gallery: Gallery, classifier: Classifier) -> None:
    near = gallery.nearest(classifier.features([gallery.samples[7].name, gallery.samples[20].name]), 3)
    assert [each[0].sample for each in near] == [gallery.samples[7], gallery.samples[20]]
    for each in near:
        assert each[0].similarity == pytest.approx(1, abs=1e-4)
        assert len({one.sample.label for one in each}) == 1
        assert [one.similarity for one in each] == sorted((one.similarity for one in each), reverse=True)


def test_more_neighbours_than_there_are_images_are_all_of_them(gallery: Gallery) -> None:
    assert len(gallery.nearest(gallery.features[:1], 1000)[0]) == 24


def test_mistakes_come_with_the_surest_first(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not len(gallery.mistakes())
    monkeypatch.setattr(gallery, "labels", (gallery.labels + (np.arange(24) % 5 == 0)) % 3)
    wrong = gallery.mistakes()
    assert sorted(wrong.tolist()) == [0, 5, 10, 15, 20]
    assert (np.diff(gallery.probabilities[wrong].max(1)) <= 0).all()


def test_data_of_other_classes_is_refused(classifier: Classifier, photos: Path) -> None:
    data = ImageDataModule(str(photos))
    assert data.source is not None
    other = ImageDataModule(source=Relabeled(data.source, {"warm": ["red"], "cold": ["green", "blue"]}))
    with pytest.raises(DataError, match="classes of photos-warm-cold are not the model's"):
        Gallery(classifier, other)


def test_the_data_of_a_run_holds_out_what_the_run_held_out(run: Path, photos: Path) -> None:
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(str(photos), str(photos / "train")).replace("n: 0.2", "n: 0.5"))
    splits = data_of(run / "checkpoints/best.ckpt").splits
    assert len(splits["train"]) == len(splits["val"]) == 12


def test_data_that_is_gone_or_unknown_is_told(run: Path, photos: Path) -> None:
    config = run / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace(str(photos), "gone"))
    with pytest.raises(DataError, match="gone"):
        data_of(run / "checkpoints/best.ckpt").splits  # noqa: B018
    config.write_text("data: []")
    with pytest.raises(ConfigError, match="no run's config"):
        data_of(run / "checkpoints/best.ckpt")
    config.unlink()
    with pytest.raises(ConfigError, match=r"config.yaml is not there"):
        data_of(run / "checkpoints/best.ckpt")


def test_a_config_can_make_nothing_but_a_source_of_images(run: Path, photos: Path) -> None:
    config = run / "config.yaml"
    source = "source: {class_path: subprocess.Popen, init_args: {args: [touch, made]}}"
    config.write_text(config.read_text().replace(f"root: {photos}", "root: null").replace("source: null", source))
    with pytest.raises(ConfigError, match="Popen"):
        data_of(run / "checkpoints/best.ckpt")
    assert not Path("made").exists()


def test_a_cold_place_is_grey_and_a_hot_one_is_not() -> None:
    picture = Image.new("RGB", (4, 4), (10, 200, 30))
    heat = np.zeros((4, 4), np.float32)
    heat[0, 0] = 1
    pixels = np.asarray(overlay(picture, heat))
    assert not np.ptp(pixels.reshape(-1, 3)[1:]).any() and np.ptp(pixels[0, 0]) > 50
