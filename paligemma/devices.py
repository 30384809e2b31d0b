"""Which device a name means, and whether the weights will fit on it: asked before anything is loaded.

Checked in tests/test_devices.py.
"""

import os
import re
from contextlib import suppress
from pathlib import Path

import torch

from paligemma.errors import DeviceError, UsageError
from paligemma.machine import SMALLER, control_groups

GIB = 2**30


def find_device(name: str | torch.device = "auto") -> torch.device:
    """The device of that name: "auto" (the best there is), "cpu", "cuda", "cuda:N" or "mps".

    Raises: UsageError for another name, DeviceError for a device that is not there: what was asked for is never replaced.
    """
    name = str(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d{1,3})?", name):
        raise UsageError(f"device is {name!r}. auto, cpu, cuda, cuda:N or mps is needed.")
    if name == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("device mps is not there. It needs a Mac with Apple silicon. Take --device cpu.")
    if name.startswith("cuda"):
        check_cuda(name)
    return torch.device(name)


def check_cuda(name: str) -> None:
    """Raises DeviceError when there is no such CUDA device, with the reason: the build, the driver, or the number."""
    if torch.version.cuda is None and torch.version.hip is None:
        version = torch.__version__.partition("+")[0]
        raise DeviceError(
            f"device {name} is not there. This torch ({torch.__version__}) is a CPU build. Install one for CUDA, "
            f"pip install --force-reinstall torch=={version}, or take --device cpu."
        )
    if not torch.cuda.is_available():
        raise DeviceError(f"device {name} is not there. {why_no_cuda()} Fix that (see nvidia-smi), or take --device cpu.")
    count, index = torch.cuda.device_count(), int(name.partition(":")[2] or 0)
    if index >= count:
        there = ", ".join(f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(count))
        raise DeviceError(f"device {name} is not there. This machine has {there}. Take one of these.")


def why_no_cuda() -> str:
    """torch's own sentence: no driver, a driver that is too old, or no GPU."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split())
    return "torch finds no GPU."


def read_number(path: Path) -> int | None:
    """The number in a file of the system; None when there is none."""
    try:
        return int(path.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


def free_memory(device: torch.device, root: Path = Path("/")) -> int | None:
    """Bytes that this process may still take on the device; None when the system does not say.

    The cache of files counts as free, for the system drops it when memory is needed. `root` is another folder only in tests.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    free = []
    with suppress(OSError):
        lines = (root / "proc/meminfo").read_text().splitlines()
        free += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    for version, group in control_groups("memory", root):
        limit, use = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
        most, now = read_number(group / limit), read_number(group / use)
        if most is not None and now is not None:
            with suppress(OSError):
                lines = (group / "memory.stat").read_text().splitlines()
                now -= sum(int(line.split()[1]) for line in lines if line.startswith(("active_file ", "inactive_file ")))
            free.append(most - now)
    with suppress(ImportError):  # not there on Windows
        import resource

        most, taken = resource.getrlimit(resource.RLIMIT_AS)[0], read_number(root / "proc/self/statm")
        if most != resource.RLIM_INFINITY and taken is not None:
            free.append(most - taken * resource.getpagesize())
    if not free and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:  # macOS
        free.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(free, default=None)


def require_memory(need: int, device: torch.device, what: str = "the weights take", advice: str = SMALLER) -> None:
    """Raises DeviceError, which ends with advice, when that many bytes cannot fit, before one of them is taken."""
    have = free_memory(device)
    if have is not None and need > have:
        raise DeviceError(
            f"{what} {need / GIB:.2f} GiB on {device}, which has {max(have, 0) / GIB:.2f} GiB free. {advice}"
        )
