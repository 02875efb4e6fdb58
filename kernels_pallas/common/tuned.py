"""Block sizes that the tuner found, in a ``tuned.json`` beside each operation.

The file maps device kind to key to sizes, for example ``{"TPU v6 lite": {"forward bfloat16 2304":
{"tokens": 1024, "vocabulary": 512, "cycles": 1000}}}``. A key is found exactly or not at all;
``cycles`` is what was predicted for the shape that it was tuned at, and for readers only.
"""

import functools
import json
import os
import pathlib
import tempfile
from collections.abc import Mapping

from kernels_pallas.common import dispatch

Sizes = Mapping[str, int]
Table = Mapping[str, Mapping[str, Sizes]]

_FOLDER = pathlib.Path(__file__).parent.parent


def path(op: str) -> pathlib.Path:
    """Where the sizes of an operation are."""
    return _FOLDER / op / "tuned.json"


def lookup(op: str, key: str) -> Sizes:
    """Sizes of ``key`` for the device that is being traced for; empty if it has none."""
    return _read(path(op)).get(dispatch.device_kind(), {}).get(key, {})


def store(file: pathlib.Path, kind: str, entries: Mapping[str, Sizes]) -> None:
    """Adds or replaces entries of a device kind, keeps all others, and is never half done."""
    table = {name: dict(found) for name, found in read(file).items()}
    table[kind] = table.get(kind, {}) | {key: dict(sizes) for key, sizes in entries.items()}
    text = json.dumps(table, indent=2, sort_keys=True) + "\n"
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "w") as temporary:
            temporary.write(text)
        os.chmod(name, 0o644)
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise
    _read.cache_clear()


def read(file: pathlib.Path) -> Table:
    """All entries; none if there is no file."""
    return json.loads(file.read_text()) if file.exists() else {}


_read = functools.cache(read)
