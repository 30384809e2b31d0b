"""What a JSONL file of examples may contain, which lines are faulty, and which lines get a warning."""

import gc
import json
import os
import subprocess
import sys
import weakref
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from paligemma.errors import DatasetError
from paligemma.learning import dataset
from paligemma.processing_paligemma import PaliGemmaProcessor

BOX = "<loc0100><loc0200><loc0300><loc0400>"
GOOD = {"image": "a.png", "prefix": "detect cat", "suffix": f"{BOX} cat"}


@pytest.fixture(scope="module")
def processor():
    return PaliGemmaProcessor.from_pretrained(Path(__file__).parents[2] / "paligemma" / "bundled")


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(("a.png", "b.png")):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / name)
    return tmp_path


def write(folder, *lines, name="train.jsonl"):
    """Writes a JSONL file: a dict becomes a line of JSON, text and bytes are written as they are."""
    lines = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
    lines = [line.encode() if isinstance(line, str) else line for line in lines]
    (folder / name).write_bytes(b"\n".join(lines) + b"\n")
    return folder / name


def checked(file, processor, max_text_tokens=100):
    split = dataset.read_split(file)
    dataset.check_pictures(split)
    dataset.check_texts(split, processor, max_text_tokens)
    return split


def texts(faults):
    return [f"{fault.line}: {fault.text}" for fault in faults]


def test_a_good_file_is_read_whole(folder, processor):
    split = checked(write(folder, GOOD, GOOD | {"image": "b.png", "suffix": ""}), processor)
    assert [(example.image.name, example.prefix, example.suffix, example.line) for example in split.examples] == [
        ("a.png", "detect cat", f"{BOX} cat", 1),
        ("b.png", "detect cat", "", 2),
    ]
    assert split.faults == [] and len(set(split.hashes)) == 2


@pytest.mark.parametrize("ending", ["\r\n", "\n\n", "\n   \n"])
def test_marks_blank_lines_and_other_line_ends_are_ignored(folder, ending):
    (folder / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + (json.dumps(GOOD) + ending).encode() * 2)
    split = dataset.read_split(folder / "train.jsonl")
    assert len(split.examples) == 2 and split.faults == []


def test_further_fields_are_allowed(folder):
    assert dataset.read_split(write(folder, GOOD | {"id": 7})).faults == []


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON.*column 2"),
        ("[1]", "a list, not an object"),
        (b'{"image": "\xff"}', "not UTF-8"),
        ("[" * 100_000, "not usable JSON"),
        ({"image": "a.png", "prefix": "x"}, "no 'suffix'; the object has 'image', 'prefix'"),
        ("{}", "no 'image'; the object has nothing"),
        (GOOD | {"suffix": True}, "suffix is true or false; text in quotes"),
        (GOOD | {"suffix": None}, "suffix is null; text in quotes"),
        (GOOD | {"suffix": ["cat"]}, "suffix is a list"),
        (GOOD | {"prefix": 3}, "prefix is a number"),
        (GOOD | {"image": {"bytes": "x"}}, "image is an object"),
        (GOOD | {"suffix": float("nan")}, "NaN is not a JSON number"),
        (json.dumps(GOOD)[:-1] + ', "suffix": "other"}', "'suffix' is given twice"),
        ({"x" * 1000: 1}, "no 'image'; the object has 'x{60}[.]{3}'"),
        ({f"k{i}": 1 for i in range(1000)}, "'k5' and 994 more"),
        (GOOD | {"image": "../" + "a" * 5000}, "outside the dataset"),
        ({"messages": []}, "a chat .'messages'.. Write its question as prefix"),
        (GOOD | {"prefix": "\ud800"}, "surrogate"),
        (GOOD | {"image": "../a.png"}, "outside the dataset"),
        (GOOD | {"image": "/etc/passwd"}, "is an absolute path, but a path relative to the dataset's folder is needed"),
        (GOOD | {"image": "https://x.org/a.png"}, "is a URL; download the picture"),
        (GOOD | {"image": "x/../../a.png"}, "outside the dataset"),
        (GOOD | {"image": ""}, "name of a file"),
        (GOOD | {"image": "a\0.png"}, "name of a file"),
        ('{"image": "' + "a" * (1 << 20) + '"}', "longer than 1048576 bytes"),
    ],
)
def test_every_faulty_line_is_named_and_the_others_stay(folder, line, says):
    split = dataset.read_split(write(folder, GOOD, line, GOOD, line))
    assert [fault.line for fault in split.faults] == [2, 4] and len(split.examples) == 2
    with pytest.raises(DatasetError, match=f"2 lines cannot be used.*train.jsonl:2: .*{says}.*--skip_bad") as caught:
        dataset.require_usable([split], skip_bad=False)
    assert len(caught.value.message) < 600
    dataset.require_usable([split], skip_bad=True)


