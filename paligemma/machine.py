"""What this process may use, and how fast the machine is: cores, memory, and the two ceilings that no model gets past.

Decoding a token reads every weight of the decoder once: its floor is bytes / read bandwidth. Reading a prompt multiplies
every token with every weight: its floor is multiplications / matrix rate. Both rates are measured, not looked up.
torch is imported only where it is used, because use_cores has to come before it. Checked in tests/test_machine.py.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from paligemma.errors import DeviceError

if TYPE_CHECKING:
    import torch

    from paligemma.modeling_paligemma import PaliGemmaConfig

OLDEST_TORCH = "2.6"  # what is called here came a little earlier; tested is only the version in requirements.txt
MEMORY_SIGNS = ("can't allocate memory", "Cannot allocate memory", "unable to mmap", "not enough memory")  # in RuntimeErrors
SMALLER = "Take --dtype bf16, --quantize int8 or int4, a smaller model, or another device."


def control_groups(controller: str, root: Path) -> Iterator[tuple[int, Path]]:
    """The groups (containers, services) that share out "cpu" or "memory" to this process, from its own up: each can limit it.

    Yields: version (1 or 2) and folder. `root` is another folder only in tests.
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
    """How many cores' worth of time this process may take; None = no limit. `root` is another folder only in tests."""
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
    """The cores this process really has: its affinity, cut by the quota of its control group."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(cores, int(cpu_quota() or cores)))


def use_cores() -> int:
    """Tells torch's thread pool its size, which it reads once, when torch is imported. A smaller OMP_NUM_THREADS stays."""
    cores = available_cores()
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdecimal() and 0 < int(wanted) < cores:
        cores = int(wanted)
    os.environ["OMP_NUM_THREADS"] = str(cores)
    return cores


def check_torch() -> None:
    """Raises: DeviceError for a torch that is too old."""
    import torch

    if torch.torch_version.TorchVersion(torch.__version__) < OLDEST_TORCH:
        advice = "pip install -r requirements.txt"
        raise DeviceError(f"torch {torch.__version__} is too old. {OLDEST_TORCH} or newer is needed: {advice}.")


@contextmanager
def memory_errors(doing: str, advice: str = SMALLER) -> Iterator[None]:
    """Inside, running out of memory, which torch says in several ways, becomes one DeviceError that ends with advice."""
    import torch

    try:
        yield
    except (RuntimeError, MemoryError) as error:
        is_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not (is_memory or any(sign in str(error) for sign in MEMORY_SIGNS)):
            raise
        first = str(error).splitlines()[0] if str(error) else "The system gave none."
        raise DeviceError(f"memory ran out while {doing}. {first} {advice}") from error


def peak_memory(device: "torch.device") -> int:
    """The most bytes this process has held: of the GPU if it uses one, else of main memory, mapped files included."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    import resource  # not there on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def size(count: float) -> str:
    """Bytes for people: 5.45 GB, 3.2 MB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def best_seconds(work: Callable[[], object], device: "torch.device", times: int = 5) -> float:
    """The shortest of a few runs after one to warm up: what the machine can do, not what it usually does."""
    import torch

    def run() -> float:
        start = time.perf_counter()
        work()
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
        return time.perf_counter() - start

    run()
    return min(run() for _ in range(times))


def read_bandwidth(device: "torch.device") -> float:
    """Bytes a second: a float32 matrix of 256 MB, larger than any cache, times a vector, or searched for its largest number.

    Which is faster depends on the processor: on one that multiplies at 16 GB/s, the search reads 40. Takes half a second.
    """
    import torch

    matrix, vector = torch.ones(32768, 2048, device=device), torch.ones(2048, device=device)
    return matrix.nbytes / min(best_seconds(work, device) for work in (lambda: matrix @ vector, matrix.amax))


def matrix_rate(device: "torch.device", dtype: "torch.dtype") -> float:
    """Multiply-adds a second of a product like those of prefill, in `dtype` or, where that is faster, in float32.

    Processors without instructions for bfloat16 are several times slower in it, and quantization.py goes round that.
    """
    import torch

    rows, width = (256, 2048) if device.type == "cpu" else (4096, 8192)
    seconds = []
    for kind in {dtype, torch.float32} if device.type == "cpu" else {dtype}:
        left, right = torch.ones(rows, width, dtype=kind, device=device), torch.ones(width, width, dtype=kind, device=device)
        seconds.append(best_seconds(lambda left=left, right=right: left @ right, device))
    return rows * width * width / min(seconds)


def prefill_products(config: "PaliGemmaConfig", pictures: int, tokens: int) -> int:
    """Multiply-adds needed to read `pictures` pictures and a row of `tokens` tokens and to say the first new one."""
    vision, text = config.vision_config, config.text_config
    width, patches = vision.hidden_size, config.num_image_tokens
    tower = vision.num_hidden_layers * (4 * width**2 + 2 * width * vision.intermediate_size + 2 * patches * width)
    ends = 3 * vision.patch_size**2 * width + width * text.hidden_size  # patch embedding and projector
    heads = (2 * text.num_attention_heads + 2 * text.num_key_value_heads) * text.head_dim  # q and o, k and v
    look = 2 * tokens * text.num_attention_heads * text.head_dim  # scores and their sums
    layer = heads * text.hidden_size + 3 * text.hidden_size * text.intermediate_size + look
    return pictures * patches * (tower + ends) + tokens * text.num_hidden_layers * layer + text.hidden_size * text.vocab_size
