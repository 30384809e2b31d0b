"""Prompts that fit the checkpoint, typed results, and a run that continues when a request fails."""

import gc
import io
import itertools
import json
import random
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from paligemma import generation, tasks
from paligemma.checkpoints import weights
from paligemma.errors import DeviceError, GenerationError, ImageError, PromptError, UsageError
from paligemma.generation import Answer
from paligemma.pictures import sources
from paligemma.processing_paligemma import PaliGemmaProcessor
from paligemma.tasks import Annotator, Request

ROOT = Path(__file__).resolve().parent.parent
SHAPES = Image.open(ROOT / "examples" / "shapes.png").convert("RGB")
CAT = Image.open(ROOT / "examples" / "cat.png").convert("RGB")


@pytest.fixture(scope="module")
def model():
    return weights.load_model(ROOT / "paligemma" / "bundled")


@pytest.fixture(scope="module")
def processor():
    return PaliGemmaProcessor.from_pretrained(ROOT / "paligemma" / "bundled")


@pytest.fixture
def run(model, processor):
    """Runs requests and returns the results in the order of the requests."""

    def go(requests, **options):
        return [result for _, result in sorted(Annotator(model, processor, **options).run(requests), key=lambda pair: pair[0])]

    return go


# Prompts


@pytest.mark.parametrize(
    ("task", "text", "kind", "expected"),
    [
        ("caption", "", "mix", "caption en"),
        ("ask", " what is this? ", "pretrained", "answer en what is this?"),
        ("detect", "cat", "other", "detect cat"),
        ("detect", "cat;a dog ;; cat", "mix", "detect cat ; a dog"),
        ("segment", "person's  hat", "mix", "segment person's hat"),
        ("ocr", "", "mix", "ocr"),
        ("count", "red {text} cars", "mix", "answer en how many red {text} cars are there?"),
        ("ask", "what is the total?", "docvqa", "what is the total?"),
        ("ask", "which one?", "ai2d", "answer en  which one?"),
        ("segment", "the man on the left", "refcoco-seg", "the man on the left"),
    ],
)
def test_prompts_are_those_the_checkpoint_was_trained_on(task, text, kind, expected):
    assert tasks.prompt(task, text, kind) == expected


def test_captions_and_answers_have_a_language():
    assert tasks.prompt("caption", language="fr") == "caption fr"
    assert tasks.prompt("ask", "qu'est-ce ?", language="zh-TW") == "answer zh-TW qu'est-ce ?"
    with pytest.raises(UsageError, match="language is 'french; ocr'"):
        tasks.prompt("caption", language="french; ocr")


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [("detect", " ; ", "detect needs something to look for"), ("ask", "", "ask needs a question"),
     ("ocr", "x", "ocr takes no text"),
     ("find", "cat", "task is 'find'")],
)  # fmt: skip
def test_a_task_without_its_text_is_refused(task, text, message):
    with pytest.raises(UsageError, match=message):
        tasks.prompt(task, text)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("google/paligemma-3b-pt-224", "pretrained"), ("google/paligemma2-10b-mix-448", "mix"), ("paligemma/bundled", "other"),
        ("google/paligemma2-3b-ft-docci-448", "docci"), ("google/paligemma-3b-ft-refcoco-seg-896", "refcoco-seg"),
        ("/models/paligemma2_3b_mix_224/", "mix"), ("my-mix-of-things", "other"), ("", "other"),
        ("/x/paligemma-3b-pt-224/models--google--paligemma-3b-ft-docvqa-448/snapshots/0ab1", "docvqa"),
    ],
)  # fmt: skip
def test_a_public_name_tells_what_a_checkpoint_was_trained_for(name, kind):
    assert tasks.checkpoint_kind(name) == kind


