"""The cores that a process really has, and the ceilings that --verbose prints."""

import os

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from paligemma import machine
from paligemma.errors import DeviceError
from tests.tiny import FAMILIES, IMAGE, PATCHES, make_model, make_pixels

CPU = torch.device("cpu")


def write(root, path, text):
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


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


def test_an_old_torch_is_refused(monkeypatch):
    machine.check_torch()
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(DeviceError, match="torch 2.5.1.cpu is too old. 2.6 or newer is needed"):
        machine.check_torch()


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


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_products_are_those_that_torch_counts(family):
    model = make_model(family)
    ids = torch.cat((torch.full((1, 2 * PATCHES), IMAGE), torch.full((1, 5), 3)), 1)
    # The counter does not know the fused attention of CPUs, only the one written out.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        cache = model.new_cache(1, ids.shape[1])
        model.prefill(cache, ids, make_pixels(2), torch.ones_like(ids), torch.zeros_like(ids))
    assert machine.prefill_products(model.config, 2, ids.shape[1]) == counter.get_total_flops() / 2


def test_ceilings_are_plausible_numbers():
    assert 1e8 < machine.read_bandwidth(CPU) < 1e13
    assert 1e8 < machine.matrix_rate(CPU, torch.bfloat16) < 1e15
    assert machine.peak_memory(CPU) > 50e6
    assert machine.size(5.5e9) == "5.50 GB" and machine.size(3.21e6) == "3.2 MB"
