"""Checkpoints on the Hugging Face Hub, against a local stub of its API."""

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest

from project import load
from project.callbacks.prediction_writer import _checkpoint_sha256 as checkpoint_sha256
from project.checkpoints.hub import Address, from_files, to_files
from project.checkpoints.reader import read_checkpoint
from project.classifier import ImageClassifier
from project.cli.main import main
from project.errors import CheckpointError, ConfigError
from tests.conftest import BACKBONE

COMMIT = "a" * 40


class StubHub(ThreadingHTTPServer):
    """Stores the files of one commit for each repository.

    Attributes:
        repositories: Contents by path, for each repository.
        created: Requests to create a repository.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.created: list[dict[str, object]] = []


class Handler(BaseHTTPRequestHandler):
    """The endpoints that push and download use."""

    server: StubHub

    def answer(self, body: bytes = b"", status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"] or 0))
        parts = self.path.split("/")
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(content))
            self.answer(json.dumps({"url": "https://huggingface.co/me/birds"}).encode())
        elif self.path == "/api/validate-yaml":
            self.answer(b'{"errors": [], "warnings": []}')
        elif parts[5] == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(content)["files"]
            ]
            self.answer(json.dumps({"files": files}).encode())
        elif parts[5] == "commit":
            values = [json.loads(line)["value"] for line in content.splitlines() if b'"file"' in line]
            files = {value["path"]: base64.b64decode(value["content"]) for value in values}
            self.server.repositories["/".join(parts[3:5])] = files
            self.answer(
                json.dumps(
                    {"commitUrl": f"https://huggingface.co/me/birds/commit/{COMMIT}", "commitOid": COMMIT}
                ).encode()
            )

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].split("/")
        name = "/".join(parts[3:5] if parts[1] == "api" else parts[1:3])
        files = self.server.repositories.get(name)
        if files is None:
            self.answer(b"{}", 404, X_Error_Code="RepoNotFound")
        elif parts[1] == "api":
            siblings = [{"rfilename": path} for path in files]
            self.answer(json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())
        else:
            content = files[parts[-1]]
            digest = hashlib.sha256(content).hexdigest()
            self.answer(content, X_Repo_Commit=COMMIT, ETag=f'"{digest}"', Content_Type="application/octet-stream")

    def do_HEAD(self) -> None:
        self.do_GET()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StubHub]:
    """A running stub, which ``huggingface_hub`` uses."""
    server = StubHub()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def pushed(hub: StubHub, trained: Path, here: Path) -> StubHub:
    """The stub after a push of ``trained`` to ``me/birds``."""
    assert main(["push", "--ckpt_path", str(trained / "checkpoints/best.ckpt"), "--repository", "me/birds"]) == 0
    return hub


def test_pushed_classifier_gives_the_same_probabilities(
    pushed: StubHub, trained: Path, photos: Path, weights: Path
) -> None:
    files = pushed.repositories["me/birds"]
    assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
    assert files["README.md"] == (trained / "model_card.md").read_bytes()
    (created,) = pushed.created
    assert created.get("private") is True or created.get("visibility") == "private"  # depends on the version
    paths = sorted(photos.glob("test/*/*.png"))
    classifier = load("hf://me/birds", weights=str(weights))
    np.testing.assert_array_equal(
        classifier.predict_proba(paths), load(trained / "checkpoints/best.ckpt").predict_proba(paths)
    )
    assert classifier.answer(paths, false_alarms=0.5) == load(trained / "checkpoints/best.ckpt").answer(
        paths, false_alarms=0.5
    )


def test_push_contains_no_folder_of_this_machine(pushed: StubHub, weights: Path) -> None:
    config = pushed.repositories["me/birds"]["config.json"].decode()
    assert weights.name in config and str(weights.parent) not in config


def test_the_files_of_a_repository_are_made_of_a_copy(trained: Path) -> None:
    checkpoint = read_checkpoint(trained / "checkpoints/best.ckpt")
    before = checkpoint["hyper_parameters"]["weights"]
    to_files(checkpoint, "card")
    assert checkpoint["hyper_parameters"]["weights"] == checkpoint["transfer"]["backbone"]["weights"] == before


def test_a_fit_with_a_schedule_survives_the_hub(fit: Callable[..., int], weights: Path, tmp_path: Path) -> None:
    """JSON has no integers as keys, which a schedule has."""
    assert fit("--model.schedule", "{0: head, 1: layer4}", "--trainer.max_epochs", "2") == 0
    path = Path("runs/photos/version_0/checkpoints/last.ckpt")
    for name, content in to_files(read_checkpoint(path), "card").items():
        (tmp_path / name).write_bytes(content)
    model = ImageClassifier(schedule={0: "head", 1: "layer4"}, backbone=BACKBONE, weights=str(weights), image_size=32)
    model.use_data(SimpleNamespace(classes=("blue", "green", "red")), "32-true", False)
    checkpoint = from_files(tmp_path, "hf://me/birds")
    assert checkpoint["hyper_parameters"]["schedule"] == {"0": "head", "1": "layer4"}
    model.on_load_checkpoint(checkpoint)
    assert model.cut.trainable == ("layer4",)


def test_predict_accepts_an_address(pushed: StubHub, photos: Path, weights: Path, here: Path) -> None:
    flags = ["--ckpt_path", "hf://me/birds@main", "--model.weights", str(weights)]
    assert main(["predict", *flags, "--data.predict", str(photos / "test/red")]) == 0
    assert len(Path("predictions.csv").read_text().splitlines()) == 5


def test_predict_does_not_continue_with_tensors_that_were_pushed_since(
    pushed: StubHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = checkpoint_sha256("hf://me/birds")
    checkpoint = read_checkpoint("hf://me/birds")
    assert checkpoint_sha256("hf://me/birds") == before
    next(iter(checkpoint["state_dict"].values())).view(-1)[0] += 1
    pushed.repositories["me/birds"] = to_files(checkpoint, "")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "another"))
    assert checkpoint_sha256("hf://me/birds") != before


def test_fit_cannot_resume_from_an_address(
    pushed: StubHub, photos: Path, weights: Path, here: Path, refused: Callable[[int], str]
) -> None:
    flags = ["--ckpt_path", "hf://me/birds", "--model.weights", str(weights), "--data.root", str(photos)]
    assert "hf://me/birds has no optimizer state, so its fit cannot be resumed." in refused(main(["fit", *flags]))


def test_damaged_tensors_are_refused(pushed: StubHub, weights: Path) -> None:
    content = bytearray(pushed.repositories["me/birds"]["model.safetensors"])
    content[-1] ^= 1
    pushed.repositories["me/birds"]["model.safetensors"] = bytes(content)
    with pytest.raises(CheckpointError, match=r"hf://me/birds is damaged: the SHA-256 of model\.safetensors differs"):
        load("hf://me/birds", weights=str(weights))


def test_repository_of_another_kind_is_refused(pushed: StubHub) -> None:
    pushed.repositories["me/birds"]["config.json"] = b'{"model_type": "bert"}'
    with pytest.raises(CheckpointError, match=r"hf://me/birds is not a classifier"):
        load("hf://me/birds")


def test_missing_repository_is_reported(hub: StubHub) -> None:
    with pytest.raises(CheckpointError, match=r"hf://me/nothing cannot be downloaded"):
        load("hf://me/nothing")


@pytest.mark.parametrize("text", ["hf://birds", "hf://a/b/c", "hf://../x@", "https://huggingface.co/a/b"])
def test_invalid_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not an address"):
        Address.parse(text)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "push needs the repository: --repository USER/NAME."),
        (["--repository", "birds"], "--repository: 'birds' is not of the form USER/NAME."),
        (["--repository", "me/birds@v1"], "push writes to the main branch"),
    ],
)
def test_wrong_flags_are_refused(
    flags: list[str], message: str, trained: Path, here: Path, refused: Callable[[int], str]
) -> None:
    assert message in refused(main(["push", "--ckpt_path", str(trained / "checkpoints/best.ckpt"), *flags]))


def test_checkpoint_outside_a_run_is_refused(
    hub: StubHub, trained: Path, here: Path, refused: Callable[[int], str]
) -> None:
    (here / "alone.ckpt").write_bytes((trained / "checkpoints/best.ckpt").read_bytes())
    code = main(["push", "--ckpt_path", "alone.ckpt", "--repository", "me/birds"])
    assert "push needs the model card of the run" in refused(code)


def test_unreachable_hub_is_reported(
    hub: StubHub, trained: Path, here: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[[int], str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # the port is closed
    code = main(["push", "--ckpt_path", str(trained / "checkpoints/best.ckpt"), "--repository", "me/birds"])
    assert "push to me/birds failed: " in refused(code)


def test_failed_upload_names_the_login(
    hub: StubHub, trained: Path, here: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[[int], str]
) -> None:
    monkeypatch.setattr(Handler, "do_POST", lambda self: self.answer(b"{}", 403))
    code = main(["push", "--ckpt_path", str(trained / "checkpoints/best.ckpt"), "--repository", "me/birds"])
    assert "Log in with `hf auth login`" in refused(code)
