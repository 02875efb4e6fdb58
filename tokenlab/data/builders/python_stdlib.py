"""Source code: the standard library of the running Python."""

from __future__ import annotations

import io
import pathlib
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from typing import ClassVar

import tensorflow_datasets as tfds

from tokenlab.data.builders.base import CorpusBuilder, Example

# Tests, and packages that are not the library's.
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class PythonStdlib(CorpusBuilder):
    """Documents are modules; the data set's version is the interpreter's. Needs no download."""

    VERSION = tfds.core.Version(".".join(map(str, sys.version_info[:3])))
    SUMMARY = "Python source code: the modules of the standard library, tests left out."
    LICENCE = "PSF-2.0"
    CITATION = "Python Software Foundation, The Python Standard Library."
    MEGABYTES = 12.1
    FIELDS: ClassVar = {"text": tfds.features.Text(), "path": tfds.features.Text()}

    def examples(self) -> Iterator[Example]:
        """Modules in order of path."""
        return modules(pathlib.Path(sysconfig.get_paths()["stdlib"]))


def modules(library: pathlib.Path) -> Iterator[Example]:
    """The Python files below ``library`` that decode as they declare."""
    for path in sorted(library.rglob("*.py")):
        place = path.relative_to(library)
        # The build configuration is not written by hand, and names the machine it was made on.
        if _LEFT_OUT & set(place.parts) or place.name.startswith("_sysconfigdata"):
            continue
        content = path.read_bytes()
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
            text = content.decode(encoding)
        except (SyntaxError, UnicodeDecodeError):
            continue
        if text.strip():
            yield {"text": text, "path": place.as_posix()}
