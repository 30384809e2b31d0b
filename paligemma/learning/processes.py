"""The processes of a run: rank, world size and communication. Without torchrun there is one process, whose rank is 0.

torchrun describes the processes in environment variables. So `rank` and `is_first` work before torch is imported, and before
`connect_processes` connects the processes. Checked in tests/learning/test_processes.py.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from paligemma.errors import DeviceError, PaliGemmaError, UsageError

if TYPE_CHECKING:
    import torch

Value = TypeVar("Value")
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # torchrun sets all four
MAX_WAIT = timedelta(days=1)  # the other processes wait while the first process checks the pictures of a large dataset
SHARED_CARD = "Duplicate GPU detected"  # NCCL's message
LOST_CONNECTION = re.compile("Connection (closed|reset) by peer|Timed out waiting|NCCL")
REPORT_DELAY_S = 3


def world_size() -> int:
    """The number of processes in the run."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in VARIABLES) else 1


def rank() -> int:
    """The number of this process, counted from 0."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def is_first() -> bool:
    """Whether this is the process that prints and writes files on behalf of all processes."""
    return rank() == 0


def num_local_processes() -> int:
    """The number of processes of the run that share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world_size() > 1 else 1


def check_device(name: str) -> None:
    """Checks --device without importing torch.

    Raises: UsageError if it names several cards, or one card for several processes of this machine.
    """
    if "," in name:
        advice = f"torchrun --nproc_per_node {name.count(',') + 1} -m paligemma finetune ..., without --device"
        raise UsageError(f"--device is {name}, but a process trains on one card. Start one process for each card: {advice}.")
    if name.startswith("cuda:") and num_local_processes() > 1:
        text = f"--device {name} would put {num_local_processes()} processes on one card"
        raise UsageError(f"{text}. Leave it out, so that each process takes its own card.")


def own_device(name: str) -> str:
    """The name of the device of this process: if there are several processes, process i of this machine takes card i.

    Args:
        name: --device.
    Raises: DeviceError if this machine has fewer cards than processes.
    """
    if world_size() == 1 or name not in ("auto", "cuda"):
        return name
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < 2:  # no card; or one, because a launcher such as srun shows each process only the card of this process
        return name
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= count:
        text = f"this machine has {count} GPUs for {num_local_processes()} processes, and each process needs its own"
        raise DeviceError(f"{text}. Take --nproc_per_node {count}, or --device cpu.")
    return f"cuda:{index}"


@contextmanager
def connect_processes(device: "torch.device") -> Iterator[None]:
    """Connects the processes within a `with` block. Raises: DeviceError if another process has ended.

    Args:
        device: the device of this process. It becomes torch's current device.
    """
    if world_size() == 1:
        yield
        return
    import torch
    from torch import distributed

    options = {}
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
        options["device_id"] = device  # otherwise NCCL would guess the card from the rank
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        distributed.init_process_group(backend, timeout=MAX_WAIT, **options)
        yield
    except PaliGemmaError:
        # Most errors happen in all processes. The first process reports its error at once, and torchrun then ends the other
        # processes before they report theirs. An error that does not happen in the first process is reported after the delay.
        if not is_first():
            time.sleep(REPORT_DELAY_S)
        raise
    except RuntimeError as error:
        if SHARED_CARD in str(error):
            raise DeviceError("two processes have the same GPU. Start as many processes per machine as it has GPUs.") from error
        if not LOST_CONNECTION.search(str(error)):
            raise
        raise DeviceError("another process has ended; its message is above. Continue with --resume.") from error


def barrier() -> None:
    """Waits until all processes have called this function."""
    if world_size() > 1:
        from torch import distributed

        distributed.barrier()


def gather(value: Value) -> list[Value]:
    """The values of all processes, in the order of their ranks."""
    values = [value] * world_size()
    if world_size() > 1:
        from torch import distributed

        distributed.all_gather_object(values, value)
    return values


def sums(*values: float) -> list[float]:
    """The sum of each value over all processes."""
    return [sum(column) for column in zip(*gather(values), strict=True)]


def from_first(make: Callable[[], Value]) -> Value:
    """Calls make() in the first process. All processes return its result, or raise the PaliGemmaError that it raised."""
    if world_size() == 1:
        return make()
    from torch import distributed

    sent: list = [None, None]  # the result, and the error
    if is_first():
        try:
            sent[0] = make()
        except PaliGemmaError as error:
            sent[1] = error
    distributed.broadcast_object_list(sent)
    if sent[1] is not None:
        raise sent[1]
    return sent[0]


def exit_process(code: int) -> int:
    """Ends this process if the run has several processes; otherwise returns the exit code.

    With several processes the interpreter must not shut down normally, because threads of torch.distributed sometimes call
    abort() during the shutdown.
    """
    if world_size() > 1:
        sys.stderr.flush()
        os._exit(code)
    return code
