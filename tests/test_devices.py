"""Devices by name, and free memory as the system tells it. The machine of the tests need not have what is asked for."""

import os
import resource

import pytest
import torch

from paligemma import devices
from paligemma.errors import DeviceError, UsageError

GIB = 2**30


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU{index}")


def test_cpu_is_always_there():
    assert devices.find_device("cpu") == torch.device("cpu")
    assert devices.find_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.usefixtures("two_gpus")
def test_auto_takes_the_best_there_is(monkeypatch):
    assert devices.find_device("auto") == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices.find_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert devices.find_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:0 ", "meta", "", "cpu:0", "CUDA"])
def test_other_names_are_wrong_usage(name):
    with pytest.raises(UsageError, match="auto, cpu, cuda, cuda:N or mps is needed"):
        devices.find_device(name)


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_cuda_on_a_cpu_build_is_told_with_the_line_that_installs_it(monkeypatch, name):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(DeviceError, match=f"device {name} is not there.*is a CPU build.*pip install .*torch==") as caught:
        devices.find_device(name)
    assert caught.value.code == 6


def test_cuda_without_a_driver_is_told_in_the_words_of_torch(monkeypatch):
    def fail():
        raise RuntimeError("The NVIDIA driver on your system\nis too old (found version 11040).")

    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", fail)
    with pytest.raises(DeviceError, match=r"driver on your system is too old \(found version 11040\)\..*nvidia-smi"):
        devices.find_device("cuda")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    with pytest.raises(DeviceError, match="torch finds no GPU"):
        devices.find_device("cuda")


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_number_that_is_not_there_is_told_with_those_that_are():
    assert devices.find_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(DeviceError, match=r"device cuda:7 is not there. This machine has cuda:0 \(GPU0\), cuda:1 \(GPU1\)"):
        devices.find_device("cuda:7")


def test_mps_elsewhere_than_on_a_mac_is_refused(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="mps is not there.*Apple"):
        devices.find_device("mps")


def write(root, path: str, text: object) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(str(text))


@pytest.fixture
def root(tmp_path):
    """A machine with 20 GiB free, in files."""
    write(tmp_path, "proc/meminfo", f"MemTotal: {24 * 2**20} kB\nMemAvailable: {20 * 2**20} kB\n")
    return tmp_path


def free(root) -> float:
    return devices.free_memory(torch.device("cpu"), root) / GIB


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
    assert free(root) == 6  # 8 - (5 - 3) in group a; group b allows more, or anything


def test_no_limit_is_no_limit(root):
    write(root, "proc/self/cgroup", "0::/\n")
    assert free(root) == 20


def test_a_limit_of_the_process_counts(root, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (5 * GIB, 5 * GIB))
    write(root, "proc/self/statm", f"{GIB // os.sysconf('SC_PAGE_SIZE')} 1 1 1 0 1 0")
    assert free(root) == 4


def test_weights_that_do_not_fit_are_refused_with_both_numbers(monkeypatch):
    monkeypatch.setattr(devices, "free_memory", lambda _: 3 * GIB)
    devices.require_memory(3 * GIB, torch.device("cpu"))
    with pytest.raises(DeviceError, match="weights take 3.50 GiB on cpu, which has 3.00 GiB free.*--quantize int8") as caught:
        devices.require_memory(7 * GIB // 2, torch.device("cpu"))
    assert caught.value.code == 6


def test_a_system_that_does_not_say_refuses_nothing(monkeypatch):
    monkeypatch.setattr(devices, "free_memory", lambda _: None)
    devices.require_memory(2**60, torch.device("cpu"))