@pytest.mark.parametrize("number", ["3", "-1.50", "1e999", "0.1", "9" * 5000])
def test_a_number_as_suffix_is_its_text(folder, number):
    split = dataset.read_split(write(folder, f'{{"image": "a.png", "prefix": "how many", "suffix": {number}}}'))
    assert [example.suffix for example in split.examples] == [number] and type(split.examples[0].suffix) is str


LINE = json.dumps(GOOD)
COCO = {"info": {}, "images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"id": 1, "bbox": [1, 2, 3, 4]}]}
OTHER = "\n".join(json.dumps({"img": "a", "q": "b"}) for i in range(1002))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (f"[{LINE}, {LINE}]", "is one JSON array.*python -c"),
        (f"[\n{LINE},\n{LINE}\n]\n", "is one JSON array"),
        ("\ufeff" + json.dumps([GOOD] * 50, indent=2), "is one JSON array"),
        (json.dumps([GOOD] * 20_000), "is one JSON array"),
        (json.dumps(COCO), "is a COCO file"),
        (json.dumps(COCO, indent=1), "is a COCO file"),
        (json.dumps(dict(reversed(COCO.items()))), "is a COCO file"),
        (json.dumps(COCO | {"annotations": [{"id": i} for i in range(200_000)]}), "is a COCO file"),
        (json.dumps(GOOD, indent=2) + "\n" + json.dumps(GOOD, indent=2), "extend over several lines.*jq -c"),
        ("image,prefix,suffix\n" + "a.png,detect cat,x\n" * 1000, "is a table .CSV."),
        ("image: a.png\nprefix: x\n", "is YAML"),
        ("- image: a.png\n", "is YAML"),
        ("<annotation><folder/></annotation>", "is HTML or XML"),
        ("\n".join(json.dumps({"messages": [i]}) for i in range(1002)), "All 1002 lines have the same fault: a chat"),
        (OTHER, "All 1002 lines have the same fault: no 'image'; the object has 'img', 'q'"),
        ("\n".join(json.dumps(GOOD | {"image": f"/data/{i}.png"}) for i in range(1002)), "All 1002 lines .* an absolute path"),
        ("\n".join(json.dumps({"messages": [i, "\u4e00"]}, ensure_ascii=False) for i in range(9000)), "All 9000 .*: a chat"),
        ("\n".join(f"{json.dumps(GOOD | {'suffix': 'x' * i})}," for i in range(1002)), "has a comma at the end of each line"),
        (json.dumps([{"image": "a.png", "conversations": []}]), "is one JSON array whose objects are not examples: a chat"),
        (json.dumps({"version": "1", "images": [], "annotations": []}, indent=1), "is a COCO file"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 12345\n", "git lfs pull"),
        (b"\x89PNG\r\n" + b"x\n" * 1000, "is not text in UTF-8"),
        (b"a.png" + b"\0" * 500, "is not text in UTF-8"),
        (LINE.encode("utf-16"), "is text in UTF-16"),
        (LINE.encode("utf-16-le"), "is text in UTF-16"),
        (b"PAR1" + bytes(100), "is a Parquet table"),
        (b"PK\x03\x04" + bytes(100), "is a ZIP archive"),
        (b"\x1f\x8b" + bytes(100), "is compressed .gzip."),
    ],
)
def test_a_file_that_is_no_jsonl_is_recognised_in_one_sentence(folder, content, says):
    (folder / "train.jsonl").write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DatasetError, match=says) as caught:
        dataset.read_split(folder / "train.jsonl")
    assert len(caught.value.message) < 500 and "\n" not in caught.value.message


def test_the_advice_for_an_array_makes_a_file_that_is_read(folder):
    (folder / "data.json").write_text(json.dumps([GOOD] * 3, indent=1))
    with pytest.raises(DatasetError) as caught:
        dataset.read_split(folder / "data.json")
    command = caught.value.message.partition("Convert it: python ")[2].removesuffix(".")
    subprocess.run(["bash", "-c", f"'{sys.executable}' {command}"], cwd=folder, check=True, timeout=60)
    assert len(dataset.read_split(folder / "examples.jsonl").examples) == 3


