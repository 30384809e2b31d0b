"""What annotate does, on many machines: `python -m paligemma cluster photos --task detect cat --output cats.jsonl --workers 8`.

Ray Data hands lists of questions to workers, each a process that holds the model, and brings their rows back here, where they go
to the same resumable file as annotate.py's (journal.py). Workers get their rows from job.answer, as annotate.py does. One that
dies is started again and its list asked again, so that no row is lost or repeated; should this process die, the same command goes
on where the file ends. Without --address Ray runs on this machine alone, in a temporary folder, with no word to anybody.
Needs Ray: pip install "ray[data]". Checked in tests/programs/test_cluster.py.
"""

import sys

if sys.version_info < (3, 10):
    sys.exit("error: Python %d.%d is too old. This program needs 3.10 or newer." % sys.version_info[:2])
if __name__ == "__main__":
    from paligemma.programs import commandline

    commandline.leave_on_signals()  # before the rest is imported, which takes a while

import importlib.util
import json
import logging
import math
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING

from paligemma import files, machine
from paligemma.errors import AccessError, DeviceError, PaliGemmaError
from paligemma.programs import commandline, job
from paligemma.programs.job import JobFlags, Question
from paligemma.programs.journal import LONGEST_LINE, Journal
from paligemma.programs.options import require

if TYPE_CHECKING:
    from paligemma.opened import Checkpoint

LISTS_PER_WORKER = 4  # at least, so that a slow one does not keep the others waiting long
ROUNDS_PER_LIST = 8  # a list is so many times as long as rows are in flight: at its end some of them stand empty
STORE_BYTES = 256 << 20  # of memory that Ray shares out between processes; rows are small


@dataclass(frozen=True, kw_only=True)
class Flags(JobFlags):
    """Asks PaliGemma models on many machines, or in several processes on this one, about many pictures.

      python -m paligemma cluster photos --task detect "cat ; dog" --output pets.jsonl --workers 2             on this machine
      python -m paligemma cluster photos --task caption --output captions.jsonl --workers 16 --address auto    on a Ray cluster

    The rows are those of annotate.py, which may continue the file, make drawings and export it. On a cluster every machine
    needs this code, the model and the pictures under the same paths. Needs Ray: pip install "ray[data]".

    Args:
        workers: processes with a model each
        address: of a Ray cluster; "auto" finds the one that this machine belongs to
        cpus: cores of each worker; if not given, an equal share of this machine's
        gpus: of each worker; 0.5 lets two share one; if not given, one where the cluster has any
    """

    workers: int = 1
    address: str | None = None
    cpus: int | None = None
    gpus: float | None = None

    def __post_init__(self):
        super().__post_init__()
        require(
            self,
            ("workers", self.workers >= 1, "a whole number from 1 up"),
            ("address", self.address != "", "an address"),
            ("cpus", self.cpus is None or self.cpus >= 1, "a whole number from 1 up"),
            ("gpus", self.gpus is None or 0 <= self.gpus < math.inf, "a number from 0 up"),
        )


class Worker:
    """A process with the model: lists of questions in, rows out. Both are JSON, so that a column may hold rows of any form.

    What is wrong with the model comes back as a fault in place of rows. Raised here, Ray would try again without end.

    Args:
        flags: which model, and how pictures are read.
        folder: where the names of pictures begin.
    """

    def __init__(self, flags: Flags, folder: str):
        os.chdir(folder)
        self.flags = flags
        self.fault: PaliGemmaError | None = None
        try:
            checkpoint = flags.open()
            self.annotator = job.make_annotator(flags, checkpoint)
        except PaliGemmaError as error:
            self.fault = error

    def __call__(self, batch: dict) -> dict:
        asked = [Question(**files.parse_json(question)) for question in batch["question"]]
        try:
            if self.fault is not None:
                raise self.fault
            return {"row": [json.dumps(row) for row, _, _ in job.answer(self.annotator, asked, self.flags)]}
        except PaliGemmaError as error:
            return {"row": [json.dumps({"fault": error.to_json()})]}


