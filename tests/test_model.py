"""The front door: `paligemma.load()` and its verbs, for any picture, one or many, in any thread; the names of the package."""

import ast
import base64
import doctest
import inspect
import io
import subprocess
import sys
import textwrap
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import paligemma
from paligemma import explanation_sheet
from paligemma import model as front
from paligemma.layers import acceleration, kernels
from tests.tiny_checkpoint import make_checkpoint

ROOT = Path(__file__).resolve().parent.parent
SHAPES = paligemma.EXAMPLE_PICTURE
CAPTION = "an orange cross, a yellow circle and a purple heart"
TEXT = Path(SHAPES).read_bytes()


@pytest.fixture(scope="module")
def model():
    return paligemma.load(device="cpu")


# The names of the package


def test_import_paligemma_brings_nothing_heavy():
    code = "import sys, paligemma; paligemma.errors.ImageError, paligemma.PromptError; dir(paligemma); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, timeout=60)
    assert not {"torch", "numpy", "PIL", "tokenizers", "safetensors", "paligemma.model"} & set(done.stdout.split())


def test_every_public_name_is_there_and_the_three_lists_of_names_agree():
    public = set(paligemma.__all__)
    assert public <= set(dir(paligemma)) and all(getattr(paligemma, name) is not None for name in public)
    assert {"errors", *(name for names in paligemma._SOURCES.values() for name in names)} == public
    tree = ast.parse((ROOT / "paligemma" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and isinstance(node.test, ast.Name)]
    imported = {(node.module, alias.name) for node in block.body for alias in node.names}
    assert imported == {("paligemma", "errors")} | {
        (f"paligemma.{module}", name) for module, names in paligemma._SOURCES.items() for name in names
    }


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'paligemma' has no attribute 'lode'"):
        paligemma.lode  # noqa: B018
    with pytest.raises(ImportError):
        from paligemma import lode  # noqa: F401


def test_help_shows_one_picture_or_a_list():
    asked = inspect.signature(paligemma.Model.ask)
    assert [*asked.parameters] == ["self", "picture", "question", "language", "sampling", "max_new_tokens"]
    assert asked.parameters["picture"].annotation == "Picture | list[Picture]"
    assert [*inspect.signature(paligemma.EncodedPicture.detect).parameters][:2] == ["self", "labels"]


@pytest.mark.parametrize("module", [paligemma, front])
def test_the_examples_in_the_docstrings_are_true(module, model):
    del model  # the examples load their own
    names = {"paligemma": paligemma, "model": paligemma.load(device="cpu")}
    result = doctest.testmod(module, extraglobs=names, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0 and (module is paligemma or result.attempted >= 15)


# Verbs


def test_each_verb_answers(model, tmp_path):
    assert model.caption(SHAPES) == CAPTION
    assert model.ask(SHAPES, "what color is the heart?") == "purple"
    assert model.count(SHAPES, "circles") == 1
    assert "".join(model.stream(SHAPES, "caption en")) == CAPTION
    found = model.detect(SHAPES, "circle")
    (thing,) = found.objects
    x_min, y_min, x_max, y_max = thing.xyxy
    assert thing.label == "circle" and 0.9 < thing.score <= 1 and thing.mask is None
    assert 130 < x_min < 145 and 40 < y_min < 55 and 285 < x_max < 300 and 200 < y_max < 210  # pixels, x first
    assert [*found] == [found[0]] and len(found) == 1 and "circle 0.9" in repr(found)
    found.save(tmp_path / "out.png")
    assert Image.open(tmp_path / "out.png").size == (448, 448) == (found.width, found.height)
    assert Image.open(io.BytesIO(found._repr_png_())).size == (448, 448)
    assert found.to_json()["objects"][0]["box"] == pytest.approx(thing.xyxy, abs=0.01)
    assert found.to_coco()["categories"] == [{"id": 1, "name": "circle"}]
    assert found.to_supervision().xyxy[0].tolist() == pytest.approx(thing.xyxy, abs=0.01)


def test_masks_are_of_the_size_of_the_original(model):
    (thing,) = model.segment(Image.open(SHAPES).resize((300, 200)), "circle").objects
    assert thing.mask.shape == (200, 300) and thing.mask.dtype == np.bool_ and thing.mask.any()


def test_a_list_in_is_a_list_out(model):
    pictures = [SHAPES, Image.open(SHAPES).transpose(Image.Transpose.FLIP_LEFT_RIGHT), TEXT]
    assert model.caption(pictures) == [model.caption(picture) for picture in pictures]
    assert [found[0].label for found in model.detect(tuple(pictures), "heart")] == ["heart"] * 3
    assert model.count(pictures, "hearts") == [1, 1, 1]
    assert model.caption([]) == [] and model.caption([SHAPES]) == [CAPTION]
    assert [features.shape for features in model.embed(pictures)] == [(64, 192)] * 3


@pytest.mark.parametrize("kind", ["path", "Path", "bytes", "file", "PIL", "numpy", "torch", "address", "dict"])
def test_every_kind_of_picture_is_taken_and_can_be_drawn_on_later(kind, model):
    array = np.asarray(Image.open(SHAPES).convert("RGB"))
    uri = "data:image/png;base64," + base64.b64encode(TEXT).decode()
    with open(SHAPES, "rb") as file:
        picture = {
            "path": SHAPES, "Path": Path(SHAPES), "bytes": TEXT, "file": file, "PIL": Image.open(SHAPES), "numpy": array.copy(),
            "torch": torch.tensor(array).permute(2, 0, 1), "address": uri, "dict": {"bytes": TEXT, "path": None},
        }[kind]  # fmt: skip
        found = model.detect(picture, "heart")
        assert model.embed(picture).equal(model.embed(SHAPES))
    if kind == "numpy":
        picture[:] = 0  # a camera's buffer is used again; the result keeps its picture
    assert np.array_equal(np.asarray(found.draw()), np.asarray(model.detect(SHAPES, "heart").draw()))


def test_a_looked_at_picture_is_encoded_once(model, monkeypatch):
    calls, encode = [], model.network.encode_images
    monkeypatch.setattr(model.network, "encode_images", lambda pixels: calls.append(1) or encode(pixels))
    with model.look(SHAPES) as picture:
        answers = picture.caption(), picture.ask("what color is the heart?"), picture.count("circles")
        found = picture.detect("heart"), picture.segment("heart")
        streamed, features = "".join(picture.stream("caption en")), picture.embed()
        assert isinstance(picture.ocr(), str)
    assert calls == [1] and answers == (CAPTION, "purple", 1) and streamed == CAPTION
    assert found[0][0].xyxy == model.detect(SHAPES, "heart")[0].xyxy and found[1][0].mask is not None
    assert features.equal(model.embed(SHAPES)) and found[0].draw().size == (448, 448)
    with pytest.raises(paligemma.UsageError, match="this picture is closed"):
        picture.caption()


def test_image_features_are_what_the_decoder_reads(model):
    pixels = model.processor.pixels([Image.open(SHAPES)])
    with torch.no_grad():
        features = model.network.multi_modal_projector(model.network.vision_tower(pixels))[0]
    assert model.embed(SHAPES).equal(features.float()) and model.embed(SHAPES).dtype == torch.float32


def test_sampling_and_length_are_obeyed(model):
    options = {"sampling": paligemma.Sampling(temperature=3.0, seed=1), "max_new_tokens": 9}
    assert model.caption(SHAPES, **options) == model.caption(SHAPES, **options) != CAPTION
    assert CAPTION.startswith(model.caption(SHAPES, max_new_tokens=2)) and model.caption(SHAPES, max_new_tokens=2) != CAPTION
    assert len(list(model.stream(SHAPES, "caption en", max_new_tokens=3))) == 3
    first, second = model.caption([SHAPES, SHAPES], **options)
    assert first != second  # picture i draws from seed + i


def test_objects_below_a_score_and_other_words_than_labels_are_left_out(model):
    labels = {thing.label for thing in model.detect(SHAPES, "circle", "heart", grammar=True)}
    assert labels == {"circle", "heart"}
    assert len(model.detect(SHAPES, "circle", min_score=1.0)) == 0


def test_an_explanation_is_of_the_models_own_answer_or_of_a_given_one(model):
    own = model.explain(SHAPES, "answer en what color is the heart?")
    given = model.explain(SHAPES, "answer en what color is the heart?", "green")
    assert own.text == "purple" and given.text == "green" and own.logprob > given.logprob
    with model.look(SHAPES) as picture:
        assert picture.explain("answer en what color is the heart?").to_json() == own.to_json()
    assert explanation_sheet.draw_explanation(SHAPES, own).width == explanation_sheet.WIDTH


# What is wrong


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.caption("gone.png"), "ImageError", "gone.png does not exist"),
        (lambda m: m.caption([SHAPES, "gone.png"]), "ImageError", "gone.png does not exist"),
        (lambda m: m.detect("gone.png", "cat"), "ImageError", "gone.png does not exist"),
        (lambda m: m.caption(3), "ImageError", "int is no picture"),
        (lambda m: m.detect(SHAPES), "UsageError", "detect needs something to look for"),
        (lambda m: m.detect(SHAPES, ["car", "person"]), "UsageError", "Pass each label as a separate str"),
        (lambda m: m.ask(SHAPES, ""), "UsageError", "ask needs a question"),
        (lambda m: m.caption(SHAPES, language="!"), "UsageError", "language is '!'"),
        (lambda m: m.caption(SHAPES, max_new_tokens=0), "GenerationError", "max_new_tokens is 0"),
        (lambda m: m.stream(SHAPES, "x" * 3000), "PromptError", "the model's context is"),
        (lambda m: m.detect(SHAPES, "heart").save("out.xyz"), "UsageError", "cannot be written as a picture"),
        (lambda m: m.detect(SHAPES, "heart").save("out.pdf"), "UsageError", "Give a name that ends in .png"),
        (lambda m: m.ask(SHAPES, 5), "UsageError", "the text for ask is 5"),
        (lambda m: m.count(SHAPES, None), "UsageError", "the text for count is None"),
        (lambda m: m.caption(SHAPES, language=5), "UsageError", "language is 5"),
        (lambda m: m.explain(SHAPES, "caption en", 5), "PromptError", "the text is 5"),
        (lambda m: m.detect(SHAPES, "heart", min_score="high"), "UsageError", "min_score is 'high'"),
        (lambda m: m.detect(SHAPES, "heart", min_score=2), "UsageError", "min_score is 2"),
        (lambda m: m.caption(SHAPES, sampling=5), "GenerationError", "sampling is 5"),
        (lambda m: m.detect(SHAPES, "heart").save(None), "UsageError", "None is not a path"),
        (lambda _: paligemma.load(""), "CheckpointError", "the name of the model is empty"),
        (lambda _: paligemma.load(5), "UsageError", "5 is not a path"),
        (lambda _: paligemma.load(base_model=5), "UsageError", "5 is not a path"),
        (lambda _: paligemma.load(mask_codec=5), "UsageError", "5 is not a path"),
        (lambda _: paligemma.load(quantize_vision=True), "UsageError", "quantize_vision needs quantize"),
        (lambda _: paligemma.load(batch_size=0), "UsageError", "batch_size is 0"),
        (lambda _: paligemma.load("no/such/folder"), "CheckpointError", "no folder"),
        (lambda _: paligemma.load(quantize="int3"), "UsageError", "quantize is 'int3'"),
        (lambda _: paligemma.load(device="tpu"), "UsageError", "device"),
        (lambda _: paligemma.load(mask_codec="gone.npz"), "CheckpointError", "gone.npz is not a file"),
    ],
)
def test_what_is_wrong_is_one_of_our_errors(call, error, message, model):
    with pytest.raises(paligemma.PaliGemmaError, match=message) as caught:
        call(model)
    assert type(caught.value).__name__ == error


