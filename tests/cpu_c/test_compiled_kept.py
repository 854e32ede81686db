"""Proves that what the C compiler made is taken again by the next process, and only where it is what it was and nobody
else could have written it."""

import platform
import shutil
import subprocess

import pytest

from helpers.tiny import python
from minilora_kernels.c.compiler import Library

pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None, reason="no C compiler (cc): there is nothing to keep"
)


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A C file, and a cache folder of its own."""
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
    """The commands that ran."""
    ran, popen = [], subprocess.Popen

    def noted(command, *args, **kwargs):
        ran.append(command[-1])
        return popen(command, *args, **kwargs)

    monkeypatch.setattr(subprocess, "Popen", noted)
    return ran


def test_the_next_library_needs_no_compiler(source, compiled):
    assert answer(source) == answer(source) == 42
    assert len(compiled) == 1 and len(kept(source)) == 1  # and no half-written file beside it


def test_another_source_flag_or_processor_is_compiled(source, compiled, monkeypatch):
    answer(source)
    source.write_text("int answer(void) { return 43; }\n")
    assert answer(source) == 43
    answer(source, "-DOTHER")
    monkeypatch.setattr("minilora_kernels.c.compiler._processor", lambda: "another")
    answer(source)
    assert len(compiled) == len(kept(source)) == 4


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="the names are those of x86"
)
def test_the_processor_to_compile_for_can_be_named(source, compiled, monkeypatch):
    """`MINILORA_MARCH`: another file, and the compiler is told; what the shell would take as its own it does not."""
    monkeypatch.delenv("MINILORA_MARCH", raising=False)
    answer(source)
    monkeypatch.setenv("MINILORA_MARCH", "x86-64")
    assert answer(source) == answer(source) == 42
    assert len(compiled) == len(kept(source)) == 2
    assert "-march=native" in compiled[0] and "-march=x86-64 " in compiled[1]
    monkeypatch.setenv("MINILORA_MARCH", "x86-64; touch made")
    assert Library("answer", [source]).loaded(wait=True) is None


def test_a_second_source_and_a_header_count(source, compiled):
    """They are compiled into the one library, and a change of either is compiled again."""
    second, header = source.with_name("second.c"), source.with_name("number.h")
    second.write_text('#include "number.h"\nint second(void) { return NUMBER; }\n')
    for number in (1, 1, 2):
        header.write_text(f"#define NUMBER {number}\n")
        library = Library("answer", [source, second], [header]).loaded(wait=True)
        assert library is not None and (library.answer(), library.second()) == (42, number)
    assert len(compiled) == len(kept(source)) == 2


@pytest.mark.parametrize("mode", [0o620, 0o602])
@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_others_could_have_written_is_compiled_again(source, compiled, mode, what):
    answer(source)
    (file,) = kept(source)
    (file if what == "file" else file.parent).chmod(mode | 0o100)
    assert answer(source) == 42
    assert len(compiled) == 2


def test_a_link_is_not_followed(source, compiled):
    answer(source)
    (file,) = kept(source)
    file.rename(source.parent / "elsewhere.so")
    file.symlink_to(source.parent / "elsewhere.so")
    answer(source)
    assert len(compiled) == 2 and not file.is_symlink()


def test_a_damaged_file_is_made_again(source, compiled):
    answer(source)
    (file,) = kept(source)
    file.write_bytes(b"no library")
    assert answer(source) == 42
    assert len(compiled) == 2 and file.stat().st_size > 1000
    assert answer(source) == 42 and len(compiled) == 2


def test_a_folder_that_cannot_be_written_to_keeps_nothing(source):
    (source.parent / "cache").write_text("a file, no folder")
    assert answer(source) == 42


def test_a_user_without_a_home_keeps_nothing(source, monkeypatch):
    monkeypatch.delenv("MINILORA_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert answer(source) == 42


def test_a_second_process_takes_the_steps_of_the_first(tmp_path):
    code = """
import torch
from minilora_kernels.c import bindings
bindings.begin(torch.float32)
process = bindings._LIBRARIES[torch.float32].process
print(process is None, bindings.gated(torch.ones(8), torch.ones(8), False) is None)
"""
    first, second = (python(code, MINILORA_CACHE=str(tmp_path)).split() for _ in range(2))
    assert (first, second) == (["False", "False"], ["True", "False"])
