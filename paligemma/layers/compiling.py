"""Compiles the C++ source once, and keeps what is compiled where no other user can write.

The first use compiles cpp/kernels.cpp for one instruction set, in a few seconds, into $XDG_CACHE_HOME/paligemma,
~/.cache/paligemma or, if these cannot be used, into a folder of this user inside the system's temporary folder. The name of the
compiled file depends on the source, the compiler and the processor, so machines that share a home folder never load code that was
compiled for another one. Loading a compiled file runs its code, so a file or folder that another user could have written, or a
damaged file, is not used (`is_private`, `is_whole`). $CXX names the compiler.

A compiled file is checked by a process of its own before its first use on a machine (`check_once`); the result is kept beside it.

Checked in tests/layers/test_compiling.py.
"""

import errno
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from paligemma.errors import PaliGemmaError
from paligemma.files import JSONFault, move_into_place, parse_json, read_json
from paligemma.layers.instruction_sets import cpu_flags

log = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "cpp" / "kernels.cpp"
FLAGS = ("-O2", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC", "-std=c++17", "-Wno-psabi")
COMPILE_TIMEOUT_S = 120
RETRY_AFTER_S = 3600  # compiling is retried at most once per hour if the source does not compile or the compiler hangs
MIN_FREE_BYTES = 2**23  # must be free on the disk before compiling; several times what compiling needs
MAX_FILE_BYTES = 2**26  # limit for each file that a compiler or a check writes: endless messages would fill the disk
DIGEST = hashlib.sha256
# What compilers say about a fault of the source, and GCC or clang about a flag that they do not know, because they are too old.
REJECTED = re.compile(
    r"^.*:\d+:\d+: error: |unrecognized command.line option|unknown argument|bad value|unsupported option", re.MULTILINE
)
SLOWER = "decoding will be slower, with torch's own matrix products"  # the first words of messages about missing kernels
CHECK_TIMEOUT_S = 120
RECHECK_AFTER_S = 24 * 3600  # a library that failed its check is checked again after a day: the machine may have been repaired
# What happens to a program that executes an instruction that the processor lacks or the system does not allow, or goes astray
CRASHES = {
    getattr(signal, name) for name in ("SIGILL", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGABRT", "SIGTRAP") if hasattr(signal, name)
}
ROOT = Path(__file__).resolve().parents[2]  # the folder from which `paligemma` is imported
OPEN: list[Iterator[Path]] = []  # generators of cache_folders: one that is freed would delete the temporary folder it made


def is_private(path: Path, is_folder: bool) -> bool:
    """Whether a folder or file exists, is not a link, belongs to this user, and cannot be written by other users."""
    try:
        found = path.lstat()
    except OSError:
        return False
    if not (stat.S_ISDIR if is_folder else stat.S_ISREG)(found.st_mode):
        return False
    if not hasattr(os, "geteuid"):  # Windows: the home folder is protected by other means
        return True
    return found.st_uid == os.geteuid() and not found.st_mode & 0o022


def could_be_exchanged(folder: Path) -> bool:
    """Whether another user may rename a folder above this one and replace it by their own."""
    if not hasattr(os, "geteuid"):
        return False
    for above in (above.stat() for above in folder.parents[:-1]):
        by_others = above.st_mode & 0o002 or (above.st_mode & 0o020 and above.st_gid != os.getegid())
        if above.st_uid not in (0, os.geteuid()) or (by_others and not above.st_mode & stat.S_ISVTX):
            return True
    return False


def cache_folders() -> Iterator[Path]:
    """Writable private folders, the best first. Missing folders are made."""
    with suppress(RuntimeError):  # no home folder
        named = Path(os.environ.get("XDG_CACHE_HOME", ""))  # its specification says that relative paths must be ignored
        yield from private_folder((named if named.is_absolute() else Path.home() / ".cache") / "paligemma")
    with suppress(OSError):  # no folder for temporary files
        user = f"-{os.geteuid()}" if hasattr(os, "geteuid") else ""
        yield from private_folder(Path(tempfile.gettempdir()) / f"paligemma{user}")
        with tempfile.TemporaryDirectory(prefix="paligemma-", ignore_cleanup_errors=True) as folder:  # used by this process only
            yield Path(folder)


def private_folder(folder: Path) -> Iterator[Path]:
    """Yields the folder, which is made if missing; nothing if it cannot be made, or if another user could put a file into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if is_private(folder, is_folder=True) and not could_be_exchanged(folder.resolve()):
            yield folder
        else:
            log.info("%s is not used: another user could write there.", folder)
    except OSError as error:
        log.info("%s is not used: %s.", folder, error.strerror or error)


def set_private_compile_cache() -> None:
    """Sets a private cache folder for torch.compile. Another user could have created its default folder and put code into it."""
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        OPEN.append(folders := cache_folders())
        with suppress(StopIteration):  # if no folder can be written, the variable stays unset
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(next(folders) / "inductor")


def is_whole(file: Path) -> bool:
    """Whether a file is private and ends with the digest of its content. Loading a truncated library would crash the process."""
    if not is_private(file, is_folder=False):
        return False
    try:
        content = file.read_bytes()
    except OSError:
        return False
    size = DIGEST().digest_size
    return content[-size:] == DIGEST(content[:-size]).digest()


def run(command: list[str], messages: Path, timeout_s: float) -> int:
    """Runs a program (a compiler, a check) and returns its exit status. What it prints, in English, is written to `messages`.

    The program's temporary files are written to the folder of `messages`, and it finds this package.

    Raises: subprocess.TimeoutExpired, after ending the program and all processes that it started; OSError.
    """
    is_group, path = os.name == "posix", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"LC_ALL": "C", "TMPDIR": str(messages.parent), "PYTHONPATH": path}
    with messages.open("wb") as to:
        running = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=to, stderr=to, env=environment, cwd=ROOT, start_new_session=is_group
        )  # fmt: skip
        # prlimit exists only on Linux. It raises ValueError if the program's limit is already lower, which is fine.
        with suppress(ImportError, AttributeError, OSError, ValueError):
            import resource

            resource.prlimit(running.pid, resource.RLIMIT_FSIZE, (MAX_FILE_BYTES,) * 2)
        try:
            return running.wait(timeout_s)
        finally:
            if running.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(running.pid, signal.SIGKILL) if is_group else running.kill()
                running.wait()


def find_compiler() -> list[str]:
    """The command that starts the compiler: $CXX (such as "ccache g++") if it is set, else g++ or clang++; [] if not found."""
    text = os.environ.get("CXX", "")
    named = [text] if shutil.which(text) else text.split()
    for words in [named] if named else [["g++"], ["clang++"]]:
        if program := shutil.which(words[0]):
            return [program, *words[1:]]
    if named:
        log.warning("%s: $CXX names the compiler %s, which does not exist.", SLOWER, named[0])
    return []


class LibraryError(Exception):
    """The library cannot be compiled, or must not be used. is_of_instructions: another instruction set may work."""

    def __init__(self, message: str, is_of_instructions: bool = False):
        super().__init__(message)
        self.is_of_instructions = is_of_instructions


def compiled_name(source: Path, compiler: list[str], flags: tuple[str, ...]) -> str:
    """The name, without suffix, of the file that this compiler makes from this source with these flags on this processor."""
    found = os.stat(compiler[0])
    machine = (platform.machine(), *sorted(cpu_flags()))
    sources = [file.read_bytes() for file in sorted(source.parent.glob("*.h")) + [source]]
    made_of = (sources, compiler, found.st_size, found.st_mtime_ns, FLAGS, flags, machine)
    return f"kernels-{DIGEST(repr(made_of).encode()).hexdigest()[:20]}"


def keep(made: Path, target: Path) -> None:
    """Gives a complete file its name. Only this user can read and write it."""
    made.chmod(0o700)
    move_into_place(made, target)


def read_messages(file: Path) -> str:
    """What a compiler said, at most a million characters of it."""
    with file.open(errors="replace") as stream:
        return stream.read(2**20)


def compile_once(source: Path, folder: Path, flags: tuple[str, ...] = ()) -> Path:
    """The library in `folder` that is compiled with FLAGS and `flags`; it is made if it is missing or damaged.

    The file is written under another name and renamed when it is complete, so programs that start at the same time, or are
    interrupted, never leave a partial file. If the compiler rejects the source or the flags, or hangs, compiling is not retried
    for RETRY_AFTER_S. After other failures, such as a full disk or too little memory, it is retried at the next start.

    Raises: LibraryError; OSError if the folder cannot be written.
    """
    compiler = find_compiler()
    if not compiler or not source.exists():
        raise LibraryError(f"there is no {source.name if compiler else 'C++ compiler'}")
    name = compiled_name(source, compiler, flags)
    target, failed = folder / f"{name}.so", folder / f"{name}.failed"
    if is_whole(target):
        return target
    if is_private(failed, is_folder=False) and abs(time.time() - failed.stat().st_mtime) < RETRY_AFTER_S:
        said = f"compiling {source.name} failed within the last hour, see {failed}"
        raise LibraryError(said, REJECTED.search(read_messages(failed)) is not None)
    if shutil.disk_usage(folder).free < MIN_FREE_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    log.info("compiling %s into %s, once: %s", source.name, folder, " ".join(flags))
    with tempfile.TemporaryDirectory(dir=folder, prefix=".compiling-", ignore_cleanup_errors=True) as temporary:
        made, messages = Path(temporary) / "kernels.so", Path(temporary) / "messages"
        try:
            status, hangs = run([*compiler, *FLAGS, *flags, str(source), "-o", str(made)], messages, COMPILE_TIMEOUT_S), False
        except subprocess.TimeoutExpired:
            status, hangs = -1, True
            messages.write_text(f"{compiler[0]} took longer than {COMPILE_TIMEOUT_S} s.")
        if status == 0:
            content = made.read_bytes()
            made.write_bytes(content + DIGEST(content).digest())
            keep(made, target)
            failed.unlink(missing_ok=True)
            return target
        output = read_messages(messages)
        is_rejected = REJECTED.search(output) is not None
        if hangs or is_rejected:
            keep(messages, failed)
        ended = f"{compiler[0]} ended with status {status}"
        reason = output if hangs else next((line for line in output.splitlines() if "error" in line), ended)
        raise LibraryError(f"{source.name} does not compile: {reason}", is_rejected)


def check_once(file: Path, program: str, *arguments: str) -> dict[str, Any]:
    """The result of a program that checks a compiled file on this machine; it is kept beside the file and made if it is missing.

    The program is a module of this package. It gets the file and the arguments, and prints one line with a JSON object, in which
    "reason" says why the file must not be used. It runs as a process of its own, because a wrong file can crash or hang.

    Raises: LibraryError if the file must not be used, or cannot be checked now; OSError if the folder cannot be written.
    """
    kept = file.with_suffix(".checked")
    if is_private(kept, is_folder=False):
        with suppress(PaliGemmaError):
            found = read_json(kept)
            if not found.get("reason") or abs(time.time() - kept.stat().st_mtime) < RECHECK_AFTER_S:
                return usable(found)
    log.info("checking %s, once", file)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".checking-", ignore_cleanup_errors=True) as temporary:
        messages, result = Path(temporary) / "messages", Path(temporary) / "result"
        try:
            status = run([sys.executable, "-m", program, str(file), *arguments], messages, CHECK_TIMEOUT_S)
            found = {"reason": f"its check ended with {signal.Signals(-status).name}"} if -status in CRASHES else None
        except subprocess.TimeoutExpired:
            status, found = -1, {"reason": f"its check took longer than {CHECK_TIMEOUT_S} s"}
        last = (read_messages(messages).splitlines() or [f"status {status}"])[-1]
        if found is None:
            try:
                found = parse_json(last)
            except JSONFault:
                raise LibraryError(f"{file.name} cannot be checked: {last}") from None
        result.write_text(json.dumps(found))
        keep(result, kept)
    return usable(found)


def usable(found: dict[str, Any]) -> dict[str, Any]:
    """The result of a check. Raises: LibraryError if it says that the file must not be used."""
    if found.get("reason"):
        raise LibraryError(str(found["reason"]), is_of_instructions=True)
    return found