def test_a_task_that_the_checkpoint_was_not_trained_for_is_a_warning(model):
    tuned = front.Model(model.network, model.processor, kind="docvqa")
    with pytest.warns(UserWarning, match="fine-tuned on docvqa, so it may not know caption") as caught:
        tuned.caption(SHAPES)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="no mask codec"):
        model_without_codec = front.Model(model.network, model.processor)
        assert model_without_codec.segment(SHAPES, "heart")[0].mask is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.caption(SHAPES)


def test_a_folder_of_ones_own_is_loaded_and_named(tmp_path):
    own = paligemma.load(make_checkpoint(tmp_path / "mine"), device="cpu", dtype="fp32")
    assert "mine: " in repr(own) and own.network.dtype == torch.float32 and own.codec is None
    assert isinstance(own.caption(SHAPES, max_new_tokens=3), str)


def test_weights_that_are_not_finite_are_loaded_only_when_that_is_allowed(tmp_path):
    folder = make_checkpoint(tmp_path)
    broken = paligemma.load(folder)
    with torch.no_grad():
        broken.network.language_model.model.norm.weight[0] = float("nan")
    paligemma.save_model(broken.network, folder)
    with pytest.raises(paligemma.CheckpointError, match="NaN or infinity"):
        paligemma.load(folder)
    assert paligemma.load(folder, allow_nonfinite=True).network.language_model.model.norm.weight.isnan().any()


