"""Which device a model runs on, and how each kind of device is used.

`find_device` turns a name ("auto", "cuda:1") into a device, and says why a GPU is not used. `profile` says what the device
computes fast and which optimisations are used on it; `PROFILES` is the table of these choices. (Choices that are the same for all
CUDA devices, or for all MPS devices, are made by checkpoints/weights.suit_device, which replaces modules.) This code has not run
on a GPU: the table follows the documents of NVIDIA, AMD, Apple and PyTorch, see docs/gpu.md.

torch is imported inside the functions, because a wrong flag should be answered before the slow import.
Sources: CUDA C++ Programming Guide (compute capabilities, shared memory), RELEASE.md of PyTorch 2.9 to 2.14 (for which
architectures a wheel has kernels), CUDA Toolkit Release Notes (the oldest driver of a CUDA version).
Checked in tests/test_devices.py.
"""

import functools
import importlib.util
import logging
import os
import platform
import re
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from paligemma.errors import DeviceError, UsageError

if TYPE_CHECKING:
    import torch

NAMES = re.compile(r"auto|cpu|mps|cuda(:\d{1,3})?|cuda:\d{1,3}(,cuda:\d{1,3})+")
NEEDED = "auto, cpu, mps, cuda, cuda:N or several cards such as cuda:0,cuda:1"
GRAPHS = ("auto", "off", "record", "compile")  # modes of gpu/graphs.py
GRAPHS_VARIABLE = "PALIGEMMA_GRAPHS"

log = logging.getLogger(__name__)

Capability = tuple[int, int]  # of an NVIDIA card: (8, 6) is written sm_86 in the names of architectures


@functools.cache
def warn_once(text: str) -> None:
    log.warning(text)


# What is used on which kind of device


@dataclass(frozen=True)
class Profile:
    """How a device is used.

    Attributes:
        kind: the kind of device in words, such as "NVIDIA Turing".
        name: the name of the device itself, such as "NVIDIA A100-SXM4-80GB (sm_80)".
        dtype_names: the dtypes that the device computes fast and that a model may be loaded in, best first.
        records: whether decoding steps are recorded as CUDA graphs.
        flex_options: kernel_options of torch's flex_attention; None = flex_attention is not used.
        triton: whether kernels written in Triton are used. This also needs the package triton and a C compiler.
        int4pack, int8pack: whether torch._weight_int4pack_mm and torch._weight_int8pack_mm are used for quantised weights.
    """

    kind: str
    dtype_names: tuple[str, ...]
    records: bool = False
    flex_options: dict[str, int] | None = None
    triton: bool = False
    int4pack: bool = False
    int8pack: bool = False
    name: str = field(default="", kw_only=True)

    @property
    def summary(self) -> str:
        """The name of the device, and which optimisations are used on it: for --verbose and `paligemma doctor`."""
        ways = {
            "CUDA graphs": self.records,
            "flex_attention": self.flex_options is not None,
            "Triton kernels": self.triton,
            "torch's int4 product": self.int4pack,
            "torch's int8 product": self.int8pack,
        }
        used = ", ".join(way for way, is_used in ways.items() if is_used) or "none"
        unused = ", ".join(way for way, is_used in ways.items() if not is_used)
        return f"{self.name}, {self.kind}: uses {used}; does not use {unused}."

    @property
    def dtypes(self) -> tuple["torch.dtype", ...]:
        import torch

        return tuple(getattr(torch, name) for name in self.dtype_names)


