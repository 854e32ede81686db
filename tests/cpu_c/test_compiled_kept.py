"""Tests of the cache of compiled C libraries.

The next process loads a compiled library from the cache, but only if sources, flags and processor
are the same and no other user could have written the file.
"""

import platform
import shutil
import subprocess

import pytest

from helpers.tiny import python
from minilora_kernels.c.compiler import Library

pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None, reason="no C compiler (cc): there is no library to cache"
)


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Path of a C file. The cache is an empty folder next to it."""
    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "answer.c").write_text("int answer(void) { return 42; }\n")
    return tmp_path / "answer.c"


def answer(source, *flags: str) -> int:
    library = Library("answer", [source], flags=flags).loaded(wait=True)
    assert library is not None
    return library.answer()


def kept(source):
    return sorted((source.parent / "cache" / "compiled").glob("*"))


@pytest.fixture
def compiled(monkeypatch) -> list[str]:
    """List of the compiler commands that ran."""
    ran, popen = [], subprocess.Popen

    def noted(command, *args, **kwargs):
        ran.append(command[-1])
        return popen(command, *args, **kwargs)

    monkeypatch.setattr(subprocess, "Popen", noted)
    return ran


def test_a_second_library_loads_the_cached_file(source, compiled):
    assert answer(source) == answer(source) == 42
    assert len(compiled) == 1 and len(kept(source)) == 1  # no temporary file is left


def test_a_change_of_source_flag_or_processor_compiles_again(source, compiled, monkeypatch):
    answer(source)
    source.write_text("int answer(void) { return 43; }\n")
    assert answer(source) == 43
    answer(source, "-DOTHER")
    monkeypatch.setattr("minilora_kernels.c.compiler._processor", lambda: "another")
    answer(source)
    assert len(compiled) == len(kept(source)) == 4


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names of x86 processors")
def test_minilora_march_selects_the_processor(source, compiled, monkeypatch):
    """MINILORA_MARCH sets -march and has its own cached file. A shell command in it is refused."""
    monkeypatch.delenv("MINILORA_MARCH", raising=False)
    answer(source)
    monkeypatch.setenv("MINILORA_MARCH", "x86-64")
    assert answer(source) == answer(source) == 42
    assert len(compiled) == len(kept(source)) == 2
    assert "-march=native" in compiled[0] and "-march=x86-64 " in compiled[1]
    monkeypatch.setenv("MINILORA_MARCH", "x86-64; touch made")
    assert Library("answer", [source]).loaded(wait=True) is None


def test_a_change_of_any_source_or_header_compiles_again(source, compiled):
    """All sources are compiled into one library."""
    second, header = source.with_name("second.c"), source.with_name("number.h")
    second.write_text('#include "number.h"\nint second(void) { return NUMBER; }\n')
    for number in (1, 1, 2):
        header.write_text(f"#define NUMBER {number}\n")
        library = Library("answer", [source, second], [header]).loaded(wait=True)
        assert library is not None and (library.answer(), library.second()) == (42, number)
    assert len(compiled) == len(kept(source)) == 2


@pytest.mark.parametrize("mode", [0o620, 0o602])
@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_file_that_others_could_write_is_compiled_again(source, compiled, mode, what):
    answer(source)
    (file,) = kept(source)
    (file if what == "file" else file.parent).chmod(mode | 0o100)
    assert answer(source) == 42
    assert len(compiled) == 2


def test_a_symbolic_link_in_the_cache_is_not_followed(source, compiled):
    answer(source)
    (file,) = kept(source)
    file.rename(source.parent / "elsewhere.so")
    file.symlink_to(source.parent / "elsewhere.so")
    answer(source)
    assert len(compiled) == 2 and not file.is_symlink()


def test_a_damaged_file_is_compiled_again(source, compiled):
    answer(source)
    (file,) = kept(source)
    file.write_bytes(b"no library")
    assert answer(source) == 42
    assert len(compiled) == 2 and file.stat().st_size > 1000
    assert answer(source) == 42 and len(compiled) == 2


def test_a_cache_that_cannot_be_written_is_not_used(source):
    (source.parent / "cache").write_text("a file, no folder")
    assert answer(source) == 42


def test_without_a_home_folder_the_library_works_uncached(source, monkeypatch):
    monkeypatch.delenv("MINILORA_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert answer(source) == 42


def test_a_second_process_loads_the_compiled_steps_of_the_first(tmp_path):
    code = """
import torch
from minilora_kernels.c import bindings
bindings.begin(torch.float32)
process = bindings._LIBRARIES[torch.float32].process
print(process is None, bindings.gated(torch.ones(8), torch.ones(8), False) is None)
"""
    first, second = (python(code, MINILORA_CACHE=str(tmp_path)).split() for _ in range(2))
    assert (first, second) == (["False", "False"], ["True", "False"])