# Threads


def verbs(model):
    """Answers of every kind, to be compared."""
    return {
        "caption": lambda: model.caption(SHAPES),
        "ask": lambda: model.ask(SHAPES, "what color is the heart?"),
        "list": lambda: model.caption([SHAPES, TEXT]),
        "detect": lambda: [(thing.label, thing.score, thing.xyxy) for thing in model.detect(SHAPES, "circle", "heart")],
        "grammar": lambda: [thing.xyxy for thing in model.detect(SHAPES, "circle", grammar=True)],
        "segment": lambda: [thing.mask.tobytes() for thing in model.segment(SHAPES, "heart")],
        "drawn": lambda: model.detect(SHAPES, "heart")._repr_png_(),
        "stream": lambda: list(model.stream(SHAPES, "caption en")),
        "sampled": lambda: model.caption(SHAPES, sampling=paligemma.Sampling(temperature=2.0, seed=3), max_new_tokens=12),
        "embed": lambda: model.embed(SHAPES).tolist(),
        "explain": lambda: model.explain(SHAPES, "answer en what color is the heart?").to_json(),
    }


def check_threads(model, make, rounds):
    """Four threads that ask everything, each in an order of its own, get what one thread gets."""
    asked = verbs(model)
    if make is None:
        asked.pop("explain"), asked.pop("drawn")
    start = threading.Barrier(4)

    def work(number):
        start.wait()
        names = [*asked]
        order = (names[number * 3 :] + names[: number * 3]) * rounds
        return [(name, asked[name]()) for name in order]

    with ThreadPoolExecutor(4) as pool:
        answers = [answer for thread in pool.map(work, range(4)) for answer in thread]
    alone = {name: ask() for name, ask in asked.items()}
    assert [name for name, answer in answers if answer != alone[name]] == []


