"""Checkpoints, configs and stored rows of an earlier module layout still load, resume and are reused."""

import hashlib
import io
import json
import shutil
import tarfile
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file

from project import load
from project.cli.main import main
from project.data.image_io import read_image
from project.data.sources.folder import Folder
from project.features.engine_options import EngineFactory
from project.features.frozen_prefix import PrefixSpec
from project.features.views import digest_images, image_views
from project.models.loading import load_backbone
from project.runtime.distributed import ProcessGroup
from tests.conftest import COLOURS, draw, row_counts, scalars

FIXTURES = Path(__file__).parents[1] / "fixtures" / "before_house"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())
#: With other library versions, the last bits of a sum may differ.
SAME_VERSIONS = all(version(name) == number for name, number in EXPECTED["versions"].items())
METRICS = ("val/loss", "val/accuracy", "val/f1", "val/ece", "train/loss")


@pytest.fixture
def earlier(here: Path, resnet18_weights: Path) -> Path:
    """A working directory with images, and with the runs ``runs/NAME`` and the store of the earlier version."""
    for index, (name, colour) in enumerate(COLOURS.items()):
        for split, count in (("train", 8), ("val", 4)):
            for number in range(count):
                # PPM: the same bytes from any version of Pillow.
                path = here / "photos" / split / name / f"{number}.ppm"
                draw(path, colour, 100 * index + 10 * (split == "val") + number)
    for name in ("head", "live"):
        folder = here / "runs" / name / "version_0"
        shutil.copytree(FIXTURES / name, folder / "checkpoints", ignore=shutil.ignore_patterns("*.yaml"))
        shutil.copy(FIXTURES / name / "config.yaml", folder)
    shutil.copytree(FIXTURES / "store", here / "store")
    return here


def metrics(run: Path) -> dict[str, list[float]]:
    events = scalars(run)
    return {name: [event.value for event in events.Scalars(name)] for name in METRICS}


def check_resumed(run: Path, expected: dict[str, Any]) -> None:
    """Compare the metrics and the trained tensors of a resumed run."""
    values = metrics(run)
    for name in METRICS:
        assert values[name] == pytest.approx(expected["resumed"][name], abs=1e-5), name
    if SAME_VERSIONS:
        state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        digest = hashlib.sha256()
        for name in sorted(state):
            digest.update(name.encode() + state[name].contiguous().numpy().tobytes())
        assert digest.hexdigest() == expected["sha256"], "the trained tensors are bit-identical"


def test_checkpoint_loads(earlier: Path, resnet18_weights: Path) -> None:
    classifier = load(earlier / "runs/head/version_0/checkpoints/best.ckpt", weights=str(resnet18_weights))
    assert classifier.classes_ == ["blue", "green", "red"]
    files = sorted((earlier / "photos/val").rglob("*.ppm"))
    assert classifier.predict([read_image(file) for file in files]) == [file.parent.name for file in files]


