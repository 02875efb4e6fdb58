"""Tokenizers on disk: in a run folder, and in a cache of fitted ones.

A folder holds ``tokenizer.json`` (class, fields, fingerprint) and a file for each field of
bytes, such as ``tokenizer.model``. The manifest is written last and names the content, so a
folder is either whole or seen to be broken.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pathlib
import uuid
from collections.abc import Iterable

import sentencepiece

from tokenlab import config
from tokenlab.core.errors import UserError
from tokenlab.tokenizers.base import Tokenizer, TokenizerTrainer

_MANIFEST = "tokenizer.json"
_log = logging.getLogger(__name__)


def save_tokenizer(tokenizer: Tokenizer, folder: str | os.PathLike[str]) -> None:
    """Writes ``tokenizer`` into ``folder``; a kill at any moment leaves no false content.

    Args:
        tokenizer: a frozen dataclass whose fields are bytes, scalars or tuples of them.
        folder: made when absent.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    values = {name: getattr(tokenizer, name) for name in config.fields(tokenizer)}
    blobs = sorted(name for name, value in values.items() if isinstance(value, bytes))
    for name in blobs:
        _replace(folder / f"tokenizer.{name}", values.pop(name))
    manifest = {
        "class": config.tag(type(tokenizer)),
        "fields": config.dump(values),
        "blobs": blobs,
        "fingerprint": tokenizer.fingerprint,
    }
    _replace(folder / _MANIFEST, json.dumps(manifest, indent=1).encode())


def load_tokenizer(folder: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer that ``save_tokenizer`` wrote into ``folder``.

    Raises:
        UserError: there is none, or its files are not the ones that were written.
    """
    folder = pathlib.Path(folder)
    try:
        manifest = json.loads((folder / _MANIFEST).read_bytes())
        fields = config.load(manifest["fields"])
        for name in manifest["blobs"]:
            fields[name] = (folder / f"tokenizer.{name}").read_bytes()
        kind, fingerprint = manifest["class"], manifest["fingerprint"]
    except OSError as error:
        raise UserError(f"{error.filename} is missing; save a tokenizer there first") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder / _MANIFEST} is damaged; save the tokenizer again") from None
    try:
        member = config.class_of(kind)
    except UserError:
        member = object
    if not issubclass(member, Tokenizer):
        raise UserError(f"{folder / _MANIFEST} names {kind!r}, which is not a tokenizer class")
    try:
        tokenizer = member(**fields)
    except (UserError, TypeError) as error:
        raise UserError(f"the tokenizer in {folder} is damaged: {error}") from None
    if tokenizer.fingerprint != fingerprint:
        raise UserError(f"the tokenizer in {folder} is not the one saved there; save it again")
    return tokenizer


def cached_fit(
    trainer: TokenizerTrainer,
    *,
    corpus_fingerprint: str,
    texts: Iterable[bytes],
    cache_dir: str | os.PathLike[str],
) -> Tokenizer:
    """``trainer.fit(texts)``, or the stored result of an earlier call.

    Args:
        trainer: the recipe.
        corpus_fingerprint: stands for ``texts``, which are read only when nothing is stored.
        texts: documents to train on.
        cache_dir: folder of fitted tokenizers.
    """
    recipe = f"{trainer!r}\n{corpus_fingerprint}\n{sentencepiece.__version__}"
    folder = pathlib.Path(cache_dir) / hashlib.sha256(recipe.encode()).hexdigest()[:24]
    if (folder / _MANIFEST).exists():
        try:
            return load_tokenizer(folder)
        except UserError as error:
            _log.warning("fitting again: %s", error)
    tokenizer = trainer.fit(texts)
    save_tokenizer(tokenizer, folder)
    return tokenizer


def _replace(path: pathlib.Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    temporary.write_bytes(content)
    os.replace(temporary, path)
