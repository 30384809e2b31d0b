"""Many pictures: a row for each whatever happens, resumed after any end, the same as if each had been asked alone."""

import contextlib
import fcntl
import io
import json
import multiprocessing
import os
import pty
import random
import re
import resource
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from PIL import Image

from paligemma import tasks
from paligemma.checkpoints import adapters, weights
from paligemma.errors import ImageError, UsageError
from paligemma.layers import lora
from paligemma.pictures import decoding, folders
from paligemma.pictures import images as images_module
from paligemma.programs import annotate, commandline, job
from paligemma.programs.annotate import Flags
from paligemma.programs.journal import Journal, rows
from tests.tiny_checkpoint import make_checkpoint

ROOT = Path(__file__).resolve().parents[2]
FORKS = multiprocessing.get_context("forkserver")
GOOD = ["a/1.png", "a/2.png", "b/1.png", "b/c/3.jpg", "b/c/4.png"]
BAD = {"a/cut.png": b"\x89PNG\r\n\x1a\n" + bytes(30), "b/c/empty.jpg": b"", "b/text.png": b"it is no picture"}


@pytest.fixture(scope="module", autouse=True)
def import_once():
    """Starts the process that others are forked from; it ends with this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        modules = "programs.annotate checkpoints.weights processing_paligemma generation objects.mask_codec".split()
        FORKS.set_forkserver_preload([*(f"paligemma.{module}" for module in modules), "tqdm", "pytest"])
        forkserver.ensure_running()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("annotate") / "model")


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder with pictures of different sizes in it, some of them damaged, which is the current one."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(GOOD):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((20 + number, 30), 90).convert("RGB").save(path)
    return tmp_path


@pytest.fixture
def bad(world):
    for name, content in BAD.items():
        (world / "photos" / name).write_bytes(content)


@pytest.fixture
def run(world, model, capsys):  # noqa: ARG001 (the program runs in that folder)
    """Runs the program in this process: run("photos", "--task=ocr") -> exit code and what it said."""

    def call(*argv):
        defaults = [f"--model_path={model}", "--output=rows.jsonl", "--max_tokens_to_generate=8"]
        code = commandline.run(Flags, annotate.program, [*defaults, *argv])
        return code, capsys.readouterr().err

    return call


def written(path="rows.jsonl"):
    """The rows by image and prompt; no two may have the same."""
    found = list(rows(path))
    named = {(row["image"], row["prompt"]): row for row in found}
    assert len(named) == len(found)
    return named


def images(path="rows.jsonl"):
    return sorted(image for image, _ in written(path))


def failed(path="rows.jsonl"):
    return sorted(image for (image, _), row in written(path).items() if "error" in row)


PHOTOS = sorted(f"photos/{name}" for name in GOOD)
SPOILT = sorted(f"photos/{name}" for name in BAD)


# Rows


def test_every_picture_has_a_row_as_if_it_had_been_asked_alone(run, model):
    assert run("photos", "--task=ask", "what is it?", "--rows=3") == (0, "5 rows in rows.jsonl.\n")
    assert images() == PHOTOS
    flags = Flags(model_path=str(model), output="-", positional=("photos",))
    checkpoint = flags.open()
    annotator = tasks.Annotator(flags.load(checkpoint), checkpoint.processor, rows=1, max_new_tokens=8)
    for (image, prompt), row in written().items():
        picture = Image.open(image).convert("RGB")
        request = tasks.Request(picture=picture, task="ask", text="what is it?", image=image)
        ((_, alone),) = annotator.run([request])
        score = row.pop("score")
        assert prompt == "answer en what is it?" and (row["width"], row["height"]) == picture.size
        assert row | {"score": alone.to_json()["score"]} == alone.to_json()
        assert score == pytest.approx(alone.score, abs=2e-6)  # a product of other rows beside it sums in another order


def test_a_bug_over_one_picture_is_its_row(run, monkeypatch):
    load = images_module.load_image

    def broken(place, **options):
        return 1 / 0 if place == PHOTOS[1] else load(place, **options)

    monkeypatch.setattr(images_module, "load_image", broken)
    code, err = run("photos")
    assert code == 8 and failed() == PHOTOS[1:2] and "1 of 5 rows" in err
    (row,) = (row for row in rows("rows.jsonl") if "error" in row)
    assert row["error"]["code"] == 3 and "ZeroDivisionError" in row["error"]["message"]


def test_the_file_begins_with_what_decides_the_answers(run):
    run("photos", "--task", "detect", " cat;dog ", "--quantize=int8")
    with open("rows.jsonl") as file:
        settings = json.loads(file.readline())["settings"]
    assert settings["task"] == "detect" and settings["text"] == " cat;dog " and settings["quantize"] == "int8"
    assert settings["model"].startswith("model ") and settings["max_tokens_to_generate"] == 8
    assert {row["prompt"] for row in rows("rows.jsonl")} == {"detect cat ; dog"}
    assert all(isinstance(row["objects"], list) for row in rows("rows.jsonl"))


@pytest.mark.usefixtures("bad")
def test_a_bad_picture_is_a_row_with_its_error_and_exit_code_8(run):
    code, err = run("photos", "--task=caption")
    assert code == 8 and err == "error: 3 of 8 rows in rows.jsonl are errors and say why. --retry_failed tries again.\n"
    assert images() == sorted(PHOTOS + SPOILT) and failed() == SPOILT
    row = written()["photos/b/c/empty.jpg", "caption en"]
    assert row["error"]["type"] == "ImageError" and "zero bytes" in row["error"]["message"]


def test_a_picture_that_is_gone_or_was_never_there_is_a_row_too(run):
    Path("list.txt").write_text("photos/a/1.png\nphotos/a/9.png\n")
    assert run("--list=list.txt")[0] == 8
    assert images() == ["photos/a/1.png", "photos/a/9.png"] and failed() == ["photos/a/9.png"]


def test_words_patterns_and_lists_go_together_and_nothing_is_asked_twice(run):
    Path("list.txt").write_text("photos/b/1.png\nphotos/a\n")
    assert run("photos/a", "photos/*/1.png", "photos/a/1.png", "--list=list.txt")[0] == 0
    assert images() == ["photos/a/1.png", "photos/a/2.png", "photos/b/1.png"]


def test_what_was_converted_stands_in_the_row(run):
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save("clear.png")
    run("clear.png")
    assert written()["clear.png", "caption en"]["notes"] == ["clear.png: transparent pixels show the background, white."]


def test_questions_are_asked_as_they_stand(run):
    asked = [("1.png", "detect cat"), ("1.png", "ocr"), ("2.png", "what now?"), ("2.png", "x" * 400), ("9.png", "ocr")]
    asked.append(asked[0])
    Path("q.jsonl").write_text("".join(json.dumps({"image": i, "prefix": p, "suffix": ""}) + "\n" for i, p in asked))
    assert run("photos/a", "--questions=q.jsonl")[0] == 8
    found = written()
    assert sorted(found) == sorted(set(asked))
    assert sorted(key for key, row in found.items() if "error" in row) == [("2.png", "x" * 400), ("9.png", "ocr")]
    assert "context is 256" in found["2.png", "x" * 400]["error"]["message"]
    assert [found[key]["task"] for key in asked[:3]] == ["detect", "ocr", "ask"] and "objects" in found[asked[0]]
    shutil.move("q.jsonl", "photos/a/q.jsonl")  # beside its pictures it needs no word
    assert run("--questions=photos/a/q.jsonl", "--output=other.jsonl")[0] == 8
    assert sorted(written("other.jsonl")) == sorted(found) and failed("other.jsonl") == failed()


def test_an_answer_of_questions_is_that_of_the_task(run):
    Path("q.jsonl").write_text('{"image": "photos/a/1.png", "prefix": "detect cat"}\n')
    run("--questions=q.jsonl")
    run("photos/a/1.png", "--task=detect", "cat", "--output=task.jsonl")
    assert list(rows("rows.jsonl")) == [row | {"asked": "cat"} for row in rows("task.jsonl")]


def test_shards_have_files_of_their_own_and_together_all_rows(run):
    parts = []
    for part in (1, 2, 3):
        code, err = run("photos", f"--shard={part}/3")
        assert code == 0 and f"part {part}/3 is written to rows-{part}-of-3.jsonl" in err
        parts.append(images(f"rows-{part}-of-3.jsonl"))
    assert sorted(image for part in parts for image in part) == PHOTOS
    assert not os.path.exists("rows.jsonl")


def test_drawings_lie_under_the_names_of_their_sources(run):
    here = Path.cwd()
    Path("list.txt").write_text(f"photos/a/1.png\n../{here.name}/photos/b/1.png\n{here}/photos/a/2.png\n")
    assert run("photos/b/c", "--list=list.txt", "--task=detect", "cat", "--save_dir=out")[0] == 0
    drawn = sorted(str(path.relative_to("out")) for path in Path("out").rglob("*") if path.is_file())
    expected = ["photos/a/1.png.png", f"__/{here.name}/photos/b/1.png.png", f"{here}/photos/a/2.png.png".lstrip("/"),
                "photos/b/c/3.jpg.png", "photos/b/c/4.png.png"]  # fmt: skip
    assert drawn == sorted(expected)
    assert Image.open("out/photos/b/c/3.jpg.png").size == Image.open("photos/b/c/3.jpg").size


def drawings(folder="out"):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def test_pictures_of_a_folder_elsewhere_are_drawn(run):
    shutil.move("photos", "elsewhere")
    assert run(str(Path("elsewhere").resolve()), "--task=detect", "cat", "--save_dir=out")[0] == 0
    assert len(drawings()) == len(GOOD)


def test_a_picture_that_is_gone_before_it_is_drawn_is_its_row(run, monkeypatch):
    again = folders.load_again

    def changed(source, *more):
        if str(source).endswith("a/2.png"):
            raise ImageError("a/2.png changed while the question was being answered. Run it again.")
        return again(source, *more)

    monkeypatch.setattr(folders, "load_again", changed)
    assert run("photos", "--task=detect", "cat", "--save_dir=out")[0] == 8
    assert images("rows.jsonl") == PHOTOS and len(drawings()) == len(GOOD) - 1


def test_no_drawing_takes_the_place_of_another_or_of_a_picture(run):
    shutil.copy("photos/a/1.png", "a.png")
    shutil.copy("photos/a/2.png", "a.png.png")
    Path("names").write_text("a.png\n./a.png\n")
    before = Path("a.png.png").read_bytes()
    for _ in range(2):  # again, drawings are found under the names that they have
        Path("rows.jsonl").unlink(missing_ok=True)
        assert run("a.png.png", "--list=names", "--task=detect", "cat", "--save_dir=.")[0] == 0
        drawn = [name for name in os.listdir() if name.startswith("a.png.") and name != "a.png.png"]
        assert len(drawn) == 3 and Path("a.png.png").read_bytes() == before


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["--output=r.csv", "--export=csv"], 2, "--output and --export would both write r.csv"),
        (["--output=s.jsonl", "--export=csv"], 2, "--output and --export would both write s.csv"),
        (["--output=q.jsonl", "--questions=./q.jsonl"], 2, "would overwrite --questions"),
        (["--output=q", "--export=csv", "--list=q.csv"], 2, "--export q.csv would overwrite --list q.csv"),
        (["--output=q", "--list=q.part"], 2, "would overwrite --list q.part"),
        (["--output=q", "--export=yolo", "--list=q_yolo/names.txt"], 2, "q_yolo, which --export writes"),
        (["--output=hard.jsonl", "--questions=q.jsonl"], 2, "would overwrite --questions"),
        (["photos", "--output=model/tokenizer.json"], 2, "would overwrite a file of the model"),
        (["photos", "--output=photos"], 7, "is a folder"),
        (["photos", "--output=/dev/null"], 7, "a device"),
        (["photos", "--output=."], 2, "--output is '.'"),
        (["photos", "--output=pipe"], 7, "a pipe"),
        (["photos", "--output=" + "x" * 300], 7, "too long"),
        (["photos", "--output=" + "x" * 251], 7, "too long"),  # with .part it is
        (["photos", "--output=~nosuchuser/r"], 7, "no folder ~nosuchuser"),
        (["--output=q", "--task=detect", "photos", "cat", "--save_dir=q.csv"], 7, "q.csv cannot be made"),
    ],
)
def test_no_file_of_a_job_is_another_one_or_one_that_is_read(run, model, monkeypatch, argv, code, says):
    Path("s.csv").symlink_to("s.jsonl")
    Path("q.jsonl").write_text('{"image": "1.png", "prefix": "detect cat"}\n')
    os.link("q.jsonl", "hard.jsonl")
    os.mkdir("q_yolo")
    os.mkfifo("pipe")
    for name in ("q.csv", "q.part", "q_yolo/names.txt"):
        Path(name).write_text("photos/a/1.png\n")
    Path("model").symlink_to(model)
    monkeypatch.setattr(weights.ModelFiles, "load", lambda *_, **__: pytest.fail("it was loaded"))
    before = {file: file.read_bytes() for file in Path().rglob("*") if file.is_file()}
    more = [] if any("questions" in word or word == "photos" for word in argv) else ["--task=detect", "--text=cat"]
    more += ["photos"] if "--output=r.csv" in argv or "--output=s.jsonl" in argv else []
    result = run(*argv, *more)
    assert result[0] == code and says in result[1] and result[1].count("\n") == 1
    assert all(file.read_bytes() == content for file, content in before.items())


def test_every_question_has_a_drawing_of_its_own(run):
    asked = [{"image": "1.png", "prefix": prefix} for prefix in ("detect cat", "detect dog")]
    Path("photos/a/q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    assert run("--questions=photos/a/q.jsonl", "--save_dir=out")[0] == 0
    drawn = [path.name for path in Path("out").iterdir()]
    assert len(drawn) == 2 and all(re.fullmatch(r"1\.png\.[0-9a-f]{8}\.png", name) for name in drawn)


def test_drawings_are_not_asked_about(run):
    assert run("photos", "--task=detect", "cat", "--save_dir=photos/drawn")[0] == 0
    assert run("photos", "--task=detect", "cat", "--save_dir=photos/drawn")[0] == 0
    assert run("photos/**/*.*", "--task=detect", "cat", "--save_dir=photos/drawn")[0] == 0
    assert images() == PHOTOS


def test_no_picture_is_passed_over_because_it_lies_where_drawings_go(run):
    code, err = run("photos", "--task=detect", "cat", "--save_dir=photos/b")
    assert code == 2 and "photos/b/1.png was not drawn" in err and drawings() == []


@pytest.mark.parametrize("folder", ["photos", "."])
def test_drawings_never_come_to_lie_among_the_pictures(run, folder):
    code, err = run("photos", "--task=detect", "cat", f"--save_dir={folder}")
    assert code == 2 and "among the pictures" in err


@pytest.mark.usefixtures("bad")
@pytest.mark.parametrize(
    ("kind", "files"),
    [
        ("coco", ["rows-1_coco.json"]),
        ("csv", ["rows-1.csv"]),
        ("voc", [f"rows-1_voc/{name[:-4]}.xml" for name in GOOD]),
        ("yolo", [*(f"rows-1_yolo/{name[:-4]}.txt" for name in GOOD), "rows-1_yolo/classes.txt"]),
    ],
)
def test_objects_are_exported_beside_the_rows(run, kind, files):
    before = set(Path().rglob("*"))
    code, err = run("photos", "--task=detect", "cat", "--output=rows.1.jsonl", f"--export={kind}")
    assert code == 8 and f"{kind} in rows-1" in err
    made = {str(path) for path in set(Path().rglob("*")) - before if path.is_file()}
    assert made == {"rows.1.jsonl", *files}


# Again


def test_a_second_run_asks_only_what_is_new(run, monkeypatch):
    run("photos/a")
    before = Path("rows.jsonl").read_bytes()
    asked = []
    load = folders.load
    monkeypatch.setattr(folders, "load", lambda place, **options: asked.append(place) or load(place, **options))
    assert run("photos") == (0, "5 rows in rows.jsonl.\n")
    assert sorted(asked) == [name for name in PHOTOS if "/a/" not in name]
    assert Path("rows.jsonl").read_bytes().startswith(before) and images() == PHOTOS


def test_when_nothing_is_left_no_model_is_loaded(run, monkeypatch):
    run("photos")
    monkeypatch.setattr(weights.ModelFiles, "load", lambda *_, **__: pytest.fail("it was loaded"))
    assert run("photos") == (0, "5 rows in rows.jsonl.\n")


@pytest.mark.usefixtures("bad")
def test_failed_rows_are_asked_again_on_request(run, world):
    run("photos")
    before = written()
    (world / "photos/b/text.png").write_bytes((world / "photos/b/1.png").read_bytes())
    assert run("photos")[0] == 8
    assert written() == before
    code, err = run("photos", "--retry_failed")
    assert code == 8 and "2 of 8 rows" in err
    assert failed() == [name for name in SPOILT if "text" not in name] and images() == sorted(PHOTOS + SPOILT)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--task=ask", "why?"], 'task was "caption" and is "ask"'),
        (["--quantize=int8"], 'quantize was null and is "int8"'),
        (["--language=fr"], 'language was "en" and is "fr"'),
        (["--ignore_exif"], "ignore_exif was false and is true"),
        (["--dtype=bf16"], 'dtype was null and is "bf16"'),
    ],
)
def test_other_settings_are_refused_with_what_differs(run, flags, named):
    run("photos/a")
    before = Path("rows.jsonl").read_bytes()
    code, err = run("photos", *flags)
    assert code == 2 and named in err and err.count(" was ") == 2 + (flags[0] == "--task=ask") and "--force" in err
    assert Path("rows.jsonl").read_bytes() == before
    assert run("photos", *flags, "--force")[0] == 0
    is_other_prompt = "why?" in flags or "--language=fr" in flags
    assert len(list(rows("rows.jsonl"))) == (7 if is_other_prompt else 5)


def test_an_adapter_answers_and_is_another_model_than_its_base(run, model, world):
    adapted = weights.load_model(model)
    lora.inject(adapted, config := lora.LoraConfig(2, 4), lora.targets(adapted))
    adapters.save_adapter(lora.adapter_state(adapted), config, world / "mine", str(model))
    assert run("photos", "--task=caption", f"--model_path={world / 'mine'}")[0] == 0
    assert images() == PHOTOS
    assert run("photos", "--task=caption")[0] == 2
    with torch.no_grad():
        for _, layer in lora.adapted(adapted):
            layer.lora_B.weight.fill_(1)
    adapters.save_adapter(lora.adapter_state(adapted), config, world / "mine", str(model))
    assert run("photos", "--task=caption", f"--model_path={world / 'mine'}")[0] == 2


def test_a_model_that_was_trained_on_is_another(run, model, world):
    shutil.copytree(model, world / "mine")
    run("photos/a", f"--model_path={world / 'mine'}")
    trained = weights.load_model(world / "mine")
    with torch.no_grad():
        trained.language_model.model.layers[0].mlp.up_proj.weight *= 1.01
    weights.save_model(trained, world / "mine")
    code, err = run("photos", f"--model_path={world / 'mine'}")
    assert code == 2 and 'model was "mine ' in err
    assert run("photos/a", f"--model_path={model}", "--output=other.jsonl")[0] == 0


def test_a_second_process_is_refused(run):
    with Journal("rows.jsonl", {}):
        code, err = run("photos")
    assert code == 7 and "is being written by another process" in err and "--shard" in err


# Ends


def test_a_full_disk_is_7_and_the_rows_so_far_are_kept(run):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1200, before[1]))
    try:
        code, err = run("photos")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 7 and "rows.jsonl cannot be written" in err
    assert 0 < len(images()) < 5
    assert run("photos")[0] == 0
    assert images() == PHOTOS


def program_itself(argv, stderr):
    """What a process runs instead of `python -m paligemma annotate`, to which it comes down."""
    sys.stderr = open(stderr, "w", encoding="utf-8")
    sys.argv = ["annotate.py", *argv]
    sys.exit(annotate.main())


def start(model, *argv, stderr="stderr.txt"):
    """The program in a process of its own, forked from one that has imported torch, which is what takes long."""
    arguments = ["photos", f"--model_path={model}", "--output=rows.jsonl", *argv]
    process = FORKS.Process(target=program_itself, args=(arguments, stderr))
    process.start()
    return process


def wait_for_rows(process, count, path="rows.jsonl"):
    """Until the file has more than `count` rows, or the process has ended."""
    while process.exitcode is None:
        with contextlib.suppress(FileNotFoundError):
            if Path(path).read_bytes().count(b"\n") > count + 1:
                return
        time.sleep(0.001)


@pytest.fixture
def many(world):
    """120 pictures, three of them bad."""
    shutil.rmtree(world / "photos")
    picture = io.BytesIO()
    Image.effect_noise((16, 16), 90).convert("RGB").save(picture, "PNG")
    for number in range(120):
        path = world / "photos" / str(number % 4) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture.getvalue()[: 30 if number in (7, 50, 119) else None])
    return sorted(str(path.relative_to(world)) for path in (world / "photos").rglob("*.png"))


def test_killed_three_times_no_row_is_lost_or_repeated(many, model):
    draw = random.Random(0)
    for _ in range(3):
        before = len(images()) if os.path.exists("rows.jsonl") else 0
        process = start(model, "--max_tokens_to_generate=100", "--rows=4")
        wait_for_rows(process, before + draw.randrange(5, 25))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    interrupted = images()
    assert 15 < len(interrupted) < 120
    process = start(model, "--max_tokens_to_generate=100", "--rows=4")
    process.join(120)
    assert process.exitcode == 8 and "3 of 120 rows" in Path("stderr.txt").read_text()
    assert images() == many and len(failed()) == 3
    assert len({row.get("text") for row in rows("rows.jsonl")}) == 2  # one text, for all pictures are equal, and none


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_what_is_done_and_leaves_no_process(many, model, signum, code):
    process = start(model, "--max_tokens_to_generate=100")
    wait_for_rows(process, 10)
    os.kill(process.pid, signum)
    process.join(60)
    err = Path("stderr.txt").read_text()
    assert process.exitcode == code and err.startswith("interrupted after ") and err.count("\n") == 1
    assert Path("rows.jsonl").read_bytes().endswith(b"}\n") and 10 < len(images()) < len(many)


@pytest.mark.usefixtures("many")
def test_a_bar_on_a_terminal_counts_rows_of_earlier_runs_but_not_their_time(run, model):
    run("photos/1")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    process = start(model, "--max_tokens_to_generate=8", stderr=os.ttyname(theirs))
    shown = b""
    while process.exitcode is None or select.select([ours], [], [], 0)[0]:
        if select.select([ours], [], [], 0.05)[0]:
            shown += os.read(ours, 10_000)
    os.close(ours)
    os.close(theirs)
    assert process.exitcode == 8
    bars = [text for text in shown.decode().split("\r") if "row" in text and "/120" in text]
    assert " 30/120 " in bars[0] and "?" in bars[0]  # no rate yet, and so no time left
    assert "120/120" in bars[-1]


@pytest.mark.usefixtures("world")
def test_the_time_left_comes_from_the_rows_of_this_run(model, monkeypatch):
    """900 of 1,000 rows were there, this run has done 20 in 10 s: 80 are left, and they take 40 s."""
    import tqdm

    seen = {}

    class Recorded(tqdm.tqdm):
        def __init__(self, **options):
            seen.update(options)
            super().__init__(**options)

    monkeypatch.setattr(tqdm, "tqdm", Recorded)
    argv = ["photos", f"--model_path={model}", "--output=rows.jsonl", "--max_tokens_to_generate=8"]
    assert commandline.run(Flags, annotate.program, argv) == 0
    shown = io.StringIO()
    bar = tqdm.std.tqdm(**seen | {"total": 1000, "initial": 900, "disable": False, "file": shown, "ncols": 80})
    now = bar.start_t
    bar._time = lambda: now
    for seconds, count in ((1, 19), (9, 1)):
        now += seconds
        bar.update(count)
    bar.refresh()
    assert "920/1000" in shown.getvalue() and "<00:40" in shown.getvalue().split("\r")[-1]


# Flags


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["photos"], "--output"),
        (["--output=x"], "no picture is given"),
        (["photos", "--output=x", "--task=detect"], "something to look for"),
        (["photos", "--output=x", "--task=look"], "look"),
        (["photos", "--output=x", "--text=cat"], "caption takes no text"),
        (["photos", "--output=x", "--task=detect", "cat", "--shard=0/3"], "shard"),
        (["photos", "--output=x", "--shard=4/3"], "shard"),
        (["photos", "--output=x", "--shard=1"], "shard"),
        (["photos", "--output=x", "--rows=0"], "rows"),
        (["photos", "--output=x", "--task=detect", "cat", "--export=xml"], "export"),
        (["photos", "--output=x", "--export=coco"], "--export does not go with caption"),
        (["photos", "--output=x", "--save_dir=out"], "--save_dir does not go with caption"),
        (["--questions=q", "--output=x", "--task=ocr"], "Drop --task"),
        (["a", "b", "--questions=q", "--output=x"], "at most one argument"),
        (["photos", "--output=x", "--quantize=int3"], "quantize"),
        (["photos", "--output=x", "--outptu=y"], "--output"),
    ],
)
@pytest.mark.usefixtures("world")
def test_wrong_flags_are_2_and_named(argv, named, capsys):
    assert commandline.run(Flags, lambda _: pytest.fail("it ran"), argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and named in err


@pytest.mark.usefixtures("world")
def test_the_last_word_is_the_text_where_one_is_needed():
    def read(*words, **more):
        flags = Flags(positional=words, output="x", **more)
        return flags.pictures, flags.text_asked

    assert read("photos", "cat ; dog", task="detect") == (("photos",), "cat ; dog")
    assert read("photos", "x.png", task="detect", text="cat") == (("photos", "x.png"), "cat")
    assert read("photos", "photos/a", task="caption") == (("photos", "photos/a"), "")
    os.mkdir("cat")
    assert read("photos", "cat", task="detect") == (("photos",), "cat")  # a folder of that name changes nothing
    with pytest.raises(UsageError, match="something to look for"):
        read("photos", "photos/a", task="detect")  # both are pictures


@pytest.mark.parametrize(
    ("argv", "code", "named"),
    [
        (["phots"], 3, "phots does not exist. Did you mean photos?"),
        (["photos/*.gif"], 3, "no file matches photos/*.gif"),
        (["none"], 3, "no picture was found"),
        (["--list=lost.txt"], 3, "lost.txt cannot be read"),
        (["--questions=broken.jsonl"], 3, "broken.jsonl:1 lacks an image or a prefix"),
        (["photos", "--output=no folder/x.jsonl"], 7, "there is no folder no folder"),
        (["photos", "--model_path=no_model"], 4, "no_model"),
        (["photos", "--output=photos/a/1.png"], 7, "is not a file of rows"),
        (["photos", "--task=segment", "cat", "--mask_codec=lost.npz"], 4, "lost.npz"),
    ],
)
def test_what_is_wrong_is_said_before_the_model_is_loaded(run, world, monkeypatch, argv, code, named):
    (world / "none").mkdir()
    Path("broken.jsonl").write_text("{}\n")
    monkeypatch.setattr(weights.ModelFiles, "load", lambda *_, **__: pytest.fail("it was loaded"))
    assert run(*argv)[0] == code
    assert named in run(*argv)[1]
    assert not os.path.exists("rows.jsonl") or not list(rows("rows.jsonl"))


@pytest.mark.usefixtures("world")
def test_wrong_usage_and_wrong_words_are_answered_before_anything_slow_is_imported():
    script = (
        "import sys; from paligemma.programs import annotate; code = annotate.main(); "
        "print(code, sorted({'torch', 'numpy', 'PIL', 'tokenizers', 'safetensors', 'transformers'} & set(sys.modules)))"
    )
    for argv in (["photos"], ["photos", "--promt=x"], ["photos/*.gif", "--output=x"], ["--help"]):
        done = subprocess.run([sys.executable, "-c", script, *argv], capture_output=True, text=True)
        code = 0 if argv == ["--help"] else 3 if "photos/*.gif" in argv else 2
        assert done.stdout.splitlines()[-1] == f"{code} []", done.stderr


def test_a_prompt_of_the_user_says_how_its_answer_is_read():
    assert job.read_prompt("detect cat ; dog") == ("detect", "cat ; dog")
    assert job.read_prompt("segment cat") == ("segment", "cat")
    assert job.read_prompt("ocr") == ("ocr", "")
    assert job.read_prompt("caption fr") == ("caption", "")
    assert job.read_prompt("detective work") == ("ask", "detective work")
    assert job.read_prompt("detect") == ("ask", "detect")


def test_flags_of_drawings_need_a_folder_for_them(run):
    code, err = run("photos", "--task=detect", "cat", "--plain")
    assert code == 2 and err.startswith("error: --plain changes only drawings, and no drawing is asked for. Add --save_dir.")
    assert run("photos", "--task=detect", "cat", "--plain", "--line_width=3", "--no_labels", "--save_dir=drawn")[0] == 0


# Addresses, and pictures that do something unforeseen


@pytest.fixture
def server():
    """A server on this machine that has a picture; and the paths that it was asked for."""
    content, asked = io.BytesIO(), []
    Image.new("RGB", (8, 8), "red").save(content, "PNG")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Type", "image/png")
            self.end_headers()
            self.wfile.write(content.getvalue())

        def log_message(self, *_):
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_only_an_address_that_is_typed_may_be_inside_the_own_network(run, world, server):
    address, asked = server
    (world / "names.txt").write_text(f"{address}/list.png\nfile://{world}/photos/a/1.png\nphotos/a/1.png\n")
    lines = [f"{address}/questions.png", f"file://{world}/photos/a/1.png", "~/x.png", "photos/a/1.png"]
    (world / "q.jsonl").write_text("".join(json.dumps({"image": image, "prefix": "caption en"}) + "\n" for image in lines))
    code, err = run(f"{address}/typed.png", f"file://{world}/photos/a/1.png", "--list=names.txt", "--task=caption")
    assert code == 8, err
    assert run("--questions=q.jsonl", "--output=q.out.jsonl")[0] == 8
    assert asked == ["/typed.png"]
    read = [*written().items(), *written("q.out.jsonl").items()]
    found = {image: row.get("error", {}).get("code", 0) for (image, _), row in read}
    assert found == {
        f"{address}/typed.png": 0, f"{address}/list.png": 5, f"{address}/questions.png": 5, "photos/a/1.png": 0, "~/x.png": 3,
        f"file://{world}/photos/a/1.png": 3,
    }  # fmt: skip


def test_an_unforeseen_error_in_one_picture_is_its_row(run, monkeypatch):
    """int.from_bytes in the sniffing of HEIC was a TypeError on Python 3.10, and ended the whole run."""
    sniff = decoding.sniff

    def stumble(data):
        if len(data) == Path("photos/a/2.png").stat().st_size:
            raise TypeError("from_bytes() missing required argument")
        return sniff(data)

    monkeypatch.setattr(decoding, "sniff", stumble)
    assert run("photos", "--task=caption")[0] == 8
    errors = {image: row["error"]["message"] for (image, _), row in written().items() if "error" in row}
    assert list(errors) == ["photos/a/2.png"] and "TypeError" in errors["photos/a/2.png"]
    assert len(written()) == len(GOOD)


def test_rows_that_were_begun_before_there_was_stretch_go_on(run):
    assert run("photos/a", "--task=caption")[0] == 0
    assert "stretch" not in Path("rows.jsonl").read_text()
    code, err = run("photos/a", "--task=caption", "--stretch")
    assert code == 2 and "stretch was null and is true" in err
