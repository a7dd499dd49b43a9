"""The command ``export`` and its files."""

import contextlib
import functools
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from project import load
from project.cli.main import main
from project.evaluation.answers.temperature import scaled
from project.evaluation.answers.unknown_images import distances
from project.inference import export_formats
from project.inference.export import compare
from project.inference.export_formats import FORMATS, SplitOnnxFormat
from project.inference.exported_network import TemperatureScaling
from project.task import SingleLabel
from tests.conftest import COLOURS, draw


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, str]]:
    """The file of a format, which is exported once, and what the command has printed."""

    @functools.cache
    def export(suffix: str) -> tuple[Path, str]:
        file, output = tmp_path_factory.mktemp("exported") / f"new/model{suffix}", io.StringIO()
        with contextlib.redirect_stdout(output):
            assert main(["export", "--ckpt_path", str(trained / "checkpoints/best.ckpt"), "--output", str(file)]) == 0
        return file, output.getvalue()

    return export


@pytest.mark.parametrize("suffix", FORMATS)
def test_exported_file_gives_the_probabilities_of_load(
    suffix: str, trained: Path, photos: Path, exported: Callable[[str], tuple[Path, str]]
) -> None:
    file, output = exported(suffix)
    assert "on 12 images, the same class as load on 12" in output
    run, classifier = FORMATS[suffix].runner([file]), load(trained / "checkpoints/best.ckpt")
    images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in sorted(photos.glob("test/*/*.png"))])
    for batch in (images, images[:1], images[:, :24, :30]):
        np.testing.assert_allclose(run(batch)["probabilities"], classifier.predict_proba(batch), atol=1e-4)


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
    np.testing.assert_allclose(run(images)["probabilities"], load(checkpoint).predict_proba(images), atol=1e-4)


def test_int8_file_reports_accuracy_and_speed(
    trained: Path, photos: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = trained / "checkpoints/best.ckpt"
    assert main(["export", "--ckpt_path", str(checkpoint), "--int8", "true", "--output", "int8.onnx"]) == 0
    output = capsys.readouterr().out
    images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in sorted(photos.glob("test/*/*.png"))])
    labels = np.repeat([0, 1, 2], 4)
    probabilities = FORMATS[".onnx"].runner([Path("int8.onnx")])(images)["probabilities"]
    expected = load(checkpoint).predict_proba(images)
    assert 0 < np.abs(probabilities - expected).max() < 0.1  # quantized, and close
    accuracies = [(values.argmax(1) == labels).mean() for values in (probabilities, expected)]
    assert f"accuracy {accuracies[0]:.4f} in int8 and {accuracies[1]:.4f} in float32" in output
    assert re.search(r"points \(95 % interval .* paired\); \d+\.\d x as fast", output)


def test_onnx_file_contains_the_classes_and_no_path_of_this_machine(
    trained: Path, exported: Callable[[str], tuple[Path, str]]
) -> None:
    import onnx

    file, _ = exported(".onnx")
    properties = {item.key: json.loads(item.value) for item in onnx.load(file).metadata_props}
    assert properties["classes"] == ["blue", "green", "red"]
    assert properties["preprocessing"]["crop"] == 32
    assert properties["backbone"]["sha256"] == load(trained / "checkpoints/best.ckpt").model.backbone.sha256
    assert b"site-packages" not in file.read_bytes()
    assert str(Path(__file__).parents[2]).encode() not in file.read_bytes()


