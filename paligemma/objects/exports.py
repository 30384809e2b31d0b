"""Writes objects in the formats of other tools: COCO, Pascal VOC, YOLO, CSV; or converts them to supervision's Detections.

The input is a list of rows in the format that `annotate` writes and --json prints: image (a name), width, height, objects (see
outputs.as_json). Rows about the same picture are merged. Rows with an error or without objects, and objects without a box, are
skipped. Files are written atomically. torch is never imported, and numpy only if there are masks. Checked in
tests/objects/test_exports.py.
"""

import csv
import io
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from paligemma.errors import DatasetError, DeviceError
from paligemma.files import make_folder, name_key, write_atomic
from paligemma.objects.outputs import ParsedObject

if TYPE_CHECKING:
    import supervision

UNNAMED = "object"  # the class of objects without a label, as in the answers of a refcoco checkpoint
NOT_IN_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
NOT_IN_NAMES = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")  # impossible in file names; \udc80 to \udcff represent raw bytes
RUN_LENGTHS = re.compile("(?:[P-o]{0,6}[0-O])*")  # COCO's compressed run lengths, at most 7 characters each, so below 2^34
MAX_NAME = 200  # bytes of one path component; disks allow 255, and suffixes are added
# A spreadsheet takes a text for a formula if it begins with one of these (the last four are full-width).
FORMULA = ("=", "+", "-", "@", "\t", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
COLUMNS = ("image", "label", "score", "x_min", "y_min", "x_max", "y_max", "width", "height")


@dataclass
class Picture:
    """The objects of all rows about one picture."""

    name: str
    width: int
    height: int
    objects: list[dict] = field(default_factory=list)


def are_numbers(value: object, count: int) -> bool:
    """Whether the value is a list of `count` finite numbers."""
    return isinstance(value, list) and len(value) == count and all(type(x) in (int, float) and abs(x) < 1e12 for x in value)


def is_object(found: object) -> bool:
    """Whether the fields of an object that an export reads have the types that outputs.as_json writes."""
    if not (isinstance(found, dict) and isinstance(found.get("label"), str)):
        return False
    if found.get("score") is not None and not are_numbers([found["score"]], 1):
        return False
    if "box" not in found:
        return True
    mask = found.get("mask", {"size": [1, 1], "counts": ""})
    if not (isinstance(mask, dict) and are_numbers(mask.get("size"), 2) and isinstance(mask.get("counts"), str)):
        return False
    has_box = are_numbers(found["box"], 4) and are_numbers(found.get("box_normalized"), 4)
    return has_box and RUN_LENGTHS.fullmatch(mask["counts"]) is not None


def collect(rows: Iterable[dict]) -> list[Picture]:
    """The pictures in the order in which they first appear, including those without objects.

    Raises: DatasetError for a row whose objects do not have the form of outputs.as_json: the file may have been edited.
    """
    pictures: dict[str, Picture] = {}
    for row in rows:
        if "error" not in row and "objects" in row:
            size, objects = [row.get("width"), row.get("height")], row["objects"]
            is_fine = isinstance(row.get("image"), str) and are_numbers(size, 2) and isinstance(objects, list)
            if not (is_fine and all(map(is_object, objects))):
                name = ascii(row.get("image"))[:100]
                raise DatasetError(f"the row about {name} is damaged. Delete its line, and ask about that picture again.")
            picture = pictures.setdefault(row["image"], Picture(row["image"], row["width"], row["height"]))
            picture.objects += [found for found in objects if "box" in found]
    return list(pictures.values())


def name_of(found: dict) -> str:
    return found["label"] or UNNAMED


def class_names(pictures: list[Picture]) -> list[str]:
    """The different labels, in the order in which they first appear."""
    return list(dict.fromkeys(name_of(found) for picture in pictures for found in picture.objects))


def put(path: Path, text: str) -> None:
    """Writes a file, and makes the folders above it. Raises: OutputError."""
    make_folder(path.parent)
    write_atomic(path, text)


# COCO; its fields are described at cocodataset.org/#format-data


def coco_shape(found: dict) -> dict:
    """The fields bbox ([x, y, width, height] in pixels), area and, for an object with a mask, segmentation (run lengths)."""
    x, y, x_end, y_end = found["box"]
    shape = {"bbox": [x, y, round(x_end - x, 2), round(y_end - y, 2)]}
    if "mask" not in found:
        return shape | {"area": round((x_end - x) * (y_end - y), 2)}
    from paligemma.objects.masks import read_counts

    return shape | {"area": sum(read_counts(found["mask"]["counts"])[1::2]), "segmentation": found["mask"]}


def coco(pictures: list[Picture]) -> dict:
    """The content of an annotation file: images, categories and annotations with ids from 1. Annotations keep their score."""
    numbers = {name: number for number, name in enumerate(class_names(pictures), 1)}
    images, annotations = [], []
    for image_id, picture in enumerate(pictures, 1):
        images.append({"id": image_id, "file_name": picture.name, "width": picture.width, "height": picture.height})
        for found in picture.objects:
            owner = {"id": len(annotations) + 1, "image_id": image_id, "category_id": numbers[name_of(found)], "iscrowd": 0}
            score = {"score": found["score"]} if "score" in found else {}
            annotations.append(owner | {"segmentation": []} | coco_shape(found) | score)
    categories = [{"id": number, "name": name} for name, number in numbers.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def coco_results(pictures: list[Picture], truth: dict) -> list[dict]:
    """The content of a result file for COCOeval, with the ids of an annotation file. An object without a score gets score 1.

    Args:
        truth: the content of the annotation file. Pictures are looked up by file name, with or without folders, and categories
            by name. Objects whose label is not one of its categories are left out, because they cannot match anything.
    Raises: DatasetError for a picture that is not in the annotation file.
    """
    ids = {os.path.basename(image["file_name"]): image["id"] for image in truth["images"]}
    ids |= {image["file_name"]: image["id"] for image in truth["images"]}
    numbers = {category["name"]: category["id"] for category in truth["categories"]}
    results = []
    for picture in pictures:
        image_id = ids.get(picture.name, ids.get(os.path.basename(picture.name)))
        if image_id is None:
            raise DatasetError(f"{picture.name} is not among the images of the annotation file. Give the file that names it.")
        for found in picture.objects:
            if name_of(found) in numbers:
                owner = {"image_id": image_id, "category_id": numbers[name_of(found)], "score": found.get("score", 1.0)}
                shape = coco_shape(found)
                shape.pop("area")  # COCOeval computes it
                results.append(owner | shape)
    return results


# Pascal VOC, YOLO, CSV


def voc(picture: Picture) -> str:
    """The XML file of Pascal VOC. Pixels are numbered from 1, and the maximum of a box is the last pixel inside it."""

    def add(parent: ElementTree.Element, **texts: object) -> None:
        for name, text in texts.items():
            ElementTree.SubElement(parent, name).text = NOT_IN_XML.sub("?", str(text))

    root = ElementTree.Element("annotation")
    add(root, filename=os.path.basename(picture.name))
    add(ElementTree.SubElement(root, "size"), width=picture.width, height=picture.height, depth=3)
    add(root, segmented=0)
    for found in picture.objects:
        element = ElementTree.SubElement(root, "object")
        add(element, name=name_of(found), pose="Unspecified", truncated=0, difficult=0)
        x, y, x_end, y_end = (round(value) for value in found["box"])
        left, top = min(x, picture.width - 1) + 1, min(y, picture.height - 1) + 1
        corners = ElementTree.SubElement(element, "bndbox")
        add(corners, xmin=left, ymin=top, xmax=max(x_end, left), ymax=max(y_end, top))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def yolo(picture: Picture, classes: dict[str, int]) -> str:
    """One line per object: class number, then x and y of the centre, width and height as fractions of the picture."""
    lines = []
    for found in picture.objects:
        x, y, x_end, y_end = found["box_normalized"]
        numbers = (x + x_end) / 2, (y + y_end) / 2, x_end - x, y_end - y
        lines.append(" ".join([str(classes[name_of(found)]), *(f"{number:.6f}" for number in numbers)]) + "\n")
    return "".join(lines)


def csv_cell(text: str) -> str:
    """The text, with an apostrophe before it if a spreadsheet would take it for a formula."""
    text = text.replace("\r", " ")  # the csv module does not quote it, so the line would end here
    return f"'{text}" if text.lstrip(" ").startswith(FORMULA) else text


def csv_table(pictures: list[Picture]) -> str:
    """CSV with the columns COLUMNS, boxes in pixels. Names and labels are changed as in csv_cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for picture in pictures:
        for found in picture.objects:
            texts = csv_cell(picture.name), csv_cell(found["label"])
            writer.writerow([*texts, found.get("score"), *found["box"], picture.width, picture.height])
    return text.getvalue()


# Files


def path_parts(name: str) -> list[str]:
    """The name of a picture (a path, an address, a data: URI) as components of a relative path.

    Joined to a folder, the path always lies in that folder. Its components are short enough for any disk.
    """
    if name.startswith("data:"):
        return [f"data-{digest(name)}"]
    name = re.sub("^(https?|file)://", "", name).replace("\\", "/")
    kept = [re.sub(r"^\.\.$", "__", NOT_IN_NAMES.sub("_", part)) for part in name.split("/") if part not in ("", ".")]
    return [part if len(os.fsencode(part)) <= MAX_NAME else f"{part[:40]}-{digest(part)}" for part in kept] or ["picture"]


def digest(name: str) -> str:
    """A hash of the name, in eight characters."""
    return blake2b(name.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()


def output_files(names: Iterable[str], folder: Path, suffix: str, taken: Iterable[Path] = ()) -> list[Path]:
    """One output file per picture. In `folder` the files keep the structure that the pictures have below their common parent.

    Args:
        names: of the pictures, all different.
        taken: paths that are used already.
    Returns: different paths, even if case is ignored; no file has the name of a folder that another file needs.
        1.jpg and 1.png become 1.txt and 1.png.txt.
    """

    def key(path: Path) -> str:
        return name_key(str(path))

    parts = [path_parts(name) for name in names]
    common = len(os.path.commonprefix([part[:-1] for part in parts]))
    others = {*map(key, taken)}
    paths = []
    for first, *rest in (part[common:] for part in parts):
        is_taken = rest and key(folder / first) in others  # for example, a folder with the name of YOLO's classes.txt
        paths.append(folder.joinpath(f"{first}_" if is_taken else first, *rest))
    used = {*others, *(key(above) for path in paths for above in path.parents)}
    counters: dict[str, Iterator[int]] = defaultdict(lambda: count(2))  # so that many equal names do not take quadratic time
    files = []
    for path in paths:
        numbered = (path.with_name(f"{path.name}-{number}{suffix}") for number in counters[key(path)])
        candidates = chain([path.with_suffix(suffix), path.with_name(path.name + suffix)], numbered)
        files.append(next(file for file in candidates if key(file) not in used))
        used.add(key(files[-1]))
    return files


def files_of(kind: str, path: str | Path, names: Iterable[str]) -> list[Path]:
    """The files that `export` writes for these pictures: one per picture or one for all; for "yolo", classes.txt comes last."""
    path, names = Path(path), list(names)
    if kind in ("coco", "csv"):
        return [path]
    is_single = bool(path.suffix) and len(names) == 1
    folder = path.parent if is_single else path.with_suffix("")
    classes = [folder / "classes.txt"] if kind == "yolo" else []
    return [*([path] if is_single else output_files(names, folder, {"voc": ".xml", "yolo": ".txt"}[kind], classes)), *classes]


def export(rows: Iterable[dict], kind: str, path: str | Path, names: Iterable[str] = ()) -> list[Path]:
    """Writes the objects of rows in the format of another tool.

    Args:
        kind: "coco" (annotations), "csv", "voc" or "yolo".
        path: for coco and csv, the file. For voc and yolo: a path without a suffix is the folder, which gets one file per
            picture. A path with a suffix is the file if there is one picture; if there are several, the suffix is removed, and
            the rest is the folder. YOLO's classes.txt is written into the folder.
        names: all pictures that were asked about, also those without rows. With them, the names of the files do not depend on
            which pictures succeeded.
    Returns: the files. Raises: OutputError.
    """
    pictures = collect(rows)
    names = list(dict.fromkeys(names)) or [picture.name for picture in pictures]
    files = files_of(kind, path, names)
    if kind in ("coco", "csv"):
        put(files[0], json.dumps(coco(pictures)) + "\n" if kind == "coco" else csv_table(pictures))
        return files
    classes = {name: number for number, name in enumerate(class_names(pictures))}
    file_of, written = dict(zip(names, files[: len(names)], strict=True)), []
    for picture in pictures:
        written.append(file_of[picture.name])
        put(written[-1], voc(picture) if kind == "voc" else yolo(picture, classes))
    if kind == "yolo":
        written.append(files[-1])
        put(files[-1], "".join(f"{' '.join(name.split()) or UNNAMED}\n" for name in classes))  # one line each
    return written


def to_supervision(objects: Iterable[ParsedObject], width: int, height: int) -> "supervision.Detections":
    """The objects with a box as Detections, for drawing, tracking and counting with supervision. Labels: data["class_name"].

    Confidences and masks are set if every object has one. Raises: DeviceError if supervision is not installed.
    """
    try:
        import supervision
    except ModuleNotFoundError as error:
        raise DeviceError("the package 'supervision' is not installed. Install it: pip install supervision.") from error
    import numpy as np

    objects = [found for found in objects if found.box is not None]
    labels = [found.label for found in objects]
    names = list(dict.fromkeys(labels))
    masks, scores = [found.mask for found in objects], [found.score for found in objects]
    has_masks, has_scores = objects and all(mask is not None for mask in masks), None not in scores
    return supervision.Detections(
        xyxy=np.array([found.box.xyxy(width, height) for found in objects], dtype=np.float32).reshape(-1, 4),
        mask=np.stack(masks) if has_masks else None,
        confidence=np.array(scores, dtype=np.float32) if has_scores else None,
        class_id=np.array([names.index(label) for label in labels], dtype=int),
        data={"class_name": np.array(labels, dtype=str)},
    )