def test_a_task_that_the_checkpoint_was_not_trained_for_has_a_warning():
    assert "docvqa" in tasks.task_warning("detect", "docvqa") and "vqav2" in tasks.task_warning("caption", "vqav2")
    known = [("detect", "mix"), ("ocr", "other"), ("count", "tallyqa"), ("segment", "refcoco-seg"), ("caption", "docci")]
    assert [tasks.task_warning(*pair) for pair in known] == [None] * len(known)


@pytest.mark.parametrize(
    ("text", "count"),
    [("3", 3), ("there are Twelve cats", 12), ("no", 0), ("None.", 0), ("0", 0), ("1,5 or 2", None), ("2 or 3", None),
     ("many", None), ("", None), ("not one", 1), ("no cats", 0)],
)  # fmt: skip
def test_a_count_is_the_one_number_in_the_answer(text, count):
    assert tasks.read_count(text) == count


# Results


def test_results_are_typed(run):
    detect, count, caption = run(
        [
            Request(picture=SHAPES, task="detect", text="circle", image="shapes.png"),
            Request(picture=SHAPES, task="count", text="circles"),
            Request(picture=SHAPES, task="caption"),
        ]
    )
    found = detect.parsed.objects[0]
    assert (detect.prompt, detect.parsed.status, found.label) == ("detect circle", "objects", "circle")
    assert 0 < found.score < 1 and found.expected is not None and found.spread is not None
    assert found.box.iou(found.expected) > 0.8
    assert (count.text, count.count, count.parsed) == ("1", 1, None)
    assert caption.text == "an orange cross, a yellow circle and a purple heart" and caption.score > 0.9


def test_json_rows_have_the_keys_of_their_task(run):
    asked = (("detect", "circle"), ("count", "stars"), ("ocr", ""))
    requests = [Request(picture=SHAPES, task=task, text=text) for task, text in asked]
    detect, count, ocr = (json.loads(json.dumps(result.to_json())) for result in run(requests))
    shared = ["image", "task", "asked", "prompt", "width", "height", "text", "finish_reason"]
    assert list(detect) == [*shared, "status", "objects", "problems"]
    assert list(count) == [*shared, "count", "score"] and list(ocr) == [*shared, "score"]
    x_min, y_min, x_max, y_max = detect["objects"][0]["box"]
    assert 130 < x_min < 150 < 290 < x_max < 300 and 40 < y_min < 50 < 195 < y_max < 205  # the circle, of 448 pixels


def test_objects_below_the_minimum_score_are_left_out(run):
    request = Request(picture=SHAPES, task="detect", text="circle")
    score = run([request])[0].parsed.objects[0].score
    assert run([request], min_score=score - 1e-4)[0].parsed.status == "objects"
    reading = run([request], min_score=score + 1e-4)[0].parsed
    assert (reading.status, reading.objects) == ("nothing", [])


def answer_of(processor, text):
    ids = processor.encode(text)
    return Answer(index=0, token_ids=ids, logprobs=[-0.1] * len(ids), moments=[None] * len(ids), finish_reason="stop")


MASKED = "<loc0000><loc0000><loc0512><loc1023>" + "".join(f"<seg{i:03d}>" for i in range(16)) + " cat"


