"""Every notebook runs from top to bottom on a small run, and is committed without outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from project.cli.main import main

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def working_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a shortened run of the quickstart."""
    folder = tmp_path_factory.mktemp("notebooks")
    config = str(NOTEBOOKS[0].parents[1] / "configs" / "quickstart.yaml")
    short = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "10", "--trainer.limit_val_batches", "2"]
    short += ["--features.cache", "off", "--model.head_init", "random", "--dashboard.figures", "false"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", "-c", config, *short, "--model.image_size", "32", "--data.num_workers", "0"]) == 0
    return folder


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, working_folder: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        assert not cell.get("outputs") and not cell.get("execution_count"), "clear the outputs before you commit"
    client = NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": working_folder}}
    )
    client.execute()
    streams = [output.text for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output]
    assert "Warning" not in "".join(streams)
    images = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert images, "the notebook shows no figure"
