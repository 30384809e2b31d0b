"""Paths that users type give a value or an error of this project; JSON is read and files are written in one place."""

import ast
import os
import stat
from pathlib import Path

import pytest

from paligemma import files
from paligemma.errors import AccessError, CheckpointError, DatasetError, ImageError, OutputError, UsageError

LOOKERS = [files.stat_path, files.is_file, files.is_folder]


@pytest.mark.parametrize("name", ["~nosuchuser/x", "~nosuchuser"])
def test_the_home_of_a_user_who_does_not_exist_is_a_name_like_any_other(name):
    assert str(files.expand(name)) == name


@pytest.mark.parametrize("name", ["~a\0b/x", "~\ud800/x"])
def test_a_user_that_no_system_can_have_is_a_name_like_any_other(name):
    assert str(files.expand(name)) == name


def test_one_s_own_home_is_found(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert str(files.expand("~/x")) == "/somewhere/x"


@pytest.mark.parametrize("look", LOOKERS)
@pytest.mark.parametrize("error_class", [CheckpointError, ImageError, OutputError])
@pytest.mark.parametrize(("name", "says"), [("x" * 300, "too long"), ("a\0b", r"a\\x00b cannot be opened"), ("\ud800", "ud800")])
def test_names_that_no_system_can_hold_are_errors_of_the_kind_asked_for(look, error_class, name, says, tmp_path):
    with pytest.raises(error_class, match=says) as caught:
        look(tmp_path / name, error_class)
    assert caught.value.message.isprintable()


@pytest.mark.parametrize("look", LOOKERS)
def test_a_loop_of_links_is_an_error(look, tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(CheckpointError, match="a loop"):
        look(tmp_path / "a")


@pytest.mark.parametrize(("error_class", "expected"), [(CheckpointError, AccessError), (OutputError, OutputError)])
def test_what_this_user_may_not_see_is_an_error_not_an_absence(error_class, expected, monkeypatch, tmp_path):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "stat", refuse)  # file permissions do not apply to root, who may run the tests
    for look in LOOKERS:
        with pytest.raises(expected, match="Change its permissions"):
            look(tmp_path / "closed" / "model", error_class)


def test_what_is_there_and_what_is_not(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "nowhere").symlink_to("nothing")
    assert files.is_folder(tmp_path) and not files.is_file(tmp_path)
    assert files.is_file(tmp_path / "link") and not files.is_folder(tmp_path / "link")
    for absent in ("nothing", "nowhere", "file/below"):
        assert files.stat_path(tmp_path / absent) is None


def test_only_regular_files_up_to_a_size_are_read(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"x" * 10)
    assert files.read_regular(file, 10) == b"x" * 10
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "nowhere").symlink_to("nothing")
    for name, most, says in (
        ("file", 9, "10 bytes, and 9 is the limit"),
        ("pipe", 9, "pipe"),
        ("", 9, "is a folder"),
        ("none", 9, "is missing"),
        ("nowhere", 9, "a broken link"),
    ):
        with pytest.raises(CheckpointError, match=says):
            files.read_regular(tmp_path / name, most)


def test_similar_names_among_many(tmp_path):
    names = [f"img_{i:06d}.jpg" for i in range(20_000)] + ["Holiday.JPG"]
    assert files.similar_names("holidy.jpg", names) == ["Holiday.JPG"]
    assert "img_019999.jpg" in files.similar_names("img_01999.jpg", names)
    assert files.similar_names("nothing like it", names) == []
    assert files.names_in(tmp_path / "nothing") == files.names_in("a\0b") == []


# Files to be written


def spellings(file):
    """Other spellings of the path of a file."""
    (file.parent / "link").symlink_to(file.name)
    (file.parent / "folder").symlink_to(file.parent)
    folder, name = file.parent, file.name
    return [f"{folder}/./{name}", f"{folder}//{name}", folder / "link", folder / "folder" / name]