@contextmanager
def ray_running(flags: Flags) -> Iterator[None]:
    """Connects to the cluster, or starts Ray on this machine and ends it again. Raises: AccessError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error" if flags.verbose else "fatal")
    if flags.address is None:  # its processes know each other by a word; without one from us Ray would keep one in ~/.ray
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray.data

    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.INFO if flags.verbose else logging.ERROR)
    options = {"log_to_driver": flags.verbose, "logging_level": logging.INFO if flags.verbose else logging.ERROR}
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        if flags.address is None:
            cores = flags.workers * cpus_each(flags)
            options |= {"num_cpus": cores, "include_dashboard": False, "_temp_dir": folder, "object_store_memory": STORE_BYTES}
        try:
            ray.init(address=flags.address or "local", **options)
        except ConnectionError as error:
            advice = "Start one with ray start --head; if it wants a token, set RAY_AUTH_MODE=token here, too."
            raise AccessError(f"no Ray cluster answers at {flags.address}. {advice}", path=flags.address) from error
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        try:
            yield
        finally:
            ray.shutdown()


def cpus_each(flags: Flags) -> int:
    """Cores of a worker."""
    return flags.cpus or max(1, machine.available_cores() // flags.workers)


def gpus_each(flags: Flags) -> float:
    """GPUs of a worker."""
    import ray

    if flags.gpus is not None:
        return flags.gpus
    return 1 if ray.cluster_resources().get("GPU") and not flags.only_cpu and flags.device in ("auto", "cuda") else 0


def in_lists(asked: Iterable[Question], length: int) -> Iterator[list[str]]:
    """The questions as JSON, so many at a time."""
    asked = iter(asked)
    while some := list(islice(asked, length)):
        yield [json.dumps(asdict(question)) for question in some]


def read_row(text: str) -> dict:
    """A row as a worker sent it. Raises: PaliGemmaError for the fault that came in its place."""
    row = files.parse_json(text, LONGEST_LINE)
    if "fault" in row:
        raise PaliGemmaError(row["fault"]["message"], path=row["fault"]["path"], code=row["fault"]["code"])
    return row


def rows_of(flags: Flags, lists: Iterable[list[str]]) -> Iterator[dict]:
    """The rows, in the order in which lists come back. Raises: PaliGemmaError for what a worker met, DeviceError for Ray."""
    import pyarrow
    import ray.data

    tables = [pyarrow.table({"question": questions}) for questions in lists]
    rows = ray.data.from_arrow(tables).map_batches(
        Worker,
        fn_constructor_args=(flags, os.getcwd()),
        batch_size=None,  # a list as it is
        compute=ray.data.ActorPoolStrategy(size=flags.workers),
        num_cpus=cpus_each(flags),
        num_gpus=gpus_each(flags),
    )
    try:
        for batch in rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from map(read_row, batch["row"].to_pylist())
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise DeviceError(f"Ray gave up: {reason} The rows so far are kept; --verbose shows the workers' messages.") from error


def work(flags: Flags, checkpoint: "Checkpoint", journal: Journal) -> None:
    """Asks what has no row yet and writes rows as lists come back."""
    known = len(journal.known)
    left = job.count_left(job.questions(flags, checkpoint.kind), journal)
    if not left:
        return
    length = min(ROUNDS_PER_LIST * flags.rows, math.ceil(left / flags.workers / LISTS_PER_WORKER))
    lists = in_lists(job.claim_left(job.questions(flags, checkpoint.kind), journal), length)
    # Once before, for Ray takes long to start, and once behind, for then it has taken SIGTERM for itself.
    with commandline.interruptible(), ray_running(flags), commandline.interruptible(), job.progress(known, known + left) as bar:
        for row in rows_of(flags, lists):
            journal.write(row)
            bar.update()


def program(flags: Flags) -> None:
    """Ray, pictures, file, rows: in this order, so that what is wrong is said before the slow part."""
    commandline.relay_logs(flags.verbose)
    if not all(importlib.util.find_spec(name) for name in ("ray", "pyarrow")):
        annotate = commandline.command("annotate")
        raise DeviceError(f'Ray is not installed. Install it with pip install "ray[data]", or use {annotate}, which needs none.')
    output = files.expand(flags.output)
    job.check_outputs(flags, output)
    job.check_pictures(flags)
    checkpoint = flags.open()
    job.check_outputs(flags, output, model=checkpoint.files)
    with job.open_rows(flags, checkpoint, output) as journal:
        work(flags, checkpoint, journal)
    job.conclude(journal)


def main() -> int:
    sys.excepthook = commandline.report_bug
    return commandline.run(Flags, program)
