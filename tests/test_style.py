"""Sizes that keep the library readable in one sitting."""

import ast
import pathlib

import pytest

CHECKOUT = pathlib.Path(__file__).resolve().parent.parent
FILES = sorted(
    path for folder in ("tokenlab", "kernels_pallas") for path in (CHECKOUT / folder).rglob("*.py")
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_files_and_functions_are_short(path):
    text = path.read_text()
    kernel = path.is_relative_to(CHECKOUT / "kernels_pallas")
    assert text.count("\n") <= (700 if kernel else 400)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            doc = node.body[0] if ast.get_docstring(node) is not None else None
            length = node.end_lineno - node.lineno + 1
            length -= doc.end_lineno - doc.lineno + 1 if doc is not None else 0
            assert length < 60, f"{node.name} has {length} lines beside its docstring"
