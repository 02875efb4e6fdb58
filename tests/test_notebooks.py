"""Every notebook runs from top to bottom, says what its text twin says, and draws."""

import pathlib

import jupytext
import nbclient
import nbformat
import pytest

FOLDER = pathlib.Path(__file__).parent.parent / "notebooks"
# The pictures of each; those that train for long or read a published model are slow.
PICTURES = {"long_context": 4, "quickstart": 2, "speculation": 3, "what_each_token_received": 5}
SLOW = {"long_context", "speculation", "what_each_token_received"}


def sources(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_a_notebook_says_what_its_twin_says_and_holds_no_outputs(path):
    assert path.stem in PICTURES
    notebook = read(path.stem)
    assert sources(notebook) == sources(jupytext.read(path)), "run jupytext --sync"
    assert not any(cell.get("outputs") for cell in notebook.cells), "strip the outputs"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [], id=name)
        for name in PICTURES
    ],
)
def test_a_notebook_runs_and_draws(name):
    notebook = read(name)
    client = nbclient.NotebookClient(
        notebook, timeout=1200, resources={"metadata": {"path": str(FOLDER)}}
    )
    client.execute()
    pictures = [
        output.data["image/png"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == PICTURES[name]
