"""Words, patterns and lists name the right pictures, and pictures are read ahead in threads."""

import os
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from paligemma.errors import DatasetError, ImageError
from paligemma.pictures import decoding, folders, images

NAMES = ["a.jpg", "b/a.jpg", "b/c/x.PNG", "b/two words.webp", "z.tif"]


@pytest.fixture(autouse=True)
def photos(tmp_path, monkeypatch):
    """A folder of empty files, some with names of pictures. The test runs in the folder above it."""
    monkeypatch.chdir(tmp_path)
    for name in [*NAMES, "notes.txt", ".hidden.jpg", ".cache/k.jpg", "b/._a.jpg", "none/readme.md"]:
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "photos"


# Finding pictures


@pytest.mark.parametrize("word", ["photos", "photos/", "./photos", "photos/."])
def test_a_folder_means_its_pictures_and_those_of_its_folders(word):
    assert list(folders.expand(word)) == ["photos/a.jpg", "photos/z.tif", "photos/b/a.jpg", "photos/b/two words.webp",
                                          "photos/b/c/x.PNG"]  # fmt: skip


def test_a_file_is_taken_whatever_its_name():
    assert list(folders.expand("photos/notes.txt")) == ["photos/notes.txt"]
    assert list(folders.expand("https://x.org/a?b")) == ["https://x.org/a?b"]


def test_patterns_match_files_and_folders(photos):
    assert sorted(folders.expand("photos/**/a.*")) == ["photos/a.jpg", "photos/b/a.jpg"]
    assert sorted(folders.expand("photos/[ab]*")) == sorted(f"photos/{name}" for name in NAMES if name != "z.tif")
    (photos / "odd[1].jpg").touch()
    assert list(folders.expand("photos/odd[1].jpg")) == ["photos/odd[1].jpg"]  # an existing name is not a pattern


@pytest.mark.parametrize("pattern", ["a*/x\0*/*", "a\ud800*", "*\udfff/x"])
def test_a_pattern_with_what_no_name_holds_matches_nothing(pattern):
    assert list(folders.expand(pattern)) == []
    with pytest.raises(ImageError, match="no file matches"):
        folders.check_arguments([pattern])


def test_many_stars_in_a_row_mean_what_two_mean(tmp_path):
    deep = tmp_path.joinpath(*"abcdefghijklmnop")  # in 16 folders, 40 repetitions of ** could match in 10^13 ways
    deep.mkdir(parents=True)
    (deep / "x.png").touch()
    assert list(folders.expand(f"{tmp_path}/{'**/' * 40}x.png")) == [str(deep / "x.png")]
    assert list(folders.expand(f"{tmp_path}/**/a**/**/**//**/x.png")) == [str(deep / "x.png")]


def test_links_are_followed_and_circles_end(photos):
    (photos / "b" / "up").symlink_to("..")
    (photos / "again").symlink_to("none")
    (photos / "none" / "one.png").touch()
    (photos / "dangling.png").symlink_to("nowhere")
    (photos / "self.png").symlink_to("self.png")
    found = list(folders.expand("photos"))
    assert len(found) == len(set(found)) == len(NAMES) + 3
    assert {"photos/dangling.png", "photos/self.png", "photos/again/one.png"} <= set(found)


def test_folders_can_be_left_out():
    assert list(folders.expand("photos", [folders.identity("photos/b")])) == ["photos/a.jpg", "photos/z.tif"]


def test_folders_are_listed_one_by_one(monkeypatch):
    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: listed.append(folder) or scandir(folder))
    assert next(folders.expand("photos")) == "photos/a.jpg"
    assert listed == ["photos"]


def test_a_folder_that_cannot_be_listed_is_an_error_of_its_own(monkeypatch):
    scandir = os.scandir

    def refuse(folder):
        if folder == "photos/b":
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    assert list(folders.expand("photos")) == ["photos/a.jpg", "photos/z.tif", "photos/b"]
    assert "the folder photos/b cannot be listed" in str(folders.load("photos/b", 14).picture)


def test_words_that_mean_nothing_are_named():
    folders.check_arguments(["photos", "photos/*.jpg", "photos/a.jpg", "https://x.org/a"])
    with pytest.raises(ImageError, match=r"phots does not exist. Did you mean photos\?"):
        folders.check_arguments(["photos", "phots"])
    with pytest.raises(ImageError, match="no file matches photos/\\*.gif"):
        folders.check_arguments(["photos/*.gif"])


