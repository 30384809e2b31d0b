"""What a fuzzer is, and what becomes of one input: nothing, an error of errors.py, or a fault.

A fuzzer makes the files of an input from a seed and hands them to a reader of this project. A fault is whatever a user must never
meet: an exception of any other class (panics of native code are a BaseException), an error with the exit code of another kind or
with a message that does not fit on a line, a word that native code wrote on stderr, more than 20 s or 2 GB, the process's end.

`faults_of` tries one input in this process. `run` does so for a night: a forked child tries a batch, and this process learns from
a pipe which input it was when the child dies. Checked in tests/fuzz/test_fuzz.py.
"""

import contextlib
import io
import json
import os
import re
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from unittest import mock

from paligemma.errors import PaliGemmaError
from paligemma.programs import commandline

Files = dict[str, bytes]  # an input: the names of its files and what is in them

MOST_SECONDS = 20
MOST_BYTES = 2 << 30
LONGEST_MESSAGE = 1000  # letters on the line that a user sees
NOT_FOR_TERMINALS = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")  # controls, other ends of lines, other directions
HANG_SECONDS = 180  # of waiting instead of computing
BATCH_SECONDS = 10


class Fuzzer:
    """One kind of input.

    `codes` are the exit codes that its errors may have, `inputs` how many random ones the test suite tries.
    """

    name = ""
    codes: tuple[int, ...] = ()
    inputs = 20

    def __init__(self, folder: Path):
        """Makes what is damaged later; `folder` is its own."""

    def sound(self) -> Files:
        """An input without a fault, which must be taken: else the others would never get past the first check."""
        raise NotImplementedError

    def known(self) -> list[Callable[[], Files]]:
        """Makers of inputs that broke a reader once, or would break a careless one. They are tried first: seeds 0, 1, 2, ..."""
        return []

    def make(self, random: Random) -> Files:
        """A random input."""
        raise NotImplementedError

    def check(self, files: Files, folder: Path) -> None:
        """Hands the input to the project. Raises: AssertionError where a second opinion differs.

        Args:
            folder: empty, for the files of this input.
        """
        raise NotImplementedError

    def input(self, seed: int) -> Files:
        """The input of a seed, always the same."""
        known = self.known()
        return known[seed]() if seed < len(known) else self.make(Random(f"{self.name} {seed}"))


def write_files(files: Files, folder: Path) -> None:
    """Puts an input's files into a folder; a name that is there, such as a link to a valid file, is replaced."""
    for name, data in files.items():
        path = folder / name
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


# One input


class TookTooLong(BaseException):
    """The alarm. Not an Exception, so that no reader takes it for a fault of its file."""


@contextlib.contextmanager
def native_stderr() -> Iterator[list[str]]:
    """Collects what is written to the descriptor 2 past Python, for what Python writes goes to a text meanwhile."""
    said: list[str] = []
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            said.append(file.read(2000).decode("utf-8", "replace"))


def only_this_machine(host: str | bytes | None, *args: object, **kwargs: object) -> list:
    """Instead of socket.getaddrinfo: no name is looked up, and only this machine's own addresses exist."""
    if host in (None, "localhost", "127.0.0.1", "::1"):
        return LOOK_UP("127.0.0.1", *args, **kwargs)
    raise socket.gaierror(socket.EAI_NONAME, "the fuzzers have no network")


LOOK_UP = socket.getaddrinfo


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raises TookTooLong inside, when this process has computed for so long."""

    def ring(_signum: int, _frame: object) -> None:
        raise TookTooLong

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def where(error: BaseException) -> str:
    """The last line of this project that an exception passed through, and the last line of all."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "site-packages" not in frame.filename and "/lib/python" not in frame.filename]
    return " < ".join(dict.fromkeys(f"{Path(frame.filename).name}:{frame.lineno}" for frame in (*ours[-1:], *frames[-1:])))


def report_faults(error: PaliGemmaError, codes: tuple[int, ...]) -> list[str]:
    """What is wrong with an error of ours, as the user meets it."""
    faults = []
    if error.code not in codes:
        faults.append(f"{type(error).__name__} with code {error.code}, not {codes} ({where(error)}): {error.message[:200]}")
    stderr, stdout = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(stdout):
        commandline.report(error, True, False)
    line = stderr.getvalue()
    if line.count("\n") != 1 or len(line) > LONGEST_MESSAGE or NOT_FOR_TERMINALS.search(line[:-1]):
        faults.append(f"the message ({where(error)}) has {len(line)} letters or some that move what stands there: {line[:200]!r}")
    json.loads(stdout.getvalue())
    return faults


