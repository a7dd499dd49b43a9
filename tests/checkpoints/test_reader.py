"""Property tests: ``load`` either refuses an altered checkpoint or returns a working classifier."""

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from project import load
from project.checkpoints.reader import read_checkpoint
from project.errors import CheckpointError, ProjectError

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(
        ["resnet18", "head", "layer4", "pkg:numpy", "/", "evil.Head", "torch.nn.Linear", "torch.optim.SGD"]
    ),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.just({"class_path": "torch.nn.ReLU", "init_args": {}}),
    st.sampled_from(
        [torch.zeros(3), torch.zeros(3, 512), torch.zeros((), dtype=torch.int8), torch.ones(2, device="meta")]
    ),
)
#: The function-scoped folder may be shared: each example overwrites its only file.
SETTINGS = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def is_refused(path: Path) -> bool:
    """Whether ``load`` refuses a checkpoint with a short message; otherwise, check that the classifier works."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # null weights are random, with a warning
            classifier = load(path)
    except ProjectError as error:
        assert len(str(error).splitlines()) <= 2, error
        return True
    (row,) = classifier.predict_proba([Image.new("RGB", (40, 40))])
    assert len(row) == len(classifier.classes_) == 3
    finite = all(tensor.isfinite().all() for tensor in classifier.model.state_dict().values())
    assert math.isclose(row.sum(), 1, abs_tol=1e-5) or not finite
    return False


@pytest.fixture(scope="module")
def intact(trained: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(trained / "checkpoints/last.ckpt", weights_only=True)
    return checkpoint


@SETTINGS
@given(data=st.data())
def test_removing_or_replacing_any_value(data: st.DataObject, intact: dict[str, Any], tmp_path: Path) -> None:
    inner: Any = copy.deepcopy(intact)
    checkpoint = inner
    while True:
        key = data.draw(st.sampled_from(sorted(inner, key=str) if isinstance(inner, dict) else range(len(inner))))
        if not isinstance(inner[key], (dict, list)) or not inner[key] or data.draw(st.integers(0, 3)) == 0:
            break
        inner = inner[key]
    if data.draw(st.booleans()):
        del inner[key]
    else:
        inner[key] = data.draw(VALUES)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    is_refused(tmp_path / "a.ckpt")


def test_one_changed_bit_of_a_tensor_is_found(trained: Path, tmp_path: Path) -> None:
    """``torch.load`` does not compare the entries with their checksums."""
    content = bytearray((trained / "checkpoints/last.ckpt").read_bytes())
    weight = read_checkpoint(trained / "checkpoints/last.ckpt")["state_dict"]["head.weight"]
    content[content.index(weight.numpy().tobytes()) + 2] ^= 1
    (tmp_path / "a.ckpt").write_bytes(content)
    torch.load(tmp_path / "a.ckpt", weights_only=True)
    with pytest.raises(
        CheckpointError, match=r"it is damaged or contains code \(BadZipFile: the checksum of .*/data/\d+ is wrong\)"
    ):
        read_checkpoint(tmp_path / "a.ckpt")


def test_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is a folder\. Pass a checkpoint, such as .*/checkpoints/best\.ckpt"):
        read_checkpoint(tmp_path)


@SETTINGS
@given(data=st.data())
def test_changing_any_bytes(data: st.DataObject, trained: Path, tmp_path: Path) -> None:
    content = bytearray((trained / "checkpoints/last.ckpt").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    length = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    (tmp_path / "a.ckpt").write_bytes(content[:length])
    is_refused(tmp_path / "a.ckpt")


def test_complete_checkpoint_loads_and_truncated_one_is_refused(trained: Path, tmp_path: Path) -> None:
    content = (trained / "checkpoints/last.ckpt").read_bytes()
    (tmp_path / "a.ckpt").write_bytes(content)
    assert not is_refused(tmp_path / "a.ckpt")
    (tmp_path / "a.ckpt").write_bytes(content[: len(content) // 2])
    assert is_refused(tmp_path / "a.ckpt")
