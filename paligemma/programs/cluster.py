"""Runs annotate on many machines: `python -m paligemma cluster photos --task detect cat --output cats.jsonl --workers 8`.

Ray Data sends lists of questions to workers. Each worker is a process with its own model; it makes rows with job.answer, as
annotate does. This process collects the rows and writes them to the same resumable file as annotate (journal.py). If a worker
dies, Ray starts it again and sends its list again, so that no row is lost or repeated. If this process dies, the same command
resumes after the last row. Without --address Ray runs only on this machine, in a temporary folder, and sends no usage reports.
Needs Ray: pip install "ray[data]". Checked in tests/programs/test_cluster.py.
"""

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
from paligemma.programs.journal import MAX_LINE_BYTES, Journal
from paligemma.programs.options import require

if TYPE_CHECKING:
    from paligemma.opened import Checkpoint

LISTS_PER_WORKER = 4  # about this many or more; with short lists, workers wait less while another finishes the last list
# Maximum length of a list, in multiples of --rows. Each list ends with a batch that is not full, so longer lists are faster.
MAX_BATCHES_PER_LIST = 8
STORE_BYTES = 256 << 20  # memory that Ray's processes share; rows need little


@dataclass(frozen=True, kw_only=True)
class Flags(JobFlags):
    """Asks PaliGemma models on many machines, or in several processes on this one, about many pictures.

      python -m paligemma cluster photos --task detect "cat ; dog" --output pets.jsonl --workers 2             on this machine
      python -m paligemma cluster photos --task caption --output captions.jsonl --workers 16 --address auto    on a Ray cluster

    The rows are the same as those of annotate, which can continue the file, make drawings and export the objects. Every machine
    of a cluster needs this code, the model and the pictures under the same paths. Needs Ray: pip install "ray[data]".

    Args:
        workers: number of processes, each with its own model
        address: address of a Ray cluster; "auto" finds the cluster that this machine belongs to
        cpus: cores of each worker; by default an equal share of the cores of this machine
        gpus: GPUs of each worker; with 0.5 two workers share one; by default 1 if the cluster has GPUs
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
    """A process with the model. It gets questions and returns rows, both as JSON, so that Ray needs only one text column.

    If the model cannot be loaded, the error is returned instead of rows, because Ray would retry forever after a raised error.

    Args:
        flags: the flags of the job.
        folder: relative names of pictures start from this folder.
    """

    def __init__(self, flags: Flags, folder: str):
        os.chdir(folder)
        self.flags = flags
        self.load_error: PaliGemmaError | None = None
        try:
            self.annotator = job.make_annotator(flags, flags.open())
        except PaliGemmaError as error:
            self.load_error = error

    def __call__(self, batch: dict) -> dict:
        questions = [Question(**files.parse_json(question)) for question in batch["question"]]
        try:
            if self.load_error is not None:
                raise self.load_error
            return {"row": [json.dumps(row) for row, _, _ in job.answer(self.annotator, questions, self.flags)]}
        except PaliGemmaError as error:
            return {"row": [json.dumps({"fault": error.to_json()})]}


@contextmanager
def ray_running(flags: Flags) -> Iterator[None]:
    """Connects to the cluster, or starts Ray on this machine and stops it afterwards. Raises: AccessError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error" if flags.verbose else "fatal")
    if flags.address is None:  # without this token, Ray would store one in ~/.ray
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
            advice = "Start one with ray start --head; if the cluster needs a token, set RAY_AUTH_MODE=token here too."
            raise AccessError(f"no Ray cluster answers at {flags.address}. {advice}", path=flags.address) from error
        ray.data.DataContext.get_current().enable_progress_bars = False
        try:
            yield
        finally:
            ray.shutdown()


def cpus_each(flags: Flags) -> int:
    """The number of cores of a worker."""
    return flags.cpus or max(1, machine.available_cores() // flags.workers)


def gpus_each(flags: Flags) -> float:
    """The number of GPUs of a worker."""
    import ray

    if flags.gpus is not None:
        return flags.gpus
    takes_gpus = not flags.only_cpu and (flags.device in ("auto", "cuda") or "," in flags.device)
    # Ray shows each worker its own GPUs, as cuda:0, cuda:1, ...; a device such as cuda:0,cuda:1 names two of them.
    return flags.device.count(",") + 1 if takes_gpus and ray.cluster_resources().get("GPU") else 0


def in_lists(questions: Iterable[Question], length: int) -> Iterator[list[str]]:
    """The questions as JSON, in lists of `length`."""
    questions = iter(questions)
    while part := list(islice(questions, length)):
        yield [json.dumps(asdict(question)) for question in part]


def read_row(text: str) -> dict:
    """A row that a worker sent as JSON. Raises: PaliGemmaError if the worker sent an error instead of a row."""
    row = files.parse_json(text, MAX_LINE_BYTES)
    if "fault" in row:
        raise PaliGemmaError(row["fault"]["message"], path=row["fault"]["path"], code=row["fault"]["code"])
    return row


def rows_of(flags: Flags, lists: Iterable[list[str]]) -> Iterator[dict]:
    """The rows, in the order in which the workers return the lists. Raises: PaliGemmaError of a worker, DeviceError of Ray."""
    import pyarrow
    import ray.data

    tables = [pyarrow.table({"question": questions}) for questions in lists]
    rows = ray.data.from_arrow(tables).map_batches(
        Worker,
        fn_constructor_args=(flags, os.getcwd()),
        batch_size=None,  # one batch per list
        compute=ray.data.ActorPoolStrategy(size=flags.workers),
        num_cpus=cpus_each(flags),
        num_gpus=gpus_each(flags),
    )
    try:
        for batch in rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from map(read_row, batch["row"].to_pylist())
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise DeviceError(f"Ray failed: {reason} The rows so far are kept; --verbose shows the workers' messages.") from error


def work(flags: Flags, checkpoint: "Checkpoint", journal: Journal) -> None:
    """Asks the questions that have no row yet. Writes the rows of each list that a worker returns."""
    known = len(journal.known)
    left = job.count_unanswered(job.questions(flags, checkpoint.kind), journal)
    if not left:
        return
    length = min(MAX_BATCHES_PER_LIST * flags.rows, math.ceil(left / flags.workers / LISTS_PER_WORKER))
    lists = in_lists(job.claim_unanswered(job.questions(flags, checkpoint.kind), journal), length)
    # interruptible() is needed twice: ray_running is slow, and Ray replaces the SIGTERM handler.
    with commandline.interruptible(), ray_running(flags), commandline.interruptible(), job.progress(known, known + left) as bar:
        for row in rows_of(flags, lists):
            journal.write(row)
            bar.update()


def program(flags: Flags) -> None:
    """Checks Ray, the outputs, the pictures and the model, so that errors are reported early; then runs the job."""
    commandline.relay_logs(flags.verbose)
    if not all(importlib.util.find_spec(name) for name in ("ray", "pyarrow")):
        annotate = commandline.command("annotate")
        raise DeviceError(f'Ray is not installed. Install it with pip install "ray[data]", or use {annotate} without Ray.')
    output = files.expand(flags.output)
    job.check_outputs(flags, output)
    job.check_pictures(flags)
    checkpoint = flags.open()
    job.check_outputs(flags, output, model=checkpoint.files)
    with job.open_rows(flags, checkpoint, output) as journal:
        work(flags, checkpoint, journal)
    job.conclude(journal)


def main() -> int:
    return commandline.run(Flags, program)
