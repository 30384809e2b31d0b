"""Which device is taken, what a user is told, and what is used on each kind of card. All hardware here is simulated."""

import logging
import platform
import sys

import pytest
import torch

from paligemma import devices
from paligemma.checkup.rows import failed_by
from paligemma.devices import Hardware
from paligemma.errors import DeviceError, UsageError, is_gpu_error

NVIDIA_HARDWARE, NVIDIA_SMI = devices.nvidia_hardware, devices.nvidia_smi.__wrapped__  # no_gpu and the cache stand in front
CPU = torch.device("cpu")
CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]  # PyTorch's wheel for CUDA 13.0, Linux x86-64
CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
ARM = ["sm_80", "sm_90", "sm_100", "sm_110", "sm_120", "compute_120"]  # the wheel for CUDA 13.0, Linux arm64
CARDS = {
    "Tesla P100": (6, 0), "Tesla V100": (7, 0), "Tesla T4": (7, 5), "A100": (8, 0), "RTX 3090": (8, 6), "Orin": (8, 7),
    "RTX 4090": (8, 9), "H100": (9, 0), "B200": (10, 0), "RTX 5090": (12, 0),
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """A machine without a GPU, with a torch for CUDA 13, on Linux; and no message counts as written already."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "init", fails("Found no driver."))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(devices, "nvidia_hardware", lambda *_: None)
    monkeypatch.setattr(devices, "has_triton", lambda: True)
    for variable in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(variable, raising=False)
    devices.warn_once.cache_clear()


def fails(text):
    def fail():
        raise RuntimeError(text)

    return fail


@pytest.fixture
def put_cards(monkeypatch):
    """A function that makes torch find these cards."""

    def put(*names, architectures=CU130):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: architectures)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda card=0: names[getattr(card, "index", card) or 0])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda card=0: CARDS[torch.cuda.get_device_name(card)])
        monkeypatch.setattr(devices, "nvidia_hardware", lambda *_: Hardware(580, tuple((name, CARDS[name]) for name in names)))

    return put


# Names


def test_cpu_is_always_there():
    assert devices.find_device("cpu") == devices.find_device(CPU) == CPU


def test_auto_takes_the_best_there_is(monkeypatch, put_cards, caplog):
    assert devices.find_device("auto") == CPU
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices.find_device("auto") == devices.find_device(torch.device("mps:0")) == torch.device("mps")
    put_cards("A100", "A100")
    assert devices.find_device("auto") == torch.device("cuda")
    assert not caplog.records


@pytest.mark.parametrize(
    "name",
    ["gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:0 ", "meta", "", "cpu:0", "CUDA", "cuda,cuda:1", "cuda:0,cpu"],
)
def test_other_names_are_wrong_usage(name):
    with pytest.raises(UsageError, match="auto, cpu, mps, cuda, cuda:N or several cards such as cuda:0,cuda:1") as caught:
        devices.find_device(name)
    assert caught.value.code == 2


def test_several_cards_are_found_and_each_is_checked(put_cards):
    put_cards("A100", "A100")
    assert devices.find_devices("cuda:1,cuda:0") == [torch.device("cuda:1"), torch.device("cuda:0")]
    assert devices.find_device("cuda:1,cuda:0") == torch.device("cuda:1")
    with pytest.raises(DeviceError, match="device cuda:2 is not available"):
        devices.find_devices("cuda:0,cuda:2")


def test_a_gpu_number_that_is_not_there_is_told_with_those_that_are(put_cards):
    put_cards("A100", "RTX 3090")
    assert devices.find_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(DeviceError, match=r"device cuda:7 is not .* This machine has cuda:0 \(A100\), cuda:1 \(RTX 3090\)"):
        devices.find_device("cuda:7")


def test_mps_elsewhere_than_on_a_mac_is_refused():
    with pytest.raises(DeviceError, match="mps is not available.*Apple"):
        devices.find_device("mps")


@pytest.mark.parametrize("enter", [lambda: torch.device("meta"), lambda: torch.utils._device.DeviceContext(torch.device("meta"))])
def test_another_default_device_of_torch_is_refused(enter):
    """Tensors that belong on the CPU would be made there: loading would fail in the middle of a file."""
    with enter(), pytest.raises(UsageError, match="torch's default device is meta, but cpu is needed. Remove") as caught:
        devices.find_device("cpu")
    assert caught.value.code == 2
    devices.find_device("cpu")


# What the driver says about the cards

DRIVER = "proc/driver/nvidia/version"


@pytest.mark.parametrize(
    ("smi", "files", "hardware"),
    [
        ("", {}, None),
        ("", {"dev/dxg": ""}, None),  # WSL on a machine without an NVIDIA card
        ("Tesla T4, 550.54.15, 7.5\n", {}, Hardware(550, (("Tesla T4", (7, 5)),))),
        ("NVIDIA GeForce RTX 5090, 581.15, 12.0\nNVIDIA A100, SXM, 581.15, 8.0\n", {},
         Hardware(581, (("NVIDIA GeForce RTX 5090", (12, 0)), ("NVIDIA A100, SXM", (8, 0))))),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", {}, None),
        ("", {DRIVER: "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01\nGCC version: 12\n"}, Hardware(535)),
        ("", {DRIVER: "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  580.65.06  Release Build\n"}, Hardware(580)),
        ("", {"dev/nvidia0": ""}, Hardware()),
        ("", {"etc/nv_tegra_release": "# R36 (release)", "dev/nvidia0": ""}, Hardware(is_jetson=True)),
    ],
)  # fmt: skip
def test_what_the_driver_and_the_system_say_about_the_cards(monkeypatch, tmp_path, smi, files, hardware):
    monkeypatch.setattr(devices, "nvidia_smi", lambda _: smi)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert NVIDIA_HARDWARE(tmp_path) == hardware


@pytest.mark.parametrize("place", ["bin/nvidia-smi", "usr/lib/wsl/lib/nvidia-smi"])
def test_the_program_of_the_driver_is_asked_once_and_its_failures_are_silent(monkeypatch, tmp_path, place):
    program = tmp_path / place
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert NVIDIA_SMI(tmp_path) == ""  # there is none
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\necho \"Card, 580.1, 9.0 $*\"\n")
    program.chmod(0o755)
    assert NVIDIA_SMI(tmp_path) == "Card, 580.1, 9.0 --query-gpu=name,driver_version,compute_cap --format=csv,noheader\n"
    program.write_text("#!/bin/sh\necho no devices were found\nexit 6\n")
    assert NVIDIA_SMI(tmp_path) == ""
    program.write_text("not a program")
    assert NVIDIA_SMI(tmp_path) == ""


# Cards without kernels


@pytest.mark.parametrize(
    ("capability", "architectures", "is_fit"),
    [
        ((7, 5), CU130, True), ((7, 0), CU130, False), ((6, 1), CU126, True), ((6, 0), CU130, False), ((8, 9), CU130, True),
        ((8, 7), CU130, False), ((8, 7), ARM, False), ((8, 7), ["sm_87"], True), ((12, 1), ARM, True), ((12, 0), CU126, False),
        ((13, 0), CU130, True), ((10, 3), ["sm_100"], True), ((9, 0), ["sm_90a"], True), ((10, 3), ["sm_100a"], False),
        ((7, 5), ["compute_70"], True), ((7, 0), ["compute_75"], False), ((6, 0), [], True), ((12, 0), ["sm_120f"], True),
    ],
)  # fmt: skip
def test_a_build_runs_on_its_architectures_on_later_minor_ones_and_through_ptx(capability, architectures, is_fit):
    assert devices.has_kernels(capability, architectures) == is_fit


@pytest.mark.parametrize("name", ["Tesla P100", "Tesla V100"])
def test_a_card_that_the_wheel_was_not_built_for_is_refused_before_loading_and_skipped_by_auto(put_cards, caplog, name):
    put_cards(name)
    command = r"pip install torch==2.13.0\+cu126 --index-url https://download.pytorch.org/whl/cu126"
    with pytest.raises(DeviceError, match=rf"cuda:0 \({name}, sm_[67]0\) cannot.*kernels for sm_75.*{command}") as caught:
        devices.find_device("cuda")
    assert caught.value.code == 6
    for _ in range(2):
        assert devices.find_device("auto") == CPU
    assert [record.getMessage() for record in caplog.records] == [caught.value.message]
    put_cards(name, architectures=CU126)
    assert devices.find_device("auto") == torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "processor", "advice"),
    [
        ("Orin", "aarch64", f"Install NVIDIA's build for Jetson: {devices.JETSON_WHEELS}"),
        ("Tesla T4", "aarch64", "No build of torch has kernels for it."),  # Amazon's g5g machines
        ("Tesla T4", "x86_64", "Run: pip install torch==2.13.0+cu130 --index-url https://download.pytorch.org/whl/cu130"),
    ],
)
def test_the_advice_depends_on_the_processor(monkeypatch, put_cards, name, processor, advice):
    put_cards(name, architectures=ARM)
    monkeypatch.setattr(platform, "machine", lambda: processor)
    with pytest.raises(DeviceError) as caught:
        devices.find_device("cuda")
    assert caught.value.message.endswith(advice)


def test_auto_skips_an_old_card_beside_a_new_one(put_cards, caplog):
    put_cards("Tesla P100", "RTX 3090")
    assert devices.find_device("auto") == torch.device("cuda:1")
    assert "cuda:0 (Tesla P100, sm_60) cannot be used" in caplog.text
    assert devices.usable_cards() == [1]


# A GPU that torch does not find


IS_CPU_BUILD = "is a CPU build. "
RUN_CU130 = "Run: pip install torch==2.13.0+cu130 --index-url https://download.pytorch.org/whl/cu130"
RUN_CU126 = "Run: pip install torch==2.13.0+cu126 --index-url https://download.pytorch.org/whl/cu126"
UPDATE = "Update the NVIDIA driver to version {} or newer."


@pytest.mark.parametrize(
    ("version", "hardware", "told"),
    [
        # A CPU build, which is what PyPI has for Windows.
        ("2.13.0+cpu", Hardware(581, (("RTX 4090", (8, 9)),)), IS_CPU_BUILD + RUN_CU130),
        ("2.13.0+cpu", Hardware(551, (("RTX 3060", (8, 6)),)), IS_CPU_BUILD + RUN_CU126),
        ("2.13.0+cpu", Hardware(581, (("GTX 1080", (6, 1)),)), IS_CPU_BUILD + RUN_CU126),
        ("2.13.0+cpu", Hardware(610, (("A card of 2028", (13, 0)),)), IS_CPU_BUILD + RUN_CU130),
        ("2.13.0+cpu", Hardware(581), IS_CPU_BUILD + RUN_CU130),
        ("2.13.0+cpu", Hardware(), IS_CPU_BUILD + RUN_CU130),
        ("2.15.0+cpu", Hardware(550, (("A100", (8, 0)),)), IS_CPU_BUILD + RUN_CU126),
        ("2.13.0+cpu", Hardware(is_jetson=True), IS_CPU_BUILD + f"Install NVIDIA's build for Jetson: {devices.JETSON_WHEELS}"),
        # Drivers that are older than the wheel's CUDA.
        ("2.13.0+cu130", Hardware(550, (("Tesla T4", (7, 5)),)), "version 580 or newer, and the driver is 550. " + RUN_CU126),
        ("2.13.0+cu130", Hardware(575, (("RTX 5090", (12, 0)),)), "the driver is 575. " + UPDATE.format(580)),
        ("2.13.0+cu130", Hardware(470, (("Tesla T4", (7, 5)),)), "the driver is 470. " + UPDATE.format(580)),
        ("2.13.0+cu126", Hardware(470, (("Tesla P100", (6, 0)),)), "525 or newer, and the driver is 470. " + UPDATE.format(525)),
        # Anything else is told in the words of torch.
        ("2.13.0+cu130", Hardware(580, (("A100", (8, 0)),)), "Found no driver. See what nvidia-smi prints."),
    ],
)
def test_a_gpu_that_is_not_found_is_told_with_the_reason_and_the_command(monkeypatch, caplog, version, hardware, told):
    monkeypatch.setattr(torch, "__version__", version)
    cuda = version.partition("+cu")[2]
    monkeypatch.setattr(torch.version, "cuda", f"{cuda[:2]}.{cuda[2:]}" if cuda else None)
    monkeypatch.setattr(devices, "nvidia_hardware", lambda *_: hardware)
    for _ in range(2):
        assert devices.find_device("auto") == CPU
    (record,) = caplog.records  # one line, however often a program asks
    card = f" ({hardware.cards[0][0]})" if hardware.cards else ""
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"The CPU is used although this machine has an NVIDIA GPU{card}. ")
    assert record.getMessage().endswith(told)
    with pytest.raises(DeviceError) as caught:
        devices.find_device("cuda:0")
    assert caught.value.code == 6
    command = next(part for part in ("Run: ", "Install ", "Update ", "See ") if part in told)
    told = told.replace(command, f"Take --device cpu, or fix this. {command}")
    assert caught.value.message.startswith("device cuda:0 is not available. ") and caught.value.message.endswith(told)
    devices.find_device("cpu")
    assert len(caplog.records) == 1  # nothing is said to those who ask for the CPU


@pytest.mark.parametrize("value", ["", "-1"])
def test_a_variable_that_hides_the_gpus_is_named(monkeypatch, caplog, value):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    monkeypatch.setattr(devices, "nvidia_hardware", lambda *_: Hardware(580))
    assert devices.find_device("auto") == CPU
    assert f"CUDA_VISIBLE_DEVICES is {value!r}, which hides all GPUs. Remove it: unset CUDA_VISIBLE_DEVICES" in caplog.text


def test_the_cpu_of_a_machine_without_a_gpu_needs_no_word(caplog):
    assert devices.find_device("auto") == CPU
    assert not caplog.records
    with pytest.raises(DeviceError) as caught:
        devices.find_device("cuda")
    assert "No NVIDIA GPU was found on this machine. Take --device cpu; if there is a GPU, " in caught.value.message
    # The last sentence, which doctor prints as what to do, does not only say how to install a torch for a GPU.
    assert failed_by("device", caught.value).advice.startswith("Take --device cpu; if there is a GPU, ")


def test_the_words_of_torch_are_on_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "init", fails("CUDA unknown error\n- this may be due to  anything"))
    with pytest.raises(DeviceError, match=r"\. CUDA unknown error - this may be due to anything"):
        devices.find_device("cuda")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    with pytest.raises(DeviceError, match="torch finds no GPU"):
        devices.find_device("cuda")


def test_an_amd_gpu_that_is_not_found_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "7.2")
    assert devices.missed_gpu(tmp_path) is None
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/kfd").touch()
    assert devices.missed_gpu(tmp_path).startswith("The CPU is used although this machine has an AMD GPU.")
    with pytest.raises(DeviceError) as caught:
        devices.find_device("cuda")
    assert "NVIDIA GPU" not in caught.value.message and caught.value.message.endswith("See what rocminfo prints.")
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "")
    assert devices.missed_gpu(tmp_path).endswith("which hides all GPUs. Remove it: unset HIP_VISIBLE_DEVICES")


def test_a_mac_whose_gpu_is_not_used_is_told(monkeypatch, caplog):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(platform, "mac_ver", lambda: ("13.7.4", ("", "", ""), "arm64"))
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    assert devices.find_device("auto") == CPU
    assert caplog.messages == ["The CPU is used although this Mac has a GPU. torch needs macOS 14 or newer for it. Update macOS."]
    monkeypatch.setattr(platform, "mac_ver", lambda: ("15.1", ("", "", ""), "arm64"))
    assert devices.missed_gpu() is None  # a virtual machine without a GPU
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: False)
    assert devices.missed_gpu().endswith("was built without MPS. Run: pip install --force-reinstall torch==2.13.0")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert devices.missed_gpu() is None


def test_what_torch_raises_when_a_gpu_fails_is_known():
    assert is_gpu_error(torch.AcceleratorError("CUDA error: unspecified launch failure"))
    assert not is_gpu_error(RuntimeError("CUDA error"))


# The profile


@pytest.mark.parametrize(
    ("name", "kind", "dtype", "records", "flex", "triton", "int4pack"),
    [
        ("Tesla P100", "sm_50", torch.float32, False, None, False, False),
        ("Tesla V100", "sm_50", torch.float32, False, None, False, False),
        ("Tesla T4", "sm_75", torch.float32, True, None, True, False),
        ("A100", "sm_80", torch.bfloat16, True, {}, True, True),
        ("RTX 3090", "sm_86", torch.bfloat16, True, devices.SMALL_BLOCKS, True, True),
        ("Orin", "sm_80", torch.bfloat16, True, {}, True, True),
        ("RTX 4090", "sm_86", torch.bfloat16, True, devices.SMALL_BLOCKS, True, True),
        ("H100", "sm_80", torch.bfloat16, True, {}, True, True),
        ("B200", "sm_80", torch.bfloat16, True, {}, True, True),
        ("RTX 5090", "sm_86", torch.bfloat16, True, devices.SMALL_BLOCKS, True, True),
    ],
)
def test_what_is_used_on_each_card(monkeypatch, put_cards, name, kind, dtype, records, flex, triton, int4pack):
    put_cards(name)
    found = devices.profile(torch.device("cuda"))
    assert found.kind == devices.PROFILES[kind].kind and found.name.startswith(name)
    assert found.dtypes == (dtype, torch.float16)
    assert (found.records, found.flex_options, found.triton, found.int4pack) == (records, flex, triton, int4pack)
    assert not found.int8pack
    monkeypatch.setattr(devices, "has_triton", lambda: False)  # Windows, or no C compiler
    found = devices.profile(torch.device("cuda"))
    assert not found.triton and found.flex_options is None and found.records == records and found.int4pack == int4pack
    monkeypatch.setattr(torch.version, "hip", "7.2")
    found = devices.profile(torch.device("cuda"))
    assert found.dtypes[0] == torch.bfloat16
    assert not (found.records or found.triton or found.int4pack or found.int8pack) and found.flex_options is None


@pytest.mark.parametrize("name", CARDS)
def test_bfloat16_comes_first_exactly_where_torch_says_that_it_is_not_emulated(monkeypatch, put_cards, name):
    put_cards(name)
    properties = type("Properties", (), {"major": CARDS[name][0]})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
    assert (torch.bfloat16 in devices.profile(torch.device("cuda")).dtypes) == is_fast


def test_the_profiles_of_the_cpu_and_of_a_mac():
    cpu, mac = (devices.profile(torch.device(name)) for name in ("cpu", "mps"))
    assert cpu.name == "CPU" and cpu.flex_options is None and not (cpu.records or cpu.triton or cpu.int4pack or cpu.int8pack)
    assert mac.dtypes == (torch.bfloat16, torch.float16) and mac.int4pack and mac.int8pack
    assert mac.flex_options is None and not (mac.records or mac.triton)


def test_the_summary_names_every_way(put_cards):
    put_cards("Tesla T4")
    assert devices.profile(torch.device("cuda")).summary == (
        "Tesla T4 (sm_75), NVIDIA Turing: uses CUDA graphs, Triton kernels; "
        "does not use flex_attention, torch's int4 product, torch's int8 product."
    )


def test_to_device_leaves_a_tensor_that_is_there():
    tensor = torch.zeros(3)
    assert devices.to_device(tensor, CPU) is tensor