def test_a_list_is_taken_line_by_line():
    lines = [b"\xef\xbb\xbfphotos/a.jpg\r", b"", b"missing [x].jpg ", b"caf\xe9.jpg", b"photos/b/c"]
    with open("list.txt", "wb") as file:
        file.write(b"\n".join(lines))
    assert list(folders.in_list("list.txt")) == ["photos/a.jpg", "missing [x].jpg ", "caf\udce9.jpg", "photos/b/c/x.PNG"]
    with pytest.raises(DatasetError, match="lost.txt cannot be read"):
        list(folders.in_list("lost.txt"))


@pytest.mark.parametrize(
    ("name", "says"),
    [("x" * 300, "too long"), (".", "a folder or a pipe"), ("pipe", "a folder or a pipe"), ("~nosuchuser/x", "not exist")],
)
def test_a_list_that_is_no_file_is_refused(name, says):
    os.mkfifo("pipe")
    with pytest.raises(DatasetError, match=says):
        list(folders.in_list(name))


def test_a_list_in_another_encoding_or_without_lines_is_refused(monkeypatch):
    for order in ("utf-16-le", "utf-16-be"):
        Path("list.txt").write_bytes("\ufeffphotos/a.jpg\n".encode(order))
        with pytest.raises(DatasetError, match="is in UTF-16"):
            list(folders.in_list("list.txt"))
    monkeypatch.setattr(folders, "MAX_LINE", 1 << 20)
    Path("list.txt").write_bytes(b"a.jpg\n" + b"x" * (1 << 21))
    with pytest.raises(DatasetError, match="list.txt:2 is longer than 1 million"):
        list(folders.in_list("list.txt"))


def test_the_home_of_a_user_who_does_not_exist_is_a_name_like_any_other(monkeypatch):
    assert list(folders.expand("~x.png")) == ["~x.png"]
    with pytest.raises(ImageError, match="~x.png does not exist"):
        folders.check_arguments(["~x.png"])
    monkeypatch.setenv("HOME", os.getcwd())
    assert list(folders.expand("~/photos/a.jpg")) == [f"{os.getcwd()}/photos/a.jpg"]


def test_questions_are_lines_of_image_and_prefix():
    with open("q.jsonl", "w") as file:
        file.write('{"image": "a.jpg", "prefix": "detect cat", "suffix": "<loc0000>"}\n\n{"image": "b.jpg", "prefix": ""}\n')
    assert list(folders.questions("q.jsonl")) == [("a.jpg", "detect cat"), ("b.jpg", "")]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"image": }', ":11 is not JSON: Expecting value"),
        ("[]", ":1 is a list, not an object"),
        ("1", ":1 is a number, not an object"),
        *((text, " lacks an image or a prefix") for text in ('{"image": "a"}', '{"image": 1, "prefix": ""}')),
        ('{"image": "", "prefix": ""}', " lacks an image or a prefix"),
    ],
)
def test_a_line_that_is_no_question_is_named(line, says):
    with open("q.jsonl", "w") as file:
        file.write('{"image": "a.jpg", "prefix": ""}\n\n' + line + "\n")
    with pytest.raises(DatasetError, match=f"q.jsonl:3{says}.*An object with"):
        list(folders.questions("q.jsonl"))


def test_shards_are_about_equal_and_always_the_same():
    parts = [folders.shard_of(f"photos/{n}.jpg", 4) for n in range(1000)]
    assert {part: parts.count(part) for part in (1, 2, 3, 4)} == {1: 249, 2: 246, 3: 253, 4: 252}


# Reading


def test_a_picture_comes_squeezed_with_its_size(tmp_path):
    path = tmp_path / "a.png"
    Image.effect_noise((40, 30), 90).convert("RGBA").save(path)
    loaded = folders.load(str(path), 14, background="red")
    assert (loaded.picture.size, loaded.size, loaded.original) == ((14, 14), (40, 30), None)
    kept = folders.load(str(path), 14, keeps_original=True).original()
    assert kept.size == (40, 30)
    expected = kept.resize((14, 14), Image.Resampling.BICUBIC)
    assert loaded.picture.tobytes() == expected.resize((14, 14), Image.Resampling.BICUBIC).tobytes()


