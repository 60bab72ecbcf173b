"""The notebook of the documentation runs from its first cell to its last, and shows what a reader is told."""

import os
import sys
from pathlib import Path

import nbformat
import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs/notebooks/first-model.ipynb"


def outputs(notebook: nbformat.NotebookNode) -> list[str]:
    """Return what each code cell has printed on stdout."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return ["".join(part.get("text", "") for part in cell.outputs if part.get("name") == "stdout") for cell in cells]


def test_the_notebook_is_stored_with_its_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    printed = outputs(notebook)
    assert sum(map(bool, printed)) == len(printed) - 1, "the cell of the imports alone prints nothing"
    assert all(part.get("name") == "stdout" for cell in notebook.cells for part in cell.get("outputs", ()))


@pytest.mark.integration
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning", "ignore::ResourceWarning")
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbclient

    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR", "SWITCHCLI_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    stored = outputs(notebook)
    (tmp_path / "work").mkdir()
    nbclient.NotebookClient(
        notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": str(tmp_path / "work")}}
    ).execute()
    printed = outputs(notebook)
    assert [len(text.splitlines()) for text in printed] == [len(text.splitlines()) for text in stored]
    assert "400/400" in nbformat.writes(notebook), "who runs it sees how far a run is"
    assert printed[1] == stored[1]  # the text, which is drawn with a seed
    assert sorted(path.name for path in (tmp_path / "work/runs").iterdir()) == ["dense", "switch"]
