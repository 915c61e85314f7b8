"""The lessons: each notebook is what its source says, and runs from top to bottom in time."""

import time
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
SOURCES = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.py"))
SECONDS = 120
"""What a lesson may take on two cores."""

pytestmark = pytest.mark.notebook


def cells_of(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_notebook_matches_its_source(source: Path) -> None:
    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    assert cells_of(notebook) == cells_of(jupytext.read(source)), (
        f"{source.stem}: regenerate the notebook with `make notebooks`"
    )


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_notebook_runs(source: Path) -> None:
    notebook = jupytext.read(source)
    started = time.monotonic()
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3").execute()
    seconds = time.monotonic() - started
    print(f"{source.stem}: {seconds:.0f} s")
    assert seconds < SECONDS


def test_there_is_a_tour() -> None:
    assert [source.stem for source in SOURCES][:1] == ["00_tour"]
