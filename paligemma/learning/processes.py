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

from paligemma.errors import DeviceError, PaliGemmaError

if TYPE_CHECKING:
    import torch

Value = TypeVar("Value")
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # torchrun sets all four
MAX_WAIT = timedelta(days=1)  # the other processes wait while the first process checks the pictures of a large dataset
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


@contextmanager
def connect_processes(device: "torch.device") -> Iterator[None]:
    """Connects the processes within a `with` block. Raises: DeviceError if another process has ended."""
    if world_size() == 1:
        yield
        return
    import torch
    from torch import distributed

    if device.type == "cuda" and device.index is None:  # one GPU for each process
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=MAX_WAIT)
    try:
        yield
    except PaliGemmaError:
        # Most errors happen in all processes. The first process reports its error at once, and torchrun then ends the other
        # processes before they report theirs. An error that does not happen in the first process is reported after the delay.
        if not is_first():
            time.sleep(REPORT_DELAY_S)
        raise
    except RuntimeError as error:
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