FLOAT32_FIRST, BFLOAT16_FIRST = ("float32", "float16"), ("bfloat16", "float16")
# The block sizes that flex_attention chooses at head_dim 256 take 144 to 208 KB of shared memory. Some cards have only 99 KB.
SMALL_BLOCKS = {"BLOCK_M": 32, "BLOCK_N": 32, "num_stages": 1}
# Before sm_80, bfloat16 is emulated, which is slow. float32 comes first there, because it cannot overflow.
PROFILES = {  # dtypes, CUDA graphs, flex_attention, Triton, torch's int4 product, torch's int8 product
    "cpu": Profile("CPU", ("float32", "bfloat16")),
    "mps": Profile("Apple GPU", BFLOAT16_FIRST, False, None, False, True, True),
    "rocm": Profile("AMD GPU", BFLOAT16_FIRST),  # recording steps crashes the process on some AMD GPUs (pytorch#155720)
    "sm_50": Profile("NVIDIA before Turing", FLOAT32_FIRST),
    "sm_75": Profile("NVIDIA Turing", FLOAT32_FIRST, True, None, True),
    "sm_80": Profile("NVIDIA, 163 KB or more of shared memory", BFLOAT16_FIRST, True, {}, True, True),
    "sm_86": Profile("NVIDIA, 99 KB of shared memory", BFLOAT16_FIRST, True, SMALL_BLOCKS, True, True),
}


def kind_of_card(capability: Capability) -> str:
    """The key in PROFILES of an NVIDIA card."""
    if capability < (7, 5):
        return "sm_50"
    if capability < (8, 0):
        return "sm_75"
    return "sm_86" if capability in ((8, 6), (8, 9)) or capability[0] == 12 else "sm_80"


def sm(capability: Capability) -> str:
    return f"sm_{capability[0]}{capability[1]}"


def has_triton() -> bool:
    """Whether Triton can build a kernel here: it needs its package, and a C compiler for the function that starts the kernel."""
    compilers = (os.environ.get("CC", ""), "gcc", "clang", "cc")
    return importlib.util.find_spec("triton") is not None and any(name and shutil.which(name) for name in compilers)


def profile(device: "torch.device") -> Profile:
    """How this device is used: a row of PROFILES with the name of the device, and without Triton where it is not installed."""
    import torch

    if device.type == "mps":
        return replace(PROFILES["mps"], name="MPS")
    if device.type != "cuda":
        return replace(PROFILES["cpu"], name="CPU")
    name = torch.cuda.get_device_name(device)
    if torch.version.hip is not None:
        return replace(PROFILES["rocm"], name=name)
    capability = torch.cuda.get_device_capability(device)
    found = replace(PROFILES[kind_of_card(capability)], name=f"{name} ({sm(capability)})")
    return found if has_triton() else replace(found, triton=False, flex_options=None)


def graphs_mode(mode: str | None = None) -> str:
    """How decoding steps run on CUDA: `mode` if it is given, else the value of the variable PALIGEMMA_GRAPHS, else "auto".

    Raises: UsageError for any value that is not one of GRAPHS.
    """
    name, value = ("graphs", mode) if mode is not None else (GRAPHS_VARIABLE, os.environ.get(GRAPHS_VARIABLE) or "auto")
    if value not in GRAPHS:
        raise UsageError(f"{name} is {value!r}. Take auto, off, record or compile.")
    return value


def dtypes_to_try(device: "torch.device", stored: "torch.dtype") -> tuple["torch.dtype", ...]:
    """The dtypes that a model may be loaded in if the user names none, best first.

    On the CPU this is the stored dtype only; on a GPU, the dtypes that it computes fast, and the stored one first if it is fast.
    A model that is stored in float32, as PaliGemma 1 is, is loaded in bfloat16 on a card that computes it fast: this takes half
    the memory and about half the time per token.
    """
    fast = profile(device).dtypes
    if device.type == "cpu":
        return (stored,)
    return (stored, *(dtype for dtype in fast if dtype != stored)) if stored in fast else fast


def use_exact_float32() -> None:
    """Turns TF32 off, so that matrix products in float32 do not round their inputs.

    The programs call this, because NVIDIA's containers set a variable that makes torch compute in TF32. The library changes no
    setting of torch for this, so a caller of `paligemma.load` may choose TF32 for speed.
    """
    import torch

    if torch.get_float32_matmul_precision() != "highest":
        torch.set_float32_matmul_precision("highest")


