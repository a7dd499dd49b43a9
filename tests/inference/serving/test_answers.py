"""Answers over real connections: those of ``load``, from any engine, for several tasks."""

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

from project import load
from project.errors import ConfigError
from project.features.provider import RowProvider
from project.inference.many_tasks import ManyTasks
from project.inference.serving.app import Prediction
from project.inference.serving.served_model import ServedModel, select_engines, set_policies
from project.inference.serving.service import Batching
from tests.benchmarks.load_client import form, raw
from tests.inference.serving.running_server import GatedModel, Server, serving, wait_for

ANSWERS = {"coverage": 0.6, "max_error": 0.5, "false_alarms": 0.5}


@pytest.mark.parametrize("make", [form, raw])
def test_answer_equals_load_on_the_same_bytes(
    make: Callable[[bytes], bytes], server: Server, checkpoint: Path, photos: Path
) -> None:
    classifier = load(checkpoint)
    for path in sorted(photos.glob("test/*/0.png")):
        status, answer = server.send(make(path.read_bytes()))
        (expected,) = classifier.predict_proba([path.read_bytes()])
        assert status == 200
        assert answer["class"] == classifier.predict([path])[0] == answer["top"][0]["class"]
        assert answer["probability"] == pytest.approx(expected.max(), abs=1e-6)
        probabilities = {item["class"]: item["probability"] for item in answer["top"]}
        assert probabilities == pytest.approx(dict(zip(classifier.classes_, expected.tolist(), strict=True)), abs=1e-6)
        assert set(answer) == {"class", "probability", "top"}
        Prediction.model_validate(answer)


def test_other_kinds_of_images_are_decoded_as_load_decodes_them(server: Server, checkpoint: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    noise = torch.randint(0, 256, (400, 300, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    for kind, image in {"JPEG": Image.fromarray(noise), "PNG": Image.fromarray(noise[..., 0]).convert("I;16")}.items():
        file = io.BytesIO()
        image.save(file, kind, **({"exif": exif} if kind == "JPEG" else {}))
        status, answer = server.send(raw(file.getvalue()))
        (expected,) = load(checkpoint).predict_proba([file.getvalue()])
        assert status == 200 and answer["probability"] == pytest.approx(expected.max(), abs=1e-6)


def test_calibrated_answers_equal_those_of_load(checkpoint: Path, photos: Path) -> None:
    def load_model() -> ServedModel:
        tasks = ManyTasks.load([checkpoint])
        set_policies(tasks, ANSWERS)
        return ServedModel(tasks, [None])

    paths = sorted(photos.glob("test/*/1.png"))
    with serving(load_model) as server:
        answers = [server.send(form(path.read_bytes()))[1] for path in paths]
    for answer, expected in zip(answers, load(checkpoint).answer(paths, **ANSWERS), strict=True):
        assert answer["class"] == expected.label and answer["set"] == expected.classes
        assert (answer["known"], answer["answered"]) == (expected.known, expected.answered)
        assert answer["calibrated_probability"] == pytest.approx(expected.probability, abs=1e-6)
        Prediction.model_validate(answer)


def test_limit_of_answers_that_a_checkpoint_does_not_permit_names_the_flag(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"^Task photos: --coverage.*"):
        set_policies(ManyTasks.load([checkpoint]), {"coverage": 0.9999, "max_error": None, "false_alarms": None})


def test_several_tasks_are_answered_by_name(checkpoint: Path, trained: Path, photo: bytes) -> None:
    paths = [checkpoint, trained / "checkpoints/last.ckpt"]
    tasks = load(paths)
    with serving(lambda: ServedModel(ManyTasks.load(paths), [None]), tasks.names) as server:
        status, answer = server.send(raw(photo))
        assert status == 200 and list(answer) == tasks.names and len(tasks.names) == 2
        for name, probabilities in tasks.predict_proba([photo]).items():
            assert answer[name]["probability"] == pytest.approx(probabilities.max(), abs=1e-6)
        schema = server.request("/openapi.json")[1]["components"]["schemas"]["Predictions"]
        assert list(schema["properties"]) == tasks.names


def test_engine_of_the_store_gives_the_same_answers(checkpoint: Path, photo: bytes, tmp_path: Path) -> None:
    provider = RowProvider("onnxruntime", "fp32", 1.0, tmp_path)
    tasks = ManyTasks.load([checkpoint])
    engines, reasons = select_engines(tasks, provider, "32-true")
    model = ServedModel(tasks, engines)
    assert reasons[0].startswith("onnxruntime fp32") and model.single_threaded and model.batch_size == 8
    (answer,) = model.answer([model.prepare(photo)])
    (expected,) = load(checkpoint).predict_proba([photo])
    assert answer["photos"]["probability"] == pytest.approx(expected.max(), abs=1e-4)
    model.warm_up()


def test_torch_engine_is_the_model_itself(checkpoint: Path, photo: bytes, tmp_path: Path) -> None:
    tasks = ManyTasks.load([checkpoint])
    engines, _ = select_engines(tasks, RowProvider("torch", "fp32", 1.0, tmp_path), "32-true")
    assert engines == [None]


def test_auto_measures_all_engines_but_the_compiler(checkpoint: Path, tmp_path: Path) -> None:
    _, (reason,) = select_engines(ManyTasks.load([checkpoint]), RowProvider("auto", "fp32", 1.0, tmp_path), "32-true")
    assert "torch fp32" in reason and "onnxruntime fp32" in reason and "compile" not in reason


def test_int8_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"features\.precision int8 needs training images"):
        select_engines(ManyTasks.load([checkpoint]), RowProvider("auto", "int8", 1.0, tmp_path), "32-true")


def test_concurrent_requests_are_computed_together(gated: GatedModel, photo: bytes) -> None:
    with serving(lambda: gated, batching=Batching(size=4, wait=0)) as server, ThreadPoolExecutor(9) as pool:
        first = pool.submit(server.send, raw(photo))
        assert gated.entered.wait(20)
        others = [pool.submit(server.send, raw(photo)) for _ in range(8)]
        wait_for(lambda: len(server.service._batcher._waiting) == 8)  # type: ignore[union-attr]
        gated.gate.set()
        answers = [future.result(20) for future in (first, *others)]
        assert gated.batches == [1, 4, 4]
        assert server.metric("serve_batch_images_count") == 3 and server.metric("serve_batch_images_sum") == 9
    assert {status for status, _ in answers} == {200}
    assert len({answer["class"] for _, answer in answers}) == 1
