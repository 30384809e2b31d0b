"""The file of rows: killed at any byte, full disks, two writers, other settings."""

import json
import os
import resource
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma.errors import OutputError, UsageError
from paligemma.programs import journal
from paligemma.programs.journal import Journal, rows

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"task": "detect", "text": "cat", "quantize": None}


def row(number, **more):
    return {"image": f"{number}.jpg", "prompt": "detect cat", "text": "x" * number} | more


def failed(number):
    return {"image": f"{number}.jpg", "prompt": "detect cat", "error": {"type": "ImageError", "message": "it is no picture"}}


def written(path, *records, **options):
    with Journal(path, SETTINGS, **options) as file:
        for record in records:
            file.write(record)
    return path


def claim(file, record):
    return file.claim(record["image"], record["prompt"])


def numbers(path):
    return [int(record["image"].removesuffix(".jpg")) for record in rows(path)]


@contextmanager
def room_for(size):
    """No file may grow beyond this: the system then writes a part of a row and refuses the rest, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# Growing and resuming


def test_a_file_begins_with_its_settings_and_goes_on_line_by_line(tmp_path):
    path = written(tmp_path / "rows.jsonl", row(1), row(2))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"journal": 1, "settings": SETTINGS}, row(1), row(2)]
    written(path, row(3))
    assert len(path.read_text().splitlines()) == 4 and numbers(path) == [1, 2, 3]


def test_a_row_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    with Journal(tmp_path / "rows.jsonl", SETTINGS) as file:
        file.write(row(1))
        assert numbers(tmp_path / "rows.jsonl") == [1]


def test_what_is_known_is_claimed_once(tmp_path):
    path = written(tmp_path / "rows.jsonl", row(1), failed(2))
    with Journal(path, SETTINGS) as file:
        assert [claim(file, row(n)) for n in (1, 2, 3, 3)] == [False, False, True, False]
        assert claim(file, row(1, prompt="detect dog"))  # another question about the same picture
        assert (file.num_answered, file.num_failed) == (1, 1)


def test_names_that_are_no_characters_come_back(tmp_path):
    name = os.fsdecode(b"caf\xe9 \xff\n.jpg")
    path = written(tmp_path / "rows.jsonl", {"image": name, "prompt": "ocr"})
    assert [record["image"] for record in rows(path)] == [name]
    with Journal(path, SETTINGS) as file:
        assert not file.claim(name, "ocr")


WHOLE = b"".join(journal.to_line(record) for record in ({"journal": 1, "settings": SETTINGS}, row(1), failed(2), row(3)))


@settings(max_examples=60)
@given(st.integers(0, len(WHOLE)))
def test_cut_off_at_any_byte_the_file_is_mended_and_ends_up_the_same(tmp_path_factory, size):
    path = tmp_path_factory.mktemp("cut") / "rows.jsonl"
    path.write_bytes(WHOLE[:size])
    with Journal(path, SETTINGS) as file:
        for record in (row(1), failed(2), row(3)):
            if claim(file, record):
                file.write(record)
    assert path.read_bytes() == WHOLE


def test_a_signal_in_the_middle_of_a_row_leaves_no_half_line(tmp_path, monkeypatch):
    write = os.write

    def interrupted(descriptor, data):
        write(descriptor, data[:10])
        raise KeyboardInterrupt

    path = written(tmp_path / "rows.jsonl", row(1))
    before = path.read_bytes()
    with Journal(path, SETTINGS) as file, monkeypatch.context() as patch:
        patch.setattr(os, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            file.write(row(2))
    assert path.read_bytes() == before


def test_a_full_disk_is_7_and_the_file_stays_valid(tmp_path):
    path = tmp_path / "rows.jsonl"
    with Journal(path, SETTINGS) as file, room_for(300):
        with pytest.raises(OutputError, match="cannot be written") as caught:
            for number in range(10):
                file.write(row(number))
        assert caught.value.code == 7
    assert path.read_bytes().endswith(b"}\n") and 0 < len(numbers(path)) < 10
    assert path.stat().st_size <= 300
    written(path, row(10))
    assert numbers(path)[-1] == 10


def test_rows_reach_the_disk_every_few_seconds_and_at_the_end(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "fsync", calls.append)
    with Journal(tmp_path / "rows.jsonl", SETTINGS) as file:
        file.write(row(1))
        assert calls == []
        file.last_sync -= journal.SYNC_INTERVAL_S
        file.write(row(2))
        assert len(calls) == 1
    assert len(calls) == 2


# Settings


def test_other_settings_are_refused_by_name(tmp_path):
    path = written(tmp_path / "rows.jsonl", row(1))
    before = path.read_bytes()
    with pytest.raises(UsageError) as caught:
        Journal(path, SETTINGS | {"text": "dog", "dtype": "bf16"})
    message = str(caught.value)
    assert 'text was "cat" and is "dog"' in message and 'dtype was null and is "bf16"' in message and "task" not in message
    assert "--force" in message and path.read_bytes() == before


def test_forced_settings_stand_in_a_header_of_their_own(tmp_path):
    path = written(tmp_path / "rows.jsonl", row(1))
    other = SETTINGS | {"quantize": "int8"}
    for number in (2, 3):
        with Journal(path, other, is_forced=True) as file:
            assert not claim(file, row(1))
            file.write(row(number))
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert records == [{"journal": 1, "settings": SETTINGS}, row(1), {"journal": 1, "settings": other}, row(2), row(3)]
    with pytest.raises(UsageError):
        Journal(path, SETTINGS)


# Failed rows


def test_failed_rows_are_taken_out_on_request_only(tmp_path):
    path = written(tmp_path / "rows.jsonl", row(1), failed(2), row(3), failed(4))
    with Journal(path, SETTINGS, retry_failed=True) as file:
        assert numbers(path) == [1, 3] and (file.num_answered, file.num_failed) == (2, 0)
        assert claim(file, failed(2)) and not claim(file, row(3))
        file.write(row(2))
        with pytest.raises(OutputError, match="another process"):
            Journal(path, SETTINGS)  # the new file is locked as the old one was
    assert numbers(path) == [1, 3, 2] and sorted(os.listdir(tmp_path)) == ["rows.jsonl"]


def test_a_full_disk_while_failed_rows_are_taken_out_leaves_the_old_file(tmp_path):
    path = written(tmp_path / "rows.jsonl", *(row(n) for n in range(1, 9)), failed(9))
    before = path.read_bytes()
    with room_for(200), pytest.raises(OutputError):
        Journal(path, SETTINGS, retry_failed=True)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["rows.jsonl"]
    written(path, row(10))  # it is not locked any more


# Other writers, other files


def test_a_second_writer_is_refused_until_the_first_has_gone(tmp_path):
    path = tmp_path / "rows.jsonl"
    script = "import sys; from paligemma.programs import journal; file = journal.Journal(sys.argv[1], {}); "
    script += "print('open', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script, str(path)]
    first = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert first.stdout.readline() == b"open\n"
        with pytest.raises(OutputError, match=r"is being written by another process.*--shard") as caught:
            Journal(path, {})
        assert caught.value.code == 7
    finally:
        first.kill()
        first.communicate()
    written_by_us = Journal(path, {})  # the lock ends with its process, whatever ended it
    written_by_us.close()


def test_a_writer_that_waited_through_a_replacement_sees_the_new_file(tmp_path, monkeypatch):
    import fcntl

    path, lock = tmp_path / "rows.jsonl", fcntl.flock
    path.write_bytes(WHOLE)

    def replace_then_lock(descriptor, how):
        monkeypatch.setattr(fcntl, "flock", lock)
        (tmp_path / "new").write_bytes(WHOLE[: -len(journal.to_line(row(3)))])
        os.replace(tmp_path / "new", path)
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", replace_then_lock)
    written(path, row(4))
    assert numbers(path) == [1, 2, 4]


@pytest.mark.parametrize("content", [b"image,prompt\n", b"{}", b'{"image": "a"}\n', b'{"journal"; 1', b"\x89PNG\r\n\x1a\n"])
def test_a_file_of_something_else_is_left_alone(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(OutputError, match="is not a file of rows"):
        Journal(path, SETTINGS)
    assert path.read_bytes() == content


@pytest.mark.parametrize("line", [b"{\n", b"[]\n", b"\0\0\0\n", b"\xff\n", b'{"image": 1, "prompt": ""}\n', b'{"journal": 2}\n'])
def test_a_damaged_line_is_named_and_nothing_is_lost(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    first, *others = WHOLE.splitlines(keepends=True)
    path.write_bytes(first + line + b"".join(others))
    with pytest.raises(OutputError, match="line 2 of .* is damaged"):
        Journal(path, SETTINGS)
    assert path.read_bytes() == first + line + b"".join(others)


STRANGE = [
    b"7", b"null", b'"journal"', b'["journal"]', b'{"journal": 1, "settings": 1}', b'{"journal": 1, "settings": null}',
    b"[" * 100_000,
    b'{"journal": 1, "settings": {"a": ' + b"[" * 500 + b"]" * 500 + b"}}", b'{"image": "a", "prompt": ' + b"9" * 5000 + b"}",
    b'{"image": "\\ud800", "prompt": 1e999}', b'{"journal": 1e999, "settings": {}}',
]  # fmt: skip


@pytest.mark.parametrize("line", STRANGE)
def test_lines_of_any_json_are_refused_as_damaged(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(WHOLE + line + b"\n")
    with pytest.raises(OutputError, match="is damaged"):
        Journal(path, SETTINGS)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=40) | st.sampled_from([*STRANGE, *WHOLE.splitlines()]), max_size=4))
def test_any_bytes_are_rows_or_an_error_of_this_project(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("journal") / "rows.jsonl"
    path.write_bytes(WHOLE.splitlines(keepends=True)[0] + b"\n".join(lines))
    with suppress(OutputError, UsageError), Journal(path, SETTINGS, retry_failed=True):
        list(rows(path))


def test_a_line_without_end_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(WHOLE + b"x" * 5000)
    with pytest.raises(OutputError, match="is damaged"):
        Journal(path, SETTINGS)


def test_what_is_no_file_to_resume_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "no folder" / "rows.jsonl", Path("/dev/null")):
        with pytest.raises(OutputError) as caught:
            Journal(path, SETTINGS)
        assert str(path) in str(caught.value)


def test_a_large_file_is_known_in_little_memory_and_time(tmp_path):
    path, count = tmp_path / "rows.jsonl", 20_000
    lines = (journal.to_line({"image": f"some/folder/{n:07d}.jpg", "prompt": "ocr", "text": "y" * 200}) for n in range(count))
    path.write_bytes(WHOLE.splitlines(keepends=True)[0] + b"".join(lines))
    start = time.perf_counter()
    with Journal(path, SETTINGS) as file:
        held = sys.getsizeof(file.known) + sum(map(sys.getsizeof, file.known))
    assert held < 200 * count  # 101 bytes were measured a row
    assert time.perf_counter() - start < 10  # 0.1 s
