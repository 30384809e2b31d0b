"""What a JSONL of examples may hold, which line is at fault when it does not, and what is doubtful about the rest."""

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import dataset
from errors import DatasetError
from processing_paligemma import PaliGemmaProcessor

BOX = "<loc0100><loc0200><loc0300><loc0400>"
GOOD = {"image": "a.png", "prefix": "detect cat", "suffix": f"{BOX} cat"}


@pytest.fixture(scope="module")
def processor():
    return PaliGemmaProcessor.from_pretrained("demo/checkpoint")


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(("a.png", "b.png")):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / name)
    return tmp_path


def write(folder, *lines, name="train.jsonl"):
    """A JSONL; a dict becomes its line, text and bytes stand as they are."""
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
def test_marks_blank_lines_and_other_line_ends_are_passed_over(folder, ending):
    (folder / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + (json.dumps(GOOD) + ending).encode() * 2)
    split = dataset.read_split(folder / "train.jsonl")
    assert len(split.examples) == 2 and split.faults == []


def test_fields_beside_the_three_are_allowed(folder):
    assert dataset.read_split(write(folder, GOOD | {"id": 7})).faults == []


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON.*column 2"),
        ("[1]", "a list, not an object"),
        (b'{"image": "\xff"}', "not UTF-8"),
        ("[" * 100_000, "not usable JSON"),
        ({"image": "a.png", "prefix": "x"}, "no 'suffix'; it has 'image', 'prefix'"),
        ("{}", "no 'image'; it has nothing"),
        (GOOD | {"suffix": 3}, "suffix is a int; text"),
        (GOOD | {"suffix": None}, "suffix is a NoneType"),
        (GOOD | {"prefix": "\ud800"}, "surrogate"),
        (GOOD | {"image": "../a.png"}, "outside the dataset"),
        (GOOD | {"image": "/etc/passwd"}, "is an absolute name; one relative to the dataset's folder is needed"),
        (GOOD | {"image": "https://x.org/a.png"}, "is an address; download it"),
        (GOOD | {"image": "x/../../a.png"}, "outside the dataset"),
        (GOOD | {"image": ""}, "name of a file"),
        (GOOD | {"image": "a\0.png"}, "name of a file"),
        ('{"image": "' + "a" * (1 << 20) + '"}', "bytes; 1048576 is the limit"),
    ],
)
def test_every_faulty_line_is_named_and_the_others_stay(folder, line, says):
    split = dataset.read_split(write(folder, GOOD, line, GOOD, line))
    assert [fault.line for fault in split.faults] == [2, 4] and len(split.examples) == 2
    with pytest.raises(DatasetError, match=f"2 lines cannot be used.*train.jsonl:2: .*{says}.*--skip_bad"):
        dataset.require_usable([split], skip_bad=False)
    dataset.require_usable([split], skip_bad=True)


def test_a_picture_outside_is_seen_from_within_the_folder_too(folder, monkeypatch):
    write(folder, GOOD, GOOD | {"image": "../a.png"})
    monkeypatch.chdir(folder)
    split = dataset.read_split("train.jsonl")
    assert [fault.line for fault in split.faults] == [2] and "outside the dataset" in split.faults[0].text


@given(st.binary(max_size=200))
def test_no_line_raises_anything_else(tmp_path_factory, text):
    file = tmp_path_factory.mktemp("lines") / "train.jsonl"
    file.write_bytes(text)
    try:
        dataset.read_split(file)
    except DatasetError as error:
        assert "\n" not in error.message


def test_pictures_are_looked_at_before_anything_begins(folder, processor):
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
    with pytest.raises(DatasetError, match="[^.]\\. Mend them"):
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
        ("<loc1024><loc0200><loc0300><loc0400> cat", "<loc1024> is no token"),
        ("<loc12> cat", "<loc12> is no token"),
        (f"{BOX}<seg128> cat", "<seg128> is no token"),
    ],
)
def test_odd_places_are_doubted_but_kept(folder, processor, suffix, says):
    split = checked(write(folder, *[GOOD] * 9, GOOD | {"suffix": suffix}), processor)
    assert len(split.examples) == 10 and split.faults == []
    assert any(says in text and text.startswith("10: ") for text in texts(split.doubts))


