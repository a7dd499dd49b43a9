"""Several tasks at once: ``load([...])`` and ``predict`` with several checkpoints."""

import csv
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from project import load
from project.cli.main import main
from project.errors import CheckpointError
from project.inference.many_tasks import ManyTasks, task_names
from project.models.backbone import Backbone
from tests.conftest import SMALL, draw


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, trained: Path, weights: Path) -> Path:
    """A folder with the checkpoints of five fits; tone, deep and sharp have classes of their own.

    colours and tone have the same backbone and prefix; in deep, layer4 is trained; sharp has another image size.
    """
    folder = tmp_path_factory.mktemp("tasks")
    shutil.copytree(trained, folder / "runs/colours/version_0")
    for label, name in enumerate(("dark", "light")):
        for number in range(4):
            draw(folder / "tone" / name / f"{number}.png", (60 + 140 * label,) * 3, 10 * label + number)
    fits = {"tone": [], "deep": ["--model.trainable", "layer4"], "sharp": ["--model.image_size", "48"]}
    before = Path.cwd()
    os.chdir(folder)
    try:
        for name, flags in fits.items():
            fit = ["fit", *SMALL, "--model.weights", str(weights), "--data.root", "tone", "--name", name]
            assert main([*fit, "--trainer.max_epochs", "1", "--features.cache", "off", *flags]) == 0
    finally:
        os.chdir(before)
    return folder


def checkpoint(folder: Path, name: str, kind: str = "best") -> str:
    return str(folder / f"runs/{name}/version_0/checkpoints/{kind}.ckpt")


@pytest.fixture
def prefix_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[tuple[str, ...]]]:
    """Counts the calls of each frozen prefix."""
    calls: Counter[tuple[str, ...]] = Counter()
    prefix = Backbone._prefix

    def counted(self: Backbone, images: torch.Tensor, names: tuple[str, ...]) -> torch.Tensor:
        calls[names] += len(images) > 1  # not the black image that verifies an image size
        return prefix(self, images, names)

    monkeypatch.setattr(Backbone, "_prefix", counted)
    yield calls


def read(path: str) -> list[dict[str, str]]:
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def predict(photos: Path, *paths: str, output: str = "p.csv") -> list[str]:
    flags = [flag for path in paths for flag in ("--ckpt_path", path)]
    data = ["--data.predict", str(photos / "test"), "--data.num_workers", "0", "--data.batch_size", "5"]
    return ["predict", *flags, *data, "--output", output]


def test_shared_prefix_runs_once_per_batch_and_probabilities_are_those_of_each_alone(
    checkpoints: Path, photos: Path, prefix_calls: Counter[tuple[str, ...]]
) -> None:
    names = ["colours", "tone", "deep", "sharp"]
    paths = [checkpoint(checkpoints, name) for name in names]
    images = sorted((photos / "test").rglob("*.png"))
    tasks = load(paths)
    alone = [load(path) for path in paths]
    for item in (tasks, *alone):
        item.batch_size = 5
    expected = [classifier.predict_proba(images) for classifier in alone]
    prefix_calls.clear()
    together = tasks.predict_proba(images)
    whole = ("stem", "layer1", "layer2", "layer3", "layer4")
    # Three batches: colours and tone together, and sharp; deep has another prefix.
    assert prefix_calls == {whole: 2 * 3, whole[:-1]: 3}
    assert list(together) == tasks.names == names
    for name, probabilities in zip(names, expected, strict=True):
        assert np.array_equal(together[name], probabilities)
    assert tasks.predict(images)["colours"] == [path.parent.name for path in images]
    assert tasks.predict_proba([])["tone"].shape == (0, 2)


def test_loaded_classifiers_are_a_sequence(checkpoints: Path, photos: Path) -> None:
    tasks = load([checkpoint(checkpoints, "tone"), checkpoint(checkpoints, "colours")])
    tone, colours = tasks
    assert len(tasks) == 2 and tasks[-1] is colours and tasks[:1] == [tone]
    assert tone.classes_ == ["dark", "light"] and colours.predict([photos / "val/red/0.png"]) == ["red"]
    with pytest.raises(TypeError, match="several images: a list"):
        tasks.predict(photos / "val/red/0.png")


