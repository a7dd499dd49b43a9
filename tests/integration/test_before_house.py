"""Checkpoints, configs and stored rows of an earlier layout of the modules load, resume and are reused."""

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
from project.features.views import digest_images, image_views
from project.models.backbone import load_backbone
from project.runtime.distributed import ProcessGroup
from tests.conftest import COLOURS, draw, scalars, told

BEFORE = Path(__file__).parents[1] / "fixtures" / "before_house"
EXPECTED = json.loads((BEFORE / "expected.json").read_text())
#: Of another version, the last bits of a sum may differ.
SAME_VERSIONS = all(version(name) == number for name, number in EXPECTED["versions"].items())
FIGURES = ("val/loss", "val/accuracy", "val/f1", "val/ece", "train/loss")


@pytest.fixture
def before(here: Path, weights: Path) -> Path:
    """A working directory with the images, the runs and the store of before; a run is a folder ``runs/NAME``."""
    for index, (name, colour) in enumerate(COLOURS.items()):
        for split, count in (("train", 8), ("val", 4)):
            for number in range(count):
                # PPM: the same bytes from any version of Pillow.
                path = here / "photos" / split / name / f"{number}.ppm"
                draw(path, colour, 100 * index + 10 * (split == "val") + number)
    for name in ("head", "live"):
        folder = here / "runs" / name / "version_0"
        shutil.copytree(BEFORE / name, folder / "checkpoints", ignore=shutil.ignore_patterns("*.yaml"))
        shutil.copy(BEFORE / name / "config.yaml", folder)
    shutil.copytree(BEFORE / "store", here / "store")
    return here


def figures(run: Path) -> dict[str, list[float]]:
    events = scalars(run)
    return {name: [each.value for each in events.Scalars(name)] for name in FIGURES}


def check_end(run: Path, found: dict[str, list[float]], expected: dict[str, Any]) -> None:
    for name in FIGURES:
        assert found[name] == pytest.approx(expected["resumed"][name], abs=1e-5), name
    if SAME_VERSIONS:
        state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        digest = hashlib.sha256()
        for name in sorted(state):
            digest.update(name.encode() + state[name].contiguous().numpy().tobytes())
        assert digest.hexdigest() == expected["sha256"], "the trained tensors are the same to the bit"


def test_a_checkpoint_loads(before: Path, weights: Path) -> None:
    classifier = load(before / "runs/head/version_0/checkpoints/best.ckpt", weights=str(weights))
    assert classifier.classes_ == ["blue", "green", "red"]
    files = sorted((before / "photos/val").rglob("*.ppm"))
    assert classifier.predict([read_image(file) for file in files]) == [file.parent.name for file in files]


