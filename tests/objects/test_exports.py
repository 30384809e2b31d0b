"""exports.py: other tools read back the same objects as the rows hold."""

import contextlib
import csv
import io
import json
import os
import subprocess
import sys
import tempfile
import unicodedata
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from paligemma.errors import DatasetError, DeviceError, OutputError
from paligemma.objects import exports
from paligemma.objects.exports import coco, coco_results, collect, export, files_of, to_supervision
from paligemma.objects.outputs import NormalizedBox, ParsedObject, as_json

ROOT = Path(__file__).parents[2]
MASK = np.zeros((200, 100), dtype=bool)
MASK[20:50, 10:40] = True
MASK[30:35, 20:25] = False  # a hole
HAT = ParsedObject("person's hat", NormalizedBox(0.2, 0.1, 0.6, 0.3), score=0.75)
CAT = ParsedObject("猫 / cat", NormalizedBox(0, 0, 1, 1), score=0.5, mask=MASK)
BARE = ParsedObject("", NormalizedBox(0.5, 0.25, 0.75, 0.5))
PLACELESS = ParsedObject("dog", None, problems=("no box",))


def row(image, *objects, width=100, height=200, **fields) -> dict:
    found = [as_json(one, width, height) for one in objects]
    return {"image": image, "task": "detect", "width": width, "height": height, "objects": found, "status": "objects"} | fields


ROWS = [
    row("photos/a.jpg", HAT, PLACELESS),
    {"image": "photos/broken.jpg", "prompt": "detect cat", "error": {"type": "ImageError", "message": "no picture"}},
    {"image": "photos/a.jpg", "task": "caption", "width": 100, "height": 200, "text": "a cat"},
    row("photos/deep/b.png", BARE, HAT, width=40, height=40),
    row("photos/empty.jpg", status="nothing"),
    row("photos/a.jpg", CAT),
]


@contextlib.contextmanager
def quiet():
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def test_rows_of_a_picture_are_put_together_and_the_rest_is_passed_over():
    pictures = collect(ROWS)
    assert [(picture.name, len(picture.objects)) for picture in pictures] == [
        ("photos/a.jpg", 2),
        ("photos/deep/b.png", 2),
        ("photos/empty.jpg", 0),
    ]


def test_pycocotools_reads_boxes_labels_and_masks(tmp_path):
    (path,) = export(iter(ROWS), "coco", tmp_path / "out.json")
    with quiet():
        read = COCO(str(path))
    assert [image["file_name"] for image in read.dataset["images"]] == ["photos/a.jpg", "photos/deep/b.png", "photos/empty.jpg"]
    assert [category["name"] for category in read.dataset["categories"]] == ["person's hat", "猫 / cat", "object"]
    hat, cat = read.loadAnns(read.getAnnIds(imgIds=[1]))
    assert hat["bbox"] == [20, 20, 40, 40] and hat["area"] == 1600 and hat["score"] == 0.75
    np.testing.assert_array_equal(read.annToMask(cat), MASK)
    assert cat["area"] == MASK.sum() == coco_mask.area(cat["segmentation"])
    bare = read.loadAnns(read.getAnnIds(imgIds=[2]))[0]
    assert read.loadCats(bare["category_id"])[0]["name"] == "object" and "score" not in bare