def test_predict_writes_the_columns_of_each_task(
    checkpoints: Path,
    photos: Path,
    here: Path,
    prefix_calls: Counter[tuple[str, ...]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = ["colours", "tone", "sharp"]
    paths = [checkpoint(checkpoints, name) for name in names]
    for name, path in zip(names, paths, strict=True):
        assert main(predict(photos, path, output=f"{name}.csv")) == 0
    prefix_calls.clear()
    capsys.readouterr()
    assert main([*predict(photos), *(f"--ckpt_path={path}" for path in paths)]) == 0
    assert "Tasks: 3; backbone runs per image: 2 (colours and tone; sharp)" in (capsys.readouterr().out)
    assert prefix_calls.total() == 2 * 2, "each of two groups tests its engine, and computes all images in one batch"
    rows, alone = read("p.csv"), {name: read(f"{name}.csv") for name in names}
    columns = ["predicted", "probability", "top2", "top2_probability", "top3", "top3_probability"]
    assert list(rows[0]) == ["path", *(f"{name}/{column}" for name in names for column in columns), "error"]
    assert list(alone["tone"][0]) == ["path", *columns, "error"]
    for number, row in enumerate(rows):
        for name in names:
            expected = alone[name][number]
            assert row["path"] == expected["path"]
            assert [row[f"{name}/{column}"] for column in columns] == [expected[column] for column in columns]


def test_unreadable_image_stops_or_is_recorded_as_with_one_checkpoint(
    checkpoints: Path, album: Path, refused: Callable[[int], str], capsys: pytest.CaptureFixture[str]
) -> None:
    (album / "test/red/0.png").write_text("no image")
    flags = predict(album, checkpoint(checkpoints, "colours"), checkpoint(checkpoints, "sharp"))
    assert "album/test/red/0.png" in refused(main([*flags, "--on_bad_image", "stop"]))
    assert not Path("p.csv").exists()
    assert main(flags) == 0
    assert "1 of which cannot be read" in capsys.readouterr().out
    rows = read("p.csv")
    assert [row["path"] for row in rows if row["error"]] == [str(album / "test/red/0.png")] and len(rows) == 12
    assert all(bool(row["colours/predicted"]) == bool(row["sharp/predicted"]) == (not row["error"]) for row in rows)


def test_names_get_as_much_of_the_path_as_necessary() -> None:
    run = "runs/{}/version_{}/checkpoints/{}.ckpt"
    paths = [
        run.format("a", 0, "best"),
        run.format("a", 1, "best"),
        run.format("a", 1, "last"),
        run.format("b", 0, "x"),
    ]
    assert task_names(paths) == ["a/version_0", "a/version_1/best", "a/version_1/last", "b"]
    assert task_names(["models/a.ckpt", "b.ckpt"]) == ["a", "b"]
    assert task_names(["x/a.ckpt", "y/a.ckpt", "b.ckpt"]) == ["x/a", "y/a", "b"]
    with pytest.raises(CheckpointError, match=r"a\.ckpt is given twice"):
        task_names(["a.ckpt", "x/../a.ckpt"])


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["{colours}", "{colours}"], "is given twice"),
        (["{colours}", "last"], "--ckpt_path last: of several checkpoints, each must be a file"),
        (["best", "{colours}"], "--ckpt_path best"),
        (["{colours}", "no.ckpt"], "There is no checkpoint no.ckpt"),
        (["{colours}", ""], "--ckpt_path is empty"),
        (["{colours}", "{tone}", "--model.image_size", "48"], "--model.image_size cannot be set for several"),
        (["{colours}", "{tone}", "--model.trainable=head"], "--model.trainable cannot be set for several"),
        (["{colours}", "{tone}", "--data.root", "x"], "--data.root cannot be set for several"),
    ],
)
def test_wrong_flags_with_several_checkpoints_are_refused(
    flags: list[str], text: str, checkpoints: Path, photos: Path, here: Path, refused: Callable[[int], str]
) -> None:
    known = {name: checkpoint(checkpoints, name) for name in ("colours", "tone")}
    first, second, *rest = [flag.format(**known) for flag in flags]
    assert text in refused(main([*predict(photos, first, second), *rest]))


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "demo"])
def test_only_predict_and_serve_take_several_checkpoints(
    verb: str, checkpoints: Path, here: Path, refused: Callable[[int], str]
) -> None:
    paths = ["--ckpt_path", checkpoint(checkpoints, "colours"), f"--ckpt_path={checkpoint(checkpoints, 'tone')}"]
    message = refused(main([verb, *paths]))
    assert f"--ckpt_path is given 2 times, but {verb} does not take several checkpoints" in message
    assert "only predict and serve do" in message


def test_moved_weights_apply_to_all_checkpoints(
    checkpoints: Path, weights: Path, photos: Path, here: Path, refused: Callable[[int], str]
) -> None:
    paths = [checkpoint(checkpoints, name) for name in ("colours", "tone")]
    shutil.copy(weights, "moved.pth")
    assert main([*predict(photos, *paths), "--model.weights", "moved.pth"]) == 0
    state = torch.load(weights, weights_only=True)
    state["bn1.running_var"][3] *= 1.001
    torch.save(state, "other.pth")
    message = refused(main([*predict(photos, *paths), "--model.weights", "other.pth"]))
    assert paths[0] in message and "The backbones differ" in message


def test_checkpoints_in_a_config_file(checkpoints: Path, photos: Path, here: Path) -> None:
    paths = [checkpoint(checkpoints, name) for name in ("colours", "tone")]
    Path("mine.yaml").write_text(f"ckpt_path: [{', '.join(paths)}]\n")
    assert main([*predict(photos), "-c", "mine.yaml"]) == 0
    assert "tone/predicted" in read("p.csv")[0]
    Path("mine.yaml").write_text(f"ckpt_path: [{paths[0]}]\n")
    assert main([*predict(photos), "-c", "mine.yaml"]) == 0
    assert "predicted" in read("p.csv")[0]


def test_rows_that_a_head_modifies_do_not_change_another_task(trained: Path, photos: Path) -> None:
    path = trained / "checkpoints/best.ckpt"
    first, second = load(path).model, load(path).model
    first.head = torch.nn.Sequential(torch.nn.Threshold(1e9, 0.0, inplace=True), first.head)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        _, together = ManyTasks(["a", "b"], [first, second])([images])
        assert torch.equal(together, second.task.probabilities(second(images)))
