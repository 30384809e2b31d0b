"""What the machine has: Python and packages, torch, GPUs and their driver, compilers, cores, memory, cache folders.

Nothing here imports torch when the file is imported: `torch_rows` reports a torch that cannot be imported, and the functions
below `torch_rows` are called only if torch can be imported. Checked in tests/checkup/test_system.py.
"""

import importlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import paligemma
from paligemma import machine
from paligemma.checkup.rows import Row, failed, failed_by, note
from paligemma.errors import DeviceError, one_line
from paligemma.machine import GIB

if TYPE_CHECKING:
    import torch

NEEDED = {  # the name for `import`: the name for pip
    "numpy": "numpy", "PIL": "pillow", "safetensors": "safetensors", "tokenizers": "tokenizers",
    "huggingface_hub": "huggingface_hub",
}  # fmt: skip
PARTLY_NEEDED = {"fire": "fire", "tqdm": "tqdm", "yaml": "pyyaml"}  # needed by some programs only
OPTIONAL = ("transformers", "pillow-heif", "ray", "pycocotools", "supervision", "tensorboard")
INSTALL = "Run pip install -r requirements.txt, or launch_inference.sh, which makes an environment with all packages."
ANSWER_TIMEOUT_S = 3  # for programs that are asked for their version
INSTRUCTIONS = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "avx_vnni", "avx512f", "avx2", "bf16", "i8mm", "asimddp")
MIN_CACHE_BYTES = 2**30  # less free space than this in the hub's cache is worth a note


def output_of(*command: str) -> str | None:
    """What a program prints; None if there is no such program, or if it fails or takes too long."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=ANSWER_TIMEOUT_S, text=True, errors="replace"
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def try_import(name: str) -> tuple[ModuleType | None, str]:
    """The module, or None and the reason why it cannot be imported."""
    try:
        return importlib.import_module(name), ""
    except Exception as error:  # noqa: BLE001  (a damaged installation raises exceptions of any class)
        return None, one_line(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# Python and packages


def platform_rows() -> list[Row]:
    """The versions of this project, of Python and of the operating system."""
    bits = "" if sys.maxsize > 2**32 else ", 32 bits"
    rows = [
        Row("paligemma", paligemma.__version__),
        Row("python", f"{platform.python_implementation()} {platform.python_version()}{bits}"),
        Row("platform", platform.platform() + (", WSL" if "microsoft" in platform.release().lower() else "")),
    ]
    return rows


def packages_rows() -> list[Row]:
    """One row with all versions, and one failed row for each needed package that is missing or broken."""
    rows, versions = [], []
    for name, package in (NEEDED | PARTLY_NEEDED).items():
        module, reason = try_import(name)
        if module is not None:
            versions.append(f"{package} {version_of(package) or getattr(module, '__version__', '')}".strip())
        elif name in NEEDED:
            rows.append(failed(package, f"cannot be imported: {reason}", INSTALL))
        else:
            rows.append(note(package, f"cannot be imported: {reason}", f"Some programs need it. {INSTALL}"))
    optional = [f"{package} {version}" for package in OPTIONAL if (version := version_of(package))]
    listed = [Row("packages", ", ".join(versions))] + ([Row("optional packages", ", ".join(optional))] if optional else [])
    return listed + rows


def torch_rows() -> list[Row]:
    """The version of torch, and for which GPUs it was built. Failed if torch is missing, broken or too old."""
    torch, reason = try_import("torch")
    if torch is None:
        return [failed("torch", f"cannot be imported: {reason}", f"Install it again. {INSTALL}")]
    machine.check_torch()  # raises DeviceError
    if torch.version.cuda:
        kind = f"for CUDA {torch.version.cuda}"
    else:
        kind = f"for ROCm {torch.version.hip}" if torch.version.hip else "without CUDA"
    cudnn = torch.backends.cudnn.version() if torch.version.cuda else None
    return [Row("torch", f"{torch.__version__}, built {kind}{f', cuDNN {cudnn}' if cudnn else ''}")]


# GPUs


def driver_rows() -> list[Row]:
    """NVIDIA's driver and cards as nvidia-smi lists them; nothing if there is no nvidia-smi.

    Only the version, the names and the sizes are asked for, no serial numbers.
    """
    answer = output_of("nvidia-smi", "--query-gpu=driver_version,name,memory.total", "--format=csv,noheader")
    if not answer:
        return []
    cards = [line.split(", ") for line in answer.splitlines()]
    listed = ", ".join(f"{', '.join(card[1:])}" for card in cards)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    limit = "" if hidden is None else f"; CUDA_VISIBLE_DEVICES={hidden}"
    return [Row("NVIDIA driver", f"{cards[0][0]}; nvidia-smi lists {listed}{limit}")]


def cards_rows() -> list[Row]:
    """Each CUDA card: capability, memory, and whether this torch has code for it."""
    import torch

    from paligemma import devices

    rows = []
    for index in range(torch.cuda.device_count()) if torch.cuda.is_available() else ():
        about = torch.cuda.get_device_properties(index)
        try:
            devices.check_card(index)
            free, total = torch.cuda.mem_get_info(index)
            value = f"{about.name}, sm_{about.major}{about.minor}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
            rows.append(Row(f"cuda:{index}", value))
        except DeviceError as error:
            rows.append(failed_by(f"cuda:{index}", error))
    if rows:
        rows.append(Row("torch has code for", " ".join(torch.cuda.get_arch_list()) or "not listed"))
    return rows


def gpu_rows(name: str, device: "torch.device") -> list[Row]:
    """Which device is taken, how it is used, and why a GPU of this machine is not used.

    Args:
        name: the flag --device, such as "auto".
        device: the device that this flag selects.
    """
    from paligemma import devices

    used = devices.profile(device)
    asked = f"--device {name}" if name == "auto" or name.startswith(device.type) else f"{name} cannot be used"
    rows = [Row("device", f"{device} ({asked}); dtypes that it computes fast: {', '.join(used.dtype_names)}")]
    if device.type != "cpu":
        rows.append(Row("use of the device", used.summary))
    if device.type == "mps":
        rows.append(Row("free memory of mps", f"{(machine.free_memory(device) or 0) / GIB:.1f} GiB"))
    if device.type == "cpu" and (text := devices.missed_gpu()) is not None:
        if name == "cpu":
            rows.append(note("GPU", text, "You need not do anything, because you asked for the CPU."))
        else:
            rows.append(failed_by("GPU", DeviceError(text)))
    return rows


# Compilers, cores, memory


def compilers_rows(device: "torch.device") -> list[Row]:
    """The C++ compiler and, on a GPU, Triton and Python's header, with which torch.compile builds kernels."""
    from paligemma.layers import compiling

    rows, compiler = [], compiling.find_compiler()
    if compiler:
        if version := output_of(*compiler, "--version"):
            rows.append(Row("C++ compiler", version.splitlines()[0]))
        else:
            rows.append(note("C++ compiler", f"{compiler[0]} does not print its version", "Install g++, or set $CXX."))
    else:
        advice = "Install g++ (or set $CXX): kernels for the CPU are then compiled once, and quantised models run faster."
        rows.append(note("C++ compiler", "neither g++ nor clang++ is installed", advice))
    if device.type == "cuda":
        if version := version_of("triton") or version_of("pytorch-triton-rocm"):
            rows.append(Row("triton", version))
        else:
            rows.append(note("triton", "not installed: nothing is compiled for the GPU", "pip install triton (on Linux)."))
        if not os.path.exists(Path(sysconfig.get_paths()["include"]) / "Python.h"):
            advice = "Install the headers of Python, such as the package python3-dev, for kernels that Triton compiles."
            rows.append(note("Python.h", "missing", advice))
    return rows