def test_masks_are_decoded_if_there_is_a_codec(model, processor):
    from paligemma.objects.mask_codec import MaskCodec

    torch.manual_seed(0)
    request = Request(picture=CAT, task="segment", text="cat")
    bare = Annotator(model, processor).parse(request, answer_of(processor, MASKED)).parsed.objects[0]
    assert bare.codes == tuple(range(16)) and bare.mask is None
    found = Annotator(model, processor, codec=MaskCodec()).parse(request, answer_of(processor, MASKED)).parsed.objects[0]
    assert found.mask.shape == (CAT.height, CAT.width) and not found.mask[CAT.height // 2 + 1 :].any()


def test_boxes_are_in_pixels_of_the_original_when_a_small_copy_was_given(model, processor):
    request = Request(picture=SHAPES.resize((112, 112)), task="detect", text="cat", size=(2000, 1000))
    result = Annotator(model, processor).parse(request, answer_of(processor, MASKED))
    assert (result.width, result.height) == (2000, 1000)
    assert result.to_json()["objects"][0]["box"][2] == 2000


def test_the_denominator_can_be_1024_as_in_other_code(model, processor):
    request = Request(picture=SHAPES, task="detect", text="cat")
    result = Annotator(model, processor, denominator=1024).parse(request, answer_of(processor, MASKED))
    assert result.parsed.objects[0].box.x_max == 1023 / 1024


def test_a_users_own_prompt_is_used_word_for_word_and_boxes_in_its_answer_are_parsed(run):
    result = run([Request(picture=SHAPES, task="ask", prompt="detect circle")])[0]
    assert (result.prompt, result.parsed.objects[0].label) == ("detect circle", "circle")


# The run


def many(count):
    """Requests of all kinds."""
    draw = random.Random(0)
    kinds = [("caption", ""), ("detect", "circle ; star"), ("detect", "heart"), ("count", "circles"), ("ask", "where is it?")]
    return [Request(picture=draw.choice((SHAPES, CAT)), task=task, text=text) for task, text in draw.choices(kinds, k=count)]


def test_requests_that_run_together_get_the_answers_that_they_get_alone(run):
    requests = many(12)
    alone = [run([request], rows=1)[0] for request in requests]
    assert [(r.text, r.count) for r in run(requests, rows=5)] == [(r.text, r.count) for r in alone]


def test_a_bad_request_is_an_error_result_and_does_not_stop_the_run(run):
    bad = [
        Request(picture=ImageError("bad.png is broken.", path="bad.png"), task="caption", image="bad.png"),
        Request(picture=SHAPES, task="ask", text="x" * 3000),
        Request(picture=SHAPES, task="ask", text="\udcff"),
        Request(picture=SHAPES, task="detect"),
        Request(picture=SHAPES, task="fly", text="high"),
    ]
    mixed = [request for pair in zip(bad, many(5), strict=True) for request in pair]
    results = run([*mixed, bad[0]], rows=2)
    assert len(results) == 11
    assert [result.error.code if result.error else None for result in results] == [3, None, 3, None, 3, None, 2, None, 2, None, 3]
    row = results[0].to_json()
    assert row["error"] == {"code": 3, "type": "ImageError", "message": "bad.png is broken.", "path": "bad.png"}
    assert row["image"] == "bad.png" and row["prompt"] == "caption en" and "objects" not in row


def test_a_run_of_bad_requests_only_and_a_run_without_requests(run):
    assert [type(r.error) for r in run([Request(picture=ImageError("gone."), task="ocr")] * 3)] == [ImageError] * 3
    assert run([]) == []


def test_requests_are_read_only_when_a_row_is_free(model, processor):
    read = itertools.count()
    requests = (request for request in many(50) if next(read) >= 0)
    next(Annotator(model, processor, rows=2).run(requests))
    assert next(read) <= 4  # two running, one look-ahead, and this call of next


def test_a_picture_of_several_requests_is_encoded_once(model, processor, monkeypatch):
    looks = []
    tower = model.vision_tower.forward
    monkeypatch.setattr(model.vision_tower, "forward", lambda pixels: (looks.append(len(pixels)), tower(pixels))[1])
    questions = [Request(picture=SHAPES, task="count", text=text) for text in ("stars", "circles", "hearts", "squares")]
    list(Annotator(model, processor, rows=2).run([*questions, Request(picture=CAT, task="caption")]))
    assert sum(looks) == 2


def test_a_result_does_not_keep_the_picture(run):
    picture = SHAPES.copy()
    gone = weakref.ref(picture)
    result = run([Request(picture=picture, task="caption")])[0]
    del picture
    gc.collect()
    assert gone() is None and result.width == 448


def short_of_memory(monkeypatch, limit):
    """Makes steps of more than `limit` rows run out of memory; returns a list to which each such step adds its rows."""
    step, failures = generation.RunningBatch.step, []

    def scarce(decoder):
        if len(decoder.rows) > limit:
            failures.append(len(decoder.rows))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
        step(decoder)

    monkeypatch.setattr(generation.RunningBatch, "step", scarce)
    return failures


def test_running_out_of_memory_halves_the_rows_and_loses_no_result(run, monkeypatch):
    requests = many(10)
    expected = [result.text for result in run(requests)]
    failures = short_of_memory(monkeypatch, 1)
    assert [result.text for result in run(requests, rows=4)] == expected
    assert failures == [4, 2]


def test_running_out_of_memory_with_one_row_is_an_error(run, monkeypatch):
    short_of_memory(monkeypatch, 0)
    with pytest.raises(DeviceError, match="memory ran out while answering"):
        run(many(3), rows=2)


BAD = Request(picture=ImageError("bad.png is broken."), task="caption")


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_error_results_are_kept_when_memory_runs_out_before_the_next_answer(run, monkeypatch, rows):
    short_of_memory(monkeypatch, 1)
    requests = [BAD, *many(2), BAD, BAD, *many(3), BAD]
    results = run(requests, rows=rows)
    assert [result.error is not None for result in results] == [request is BAD for request in requests]


NO_MODEL = SimpleNamespace(config=SimpleNamespace(text_config=SimpleNamespace(vocab_size=9)))
NO_PROCESSOR = SimpleNamespace(image_size=14, location_ids=None, unused_ids=lambda _: [])


class Scripted:
    """A fake generate_many: the text of a request decides what happens to it, and rows end in a random, seeded order."""

    def __init__(self, draw):
        self.draw = draw

    def __call__(self, _model, inputs, *, rows, **_):
        arrivals, in_flight = enumerate(inputs), []
        while True:
            in_flight += itertools.islice(arrivals, rows - len(in_flight))
            for _, row in in_flight:
                if row["text"] == "dead" or (row["text"] == "heavy" and len(in_flight) > 1):
                    raise torch.OutOfMemoryError("CUDA out of memory.")
                if row["text"] == "nan":
                    raise GenerationError("the model's logits are not numbers.")
            if not in_flight:
                return
            index, _ = in_flight.pop(self.draw.randrange(len(in_flight)))
            yield Answer(index=index, token_ids=[], logprobs=[], moments=[], finish_reason="stop")


def scripted(texts, rows, seed, monkeypatch, source_fails=False):
    """Runs such requests. Returns the indices of the results in their order, the error of each index, and what the run raised."""
    annotator = Annotator(None, None, rows=rows)

    def make(request, _):
        if request is BAD:
            raise request.picture
        if request.text == "bad":
            raise PromptError("too long.")
        return {"text": request.text}

    def read(request, _):
        error = DeviceError("memory ran out while reading the answer.") if request.text == "large" else None
        return tasks.Result(image="", task="ask", asked=request.text, prompt="", error=error)

    def requests():
        yield from (BAD if text == "broken" else Request(picture=SHAPES, task="ask", text=text) for text in texts)
        if source_fails:
            raise MemoryError

    monkeypatch.setattr(generation, "generate_many", Scripted(random.Random(seed)))
    monkeypatch.setattr(annotator, "model_input", make)
    monkeypatch.setattr(annotator, "to_result", read)
    monkeypatch.setattr(annotator, "model", NO_MODEL)
    monkeypatch.setattr(annotator, "processor", NO_PROCESSOR)
    results, raised = [], None
    try:
        results.extend(annotator.run(requests()))
    except (DeviceError, GenerationError, MemoryError) as error:
        raised = error
    return [index for index, _ in results], {index: result.error for index, result in results}, raised


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from("good good bad broken heavy large dead nan".split()), max_size=14),
    st.integers(1, 5), st.integers(0, 3), st.booleans(),
)  # fmt: skip
def test_each_request_has_exactly_one_result_whatever_happens_to_others(texts, rows, seed, source_fails):
    with pytest.MonkeyPatch.context() as patch:
        indices, errors, raised = scripted(texts, rows, seed, patch, source_fails)
    assert len(indices) == len(set(indices))
    failing = ("bad", "broken", "large", "dead")
    assert all((errors[index] is not None) == (texts[index] in failing) for index in indices)
    if raised is None:
        assert sorted(indices) == list(range(len(texts))) and not source_fails
    else:
        assert source_fails or "nan" in texts or texts.count("dead") > 1


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_error_results_are_yielded_before_the_run_raises(rows, monkeypatch):
    indices, errors, raised = scripted(["broken", "bad", "nan", "good"], rows, 0, monkeypatch)
    assert indices == [0, 1] and all(errors.values()) and isinstance(raised, GenerationError)


