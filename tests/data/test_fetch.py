"""Fetching with stand-ins for the clients: what they are asked, what is checked and kept."""

import hashlib
import io
import json
import os
import pathlib
import signal
import stat
import subprocess
import sys
import tarfile
import time
import zipfile

import pytest

from tokenlab.core.errors import UserError
from tokenlab.data.fetch import Package, cache_dir, fetch, tree_sha256

CHECKOUT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A folder that is all of PATH, and an empty cache."""
    monkeypatch.setenv("TOKENLAB_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def tool(folder, name, body):
    """An executable that logs its arguments and then runs ``body``."""
    path = folder / name
    log = folder / f"{name}.log"
    path.write_text(
        f"#!{sys.executable}\nimport json, os, sys, time\n"
        f"open({str(log)!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n{body}\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return log


def calls(log):
    return [json.loads(line) for line in log.read_text().splitlines()]


def tgz(members):
    """A tar.gz whose entries are (name, content) or a prepared TarInfo."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def npm(folder, content, before=""):
    source = folder / "source.tgz"
    source.write_bytes(content)
    copy = f"open('a-1.0.0.tgz', 'wb').write(open({str(source)!r}, 'rb').read())"
    return tool(folder, "npm", f"{before}\n{copy}")


GOOD = tgz([("package/a.txt", b"hello"), ("package/d/b.txt", b"x")])


def test_npm_package_is_packed_unpacked_and_kept(tools):
    log = npm(tools, GOOD)
    pin = hashlib.sha256(GOOD).hexdigest()
    folder = fetch("npm:@scope/a==1.0.0", sha256=pin)
    assert (folder / "package/a.txt").read_bytes() == b"hello"
    assert fetch("npm:@scope/a==1.0.0", sha256=pin) == folder
    (call,) = calls(log)
    assert call[0] == "pack" and call[-1] == "@scope/a@1.0.0" and "--ignore-scripts" in call
    manifest = json.loads((folder.parent / "manifest.json").read_text())
    assert manifest["archive_sha256"] == pin
    assert manifest["content_sha256"] == tree_sha256(folder)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["content", "manifest.json"]


def test_wrong_hash_is_refused_and_leaves_nothing(tools):
    npm(tools, GOOD)
    with pytest.raises(UserError, match=r"has sha256 .* expected 000"):
        fetch("npm:a==1.0.0", sha256="000")
    assert [p.name for p in (cache_dir() / "packages").iterdir()] == [".npm_a__1.0.0.lock"]


@pytest.mark.parametrize("damage", ["change", "add", "remove", "manifest"])
def test_damaged_copy_is_fetched_again(tools, damage):
    log = npm(tools, GOOD)
    folder = fetch("npm:a==1.0.0")
    if damage == "change":
        (folder / "package/a.txt").write_bytes(b"hellO")
    elif damage == "add":
        (folder / "package/c.txt").write_bytes(b"")
    elif damage == "remove":
        (folder / "package/a.txt").unlink()
    else:
        (folder.parent / "manifest.json").write_text("{")
    assert fetch("npm:a==1.0.0") == folder
    assert (folder / "package/a.txt").read_bytes() == b"hello"
    assert len(calls(log)) == 2


def test_copy_of_an_unpinned_fetch_is_checked_against_a_later_pin(tools):
    npm(tools, GOOD)
    fetch("npm:a==1.0.0")
    with pytest.raises(UserError, match="expected 000"):
        fetch("npm:a==1.0.0", sha256="000")


def link(name, target):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