@pytest.mark.parametrize("is_there", [True, False])
def test_a_file_is_one_under_every_spelling(tmp_path, is_there):
    file = tmp_path / "r.csv"
    if is_there:
        file.write_text("")
        os.link(file, tmp_path / "hard")
        assert files.file_key(tmp_path / "hard") == files.file_key(file)
    for other in spellings(file):
        assert files.file_key(other) == files.file_key(file) != files.file_key(tmp_path / "other")


def test_names_that_differ_in_case_are_one_file_where_none_is_there(tmp_path):
    assert files.file_key(tmp_path / "Caf\u00e9.csv") == files.file_key(tmp_path / "cafe\u0301.CSV")


@pytest.mark.parametrize("is_there", [True, False])
def test_no_output_is_another_or_an_input(tmp_path, is_there):
    file = tmp_path / "r.csv"
    if is_there:
        file.write_text("")
    for other in [file, *spellings(file)]:
        with pytest.raises(UsageError, match=r"--output and --export would both write .*Give another name"):
            files.check_outputs([("--output", file), ("--export", other)])
        with pytest.raises(UsageError, match="--export .* would overwrite the list "):
            files.check_outputs([("--output", tmp_path / "x")], [("the list", file)], [("--export", other)])
    with pytest.raises(UsageError, match="--save would write .*r.csv twice"):
        files.check_outputs([("--save", file), ("--save", file)])
    files.check_outputs([("--output", file), ("--export", tmp_path / "s.csv")], [("the list", "x" * 300), ("the list", "a\0b")])


def test_what_could_not_be_written_is_known_before(tmp_path):
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    for name, says in (
        ("missing/r.csv", "no folder"), ("file/r.csv", "is a file|cannot be opened|no folder"), (".", "is a folder"),
        ("pipe", "a pipe or a device"), ("/dev/null", "a device"), ("x" * 300, "too long"), ("a\0b", "cannot be opened"),
    ):  # fmt: skip
        with pytest.raises(OutputError, match=says):
            files.check_writable(tmp_path / name)
    files.check_writable(tmp_path / "new/folders/r.csv", makes_folders=True)
    with pytest.raises(OutputError, match="is a file|no folder"):
        files.check_writable(tmp_path / "file/new/r.csv", makes_folders=True)
    assert sorted(os.listdir(tmp_path)) == ["file", "pipe"]


# JSON


@pytest.mark.parametrize(
    ("content", "says", "line", "column"),
    [
        (b"", "not JSON: Expecting value", 1, 1),
        (b'{"a": 1,\n oops}', "not JSON: Expecting property name", 2, 2),
        (b'{"a":\n "\xff"}', "not UTF-8", 2, 3),
        (b'{"a": ' + b"[" * 8000, "not usable JSON", 1, 1),
        (b'{"a": 1' + b"0" * 5000 + b"}", "not usable JSON", 1, 1),
        (b'{"a": "' + b"x" * 200 + b'"}', None, 1, 1),
        (b'{"a": "' + b"x" * 10_000 + b'"}', "longer than 9000 bytes", 1, 1),
        (b"[1]", "a list, not an object", 1, 1),
        (b"null", "null, not an object", 1, 1),
        ("1.5", "a number, not an object", 1, 1),
    ],
)
def test_whatever_is_no_json_object_is_a_fault_with_line_and_column(content, says, line, column, tmp_path):
    if says is None:
        assert files.parse_json(content, 9000) == {"a": "x" * 200}
        return
    with pytest.raises(files.JSONFault, match=says) as caught:
        files.parse_json(content, 9000)
    assert (caught.value.line, caught.value.column) == (line, column)
    path = tmp_path / "file.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    expected = rf"file.json:{line}:{column} is {says}.*\. Correct it" if len(content) < 9000 else "9000 is the limit"
    with pytest.raises(DatasetError, match=expected):
        files.read_json(path, DatasetError, 9000)


