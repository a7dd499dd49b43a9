"""The recipe for Ray Data predicts every image on a local Ray."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from project import load

EXAMPLE = Path(__file__).parents[2] / "docs/predict_ray.py"


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_recipe_predicts_every_image(run: Path, album: Path) -> None:
    from pyarrow import parquet

    (album / "test/red/0.png").write_bytes(b"no image")
    checkpoint = str(run.resolve() / "checkpoints/best.ckpt")
    arguments = [checkpoint, str((album / "test").resolve()), str(Path("out").resolve())]
    completed = subprocess.run([sys.executable, EXAMPLE, *arguments], capture_output=True, text=True, timeout=280)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    rows = {Path(row["path"]): row for row in parquet.read_table("out").to_pylist()}
    paths = sorted((album / "test").resolve().rglob("*.png"))
    assert sorted(rows) == paths
    bad = paths[8]
    assert bad.match("red/0.png") and "is not a readable image" in rows[bad]["error"]
    good = [path for path in paths if path != bad]
    expected = load(checkpoint).predict_proba(good).max(1)
    assert [rows[path]["probability"] for path in good] == pytest.approx(expected.tolist(), abs=1e-5)
    assert [rows[path]["predicted"] for path in good] == [path.parent.name for path in good]
    assert not any(rows[path]["error"] for path in good)
