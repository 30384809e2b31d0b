"""outputs.py: parsing objects from ids and from text, every problem of an answer, scores, and writing objects as text."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma.errors import DatasetError
from paligemma.objects import masks, outputs
from paligemma.objects.outputs import NormalizedBox, ParsedObject, as_json, parse_ids, parse_text, to_suffix
from paligemma.processing_paligemma import PaliGemmaProcessor
from paligemma.vocabulary import LOCATION_OR_CODE
from tests.tiny_tokenizer import write_processor

ROOT = Path(__file__).parents[2]
CAT, DOG = "<loc0100><loc0200><loc0300><loc0400>", "<loc0000><loc0000><loc1023><loc1023>"
CODES = "".join(f"<seg{i:03d}>" for i in range(0, 128, 8))
LABELS = ["cat", "red car", "person's hat", "red-and-white car", "AC/DC poster", "naïve café", "猫", "😀", "50% off!", "b < c"]


@pytest.fixture(scope="module", params=["demo", "tiny"])
def processor(request, tmp_path_factory) -> PaliGemmaProcessor:
    if request.param == "demo":
        return PaliGemmaProcessor.from_pretrained(ROOT / "paligemma" / "bundled")
    folder = tmp_path_factory.mktemp("processor")
    write_processor(folder)
    return PaliGemmaProcessor.from_pretrained(folder)


def parsed(reading: outputs.ParsedAnswer) -> list[tuple]:
    return [(found.label, found.locations, found.problems) for found in reading.objects]


# Each answer is parsed from its text and from its ids, with equal results. Text -> status, objects (label, locations, problems),
# all problems.
CAT_LOCATIONS, DOG_LOCATIONS = (100, 200, 300, 400), (0, 0, 1023, 1023)
ANSWERS = {
    "": ("nothing", [], []),
    "\n": ("nothing", [], []),
    " ; ": ("unparsable", [], []),
    "no cat here": ("unparsable", [], ["no box"]),
    f"{CAT} cat": ("objects", [("cat", CAT_LOCATIONS, ())], []),
    f"{CAT}cat": ("objects", [("cat", CAT_LOCATIONS, ())], []),
    f"{CAT}   cat  ": ("objects", [("cat", CAT_LOCATIONS, ())], []),
    f"{CAT} cat\n": ("objects", [("cat", CAT_LOCATIONS, ())], []),
    f"{CAT} cat ; {DOG} dog": ("objects", [("cat", CAT_LOCATIONS, ()), ("dog", DOG_LOCATIONS, ())], []),
    f"{CAT} cat;{DOG} dog": ("objects", [("cat", CAT_LOCATIONS, ()), ("dog", DOG_LOCATIONS, ())], []),
    f"{CAT} cat  ;   {DOG}  dog ;": ("objects", [("cat", CAT_LOCATIONS, ()), ("dog", DOG_LOCATIONS, ())], []),
    f"{CAT} cat {DOG} dog": ("objects", [("cat", CAT_LOCATIONS, ()), ("dog", DOG_LOCATIONS, ())], []),
    f"{CAT} cat\n{DOG} dog\n": ("objects", [("cat", CAT_LOCATIONS, ()), ("dog", DOG_LOCATIONS, ())], []),
    # stopped too early
    "<loc0100>": ("unparsable", [], ["cut box"]),
    "<loc0100><loc0200><loc0300> cat": ("unparsable", [], ["cut box"]),
    f"{CAT} cat ; <loc0100><loc0200>": ("objects", [("cat", CAT_LOCATIONS, ())], ["cut box"]),
    f"<loc0100><loc0200> cat ; {DOG} dog": ("objects", [("dog", DOG_LOCATIONS, ())], ["cut box"]),
    f"{CAT}": ("objects", [("", CAT_LOCATIONS, ("no label",))], ["no label"]),
    f"{CAT}{CODES[:-8]}": ("objects", [("", CAT_LOCATIONS, ("cut mask", "no label"))], ["cut mask", "no label"]),
    f"{CAT}{CODES[8:]} cat": ("objects", [("cat", CAT_LOCATIONS, ("cut mask",))], ["cut mask"]),
    f"{CAT}{CODES}<seg001> cat": ("objects", [("cat", CAT_LOCATIONS, ("long mask",))], ["long mask"]),
    # repeated, corners swapped, no area
    f"{CAT} cat ; {CAT} cat ; {CAT} cat": ("objects", [("cat", CAT_LOCATIONS, ())], ["repeated", "repeated"]),
    f"{CAT} cat ; {CAT} dog": ("objects", [("cat", CAT_LOCATIONS, ()), ("dog", CAT_LOCATIONS, ())], []),
    "<loc0300><loc0200><loc0100><loc0400> cat": ("objects", [("cat", (300, 200, 100, 400), ("swapped",))], ["swapped"]),
    "<loc0100><loc0400><loc0300><loc0200> cat": ("objects", [("cat", (100, 400, 300, 200), ("swapped",))], ["swapped"]),
    "<loc0100><loc0200><loc0100><loc0400> cat": ("objects", [("cat", (100, 200, 100, 400), ("no area",))], ["no area"]),
    # a box without a label, a label without a box
    f"{CAT}{CODES}": ("objects", [("", CAT_LOCATIONS, ("no label",))], ["no label"]),
    f"{CAT} ; {DOG} dog": ("objects", [("", CAT_LOCATIONS, ("no label",)), ("dog", DOG_LOCATIONS, ())], ["no label"]),
    f"{CAT}{DOG} dog": ("objects", [("", CAT_LOCATIONS, ("no label",)), ("dog", DOG_LOCATIONS, ())], ["no label"]),
    f"{CAT} cat ; dog": ("objects", [("cat", CAT_LOCATIONS, ()), ("dog", None, ("no box",))], ["no box"]),
    f"{CODES} cat": ("unparsable", [], ["no box"]),
    f"{CODES} ; {CAT} cat": ("objects", [("cat", CAT_LOCATIONS, ())], ["no box"]),
    f"{CAT} cat {CODES}": ("objects", [("cat", CAT_LOCATIONS, ())], ["no box"]),
    # not a location of any tokenizer
    "<loc9999><loc0001><loc0002><loc0003> cat": ("unparsable", [], ["no box", "cut box"]),
    f"{CAT} <loc1024>": ("objects", [("<loc1024>", CAT_LOCATIONS, ())], []),
    f"{CAT} <seg128> <loc1>": ("objects", [("<seg128> <loc1>", CAT_LOCATIONS, ())], []),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_text_and_ids_of_an_answer_are_parsed_alike(answer, processor):
    status, objects, problems = ANSWERS[answer]
    for reading in (parse_text(answer), parse_ids(processor.encode(answer), processor)):
        assert (reading.status, parsed(reading), reading.problems) == (status, objects, problems)
        assert reading.text == answer


@pytest.mark.parametrize("label", LABELS)
def test_a_label_is_parsed_completely(label, processor):
    answer = f"{CAT} {label} ; {DOG} {label}"
    for reading in (parse_text(answer), parse_ids(processor.encode(answer), processor)):
        assert parsed(reading) == [(label, CAT_LOCATIONS, ()), (label, DOG_LOCATIONS, ())]


def test_every_problem_has_a_name_and_every_name_occurs():
    happened = {problem for _, _, problems in ANSWERS.values() for problem in problems}
    assert happened == set(outputs.PROBLEMS)


def test_the_codes_of_a_mask_stay_with_their_box(processor):
    answer = f"{CAT}{CODES} cat ; {DOG} dog"
    for reading in (parse_text(answer), parse_ids(processor.encode(answer), processor)):
        assert [found.codes for found in reading.objects] == [tuple(range(0, 128, 8)), None]


def test_ordinary_text_that_looks_like_a_location_is_a_label_if_the_ids_are_known(processor):
    """In text, the two cannot be distinguished; their ids differ."""
    letters = processor.tokenizer.encode("<loc", add_special_tokens=False).ids
    letters += processor.tokenizer.encode("0001>", add_special_tokens=False).ids
    ids = processor.encode(CAT) + letters
    assert parsed(parse_ids(ids, processor)) == [("<loc0001>", CAT_LOCATIONS, ())]


def test_everything_after_eos_and_all_control_tokens_are_ignored(processor):
    ids = processor.encode(f"{CAT} cat")
    padded = [processor.bos_token_id, *ids, processor.eos_token_id, processor.pad_token_id, *processor.encode(f"{DOG} dog")]
    assert parsed(parse_ids(torch.tensor(padded), processor)) == [("cat", CAT_LOCATIONS, ())]
    assert parse_ids([processor.eos_token_id], processor).status == "nothing"


def test_an_incomplete_character_becomes_a_replacement_character(processor):
    begun = processor.encode(f"{CAT} 猫")[:-1]
    for between in (" ; ", ""):
        ids = begun + processor.encode(f"{between}{DOG} dog")
        assert parsed(parse_ids(ids, processor)) == [("\ufffd", CAT_LOCATIONS, ()), ("dog", DOG_LOCATIONS, ())]
    assert parsed(parse_ids(begun, processor)) == [("\ufffd", CAT_LOCATIONS, ())]


# Boxes


def test_a_denominator_of_1023_reaches_the_border_and_1024_does_not():
    assert parse_text(f"{DOG} dog").objects[0].box.xyxy(4000, 3000) == (0, 0, 4000, 3000)
    box = parse_text(f"{DOG} dog", denominator=1024).objects[0].box
    assert box.xyxy(4000, 3000) == pytest.approx((0, 0, 4000 * 1023 / 1024, 3000 * 1023 / 1024))


def test_pixels_are_x_first_and_locations_y_first():
    box = NormalizedBox.from_locations((100, 200, 300, 400))
    assert box.xyxy(1023, 1023) == pytest.approx((200, 100, 400, 300))
    assert box.to_locations() == (100, 200, 300, 400)


def test_swapped_corners_are_exchanged():
    assert parse_text("<loc0300><loc0400><loc0100><loc0200> cat").objects[0].box == NormalizedBox.from_locations(
        (100, 200, 300, 400)
    )


def test_locations_are_rounded_and_clamped():
    assert NormalizedBox(0.00049, -0.1, 1.2, 0.0004888).to_locations() == (0, 1, 1, 1023)


def test_iou_is_intersection_over_union():
    left, right = NormalizedBox(0, 0, 0.4, 0.5), NormalizedBox(0.2, 0, 0.6, 0.5)
    assert left.iou(right) == pytest.approx(1 / 3)
    assert left.iou(NormalizedBox(0.6, 0.6, 1, 1)) == 0
    assert NormalizedBox(0.1, 0.1, 0.5, 0.1).iou(NormalizedBox(0.1, 0.1, 0.5, 0.1)) == 0  # no area, no overlap


# Writing and parsing again

label = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\n;\u2581"), max_size=12).filter(
    lambda text: text == text.strip() and not LOCATION_OR_CODE.search(text)
)
side = st.tuples(st.integers(0, 1022), st.integers(1, 1023)).map(lambda ends: (min(ends), max(ends[1], ends[0] + 1)))
codes = st.none() | st.tuples(*[st.integers(0, 127)] * 16)


@st.composite
def found(draw) -> ParsedObject:
    (y, y_end), (x, x_end), words = draw(side), draw(side), draw(label)
    locations = (y, x, y_end, x_end)
    problems = () if words else ("no label",)
    return ParsedObject(words, NormalizedBox.from_locations(locations), locations, draw(codes), problems=problems)


several = st.lists(found(), max_size=4, unique_by=lambda found: (found.label, found.locations))


@settings(max_examples=150)
@given(several)
def test_objects_written_and_parsed_are_equal(processor, objects):
    suffix = to_suffix(objects)
    for reading in (parse_text(suffix), parse_ids([*processor.encode(suffix), processor.eos_token_id], processor)):
        assert reading.objects == objects
        assert reading.status == ("objects" if objects else "nothing")


@settings(max_examples=300)
@given(st.lists(st.sampled_from([*ANSWERS, "<loc", "<seg007>", "<loc0007>", "\x00", "é", "<eos>"]) | st.text(max_size=9)))
def test_any_text_can_be_parsed(pieces):
    reading = parse_text("".join(pieces))
    assert set(reading.problems) <= set(outputs.PROBLEMS)
    assert (reading.status == "objects") == any(found.box for found in reading.objects)
    assert parse_text(to_suffix(reading.objects)).objects == [plain(found) for found in reading.objects]


def plain(found: ParsedObject) -> ParsedObject:
    """The object after writing and parsing: its corners are sorted and its codes complete, so two problems are gone."""
    kept = tuple(problem for problem in found.problems if problem not in ("swapped", "cut mask", "long mask"))
    return ParsedObject(found.label, found.box, found.box and found.box.to_locations(), found.codes, problems=kept)


@settings(max_examples=300)
@given(st.data())
def test_any_ids_can_be_parsed(processor, data):
    numbers = st.integers(-3, processor.vocab_size + 70) | st.sampled_from([*processor.location_ids, *processor.code_ids])
    ids = data.draw(st.lists(numbers, max_size=40))
    logprobs, moments = [-0.5] * len(ids), [(512.0, 3.0) if number in processor.location_ids else None for number in ids]
    reading = parse_ids(ids, processor, logprobs, moments)
    for found in reading.objects:
        assert found.box is None or (0 < found.score <= 1 and found.expected is not None)


def test_an_object_without_locations_is_written_from_its_box():
    assert (
        to_suffix([ParsedObject("cat", NormalizedBox(0.25, 0, 1, 0.5)), ParsedObject("dog", None)])
        == "<loc0000><loc0256><loc0512><loc1023> cat ; dog"
    )


@pytest.mark.parametrize("label", ["cat ; dog", "two\nlines", "<loc0001>"])
def test_a_label_that_would_be_parsed_as_something_else_is_refused(label):
    with pytest.raises(DatasetError, match="label"):
        to_suffix([ParsedObject(label, NormalizedBox(0, 0, 1, 1))])


# Scores


def measured(processor, spreads=(10, 20, 10, 20), means=(100.4, 200.2, 300.4, 400.2)):
    """ids, logprobs and moments of an answer with one cat."""
    ids = [*processor.encode(f"{CAT} cat"), processor.eos_token_id]
    words = len(ids) - 5
    logprobs = [math.log(p) for p in (0.1, 0.2, 0.3, 0.4)] + [math.log(0.8)] + [0.0] * (words - 1) + [math.log(0.5)]
    moments = [*zip(means, spreads, strict=True), *[None] * (words + 1)]
    return ids, logprobs, moments


def test_a_score_is_the_labels_probability_times_the_certainty_of_the_box(processor):
    (found,) = parse_ids(
        processor=processor, **dict(zip(("ids", "logprobs", "moments"), measured(processor), strict=True))
    ).objects
    assert found.score == pytest.approx(0.8 * math.exp(-(10 / 200 + 20 / 200) / 2))
    assert found.expected == NormalizedBox(200.2 / 1023, 100.4 / 1023, 400.2 / 1023, 300.4 / 1023)
    assert found.spread == pytest.approx((20 / 1023, 10 / 1023, 20 / 1023, 10 / 1023))


def test_without_moments_the_probabilities_of_the_locations_are_used(processor):
    ids, logprobs, _ = measured(processor)
    (found,) = parse_ids(ids, processor, torch.tensor(logprobs)).objects
    assert found.score == pytest.approx(0.8 * (0.1 * 0.2 * 0.3 * 0.4) ** 0.25)
    assert found.expected is None and found.spread is None


def test_a_more_certain_or_larger_box_and_a_more_certain_label_score_higher(processor):
    def score(word=0.8, **changes):
        ids, logprobs, moments = measured(processor, **changes)
        logprobs[4] = math.log(word)
        return parse_ids(ids, processor, logprobs, moments).objects[0].score

    assert score(spreads=(5, 5, 5, 5)) > score() > score(spreads=(90, 90, 90, 90)) > 0
    assert score(means=(0, 0, 900, 900)) > score() > score(word=0.4)


def test_the_spread_belongs_to_its_side_after_corners_were_exchanged(processor):
    ids = processor.encode("<loc0300><loc0200><loc0100><loc0400>")
    moments = [(300.0, 1.0), (200.0, 2.0), (100.0, 3.0), (400.0, 4.0)]
    (found,) = parse_ids(ids, processor, moments=moments).objects
    assert found.expected == NormalizedBox.from_locations((100, 200, 300, 400))
    assert found.spread == pytest.approx((2 / 1023, 3 / 1023, 4 / 1023, 1 / 1023))
    assert found.score is None


def test_the_label_of_the_second_object_counts_for_the_second_only(processor):
    ids = processor.encode(f"{CAT} cat ; {DOG} 猫")
    second = ids.index(processor.location_ids[0])
    logprobs = [0.0] * second + [math.log(0.5)] * (len(ids) - second)
    one, two = parse_ids(ids, processor, logprobs).objects
    assert one.score == 1
    assert two.score == pytest.approx(0.5 * 0.5**3)  # the mean of the locations, and the three bytes of the character


def test_lists_of_another_length_than_the_ids_are_refused(processor):
    for name in ("logprobs", "moments"):
        with pytest.raises(ValueError, match=name):
            parse_ids([1, 2], processor, **{name: [0.0]})


# Rows


def test_a_row_has_pixels_of_the_original_picture_and_no_unknown_values():
    found = parse_text(f"{CAT} cat").objects[0]
    assert as_json(found, 1023, 2046) == {
        "label": "cat", "box": [200, 200, 400, 600], "box_normalized": [0.1955, 0.09775, 0.39101, 0.29326], "problems": [],
    }  # fmt: skip
    assert as_json(ParsedObject("dog", None, problems=("no box",)), 10, 10) == {"label": "dog", "problems": ["no box"]}


def test_a_row_with_everything_is_plain_json(processor):
    ids, logprobs, moments = measured(processor)
    found = parse_ids(ids, processor, logprobs, moments).objects[0]
    mask = np.zeros((6, 4), dtype=bool)
    mask[1:3, 1:3] = True
    row = as_json(replace(found, codes=tuple(range(16)), mask=mask), 100, 200)
    assert json.loads(json.dumps(row)) == row
    assert row["spread"] == [1.96, 1.96, 1.96, 1.96]  # x y x y: 20 locations in 100 pixels, 10 locations in 200
    np.testing.assert_array_equal(masks.from_rle(row["mask"]), mask)
    assert row["codes"] == list(range(16)) and row["expected_box"][0] == pytest.approx(19.57, abs=0.01)


def test_parsing_needs_neither_torch_nor_numpy():
    code = "import sys; from paligemma.objects import outputs; outputs.parse_text('x'); "
    code += "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# The comparison in benchmarks/parsing.py


@pytest.fixture
def parsing(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from benchmarks import parsing

    return parsing


def test_every_case_of_the_comparison_is_parsed_as_written_by_hand(parsing):
    cases = [case for group in parsing.CASES.values() for case in group]
    for text, wanted, *frame in cases:
        side, tolerance = frame[0] if frame else (parsing.SIZE, parsing.TOLERANCE)
        assert parsing.is_right(parsing.ours(text, side), wanted, side, tolerance), text
    assert len(cases) >= 40


def test_the_comparison_distinguishes_right_from_wrong(parsing):
    wanted = [("cat", (0, 0, 512, 1023))]
    right = [("cat", (0.0, 0.0, 1000.0, 500.5))]  # pixels are x first
    assert parsing.is_right(right, wanted, 1000, 2)
    longer, turned = [("cat", (0.0, 0.0, 1000.0, 503.0))], [("cat", (0.0, 0.0, 500.5, 1000.0))]
    for wrong in ([], [("dog", right[0][1])], right * 2, longer, turned):
        assert not parsing.is_right(wrong, wanted, 1000, 2)


def test_the_comparison_runs_without_supervision(parsing, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["parsing.py"])
    monkeypatch.setitem(sys.modules, "supervision", None)
    monkeypatch.setattr(sys, "argv", ["parsing.py"])
    parsing.main()
    out, err = capsys.readouterr()
    assert "pip install supervision" in err and len(err.splitlines()) == 1
    result = json.loads(out.splitlines()[-1])
    assert result["ours"]["all"] == result["cases"] and "supervision" not in result


class Watched(list):
    """A list that counts how much of it was joined."""

    joined = 0

    def __iter__(self):
        Watched.joined += len(self)
        return super().__iter__()


@pytest.mark.parametrize(
    "text", ["<seg001>", "<seg001> ", "cat <seg001>", "<loc0001>", "<loc0001>" * 4 + " a ; ", "; ", "a ", "\n"]
)
def test_parsing_takes_linear_time(monkeypatch, text):
    made = outputs.PartialObject.__init__

    def watched(self, *args, **options):
        made(self, *args, **options)
        self.texts = Watched(self.texts)

    monkeypatch.setattr(outputs.PartialObject, "__init__", watched)
    monkeypatch.setattr(Watched, "joined", 0)
    count = 20_000
    reading = parse_text(text * count)
    assert Watched.joined <= 10 * count and reading.text == text * count