def test_lines_without_end_take_no_memory(folder):
    (folder / "train.jsonl").write_bytes(b"[" * (5 << 20) + b"\n" + LINE.encode() + b"\n" + LINE.encode())
    split = dataset.read_split(folder / "train.jsonl")
    assert [fault.line for fault in split.faults] == [1] and [example.line for example in split.examples] == [2, 3]
    assert max(map(len, dataset.read_lines(folder / "train.jsonl"))) <= dataset.MAX_LINE_BYTES + 2


@pytest.mark.parametrize("name", ["pipe", "folder", "dangling", "loop", "x" * 300])
def test_a_path_without_a_file_is_refused(folder, name):
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    (folder / "dangling").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    with pytest.raises(DatasetError):
        dataset.read_split(folder / name)
    with pytest.raises(DatasetError):
        dataset.read_split(write(folder, GOOD), image_dir=folder / name / "more")


def test_names_are_relative_to_another_folder_if_it_is_named(folder):
    (folder / "lists").mkdir()
    lines = [GOOD, GOOD | {"image": "../a.png"}, GOOD | {"image": "lists/../b.png"}]
    file = write(folder / "lists", *lines)
    split = dataset.read_split(file, image_dir=folder)
    dataset.check_pictures(split)
    assert [example.image for example in split.examples] == [folder / "a.png", folder / "b.png"]
    assert [fault.line for fault in split.faults] == [2] and "outside" in split.faults[0].text
    assert len(dataset.read_split(file).examples) == 2  # a.png is looked for in lists, where it is not
    with pytest.raises(DatasetError, match="is not a folder"):
        dataset.read_split(file, image_dir=folder / "none")