def test_results_are_evaluated_under_the_ids_of_the_annotation_file():
    pictures = collect(ROWS)
    truth = coco(pictures)
    for image in truth["images"]:
        image |= {"id": image["id"] + 500, "file_name": Path(image["file_name"]).name}
    for category in truth["categories"]:
        category["id"] += 70
    for annotation in truth["annotations"]:
        annotation["image_id"] += 500
        annotation["category_id"] += 70
    with quiet():
        ours = COCO()
        ours.dataset = truth
        ours.createIndex()
        judge = COCOeval(ours, ours.loadRes(coco_results(pictures, truth)), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    assert judge.stats[0] == pytest.approx(1)


def test_results_leave_out_unknown_labels_and_refuse_unknown_pictures():
    pictures = collect(ROWS)
    truth = coco(pictures)
    truth["categories"] = truth["categories"][:1]
    assert [result["score"] for result in coco_results(pictures, truth)] == [0.75, 0.75]
    truth["images"] = truth["images"][:1]
    with pytest.raises(DatasetError, match="photos/deep/b.png"):
        coco_results(pictures, truth)


def test_voc_files_count_pixels_from_one_and_lie_as_the_pictures_do(tmp_path):
    files = export(ROWS, "voc", tmp_path / "voc")
    assert [str(file.relative_to(tmp_path)) for file in files] == ["voc/a.xml", "voc/deep/b.xml", "voc/empty.xml"]
    root = ElementTree.parse(files[0]).getroot()
    assert root.findtext("filename") == "a.jpg"
    assert [root.findtext(f"size/{name}") for name in ("width", "height", "depth")] == ["100", "200", "3"]
    names = [element.findtext("name") for element in root.iter("object")]
    corners = [[int(box.findtext(name)) for name in ("xmin", "ymin", "xmax", "ymax")] for box in root.iter("bndbox")]
    assert names == ["person's hat", "猫 / cat"]
    assert corners == [[21, 21, 60, 60], [1, 1, 100, 200]]


def test_a_voc_box_keeps_a_pixel_even_if_it_has_no_area(tmp_path):
    thin = [ParsedObject("line", NormalizedBox(1, 1, 1, 1)), ParsedObject("\x00<b>&", NormalizedBox(0.3, 0.5, 0.3, 0.5))]
    (file,) = export([row("x.jpg", *thin)], "voc", tmp_path / "x.xml")
    root = ElementTree.parse(file).getroot()
    assert [[box.text for box in element] for element in root.iter("bndbox")] == [["100", "200"] * 2, ["31", "101"] * 2]
    assert [element.findtext("name") for element in root.iter("object")] == ["line", "?<b>&"]


def test_yolo_lines_parsed_back_are_the_boxes(tmp_path):
    *files, names = export(ROWS, "yolo", tmp_path / "labels")
    classes = names.read_text(encoding="utf-8").splitlines()
    assert classes == ["person's hat", "猫 / cat", "object"] and names.name == "classes.txt"
    back = []
    for line in files[1].read_text().splitlines():
        number, x, y, width, height = line.split()
        x, y, width, height = (float(value) for value in (x, y, width, height))
        back.append((classes[int(number)], (y - height / 2, x - width / 2, y + height / 2, x + width / 2)))
    assert [name for name, _ in back] == ["object", "person's hat"]
    for (_, box), found in zip(back, (BARE, HAT), strict=True):
        assert box == pytest.approx((found.box.y_min, found.box.x_min, found.box.y_max, found.box.x_max), abs=1e-5)
    assert files[2].read_text() == ""  # the picture has a row, but no objects


def test_a_table_has_a_line_for_each_box(tmp_path):
    (path,) = export(ROWS, "csv", tmp_path / "out.csv")
    lines = list(csv.DictReader(path.open(encoding="utf-8", newline="")))
    assert [line["label"] for line in lines] == ["person's hat", "猫 / cat", "", "person's hat"]
    assert lines[0] == {
        "image": "photos/a.jpg", "label": "person's hat", "score": "0.75", "x_min": "20.0", "y_min": "20.0", "x_max": "60.0",
        "y_max": "60.0", "width": "100", "height": "200",
    }  # fmt: skip


def test_a_name_with_an_ending_is_the_file_of_one_picture_and_the_folder_of_several(tmp_path):
    one = export(ROWS[:1], "yolo", tmp_path / "one.txt")
    several = export(ROWS, "yolo", tmp_path / "several.txt")
    assert one == [tmp_path / "one.txt", tmp_path / "classes.txt"]
    assert several[0] == tmp_path / "several" / "a.txt"


def test_no_two_pictures_share_a_file_and_none_leaves_the_folder(tmp_path):
    names = ["x/1.jpg", "x/1.png", "../../1.jpg", "https://example.com/a/1.jpg?size=2", "-", "", "C:\\pictures\\1.jpg"]
    files = export([row(name) for name in names], "voc", tmp_path / "out")
    assert len(set(files)) == len(names)
    assert all(file.is_file() and file.resolve().is_relative_to(tmp_path / "out") for file in files)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["1.png", "./1.png", "././1.png"], ["1.txt", "1.png.txt", "1.png-2.txt"]),
        (["1.jpg", "1.png.gif", "1.png"], ["1.txt", "1.png.txt", "1.png-2.txt"]),
        (["A.png", "a.jpg", "a.png"], ["A.txt", "a.jpg.txt", "a.png.txt"]),  # equal names on disks that ignore case
        (["classes.png", "x.png"], ["classes.png.txt", "x.txt"]),  # classes.txt holds the classes
        (["Classes.txt/a.png", "b.png"], ["Classes.txt_/a.txt", "b.txt"]),  # a folder of that name is renamed, too
        (["x", "x.txt/1.png"], ["x-2.txt", "x.txt/1.txt"]),  # a file cannot have the name of a folder
    ],
)  # fmt: skip
def test_names_that_meet_are_told_apart(names, expected, tmp_path):
    planned = files_of("yolo", tmp_path / "o.txt", names)
    assert [str(file.relative_to(tmp_path / "o")) for file in planned] == [*expected, "classes.txt"]
    assert export([row(name) for name in names], "yolo", tmp_path / "o.txt") == planned and all(map(Path.is_file, planned))