def test_a_checkpoint_is_validated_to_the_same_figures(
    before: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--ckpt_path", "runs/head/version_0/checkpoints/best.ckpt", "--model.weights", str(weights)]
    flags += ["--data.root", "photos", "--data.num_workers", "0", "--trainer.accelerator", "cpu"]
    assert main(["validate", *flags]) == 0
    out = capsys.readouterr().out
    for name in ("val/loss", "val/accuracy", "val/f1", "val/ece"):
        assert f"{name}: {EXPECTED['head']['best'][name]:.4f}" in out, name


def test_a_config_trains_to_the_same_figures(before: Path, weights: Path) -> None:
    config = "runs/head/version_0/config.yaml"
    assert main(["fit", "-c", config, "--model.weights", str(weights), "--name", "again"]) == 0
    for name, values in figures(before / "runs/again/version_0").items():
        assert values == pytest.approx(EXPECTED["head"]["epochs"][name], abs=1e-5), name


def test_a_fit_on_stored_rows_is_resumed_to_the_bit(before: Path, weights: Path) -> None:
    flags = ["-c", "runs/head/version_0/config.yaml", "--model.weights", str(weights)]
    assert main(["fit", *flags, "--ckpt_path", "last", "--trainer.max_epochs", "5"]) == 0
    run = before / "runs/head/version_1"
    check_end(run, figures(run), EXPECTED["head"])
    best = "checkpoints/best.ckpt"
    assert (run / best).read_bytes() == (BEFORE / "head/best.ckpt").read_bytes(), "the best so far comes along"


def test_a_fit_that_was_interrupted_within_an_epoch_is_resumed_to_the_bit(before: Path, weights: Path) -> None:
    flags = ["-c", "runs/live/version_0/config.yaml", "--model.weights", str(weights)]
    assert main(["fit", *flags, "--ckpt_path", "last"]) == 0
    run = before / "runs/live/version_1"
    check_end(run, figures(run), EXPECTED["live"])


def test_stored_rows_are_reused(before: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (space,) = (BEFORE / "store").iterdir()
    made_with = json.loads((space / "space.json").read_text())["versions"]
    here = {name: version(name) for name in made_with}
    if here != made_with:
        pytest.skip(f"the rows were made with {made_with}, and here are {here}: that is another space")
    flags = ["-c", "runs/head/version_0/config.yaml", "--model.weights", str(weights), "--name", "again"]
    assert main(["fit", *flags]) == 0
    assert told(capsys.readouterr().out) == [(36, 0)]


def test_the_keys_of_rows_are_what_they_were(before: Path, weights: Path) -> None:
    (space,) = (BEFORE / "store").iterdir()
    (shard,) = space.glob("*.safetensors")
    backbone = load_backbone("resnet18", str(weights), 32)
    description = json.loads((space / "space.json").read_text())
    engines = EngineFactory(
        before / "store", backbone, backbone.cut, backbone, torch.device("cpu"), "", list, "channels_last"
    )  # type: ignore[arg-type]
    engines.network["versions"] = description["versions"]
    (option,) = engines.options("torch", "fp32", "32-true")
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


#: Sources by the paths that configs have had so far, each with arguments for what ``data_of_each`` writes.
SOURCES: dict[str, dict[str, Any]] = {
    "project.data.manifest.Manifest": {"path": "photos.csv"},
    "project.data.published.HuggingFace": {"path": "insects"},
    "project.data.shards.Shards": {"train": "shards/*.tar", "image": "ppm"},
    "project.data.sources.Digits": {},
    "project.data.sources.Folder": {"root": "photos"},
}


@pytest.fixture
def data_of_each(before: Path) -> None:
    import datasets

    files = sorted((before / "photos/train").rglob("*.ppm"))
    lines = [f"{file.relative_to(before)},{file.parent.name}" for file in files]
    (before / "photos.csv").write_text("\n".join(["path,label", *lines]))
    pictures = [{"path": str(file), "bytes": None} for file in files]
    kinds = datasets.ClassLabel(names=["blue", "green", "red"])
    features = datasets.Features({"image": datasets.Image(), "label": kinds})
    table = {"image": pictures, "label": [file.parent.name for file in files]}
    datasets.Dataset.from_dict(table, features=features).save_to_disk(before / "insects")
    (before / "shards").mkdir()
    with tarfile.open(before / "shards/0.tar", "w") as archive:
        for number, file in enumerate(files):
            archive.add(file, f"{number:04d}.ppm")
            label = tarfile.TarInfo(f"{number:04d}.cls")
            label.size = len(file.parent.name)
            archive.addfile(label, io.BytesIO(file.parent.name.encode()))


@pytest.mark.usefixtures("data_of_each")
@pytest.mark.parametrize("path", SOURCES)
def test_a_class_path_of_a_config_names_the_same_source(
    path: str, before: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"data": {"source": {"class_path": path, "init_args": SOURCES[path]}}}
    (before / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["check", "-c", "config.yaml"]) in (0, 1)
    counted = "1797 images" if path.endswith("Digits") else "36 images" if "Folder" in path else "24 images"
    out = capsys.readouterr().out
    assert counted in out and "cannot be read" not in out


def test_class_paths_that_python_code_has_name_the_same_classes() -> None:
    for module, names in {
        "project.data.manifest": ("Manifest",),
        "project.data.published": ("HuggingFace", "Torchvision"),
        "project.data.shards": ("Shards",),
        "project.data.sources": ("Digits", "Encoded", "Files", "Folder"),
        "project.models.heads": ("CosineHead", "LinearHead", "MLPHead"),
    }.items():
        for name in names:
            assert isinstance(getattr(import_module(module), name), type), f"{module}.{name}"
