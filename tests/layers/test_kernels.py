"""kernels.py: which compiled library is loaded, and what happens if there is none."""

import _ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from paligemma.layers import compiling, kernels

ROOT = Path(__file__).resolve().parents[2]


def test_a_planted_library_does_not_run(places, compiler):
    """Another user who knows source, compiler and processor can compute the name."""
    cache, temporary = places
    compiler("exit 1")
    name = compiling.compiled_name(compiling.SOURCE, compiling.find_compiler()) + ".so"
    (cache / "paligemma").mkdir(parents=True)
    (cache / "paligemma").chmod(0o777)
    planted = b"\x7fELF of another user"
    (cache / "paligemma" / name).write_bytes(planted + compiling.DIGEST(planted).digest())
    kernels.library.cache_clear()
    try:
        assert kernels.library() is None
    finally:
        kernels.library.cache_clear()
    assert not (temporary / f"paligemma-{os.geteuid()}" / name).exists()


@pytest.mark.usefixtures("places")
def test_where_nothing_can_be_written_there_is_no_library_and_a_warning(monkeypatch, caplog, compiler):
    compiler("printf whole >$out")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    kernels.library.cache_clear()
    try:
        assert kernels.library() is None
    finally:
        kernels.library.cache_clear()
    assert "decoding will be slower" in caplog.text and "No space left" in caplog.text


@pytest.mark.usefixtures("places")
def test_a_library_without_the_functions_is_not_used(monkeypatch, caplog):
    monkeypatch.setattr(compiling, "compile_once", lambda *_: _ctypes.__file__)
    assert kernels.library.__wrapped__() is None and "bf16_product" in caplog.text


def test_a_program_told_to_do_without_kernels_does():
    code = "from paligemma.layers import kernels; print(kernels.library())"
    environment = os.environ | {"PALIGEMMA_KERNELS": "off"}
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert answer.stdout.strip() == "None"


def test_tuned_values_belong_to_one_library_and_change_no_result(variants):
    native, other = variants("native"), variants("generic")
    if native is None:
        return
    before = kernels.tuning(native).prefetch
    assert before == kernels.tuning(other).prefetch == 1024  # the rule
    x, w = torch.randn(1, 64).bfloat16(), torch.randn(40, 64).bfloat16()
    y = kernels.product("bf16", x, [(w, None, 40)], torch.bfloat16)
    try:
        kernels.tuning(native).prefetch = 4096
        assert kernels.tuning(native).prefetch == 4096 and kernels.tuning(other).prefetch == 1024
        assert kernels.product("bf16", x, [(w, None, 40)], torch.bfloat16).equal(y)
    finally:
        kernels.tuning(native).prefetch = before
