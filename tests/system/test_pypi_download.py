from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from resmol.errors import DataError, NetworkError
from resmol.system.pypi_download import downloaded_wheel, extract_member, read_member


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder with one wheel, which is all that pip can see."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tinything-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("tinything/data.txt", "hello " * 100)
        archive.writestr("tinything-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinything\nVersion: 1.0\n")
        archive.writestr("tinything-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tinything-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_wheel_is_downloaded_read_and_gone_afterwards(index):
    expected = hashlib.sha256(next(index.iterdir()).read_bytes()).hexdigest()
    with downloaded_wheel("tinything==1.0", sha256=expected) as wheel:
        assert read_member(wheel, "tinything/data.txt", max_bytes=1000) == b"hello " * 100
    assert not wheel.exists()


def test_another_hash_is_refused(index):
    with pytest.raises(DataError, match="expected 0000"), downloaded_wheel("tinything==1.0", sha256="0" * 64):
        pass


def test_a_missing_package_is_a_network_error(index):
    with pytest.raises(NetworkError, match="nosuchthing"), downloaded_wheel("nosuchthing==1.0"):
        pass


@pytest.mark.parametrize(
    ("member", "limit", "message"),
    [("tinything/data.txt", 599, "the limit is 599"), ("../etc/passwd", 1000, "no such member")],
)
def test_only_the_named_member_up_to_the_limit_is_unpacked(index, tmp_path, member, limit, message):
    target = tmp_path / "out"
    with pytest.raises(DataError, match=message):
        extract_member(next(index.iterdir()), member, target, max_bytes=limit)


def test_a_damaged_member_is_refused(index):
    wheel = next(index.iterdir())
    data = bytearray(wheel.read_bytes())
    place = data.index(b"hello hello")
    data[place] ^= 1
    wheel.write_bytes(data)
    with pytest.raises(DataError, match="CRC"):
        read_member(wheel, "tinything/data.txt", max_bytes=1000)
