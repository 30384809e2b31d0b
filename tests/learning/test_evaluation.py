"""Which references belong to a question, which scores are computed, and on which answers."""

import sys
from pathlib import Path

import pytest
import torch

from paligemma.errors import DeviceError, UsageError
from paligemma.learning import dataset, evaluation
from paligemma.learning.evaluation import Judge
from paligemma.objects.mask_codec import load_codec
from paligemma.objects.outputs import parse_text
from paligemma.processing_paligemma import PaliGemmaProcessor
from paligemma.tasks import Result
from tests.tiny_checkpoint import make_checkpoint

BOX = "<loc0100><loc0100><loc0500><loc0500>"
CODES = "".join(f"<seg{code:03}>" for code in range(0, 128, 8))
CODEC = load_codec(Path(__file__).resolve().parents[2] / "paligemma" / "bundled" / "vae-oid.npz")


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return PaliGemmaProcessor.from_pretrained(make_checkpoint(tmp_path_factory.mktemp("model")))


@pytest.fixture
def judge(processor, tmp_path):
    """A function from (prefix, suffix) pairs to a Judge; `said` replaces the answers of a model."""

    def make(lines, said=None, **options):
        examples = [dataset.Example(tmp_path / "a.png", prefix, suffix, i + 1) for i, (prefix, suffix) in enumerate(lines)]
        split = dataset.Split(tmp_path / "x.jsonl", examples, [], [], [])
        options = {"codec": None} | options
        made = Judge(dataset.Examples(split, processor), batch_size=2, **{"count": 100} | options)
        if said is None:
            return made
        common = {"image": "a.png", "task": "ask", "asked": "", "prompt": "", "width": 64, "height": 64}
        readings = [parse_text(text) if "<loc" in text else None for text in said]
        results = [Result(**common, text=text, parsed=reading) for text, reading in zip(said, readings, strict=True)]
        made.ask, made.loss = (lambda _: results), (lambda _: 0.5)
        return made

    return make


def test_lines_of_one_question_are_its_references(judge):
    numbers = judge([("what", "cat"), ("what", "kitten"), ("color", "red")], ["kitten", "blue"])(None)
    assert numbers["valid_loss"] == 0.5 and numbers["exact"] == 0.5  # two questions, one is right


def test_a_text_that_is_answered_with_a_box_is_wrong_and_not_left_out(judge):
    numbers = judge([("what", "cat"), ("color", "red")], [f"{BOX} cat", "red"])(None)
    assert numbers["exact"] == 0.5 and "map" not in numbers


def test_a_box_for_an_empty_reference_is_wrong_as_a_text_and_as_a_box(judge):
    lines = [("detect cat at night", ""), ("detect cat", f"{BOX} cat")]
    right, wrong = (judge(lines, [first, f"{BOX} cat"], scores=["exact", "map"])(None) for first in ("", f"{BOX} cat"))
    assert right["map"] == pytest.approx(1) and right["exact"] == 1
    assert wrong["map"] == pytest.approx(0.5) and wrong["exact"] == 0


def test_boxes_of_one_question_in_several_lines_are_all_right(judge):
    other = "<loc0600><loc0600><loc0900><loc0900> cat"
    numbers = judge([("detect cat", f"{BOX} cat"), ("detect cat", f"{other}")], [f"{other} ; {BOX} cat"])(None)
    assert numbers["map"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("right", "asked", "measured"),
    [(f"{BOX} cat", ["exact"], "map"), ("cat", ["map"], "exact, vqa"), ("", ["exact", "miou"], "exact, vqa")],
)
def test_scores_that_have_nothing_to_measure_are_refused(judge, right, asked, measured):
    with pytest.raises(UsageError, match="nothing to score. The possible scores of these answers are " + measured):
        judge([("what", right)], scores=asked, codec=CODEC)


def test_answers_that_are_all_empty_are_texts(judge):
    assert judge([("detect cat", "")], [""])(None) == {"valid_loss": 0.5, "exact": 1, "anls": 1}


def test_masks_are_compared_with_those_of_the_references(judge):
    """Through the codec that ships: the same codes in the same box, in half of it, and none."""
    right = f"{BOX}{CODES} cat"
    half = f"<loc0100><loc0100><loc0500><loc0300>{CODES} cat"
    scored = [judge([("segment cat", right)], [said], codec=CODEC)(None)["miou"] for said in (right, half, "", f"{BOX} cat")]
    assert scored[0] == 1 and 0.2 < scored[1] < 0.8 and scored[2:] == [0, 0]