def picture(size: tuple[int, int], seed: int) -> Image.Image:
    """Noise that is smooth enough for a resize to keep details, of a height and width."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size[::-1], Image.Resampling.BICUBIC)


def shifted(outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: values + 0.01 for name, values in outputs.items()}


def test_file_that_differs_from_the_classifier_is_deleted(
    trained: Path, here: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[[int], str]
) -> None:
    (here / "m.onnx").write_bytes(b"old")
    runner = export_formats.OnnxFormat.runner
    monkeypatch.setattr(
        export_formats.OnnxFormat, "runner", lambda self, files: lambda images: shifted(runner(self, files)(images))
    )
    code = main(["export", "--ckpt_path", str(trained / "checkpoints/best.ckpt"), "--output", "m.onnx"])
    assert re.search(r"differ by up to 1\.\de-02, more than 1e-03", refused(code))
    assert [path.name for path in here.iterdir()] == ["m.onnx"] and (here / "m.onnx").read_bytes() == b"old"


def test_file_that_outputs_nan_is_deleted(
    trained: Path, here: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[[int], str]
) -> None:
    outputs = {"probabilities": np.full((1, 3), np.nan)}
    monkeypatch.setattr(export_formats.OnnxFormat, "runner", lambda self, files: lambda images: outputs)
    code = main(["export", "--ckpt_path", str(trained / "checkpoints/best.ckpt"), "--output", "m.onnx"])
    assert "the probabilities of the file differ by up to nan" in refused(code)
    assert not [*here.iterdir()]


@pytest.mark.parametrize("suffix", FORMATS)
def test_small_images_have_the_probabilities_of_load(
    suffix: str, trained: Path, exported: Callable[[str], tuple[Path, str]]
) -> None:
    images = [picture(size, seed) for seed in range(3) for size in ((8, 8), (1, 1), (5, 400))]
    file, _ = exported(suffix)
    comparison = compare(FORMATS[suffix].runner([file]), load(trained / "checkpoints/best.ckpt"), images)
    assert (comparison.images, comparison.same) == (9, 9) and comparison.largest["probabilities"] < 1e-4


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


def test_int8_needs_images_that_did_not_calibrate_it(
    trained: Path, photos: Path, here: Path, refused: Callable[[int], str]
) -> None:
    shutil.copytree(photos / "train", here / "single/train")
    flags = ["--ckpt_path", str(trained / "checkpoints/best.ckpt"), "--int8", "true", "--output", "m.onnx"]
    message = refused(main(["export", *flags, "--data.root", "single", "--data.val_fraction", "0"]))
    assert "calibrates on the images of one split and compares on another, but single has only train" in message
    assert not Path("m.onnx").exists()


def test_export_needs_a_checkpoint(here: Path, refused: Callable[[int], str]) -> None:
    assert "export needs a trained model" in refused(main(["export"]))


def run_example(model: Path, *images: Path) -> str:
    """Run ``docs/run_onnx.py`` in a process that cannot import torch or this project."""
    example = Path(__file__).parents[2] / "docs/run_onnx.py"
    without = "import sys; sys.modules.update(torch=None, project=None); sys.argv[0] = 'run_onnx.py'\n"
    command = [sys.executable, "-c", without + example.read_text(), str(model), *map(str, images)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def test_exported_network_runs_without_this_project(
    trained: Path, photos: Path, here: Path, exported: Callable[[str], tuple[Path, str]]
) -> None:
    checkpoint, (file, _) = trained / "checkpoints/best.ckpt", exported(".onnx")
    image, transparent = next(photos.glob("test/red/*.png")), here / "transparent.png"
    with Image.open(image) as opaque:
        opaque.putalpha(Image.linear_gradient("L").resize(opaque.size))
        opaque.save(transparent)
    images = [image, transparent]
    found = [line.split() for line in run_example(file, *images).splitlines() if line[0] != " "]
    expected = load(checkpoint).predict_proba(images).max(1)
    assert [float(probability) for *_, probability in found] == pytest.approx(expected.tolist(), abs=1e-3)
    assert found[0][1] == "red" and expected[1] < expected[0] - 0.01


def test_example_gives_the_answers_of_load(calibrated: Path, here: Path) -> None:
    checkpoint = torch.load(calibrated, weights_only=True)
    answers = checkpoint["answers"]
    answers["true_scores"] = torch.linspace(-1, 0.999, len(answers["true_scores"]))  # as if the task were hard
    answers["temperature"] = 1.7
    torch.save(checkpoint, "hard.ckpt")
    output = ["--output", "model.onnx", "--data.root", str(calibrated.parent / "photos")]
    assert main(["export", "--ckpt_path", "hard.ckpt", *output]) == 0
    colours = [*COLOURS.values(), (250, 250, 250), (120, 120, 40), (90, 40, 120), (40, 120, 120), (110, 110, 110)]
    images = [draw(here / f"new/{number}.png", colour, 5000 + number) for number, colour in enumerate(colours)]
    printed = re.findall(r"^(?!  ).*\n((?:  .*\n)+)", run_example(Path("model.onnx"), *images), re.MULTILINE)
    assert len(printed) == len(images)
    classifier, limits = load("hard.ckpt"), load("hard.ckpt").model.answers.reported_limits()
    assert limits.coverages == [0.9, 0.95, 0.99] and limits.max_errors and limits.false_alarms == [0.01, 0.05]
    seen = set()
    for image, lines in zip(images, printed, strict=True):
        values = dict(line.strip().split(": ") for line in lines.splitlines())
        (plain,) = classifier.answer([image])
        assert float(values.pop("calibrated probability")) == pytest.approx(plain.probability, abs=2e-4)
        expected = {}
        for coverage in limits.coverages:
            (answer,) = classifier.answer([image], coverage=coverage)
            expected[f"set for coverage {coverage}"] = " | ".join(answer.classes)
        for error in limits.max_errors:
            (answer,) = classifier.answer([image], max_error=error)
            expected[f"answered for error {error}"] = str(answer.answered)
        for rate in limits.false_alarms:
            (answer,) = classifier.answer([image], false_alarms=rate)
            expected[f"known for {rate} false alarms"] = str(answer.known)
        assert values == expected
        seen |= {(key.split()[0], value) for key, value in expected.items()}
    # Both answers occur, and sets of several sizes: the comparison is not trivial.
    assert {("answered", "True"), ("answered", "False"), ("known", "True"), ("known", "False")} <= seen
    assert len({value.count("|") for key, value in seen if key == "set"}) > 1


@pytest.mark.parametrize("flags", [["--output", "m.pt2"], ["--output", "m.onnx", "--split", "true"]])
def test_every_format_contains_calibrated_probabilities_and_distances(
    flags: list[str], calibrated: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data.root", str(calibrated.parent / "photos")]
    assert main(["export", "--ckpt_path", str(calibrated), *flags, *data]) == 0
    output = capsys.readouterr().out
    for name in ("calibrated probabilities", "distances"):
        assert f"and {name} that differ by at most" in output
    assert "with calibrated answers" in output
    image = np.array(Image.open(next((calibrated.parent / "photos/val").glob("*/*.png"))))[None]
    classifier = load(calibrated)
    expected = {
        "probabilities": classifier.predict_proba(image),
        "calibrated_probabilities": classifier.predict_proba(image, calibrated=True),
        "distances": distances(classifier.features(image), classifier.model.answers.rows),
    }
    files, runner = (Path("m.pt2"),), FORMATS[".pt2"].runner
    if "--split" in flags:
        files, runner = (Path("m.backbone.onnx"), Path("m.head.onnx")), SplitOnnxFormat().runner
        assert files[1].stat().st_size < 100_000
    outputs = runner(files)(image)
    assert outputs.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(outputs[name], values, atol=1e-4, err_msg=name)
    assert np.abs(outputs["calibrated_probabilities"] - outputs["probabilities"]).max() > 1e-3


@pytest.mark.parametrize("temperature", [0.05, 1.7, 20.0])
def test_temperature_in_the_file_is_that_of_calibrated_answers(temperature: float) -> None:
    logits = torch.randn(200, 5, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 2.5, 200)[:, None]
    probabilities = logits.softmax(1)
    assert (probabilities == 0).any() and (probabilities > 0.999).any()
    expected = scaled(probabilities.numpy(), temperature)
    np.testing.assert_allclose(TemperatureScaling(SingleLabel(), temperature)(probabilities), expected, atol=2e-5)


def test_int8_file_has_no_answers(calibrated: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import onnx

    flags = ["--int8", "true", "--output", "m.onnx", "--data.root", str(calibrated.parent / "photos")]
    assert main(["export", "--ckpt_path", str(calibrated), *flags]) == 0
    assert "without calibrated answers, which hold for float32 only" in capsys.readouterr().out
    model = onnx.load("m.onnx")
    assert [output.name for output in model.graph.output] == ["probabilities"]
    assert "answers" not in {item.key for item in model.metadata_props}


def test_openvino_gives_the_probabilities_of_load(trained: Path, photos: Path, here: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="openvino is not installed: pip install openvino")
    checkpoint = trained / "checkpoints/best.ckpt"
    assert main(["export", "--ckpt_path", str(checkpoint), "--output", "model.onnx"]) == 0
    images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in sorted(photos.glob("test/*/*.png"))])
    compiled = openvino.Core().compile_model("model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for batch in (images, images[:1], images[:, :24, :30]):
        np.testing.assert_allclose(compiled(batch)["probabilities"], load(checkpoint).predict_proba(batch), atol=5e-3)