def test_errors_of_many_requests_do_not_wait_for_an_answer(monkeypatch):
    read = []

    def requests():
        for number in range(1000):
            read.append(number)
            yield BAD

    annotator = Annotator(NO_MODEL, NO_PROCESSOR, rows=4)
    monkeypatch.setattr(generation, "generate_many", Scripted(random.Random(0)))
    results = annotator.run(requests())
    assert next(results)[0] == 0 and len(read) <= 6


def test_a_closed_run_yields_nothing_more(monkeypatch):
    monkeypatch.setattr(generation, "generate_many", Scripted(random.Random(0)))
    annotator = Annotator(NO_MODEL, NO_PROCESSOR, rows=3)
    results = annotator.run([BAD] * 3)
    next(results)
    results.close()  # a generator that yields after close() raises RuntimeError


@pytest.mark.parametrize("indices", [[], [0, 2], [1], [0, 1]])
def test_a_missing_result_is_an_error(indices):
    with pytest.raises(RuntimeError, match="has no result"):
        list(tasks.in_order([(index, None) for index in indices], 3))


def test_results_come_in_the_order_of_their_requests():
    pairs = [(2, "c"), (0, "a"), (1, "b")]
    assert list(tasks.in_order(pairs, 3)) == ["a", "b", "c"]


