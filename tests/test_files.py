"""Paths that users type: whatever lies there, or cannot, the answer is a value or an error of this project."""

import ast
import os
from pathlib import Path

import pytest

from paligemma import files
from paligemma.errors import AccessError, CheckpointError, ImageError, OutputError, UsageError

LOOKERS = [files.look, files.is_file, files.is_folder]


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
    with pytest.raises(CheckpointError, match="a circle"):
        look(tmp_path / "a")


@pytest.mark.parametrize(("error_class", "expected"), [(CheckpointError, AccessError), (OutputError, OutputError)])
def test_what_this_user_may_not_see_is_an_error_not_an_absence(error_class, expected, monkeypatch, tmp_path):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "stat", refuse)  # permissions do not bind the user that tests often run as
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
        assert files.look(tmp_path / absent) is None


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
        ("nowhere", 9, "a link to nothing"),
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
    """Other names of one file."""
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
        assert files.place_of(tmp_path / "hard") == files.place_of(file)
    for other in spellings(file):
        assert files.place_of(other) == files.place_of(file) != files.place_of(tmp_path / "other")


def test_names_that_differ_in_case_are_one_file_where_none_is_there(tmp_path):
    assert files.place_of(tmp_path / "Caf\u00e9.csv") == files.place_of(tmp_path / "cafe\u0301.CSV")


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


def test_a_name_as_long_as_the_disk_takes_is_written(tmp_path):
    with files.whole(tmp_path / ("x" * 255)) as beside:
        beside.write_text("content")
    assert os.listdir(tmp_path) == ["x" * 255]


@pytest.mark.parametrize("path", sorted(Path(files.__file__).parent.rglob("*.py")), ids=lambda path: path.name)
def test_no_path_from_outside_is_asked_what_it_is_by_a_method_that_raises(path):
    raising = ("exists", "is_file", "is_dir", "expanduser")
    own = {"kernels.py", "folders.py"}  # of this code's own files, and of os.DirEntry
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    methods = [node.func for node in calls if isinstance(node.func, ast.Attribute) and node.func.attr in raising]
    of_paths = [f"{path.name}:{method.lineno}" for method in methods if ast.unparse(method.value) not in ("os.path", "files")]
    of_paths += [f"{path.name}:{method.lineno}" for method in methods if method.attr == "expanduser"]
    assert path.name in (*own, "files.py") or of_paths == []