@pytest.mark.parametrize("suffix", [f"{BOX} cat", f"{BOX}{'<seg127>' * 16} cat ; {BOX} dog", "<b>no box</b>", "a cat", ""])
def test_good_answers_are_not_doubted(suffix):
    assert dataset.doubts_of("what?", suffix) == []


def test_a_file_with_boxes_in_another_order_is_doubted_as_a_whole(folder, processor):
    wrong = GOOD | {"suffix": "<loc0600><loc0500><loc0100><loc0200> cat"}  # centre, then width and height
    split = checked(write(folder, GOOD, GOOD, wrong), processor)
    assert texts(split.doubts)[0].startswith("0: 1 of 3 boxes have their corners exchanged: are they x, y, width, height")


def test_what_is_learned_otherwise_than_meant_is_doubted(folder, processor):
    lines = [GOOD | {"prefix": "<image>detect cat"}, GOOD | {"suffix": f"{BOX} cat<eos>"}, GOOD | {"suffix": f" {BOX} cat"}]
    said = texts(checked(write(folder, *lines), processor).doubts)
    assert said[0].startswith("1: <image> is read as letters") and said[1].startswith("2: <eos> is read as letters")
    assert said[2] == "3: the suffix begins or ends with white space, which would be learned"


def test_boxes_of_one_question_in_several_lines_are_doubted(folder, processor):
    other = GOOD | {"suffix": "<loc0500><loc0200><loc0600><loc0400> cat"}
    (doubt,) = checked(write(folder, GOOD, GOOD, other), processor).doubts
    assert doubt.text.startswith("1 questions have boxes in several lines; put them into one answer")
    assert checked(write(folder, GOOD, GOOD, other | {"prefix": "detect dog"}), processor).doubts == []


def test_colours_that_cannot_be_shown_are_a_fault_of_the_line(folder, processor):
    Image.fromarray(np.full((8, 8), 1e8, dtype=np.float32)).save(folder / "float.tif")
    split = checked(write(folder, GOOD, GOOD | {"image": "float.tif"}), processor)
    assert [fault.line for fault in split.faults] == [2] and "floats" in split.faults[0].text and "--" not in split.faults[0].text


def test_empty_answers_are_counted(folder, processor):
    split = checked(write(folder, GOOD, GOOD | {"suffix": ""}, GOOD | {"suffix": "  "}), processor)
    assert texts(split.doubts) == ["0: 2 of 3 answers are empty; they teach the model to find nothing"]


def test_pictures_in_both_splits_are_found_by_what_they_show(folder, processor):
    (folder / "copy.png").write_bytes((folder / "a.png").read_bytes())
    train = checked(write(folder, GOOD), processor)
    valid = checked(write(folder, GOOD | {"image": "b.png"}, GOOD | {"image": "copy.png"}, name="valid.jsonl"), processor)
    (doubt,) = dataset.compare(train, valid)
    assert "1 of 2 pictures are in train.jsonl, too (first in line 2)" in doubt.text


def test_a_prompt_that_only_the_other_split_has_is_doubted(folder, processor):
    train = checked(write(folder, GOOD), processor)
    valid = checked(write(folder, GOOD | {"image": "b.png", "prefix": "detect cats"}, name="valid.jsonl"), processor)
    (doubt,) = dataset.compare(train, valid)
    assert "1 prompts are not in train.jsonl, such as 'detect cats'" in doubt.text
    free = [GOOD | {"prefix": f"answer en question {i}?"} for i in range(dataset.FEW_PREFIXES + 1)]
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
    """A file that goes round in `period` kinds of questions: every 5th of 1,000 lines would be one kind only."""
    kinds = Counter(line % period for line in dataset.spread(1000, 200))
    assert len(kinds) == period and max(kinds.values()) < 1.5 * 200 / period


def test_files_that_are_missing_or_empty_are_refused(folder):
    with pytest.raises(DatasetError, match="train.jsonl cannot be read"):
        dataset.read_split(folder / "train.jsonl")
    with pytest.raises(DatasetError, match="is empty"):
        dataset.read_split(write(folder, "", ""))
    split = dataset.read_split(write(folder, "{"))
    with pytest.raises(DatasetError, match="no line that can be used. The first: not JSON"):
        dataset.require_usable([split], skip_bad=True)