def cores_rows() -> list[Row]:
    """The cores that this process may use, and the instructions that decide which kernels are fast."""
    from paligemma.layers import instruction_sets

    quota = machine.cpu_quota()
    limit = "" if quota is None else f", limited to {quota:g} by a control group"
    threads = os.environ.get("OMP_NUM_THREADS")
    value = f"{machine.available_cores()} of {os.cpu_count()}{limit}{f', OMP_NUM_THREADS={threads}' if threads else ''}"
    found = instruction_sets.cpu_flags() & {*INSTRUCTIONS}
    instructions = " ".join(name for name in INSTRUCTIONS if name in found) or platform.machine()
    return [Row("cores", value), Row("instructions", instructions)]


def memory_rows() -> list[Row]:
    import torch

    free = machine.free_memory(torch.device("cpu"))
    return [Row("free memory", "unknown" if free is None else f"{free / GIB:.1f} GiB")]


# Folders


def folder_row(name: str, folder: Path, variable: str, min_free: int = 0) -> Row:
    """Whether files can be written into a folder, which need not exist yet, and how much space is left."""
    existing = next(place for place in (folder, *folder.parents) if os.path.exists(place))
    if not (os.path.isdir(existing) and os.access(existing, os.W_OK | os.X_OK)):
        return failed(name, f"{folder} cannot be written", f"Change its permissions, or set {variable} to another folder.", 7)
    free = shutil.disk_usage(existing).free
    value = f"{folder}{'' if existing == folder else ' (not made yet)'}, {free / GIB:.1f} GiB free"
    return note(name, value, f"Free some space, or set {variable}.") if free < min_free else Row(name, value)


def folders_rows() -> list[Row]:
    """The folders for compiled kernels, for downloads from the hub and for what torch.compile builds."""
    from huggingface_hub import constants

    from paligemma.layers import compiling

    rows = []
    place = next(compiling.cache_folders(), None)
    if place is None:
        advice = "Make a folder that only you can write, and name it in XDG_CACHE_HOME."
        rows.append(note("cache of kernels", "no private folder can be written; kernels are compiled at every start", advice))
    else:
        rows.append(folder_row("cache of kernels", place, "XDG_CACHE_HOME"))
        inductor = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or place / "inductor")
        rows.append(folder_row("cache of torch.compile", inductor, "TORCHINDUCTOR_CACHE_DIR"))
    hub = folder_row("cache of the hub", Path(constants.HF_HUB_CACHE), "HF_HOME", MIN_CACHE_BYTES)
    return [*rows, hub]


def token_rows() -> list[Row]:
    """Whether there is a token for the hub. The token itself is never shown."""
    from huggingface_hub import constants, get_token

    rows = [Row("hub token", "yes" if get_token() else "none; models with a licence, such as Google's, need one")]
    if constants.HF_HUB_OFFLINE:
        rows.append(note("hub", "HF_HUB_OFFLINE is set: nothing is downloaded", "Unset it to download models."))
    return rows