def test_links_may_not_leave_the_folder(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    Image.new("RGB", (8, 8)).save(outside / "c.png")
    (folder / "in.png").symlink_to("a.png")
    (folder / "out.png").symlink_to(outside / "c.png")
    (folder / "all").symlink_to(outside)
    names = ("a.png", "in.png", "out.png", "all/c.png")
    split = dataset.read_split(write(folder, *(GOOD | {"image": name} for name in names)))
    dataset.check_pictures(split)
    assert [example.image.name for example in split.examples] == ["a.png", "in.png"]
    assert all("leads out of the dataset's folder; use --image_dir" in fault.text for fault in split.faults)
    (tmp_path_factory.getbasetemp() / "link").unlink(missing_ok=True)
    (tmp_path_factory.getbasetemp() / "link").symlink_to(folder)  # the folder itself may be named by a link
    again = dataset.read_split(tmp_path_factory.getbasetemp() / "link" / "train.jsonl")
    dataset.check_pictures(again)
    assert [example.image.name for example in again.examples] == ["a.png", "in.png"]


def test_a_nearly_black_picture_is_a_warning_unless_it_is_stretched(folder):
    Image.fromarray(np.full((8, 8), 4095, np.uint16)).save(folder / "12bit.png")
    for stretch, count in ((False, 1), (True, 0)):
        split = dataset.read_split(write(folder, GOOD, GOOD | {"image": "12bit.png"}))
        split.options = {"stretch": stretch}
        dataset.check_pictures(split)
        assert len(split.examples) == 2 and len(split.warnings) == count
        assert all("1 of 2 pictures" in warning.text and "--stretch" in warning.text for warning in split.warnings)


def test_links_of_the_hubs_cache_are_followed(tmp_path):
    blobs, snapshot = tmp_path / "datasets--x--y" / "blobs", tmp_path / "datasets--x--y" / "snapshots" / "main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(blobs / "0123", "PNG")
    (snapshot / "a.png").symlink_to("../../blobs/0123")
    (snapshot / "b.png").symlink_to("../../../secret.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    split = dataset.read_split(write(snapshot, GOOD, GOOD | {"image": "b.png"}))
    dataset.check_pictures(split)
    assert [example.image.name for example in split.examples] == ["a.png"] and [fault.line for fault in split.faults] == [2]


def test_the_advice_for_long_examples_is_the_limit_that_they_need(folder, processor):
    busy = GOOD | {"suffix": " ; ".join([f"{BOX} cat"] * 30)}
    split = checked(write(folder, GOOD, busy), processor, 60)
    needed = split.faults[0].tokens
    assert 300 > needed > 150 and f"take {needed} tokens, over the 60 allowed" in split.faults[0].text
    with pytest.raises(DatasetError, match=f"1 line cannot be used.* --max_text_tokens {needed}[.]") as caught:
        dataset.require_usable([split], skip_bad=False, max_tokens=1000)
    assert "--skip_bad" not in caught.value.message
    assert checked(split.file, processor, needed).faults == []  # the number is the one that is needed
    with pytest.raises(DatasetError, match=f"longest line needs {needed} tokens, but the model has room for 100"):
        dataset.require_usable([split], skip_bad=False, max_tokens=100)
    mixed = checked(write(folder, GOOD, busy, "{"), processor, 60)
    with pytest.raises(DatasetError, match="--max_text_tokens .*Fix the others, or continue without them: --skip_bad"):
        dataset.require_usable([mixed], skip_bad=False, max_tokens=1000)


def test_a_line_that_is_too_long_to_be_tokenised_is_a_fault_like_any_other(folder, processor):
    huge = GOOD | {"suffix": f"{BOX} cat ; " * 20_000}
    split = checked(write(folder, GOOD, huge, huge | {"suffix": "", "prefix": "a" * 900_000}), processor, 60)
    assert [fault.line for fault in split.faults] == [2, 3] and len(split.examples) == 1
    assert "characters" in split.faults[0].text


def test_if_no_picture_is_found_the_advice_is_image_dir(folder, processor):
    lines = [GOOD | {"image": f"there/{i}.png"} for i in range(3)]
    with pytest.raises(DatasetError, match="does not exist.* --image_dir[.] .*--skip_bad[.]"):
        dataset.require_usable([checked(write(folder, *lines), processor, 60)], skip_bad=False)


def test_a_batch_equals_the_processor_s_and_holds_one_large_picture_at_a_time(folder, processor, monkeypatch):
    Image.effect_noise((300, 200), 90).convert("RGB").save(folder / "a.png")
    examples = dataset.Examples(dataset.read_split(write(folder, GOOD, GOOD | {"image": "b.png", "suffix": "x"})), processor)
    expected = processor(*map(list, zip(examples[0, 0], examples[0, 1], strict=True)), notes=[])
    alive, most, load = [], [], dataset.load_image

    def watched(*given, **named):
        picture = load(*given, **named)
        alive.append(weakref.ref(picture))
        gc.collect()
        most.append(sum(one() is not None for one in alive))
        return picture

    monkeypatch.setattr(dataset, "load_image", watched)
    batch = examples.batch([(0, 0), (0, 1)])
    assert batch.keys() == expected.keys() and all(torch.equal(batch[name], expected[name]) for name in batch)
    assert max(most) <= 2  # the last picture is released while the next one is read


def test_a_picture_outside_the_folder_is_refused_from_within_it_too(folder, monkeypatch):
    write(folder, GOOD, GOOD | {"image": "../a.png"})
    monkeypatch.chdir(folder)
    split = dataset.read_split("train.jsonl")
    assert [fault.line for fault in split.faults] == [2] and "outside the dataset" in split.faults[0].text


JSON_LIKE = st.text(alphabet='[]{}":, 1e9-.x\\\u2028\0\r\n', max_size=200).map(str.encode)


@given(st.binary(max_size=200) | JSON_LIKE)
def test_no_line_raises_anything_else(tmp_path_factory, text):
    file = tmp_path_factory.mktemp("lines") / "train.jsonl"
    file.write_bytes(text)
    try:
        dataset.read_split(file)
    except DatasetError as error:
        assert "\n" not in error.message


def test_pictures_are_checked_before_the_run_starts(folder, processor):
    (folder / "text.png").write_text("hello, this is no picture")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:20])
    names = ("a.png", "missing.png", "text.png", "cut.png", "a.png", ".")
    split = checked(write(folder, *(GOOD | {"image": name} for name in names)), processor)
    assert [fault.line for fault in split.faults] == [2, 3, 4, 6]
    assert [example.line for example in split.examples] == [1, 5] and len(split.hashes) == 2
    assert "does not exist" in split.faults[0].text and "a text, not a picture" in split.faults[1].text


