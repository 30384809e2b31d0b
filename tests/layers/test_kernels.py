"""kernels.py: which compiled library is loaded, and what happens if there is none."""

import _ctypes
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from paligemma.layers import compiling, instruction_sets, kernel_check, kernels
from paligemma.layers.compiling import LibraryError
from paligemma.layers.instruction_sets import InstructionSet
from tests import processors

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def first_use(monkeypatch):
    """Each test begins as a process that has not used the kernels yet."""
    monkeypatch.setattr(kernels, "LOADED", [])


def test_a_planted_library_does_not_run(places, compiler):
    """Another user who knows source, compiler and processor can compute the name."""
    cache, temporary = places
    compiler("exit 1")
    flags = instruction_sets.allowed()[0].flags
    name = compiling.compiled_name(compiling.SOURCE, compiling.find_compiler(), flags) + ".so"
    (cache / "paligemma").mkdir(parents=True)
    (cache / "paligemma").chmod(0o777)
    planted = b"\x7fELF of another user"
    (cache / "paligemma" / name).write_bytes(planted + compiling.DIGEST(planted).digest())
    assert kernels.library() is None
    assert not (temporary / f"paligemma-{os.geteuid()}" / name).exists()


@pytest.mark.usefixtures("places")
def test_where_nothing_can_be_written_there_is_no_library_and_a_warning(monkeypatch, caplog, compiler):
    compiler("printf whole >$out")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    assert kernels.library() is None
    assert "decoding will be slower" in caplog.text and "No space left" in caplog.text


# Instruction sets


@pytest.fixture
def machine(monkeypatch, request):
    """A function that sets what happens to each instruction set, best first: a reason why it fails, an exception, or None.

    It returns the list of the sets that were tried. The libraries are Python's own and have no kernels.
    """

    request.getfixturevalue("places")

    def make(**sets: object) -> list[str]:
        tried: list[str] = []
        known = [InstructionSet(name, frozenset(), (name,), "nothing") for name in sets]

        def compile_once(_source, _folder, flags):
            tried.append(flags[0])
            found = sets[flags[0]]
            if isinstance(found, Exception):
                raise found
            return Path(flags[0])

        def check_once(file, *_):
            if sets[str(file)] is not None:
                raise LibraryError(sets[str(file)], is_of_instructions=True)
            return {"reason": None}

        monkeypatch.setattr(compiling, "compile_once", compile_once)
        monkeypatch.setattr(compiling, "check_once", check_once)
        monkeypatch.setattr(kernels, "allowed", lambda: known)
        monkeypatch.setattr(kernels, "open_library", lambda file: f"opened {file}")
        return tried

    return make


def test_the_best_set_that_works_is_used_and_the_others_are_remembered_with_their_reasons(machine, caplog):
    caplog.set_level("INFO")
    rejected = LibraryError("kernels.cpp does not compile: unknown argument", is_of_instructions=True)
    tried = machine(best=rejected, good="its check ended with SIGILL", fair=None, poor=None)
    assert kernels.library() == "opened fair" and tried == ["best", "good", "fair"]
    assert kernels.load() == [("opened fair", "fair", {"best": str(rejected), "good": "its check ended with SIGILL"}, {})]
    assert "the kernels for good are not used: its check ended with SIGILL" in caplog.text
    assert kernels.library() == "opened fair" and len(tried) == 3
    assert all(record.levelname == "INFO" for record in caplog.records)


@pytest.mark.parametrize("tuning", ["", "off"])
def test_what_was_measured_is_used_and_said_unless_the_user_forbids_it(machine, monkeypatch, caplog, tuning):
    caplog.set_level("INFO")
    machine(best=None)
    values, choices = kernels.CTuning(prefetch=1024), {"prefetch": 2048, "bf16_rows": 15}
    monkeypatch.setenv("PALIGEMMA_TUNING", tuning)
    monkeypatch.setattr(compiling, "check_once", lambda *_: {"reason": None, "choices": choices})
    monkeypatch.setattr(kernels, "tuning", lambda _: values)
    is_used = tuning != "off"
    assert kernels.load()[0].choices == (choices if is_used else {})
    assert values.prefetch == (2048 if is_used else 1024)
    assert (", measured: prefetch 2048, bf16_rows 15" in caplog.text) is is_used


def test_where_every_set_fails_there_is_no_library_and_one_warning(machine, caplog):
    machine(best="wrong results: bf16_gate", generic="its check ended with SIGSEGV")
    assert kernels.library() is None
    assert caplog.messages == [f"{compiling.SLOWER}: best: wrong results: bf16_gate; generic: its check ended with SIGSEGV."]


def test_what_would_befall_the_other_sets_too_is_not_tried_with_them(machine, caplog):
    tried = machine(best=LibraryError("there is no C++ compiler"), generic=None)
    assert kernels.library() is None and tried == ["best"] and "there is no C++ compiler" in caplog.text


def test_where_no_set_is_allowed_nothing_is_tried_or_said(machine, caplog):
    machine()
    assert kernels.library() is None and caplog.messages == []


def test_threads_that_start_together_load_one_library(machine, monkeypatch):
    tried = machine(best=None)
    compile_once = compiling.compile_once
    monkeypatch.setattr(compiling, "compile_once", lambda *args: time.sleep(0.1) or compile_once(*args))
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: kernels.library(), range(4))) == {"opened best"}
    assert tried == ["best"] and len(kernels.LOADED) == 1


@pytest.mark.usefixtures("places")
def test_a_library_without_the_functions_is_not_used(monkeypatch, caplog):
    monkeypatch.setattr(compiling, "compile_once", lambda *_: _ctypes.__file__)
    monkeypatch.setattr(compiling, "check_once", lambda *_: {})
    assert kernels.library() is None and "bf16_product" in caplog.text


BROKEN = {
    "crash": "__attribute__((constructor)) static void crash() { __builtin_trap(); }",
    "wrong": "#include <cmath>\n#define sqrt cbrt",
    "NaN": "#include <cmath>\n#define sqrt(x) log(-1 - (x))",
}


@pytest.mark.usefixtures("places")
def test_libraries_that_crash_or_are_wrong_are_passed_over_once(monkeypatch, tmp_path):
    if not compiling.find_compiler():
        return
    best = instruction_sets.allowed()[0]
    sets = [best._replace(name="right")]
    for name, code in BROKEN.items():
        (tmp_path / f"{name}.h").write_text(code + "\n")
        sets.insert(0, best._replace(name=name, flags=(*best.flags, "-include", str(tmp_path / f"{name}.h"))))
    monkeypatch.setattr(kernels, "allowed", lambda: sets)
    monkeypatch.setattr(compiling, "FLAGS", processors.QUICK_FLAGS)
    assert kernels.library() is not None
    ((_, name, failures, _),) = kernels.load()
    crash = failures.pop("crash")
    assert name == "right" and crash.startswith("its check ended with SIG")  # ILL or TRAP, by processor
    assert set(failures) == {"wrong", "NaN"} and all("wrong results: bf16_rms_norm" in reason for reason in failures.values())
    assert max(kernel_check.errors().values()) <= 1
    kernels.LOADED.clear()
    monkeypatch.setattr(compiling, "run", lambda *_: 1 / 0)  # nothing is compiled or checked again
    assert kernels.library() is not None and kernels.load()[0].failures.keys() == BROKEN.keys()


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
