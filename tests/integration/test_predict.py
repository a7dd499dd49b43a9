"""``predict``: continues after a kill, computes with any engine, and writes predictions and features of any images."""

import csv
import errno
import io
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from project import load
from project.callbacks import prediction_writer
from project.callbacks.prediction_parts import PartFolder
from project.cli.main import main
from project.features import engine_selection, engines, provider
from tests.conftest import STORED, draw
from tests.forked import run_ranks, start

COUNT = 30


def small_batches() -> None:
    """Compute one batch at a time."""
    engines.ExactEngine.batch_size = 4


def small_parts() -> None:
    """Write a part for each batch."""
    small_batches()
    prediction_writer.PART_IMAGES = 1


@pytest.fixture
def new(run: Path) -> Path:
    """A folder of 30 images, the eighth of which cannot be read."""
    for number in range(COUNT):
        draw(Path(f"new/{number:02}.png"), [(40, 40, 200), (40, 200, 40), (200, 40, 40)][number % 3], 500 + number)
    Path("new/07.png").write_bytes(b"no image")
    return Path("new")


def command(*flags: str) -> list[str]:
    checkpoint = ["--ckpt_path", "runs/photos/version_0/checkpoints/best.ckpt"]
    data = ["--images", "new", "--data.batch_size", "4", "--data.num_workers", "0"]
    return ["predict", *checkpoint, *data, "--trainer.accelerator", "cpu", *flags]


def read(path: str = "predictions.csv") -> list[dict[str, str]]:
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def assert_predictions(rows: list[dict[str, str]], tolerance: float = 2e-6) -> None:
    """Every image once, in order, with the predictions of ``load``."""
    paths = [f"new/{number:02}.png" for number in range(COUNT)]
    assert [row["path"] for row in rows] == paths
    assert [row["path"] for row in rows if row["error"]] == ["new/07.png"]
    good = [row for row in rows if not row["error"]]
    model = load("runs/photos/version_0/checkpoints/best.ckpt")
    probabilities = model.predict_proba([row["path"] for row in good])
    assert [row["predicted"] for row in good] == model.names(probabilities)
    assert [float(row["probability"]) for row in good] == pytest.approx(probabilities.max(1).tolist(), abs=tolerance)