def test_what_was_converted_is_noted(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert "transparent pixels show the background, white" in folders.load(str(tmp_path / "a.png"), 14).notes[0]


def test_a_file_that_goes_or_changes_while_it_is_read_is_an_error(tmp_path, monkeypatch):
    path, load_image = tmp_path / "a.png", images.load_image
    Image.new("RGB", (4, 4)).save(path)

    def load_and_change(*arguments, **options):
        picture = load_image(*arguments, **options)
        path.write_bytes(b"other")
        return picture

    monkeypatch.setattr(images, "load_image", load_and_change)
    assert folders.load(str(path), 14).picture.message.endswith("changed while it was read. Ask about it again.")
    monkeypatch.undo()
    path.unlink()
    assert "does not exist" in folders.load(str(path), 14).picture.message


def test_a_picture_from_an_address_is_fetched_once_and_its_size_in_memory_is_that_of_its_file(tmp_path, monkeypatch):
    Image.effect_noise((40, 30), 90).save(tmp_path / "a.png")
    asked = []

    def answer(address, may_be_private):
        asked.append((address, may_be_private))
        return (tmp_path / "a.png").read_bytes(), "image/png"

    monkeypatch.setattr("paligemma.pictures.fetch.fetch", answer)
    loaded = folders.load("http://x.org/a.png", 14, keeps_original=True, is_typed=False)
    assert loaded.original().size == (40, 30) and asked == [("http://x.org/a.png", False)]
    assert "http://x.org/a.png" in str(folders.load("http://x.org/a.png", 14, keeps_original=True, max_pixels=10).picture)


@pytest.mark.parametrize("error", [NotImplementedError("?"), KeyError(3), MemoryError(), TypeError("from_bytes()\nneeds")])
def test_whatever_happens_while_one_picture_is_read_is_its_error(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(decoding, "sniff", fail)
    found = folders.load("photos/a.jpg", 14).picture
    assert isinstance(found, ImageError) and type(error).__name__ in found.message and "\n" not in found.message


class Reader:
    """Counts the reads, and how many run at the same time. `wait`, if given, is called with the place before a read ends."""

    def __init__(self, wait=lambda _: None):
        self.wait, self.places, self.now, self.most = wait, [], 0, 0
        self.lock = threading.Lock()

    def __call__(self, place):
        with self.lock:
            self.places.append(place)
            self.now += 1
            self.most = max(self.most, self.now)
        self.wait(place)
        with self.lock:
            self.now -= 1
        return folders.Loaded(object())


def ahead(items, reader, threads=3, count=5):
    return folders.read_ahead(items, str, reader, threads, count)


def test_pictures_come_in_order_and_are_read_in_several_threads():
    three = threading.Barrier(3)  # no read ends before three have begun
    reader = Reader(lambda _: three.wait(timeout=60))
    assert [item for item, _ in ahead(range(21), reader)] == list(range(21))
    assert reader.most == 3 and len(reader.places) == 21


def test_no_more_is_read_than_is_soon_needed():
    reader, taken = Reader(), []
    pictures = ahead((taken.append(n) or n for n in range(100)), reader)
    assert not taken
    for wanted in range(1, 5):
        next(pictures)
        assert len(taken) == wanted + 5
    pictures.close()
    time.sleep(0.05)
    assert len(reader.places) <= 9


def test_reading_goes_on_while_the_last_picture_is_used():
    reader = Reader()
    pictures = ahead(range(6), reader)
    next(pictures)
    deadline = time.monotonic() + 60
    while (len(reader.places) < 6 or reader.now) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(reader.places) == 6 and reader.now == 0


def test_questions_in_a_row_about_one_picture_share_it():
    reader = Reader()
    found = list(ahead(["a", "a", "b", "a"], reader))
    assert reader.places.count("a") == 2 and len(reader.places) == 3
    assert found[0][1].picture is found[1][1].picture is not found[3][1].picture


def test_an_abandoned_run_reads_nothing_more_and_leaves_no_thread():
    others, closed = set(threading.enumerate()), threading.Event()
    reader = Reader(lambda place: place == "0" or closed.wait(timeout=60))
    pictures = ahead(range(50), reader, threads=1, count=30)
    next(pictures)
    own = set(threading.enumerate()) - others
    assert all(thread.daemon for thread in own)  # a thread that waits for a slow server must not delay the end of the program
    pictures.close()
    closed.set()
    for thread in own:
        thread.join(timeout=60)
    assert own and not any(thread.is_alive() for thread in own) and len(reader.places) <= 2