def test_four_threads_get_the_answers_of_one():
    model = paligemma.load(device="cpu")
    check_threads(model, True, 2)


@pytest.mark.parametrize("has_kernels", [True, False])
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_four_threads_get_the_answers_of_one_from_fast_and_quantised_layers(quantize, has_kernels, monkeypatch):
    """Without kernels each quantised layer reorders its weights at its first use, here in four threads at once."""
    model = paligemma.load(device="cpu", quantize=quantize)
    if not has_kernels:
        monkeypatch.setattr(kernels, "library", lambda: None)
    acceleration.accelerate(model.network, 0)
    check_threads(model, None, 1)


# Types


USER = textwrap.dedent("""
    import numpy as np
    from PIL import Image

    import paligemma

    model = paligemma.load("google/paligemma2-3b-mix-224", device="auto", dtype=None, quantize=None, revision=None)
    caption: str = model.caption("cat.jpg")
    captions: list[str] = model.caption(["cat.jpg", "dog.jpg"], language="fr")
    answer: str = model.ask(Image.new("RGB", (8, 8)), "what is on the table?", sampling=paligemma.Sampling(temperature=0.5))
    found = model.detect("street.jpg", "car", "person")
    for thing in found.objects:
        label: str = thing.label
        score: float = thing.score
        x_min, y_min, x_max, y_max = thing.xyxy
        width: float = x_max - x_min
        area: int = 0 if thing.mask is None else int(thing.mask.sum())
    found.save("out.png")
    many: list[paligemma.DetectionResult] = model.segment([np.zeros((8, 8, 3), np.uint8)], "car")
    number: int | None = model.count(b"...", "cars")
    pieces: list[str] = [piece for piece in model.stream("cat.jpg", "caption en")]
    shape = model.embed("cat.jpg").shape
    with model.look("cat.jpg") as picture:
        again: str = picture.ask("why?", max_new_tokens=20)
        boxes: list[tuple[float, float, float, float]] = [thing.xyxy for thing in picture.detect("cat")]
    try:
        network = paligemma.load_model("folder")
        image = paligemma.load_image("cat.jpg", notes=[])
        processor = paligemma.PaliGemmaProcessor.from_pretrained("folder")
        for tokens in paligemma.generate(network, processor(image, "caption en"), max_new_tokens=4):
            piece: str = processor.decode(tokens)
        paligemma.save_model(network, "other")
    except paligemma.CheckpointError as error:
        print(error.message, error.code)
""")
WRONG = """
paligemma.lode()
paligemma.load(quantise="int8")
paligemma.load(quantize="int3")
model.caption(3)
model.caption("cat.jpg", "fr")
model.ask("cat.jpg")
model.detect("cat.jpg", 3)
model.detect("cat.jpg").boxes
number = model.caption(["cat.jpg"]) + 1
picture.ask("why?", max_tokens=3)
"""


def test_a_users_program_passes_a_strict_type_checker_and_a_wrong_one_does_not(tmp_path):
    program = tmp_path / "user.py"
    program.write_text(USER + WRONG)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--no-error-summary", "--config-file="]
    command += ["--cache-dir", str(ROOT / ".mypy_cache" / "user"), str(program)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    lines = [int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error: " in line]
    first = USER.count("\n") + 2
    assert sorted({*lines}) == list(range(first, first + 10)), done.stdout + done.stderr