def test_a_picture_whose_end_is_missing_is_found_although_its_header_is_whole(folder):
    Image.effect_noise((60, 60), 50).convert("RGB").save(folder / "whole.jpg")
    data = (folder / "whole.jpg").read_bytes()
    (folder / "half.jpg").write_bytes(data[: len(data) // 2])
    split = dataset.read_split(write(folder, *(GOOD | {"image": name} for name in ("whole.jpg", "half.jpg"))))
    dataset.check_pictures(split)
    assert [fault.line for fault in split.faults] == [2] and "half.jpg: image data ends early" in split.faults[0].text
    assert "--" not in split.faults[0].text  # the advice for a single picture names flags that finetune.py does not have
    with pytest.raises(DatasetError, match="[^.]\\. Fix them"):
        dataset.require_usable([split], skip_bad=False)


def test_lines_that_are_too_long_do_not_move_the_pictures_of_others(folder, processor):
    """Pictures are hashed first and texts are measured later; what is compared between splits must still belong together."""
    Image.new("RGB", (9, 9), "blue").save(folder / "other.png")
    long = GOOD | {"suffix": "a red circle " * 50}
    train = checked(write(folder, long, GOOD | {"image": "other.png"}), processor, 64)
    valid = checked(write(folder, GOOD, long), processor, 64)
    assert len(train.hashes) == len(train.examples) == len(valid.hashes) == 1
    assert dataset.compare(train, valid) == []  # a.png is in valid only: its line in train was dropped


def test_the_fingerprint_of_examples_knows_texts_and_pictures(folder, processor):
    first = checked(write(folder, GOOD, GOOD), processor).fingerprint()
    assert first.startswith("2 examples, ") and checked(write(folder, GOOD, GOOD), processor).fingerprint() == first
    assert checked(write(folder, GOOD, GOOD | {"suffix": "other"}), processor).fingerprint() != first
    Image.new("RGB", (9, 9), "blue").save(folder / "a.png")
    assert checked(write(folder, GOOD, GOOD), processor).fingerprint() != first


def test_an_answer_that_would_be_cut_is_a_fault_with_its_length(folder, processor):
    file = write(folder, GOOD, GOOD | {"suffix": "a red circle " * 5})
    count = len(processor.encode("detect cat")) + len(processor.encode("a red circle " * 5)) + 3
    assert checked(file, processor, count).faults == []
    (fault,) = checked(file, processor, count - 1).faults
    assert fault.line == 2 and f"take {count} tokens, over the {count - 1} allowed" in fault.text
    inputs = processor.tokens([1], "detect cat", "a red circle " * 5)
    assert inputs["input_ids"].shape[1] == processor.num_image_tokens + count  # what the model will be given


@pytest.mark.parametrize(
    ("suffix", "says"),
    [
        ("<loc0300><loc0200><loc0100><loc0400> cat", "second corner lies before its first"),
        ("<loc0300><loc0400><loc0500><loc0200> cat", "second corner lies before its first"),
        ("<loc0100><loc0200><loc0100><loc0400> cat", "without area"),
        ("<loc0100><loc0200><loc0300> cat", "fewer than four"),
        (f"{BOX}<seg001> cat", "fewer than sixteen"),
        (f"{BOX}{'<seg001>' * 17} cat", "more than sixteen"),
        ("<loc1024><loc0200><loc0300><loc0400> cat", "<loc1024> is not a token"),
        ("<loc12> cat", "<loc12> is not a token"),
        (f"{BOX}<seg128> cat", "<seg128> is not a token"),
    ],
)
def test_odd_locations_are_warned_about_but_kept(folder, processor, suffix, says):
    split = checked(write(folder, *[GOOD] * 9, GOOD | {"suffix": suffix}), processor)
    assert len(split.examples) == 10 and split.faults == []
    assert any(says in text and text.startswith("10: ") for text in texts(split.warnings))


@pytest.mark.parametrize("suffix", [f"{BOX} cat", f"{BOX}{'<seg127>' * 16} cat ; {BOX} dog", "<b>no box</b>", "a cat", ""])
def test_good_answers_are_not_warned_about(suffix):
    assert dataset.text_warnings("what?", suffix) == []


def test_a_file_with_boxes_in_another_order_is_warned_about_as_a_whole(folder, processor):
    wrong = GOOD | {"suffix": "<loc0600><loc0500><loc0100><loc0200> cat"}  # centre, then width and height
    split = checked(write(folder, GOOD, GOOD, wrong), processor)
    assert texts(split.warnings)[0].startswith("0: 1 of 3 boxes have swapped corners: is their order x, y, width, height")


def test_control_tokens_and_white_space_are_warned_about(folder, processor):
    lines = [GOOD | {"prefix": "<image>detect cat"}, GOOD | {"suffix": f"{BOX} cat<eos>"}, GOOD | {"suffix": f" {BOX} cat"}]
    said = texts(checked(write(folder, *lines), processor).warnings)
    assert said[0].startswith("1: <image> is treated as plain text") and said[1].startswith("2: <eos> is treated as plain text")
    assert said[2] == "3: the suffix begins or ends with white space, which would be learned"


def test_boxes_of_one_question_in_several_lines_are_warned_about(folder, processor):
    other = GOOD | {"suffix": "<loc0500><loc0200><loc0600><loc0400> cat"}
    (warning,) = checked(write(folder, GOOD, GOOD, other), processor).warnings
    assert warning.text.startswith("1 question has boxes in several lines; join them into one answer")
    assert checked(write(folder, GOOD, GOOD, other | {"prefix": "detect dog"}), processor).warnings == []


def test_a_picture_that_cannot_be_converted_is_a_fault_of_its_line(folder, processor):
    Image.fromarray(np.full((8, 8), 1e8, dtype=np.float32)).save(folder / "float.tif")
    split = checked(write(folder, GOOD, GOOD | {"image": "float.tif"}), processor)
    assert [fault.line for fault in split.faults] == [2] and "floats" in split.faults[0].text and "--" not in split.faults[0].text


def test_empty_answers_are_counted(folder, processor):
    split = checked(write(folder, GOOD, GOOD | {"suffix": ""}, GOOD | {"suffix": "  "}), processor)
    assert texts(split.warnings) == ["0: 2 of 3 answers are empty; they teach the model to find nothing"]


def test_pictures_in_both_splits_are_found_by_their_content(folder, processor):
    (folder / "copy.png").write_bytes((folder / "a.png").read_bytes())
    train = checked(write(folder, GOOD), processor)
    valid = checked(write(folder, GOOD | {"image": "b.png"}, GOOD | {"image": "copy.png"}, name="valid.jsonl"), processor)
    (warning,) = dataset.compare(train, valid)
    assert "1 of 2 pictures are in train.jsonl, too (first in line 2)" in warning.text


def test_a_prompt_that_only_the_other_split_has_is_warned_about(folder, processor):
    train = checked(write(folder, GOOD), processor)
    valid = checked(write(folder, GOOD | {"image": "b.png", "prefix": "detect cats"}, name="valid.jsonl"), processor)
    (warning,) = dataset.compare(train, valid)
    assert "1 prompt is not in train.jsonl, such as 'detect cats'" in warning.text
    free = [GOOD | {"prefix": f"answer en question {i}?"} for i in range(dataset.MAX_PROMPTS + 1)]
    assert dataset.compare(checked(write(folder, *free), processor), valid) == []


@pytest.mark.parametrize(("total", "count"), [(0, 5), (1, 5), (5, 5), (7, 5), (1000, 200), (996, 200), (1000, 1), (10**6, 12)])
def test_lines_of_a_sample_are_spread_over_the_whole_file(total, count):
    taken = dataset.spread(total, count)
    assert len(taken) == min(total, count) and taken == sorted(set(taken)) and set(taken) <= set(range(total))
    if len(taken) > 1:
        assert (taken[0], taken[-1]) == (0, total - 1)
        assert max(after - before for before, after in pairwise(taken)) <= 2 * total / count


@pytest.mark.parametrize("period", [2, 3, 5, 7, 10])
def test_a_sample_has_each_kind_of_line_as_often_as_the_file_does(period):
    """A file that repeats `period` kinds of questions: every 5th of 1,000 lines would be of one kind only."""
    kinds = Counter(line % period for line in dataset.spread(1000, 200))
    assert len(kinds) == period and max(kinds.values()) < 1.5 * 200 / period


def test_files_that_are_missing_or_empty_are_refused(folder):
    with pytest.raises(DatasetError, match="train.jsonl does not exist"):
        dataset.read_split(folder / "train.jsonl")
    with pytest.raises(DatasetError, match="is empty"):
        dataset.read_split(write(folder, "", ""))
    split = dataset.read_split(write(folder, "{"))
    with pytest.raises(DatasetError, match="no usable line. The first fault: not JSON"):
        dataset.require_usable([split], skip_bad=True)
