"""Cores and memory, as the files of the system and torch report them. All hardware here is simulated."""

import gc
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from paligemma import machine
from paligemma.errors import DeviceError
from paligemma.machine import GIB

CPU = torch.device("cpu")


def write(root, path, text):
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(str(text))


# Cores


def test_quota_of_a_version_2_group_and_of_its_parents_count(tmp_path):
    write(tmp_path, "proc/self/cgroup", "0::/box/inner\n")
    write(tmp_path, "sys/fs/cgroup/box/cpu.max", "150000 100000\n")
    write(tmp_path, "sys/fs/cgroup/box/inner/cpu.max", "max 100000\n")
    assert machine.cpu_quota(tmp_path) == 1.5


def test_quota_inside_a_container_is_at_the_mount(tmp_path):
    write(tmp_path, "proc/self/cgroup", "0::/\n")
    write(tmp_path, "sys/fs/cgroup/cpu.max", "300000 100000\n")
    assert machine.cpu_quota(tmp_path) == 3.0


def test_quota_of_a_version_1_group(tmp_path):
    write(tmp_path, "proc/self/cgroup", "4:memory:/x\n3:cpuset:/\n1:cpu,cpuacct:/docker/abc\n0::/\n")
    write(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "200000\n")
    write(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    write(tmp_path, "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_quota_us", "-1\n")
    write(tmp_path, "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_period_us", "100000\n")
    assert machine.cpu_quota(tmp_path) == 2.0


def test_no_groups_no_quota(tmp_path):
    assert machine.cpu_quota(tmp_path) is None


def test_cores_are_cut_by_the_quota_but_never_to_none(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(machine, "cpu_quota", lambda: 2.5)
    assert machine.available_cores() == 2
    monkeypatch.setattr(machine, "cpu_quota", lambda: 0.5)
    assert machine.available_cores() == 1
    monkeypatch.setattr(machine, "cpu_quota", lambda: None)
    assert machine.available_cores() == 8


@pytest.mark.parametrize(("before", "after"), [("", "4"), ("2", "2"), ("64", "4"), ("0", "4"), ("many", "4")])
def test_omp_num_threads_is_kept_only_where_it_is_smaller(monkeypatch, before, after):
    monkeypatch.setattr(machine, "available_cores", lambda: 4)
    monkeypatch.setenv("OMP_NUM_THREADS", before)
    assert machine.use_cores() == int(after)
    assert os.environ["OMP_NUM_THREADS"] == after


@pytest.mark.parametrize(
    ("name", "value", "steps"), [("", "", machine.WAIT_STEPS), ("GOMP_SPINCOUNT", "7", "7"), ("OMP_WAIT_POLICY", "active", None)]
)
def test_threads_wait_briefly_unless_the_user_wants_otherwise(monkeypatch, tmp_path, name, value, steps):
    (tmp_path / "torch.py").write_text("import os\nraise ImportError(os.environ.get('GOMP_SPINCOUNT'))")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ.pop("GOMP_SPINCOUNT", None)
    os.environ.pop("OMP_WAIT_POLICY", None)
    os.environ.update({name: value} if name else {})
    with pytest.raises(ImportError) as caught:
        machine.check_torch()
    assert caught.value.args == (steps,)


def test_an_old_torch_is_refused(monkeypatch):
    machine.check_torch()
    monkeypatch.setattr(torch, "__version__", "2.8.1+cpu")
    with pytest.raises(DeviceError, match="torch 2.8.1.cpu is too old. 2.9 or newer is needed"):
        machine.check_torch()


def test_the_oldest_torch_is_the_one_in_pyproject():
    pyproject = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'"torch>=([\d.]+)"', pyproject)[1] == machine.OLDEST_TORCH


# Memory


@pytest.fixture
def root(tmp_path):
    """A folder that looks like the root of a system with 20 GiB of free memory."""
    write(tmp_path, "proc/meminfo", f"MemTotal: {24 * 2**20} kB\nMemAvailable: {20 * 2**20} kB\n")
    return tmp_path


def free(root) -> float:
    return machine.free_memory(CPU, root) / GIB


def test_free_memory_is_what_the_system_calls_available(root):
    assert free(root) == 20


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_control_group_counts_and_its_file_cache_is_free(root, version):
    mount, limit, use = "", "memory.max", "memory.current"
    if version == 1:
        mount, limit, use = "memory/", "memory.limit_in_bytes", "memory.usage_in_bytes"
    write(root, "proc/self/cgroup", "0::/a/b\n" if version == 2 else "3:cpu,cpuacct:/c\n5:memory:/a/b\n")
    write(root, f"sys/fs/cgroup/{mount}a/{limit}", 8 * GIB)
    write(root, f"sys/fs/cgroup/{mount}a/{use}", 5 * GIB)
    write(root, f"sys/fs/cgroup/{mount}a/memory.stat", f"anon {2 * GIB}\nactive_file {GIB}\ninactive_file {2 * GIB}\n")
    write(root, f"sys/fs/cgroup/{mount}a/b/{limit}", 10 * GIB if version == 1 else "max")
    write(root, f"sys/fs/cgroup/{mount}a/b/{use}", 3 * GIB)
    assert free(root) == 6  # 8 - (5 - 3) in group a; group b allows more, or has no limit


def test_no_limit_is_no_limit(root):
    write(root, "proc/self/cgroup", "0::/\n")
    assert free(root) == 20


def test_a_limit_of_the_process_counts(root, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (5 * GIB, 5 * GIB))
    write(root, "proc/self/statm", f"{GIB // os.sysconf('SC_PAGE_SIZE')} 1 1 1 0 1 0")
    assert free(root) == 4


def test_memory_that_torch_keeps_on_a_gpu_after_its_tensors_were_freed_is_free(monkeypatch):
    for name, value in {"mem_get_info": (1000, 9000), "memory_reserved": 700, "memory_allocated": 300}.items():
        monkeypatch.setattr(torch.cuda, name, lambda _device, value=value: value)
    assert machine.free_memory(torch.device("cuda")) == 1400
    for name, value in {"recommended_max_memory": 900, "driver_allocated_memory": 700, "current_allocated_memory": 300}.items():
        monkeypatch.setattr(torch.mps, name, lambda value=value: value)
    assert machine.free_memory(torch.device("mps")) == 600


def test_weights_that_do_not_fit_are_refused_with_both_numbers(monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda _: 3 * GIB)
    machine.require_memory(3 * GIB, torch.device("cpu"))
    with pytest.raises(DeviceError, match="weights take 3.50 GiB on cpu, which has 3.00 GiB free.*--quantize int8") as caught:
        machine.require_memory(7 * GIB // 2, torch.device("cpu"))
    assert caught.value.code == 6


def test_a_system_that_does_not_say_refuses_nothing(monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda _: None)
    machine.require_memory(2**60, torch.device("cpu"))


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")])
def test_running_out_of_memory_is_a_device_error_with_advice(error):
    with pytest.raises(DeviceError, match="memory ran out while testing.*--quantize int8"), machine.memory_errors("testing"):
        raise error


def test_torch_running_out_of_main_memory_is_one_too():
    with pytest.raises(DeviceError, match="memory ran out"), machine.memory_errors("testing"):
        torch.empty(2**60, dtype=torch.uint8)


def test_a_mapping_that_fails_is_one_too():
    with pytest.raises(DeviceError, match="memory ran out"), machine.memory_errors("testing"):
        raise RuntimeError("unable to mmap 6000000000 bytes from file </model.safetensors>: Cannot allocate memory (12)")


def test_other_errors_pass_through():
    with pytest.raises(RuntimeError, match="size mismatch"), machine.memory_errors("testing"):
        raise RuntimeError("size mismatch")


def test_peak_memory_and_its_text():
    assert machine.peak_memory(CPU) > 50e6
    assert machine.format_bytes(5.5e9) == "5.50 GB" and machine.format_bytes(3.21e6) == "3.2 MB"


def test_torch_is_imported_without_looking_for_garbage():
    code = "import gc, sys; from paligemma import machine; seen = []; gc.callbacks.append(lambda *_: seen.append(1)); "
    code += "machine.check_torch(); sys.exit(bool(seen) or not gc.isenabled() or gc.get_freeze_count() < 10_000)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_garbage_is_collected_again_if_torch_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ModuleNotFoundError):
        machine.check_torch()
    assert gc.isenabled()