def test_checkpoint_validates_to_the_same_metrics(
    earlier: Path, resnet18_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--ckpt_path", "runs/head/version_0/checkpoints/best.ckpt", "--model.weights", str(resnet18_weights)]
    flags += ["--data.root", "photos", "--data.num_workers", "0", "--trainer.accelerator", "cpu"]
    assert main(["validate", *flags]) == 0
    out = capsys.readouterr().out
    for name in ("val/loss", "val/accuracy", "val/f1", "val/ece"):
        assert f"{name}: {EXPECTED['head']['best'][name]:.4f}" in out, name


def test_config_trains_to_the_same_metrics(earlier: Path, resnet18_weights: Path) -> None:
    config = "runs/head/version_0/config.yaml"
    random_head = ["--model.head_init", "random"]  # the only initial head then
    assert main(["fit", "-c", config, "--model.weights", str(resnet18_weights), "--name", "again", *random_head]) == 0
    for name, values in metrics(earlier / "runs/again/version_0").items():
        assert values == pytest.approx(EXPECTED["head"]["epochs"][name], abs=1e-5), name


def test_fit_on_stored_rows_resumes_bit_identically(earlier: Path, resnet18_weights: Path) -> None:
    flags = ["-c", "runs/head/version_0/config.yaml", "--model.weights", str(resnet18_weights)]
    assert main(["fit", *flags, "--ckpt_path", "last", "--trainer.max_epochs", "5"]) == 0
    run = earlier / "runs/head/version_1"
    check_resumed(run, EXPECTED["head"])
    saved, carried = (
        torch.load(path, weights_only=True) for path in (FIXTURES / "head/best.ckpt", run / "checkpoints/best.ckpt")
    )
    assert carried.pop("answers")["validation"] == 12, "answers are added to the checkpoint of an earlier version"
    assert carried.keys() == saved.keys(), "the best checkpoint is carried over"
    torch.testing.assert_close(carried["state_dict"], saved["state_dict"], rtol=0, atol=0)


def test_fit_interrupted_within_an_epoch_resumes_bit_identically(earlier: Path, resnet18_weights: Path) -> None:
    flags = ["-c", "runs/live/version_0/config.yaml", "--model.weights", str(resnet18_weights)]
    assert main(["fit", *flags, "--ckpt_path", "last"]) == 0
    run = earlier / "runs/live/version_1"
    check_resumed(run, EXPECTED["live"])


@pytest.fixture
def earlier_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The version of the decoder that computed the rows. It differs for images of 10, 12 and 14 bits only."""
    monkeypatch.setattr("project.features.views.DECODING", 2)


@pytest.mark.usefixtures("earlier_decoding")
def test_stored_rows_are_reused(earlier: Path, resnet18_weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (space,) = (FIXTURES / "store").iterdir()
    versions = json.loads((space / "space.json").read_text())["versions"]
    installed = {name: version(name) for name in versions}
    if installed != versions:
        pytest.skip(f"the rows are keyed by {versions}, and {installed} are installed")
    flags = ["-c", "runs/head/version_0/config.yaml", "--model.weights", str(resnet18_weights), "--name", "again"]
    assert main(["fit", *flags]) == 0
    assert row_counts(capsys.readouterr().out) == [(36, 0)]


def test_rows_of_another_decoder_are_computed_again(
    earlier: Path, resnet18_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["-c", "runs/head/version_0/config.yaml", "--model.weights", str(resnet18_weights), "--name", "again"]
    assert main(["fit", *flags]) == 0
    assert row_counts(capsys.readouterr().out) == [(0, 36)]


@pytest.mark.usefixtures("earlier_decoding")
def test_keys_of_rows_are_unchanged(earlier: Path, resnet18_weights: Path) -> None:
    (space,) = (FIXTURES / "store").iterdir()
    (shard,) = space.glob("*.safetensors")
    backbone = load_backbone("resnet18", str(resnet18_weights), 32)
    description = json.loads((space / "space.json").read_text())
    prefix = PrefixSpec(backbone, backbone.cut, backbone, "channels_last", torch.device("cpu"), "32-true")
    engines = EngineFactory(earlier / "store", prefix, "", list)  # type: ignore[arg-type]
    engines.network["versions"] = description["versions"]
    (option,) = engines.options("torch", "fp32")
    assert option.space.path.name == space.name
    source = Folder("photos")
    samples = [sample for split in source.splits.values() for sample in split]
    (view,) = image_views(
        source, samples, digest_images(source, samples, ProcessGroup()), evaluation_of(backbone), [""]
    )
    keys = view.keys
    stored = load_file(shard)["keys"].view(np.uint64)
    assert {tuple(key) for key in keys.tolist()} == {tuple(key) for key in stored.tolist()}


def evaluation_of(backbone: Any) -> Any:
    from project.data.transforms import evaluation

    return evaluation(backbone.preprocessing)


#: Class paths of sources in earlier configs, with arguments for the data that ``source_data`` writes.
SOURCES: dict[str, dict[str, Any]] = {
    "project.data.manifest.Manifest": {"path": "photos.csv"},
    "project.data.published.HuggingFace": {"path": "insects"},
    "project.data.shards.Shards": {"train": "shards/*.tar", "image": "ppm"},
    "project.data.sources.Digits": {},
    "project.data.sources.Folder": {"root": "photos"},
}


@pytest.fixture
def source_data(earlier: Path) -> None:
    import datasets

    files = sorted((earlier / "photos/train").rglob("*.ppm"))
    lines = [f"{file.relative_to(earlier)},{file.parent.name}" for file in files]
    (earlier / "photos.csv").write_text("\n".join(["path,label", *lines]))
    images = [{"path": str(file), "bytes": None} for file in files]
    class_label = datasets.ClassLabel(names=["blue", "green", "red"])
    features = datasets.Features({"image": datasets.Image(), "label": class_label})
    table = {"image": images, "label": [file.parent.name for file in files]}
    datasets.Dataset.from_dict(table, features=features).save_to_disk(earlier / "insects")
    (earlier / "shards").mkdir()
    with tarfile.open(earlier / "shards/0.tar", "w") as archive:
        for number, file in enumerate(files):
            archive.add(file, f"{number:04d}.ppm")
            label = tarfile.TarInfo(f"{number:04d}.cls")
            label.size = len(file.parent.name)
            archive.addfile(label, io.BytesIO(file.parent.name.encode()))


@pytest.mark.usefixtures("source_data")
@pytest.mark.parametrize("path", SOURCES)
def test_class_path_in_a_config_names_the_same_source(
    path: str, earlier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"data": {"source": {"class_path": path, "init_args": SOURCES[path]}}}
    (earlier / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["check", "-c", "config.yaml"]) in (0, 1)
    count = "1797 images" if path.endswith("Digits") else "36 images" if "Folder" in path else "24 images"
    out = capsys.readouterr().out
    assert count in out and "cannot be read" not in out


def test_public_classes_are_importable_from_their_earlier_modules() -> None:
    for module, names in {
        "project.data.manifest": ("Manifest",),
        "project.data.published": ("HuggingFace", "Torchvision"),
        "project.data.shards": ("Shards",),
        "project.data.sources": ("Digits", "Encoded", "Files", "Folder"),
        "project.models.heads": ("CosineHead", "LinearHead", "MLPHead"),
    }.items():
        for name in names:
            assert isinstance(getattr(import_module(module), name), type), f"{module}.{name}"
