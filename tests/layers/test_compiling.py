"""compiling.py: where compiled code is kept, that no other user's code is loaded, and what happens if compiling fails."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from paligemma.gpu import capped_attention, graphs
from paligemma.layers import compiling
from paligemma.layers.compiling import LibraryError

SMALL = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "small.cpp"
    file.write_text(SMALL)
    return file


@pytest.fixture
def cache(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(file.suffix or file.name for file in folder.iterdir())


# A compiled file

COPY = "printf whole >$out"  # a compiler that makes five bytes


def test_a_compiled_file_is_found_again_and_only_its_user_may_touch_it(source, cache, compiler):
    calls = compiler(COPY)
    file = compiling.compile_once(source, cache)
    assert compiling.compile_once(source, cache) == file and len(calls.read_text()) == 1
    assert stat.S_IMODE(file.stat().st_mode) == 0o700 and file.read_bytes()[:5] == b"whole"
    assert names(cache) == [".so"]


@pytest.mark.parametrize("damage", ["cut short", "empty", "changed", "longer", "a link", "writable by all", "of another user"])
def test_a_file_that_is_not_the_one_we_made_is_made_again(source, cache, compiler, damage, tmp_path, monkeypatch):
    calls = compiler(COPY)
    file = compiling.compile_once(source, cache)
    whole = file.read_bytes()
    changed = {"cut short": whole[:-7], "empty": b"", "changed": b"W" + whole[1:], "longer": whole + b"!"}
    if damage in changed:
        file.write_bytes(changed[damage])
    elif damage == "a link":
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    elif damage == "writable by all":
        file.chmod(0o777)
    else:
        real = Path.lstat

        def lstat(path):
            found = real(path)
            return os.stat_result((*found[:4], found.st_uid + 1, *found[5:])) if len(calls.read_text()) == 1 else found

        monkeypatch.setattr(Path, "lstat", lstat)
    assert compiling.compile_once(source, cache) == file and len(calls.read_text()) == 2
    assert file.read_bytes() == whole and not file.is_symlink() and compiling.is_private(file, is_folder=False)


def test_a_real_library_cut_short_is_made_again_and_loads(source, cache):
    if shutil.which("g++") is None:
        return
    file = compiling.compile_once(source, cache)
    file.write_bytes(file.read_bytes()[:3000])
    assert compiling.compile_once(source, cache) == file
    code = f"import ctypes; print(ctypes.CDLL({str(file)!r}).answer())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout == "42\n"


def test_each_source_compiler_flag_and_processor_has_a_file_of_its_own(source, cache, compiler, monkeypatch):
    compiler(COPY)
    files = {compiling.compile_once(source, cache)}
    monkeypatch.setattr(compiling, "cpu_flags", lambda: frozenset({"sse2"}))  # another machine with the same home folder
    files.add(compiling.compile_once(source, cache))
    files.add(compiling.compile_once(source, cache, ("-mavx2",)))
    monkeypatch.setattr(compiling, "FLAGS", ("-O1",))
    files.add(compiling.compile_once(source, cache))
    compiler(COPY + " # newer")
    files.add(compiling.compile_once(source, cache))
    source.write_text(SMALL + "//")
    files.add(compiling.compile_once(source, cache))
    assert len(files) == 6


def test_programs_that_start_together_all_get_the_whole_file(source, cache, compiler):
    compiler("sleep 0.1; " + COPY)
    with ThreadPoolExecutor(4) as pool:
        files = set(pool.map(lambda _: compiling.compile_once(source, cache), range(4)))
    assert [file.name for file in files] == [file.name for file in cache.iterdir()]  # and no partial file is left
    assert compiling.is_whole(*files)


# Failures


def test_no_compiler_means_no_library(source, cache, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(LibraryError):
        compiling.compile_once(source, cache)
    assert names(cache) == []


def test_the_compiler_may_have_arguments_and_a_missing_one_is_named(monkeypatch, tmp_path, caplog):
    spaced = tmp_path / "my c++"
    spaced.write_text("")
    spaced.chmod(0o755)
    for named, words in (("sh -e", [shutil.which("sh"), "-e"]), (str(spaced), [str(spaced)]), (f"{tmp_path}/no -x", [])):
        monkeypatch.setenv("CXX", named)
        assert compiling.find_compiler() == words
    assert f"the compiler {tmp_path}/no, which does not exist" in caplog.text


def test_messages_without_end_do_not_fill_the_disk(source, cache, compiler, monkeypatch):
    monkeypatch.setattr(compiling, "MAX_FILE_BYTES", 2**16)
    compiler("exec yes")
    with pytest.raises(LibraryError):
        compiling.compile_once(source, cache)
    assert names(cache) == []


@pytest.mark.parametrize("said", ["/src/small.cpp:3:1: error: expected a type", "g++: error: unrecognized command-line option"])
def test_a_source_that_does_not_compile_is_tried_once_an_hour_and_says_why(source, cache, compiler, said):
    calls, reasons = compiler(f'echo "{said}" >&2; exit 1'), []
    for _ in range(2):
        with pytest.raises(LibraryError) as caught:
            compiling.compile_once(source, cache)
        assert caught.value.is_of_instructions
        reasons.append(str(caught.value))
    assert len(calls.read_text()) == 1 and names(cache) == [".failed"]
    assert said in reasons[0] and ".failed" in reasons[1]
    (failed,) = cache.iterdir()
    assert said in failed.read_text() and stat.S_IMODE(failed.stat().st_mode) == 0o700
    an_hour_ago = time.time() - compiling.RETRY_AFTER_S - 1
    os.utime(failed, (an_hour_ago, an_hour_ago))
    compiler_now_works = "[ -e $out ] || " + COPY
    with pytest.raises(LibraryError):
        compiling.compile_once(source, cache)
    assert len(calls.read_text()) == 2
    os.utime(failed, (an_hour_ago, an_hour_ago))
    (cache.parent / "c++").write_text((cache.parent / "c++").read_text().replace("exit 1", compiler_now_works))
    compiling.compile_once(source, cache)


@pytest.mark.parametrize(
    "text",
    [
        'echo "small.cpp:9:1: fatal error: error writing to /tmp/x.s: No space left on device" >&2; exit 1',
        'echo "/usr/bin/ld: final link failed: No space left on device" >&2; exit 1',
        'echo "g++: fatal error: Killed signal terminated program cc1plus" >&2; exit 1',
        "kill -9 $$",
    ],
)
def test_what_may_be_over_at_the_next_start_is_not_remembered(source, cache, compiler, text):
    compiler(text)
    with pytest.raises(LibraryError, match="small.cpp does not compile") as caught:
        compiling.compile_once(source, cache)
    assert names(cache) == [] and not caught.value.is_of_instructions
    compiler(COPY)
    compiling.compile_once(source, cache)


def test_a_compiler_that_hangs_is_ended_with_its_children_and_not_asked_again(source, cache, compiler, monkeypatch, tmp_path):
    monkeypatch.setattr(compiling, "COMPILE_TIMEOUT_S", 0.3)
    calls = compiler(f"sleep 600 & echo $! >{tmp_path}/child; wait")
    for _ in range(2):
        with pytest.raises(LibraryError):
            compiling.compile_once(source, cache)
    assert len(calls.read_text()) == 1 and names(cache) == [".failed"]
    child = Path("/proc") / (tmp_path / "child").read_text().strip() / "stat"
    deadline = time.monotonic() + 60
    while child.exists() and child.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_a_full_disk_is_seen_before_the_compiler_starts(source, cache, compiler, monkeypatch):
    calls = compiler(COPY)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(OSError, match="No space left"):
        compiling.compile_once(source, cache)
    assert calls.read_text() == "" and names(cache) == []


# A check

PASSES = 'print("a warning of a library"); print(json.dumps({"reason": None, "threads": sys.argv[2]}))'


@pytest.fixture
def check(tmp_path, monkeypatch):
    """A function that makes a program the check; the file `checked` counts how often it runs."""
    monkeypatch.setattr(compiling, "ROOT", tmp_path)
    counter = tmp_path / "checked"
    counter.write_text("")

    def write(text: str) -> Path:
        start = f"import json, os, signal, sys, time\nopen({str(counter)!r}, 'a').write('.')\n"
        (tmp_path / "some_check.py").write_text(start + text)
        return counter

    return write


def check_once(file: Path) -> dict:
    return compiling.check_once(file, "some_check", "2")


@pytest.fixture
def file(cache):
    (cache / "kernels-1.so").write_text("code")
    return cache / "kernels-1.so"


def test_a_check_that_passes_runs_once_and_its_result_is_kept(file, check):
    calls = check(PASSES)
    for _ in range(2):
        assert check_once(file) == {"reason": None, "threads": "2"}
    assert calls.read_text() == "." and names(file.parent) == [".checked", ".so"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('print(json.dumps({"reason": "wrong results: bf16_gate"}))', "wrong results: bf16_gate"),
        ("os.kill(os.getpid(), signal.SIGILL)", "its check ended with SIGILL"),
        ("import ctypes; ctypes.string_at(0)", "its check ended with SIGSEGV"),
        ("time.sleep(600)", "its check took longer than 0.5 s"),
    ],
)
def test_a_file_that_fails_its_check_is_not_used_and_not_checked_again_for_a_day(file, check, monkeypatch, text, reason):
    if "sleep" in text:
        monkeypatch.setattr(compiling, "CHECK_TIMEOUT_S", 0.5)
    calls = check(text)
    for _ in range(2):
        with pytest.raises(LibraryError, match=reason) as caught:
            check_once(file)
        assert caught.value.is_of_instructions
    assert len(calls.read_text()) <= 1  # under load, it may be ended before it can count
    check(PASSES)
    a_day_ago = time.time() - compiling.RECHECK_AFTER_S - 1
    os.utime(file.with_suffix(".checked"), (a_day_ago, a_day_ago))
    assert check_once(file)["reason"] is None


def test_a_check_may_pass_on_a_system_that_lacks_some_signals():
    missing = "import signal; del signal.SIGBUS, signal.SIGTRAP"  # as on Windows
    code = f"{missing}; from paligemma.layers import compiling; assert 0 not in compiling.CRASHES"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("text", ["import nothing_of_this_name", "os.kill(os.getpid(), signal.SIGKILL)", "print(5)", ""])
def test_a_check_that_could_not_run_is_repeated_at_the_next_start(file, check, text):
    calls = check(text)
    with pytest.raises(LibraryError, match="cannot be checked") as caught:
        check_once(file)
    assert not caught.value.is_of_instructions and names(file.parent) == [".so"]
    check(PASSES)
    assert check_once(file)["reason"] is None and calls.read_text() == ".."


@pytest.mark.parametrize("damage", ["cut short", "a list", "a link", "writable by all"])
def test_a_result_that_is_damaged_or_may_be_of_another_user_is_not_believed(file, check, damage, tmp_path):
    calls = check(PASSES)
    check_once(file)
    kept = file.with_suffix(".checked")
    if damage == "a link":
        kept.rename(tmp_path / "elsewhere")
        kept.symlink_to(tmp_path / "elsewhere")
    elif damage == "writable by all":
        kept.chmod(0o777)
    else:
        kept.write_text('{"reason": nu' if damage == "cut short" else "[]")
    assert check_once(file) == {"reason": None, "threads": "2"} and calls.read_text() == ".."
    assert compiling.is_private(kept, is_folder=False)


# Folders


def folders() -> list[Path]:
    return list(compiling.cache_folders())


def test_compiled_code_is_kept_in_the_cache_folder(places, monkeypatch, tmp_path):
    cache, temporary = places
    assert folders()[:2] == [cache / "paligemma", temporary / f"paligemma-{os.geteuid()}"]
    assert all(stat.S_IMODE(folder.stat().st_mode) == 0o700 for folder in folders()[:2])
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert folders()[0] == tmp_path / "me/.cache/paligemma"
    monkeypatch.setenv("XDG_CACHE_HOME", "here")  # a relative path
    assert folders()[0] == tmp_path / "me/.cache/paligemma"


@pytest.mark.parametrize("fault", ["group", "others", "link", "file", "parent", "of another user", "no home", "read only"])
def test_a_folder_that_another_user_could_write_is_not_used(places, fault, monkeypatch, tmp_path):
    cache, temporary = places
    folder = cache / "paligemma"
    folder.mkdir(parents=True, mode=0o700)
    if fault in ("group", "others"):
        folder.chmod(0o770 if fault == "group" else 0o707)
    elif fault == "link":
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    elif fault == "file":
        folder.rmdir()
        folder.write_text("")
    elif fault == "parent":
        cache.chmod(0o777)
    elif fault == "of another user":
        folder_stat, real = folder.lstat(), Path.lstat
        foreign = os.stat_result((*folder_stat[:4], folder_stat.st_uid + 1, *folder_stat[5:]))
        monkeypatch.setattr(Path, "lstat", lambda path: foreign if path == folder else real(path))
    elif fault == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory.")))
    else:
        real_mkdir = Path.mkdir

        def mkdir(path, *args, **named):
            if path == folder:
                raise OSError(30, "Read-only file system")
            return real_mkdir(path, *args, **named)

        monkeypatch.setattr(Path, "mkdir", mkdir)
    assert folders()[0] == temporary / f"paligemma-{os.geteuid()}"


def test_a_sticky_folder_above_is_fine_and_a_planted_one_in_it_is_not(places):
    cache, temporary = places
    temporary.chmod(0o1777)
    cache.write_text("")  # a file in place of the cache folder, so the temporary folder is used
    planted = temporary / f"paligemma-{os.geteuid()}"
    assert folders()[0] == planted
    planted.chmod(0o777)
    (alone,) = folders()
    assert alone.parent == temporary and alone != planted
    assert not alone.exists()  # it existed for that process only


def test_what_torch_compiles_is_kept_where_no_other_user_can_write(places, monkeypatch):
    cache, _ = places
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/chosen")
    compiling.set_private_compile_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/chosen"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    compiling.set_private_compile_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(cache / "paligemma" / "inductor")
    for function in (graphs.compiled_step, capped_attention.compiled_capped_attention):
        monkeypatch.setattr(compiling, "set_private_compile_cache", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            function.__wrapped__()


def test_torch_keeps_its_own_place_where_no_folder_can_be_written_and_one_for_this_process_stays(monkeypatch, tmp_path):
    def for_this_process():
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            yield Path(folder)

    for folders, is_there in ((lambda: iter(()), False), (for_this_process, True)):
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        monkeypatch.setattr(compiling, "cache_folders", folders)
        compiling.set_private_compile_cache()
        assert ("TORCHINDUCTOR_CACHE_DIR" in os.environ) is is_there
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).parent.is_dir()
    compiling.OPEN.clear()
