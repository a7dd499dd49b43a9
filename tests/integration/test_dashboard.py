"""A real TensorBoard over a real run: everything that a fit logs is asked for as its pages ask for it."""

import io
import json
import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import COLOURS, scalars

Ask = Callable[..., Any]
RUN = "version_0"
FIGURES = {
    *("train/input", "val/confusion_shares", "val/confusion_counts", "val/each_class", "val/reliability"),
    "val/least_confident",
}
COMPARED = ("best_accuracy", "best_f1", "best_loss", "best_ece", "last_accuracy", "seconds", "images_per_second")


def serve(folder: Path) -> Iterator[str]:
    """The address of a TensorBoard over a folder, on loopback, on a port that it takes itself."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--host", "127.0.0.1"]
    command += ["--port", "0", "--load_fast", "false", "--reload_interval", "1"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        assert server.stderr is not None
        said = []
        for line in server.stderr:
            said.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                break
        else:
            pytest.fail("".join(said))
        until = time.monotonic() + 60
        while RUN not in fetch(f"{found[0]}/data/runs").decode() and time.monotonic() < until:
            time.sleep(0.1)
        yield found[0]
    finally:
        server.terminate()
        server.wait(20)
        server.stderr.close()


def fetch(address: str, body: Any = None) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return bytes(answer.read())


@pytest.fixture(scope="module")
def server(trained: Path) -> Iterator[str]:
    yield from serve(trained.parent)


@pytest.fixture(scope="module")
def ask(server: str) -> Ask:
    """Asks a plugin, with what follows the question mark; gives JSON, or bytes where ``raw``."""

    def get(plugin: str, what: str, body: Any = None, raw: bool = False, **query: Any) -> Any:
        address = f"{server}/data/plugin/{plugin}/{what}?{urllib.parse.urlencode(query)}"
        answer = fetch(address, body)
        return answer if raw else json.loads(answer)

    return get


def test_every_plugin_that_is_used_is_active(server: str, ask: Ask) -> None:
    ask("projector", "runs")  # this one is listed only once it has been asked
    until = time.monotonic() + 20
    used = {"scalars", "custom_scalars", "images", "pr_curves", "hparams", "projector", "text"}
    while time.monotonic() < until:
        listed = json.loads(fetch(f"{server}/data/plugins_listing"))
        active = {name for name, plugin in listed.items() if plugin["enabled"]}
        if used <= active:
            return
        time.sleep(0.2)
    pytest.fail(f"not active: {used - active}")


def test_scalars_of_training_validation_classes_and_machine(ask: Ask) -> None:
    tags = ask("scalars", "tags")[RUN]
    expected = {"train/loss", "val/loss", "train/accuracy", "val/accuracy", "val/f1", "val/ece", "lr-AdamW/head"}
    expected |= {f"val/{score}_of/{name}" for score in ("precision", "recall", "f1") for name in COLOURS}
    expected |= {"train/images_per_second", "memory/process_peak_mb", "features/rows_reused", "features/rows_computed"}
    assert expected <= set(tags)
    memory = ask("scalars", "scalars", run=RUN, tag="memory/process_peak_mb")
    assert len(memory) == 3 and all(50 < value < 100_000 for _, _, value in memory)


def test_charts_have_train_and_val_together(ask: Ask) -> None:
    layout = ask("custom_scalars", "layout")
    charts = {chart["title"]: chart["multiline"]["tag"] for group in layout["category"] for chart in group["chart"]}
    for title, tags in (("loss", {"train/loss", "val/loss"}), ("accuracy", {"train/accuracy", "val/accuracy"})):
        found = [ask("custom_scalars", "scalars", run=RUN, tag=tag)["tag_to_events"] for tag in charts[title]]
        drawn = {tag: events for one in found for tag, events in one.items()}
        assert set(drawn) == tags
        assert all(len(events) == 3 for events in drawn.values()), "a point an epoch"
    for title in charts:  # but for metrics that three classes do not have, none is empty
        found = [ask("custom_scalars", "scalars", run=RUN, tag=tag)["tag_to_events"] for tag in charts[title]]
        assert any(found), title


def test_figures_are_images(ask: Ask) -> None:
    tags = set(ask("images", "tags")[RUN])
    assert tags - {"val/mistakes_most_confident"} == FIGURES
    for tag in tags:
        (entry,) = ask("images", "images", run=RUN, tag=tag, sample=0)
        content = ask("images", "individualImage", raw=True, **dict(urllib.parse.parse_qsl(entry["query"])))
        picture = Image.open(io.BytesIO(content))
        assert min(picture.size) > 150
        assert np.asarray(picture.convert("L")).std() > 5, "it is not blank"


def test_precision_recall_curves_of_each_class(ask: Ask) -> None:
    assert set(ask("pr_curves", "tags")[RUN]) == {f"pr/{name}" for name in COLOURS}
    (curve,) = ask("pr_curves", "pr_curves", run=RUN, tag="pr/red")[RUN]
    assert len(curve["precision"]) == len(curve["recall"]) > 50
    assert curve["true_positives"][0] == 4, "all images of the class are above the lowest threshold"


def test_hparams_have_the_final_metrics(ask: Ask, trained: Path) -> None:
    experiment = ask("hparams", "experiment", body={})
    metrics = {info["name"]["tag"] for info in experiment["metricInfos"]}
    assert {f"result/{name}" for name in COMPARED} <= metrics
    assert "hp_metric" not in metrics
    columns = [{"metric": info["name"]} for info in experiment["metricInfos"]]
    body = {"startIndex": 0, "sliceSize": 10, "allowedStatuses": ["STATUS_SUCCESS"], "colParams": columns}
    (group,) = ask("hparams", "session_groups", body=body)["sessionGroups"]
    assert group["hparams"]["backbone"] == "resnet18" and group["hparams"]["lr"] == 0.01
    assert group["hparams"]["optimizer"] == "AdamW(lr=0.01)"
    values = {value["name"]["tag"]: value["value"] for value in group["metricValues"]}
    assert set(values) == metrics, "none is empty"
    logged = [event.value for event in scalars(trained).Scalars("val/accuracy")]
    assert values["result/best_accuracy"] == max(logged) and values["result/last_accuracy"] == logged[-1]
    assert [session["name"] for session in group["sessions"]] == [RUN], "and no run of its own beside it"


def test_projector_has_points_thumbnails_and_metadata(ask: Ask) -> None:
    assert ask("projector", "runs") == [RUN]
    (points,) = ask("projector", "info", run=RUN)["embeddings"]
    name = points["tensorName"]
    values = np.frombuffer(ask("projector", "tensor", raw=True, run=RUN, name=name), np.float32)
    header, *rows = ask("projector", "metadata", raw=True, run=RUN, name=name).decode().strip().split("\n")
    assert header.split("\t") == ["class", "predicted", "confidence", "right", "image"]
    assert len(rows) == 12 and len(values) % 12 == 0 and np.isfinite(values).all()
    shape = points["sprite"]["singleImageDim"]
    sprite = np.asarray(Image.open(io.BytesIO(ask("projector", "sprite_image", raw=True, run=RUN, name=name))))
    columns = sprite.shape[1] // shape[0]
    for number, row in enumerate(rows):  # each thumbnail is of the row's own class
        top, left = number // columns * shape[1], number % columns * shape[0]
        mean = sprite[top : top + shape[1], left : left + shape[0], :3].mean((0, 1))
        assert mean.argmax() == np.argmax(COLOURS[row.split("\t")[0]]), row


def test_texts_tell_the_config_the_data_and_what_is_frozen(ask: Ask) -> None:
    texts = {}
    for tag in ask("text", "tags")[RUN]:
        texts[tag.removesuffix("/text_summary")] = ask("text", "text", run=RUN, tag=tag)[-1]["text"]
    assert {"config", "data", "features", "frozen"} <= set(texts)
    assert "backbone: resnet18" in texts["config"] and "<code" in texts["config"]
    assert "<td>blue</td>" in texts["data"].replace(' align="left"', "") and "48 images" in texts["data"]
