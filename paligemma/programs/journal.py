"""An append-only JSONL file of rows. A killed program loses no row, and resumes after the last row.

    {"journal": 1, "settings": {"task": "detect", "text": "cat"}}       a header: the settings of the rows below
    {"image": "a/1.jpg", "prompt": "detect cat", "text": "<loc..."}     a row: the answer to one question about one picture
    {"image": "a/2.jpg", "prompt": "detect cat", "error": {...}}        a row: an error instead of the answer

The image and the prompt identify a row. One process writes at a time (flock). Each row goes to the operating system at
once, so that a killed process loses no row. The file is synced to the disk every few seconds, so that a power cut loses few rows.
A killed process may leave a partial last line, which is removed when the file is opened again.
Checked in tests/programs/test_journal.py.
"""

import json
import os
import stat
import time
from collections.abc import Iterator
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

from paligemma.errors import OutputError, UsageError
from paligemma.files import move_into_place, output_errors, parse_json

FORMAT = 1
BEGINNING = b'{"journal": '  # the first bytes of every header, so of every file
MAX_LINE_BYTES = 256 << 20  # real rows are far shorter
PART = ".part"  # the suffix of the temporary file of drop_failed
NO_ROOM = "Make room, or choose another --output."
SYNC_INTERVAL_S = 5.0  # a power cut loses the rows of at most this many seconds


def key(image: str, prompt: str) -> bytes:
    """The identity of a row, as a hash of 16 bytes, so that a million keys fit in memory."""
    return blake2b(f"{image}\0{prompt}".encode("utf-8", "surrogatepass"), digest_size=16).digest()


def is_header(record: dict) -> bool:
    return "journal" in record


def to_line(record: dict) -> bytes:
    return json.dumps(record).encode() + b"\n"


def read_lines(file: BinaryIO, path: Path) -> Iterator[tuple[bytes, dict]]:
    """Each complete line, headers included, with its content as a dict. Leaves out a partial last line.

    Raises: OutputError for a file that is not a journal, or has a damaged line.
    """
    beginning = file.read(len(BEGINNING))
    file.seek(0)
    if not BEGINNING.startswith(beginning):
        raise OutputError(f"{path} exists and is not a file of rows. Choose another --output.", path=path)
    for number, line in enumerate(iter(partial(file.readline, MAX_LINE_BYTES), b""), 1):
        if not line.endswith(b"\n") and len(line) < MAX_LINE_BYTES:
            return
        try:
            record = parse_json(line, MAX_LINE_BYTES)
            if is_header(record):
                values = record["settings"].values()
                is_valid = record["journal"] == FORMAT and not any(isinstance(value, (dict, list)) for value in values)
            else:
                is_valid = isinstance(record["image"], str) and isinstance(record["prompt"], str)
        except (ValueError, KeyError, TypeError, AttributeError):
            is_valid = False
        if not is_valid:
            advice = "Delete this line; its question is then asked again."
            raise OutputError(f"line {number} of {path} is damaged, or written by another version. {advice}", path=path)
        yield line, record


def rows(path: Path) -> Iterator[dict]:
    """The rows of a file, including rows with errors. Another process may be appending to the file."""
    with open(path, "rb") as file:
        for _, record in read_lines(file, path):
            if not is_header(record):
                yield record


def open_locked(path: Path, flags: int = 0) -> int:
    """A file descriptor for reading and appending, locked for this process. Raises: OutputError."""
    import fcntl  # does not exist on Windows

    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | flags, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OutputError(f"{path} is not a regular file, so no run could resume. Choose another --output.", path=path)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            advice = "Wait for it, or split the work with --shard i/n."
            raise OutputError(f"{path} is being written by another process. {advice}", path=path) from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the file was replaced before it was locked, so open the new file


def differences(before: dict, now: dict) -> list[str]:
    """For each changed setting, a text "name was OLD and is NEW"."""
    names = [name for name in before | now if before.get(name) != now.get(name)]
    return [f"{name} was {json.dumps(before.get(name))} and is {json.dumps(now.get(name))}" for name in names]