def test_killed_run_continues_and_predicts_every_image_once(new: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for reads in (15, 10):
        killed = start(Path().resolve(), command(), {"number": signal.SIGKILL, "reads": reads}, prepare=small_parts)
        assert killed.wait() == -signal.SIGKILL, killed.output
        assert not Path("predictions.csv").exists()
    assert len([*Path("predictions.csv.parts").glob("0*.csv")]) == 5  # three batches of four images, then two
    assert main(command()) == 0
    out = capsys.readouterr().out
    assert "Predictions: 20 of 30 are reused from an interrupted run in predictions.csv.parts" in out
    assert "Predictions: 30 images, 1 of which cannot be read (column error): predictions.csv" in out
    assert_predictions(read())
    assert not Path("predictions.csv.parts").exists()


def test_interrupted_run_keeps_all_of_its_predictions(new: Path) -> None:
    stopped = start(Path().resolve(), command(), {"number": signal.SIGTERM, "reads": 15}, prepare=small_batches)
    assert stopped.wait() == 128 + signal.SIGTERM, stopped.output
    assert "Run the same command again to continue" in stopped.output
    assert [path.name for path in Path("predictions.csv.parts").glob("0*.csv")] == ["000000000000-000000000012-1.csv"]
    resumed = start(Path().resolve(), command())
    assert resumed.wait() == 0 and "12 of 30 are reused" in resumed.output
    assert_predictions(read())


def test_two_processes_continue_the_run_of_one(new: Path) -> None:
    killed = start(Path().resolve(), command(), {"number": signal.SIGKILL, "reads": 15}, prepare=small_parts)
    assert killed.wait() == -signal.SIGKILL
    ranks = command("--trainer.devices", "2", "--trainer.strategy", "ddp")
    (code, output), (code_1, output_1) = run_ranks(Path().resolve(), ranks)
    assert (code, code_1) == (0, 0), output + output_1
    assert "12 of 30 are reused" in output and "Predictions:" not in output_1
    assert_predictions(read())


def test_parts_folder_local_to_each_node_is_refused(new: Path) -> None:
    nodes = [Path(f"node{number}").resolve() for number in range(2)]
    for node in nodes:
        node.mkdir()
    flags = [*command("--trainer.devices", "1", "--trainer.num_nodes", "2", "--trainer.strategy", "ddp")]
    environments = [
        {"HOME": str(node), "GROUP_RANK": str(number), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        for number, node in enumerate(nodes)
    ]
    ranks = run_ranks(Path().resolve(), [*flags, "--output", "~/p.csv"], environments)
    assert all(code != 0 for code, _ in ranks)
    assert "".join(output for _, output in ranks).count("Write to a folder that all nodes share") == 1


def test_another_command_with_the_same_output_is_refused(
    new: Path, refused: Callable[[int], str], capsys: pytest.CaptureFixture[str]
) -> None:
    killed = start(Path().resolve(), command(), {"number": signal.SIGKILL, "reads": 15}, prepare=small_parts)
    assert killed.wait() == -signal.SIGKILL
    last = ["--ckpt_path", "runs/photos/version_0/checkpoints/last.ckpt"]
    draw(Path("new/30.png"), (200, 40, 40), 30)
    assert "with other images." in refused(main(command()))
    Path("new/30.png").unlink()
    changed = [flag for flag in command() if flag != "--ckpt_path" and not flag.endswith(".ckpt")]
    assert "with other checkpoint." in refused(main([*changed, *last]))
    assert "with other settings." in refused(main(command("--on_bad_image", "stop")))
    assert "with other output." in refused(main(command("--output_features", "f.safetensors")))
    assert main(command("--output", "other.csv")) == 0
    assert main(command()) == 0
    assert "12 of 30 are reused" in capsys.readouterr().out
    assert [(row["path"], row["predicted"]) for row in read()] == [
        (row["path"], row["predicted"]) for row in read("other.csv")
    ]


def test_formats_have_the_same_predictions(new: Path) -> None:
    from pyarrow import parquet

    for suffix in ("csv", "jsonl", "parquet"):
        assert main(command("--output", f"p.{suffix}")) == 0
    lines = [json.loads(line) for line in Path("p.jsonl").read_text().splitlines()]
    assert parquet.read_table("p.parquet").to_pylist() == lines
    rows = read("p.csv")
    assert [row["predicted"] for row in rows] == [line["predicted"] or "" for line in lines]
    assert lines[7]["probability"] is None and "is not a readable image" in lines[7]["error"]
    assert [float(row["top2_probability"] or "nan") for row in rows] == pytest.approx(
        [line["top2_probability"] if not line["error"] else float("nan") for line in lines], nan_ok=True
    )


@pytest.mark.parametrize(
    ("flags", "tolerance"),
    [
        (["--features.engine", "onnxruntime"], 1e-5),
        (["--features.engine", "torch", "--features.precision", "bf16"], 2e-2),
        ([], 1e-5),
    ],
)
def test_engines_predict_like_load(
    flags: list[str],
    tolerance: float,
    new: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(provider, "FEW_IMAGES", 10)
    assert main(command(*flags, "--output_features", "f.safetensors")) == 0
    assert f"Features: {' '.join([*flags[1::2], 'fp32'][:2])}" in capsys.readouterr().out or not flags
    assert_predictions(read(), tolerance)
    features = load_file("f.safetensors")["features"]
    assert features.shape == (COUNT, 96) and np.isnan(features[7]).all()
    good = [number for number in range(COUNT) if number != 7]
    expected = load("runs/photos/version_0/checkpoints/best.ckpt").features([f"new/{number:02}.png" for number in good])
    np.testing.assert_allclose(features[good], expected, rtol=tolerance * 10, atol=tolerance * abs(expected).max() * 5)


def test_continued_run_uses_the_engine_of_the_interrupted_one(
    new: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], refused: Callable[[int], str]
) -> None:
    killed = start(Path().resolve(), command(), {"number": signal.SIGKILL, "reads": 15}, prepare=small_parts)
    assert killed.wait() == -signal.SIGKILL
    record = Path("predictions.csv.parts/engines.json")
    assert json.loads(record.read_text()) == ["torch fp32"]
    record.write_text('["onnxruntime fp32"]')
    message = "The earlier part was predicted with onnxruntime fp32. Now the network itself would predict, because"
    assert message in refused(main(command("--model.compile", "true")))
    assert main(command()) == 0
    assert "Features: onnxruntime fp32 (as in the earlier part)" in capsys.readouterr().out


def test_network_without_frozen_stages_predicts_itself(
    fit: Callable[..., int], photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit("--model.trainable", "all", "--features.cache", "off") == 0
    checkpoint = "runs/photos/version_0/checkpoints/last.ckpt"
    flags = ["--ckpt_path", checkpoint, "--images", str(photos / "test"), "--data.num_workers", "1"]
    assert main(["predict", *flags, "--data.batch_size", "5"]) == 0
    assert "Features: computed by the network itself, because no stage is frozen" in capsys.readouterr().out
    rows = read()
    expected = load(checkpoint).predict_proba([row["path"] for row in rows]).max(1)
    assert [float(row["probability"]) for row in rows] == pytest.approx(expected.tolist(), abs=2e-6)


@pytest.mark.parametrize("name", [os.fsdecode(b"caf\xe9.png"), "two\nlines.png"])
def test_any_file_name_on_standard_input(name: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(Path("a.png"), (200, 40, 40), 1).rename(name)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(os.fsencode(name) + b"\0missing.png\0")))
    assert main([*command("--images", "-", "--output", "p.jsonl")]) == 0
    found, missing = [json.loads(line) for line in Path("p.jsonl").read_text().splitlines()]
    assert (found["path"], found["predicted"], found["error"]) == (name, "red", None)
    assert "missing.png does not exist." in missing["error"]


def test_rows_that_a_fit_has_stored_are_reused(
    fit: Callable[..., int], photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(*STORED) == 0
    shutil.copytree(photos / "train", "mixed")
    for number in range(3):
        draw(Path(f"mixed/new{number}.png"), (200, 40, 40), 700 + number)
    count = len([*Path("mixed").rglob("*.png")])
    capsys.readouterr()
    flags = ["--images", "mixed", *STORED[2:], "--output_features", "features.safetensors"]
    assert main(command(*flags, "--features.folder", "store", "--output", "reused.csv")) == 0
    assert f"Features: {count - 3} rows reused from the store" in capsys.readouterr().out
    reused = load_file("features.safetensors")["features"]
    assert main(command(*flags, "--features.folder", "empty", "--output", "computed.csv")) == 0
    assert "reused" not in capsys.readouterr().out
    assert not [*Path("empty").glob("*/*.safetensors")]  # predict stores no rows
    np.testing.assert_allclose(reused, load_file("features.safetensors")["features"], atol=1e-5)
    disabled = ["--features.folder", "store", "--features.cache", "off"]
    assert main(command(*flags, *disabled, "--output", "disabled.csv")) == 0
    assert "reused" not in capsys.readouterr().out
    pairs = zip(read("reused.csv"), read("computed.csv"), strict=True)
    assert all((a["path"], a["predicted"]) == (b["path"], b["predicted"]) for a, b in pairs)


def test_the_engine_is_chosen_by_the_rows_that_are_missing(
    fit: Callable[..., int], photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fit(*STORED) == 0
    shutil.copytree(photos / "train", "mixed")
    for number in range(3):
        draw(Path(f"mixed/new{number}.png"), (200, 40, 40), 700 + number)
    Path("mixed/broken.png").write_bytes(b"")
    missing: dict[str, int] = {}
    choose = engine_selection.choose_for_prefix

    def record(prefix: Any, root: Any, options: Any, counts: Any, images: Any) -> Any:
        missing.update(zip(map(str, options), counts, strict=True))
        return choose(prefix, root, options, counts, images)

    monkeypatch.setattr(provider, "FEW_IMAGES", 10)
    monkeypatch.setattr(engine_selection, "choose_for_prefix", record)
    flags = command("--images", "mixed", "--features.folder", "store", "--trainer.accelerator", "cpu")
    assert main(flags) == 0
    assert missing.pop("torch fp32") == 4 and len(missing) > 0 and {*missing.values()} == {28}
    assert main([*flags, "--features.cache", "off", "--output", "all.csv"]) == 0
    assert missing["torch fp32"] == 28


def test_full_disk_leaves_no_folder(new: Path, refused: Callable[[int], str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PartFolder, "_write", full)
    assert "--output: predictions.csv cannot be written: No space left on device" in refused(main(command()))
    assert not Path("predictions.csv.parts").exists()


def test_exported_network_that_cannot_be_written_is_reported(new: Path, refused: Callable[[int], str]) -> None:
    Path("file").touch()
    message = refused(main(command("--features.engine", "onnxruntime", "--features.folder", "file")))
    assert "features.engine: the exported network cannot be written to file/networks: Not a directory." in message


def test_labeled_data_is_predicted_whole(run: Path, photos: Path) -> None:
    flags = ["--data.root", str(photos), "--data.num_workers", "0"]
    assert main(["predict", "--ckpt_path", str(run / "checkpoints/best.ckpt"), *flags]) == 0
    assert [row["path"] for row in read()][:1] == [str(photos / "train/blue/0.png")] and len(read()) == 48


def test_limit_is_a_number_of_batches(new: Path, refused: Callable[[int], str]) -> None:
    assert main(command("--trainer.limit_predict_batches", "2")) == 0
    assert [row["path"] for row in read()] == [f"new/{number:02}.png" for number in range(8)]
    assert "is a fraction" in refused(main(command("--trainer.limit_predict_batches", "0.5")))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "p.xlsx"], "--output must name a file that ends in .csv, .jsonl or .parquet, not 'p.xlsx'"),
        (["--output_features", "f.npy"], "--output_features must name a file that ends in .safetensors"),
        (
            ["--output_features", "predictions.csv.parts/f.safetensors"],
            "is in the folder of parts, which is removed at",
        ),
        (["--output_features", "new/00.png/f.safetensors"], "--output_features: new/00.png/f.safetensors cannot be w"),
        (["--output", f"{'a' * 300}.csv"], "a.csv cannot be written: File name too long."),
        (["--output_features", f"{'a' * 300}.safetensors"], "a.safetensors cannot be written: File name too long."),
        (["--data.predict", "new"], "--images and data.predict are both set; keep one"),
        (["--on_bad_image", "skip"], "on_bad_image"),
    ],
)
def test_wrong_flags_are_refused(flags: list[str], message: str, new: Path, refused: Callable[[int], str]) -> None:
    assert message in refused(main(command(*flags)))
    assert not Path("predictions.csv.parts").exists()
