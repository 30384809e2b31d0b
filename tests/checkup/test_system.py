"""What the machine has, as the checks report it. All hardware is simulated."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from paligemma import devices
from paligemma.checkup import system
from paligemma.checkup.rows import FAILED, NOTE, OK
from paligemma.layers import compiling, instruction_sets
from tests.gpu.pretend import pretend

CPU = torch.device("cpu")


def test_programs_that_fail_hang_or_are_missing_have_no_answer(monkeypatch):
    assert system.output_of(sys.executable, "-c", "print(' 12 ')") == "12"
    assert system.output_of(sys.executable, "-c", "raise SystemExit(1)") is None
    assert system.output_of("no-such-program") is None
    monkeypatch.setattr(system, "ANSWER_TIMEOUT_S", 0.1)
    assert system.output_of(sys.executable, "-c", "import time; time.sleep(60)") is None


def test_nvidia_smi_is_quoted_beside_the_variable_that_hides_cards(monkeypatch):
    monkeypatch.setattr(system, "output_of", lambda *_: "580.65.06, NVIDIA L4, 23034 MiB\n580.65.06, NVIDIA L4, 23034 MiB")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    (row,) = system.driver_rows()
    assert row.value == "580.65.06; nvidia-smi lists NVIDIA L4, 23034 MiB, NVIDIA L4, 23034 MiB; CUDA_VISIBLE_DEVICES=1"
    monkeypatch.setattr(system, "output_of", lambda *_: None)
    assert system.driver_rows() == []


def test_cards_are_listed_with_capability_and_memory():
    assert system.cards_rows() == []
    with pretend("cuda:0,cuda:1", capability=(8, 9), name="NVIDIA L4"):
        first, second, architectures = system.cards_rows()
    assert first.name == "cuda:0" and second.name == "cuda:1" and first.value.startswith("NVIDIA L4, sm_89, ")
    assert architectures.name == "torch has code for"


def test_the_row_of_the_device_says_what_is_used_on_it(monkeypatch):
    monkeypatch.setattr(devices, "missed_gpu", lambda: None)
    (row,) = system.gpu_rows("auto", CPU)  # what is used on GPUs only is not listed
    assert row.value.startswith("cpu (--device auto); dtypes that it computes fast: float32")
    (row,) = system.gpu_rows("cuda:1", CPU)
    assert row.value.startswith("cpu (cuda:1 cannot be used);")
    monkeypatch.setattr(devices, "has_triton", lambda: True)
    with pretend("cuda:0", capability=(8, 9)):
        row, use = system.gpu_rows("cuda", torch.device("cuda:0"))
    assert "bfloat16" in row.value and "CUDA graphs" in use.value.partition("not used")[0] and "sm_89" in use.value
    with pretend("mps"):
        row, use, memory = system.gpu_rows("auto", torch.device("mps"))
    assert "int8 product" in use.value.partition("not used")[0] and memory.value.endswith(" GiB")


@pytest.mark.parametrize("has_header", [True, False])
def test_what_torch_compile_needs_on_a_gpu(monkeypatch, tmp_path, has_header):
    monkeypatch.setattr(compiling, "find_compiler", lambda: ["g++"])
    monkeypatch.setattr(system, "output_of", lambda *_: "g++ 12.2.0\nCopyright")
    monkeypatch.setattr(system, "version_of", lambda name: "3.7.1" if name == "triton" and has_header else None)
    monkeypatch.setattr(system.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    if has_header:
        (tmp_path / "Python.h").write_text("")
    assert [row.name for row in system.compilers_rows(CPU)] == ["C++ compiler"]
    rows = {row.name: row for row in system.compilers_rows(torch.device("cuda"))}
    assert rows["C++ compiler"].value == "g++ 12.2.0"
    assert rows["triton"].state == (OK if has_header else NOTE) and ("Python.h" in rows) != has_header


def test_the_limit_of_a_control_group_is_named(monkeypatch):
    monkeypatch.setattr(system.machine, "cpu_quota", lambda: 1.5)
    monkeypatch.setattr(instruction_sets, "cpu_flags", lambda: frozenset({"avx2", "fpu", "avx512f"}))
    cores, instructions = system.cores_rows()
    assert "limited to 1.5 by a control group" in cores.value and instructions.value == "avx512f avx2"


def test_folders_are_checked_without_making_them(tmp_path, monkeypatch):
    missing = tmp_path / "a" / "b"
    row = system.folder_row("cache", missing, "X_HOME")
    assert row.state == OK and "(not made yet)" in row.value and not missing.exists()
    monkeypatch.setattr(system.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    row = system.folder_row("cache", tmp_path, "X_HOME", 2**30)
    assert row.state == NOTE and "set X_HOME" in row.advice
    monkeypatch.setattr(system.os, "access", lambda *_: False)
    row = system.folder_row("cache", tmp_path, "X_HOME")
    assert row.state == FAILED and row.code == 7 and "set X_HOME" in row.advice


def test_the_token_is_never_shown(monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_averysecrettoken")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    (row,) = system.token_rows()
    assert row.value == "yes"
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    row, offline = system.token_rows()
    assert row.value.startswith("none") and offline.state == NOTE


def test_a_package_that_breaks_while_it_is_imported_is_named(monkeypatch, tmp_path):
    (tmp_path / "breaks.py").write_text("raise ValueError('numpy.dtype size changed\\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    assert system.try_import("breaks") == (None, "ValueError: numpy.dtype size changed")
    assert system.try_import("os") == (os, "")
    monkeypatch.setattr(system, "NEEDED", {"breaks": "breaks-package"})
    rows = {row.name: row for row in system.packages_rows()}
    assert rows["breaks-package"].state == FAILED and rows["packages"].state == OK


def test_the_checks_of_the_machine_import_no_torch():
    code = "import sys; from paligemma.programs import doctor; sys.exit('torch' in sys.modules)"
    assert system.output_of(sys.executable, "-c", f"import os; os.chdir({str(Path(__file__).parents[2])!r}); {code}") is not None