class Journal:
    """A file of rows, open for appending; a context manager.

    Args:
        path: the file; it is created if it does not exist.
        settings: the settings that decide the answers, as JSON values; they must equal those in the file.
        is_forced: continue the file even if the settings have changed; a new header is written before the new rows.
        retry_failed: remove the rows with errors, so that their questions are asked again.
    Raises: UsageError if the settings have changed; OutputError if the file cannot be written, is being written by another
        process, or is not a journal.
    """

    def __init__(self, path: str | Path, settings: dict, *, is_forced: bool = False, retry_failed: bool = False):
        self.path = Path(path)
        self.known: set[bytes] = set()
        self.num_answered = self.num_failed = 0
        self.size = 0  # bytes in complete lines
        self.last_sync = time.monotonic()
        with output_errors(self.path, NO_ROOM):
            self.descriptor = open_locked(self.path)
        try:
            file_settings = self.read()
            settings = parse_json(json.dumps(settings))
            changes = differences(file_settings or settings, settings)
            if changes and not is_forced:
                advice = "Choose another --output, or continue this one with --force."
                raise UsageError(f"{self.path} was begun with other settings: {'; '.join(changes)}. {advice}")
            os.ftruncate(self.descriptor, self.size)
            if retry_failed and self.num_failed:
                self.drop_failed()
            if file_settings is None or changes:
                self.append({"journal": FORMAT, "settings": settings})
        except BaseException:
            os.close(self.descriptor)
            raise

    def read(self) -> dict | None:
        """Reads the file. Returns: the settings of its last header; None for a new file."""
        settings = None
        with open(self.descriptor, "rb", closefd=False) as file:
            for line, record in read_lines(file, self.path):
                self.size += len(line)
                if is_header(record):
                    settings = record["settings"]
                else:
                    self.count(record)
        return settings

    def count(self, row: dict) -> None:
        self.known.add(key(row["image"], row["prompt"]))
        if "error" in row:
            self.num_failed += 1
        else:
            self.num_answered += 1

    def drop_failed(self) -> None:
        """Replaces the file by a copy without the rows with errors. If the process is killed meanwhile, the old file stays."""
        part = self.path.with_name(self.path.name + PART)
        self.known.clear()
        self.num_answered = self.num_failed = self.size = 0
        with output_errors(self.path, NO_ROOM):
            descriptor = open_locked(part, os.O_TRUNC)  # locked before the file gets its final name
            try:
                with open(self.path, "rb") as old, open(descriptor, "ab", closefd=False) as new:
                    for line, record in read_lines(old, self.path):
                        if "error" not in record:
                            new.write(line)
                            self.size += len(line)
                            if not is_header(record):
                                self.count(record)
                move_into_place(part, self.path)
            except BaseException:
                os.close(descriptor)
                part.unlink(missing_ok=True)
                raise
        os.close(self.descriptor)
        self.descriptor = descriptor

    def knows(self, image: str, prompt: str) -> bool:
        """Whether an earlier run or this run has asked this question."""
        return key(image, prompt) in self.known

    def claim(self, image: str, prompt: str) -> bool:
        """Marks a question as asked. Returns: True if it was not marked before."""
        is_new = not self.knows(image, prompt)
        self.known.add(key(image, prompt))
        return is_new

    def write(self, row: dict) -> None:
        """Appends a row. Raises: OutputError if the disk is full; the file then ends with the previous row."""
        self.append(row)
        self.count(row)
        if time.monotonic() - self.last_sync > SYNC_INTERVAL_S:
            self.sync()

    def append(self, record: dict) -> None:
        rest = memoryview(to_line(record))
        length = len(rest)
        with output_errors(self.path, NO_ROOM):
            try:
                while rest:
                    rest = rest[os.write(self.descriptor, rest) :]
                self.size += length
            except BaseException:  # also after a signal, remove a partly written line
                os.ftruncate(self.descriptor, self.size)
                raise

    def sync(self) -> None:
        with output_errors(self.path, NO_ROOM):
            os.fsync(self.descriptor)
        self.last_sync = time.monotonic()

    def close(self) -> None:
        try:
            self.sync()
        finally:
            os.close(self.descriptor)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