def to_device(tensor: "torch.Tensor", device: "torch.device") -> "torch.Tensor":
    """The tensor on the device. The CPU does not wait for a copy to a CUDA device; later operations on the device do."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        # A copy in pinned memory is sent, so the caller may change the tensor immediately. torch frees the copy afterwards.
        return tensor.contiguous().pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


# NVIDIA cards, drivers and wheels


@dataclass(frozen=True)
class Wheel:
    """A build of torch on download.pytorch.org.

    Attributes:
        index: the folder of the package index.
        driver: major version of the oldest NVIDIA driver that it works with.
        oldest, newest: the architectures for which it has kernels.
    """

    index: str
    driver: int
    oldest: Capability
    newest: Capability


WHEELS = (
    Wheel("cu130", 580, (7, 5), (99, 9)),  # contains PTX, which also runs on future cards
    Wheel("cu126", 525, (5, 0), (9, 0)),
)
FIRST_WITHOUT_CUDA_12 = "2.15"  # this version of torch and later ones have no cu126
TESTED_TORCH = "2.13.0"  # as in requirements.txt
JETSON = ((5, 3), (6, 2), (7, 2), (8, 7))  # boards that run code for their own architecture only
JETSON_WHEELS = "https://docs.nvidia.com/deeplearning/frameworks/install-pytorch-jetson-platform"


@dataclass(frozen=True)
class Hardware:
    """The NVIDIA GPUs of this machine as the driver reports them, whether torch can use them or not.

    Attributes:
        driver: major version of the driver; None if unknown.
        cards: name and capability of each; empty if the driver does not say.
        is_jetson: an NVIDIA Jetson board.
    """

    driver: int | None = None
    cards: tuple[tuple[str, Capability], ...] = ()
    is_jetson: bool = False


@functools.cache
def nvidia_smi(root: Path = Path("/")) -> str:
    """A line "name, driver, capability" per NVIDIA GPU; "" if there is no program nvidia-smi or it finds no GPU."""
    import subprocess  # imported only when needed

    program = shutil.which("nvidia-smi") or root / "usr/lib/wsl/lib/nvidia-smi"  # Windows' driver, as seen from WSL
    query = [str(program), "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    return ""


def nvidia_hardware(root: Path = Path("/")) -> Hardware | None:
    """The NVIDIA GPUs of this machine; None if it has none.

    Args:
        root: the root of the file system; tests pass another folder.
    """
    lines = re.findall(r"^(.+?), *(\d+)[\d.]*, *(\d+)\.(\d+)$", nvidia_smi(root), re.MULTILINE)
    if lines:
        return Hardware(int(lines[0][1]), tuple((name, (int(major), int(minor))) for name, _, major, minor in lines))
    if os.path.exists(root / "etc/nv_tegra_release"):
        return Hardware(is_jetson=True)
    with suppress(OSError):
        version = re.search(r"\b(\d{3,})\.\d+", (root / "proc/driver/nvidia/version").read_text())
        return Hardware(int(version[1]) if version else None)
    return Hardware() if os.path.exists(root / "dev/nvidia0") else None


def has_kernels(capability: Capability, architectures: list[str]) -> bool:
    """Whether a build of torch runs on a card.

    Code for sm_80 runs on the cards from sm_80 to sm_89. PTX code (compute_80) runs on all newer cards, because the driver
    compiles it. Code for sm_90a runs on sm_90 only.

    Args:
        architectures: torch.cuda.get_arch_list(); [] = unknown; then the answer is True.
    """
    for kind, major, minor, suffix in re.findall(r"(sm|compute)_(\d+)(\d)(a?)", " ".join(architectures)):
        built = int(major), int(minor)
        is_own = built == capability
        is_older = built <= capability and (kind == "compute" or (built[0] == capability[0] and capability not in JETSON))
        if is_own or (is_older and not suffix):
            return True
    return not architectures


def how_to_install(hardware: Hardware, capability: Capability | None = None) -> str:
    """The command that installs a torch for this driver and card, or the advice to update the driver.

    Args:
        capability: of the card that is to be used; None = the newest card of the hardware.
    """
    import torch

    capability = capability or max((found for _, found in hardware.cards), default=None)
    if hardware.is_jetson or capability in JETSON:
        return f"Install NVIDIA's build for Jetson: {JETSON_WHEELS}"
    driver = WHEELS[0].driver if hardware.driver is None else hardware.driver
    oldest = (8, 0) if platform.machine() == "aarch64" else (0, 0)  # the wheels for Arm processors leave out older cards
    fitting = [wheel for wheel in WHEELS if capability is None or max(wheel.oldest, oldest) <= capability <= wheel.newest]
    if not fitting:
        return "No build of torch has kernels for it."
    wheel = next((wheel for wheel in fitting if driver >= wheel.driver), None)
    if wheel is None:
        return f"Update the NVIDIA driver to version {fitting[0].driver} or newer."
    version = torch.__version__.partition("+")[0]
    if wheel.index == "cu126" and torch.torch_version.TorchVersion(version) >= FIRST_WITHOUT_CUDA_12:
        version = TESTED_TORCH
    return f"Run: pip install torch=={version}+{wheel.index} --index-url https://download.pytorch.org/whl/{wheel.index}"


def why_no_cuda(hardware: Hardware) -> tuple[str, str]:
    """Why torch cannot use any NVIDIA GPU, and what to do. Both are sentences."""
    import torch

    for variable in ("CUDA_VISIBLE_DEVICES",) if torch.version.hip is None else ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        if os.environ.get(variable, "0").strip() in ("", "-1", "NoDevFiles"):
            hidden = f"The variable {variable} is {os.environ[variable]!r}, which hides all GPUs."
            return hidden, f"Remove it: {'set ' + variable + '=' if os.name == 'nt' else 'unset ' + variable}"
    if torch.version.cuda is None and torch.version.hip is None:
        return f"This torch ({torch.__version__}) is a CPU build.", how_to_install(hardware)
    try:
        torch.cuda.init()
        reason = "torch finds no GPU."
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())
    built_for = "cu" + (torch.version.cuda or "none")[:2]  # CUDA 13.0 and 13.2 need the same driver
    needed = next((wheel.driver for wheel in WHEELS if wheel.index.startswith(built_for)), 0)
    if "too old" in reason or (hardware.driver is not None and hardware.driver < needed):
        found = f"the driver is {hardware.driver or 'older'}"
        reason = f"This torch ({torch.__version__}) needs an NVIDIA driver of version {needed} or newer, and {found}."
        return reason, how_to_install(hardware)
    return reason, "See what nvidia-smi prints." if torch.version.hip is None else "See what rocminfo prints."


# Names of devices


def check_card(index: int) -> None:
    """Raises: DeviceError if this build of torch has no kernels for a card. Every operation on it would fail."""
    import torch

    if torch.version.hip is not None:
        return
    capability, architectures = torch.cuda.get_device_capability(index), torch.cuda.get_arch_list()
    if not has_kernels(capability, architectures):
        card = f"cuda:{index} ({torch.cuda.get_device_name(index)}, {sm(capability)})"
        advice = how_to_install(nvidia_hardware() or Hardware(), capability)
        raise DeviceError(
            f"{card} cannot be used. This torch ({torch.__version__}) has kernels for {', '.join(architectures)} only. {advice}"
        )


def check_cuda(name: str) -> None:
    """Raises: DeviceError if there is no such CUDA device or if torch cannot use it, with the reason and what to do."""
    import torch

    if not torch.cuda.is_available():
        hardware = nvidia_hardware()
        reason, advice = why_no_cuda(hardware or Hardware())
        if hardware is not None or torch.version.hip is not None:
            raise DeviceError(f"device {name} is not available. {reason} Take --device cpu, or fix this. {advice}")
        advice = f"Take --device cpu; if there is a GPU, {advice[0].lower()}{advice[1:]}"
        raise DeviceError(f"device {name} is not available. {reason} No NVIDIA GPU was found on this machine. {advice}")
    count, index = torch.cuda.device_count(), int(name.partition(":")[2] or 0)
    if index >= count:
        present = ", ".join(f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(count))
        raise DeviceError(f"device {name} is not available. This machine has {present}. Take one of these.")
    check_card(index)


def usable_cards() -> list[int]:
    """The numbers of the CUDA devices that this build of torch can use. Warns once about each that it cannot use."""
    import torch

    usable = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        try:
            check_card(index)
            usable.append(index)
        except DeviceError as error:
            warn_once(error.message)
    return usable


def missed_gpu(root: Path = Path("/")) -> str | None:
    """Why the CPU is used although this machine has a GPU, and what to do; None if it has none that torch could use.

    An AMD GPU counts only if this torch is built for ROCm: many processors contain a small one that torch does not support.

    Args:
        root: the root of the file system; tests pass another folder.
    """
    import torch

    text = "The CPU is used although this {} has {}."
    if sys.platform == "darwin":
        if platform.machine() != "arm64":
            return None
        if not torch.backends.mps.is_built():
            advice = f"Run: pip install --force-reinstall torch=={torch.__version__.partition('+')[0]}"
            return f"{text.format('Mac', 'a GPU')} This torch ({torch.__version__}) was built without MPS. {advice}"
        if int(platform.mac_ver()[0].partition(".")[0] or 99) < 14:
            return f"{text.format('Mac', 'a GPU')} torch needs macOS 14 or newer for it. Update macOS."
        return None  # torch finds no GPU on this Mac, for example in a virtual machine
    if torch.version.hip is not None:
        if not os.path.exists(root / "dev/kfd"):
            return None
        name, (reason, advice) = "an AMD GPU", why_no_cuda(Hardware())
    else:
        hardware = nvidia_hardware(root)
        if hardware is None:
            return None
        name = f"an NVIDIA GPU ({hardware.cards[0][0]})" if hardware.cards else "an NVIDIA GPU"
        reason, advice = why_no_cuda(hardware)
    return f"{text.format('machine', name)} {reason} {advice}"


def best_device() -> "torch.device":
    """The first CUDA device that torch can use, else MPS, else the CPU. Warns once if there is a GPU and the CPU is taken."""
    import torch

    if cards := usable_cards():
        return torch.device("cuda", cards[0]) if cards[0] else torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    if not torch.cuda.is_available() and (text := missed_gpu()):
        warn_once(text)
    return torch.device("cpu")


def find_devices(name: "str | torch.device" = "auto") -> "list[torch.device]":
    """The devices of that name: "auto" (CUDA, else MPS, else CPU), "cpu", "mps", "cuda", "cuda:N", or several: "cuda:0,cuda:1".

    Raises: UsageError for any other name, and if torch.set_default_device is in use; DeviceError if a device is not available (no
        other device is used instead).
    """
    import torch

    if torch.get_default_device().type != "cpu":
        # Prompts, lengths and random numbers are made on the CPU, in many places, and copied to the device when needed.
        text = f"torch's default device is {torch.get_default_device()}, but cpu is needed"
        raise UsageError(f"{text}. Remove torch.set_default_device or `with torch.device`, and name the device when loading.")
    # The device of a tensor may be given, too. For a tensor on MPS it is mps:0, which means the same as mps.
    name = name.type if isinstance(name, torch.device) and name.type == "mps" else str(name)
    parts = name.split(",")
    if not NAMES.fullmatch(name):
        raise UsageError(f"device is {name!r}. {NEEDED} is needed.")
    if len(set(parts)) < len(parts):
        raise UsageError(f"device is {name!r}, which names a card twice. Name each card once.")
    if name == "auto":
        return [best_device()]
    if name == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("device mps is not available. It needs a Mac with Apple silicon. Take --device cpu.")
    for part in parts:
        if part.startswith("cuda"):
            check_cuda(part)
    return [torch.device(part) for part in parts]


def find_device(name: "str | torch.device" = "auto") -> "torch.device":
    """The device of that name; the first one if the name lists several. Names and errors: see find_devices."""
    return find_devices(name)[0]
