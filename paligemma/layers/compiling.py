"""Compiles the C++ source once, and keeps what is compiled where no other user can write.

The first use compiles cpp/kernels.cpp, in a few seconds, into $XDG_CACHE_HOME/paligemma, ~/.cache/paligemma or, if these cannot
be used, into a folder of this user inside the system's temporary folder. The name of the compiled file depends on the source, the
compiler and the processor, so machines that share a home folder never load code that was compiled for another one. Loading a
compiled file runs its code, so a file or folder that another user could have written, or a damaged file, is not used
(`is_private`, `is_whole`). $CXX names the compiler.

Checked in tests/layers/test_compiling.py.
"""

import errno
import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from paligemma.files import move_into_place

log = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "cpp" / "kernels.cpp"
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC", "-std=c++17", "-Wno-psabi")
COMPILE_TIMEOUT_S = 120
RETRY_AFTER_S = 3600  # compiling is retried at most once per hour if the source does not compile or the compiler hangs
MIN_FREE_BYTES = 2**23  # must be free on the disk before compiling; several times what compiling needs
MAX_COMPILER_FILE_BYTES = 2**26  # limit for each file that a compiler writes: endless messages would fill the disk
DIGEST = hashlib.sha256
SLOWER = "decoding will be slower, with torch's own matrix products"  # the first words of messages about missing kernels
OPEN: list[Iterator[Path]] = []  # generators of cache_folders: one that is freed would delete the temporary folder it made


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The instruction sets of the processor, under Linux's names ("avx512_vnni", "amx_bf16", ...); empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":")[1] for line in lines if line.startswith(("flags", "Features"))), "").split())


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


def run_compiler(command: list[str], messages: Path) -> int:
    """Runs a compiler and returns its exit status. Its messages, in English, are written to the file `messages`.

    The compiler's temporary files are written to the folder of `messages`.

    Raises: subprocess.TimeoutExpired, after ending the compiler and all processes that it started; OSError.
    """
    is_group, environment = os.name == "posix", os.environ | {"LC_ALL": "C", "TMPDIR": str(messages.parent)}
    with messages.open("wb") as to:
        running = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=to, stderr=to, env=environment, start_new_session=is_group
        )  # fmt: skip
        # prlimit exists only on Linux. It raises ValueError if the compiler's limit is already lower, which is fine.
        with suppress(ImportError, AttributeError, OSError, ValueError):
            import resource

            resource.prlimit(running.pid, resource.RLIMIT_FSIZE, (MAX_COMPILER_FILE_BYTES,) * 2)
        try:
            return running.wait(COMPILE_TIMEOUT_S)
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


def compiled_name(source: Path, compiler: list[str]) -> str:
    """The name, without suffix, of the file that this compiler makes from this source for this processor."""
    found = os.stat(compiler[0])
    machine = (platform.machine(), *sorted(cpu_flags()))
    sources = [file.read_bytes() for file in sorted(source.parent.glob("*.h")) + [source]]
    made_of = (sources, compiler, found.st_size, found.st_mtime_ns, FLAGS, machine)
    return f"kernels-{DIGEST(repr(made_of).encode()).hexdigest()[:20]}"


def compile_once(source: Path, folder: Path) -> Path | None:
    """The compiled library in `folder`, made if it is missing or damaged; None if it cannot be made.

    The file is written under another name and renamed when it is complete, so programs that start at the same time, or are
    interrupted, never leave a partial file. After a compile error or a timeout, compiling is not retried for RETRY_AFTER_S. After
    other failures, such as a full disk or too little memory, it is retried at the next start.

    Raises: OSError if the folder cannot be written.
    """
    compiler = find_compiler()
    if not compiler or not source.exists():
        log.info("%s: there is no %s.", SLOWER, source.name if compiler else "C++ compiler")
        return None
    name = compiled_name(source, compiler)
    target, failed = folder / f"{name}.so", folder / f"{name}.failed"
    if is_whole(target):
        return target
    if is_private(failed, is_folder=False) and abs(time.time() - failed.stat().st_mtime) < RETRY_AFTER_S:
        log.warning("%s: compiling %s failed within the last hour, see %s.", SLOWER, source.name, failed)
        return None
    if shutil.disk_usage(folder).free < MIN_FREE_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    log.info("compiling %s into %s, once", source.name, folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".compiling-", ignore_cleanup_errors=True) as temporary:
        made, messages = Path(temporary) / "kernels.so", Path(temporary) / "messages"
        try:
            status, reason = run_compiler([*compiler, *FLAGS, str(source), "-o", str(made)], messages), ""
        except subprocess.TimeoutExpired:
            status, reason = -1, f"{compiler[0]} took longer than {COMPILE_TIMEOUT_S} s."
        if status == 0:
            content = made.read_bytes()
            made.write_bytes(content + DIGEST(content).digest())
            made.chmod(0o700)
            move_into_place(made, target)
            failed.unlink(missing_ok=True)
            return target
        with messages.open(errors="replace") as stream:
            output = stream.read(2**20)
        if reason or re.search(rf"^.*{re.escape(source.name)}:\d+:\d+: error: ", output, re.MULTILINE):
            messages.write_text(reason or output)
            move_into_place(messages, failed)
        ended = f"{compiler[0]} ended with status {status}"
        last = reason or next((line for line in output.splitlines() if "error" in line), ended)
        log.warning("%s: %s does not compile: %s", SLOWER, source.name, last)
        return None
