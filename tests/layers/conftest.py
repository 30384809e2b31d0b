"""Libraries for other processors, and their kinds of bfloat16 instructions; a compiler and folders for tests of compiling."""

import tempfile
from pathlib import Path

import pytest

from paligemma.layers import fast_cpu, kernels
from tests.processors import VARIANTS, compiled


@pytest.fixture(scope="session")
def variants(tmp_path_factory):
    """The kernels compiled for other processors that this one can imitate: name -> library, compiled on first use."""
    folder, made = tmp_path_factory.mktemp("variants"), {"native": kernels.library()}

    def find(name: str):
        if name not in made and made["native"] is not None:
            made[name] = kernels.open_library(compiled(VARIANTS[name], folder))
        return made.get(name)

    return find


@pytest.fixture(params=VARIANTS)
def variant(request, variants, monkeypatch):
    """Each variant of the kernels in turn, installed as kernels.library(); None without a compiler."""
    library = variants(request.param)
    monkeypatch.setattr(kernels, "library", lambda: library)
    return library


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A function that makes a shell script the compiler; the file `calls` counts how often the script runs."""
    file, calls = tmp_path / "c++", tmp_path / "calls"
    calls.write_text("")

    def write(text: str) -> Path:
        file.write_text(f"#!/bin/sh\necho >>{calls}\nfor out; do :; done\n{text}\n")
        file.chmod(0o755)
        return calls

    monkeypatch.setenv("CXX", str(file))
    return write


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A cache folder and a temporary folder that only this test uses."""
    cache, temporary = tmp_path / "xdg", tmp_path / "tmp"
    temporary.mkdir(mode=0o700)
    monkeypatch.delenv("PALIGEMMA_KERNELS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    return cache, temporary


@pytest.fixture(params=fast_cpu.BF16_ROWS)
def instructions(request, monkeypatch):
    """Processors with each kind of bfloat16 instructions."""
    monkeypatch.setattr(fast_cpu, "bf16_instructions", lambda: request.param)
    return request.param