def test_files_are_named_as_if_every_picture_had_a_row(tmp_path):
    names = ["a/1.jpg", "a/1.png", "b/2.png"]
    planned = files_of("voc", tmp_path / "o.xml", names)
    assert export([row("a/1.png")], "voc", tmp_path / "o.xml", names) == [planned[1]] == [tmp_path / "o" / "a" / "1.png.xml"]


NAMES = st.one_of(
    st.lists(st.sampled_from(["1.png", "1.jpg", "A", "a", ".", "..", "", "1.png.txt", "x" * 300, "\ud800", "\0", "é", "e\u0301"]))
    .map("/".join), st.text(), st.sampled_from(["-", "data:image/png;base64,//AA", "https://a/1.png", "http://a/1.png"]),
)  # fmt: skip


@settings(max_examples=200)
@given(st.lists(NAMES, unique=True, max_size=12), st.sampled_from(["voc", "yolo"]))
def test_pictures_of_any_names_have_a_file_each(names, kind):
    planned = files_of(kind, "out/o", names)
    plain = [unicodedata.normalize("NFC", str(file)).casefold() for file in planned]
    above = {unicodedata.normalize("NFC", str(folder)).casefold() for file in planned for folder in file.parents}
    assert len(set(plain)) == len(planned) == len(names) + (kind == "yolo") and not above & set(plain)
    assert all(len(os.fsencode(step)) <= 255 and "\0" not in step for file in planned for step in file.parts)
    assert all(file.is_relative_to("out/o") and ".." not in file.parts for file in planned)


def test_many_pictures_of_one_name_take_no_time(tmp_path):
    names = ["./" * i + "1.png" for i in range(3000)]
    assert len(set(files_of("voc", tmp_path / "o", names))) == 3000


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from("label box mask size counts x".split()), inner),
    max_leaves=8,
)


@settings(max_examples=200)
@given(st.data())
def test_rows_that_others_changed_are_exported_or_refused(data):
    changed = json.loads(json.dumps(row("a.png", HAT, CAT)))
    for _ in range(data.draw(st.integers(1, 2))):
        inner = data.draw(st.sampled_from([changed, changed["objects"][0], changed["objects"][1]])) if (
            isinstance(changed.get("objects"), list) and all(isinstance(x, dict) for x in changed["objects"]) and
            len(changed["objects"]) == 2) else changed  # fmt: skip
        inner[data.draw(st.sampled_from(sorted(inner)))] = data.draw(JSON)
    for kind in ("coco", "voc", "yolo", "csv"):
        with contextlib.suppress(DatasetError), tempfile.TemporaryDirectory() as folder:
            export([changed], kind, Path(folder) / "out")


@pytest.mark.parametrize("counts", ["o" * 1_000_000, "\x00", "0o", "é"])
def test_run_lengths_that_are_none_are_refused(counts, tmp_path):
    changed = json.loads(json.dumps(row("a.png", CAT)))
    changed["objects"][0]["mask"]["counts"] = counts
    with pytest.raises(DatasetError, match="the row about 'a.png' is damaged"):
        export([changed], "coco", tmp_path / "o.json")


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "out.csv"
    path.write_text("before")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exports.os, "replace", full)
    with pytest.raises(OutputError, match="No space left"):
        export(ROWS, "csv", path)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["before"]