def faults_of(fuzzer: Fuzzer, files: Files) -> list[str]:
    """Tries an input in this process. Returns: what a user must never meet, a line each."""
    faults = []
    with tempfile.TemporaryDirectory() as folder, native_stderr() as said, mock.patch("socket.getaddrinfo", only_this_machine):
        try:
            fuzzer.check(files, Path(folder))
        except PaliGemmaError as error:
            faults += report_faults(error, fuzzer.codes)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001  (whatever it is, it has escaped)
            faults.append(f"{type(error).__name__} ({where(error)}): {str(error)[:200]}")
    return faults + [f"native code wrote on stderr: {text.strip()[:300]}" for text in said if text.strip()]


# A night


@dataclass
class Report:
    """What came of a fuzzer's run."""

    name: str
    inputs: int = 0
    errors: dict[int, list[str]] = field(default_factory=dict)  # seed -> faults
    slowest: tuple[float, int] = (0.0, -1)  # CPU seconds, seed
    largest: tuple[int, int] = (0, -1)  # bytes more than before, seed

    def __str__(self) -> str:
        text = f"{self.name:<12} {self.inputs:>8} inputs, {len(self.errors)} with a fault"
        text += f", slowest {self.slowest[0]:.2f} s (seed {self.slowest[1]})"
        text += f", most memory {self.largest[0] / 2**20:.0f} MB (seed {self.largest[1]})"
        kinds: dict[str, list[int]] = {}  # an exception's class and place, or the first words -> seeds
        for seed, faults in sorted(self.errors.items()):
            for fault in faults:
                kinds.setdefault(fault.partition("): ")[0][:80], []).append(seed)
        for seeds in kinds.values():
            seed = seeds[0]
            more = f" and {len(seeds) - 1} more" if len(seeds) > 1 else ""
            text += "".join(
                f"\n    seed {seed}{more}: {fault}"
                for fault in self.errors[seed]
                if seeds is kinds[fault.partition("): ")[0][:80]]
            )
        return text


def memory(name: str) -> int:
    """Bytes of this process by its name in /proc/self/status, VmRSS or VmHWM (the most since the last reset)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    return 0


def try_batch(fuzzer: Fuzzer, seed: int, count: int, out: io.TextIOBase) -> None:
    """In the child: tries inputs and says so line by line, until the time or the count is over."""
    limit = memory("VmSize") + 3 * MOST_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    end = time.monotonic() + BATCH_SECONDS
    for number in range(seed, seed + count):
        print(json.dumps({"begins": number}), file=out, flush=True)
        files = fuzzer.input(number)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        before, start = memory("VmRSS"), time.process_time()
        signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)  # neither signal is handled: they end the process
        signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
        faults = faults_of(fuzzer, files)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        seconds, grown = time.process_time() - start, memory("VmHWM") - before
        if grown > MOST_BYTES:
            faults.append(f"took {grown >> 20} MB")
        print(json.dumps({"ends": number, "seconds": seconds, "bytes": grown, "faults": faults}), file=out, flush=True)
        if time.monotonic() > end:
            return


ENDS = {signal.SIGPROF: f"took more than {MOST_SECONDS} s", signal.SIGALRM: f"waited for more than {HANG_SECONDS} s"}


def fork_batch(fuzzer: Fuzzer, seed: int, count: int, report: Report) -> int:
    """Has a child try a batch, and notes what came of it. Returns: the next seed."""
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        os.close(ours)
        with os.fdopen(theirs, "w") as out:
            try:
                try_batch(fuzzer, seed, count, out)
            except BaseException:
                traceback.print_exc()  # of the harness itself
                raise
            finally:
                out.flush()
                os._exit(0)
    os.close(theirs)
    begun, first = None, seed
    with os.fdopen(ours) as lines:
        for line in map(json.loads, lines):
            if "begins" in line:
                begun = line["begins"]
                continue
            number, begun = line["ends"], None
            report.inputs += 1
            report.slowest = max(report.slowest, (line["seconds"], number))
            report.largest = max(report.largest, (line["bytes"], number))
            if line["faults"]:
                report.errors[number] = line["faults"]
            seed = number + 1
    _, status = os.waitpid(child, 0)
    if begun is not None:
        signum = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        report.inputs += 1
        report.errors[begun] = [ENDS.get(signum) or f"the process ended: {signal.Signals(signum).name if signum else 'exit'}"]
        seed = begun + 1
    if seed == first:
        raise RuntimeError(f"the child of {fuzzer.name} ended without a word: status {status}.")
    return seed


def run(fuzzer: Fuzzer, seconds: float, seed: int, count: int | None, save: Path, most_faults: int = 50) -> Report:
    """Tries inputs from `seed` on for so long, or so many; those with a fault are saved."""
    report, end = Report(fuzzer.name), time.monotonic() + seconds
    last = seed + count if count else sys.maxsize
    while seed < last and time.monotonic() < end and len(report.errors) < most_faults:
        known = set(report.errors)
        seed = fork_batch(fuzzer, seed, min(last - seed, 1000), report)
        for number in set(report.errors) - known:
            folder = save / f"{fuzzer.name}-{number}"
            shutil.rmtree(folder, ignore_errors=True)
            write_files(fuzzer.input(number), folder)
    return report