def test_missing_requirements_of_scores_are_reported_before_training(judge, monkeypatch):
    with pytest.raises(UsageError, match="--mask_codec"):
        judge([("segment cat", "cat")], scores=["miou"])
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(DeviceError, match="--scores map: .*pip install pycocotools"):
        judge([("detect cat", f"{BOX} cat")], scores=["map"])


@pytest.mark.parametrize("word", [[], [("color", "red")]])
def test_without_pycocotools_all_else_is_scored_and_the_package_named_once(judge, monkeypatch, caplog, word):
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    lines = [("detect cat", f"{BOX} cat"), *word]
    numbers = judge(lines, [answer for _, answer in lines])(None)
    assert numbers == {"valid_loss": 0.5} | ({"exact": 1, "anls": 1} if word else {})
    assert [record.getMessage() for record in caplog.records] == [
        "boxes are not scored: average precision (map) needs pycocotools. Install it: pip install pycocotools."
    ]


def test_a_warning_says_that_masks_without_a_codec_are_not_scored(judge, caplog):
    assert judge([("segment cat", f"{BOX}{CODES} cat")]).scores == ["map"]
    assert "masks are not scored: miou needs a mask codec" in caplog.text


def test_a_sorted_file_is_scored_evenly_and_not_only_at_its_beginning(judge):
    """The second half is another kind of question, as in files that were put together from several."""
    lines = [(f"color {i}", "red") for i in range(500)] + [(f"detect {i}", f"{BOX} cat") for i in range(500)]
    made = judge(lines, count=100)
    kinds = [prefix.split()[0] for _, prefix in made.references]
    assert (kinds.count("color"), kinds.count("detect")) == (50, 50) and made.scores == ["exact", "anls", "map"]
    assert made.lines == dataset.spread(1000, 100) and made.sample_description == "100 of 1000 lines, spread evenly"


def test_the_number_of_questions_is_shown_if_lines_share_a_question(judge):
    lines = [(f"what {i // 2}", f"answer {i}") for i in range(20)]
    assert judge(lines).sample_description == "10 of 10 questions; loss computed on 20 of 20 lines"
    text = judge(lines, count=4).sample_description
    assert text == "4 of 10 questions, spread evenly; loss computed on 4 of 20 lines, spread evenly"
    assert judge(lines[:1]).sample_description == "1 of 1 line"


def test_the_loss_is_computed_on_the_chosen_lines(judge, monkeypatch):
    made, seen = judge([(f"color {i}", "red") for i in range(50)], count=5), []
    monkeypatch.setattr(made.examples, "batch", lambda places: seen.extend(place[1] for place in places) or {"labels": None})
    monkeypatch.setattr(evaluation, "answer_losses", lambda *_: (torch.ones(1), torch.zeros(1, dtype=torch.long)))
    monkeypatch.setattr(evaluation, "token_weights", lambda *_: (torch.full((1,), 5 / 3), 1.0))  # three batches, a mean over five
    assert made.loss(None) == pytest.approx(1) and seen == dataset.spread(50, 5)


def test_each_process_answers_its_share_and_all_answers_come_in_their_order(judge, monkeypatch):
    class Echo:
        """Answers each question with itself, the last one first."""

        def __init__(self, *_, **__):
            pass

        def run(self, requests):
            for index, request in reversed(list(enumerate(requests))):
                yield index, Result(image="a.png", task="ask", asked="", prompt="", text=request.prompt)

    monkeypatch.setattr(evaluation, "Annotator", Echo)
    questions = [f"question {number}" for number in range(5)]
    both = [judge([(question, "x") for question in questions]) for _ in range(2)]
    shares = []
    for rank, one in enumerate(both):
        one.rank, one.world_size = rank, 2
        monkeypatch.setattr(evaluation.processes, "gather", lambda mine: shares.append(mine) or [mine * 2, mine * 2])
        one.ask(None)
    assert [[result.text for result in share] for share in shares] == [questions[::2], questions[1::2]]
    monkeypatch.setattr(evaluation.processes, "gather", lambda _: shares)
    assert [result.text for result in both[0].ask(None)] == questions