def test_a_name_of_no_characters_is_written_all_the_same(tmp_path):
    rows = [row("caf\udce9.jpg", HAT)]
    for kind in ("coco", "csv", "voc"):
        (path,) = export(rows, kind, tmp_path / f"out.{kind}")
        assert b"caf" in path.read_bytes()


# supervision


@pytest.mark.filterwarnings("ignore:OpenCV")
def test_supervision_gets_pixels_labels_scores_and_masks():
    objects = [replace(HAT, mask=~MASK), PLACELESS, CAT]
    detections = to_supervision(objects, 100, 200)
    assert detections.xyxy.tolist() == [[20, 20, 60, 60], [0, 0, 100, 200]]
    assert detections["class_name"].tolist() == ["person's hat", "猫 / cat"]
    assert detections.class_id.tolist() == [0, 1] and detections.confidence.tolist() == [0.75, 0.5]
    np.testing.assert_array_equal(detections.mask, [~MASK, MASK])
    assert len(detections[detections.confidence > 0.6]) == 1  # it can be filtered, so all its fields fit together


@pytest.mark.filterwarnings("ignore:OpenCV")
def test_supervision_gets_no_scores_or_masks_where_some_are_missing():
    detections = to_supervision([BARE, CAT], 100, 200)
    assert detections.confidence is None and detections.mask is None and len(detections) == 2
    assert len(to_supervision([], 100, 200)) == 0


def test_without_supervision_a_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(DeviceError, match="pip install supervision"):
        to_supervision([HAT], 10, 10)


def test_exporting_needs_neither_torch_nor_numpy_where_there_are_no_masks(tmp_path):
    code = f"import sys, json; from paligemma.objects import exports; rows = json.loads({json.dumps(json.dumps(ROWS[:1]))})\n"
    code += f"for kind in ('coco', 'voc', 'yolo', 'csv'): exports.export(rows, kind, {str(tmp_path)!r} + '/' + kind)\n"
    code += "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# Labels that would break a spreadsheet or a file with one label per line


def labelled(*labels):
    found = {"box": [1.0, 1.0, 5.0, 5.0], "box_normalized": [0.1, 0.1, 0.5, 0.5]}
    return [{"image": "=a.png", "width": 10, "height": 10, "objects": [found | {"label": label} for label in labels]}]


def test_no_cell_of_a_table_is_a_formula(tmp_path):
    bad = ["=1+1", "+1", "-1", "@x", "\t=1", "\r=1", "\n=1", " =1", "\uff1d1", '=HYPERLINK("http://x","y")']
    export(labelled(*bad, "cat", "a=b", ""), "csv", tmp_path / "t.csv")
    rows = list(csv.reader(io.StringIO((tmp_path / "t.csv").read_bytes().decode(), newline="")))[1:]
    assert [row[1] for row in rows] == [*(f"'{label}".replace("\r", " ") for label in bad), "cat", "a=b", ""]
    assert {row[0] for row in rows} == {"'=a.png"} and rows[0][2:] == ["", "1.0", "1.0", "5.0", "5.0", "10", "10"]


def test_yolo_has_a_line_for_each_class_whatever_its_name_holds(tmp_path):
    names = ["a\nb", "c\x85d\u2028e", "\n", "f"]
    export(labelled(*names), "yolo", tmp_path / "out")
    assert (tmp_path / "out" / "classes.txt").read_text(encoding="utf-8").split("\n") == ["a b", "c d e", "object", "f", ""]
    assert [line.split()[0] for line in (tmp_path / "out" / "=a.txt").read_text().splitlines()] == ["0", "1", "2", "3"]


def test_voc_is_xml_whatever_a_label_holds(tmp_path):
    names = ["a\x00b", "<x>&\"'", "\ufffe\ud800", "]]>", "\x1b[31m"]
    export(labelled(*names), "voc", tmp_path / "out")
    root = ElementTree.parse(tmp_path / "out" / "=a.xml").getroot()
    assert [name.text for name in root.iterfind("object/name")] == ["a?b", "<x>&\"'", "??", "]]>", "?[31m"]
