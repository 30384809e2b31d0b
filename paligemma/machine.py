"""What this process may use: CPU cores and memory. Programs check this before they load anything.

torch is imported inside the functions, because use_cores must be called before torch is imported for the first time.
Checked in tests/test_machine.py.
"""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from paligemma.errors import DeviceError

if TYPE_CHECKING:
    import torch

OLDEST_TORCH = "2.9"  # older versions cannot write the checkpoints of fine-tuning; pyproject.toml has the same number
# A RuntimeError whose message contains one of these means that memory ran out.
MEMORY_SIGNS = ("can't allocate memory", "Cannot allocate memory", "unable to mmap", "not enough memory")
SAVE_MEMORY = "Take --dtype bf16, --quantize int8 or int4, a smaller model, or another device."
GIB = 2**30
WAIT_STEPS = "4000"  # some 80 microseconds: longer than it takes Python to call the next kernel, so threads seldom sleep


# Cores


def control_groups(controller: str, root: Path) -> Iterator[tuple[int, Path]]:
    """The control groups (of a container or a service) that limit this process: its own group, then each group above it.

    Args:
        controller: "cpu" or "memory".
        root: the root of the file system; tests pass another folder.
    Yields: the version of the control groups, 1 or 2, and the folder of the group.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "" or controller in controllers.split(","):
            mount = root / "sys/fs/cgroup" / (controller if controllers else "")
            group = mount / path.lstrip("/")
            for folder in (group, *group.parents):
                if folder == mount or mount in folder.parents:
                    yield (1 if controllers else 2), folder


def cpu_quota(root: Path = Path("/")) -> float | None:
    """CPU seconds per second that the control groups allow this process; None = no limit. Args: root: see control_groups."""
    limits = []
    for version, group in control_groups("cpu", root):
        with suppress(OSError):
            if version == 1:
                quota, period = (group / "cpu.cfs_quota_us").read_text(), (group / "cpu.cfs_period_us").read_text()
            else:
                quota, period = (group / "cpu.max").read_text().split()
            if quota.strip() not in ("max", "-1"):
                limits.append(int(quota) / int(period))
    return min(limits, default=None)


def available_cores() -> int:
    """The number of cores this process can use: the cores of its affinity mask, limited by the quota of its control groups."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(cores, int(cpu_quota() or cores)))


def use_cores() -> int:
    """Sets OMP_NUM_THREADS, which torch reads once when it is imported, and returns it. A smaller value is kept."""
    cores = available_cores()
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdecimal() and 0 < int(wanted) < cores:
        cores = int(wanted)
    os.environ["OMP_NUM_THREADS"] = str(cores)
    return cores


def check_torch() -> None:
    """Imports torch. Raises: DeviceError if the installed torch is too old.

    Before the first import, also sets how long a thread that waits for others keeps its core busy, unless the user has set that.
    GNU's OpenMP library would do so for milliseconds. If another program uses a core, too, the thread that the others wait for
    cannot run meanwhile, and a token takes ten times as long.
    """
    is_first = "torch" not in sys.modules
    if is_first:
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", WAIT_STEPS)
        # The import makes hundreds of thousands of objects, which all stay: looking for garbage among them would take 0.1 s.
        gc.disable()
    try:
        import torch
    finally:
        gc.enable()
    if is_first:
        gc.freeze()  # later collections leave these objects out, too
    if torch.torch_version.TorchVersion(torch.__version__) < OLDEST_TORCH:
        advice = "Run pip install -r requirements.txt."
        raise DeviceError(f"torch {torch.__version__} is too old. {OLDEST_TORCH} or newer is needed. {advice}")


# Memory


def read_number(path: Path) -> int | None:
    """The first number in a file of the system; None if the file is missing or holds none."""
    try:
        return int(path.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


def free_memory(device: "torch.device", root: Path = Path("/")) -> int | None:
    """Bytes that this process can still allocate on the device; None if this is not known.

    On a GPU, memory that torch keeps after its tensors were freed counts as free, so that a second model can be loaded after the
    first one was deleted. Args: root: see free_cpu_memory.
    """
    if device.type == "cpu":
        return free_cpu_memory(root)
    import torch

    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()


def free_cpu_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still allocate on the CPU; None if this is not known.

    This is the smallest of three numbers: the memory that the system reports as available, the rest of each control group's
    limit, and the rest of the process's own limit (ulimit -v). The file cache counts as free, because the system drops it when
    memory is needed.

    Args:
        root: the root of the file system; tests pass another folder.
    """
    free = []
    with suppress(OSError):
        lines = (root / "proc/meminfo").read_text().splitlines()
        free += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    for version, group in control_groups("memory", root):
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
        limit, used = (read_number(group / name) for name in names)
        if limit is not None and used is not None:
            with suppress(OSError):
                lines = (group / "memory.stat").read_text().splitlines()
                used -= sum(int(line.split()[1]) for line in lines if line.startswith(("active_file ", "inactive_file ")))
            free.append(limit - used)
    with suppress(ImportError):  # Windows has no resource module
        import resource

        limit, pages = resource.getrlimit(resource.RLIMIT_AS)[0], read_number(root / "proc/self/statm")
        if limit != resource.RLIM_INFINITY and pages is not None:
            free.append(limit - pages * resource.getpagesize())
    if not free and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:  # macOS
        free.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(free, default=None)


def require_memory(need: int, device: "torch.device", what: str = "the weights take", advice: str = SAVE_MEMORY) -> None:
    """Checks, before anything is allocated, that `need` bytes fit into the free memory of the device.

    Raises: DeviceError: "{what} ... GiB on {device}, which has ... GiB free. {advice}"
    """
    have = free_memory(device)
    if have is not None and need > have:
        raise DeviceError(
            f"{what} {need / GIB:.2f} GiB on {device}, which has {max(have, 0) / GIB:.2f} GiB free. {advice}"
        )


@contextmanager
def memory_errors(doing: str, advice: str = SAVE_MEMORY) -> Iterator[None]:
    """Turns every kind of out-of-memory error inside the block into a DeviceError: "memory ran out while {doing}." and advice."""
    import torch

    try:
        yield
    except (RuntimeError, MemoryError) as error:
        is_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not (is_memory or any(sign in str(error) for sign in MEMORY_SIGNS)):
            raise
        reason = str(error).splitlines()[0] + " " if str(error) else ""
        raise DeviceError(f"memory ran out while {doing}. {reason}{advice}") from error


def peak_memory(device: "torch.device") -> int:
    """The peak memory of this process in bytes: GPU memory for a CUDA device, else CPU memory including mapped files."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    import resource  # Windows has no such module

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def format_bytes(count: float) -> str:
    """A number of bytes for messages: "5.45 GB", "3.2 MB"."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
