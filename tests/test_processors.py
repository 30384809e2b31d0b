"""What depends on the processor, once more for each class of processors that this machine can stand in for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from paligemma.layers import compiling, fast_cpu
from tests import processors

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", processors.here())
def test_marked_tests_hold_on_each_class(name):
    files = [f"tests/{file}.py" for file in processors.FILES]
    command = [sys.executable, "-m", "pytest", *files, "-m", "processor", "-p", "no:cacheprovider"]
    environment = os.environ | {"TEST_PROCESSOR": name} | processors.CLASSES[name].environment
    environment = {key: value for key, value in environment.items() if not key.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert f"tested as {name}" in done.stdout


@pytest.mark.parametrize(
    ("flags", "instructions"),
    [
        ({"avx2", "fma"}, "nothing"),
        ({"avx512f", "avx512_vnni"}, "nothing"),
        ({"avx512f", "avx512_bf16"}, "pairs"),
        ({"avx512f", "avx512_bf16", "amx_bf16", "amx_tile"}, "matrices"),
        ({"asimd", "bf16"}, "matrices"),  # Arm
        (set(), "matrices"),  # no Linux: torch knows best
    ],
)
def test_what_a_processor_multiplies_is_read_from_its_flags(flags, instructions, monkeypatch):
    monkeypatch.setattr(compiling, "cpu_flags", lambda: frozenset(flags))
    assert fast_cpu.bf16_instructions.__wrapped__() == instructions
    assert all(processor.says in fast_cpu.BF16_ROWS for processor in processors.CLASSES.values())
