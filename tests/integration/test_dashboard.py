"""A real TensorBoard serves everything that a fit logs, through the requests of its own pages."""

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

from tests.conftest import BACKBONE, COLOURS, scalars

Query = Callable[..., Any]
RUN = "version_0"
FIGURES = {
    *("train/input", "val/confusion_shares", "val/confusion_counts", "val/each_class", "val/reliability"),
    "val/least_confident",
}
RESULT_METRICS = ("best_accuracy", "best_f1", "best_loss", "best_ece", "last_accuracy", "seconds", "images_per_second")


def serve(folder: Path) -> Iterator[str]:
    """URL of a TensorBoard of a folder, on a free port of the loopback interface."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--host", "127.0.0.1"]
    command += ["--port", "0", "--load_fast", "false", "--reload_interval", "1"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        assert server.stderr is not None
        lines = []
        for line in server.stderr:
            lines.append(line)
            if match := re.search(r"http://127\.0\.0\.1:\d+", line):
                break
        else:
            pytest.fail("".join(lines))
        deadline = time.monotonic() + 60
        while RUN not in fetch(f"{match[0]}/data/runs").decode() and time.monotonic() < deadline:
            time.sleep(0.1)
        yield match[0]
    finally:
        server.terminate()
        server.wait(20)
        server.stderr.close()


def fetch(url: str, body: Any = None) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return bytes(response.read())


@pytest.fixture(scope="module")
def server(trained: Path) -> Iterator[str]:
    yield from serve(trained.parent)


@pytest.fixture(scope="module")
def query(server: str) -> Query:
    """Requests a resource of a plugin; returns parsed JSON, or bytes if ``raw``."""

    def get(plugin: str, resource: str, body: Any = None, raw: bool = False, **parameters: Any) -> Any:
        response = fetch(f"{server}/data/plugin/{plugin}/{resource}?{urllib.parse.urlencode(parameters)}", body)
        return response if raw else json.loads(response)

    return get


def test_all_plugins_are_active(server: str, query: Query) -> None:
    query("projector", "runs")  # listed only after this request
    deadline = time.monotonic() + 20
    expected = {"scalars", "custom_scalars", "images", "pr_curves", "hparams", "projector", "text"}
    while time.monotonic() < deadline:
        listed = json.loads(fetch(f"{server}/data/plugins_listing"))
        active = {name for name, plugin in listed.items() if plugin["enabled"]}
        if expected <= active:
            return
        time.sleep(0.2)
    pytest.fail(f"not active: {expected - active}")


def test_scalars_cover_training_validation_classes_and_machine(query: Query) -> None:
    tags = query("scalars", "tags")[RUN]
    expected = {"train/loss", "val/loss", "train/accuracy", "val/accuracy", "val/f1", "val/ece", "lr-AdamW/head"}
    expected |= {f"val/{score}_of/{name}" for score in ("precision", "recall", "f1") for name in COLOURS}
    expected |= {"train/images_per_second", "memory/process_peak_mb", "features/rows_reused", "features/rows_computed"}
    assert expected <= set(tags)
    memory = query("scalars", "scalars", run=RUN, tag="memory/process_peak_mb")
    assert len(memory) == 3 and all(50 < value < 100_000 for _, _, value in memory)


def test_charts_combine_train_and_val(query: Query) -> None:
    layout = query("custom_scalars", "layout")
    charts = {chart["title"]: chart["multiline"]["tag"] for group in layout["category"] for chart in group["chart"]}
    for title, tags in (("loss", {"train/loss", "val/loss"}), ("accuracy", {"train/accuracy", "val/accuracy"})):
        series = [query("custom_scalars", "scalars", run=RUN, tag=tag)["tag_to_events"] for tag in charts[title]]
        events_by_tag = {tag: events for item in series for tag, events in item.items()}
        assert set(events_by_tag) == tags
        assert all(len(events) == 3 for events in events_by_tag.values()), "one point per epoch"
    for title in charts:
        series = [query("custom_scalars", "scalars", run=RUN, tag=tag)["tag_to_events"] for tag in charts[title]]
        assert any(series), title


def test_figures_are_not_blank(query: Query) -> None:
    tags = set(query("images", "tags")[RUN])
    assert tags - {"val/mistakes_most_confident"} == FIGURES
    for tag in tags:
        (entry,) = query("images", "images", run=RUN, tag=tag, sample=0)
        content = query("images", "individualImage", raw=True, **dict(urllib.parse.parse_qsl(entry["query"])))
        image = Image.open(io.BytesIO(content))
        assert min(image.size) > 150
        assert np.asarray(image.convert("L")).std() > 5


def test_each_class_has_a_precision_recall_curve(query: Query) -> None:
    assert set(query("pr_curves", "tags")[RUN]) == {f"pr/{name}" for name in COLOURS}
    (curve,) = query("pr_curves", "pr_curves", run=RUN, tag="pr/red")[RUN]
    assert len(curve["precision"]) == len(curve["recall"]) > 50
    assert curve["true_positives"][0] == 4, "all positives are above the lowest threshold"


def test_hparams_have_the_result_metrics(query: Query, trained: Path) -> None:
    experiment = query("hparams", "experiment", body={})
    metrics = {info["name"]["tag"] for info in experiment["metricInfos"]}
    assert {f"result/{name}" for name in RESULT_METRICS} <= metrics
    assert "hp_metric" not in metrics
    columns = [{"metric": info["name"]} for info in experiment["metricInfos"]]
    body = {"startIndex": 0, "sliceSize": 10, "allowedStatuses": ["STATUS_SUCCESS"], "colParams": columns}
    (group,) = query("hparams", "session_groups", body=body)["sessionGroups"]
    assert group["hparams"]["backbone"] == BACKBONE and group["hparams"]["lr"] == 0.01
    assert group["hparams"]["optimizer"] == "AdamW(lr=0.01)"
    values = {value["name"]["tag"]: value["value"] for value in group["metricValues"]}
    assert set(values) == metrics, "every metric has a value"
    logged = [event.value for event in scalars(trained).Scalars("val/accuracy")]
    assert values["result/best_accuracy"] == max(logged) and values["result/last_accuracy"] == logged[-1]
    assert [session["name"] for session in group["sessions"]] == [RUN], "no additional run"


def test_projector_has_points_thumbnails_and_metadata(query: Query) -> None:
    assert query("projector", "runs") == [RUN]
    (points,) = query("projector", "info", run=RUN)["embeddings"]
    name = points["tensorName"]
    values = np.frombuffer(query("projector", "tensor", raw=True, run=RUN, name=name), np.float32)
    header, *rows = query("projector", "metadata", raw=True, run=RUN, name=name).decode().strip().split("\n")
    assert header.split("\t") == ["class", "predicted", "confidence", "right", "image"]
    assert len(rows) == 12 and len(values) % 12 == 0 and np.isfinite(values).all()
    shape = points["sprite"]["singleImageDim"]
    sprite = np.asarray(Image.open(io.BytesIO(query("projector", "sprite_image", raw=True, run=RUN, name=name))))
    columns = sprite.shape[1] // shape[0]
    for number, row in enumerate(rows):  # the thumbnail shows the class of its row
        top, left = number // columns * shape[1], number % columns * shape[0]
        mean = sprite[top : top + shape[1], left : left + shape[0], :3].mean((0, 1))
        assert mean.argmax() == np.argmax(COLOURS[row.split("\t")[0]]), row


def test_texts_describe_config_data_and_frozen_stages(query: Query) -> None:
    texts = {}
    for tag in query("text", "tags")[RUN]:
        texts[tag.removesuffix("/text_summary")] = query("text", "text", run=RUN, tag=tag)[-1]["text"]
    assert {"config", "data", "features", "frozen"} <= set(texts)
    assert f"backbone: {BACKBONE}" in texts["config"] and "<code" in texts["config"]
    assert "<td>blue</td>" in texts["data"].replace(' align="left"', "") and "48 images" in texts["data"]
