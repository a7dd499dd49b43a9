"""The command ``export`` and its files."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from project import load
from project.cli.main import main
from project.inference import export_formats
from project.inference.export_formats import FORMATS, SplitOnnxFormat


@pytest.mark.parametrize("suffix", FORMATS)
def test_exported_file_gives_the_probabilities_of_load(
    suffix: str, trained: Path, photos: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = trained / "checkpoints/best.ckpt"
    assert main(["export", "--ckpt_path", str(checkpoint), "--output", f"out/model{suffix}"]) == 0
    assert "on 12 images, the same class as load on 12" in capsys.readouterr().out
    run, classifier = FORMATS[suffix].runner([Path(f"out/model{suffix}")]), load(checkpoint)
    images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in sorted(photos.glob("test/*/*.png"))])
    for batch in (images, images[:1], images[:, :24, :30]):
        np.testing.assert_allclose(run(batch), classifier.predict_proba(batch), atol=1e-4)


@pytest.mark.parametrize("flags", [[], ["--model.trainable", "layer3"], ["--model.trainable", "all"]])
def test_split_files_give_the_probabilities_of_load(
    flags: list[str], fit: Callable[..., int], photos: Path, here: Path
) -> None:
    assert fit(*flags) == 0
    checkpoint = "runs/photos/version_0/checkpoints/last.ckpt"
    assert main(["export", "--ckpt_path", checkpoint, "--split", "true", "--output", "model.onnx"]) == 0
    files = [Path("model.backbone.onnx"), Path("model.head.onnx")]
    if not flags:
        assert files[1].stat().st_size < 10_000
    images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in sorted(photos.glob("test/*/*.png"))])
    run = SplitOnnxFormat().runner(files)
    np.testing.assert_allclose(run(images), load(checkpoint).predict_proba(images), atol=1e-4)


def test_int8_file_reports_accuracy_and_speed(
    trained: Path, photos: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = trained / "checkpoints/best.ckpt"
    assert main(["export", "--ckpt_path", str(checkpoint), "--int8", "true", "--output", "int8.onnx"]) == 0
    output = capsys.readouterr().out
    images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in sorted(photos.glob("test/*/*.png"))])
    labels = np.repeat([0, 1, 2], 4)
    probabilities = FORMATS[".onnx"].runner([Path("int8.onnx")])(images)
    expected = load(checkpoint).predict_proba(images)
    assert 0 < np.abs(probabilities - expected).max() < 0.1  # quantized, and close
    accuracies = [(values.argmax(1) == labels).mean() for values in (probabilities, expected)]
    assert f"accuracy {accuracies[0]:.4f} in int8 and {accuracies[1]:.4f} in float32" in output
    assert re.search(r"points \(95 % interval .* paired\); \d+\.\d x as fast", output)


def test_onnx_file_contains_the_classes_and_no_path_of_this_machine(trained: Path, here: Path) -> None:
    import onnx

    assert main(["export", "--ckpt_path", str(trained / "checkpoints/best.ckpt"), "--output", "m.onnx"]) == 0
    properties = {item.key: json.loads(item.value) for item in onnx.load("m.onnx").metadata_props}
    assert properties["classes"] == ["blue", "green", "red"]
    assert properties["preprocessing"]["crop"] == 32
    assert properties["backbone"]["sha256"] == load(trained / "checkpoints/best.ckpt").model.backbone.sha256
    assert b"site-packages" not in Path("m.onnx").read_bytes()
    assert str(Path(__file__).parents[2]).encode() not in Path("m.onnx").read_bytes()


def test_file_that_differs_from_the_classifier_is_deleted(
    trained: Path, here: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[[int], str]
) -> None:
    (here / "m.onnx").write_bytes(b"old")
    runner = export_formats.OnnxFormat.runner
    monkeypatch.setattr(
        export_formats.OnnxFormat, "runner", lambda self, files: lambda images: runner(self, files)(images) + 0.01
    )
    code = main(["export", "--ckpt_path", str(trained / "checkpoints/best.ckpt"), "--output", "m.onnx"])
    assert re.search(r"differ by up to 1\.\de-02, more than 1e-03", refused(code))
    assert [path.name for path in here.iterdir()] == ["m.onnx"] and (here / "m.onnx").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "model.tflite"], "must name a file that ends in .onnx or .pt2"),
        (["--images", "0"], "--images must be at least 1"),
        (["--int8", "true", "--split", "true"], "--int8 writes a single ONNX file"),
        (["--output", "m.pt2", "--split", "true"], "--split writes ONNX files, not .pt2. Use --output m.onnx"),
    ],
)
def test_wrong_flags_are_refused(
    flags: list[str], message: str, trained: Path, here: Path, refused: Callable[[int], str]
) -> None:
    assert message in refused(main(["export", "--ckpt_path", str(trained / "checkpoints/best.ckpt"), *flags]))


def test_export_needs_a_checkpoint(here: Path, refused: Callable[[int], str]) -> None:
    assert "export needs a trained model" in refused(main(["export"]))


def test_exported_network_runs_without_this_project(trained: Path, photos: Path, here: Path) -> None:
    checkpoint = trained / "checkpoints/best.ckpt"
    assert main(["export", "--ckpt_path", str(checkpoint), "--output", "model.onnx"]) == 0
    image = next(photos.glob("test/red/*.png"))
    example = Path(__file__).parents[2] / "docs/run_onnx.py"
    without = "import sys; sys.modules.update(torch=None, project=None); sys.argv[0] = 'run_onnx.py'\n"
    command = [sys.executable, "-c", without + example.read_text(), "model.onnx", str(image)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    name, probability = result.stdout.split()[-2:]
    assert name == "red" and float(probability) == pytest.approx(
        load(checkpoint).predict_proba([image]).max(), abs=1e-3
    )
