"""A compiler and folders for tests of compiling."""

import tempfile
from pathlib import Path

import pytest


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