def test_other_errors_of_the_machine_end_the_run(run, monkeypatch):
    def broken(*_):
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(generation.RunningBatch, "step", broken)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        run(many(3))


# Whatever load_image takes


def test_a_request_takes_whatever_load_image_takes(run, tmp_path):
    SHAPES.save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    sources = [str(tmp_path / "a.png"), tmp_path / "a.png", content, io.BytesIO(content), np.asarray(SHAPES),
               torch.from_numpy(np.asarray(SHAPES).copy()), {"bytes": content, "path": "a.png"}, SHAPES.convert("RGBA"),
               Image.open(tmp_path / "a.png"), np.asarray(SHAPES), str(tmp_path / "a.png")]  # fmt: skip
    right = run([Request(picture=SHAPES, task="detect", text="cross")])[0]
    results = run([Request(picture=source, task="detect", text="cross") for source in sources])
    assert [result.error for result in results] == [None] * len(sources)
    assert all((result.token_ids, result.width, result.height) == (right.token_ids, 448, 448) for result in results)
    assert [result.image for result in results[:3]] == [str(tmp_path / "a.png")] * 2 + [""]


def test_a_request_whose_picture_is_no_picture_gets_an_error_result(run):
    results = run([Request(picture=source, task="caption") for source in ("gone.png", 3, None, b"", SHAPES)])
    assert [type(result.error) for result in results] == [ImageError] * 4 + [type(None)]
    assert "gone.png does not exist" in results[0].error.message and results[0].image == "gone.png"


def test_a_file_of_two_requests_is_read_once(run, monkeypatch, tmp_path):
    SHAPES.save(tmp_path / "a.png")
    read, names = sources.read_file, []
    monkeypatch.setattr(sources, "read_file", lambda path: names.append(path) or read(path))
    place = str(tmp_path / "a.png")
    run([Request(picture="".join(place), task="detect", text=text) for text in ("cross", "ring")])
    assert names == [place]