def test_what_was_downloaded_in_place_of_json_is_named(tmp_path):
    for content, says in ((b"version https://git-lfs.github.com/spec/v1", "git lfs pull"), (b"<!DOCTYPE html>", "is a web page")):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(CheckpointError, match=says):
            files.read_json(tmp_path / "config.json")


# Atomic writes


def test_a_name_as_long_as_the_disk_takes_is_written(tmp_path):
    files.write_atomic(tmp_path / ("x" * 255), "content")
    assert os.listdir(tmp_path) == ["x" * 255]


def test_text_and_bytes_are_written_as_they_are(tmp_path):
    files.write_atomic(tmp_path / "text", "caf\u00e9\r\n\udce9")
    files.write_atomic(tmp_path / "bytes", b"\0\xff")
    assert (tmp_path / "text").read_bytes() == b"caf\xc3\xa9\r\n\\udce9"
    assert (tmp_path / "bytes").read_bytes() == b"\0\xff"


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    for error, raised in ((OSError(28, "No space left on device"), OutputError), (KeyboardInterrupt(), KeyboardInterrupt)):
        with pytest.raises(raised) as caught, files.open_atomic(path, "Call the administrator.") as stream:
            stream.write(b"new")
            raise error
        assert os.listdir(tmp_path) == ["file"] and path.read_text() == "old"
        if raised is OutputError:
            assert caught.value.message == f"{path} cannot be written: No space left on device. Call the administrator."


def test_content_reaches_the_disk_before_the_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    steps, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: steps.append(stat.S_ISDIR(os.fstat(handle).st_mode)) or fsync(handle))
    monkeypatch.setattr(os, "replace", lambda *names: steps.append("replace") or replace(*names))
    files.write_atomic(tmp_path / "file", "content")
    assert steps == [False, "replace", True]  # the file, its name, its folder


def test_a_folder_that_cannot_be_flushed_is_no_error_once_the_file_is_in_place(tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(22, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    files.write_atomic(tmp_path / "file", "content")
    assert (tmp_path / "file").read_text() == "content"


ROOT = Path(__file__).resolve().parent.parent
CODE = [path for folder in ("paligemma", "demo", "notes", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
ALLOWED = {
    ("json.loads", "commandline.py"): "a list of words, which this file itself put into an argument",
    ("os.fsync", "journal.py"): "appends lines to an open file",
}
ONLY_IN_FILES = {
    *("os.replace", "os.rename", "os.fsync", "tempfile.mkstemp", "tempfile.NamedTemporaryFile"),
    *("json.load", "json.loads"),
}


def test_files_are_replaced_and_json_is_read_by_files_py_only():
    found = set()
    for path in (path for path in CODE if path.name != "files.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = set()
            if isinstance(node, ast.Attribute):
                names = {"os.rename" if node.attr == "rename" else ast.unparse(node)}  # Path.rename, too
            elif isinstance(node, ast.ImportFrom):
                names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {(name, path.name) for name in names & ONLY_IN_FILES}
    assert found == set(ALLOWED)


@pytest.mark.parametrize("path", sorted(Path(files.__file__).parent.rglob("*.py")), ids=lambda path: path.name)
def test_no_path_from_outside_is_asked_what_it_is_by_a_method_that_raises(path):
    raising = ("exists", "is_file", "is_dir", "expanduser")
    own = {"compiling.py", "folders.py"}  # they use these methods for the project's own files and for os.DirEntry
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    methods = [node.func for node in calls if isinstance(node.func, ast.Attribute) and node.func.attr in raising]
    of_paths = [f"{path.name}:{method.lineno}" for method in methods if ast.unparse(method.value) not in ("os.path", "files")]
    of_paths += [f"{path.name}:{method.lineno}" for method in methods if method.attr == "expanduser"]
    assert path.name in (*own, "files.py") or of_paths == []
