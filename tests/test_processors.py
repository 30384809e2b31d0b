"""What depends on the processor, once more for each instruction set that this machine has."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from paligemma.layers import compiling
from tests import processors

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", processors.here())
def test_marked_tests_hold_on_each_instruction_set(name):
    files = [f"tests/{file}.py" for file in processors.FILES]
    command = [sys.executable, "-m", "pytest", *files, "-m", "processor", "-p", "no:cacheprovider"]
    environment = os.environ | {"TEST_PROCESSOR": name} | processors.environment(name)
    environment = {key: value for key, value in environment.items() if not key.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert f"tested as {name}" in done.stdout


@pytest.mark.parametrize("instructions", processors.ON_X86, ids=lambda each: each.name)
def test_the_source_compiles_for_each_instruction_set_whatever_this_processor_has(instructions, tmp_path):
    compiler = compiling.find_compiler()
    if not compiler or platform.machine() not in ("x86_64", "AMD64"):
        return
    flags = [flag for flag in processors.QUICK_FLAGS if flag != "-shared"]
    command = [*compiler, *flags, *instructions.flags, "-c", str(compiling.SOURCE)]
    done = subprocess.run([*command, "-o", str(tmp_path / "kernels.o")], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("march", ["armv8-a", "armv8.6-a+bf16+i8mm"])
def test_the_source_compiles_for_arm_where_there_is_a_compiler_for_it(march, tmp_path):
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        return
    flags = [flag for flag in processors.QUICK_FLAGS if flag != "-shared"]
    command = [compiler, *flags, f"-march={march}", "-c", str(compiling.SOURCE), "-o", str(tmp_path / "kernels.o")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