@pytest.mark.parametrize(
    "archive",
    [
        tgz([("../escaped.txt", b"x")]),
        tgz([("a/../../escaped.txt", b"x")]),
        tgz([link("away", "/"), ("away/escaped.txt", b"x")]),
        tgz([link("up", "../..")]),
        GOOD[: len(GOOD) // 2],
        b"not an archive",
    ],
    ids=["above", "inside above", "through a link", "link above", "half", "nothing"],
)
def test_archive_that_escapes_or_is_broken_is_refused(tools, tmp_path, archive):
    npm(tools, archive)
    with pytest.raises(UserError, match="cannot be unpacked"):
        fetch("npm:a==1.0.0")
    assert not list(tmp_path.rglob("escaped.txt"))
    assert not (cache_dir() / "packages/npm_a__1.0.0").exists()


def test_absolute_names_stay_inside(tools, tmp_path):
    outside = tmp_path / "escaped.txt"
    npm(tools, tgz([(str(outside), b"x")]))
    folder = fetch("npm:a==1.0.0")
    assert not outside.exists()
    assert folder.joinpath(*outside.parts[1:]).read_bytes() == b"x"


def wheel(folder, name, members):
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as zipped:
        info = f"{name}-1.0.dist-info"
        zipped.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        zipped.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        zipped.writestr(f"{info}/RECORD", "")
        for member, content in members.items():
            zipped.writestr(member, content)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels that is all that pip sees."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_real_pip_downloads_and_installs_from_a_folder(tools, index):
    wheel(index, "thing", {"thing/data.txt": b"real"})
    for package in ("pypi:thing==1.0", "pypi+deps:thing==1.0"):
        assert (fetch(package) / "thing/data.txt").read_bytes() == b"real"
    with pytest.raises(UserError, match=r"pypi:thing==9\.9 was not fetched \(ERROR: .*9\.9"):
        fetch("pypi:thing==9.9")


def test_wheel_that_escapes_is_refused(tools, index, tmp_path):
    wheel(index, "thing", {"../escaped.txt": b"x"})
    with pytest.raises(UserError, match=r"unpacked: '\.\./escaped\.txt' lies outside"):
        fetch("pypi:thing==1.0")
    assert not list(tmp_path.rglob("escaped.txt"))


APT = """
known = os.path.exists({marker!r})
if sys.argv[1] == "update":
    open({marker!r}, "w").close()
elif known:
    open(sys.argv[-1] + "_1.deb", "w").write("archive")
else:
    sys.exit("E: Unable to locate package " + sys.argv[-1])
"""
DPKG = "open(sys.argv[3] + '/data.txt', 'w').write(open(sys.argv[2]).read())"


@pytest.mark.parametrize("root", [True, False])
def test_apt_lists_are_updated_once_by_root_only(tools, monkeypatch, root):
    monkeypatch.setattr(os, "geteuid", lambda: 0 if root else 1000)
    log = tool(tools, "apt-get", APT.format(marker=str(tools / "updated")))
    tool(tools, "dpkg-deb", DPKG)
    if root:
        assert (fetch("apt:words") / "data.txt").read_text() == "archive"
        assert [call[0] for call in calls(log)] == ["download", "update", "download"]
    else:
        with pytest.raises(UserError, match="E: Unable to locate package words"):
            fetch("apt:words")
        assert [call[0] for call in calls(log)] == ["download"]


def test_errors_name_the_client_and_its_reason(tools):
    with pytest.raises(UserError, match="needs npm, which is not installed"):
        fetch("npm:a==1.0.0")
    tool(tools, "npm", "sys.exit('noise\\nnpm error 404 a@1.0.0\\nmore')")
    with pytest.raises(UserError, match=r"not fetched \(npm error 404 a@1\.0\.0\)") as caught:
        fetch("npm:a==1.0.0")
    assert "\n" not in str(caught.value)
    tool(tools, "npm", "")
    with pytest.raises(UserError, match="came as 0 files"):
        fetch("npm:a==1.0.0")


def test_cache_that_cannot_be_written_is_said(tools, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TOKENLAB_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot write to .*file.packages .*TOKENLAB_CACHE"):
        fetch("npm:a==1.0.0")


def test_names_are_parsed_and_bad_ones_refused():
    assert Package.parse("npm:@a/b-c==1.2.3") == ("npm", "@a/b-c", "1.2.3")
    assert Package.parse("apt:words") == ("apt", "words", "")
    for text in ("words", "apt:", "snap:x", "npm:../x", "npm:a b", "apt:-y", "npm:a==", "pypi:a/b"):
        with pytest.raises(UserError, match="is not a package"):
            Package.parse(text)


CHILD = "from tokenlab.data.fetch import fetch; print(fetch('npm:a==1.0.0'))"


def child():
    return subprocess.Popen(
        [sys.executable, "-c", CHILD],
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        stdout=subprocess.PIPE,
        start_new_session=True,
    )


def test_processes_share_one_download(tools):
    log = npm(tools, GOOD, before="time.sleep(0.5)")
    children = [child() for _ in range(3)]
    outputs = {process.communicate()[0] for process in children}
    assert len(outputs) == 1 and {process.returncode for process in children} == {0}
    assert len(calls(log)) == 1


def test_a_killed_fetch_leaves_no_copy_and_no_lock(tools):
    log = npm(tools, GOOD, before="open('half', 'w').write('x'); time.sleep(60)")
    process = child()
    deadline = time.monotonic() + 30
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (cache_dir() / "packages/npm_a__1.0.0").exists()
    npm(tools, GOOD)
    assert (fetch("npm:a==1.0.0") / "package/a.txt").read_bytes() == b"hello"
    names = {path.name for path in (cache_dir() / "packages").iterdir()}
    assert names == {"npm_a__1.0.0", ".npm_a__1.0.0.lock"}
