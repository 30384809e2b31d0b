"""The processor: pixels and ids equal to transformers; names of control tokens in a prompt stay text; text from ids."""

import base64
import io
import json
import math
import re
import subprocess
import sys
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from paligemma import files, processing_paligemma
from paligemma.checkpoints.processor_files import read_tokenizer
from paligemma.errors import CheckpointError, ImageError, OutputError, PromptError, TokenizerError
from paligemma.processing_paligemma import PaliGemmaProcessor
from paligemma.vocabulary import CODE_TOKENS, LOCATION_TOKENS
from tests.tiny_tokenizer import tokenizer_json, write_json, write_processor, write_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside transformers
ROOT = Path(__file__).parent.parent
SIDE, PATCHES = 28, 4
PROMPTS = [
    "",
    "caption en",
    "cap de",
    "describe en",
    "ocr",
    "answer en what is this?",
    "answer en  how many cats are there? choose from: one \t two",
    "question en two",
    "detect cat",
    "detect red car ; dog",
    "segment the blue square",
    "What is behind the cat?",
    "describe this image in great detail, please",
    "a  b   c    d     e",
    "first line\nsecond line",
    "blank\n\n\nlines\r\nand tabs\t\t.",
    "detect <loc0000><loc1023> cat",
    "<loc0512>",
    "segment <seg000> <seg127><seg064>x",
    "<loc1024> <loc9999> <loc1> <loc00001> <seg128> <seg1>",
    "où est le café? Fußgänger, ÄÖÜ",
    "你好，世界 こんにちは",
    "שלום مرحبا",
    "\U0001f600 family \U0001f469\u200d\U0001f469\u200d\U0001f467 flag \U0001f1e9\U0001f1ea",
    "e\u0301 combining a\u030a\u0323",
    "nul \x00 bell \x07 escape \x1b[31m",
    "\ufeffbyte order mark",
    "None",
    "[a] {b} #7 \"quoted\" 'single' 45% x=y+z 1.5e3",
    "<b>bold</b> <imag> image> <bo s> < eos > <0x41>",
    "under_score ▁ block",
    "x" * 500,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("processor")
    write_processor(path, image_size=SIDE)
    return path


@pytest.fixture(scope="module")
def reference(folder):
    from transformers import PaliGemmaProcessor as Reference

    return Reference.from_pretrained(folder)


@pytest.fixture(scope="module")
def processor(folder):
    return PaliGemmaProcessor.from_pretrained(folder)


def picture(width: int = 37, height: int = 23, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def assert_equal(ours: dict, theirs: dict) -> None:
    """Bitwise equality. Labels are compared only if ours has some, because transformers always returns labels."""
    assert ours.keys() - {"labels"} == theirs.keys() - {"labels"}
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        assert torch.equal(ours[name], theirs[name]), name


# Equal to transformers


@pytest.mark.parametrize("prompt", PROMPTS)
def test_ids_equal_transformers(processor, reference, prompt):
    stripped = prompt.strip()
    theirs = reference(images=picture(), text="<image>" + stripped, return_tensors="pt")
    assert_equal(processor(picture(), prompt), theirs)


@pytest.mark.parametrize("suffix", ["", "the cat", " two  spaces ", "<loc0001><loc0002><loc0003><loc0004> red car ; é\U0001f600"])
def test_answers_and_labels_equal_transformers(processor, reference, suffix):
    theirs = reference(images=picture(), text="<image>detect red car", suffix=suffix, return_tensors="pt")
    ours = processor(picture(), "detect red car", suffix)
    assert_equal(ours, theirs)
    assert ours.keys() == theirs.keys()


def test_a_batch_with_several_pictures_per_row_equals_transformers(processor, reference):
    rows = [[picture(seed=1)], [picture(seed=2), picture(50, 60, seed=3)], [picture(seed=4)]]
    prompts, suffixes = ["caption en", "answer en which of the two?", "ocr"], ["a cat", "left", "one two three"]
    texts = ["<image>" * len(row) + prompt for row, prompt in zip(rows, prompts, strict=True)]
    theirs = reference(images=rows, text=texts, suffix=suffixes, padding="longest", return_tensors="pt")
    ours = processor(rows, prompts, suffixes)
    assert ours.keys() == theirs.keys()
    assert_equal(ours, theirs)
    assert (ours["input_ids"][0] == processor.pad_token_id).any()


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 1), (28, 28), (27, 29), (640, 480), (2000, 1500)])
def test_pixels_of_every_size_equal_transformers(processor, reference, size):
    image = picture(*size)
    theirs = reference.image_processor(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(processor.pixels([image]), theirs)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "RGBA", "LA"])
def test_pixels_of_other_modes_equal_transformers(processor, reference, mode):
    values = np.random.default_rng(3).integers(0, 256, (30, 40, 4), dtype=np.uint8)
    image = Image.fromarray(values).convert(mode)
    image = Image.merge("LA", (image.convert("L"), Image.fromarray(values[:, :, 3]))) if mode == "LA" else image
    theirs = reference.image_processor(image, do_convert_rgb=True, return_tensors="pt")["pixel_values"]
    assert torch.equal(processor.pixels([image]), theirs)


@pytest.mark.parametrize("size", [224, 448])
def test_pixels_of_the_bundled_photographs_equal_transformers(tmp_path, size):
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    write_processor(tmp_path, image_size=size)
    ours = PaliGemmaProcessor.from_pretrained(tmp_path)
    theirs = SiglipImageProcessorPil.from_pretrained(tmp_path)
    for name in ("cat.png", "coffee.png"):
        image = Image.open(ROOT / "examples" / name)
        assert torch.equal(ours.pixels([ROOT / "examples" / name]), theirs(image, return_tensors="pt")["pixel_values"])


def test_other_means_and_scales_equal_transformers(tmp_path):
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    write_processor(tmp_path, image_size=SIDE)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    settings |= {"image_mean": [0.48, 0.45, 0.4], "image_std": [0.26, 0.25, 0.27], "rescale_factor": 1 / 127.5}
    write_json(tmp_path, "preprocessor_config.json", settings)
    theirs = SiglipImageProcessorPil.from_pretrained(tmp_path)(picture(), return_tensors="pt")["pixel_values"]
    assert torch.equal(PaliGemmaProcessor.from_pretrained(tmp_path).pixels([picture()]), theirs)


def test_files_saved_by_transformers_5_give_the_same_processor(reference, processor, tmp_path):
    reference.save_pretrained(tmp_path)  # transformers 5 writes processor_config.json instead of preprocessor_config.json
    assert (tmp_path / "processor_config.json").exists()
    write_json(tmp_path, "config.json", write_processor_config(tmp_path))
    again = PaliGemmaProcessor.from_pretrained(tmp_path)
    inputs = (picture(), "detect red car ; <loc0000>\U0001f600", "the cat")
    assert_equal(again(*inputs), processor(*inputs))


def write_processor_config(folder: Path) -> dict:
    """config.json as transformers 5 writes it: bos, eos and pad in text_config only."""
    image = next(
        token["id"]
        for token in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
        if token["content"] == "<image>"
    )
    text = {"model_type": "gemma", "vocab_size": image + 1, "pad_token_id": 0, "eos_token_id": [1, 0], "bos_token_id": 2}
    tower = {"image_size": SIDE, "patch_size": 14}
    return {"model_type": "paligemma", "image_token_index": image, "text_config": text, "vision_config": tower}


# The layout of a row


def test_a_row_is_pictures_bos_prompt_newline_answer_eos(processor):
    newline, bos, eos, image = (getattr(processor, f"{name}_token_id") for name in ("newline", "bos", "eos", "image"))
    prompt, answer = processor.encode("caption en"), processor.encode("a cat")
    row = [image] * PATCHES * 2 + [bos] + prompt + [newline] + answer + [eos]
    batch = processor([[picture(), picture()]], ["caption en"], ["a cat"])
    assert batch["input_ids"].tolist() == [row]
    assert batch["token_type_ids"].tolist() == [[0] * (len(row) - len(answer) - 1) + [1] * (len(answer) + 1)]
    assert batch["labels"].tolist() == [[-100] * (len(row) - len(answer) - 1) + answer + [eos]]
    assert batch["pixel_values"].shape == (2, 3, SIDE, SIDE) and batch["pixel_values"].dtype == torch.float32


def test_shorter_rows_are_padded_on_the_left(processor):
    batch = processor(None, ["a", "a b c"])
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert batch["input_ids"][0, :2].tolist() == [processor.pad_token_id] * 2
    assert "pixel_values" not in batch and "labels" not in batch


def test_white_space_at_both_ends_is_dropped_with_a_note(processor):
    notes = []
    batch = processor(None, " \n caption en\r\n\t", notes=notes)
    assert torch.equal(batch["input_ids"], processor(None, "caption en")["input_ids"])
    assert "white space" in notes[0]
    assert processor(None, "\n \n")["input_ids"].tolist() == [[processor.bos_token_id, processor.newline_token_id]]


def test_the_newline_stays_a_token_of_its_own(tmp_path):
    # The merges of this tokenizer join the newline to the character before it. transformers' processor does not prevent that.
    tokenizer = tokenizer_json()
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if "\n" not in token["content"]]
    first = write_processor(tmp_path)
    vocab = tokenizer["model"]["vocab"]
    vocab["<image>"] = first["image_token_index"]
    free = vocab["t\n"] = len(vocab)
    tokenizer["model"]["merges"].insert(0, ["t", "\n"])
    write_json(tmp_path, "tokenizer.json", tokenizer)
    write_json(tmp_path, "config.json", first | {"text_config": {"vocab_size": free + 1}})
    processor = PaliGemmaProcessor.from_pretrained(tmp_path)
    assert free in processor.encode("cat\nx")
    assert processor(None, "cat")["input_ids"][0, -1] == processor.newline_token_id == vocab["\n"]


# Kinds of arguments


def test_pictures_are_given_to_rows_as_documented(processor):
    a, b = picture(seed=1), picture(seed=2)
    pixels = {name: processor.pixels([image])[0] for name, image in (("a", a), ("b", b))}
    for images, prompts, rows, order in (
        (a, "x", [1], "a"),
        ([a], "x", [1], "a"),
        ([a, b], "x", [2], "ab"),
        ([[a, b]], "x", [2], "ab"),
        (a, ["x", "y"], [1, 1], "aa"),
        ([a, b], ["x", "y"], [1, 1], "ab"),
        ([[b, a], [a]], ["x", "y"], [2, 1], "baa"),
        ([[b, a], None], ["x", "y"], [2, 0], "ba"),
        ([(b,), a], ("x", "y"), [1, 1], "ba"),
        (None, "x", [0], ""),
        ([], "x", [0], ""),
        ([], ["x", "y"], [0, 0], ""),
        ([[], [a]], ["x", "y"], [0, 1], "a"),
    ):
        batch = processor(images, prompts)
        counts = (batch["input_ids"] == processor.image_token_id).sum(1) // PATCHES
        assert counts.tolist() == rows
        expected = [pixels[name] for name in order]
        assert torch.equal(batch["pixel_values"], torch.stack(expected)) if order else "pixel_values" not in batch


def test_a_picture_may_be_a_path_an_address_bytes_an_open_file_or_an_array(processor):
    path = ROOT / "examples" / "cat.png"
    pixels = processor.pixels([path])
    data = path.read_bytes()
    addresses = path.as_uri(), "data:image/png;base64," + base64.b64encode(data).decode()
    array = np.array(Image.open(path))
    for source in (str(path), *addresses, data, io.BytesIO(data), array, torch.from_numpy(array), Image.open(path)):
        assert torch.equal(processor(source, "caption en")["pixel_values"], pixels)


def test_tokens_returns_the_batch_without_pixels(processor):
    whole = processor([[picture()], [picture(), picture()]], ["a", "b c"], ["d", "e"])
    alone = processor.tokens([1, 2], ["a", "b c"], ["d", "e"])
    del whole["pixel_values"]
    assert_equal(alone, whole)


@pytest.mark.parametrize(
    ("images", "prompts", "suffixes", "error"),
    [
        ([picture(), picture()], ["a"], None, ImageError),
        ([picture()], ["a", "b"], None, ImageError),
        ([[picture()]], ["a", "b"], None, ImageError),
        ([[[picture()]]], ["a"], None, ImageError),
        (3, "a", None, ImageError),
        ([None, picture()], "a", None, ImageError),
        (np.zeros((2, 3, 4, 3), np.uint8), ["a", "b", "c"], None, ImageError),
        (np.zeros((2, 2, 3, 4, 3), np.uint8), ["a", "b"], None, ImageError),
        (iter([picture()]), ["a", "b"], None, ImageError),
        (iter([3, picture()]), ["a", "b"], None, ImageError),
        ("nowhere.png", "a", None, ImageError),
        (None, None, None, PromptError),
        (None, [], None, PromptError),
        (None, 3, None, PromptError),
        (None, ["a", None], None, PromptError),
        (None, b"a", None, PromptError),
        (None, "a", ["b", "c"], PromptError),
        (None, ["a", "b"], "c", PromptError),
        (None, "a", [None], PromptError),
        (None, "a \udce4", None, PromptError),
        (None, "a", "\ud83d", PromptError),
    ],
)
def test_invalid_arguments_are_refused_in_one_sentence(processor, images, prompts, suffixes, error):
    with pytest.raises(error) as caught:
        processor(images, prompts, suffixes)
    assert "\n" not in str(caught.value) and str(caught.value).endswith((".", "?"))


def test_pictures_may_come_in_generators_arrays_and_open_files(processor):
    pictures = [picture(), picture(seed=1)]
    prompts, stack = ["a", "b"], np.stack([np.asarray(image) for image in pictures])
    expected = processor(pictures, prompts)["pixel_values"]
    for images in (iter(pictures), (image for image in pictures), tuple(pictures), deque(pictures), stack,
                   torch.from_numpy(stack), torch.from_numpy(stack).permute(0, 3, 1, 2) / 255, list(stack),
                   ([image] for image in pictures), np.array([*pictures, None], dtype=object)[:2]):  # fmt: skip
        assert torch.equal(processor(images, prompts)["pixel_values"], expected)
    assert torch.equal(processor(iter(pictures), "a")["pixel_values"], expected)
    file = io.BytesIO()
    pictures[0].save(file, "PNG")
    for image in (file, {"bytes": file.getvalue(), "path": None}, [file], file.getvalue()):
        assert torch.equal(processor(image, "a")["pixel_values"], expected[:1])
    assert "pixel_values" not in processor(iter([]), "a")


def test_arguments_may_come_by_the_names_of_transformers_in_any_order(processor):
    expected = processor(picture(), "caption en", "a cat")
    assert_equal(processor(images=picture(), text="caption en", suffix="a cat"), expected)
    assert_equal(processor(suffix="a cat", text="caption en", images=picture()), expected)
    assert_equal(processor(text=["caption en"], images=[picture()], suffix=["a cat"]), expected)


@pytest.mark.parametrize("options", [{"return_tensors": "pt"}, {"padding": True}, {"return_tensors": "pt", "padding": "longest"}])
def test_options_of_transformers_that_change_nothing_are_accepted(processor, options):
    assert_equal(processor(text="caption en", images=picture(), **options), processor(picture(), "caption en"))


@pytest.mark.parametrize(
    "options",
    [
        {"return_tensors": "np"}, {"padding": False}, {"padding": 1}, {"padding": "max_length"}, {"padding": np.ones(2)},
        {"max_length": 12}, {"prompts": "caption en"}, {"padding": True, "truncation": True}, {"return_tensors": None},
    ],
)  # fmt: skip
def test_other_options_are_a_type_error_that_names_our_spelling(processor, options):
    with pytest.raises(TypeError, match=re.escape("processor(pictures, prompts, suffixes)")) as caught:
        processor(picture(), "caption en", **options)
    assert list(options)[-1] in str(caught.value) and "\n" not in str(caught.value)


def test_text_before_pictures_is_a_type_error_that_names_our_spelling(processor):
    path = ROOT / "examples" / "cat.png"
    array = np.array(picture())
    for image in (picture(), path, path.read_bytes(), io.BytesIO(path.read_bytes()), array, torch.from_numpy(array), [picture()]):
        for text in ("caption en", ["caption en"]):
            with pytest.raises(TypeError, match=re.escape("processor(pictures, prompts, suffixes)")):
                processor(text, image)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_one_image_token_per_picture_at_the_beginning_is_allowed_as_in_transformers(processor, reference, count):
    pictures = [[picture(seed=number) for number in range(count)]]
    plain, notes = processor(pictures, ["caption en"]), []
    ours = processor(pictures, ["<image>" * count + "caption en"], notes=notes)
    assert_equal(ours, plain)
    assert notes == []
    if count:
        theirs = reference(text=["<image>" * count + "caption en"], images=pictures, return_tensors="pt")
        assert_equal(processor(text=["<image>" * count + "caption en"], images=pictures, return_tensors="pt"), theirs)


@pytest.mark.parametrize("prompt", ["<image><image>caption en", "caption <image>en", "caption en<image>"])
def test_any_other_image_token_is_ordinary_text(processor, prompt):
    notes = []
    batch = processor(picture(), prompt, notes=notes)
    assert (batch["input_ids"] == processor.image_token_id).sum() == PATCHES and "<image>" in notes[0]
    assert processor.decode(batch["input_ids"][0]) == prompt + "\n"


def test_a_loaded_picture_is_not_loaded_again(processor, monkeypatch):
    loaded = processing_paligemma.load_image(ROOT / "examples" / "cat.png")
    expected = processor.pixels([ROOT / "examples" / "cat.png"])
    monkeypatch.setattr(processing_paligemma, "load_image", None)
    assert torch.equal(processor.pixels([loaded]), expected)
    assert torch.equal(processor(loaded, "caption en")["pixel_values"], expected)


def test_notes_are_logged_if_no_list_is_given(processor, caplog):
    processor(None, "<image> a")
    assert "<image> in the text is read as ordinary text" in caplog.text


# Control tokens, locations and mask codes


@pytest.mark.parametrize("token", ["<image>", "<bos>", "<eos>", "<pad>"])
def test_a_control_token_in_a_prompt_is_ordinary_text(processor, token):
    notes = []
    batch = processor(picture(), f"what is {token}?", f"{token} is", notes=notes)
    assert token in notes[0]
    own = {processor.image_token_id: PATCHES, processor.bos_token_id: 1, processor.eos_token_id: 1}
    ids = batch["input_ids"][0].tolist()
    for number in processor.reserved_tokens:
        assert ids.count(number) == own.get(number, 0)
    assert processor.decode(processor.encode(f"what is {token}?")) == f"what is {token}?"


OWN_TOKENS = {  # tokens that fine-tuned models add after <image>
    "<mytask>": {"special": True},
    "[@BOS@]": {"special": True},
    "<left>": {"special": True, "lstrip": True},
    "<right>": {"special": True, "rstrip": True},
    "<word>": {"special": True, "single_word": True},
    "<norm>": {"special": True, "normalized": True},
    "<plain>": {"special": False},
    "<mytask>s": {"special": True},
}
OWN_PROMPTS = [
    "<mytask> a cat",
    "do <mytask><mytask>, <loc0001> [@BOS@] x",
    "a  <left> b <right>  c<right>\n d",
    "<word> a<word> <word>b <word>,",
    "<norm>a <norm> <plain>b<plain>",
    "<mytask>s and <mytask> <unk> <mask> é<mytask>\U0001f600",
]


def write_own_tokens(folder):
    """The folder of a fine-tuned model: own tokens after <image>, then rows of the embedding without a token."""
    config = write_processor(folder, image_size=SIDE)
    tokenizer = tokenizer_json()
    image = tokenizer["added_tokens"][-1]
    for number, (content, flags) in enumerate(OWN_TOKENS.items(), start=image["id"] + 1):
        tokenizer["added_tokens"].append(image | {"id": number, "content": content} | flags)
    write_json(folder, "tokenizer.json", tokenizer)
    write_json(folder, "config.json", config | {"text_config": config["text_config"] | {"vocab_size": number + 20}})
    return range(image["id"] + 1, number + 1)


@pytest.mark.parametrize("prompt", OWN_PROMPTS)
def test_special_tokens_of_a_fine_tuned_model_are_recognised_as_in_transformers(tmp_path, prompt):
    from transformers import PaliGemmaProcessor as Reference

    own = write_own_tokens(tmp_path)
    processor, reference = PaliGemmaProcessor.from_pretrained(tmp_path), Reference.from_pretrained(tmp_path)
    assert [processor.tokenizer.token_to_id(token) for token in OWN_TOKENS] == list(own)
    notes = []
    ours = processor(picture(), prompt, prompt, notes=notes)
    assert_equal(ours, reference(images=picture(), text=f"<image>{prompt}", suffix=prompt, return_tensors="pt"))
    assert notes == [] and set(own) & set(ours["input_ids"][0].tolist())
    assert processor.decode(processor.encode(prompt)) == reference.tokenizer.decode(
        processor.encode(prompt), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def test_a_control_token_next_to_an_own_token_is_ordinary_text(tmp_path):
    own = write_own_tokens(tmp_path)
    processor, notes = PaliGemmaProcessor.from_pretrained(tmp_path), []
    ids = processor.encode("<mytask> <image><eos> x", notes)
    assert ids.count(own[0]) == 1 and not {processor.image_token_id, processor.eos_token_id} & set(ids)
    assert processor.decode(ids) == " <image><eos> x" and "<image>, <eos>" in notes[0].replace("<eos>, <image>", "<image>, <eos>")


def test_unused_ids_are_found_also_in_gaps_of_the_vocabulary(tmp_path):
    own = write_own_tokens(tmp_path)
    rows = own[-1] + 20
    assert PaliGemmaProcessor.from_pretrained(tmp_path).unused_ids(rows) == list(range(own[-1] + 1, rows))
    tokenizer = tokenizer_json()
    # <image> is in the BPE itself, and there is a gap after it.
    tokenizer["model"]["vocab"] |= {"<image>": tokenizer["added_tokens"][-1]["id"], "zz": rows - 1}
    write_json(tmp_path, "tokenizer.json", tokenizer)
    gapped = PaliGemmaProcessor.from_pretrained(tmp_path)
    assert gapped.unused_ids(rows) == list(range(gapped.image_token_id + 1, rows - 1))
    assert gapped.decode([rows - 1, rows - 2, *gapped.encode("a cat")]) == "zza cat"


@pytest.mark.parametrize("number", [10**6, 5])  # outside the embedding; the id of another token
def test_a_vocabulary_with_impossible_ids_is_refused(tmp_path, number):
    write_processor(tmp_path)
    tokenizer = tokenizer_json()
    tokenizer["model"]["vocab"]["zz"] = number
    write_json(tmp_path, "tokenizer.json", tokenizer)
    refusal(tmp_path, TokenizerError)


def test_merges_cannot_produce_a_control_token(tmp_path):
    tokenizer = tokenizer_json()
    vocab, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    config = write_processor(tmp_path)
    vocab["<image>"] = config["image_token_index"]
    for piece in ("<p", "<pa", "<pad"):
        vocab[piece] = len(vocab)
        merges.append([piece[:-1], piece[-1]])
    merges.append(["<pad", ">"])
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] != "<pad>"]
    write_json(tmp_path, "tokenizer.json", tokenizer)
    write_json(tmp_path, "config.json", config | {"text_config": {"vocab_size": 5000}})
    processor = PaliGemmaProcessor.from_pretrained(tmp_path)
    plain = processor.tokenizer.encode("a <pad> b", add_special_tokens=False).ids
    assert processor.pad_token_id in plain  # the tokenizer alone would produce it
    assert processor.pad_token_id not in processor.encode("a <pad> b")
    assert processor.decode(processor.encode("a <pad> b")) == "a <pad> b"


@pytest.mark.parametrize("is_special", [True, False])
def test_locations_and_codes_are_single_tokens_whether_special_or_not(tmp_path, is_special):
    config = write_processor(tmp_path)
    tokenizer = tokenizer_json()
    for token in tokenizer["added_tokens"]:
        if token["content"].startswith(("<loc", "<seg")):
            token["special"] = is_special
    write_json(tmp_path, "tokenizer.json", tokenizer)
    processor = PaliGemmaProcessor.from_pretrained(tmp_path)
    text = "".join(LOCATION_TOKENS + CODE_TOKENS)
    ids = processor.encode(text)
    assert ids == list(range(config["image_token_index"] - 1152, config["image_token_index"]))
    assert processor.decode(ids) == text


def test_gemmas_own_tokenizer_gets_the_missing_tokens_if_the_ids_agree(tmp_path, processor):
    config = write_processor(tmp_path)
    tokenizer = tokenizer_json()
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] not in ("<image>", *NAMES)]
    for token in NAMES:
        del tokenizer["model"]["vocab"][token]
    write_json(tmp_path, "tokenizer.json", tokenizer)
    prompt = "detect <loc0007> cat <seg003>"
    assert PaliGemmaProcessor.from_pretrained(tmp_path).encode(prompt) == processor.encode(prompt)
    write_json(tmp_path, "config.json", config | {"image_token_index": config["image_token_index"] - 1})
    with pytest.raises(TokenizerError, match="different models"):
        PaliGemmaProcessor.from_pretrained(tmp_path)


NAMES = set(LOCATION_TOKENS + CODE_TOKENS)


# Text from ids


def test_decode_keeps_locations_and_drops_control_tokens(processor):
    ids = processor(picture(), "detect red car", "<loc0001><loc0002><loc0003><loc0004> red car")["input_ids"][0]
    assert processor.decode(ids) == "detect red car\n<loc0001><loc0002><loc0003><loc0004> red car"
    assert processor.decode([]) == ""
    assert processor.decode([processor.vocab_size, 10**9, -100]) == ""  # ids without a token, and the label -100


def test_a_character_of_several_tokens_is_returned_whole(processor):
    ids = processor.encode("a\U0001f600\U0001f469b")
    stream = processor.stream()
    assert [stream.put(number) for number in ids] == ["a", "", "", "", "\U0001f600", "", "", "", "\U0001f469", "b"]
    assert stream.end() == ""


def test_an_answer_that_ends_within_a_character_ends_with_a_replacement_character(processor):
    ids = processor.encode("a\U0001f600")[:-1]
    stream = processor.stream()
    assert "".join(stream.put(number) for number in ids) == "a"
    assert stream.end() == "\ufffd"
    assert processor.decode(ids) == "a\ufffd"


def test_an_incomplete_character_becomes_a_replacement_character_before_the_next_token(processor):
    first, second, *_ = processor.encode("\U0001f600")
    (letter,) = processor.encode("a")
    assert processor.decode([letter, first, second, letter]) == "a\ufffda"
    whole = processor.encode("\U0001f600")
    assert processor.decode([*whole, first, letter]) == "\U0001f600\ufffda"  # the library would lose the complete character, too


def test_control_tokens_within_a_character_are_ignored(processor):
    first, *rest = processor.encode("\U0001f600")
    assert processor.decode([first, processor.pad_token_id, *rest]) == "\U0001f600"


@settings(max_examples=100)
@given(st.text(max_size=60))
@example(" leading and trailing ")
@example("<image><bos></s><0x41> <loc0001><loc1024>")
@example("\r\n\n\n\t \x00 e\u0301 \u200d \ufffd \ufeff")
def test_any_text_is_decoded_to_itself_piece_by_piece(processor, text):
    ids = processor.encode(text)
    stream = processor.stream()
    pieces = [stream.put(number) for number in ids]
    expected = text.replace("▁", " ")  # Gemma writes a space like this and cannot distinguish the two
    assert "".join(pieces) + stream.end() == processor.decode(ids) == expected
    assert processor.control_ids.isdisjoint(ids)
    assert all(piece in expected for piece in pieces)


@settings(max_examples=100)
@given(st.data())
def test_any_ids_give_the_same_text_decoded_at_once_and_as_a_stream(processor, data):
    ids = data.draw(st.lists(st.one_of(st.integers(0, processor.vocab_size + 5), st.integers(11, 266)), max_size=30))
    stream = processor.stream()
    text = "".join(stream.put(number) for number in ids) + stream.end()
    assert text == processor.decode(ids) == processor.decode(torch.tensor(ids, dtype=torch.int64))
    theirs = processor.tokenizer.decode([n for n in ids if n not in processor.control_ids], skip_special_tokens=False)
    if "\ufffd" not in theirs:  # invalid bytes: the library replaces the whole run of bytes, we only the invalid ones
        assert text == theirs


# Tokenizer files


def change(folder: Path, name: str, **changes: object) -> None:
    write_json(folder, name, json.loads((folder / name).read_text()) | changes)


def refusal(folder: Path, error: type = TokenizerError) -> str:
    with pytest.raises(error) as caught:
        PaliGemmaProcessor.from_pretrained(folder)
    assert caught.value.code == 4
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_error_for_a_missing_tokenizer_names_both_files(tmp_path):
    write_processor(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    assert "neither tokenizer.json nor tokenizer.model" in refusal(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    assert "save_pretrained" in refusal(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"model": {"type": "BPE"}}', "\0\0", '{"a": 1,\n "b": }', "\ud800"]
)
def test_a_broken_tokenizer_json_is_refused(tmp_path, text):
    write_processor(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    message = refusal(tmp_path)
    assert "tokenizer.json" in message
    assert "\n" not in text or "tokenizer.json:2:7" in message


@settings(max_examples=40)
@given(data=st.data())
def test_a_damaged_tokenizer_json_raises_nothing_but_our_errors(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    write_processor(folder, num_words=1)
    content = bytearray((folder / "tokenizer.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 127))
    (folder / "tokenizer.json").write_bytes(content)
    try:
        PaliGemmaProcessor.from_pretrained(folder).encode("caption en")
    except TokenizerError:
        pass


def test_a_vocabulary_larger_than_the_embedding_is_refused_with_numbers(tmp_path):
    config = write_processor(tmp_path)
    size = config["text_config"]["vocab_size"]
    write_json(tmp_path, "config.json", config | {"text_config": {"vocab_size": size - 1}})
    message = refusal(tmp_path)
    assert f"{size} tokens" in message and f"{size - 1} rows" in message
    write_json(tmp_path, "config.json", config | {"text_config": {"vocab_size": size + 63}})
    assert PaliGemmaProcessor.from_pretrained(tmp_path).vocab_size == size


def test_another_models_tokenizer_is_refused_by_its_structure(tmp_path):
    config = write_processor(tmp_path)
    tokenizer = tokenizer_json()
    vocab = tokenizer["model"]["vocab"]
    vocab["<loc0003>"], vocab["<loc0004>"] = vocab["<loc0004>"], vocab["<loc0003>"]
    for token in tokenizer["added_tokens"]:
        token["id"] = vocab.get(token["content"], token["id"])
    write_json(tmp_path, "tokenizer.json", tokenizer)
    assert "the ids of the <loc> tokens are not consecutive" in refusal(tmp_path)
    llama = tokenizer_json()
    llama["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, llama["normalizer"]]}
    write_json(tmp_path, "tokenizer.json", llama)
    assert "Use the tokenizer.json of a PaliGemma checkpoint." in refusal(tmp_path)
    write_json(tmp_path, "tokenizer.json", tokenizer_json())
    for name in ("image_token_index", "bos_token_id", "eos_token_id"):
        write_json(tmp_path, "config.json", config | {name: 77})
        assert "different models" in refusal(tmp_path)
    write_json(tmp_path, "config.json", {key: value for key, value in config.items() if key != "image_token_index"})
    assert "image_token_index" in refusal(tmp_path, CheckpointError)


@pytest.mark.parametrize("settings", [{"pad_token": "<eos>"}, {"pad_token": "<nothing>"}, {"pad_token": None}])
@pytest.mark.parametrize("configured", [0, 1, 77, None])
def test_any_token_may_pad(tmp_path, processor, settings, configured):
    write_processor(tmp_path)
    change(tmp_path, "tokenizer_config.json", **settings)
    change(tmp_path, "config.json", pad_token_id=configured)
    other = PaliGemmaProcessor.from_pretrained(tmp_path)
    prompts, answers = ["a", "some more letters"], ["b", "c d"]
    ours, plain = other(None, prompts, answers), processor(None, prompts, answers)
    is_token = plain["attention_mask"].bool()
    assert torch.equal(ours["attention_mask"], plain["attention_mask"]) and torch.equal(ours["labels"], plain["labels"])
    assert torch.equal(ours["input_ids"][is_token], plain["input_ids"][is_token])
    assert set(ours["input_ids"][~is_token].tolist()) == {0 if settings["pad_token"] is None else 1}


def test_ids_may_be_in_generation_config_or_missing(tmp_path, processor):
    config = write_processor(tmp_path)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        del config[name]
    write_json(tmp_path, "config.json", config)
    assert PaliGemmaProcessor.from_pretrained(tmp_path).eos_token_id == processor.eos_token_id
    write_json(tmp_path, "generation_config.json", {"eos_token_id": [107, 1]})
    assert PaliGemmaProcessor.from_pretrained(tmp_path).eos_token_id == processor.eos_token_id
    write_json(tmp_path, "generation_config.json", {"eos_token_id": 107})
    assert "gives <eos> the id 1" in refusal(tmp_path)
    write_json(tmp_path, "config.json", config | {"eos_token_id": 1})  # generation may stop at another id
    assert PaliGemmaProcessor.from_pretrained(tmp_path).eos_token_id == processor.eos_token_id


def test_names_of_the_tokens_come_from_tokenizer_config(tmp_path):
    write_processor(tmp_path)
    change(tmp_path, "tokenizer_config.json", eos_token={"content": "<mask>", "special": True})
    change(tmp_path, "config.json", eos_token_id=4)
    assert PaliGemmaProcessor.from_pretrained(tmp_path).eos_token_id == 4
    (tmp_path / "tokenizer_config.json").unlink()
    change(tmp_path, "config.json", eos_token_id=1)
    assert PaliGemmaProcessor.from_pretrained(tmp_path).eos_token_id == 1


def test_settings_for_eos_truncation_and_padding_are_ignored(tmp_path, processor):
    write_processor(tmp_path)
    change(tmp_path, "tokenizer_config.json", add_bos_token=False, add_eos_token=True)
    padding = {"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0}
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    change(tmp_path, "tokenizer.json", padding=padding | {"pad_token": "<pad>"}, truncation=truncation)
    other = PaliGemmaProcessor.from_pretrained(tmp_path)
    assert_equal(other(None, "a b c d", "e f"), processor(None, "a b c d", "e f"))


# The other files


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": {"height": 56, "width": 56}}, "asks for pictures of"),
        ({"size": {"height": 28, "width": 14}}, "asks for pictures of"),
        ({"size": {"shortest_edge": 28}}, "asks for pictures of"),
        ({"size": None}, "asks for pictures of"),
        ({"image_seq_length": 256}, "has 256 tokens per picture"),
        ({"resample": 2}, "'resample': 2"),
        ({"do_resize": False}, "'do_resize': False"),
        ({"do_normalize": False}, "'do_normalize': False"),
        ({"do_center_crop": True}, "'do_center_crop': True"),
        ({"do_pad": True}, "'do_pad': True"),
        ({"do_resize": 0}, "'do_resize': 0"),
        ({"do_rescale": "no"}, "'do_rescale': 'no'"),
        ({"do_normalize": []}, "'do_normalize': []"),
        ({"resample": 3.0}, "'resample': 3.0"),
        ({"resample": [3]}, "'resample': [3]"),
        ({"image_seq_length": [[4]]}, "has [[4]] tokens"),
        ({"image_seq_length": 10**400}, "tokens per picture"),
        ({"size": [[28]] * 10_000}, "asks for pictures of [["),
        ({"image_mean": "x"}, "image_mean is 'x'. A number"),
        ({"image_mean": True}, "image_mean is True"),
        ({"image_mean": float("nan")}, "image_mean is nan"),
        ({"image_mean": [0.5, 0.5, float("inf")]}, "image_mean is [0.5, 0.5, inf]"),
        ({"image_mean": [0.5, [0.5], 0.5]}, "image_mean is [0.5, [0.5], 0.5]"),
        ({"image_std": [0.5, 0.5]}, "image_std is [0.5, 0.5]"),
        ({"image_std": 0}, "Numbers above 0"),
        ({"image_std": 1e-300}, "Numbers above 0"),
        ({"image_std": [0.5, 0.5, -1]}, "Numbers above 0"),
        ({"rescale_factor": [1, 1, 1]}, "rescale_factor is [1, 1, 1]"),
        ({"rescale_factor": None}, "rescale_factor is None"),
        ({"rescale_factor": [[1], [2]]}, "rescale_factor is [[1], [2]]"),
        ({"rescale_factor": 10**400}, "rescale_factor is 1000"),
        ({"rescale_factor": float("inf")}, "rescale_factor is inf"),
        ({"rescale_factor": {"a": 1}}, "rescale_factor is {'a': 1}"),
    ],
)
def test_image_settings_that_contradict_the_model_or_are_not_implemented_are_refused(tmp_path, changes, words):
    write_processor(tmp_path)
    change(tmp_path, "preprocessor_config.json", **changes)
    message = refusal(tmp_path, CheckpointError)
    assert words in message and len(message) < 500


def test_files_of_an_adapter_replace_those_of_its_base(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    config = write_processor(base, num_words=1)
    config["text_config"]["vocab_size"] += 64
    write_json(base, "config.json", config)
    write_json(adapter, "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": str(base)})
    prompt = "<mytask> x"
    plain = PaliGemmaProcessor.from_pretrained(base)
    table = plain.pixel_table
    assert PaliGemmaProcessor.from_pretrained(adapter)(None, prompt)["input_ids"].equal(plain(None, prompt)["input_ids"])

    content = tokenizer_json(1)
    last = content["added_tokens"][-1]
    content["added_tokens"].append(last | {"id": last["id"] + 1, "content": "<mytask>"})
    write_json(adapter, "tokenizer.json", content)
    own = PaliGemmaProcessor.from_pretrained(adapter)
    assert content["added_tokens"][-1]["id"] in own(None, prompt)["input_ids"][0]
    assert (own.pixel_table == table).all()
    write_json(adapter, "processor_config.json", {"image_processor": {"image_mean": [0.1, 0.2, 0.3]}})
    assert PaliGemmaProcessor.from_pretrained(adapter).pixel_table[0, 0] == np.float32(-0.1) / np.float32(0.5)


def test_an_error_names_the_file_that_was_read(tmp_path):
    write_processor(tmp_path, num_words=1)
    for content, says in (({"size": 224}, "asks for pictures of 224"), ({"rescale_factor": "1"}, "rescale_factor is '1'")):
        write_json(tmp_path, "processor_config.json", {"image_processor": content})
        with pytest.raises(CheckpointError, match=f"{tmp_path / 'processor_config.json'}:? {says}"):
            PaliGemmaProcessor.from_pretrained(tmp_path)


def test_a_large_invalid_tokenizer_json_is_not_parsed_in_python(tmp_path, monkeypatch):
    write_processor(tmp_path, num_words=1)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "junk": [' + "[]," * 1000 + "1]")
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 2000)  # parsed lists take 25 times as much memory
    monkeypatch.setattr(json, "loads", None)
    with pytest.raises(TokenizerError, match="is not a tokenizer: .* at line 1 column"):
        read_tokenizer(tmp_path)


def test_without_preprocessor_config_the_size_comes_from_config(tmp_path):
    config = write_processor(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    assert PaliGemmaProcessor.from_pretrained(tmp_path).image_size == SIDE
    write_json(tmp_path, "config.json", config | {"vision_config": {"patch_size": 14}})  # as on the hub, 224 pixels
    processor = PaliGemmaProcessor.from_pretrained(tmp_path)
    assert (processor.image_size, processor.num_image_tokens) == (224, 256)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vision_config": None}, "vision_config is None"),
        ({"text_config": []}, "text_config is []"),
        ({"text_config": {"vocab_size": "many"}}, "vocab_size is 'many'"),
        ({"vision_config": {"image_size": 30}}, "does not divide"),
        ({"vision_config": {"image_size": -28}}, "image_size is -28"),
        ({"vision_config": {"image_size": 28, "patch_size": 0}}, "patch_size is 0"),
    ],
)
def test_an_invalid_config_is_refused(tmp_path, changes, words):
    write_processor(tmp_path)
    change(tmp_path, "config.json", **changes)
    assert words in refusal(tmp_path, CheckpointError)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "generation_config.json"])
@pytest.mark.parametrize(("text", "words"), [(b'{"a":\n 1,}', ":2:"), (b"[]", "a list"), (b'"\xff"', "is not UTF-8")])
def test_settings_that_are_no_json_object_are_refused(tmp_path, name, text, words):
    write_processor(tmp_path)
    (tmp_path / name).write_bytes(text)
    message = refusal(tmp_path, CheckpointError)
    assert name in message and re.search(words, message)


JUNK = st.sampled_from(
    [
        None, True, -1, 0, 3, 1e99, 10**400, float("inf"), float("nan"), [[1], [2]], "", "x", [], [None], {}, {"a": []},
        {"content": 3}, {"height": [], "width": []},
    ]
)  # fmt: skip
KEYS = {
    "config.json": ["vision_config", "text_config", "image_token_index", "bos_token_id", "eos_token_id", "pad_token_id"],
    "generation_config.json": ["eos_token_id", "bos_token_id", "pad_token_id"],
    "preprocessor_config.json": ["size", "resample", "image_mean", "image_std", "rescale_factor", "image_seq_length", "do_pad"],
    "processor_config.json": ["image_processor"],
    "tokenizer_config.json": ["bos_token", "eos_token", "pad_token"],
}


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_settings_of_any_type_raise_nothing_but_our_errors(tmp_path, data):
    for name in KEYS:  # files of the previous example
        (tmp_path / name).unlink(missing_ok=True)
    config = write_processor(tmp_path, num_words=1)
    name = data.draw(st.sampled_from(sorted(KEYS)))
    key, value = data.draw(st.sampled_from(KEYS[name])), data.draw(JUNK)
    if name == "processor_config.json":
        (tmp_path / "preprocessor_config.json").unlink()
    part = data.draw(st.sampled_from(["text_config", "vision_config", None]))
    inner = data.draw(st.sampled_from(["vocab_size", "image_size", "patch_size", "bos_token_id"]))
    changes = {key: value} if name != "config.json" or part is None else {part: config[part] | {inner: value}}
    write_json(tmp_path, name, (config if name == "config.json" else {}) | changes)
    try:
        PaliGemmaProcessor.from_pretrained(tmp_path)
    except (CheckpointError, TokenizerError) as error:
        assert "\n" not in str(error)


def test_a_missing_config_is_named(tmp_path):
    assert "config.json" in refusal(tmp_path, CheckpointError)
    assert "there is no folder" in refusal(tmp_path / "nowhere", CheckpointError)


# Cost


def test_importing_the_processor_imports_neither_torch_nor_transformers():
    code = (
        "import sys; from paligemma import processing_paligemma; processing_paligemma.load_image('examples/cat.png'); "
        "print([name for name in ('torch', 'transformers', 'ssl', 'http.client') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


def test_the_tiny_tokenizer_is_of_the_size_it_says(tmp_path):
    ids = write_tokenizer(tmp_path, num_words=20)
    assert ids["image_token_index"] == ids["vocab_size"] - 1 < tokenizer_json(200)["added_tokens"][-1]["id"]


# Tokenizers of other forms


def part(name, **value):
    return lambda tokenizer: tokenizer.update({name: value})


def model(**values):
    return lambda tokenizer: tokenizer["model"].update(values)


@pytest.mark.parametrize(
    "change",
    [
        model(continuing_subword_prefix="##"),
        model(continuing_subword_prefix="é", merges=["a b"]),
        model(end_of_word_suffix="</w>"),
        model(dropout=0.5),
        model(byte_fallback=False),
        model(type="WordLevel"),
        model(type="Unigram", vocab=[["<unk>", 0.0], ["a", -1.0]], unk_id=0),
        part("normalizer", type="Precompiled"),
        part("normalizer", type="Sequence", normalizers=[{"type": "Precompiled", "precompiled_charsmap": 1}]),
        part("normalizer", type="Replace", pattern={"Regex": "(a+)+$"}, content="x"),
        part("normalizer", type="Replace", pattern={"String": "a"}, content="aa"),
        part("normalizer", type="Lowercase"),
        part("pre_tokenizer", type="Split", pattern={"Regex": "(a+)+$"}, behavior="Isolated", invert=False),
        part("pre_tokenizer", type="Split", pattern={"String": "t"}, behavior="Removed", invert=False),
        part("pre_tokenizer", type="ByteLevel", add_prefix_space=True, trim_offsets=True, use_regex=True),
        part("post_processor", type="ByteLevel", add_prefix_space=True, trim_offsets=True, use_regex=True),
    ],
)
def test_a_tokenizer_with_other_components_is_refused_in_one_line_and_nothing_is_printed(tmp_path, change, capfd):
    write_processor(tmp_path)
    tokenizer = tokenizer_json()
    change(tokenizer)
    write_json(tmp_path, "tokenizer.json", tokenizer)
    message = refusal(tmp_path, TokenizerError)
    assert "tokenizer.json" in message and len(message) < 600
    assert capfd.readouterr() == ("", "")  # a panic in Rust would be printed


def test_a_name_hidden_in_escapes_does_not_panic_either(tmp_path, capfd):
    write_processor(tmp_path)
    tokenizer = tokenizer_json()
    tokenizer["model"]["continuing_subword_prefix"] = "##"
    text = json.dumps(tokenizer).replace("continuing_subword_prefix", "continuing_subword\\u005fprefix")
    (tmp_path / "tokenizer.json").write_text(text)
    assert "continuing_subword_prefix" in refusal(tmp_path, TokenizerError)
    assert capfd.readouterr().err == ""


def test_suspicious_names_among_the_tokens_are_accepted(tmp_path):
    write_processor(tmp_path)
    tokenizer = tokenizer_json()
    for token in ("Precompiled", "continuing_subword_prefix"):
        tokenizer["added_tokens"].append(tokenizer["added_tokens"][-1] | {"content": token, "special": False})
    write_json(tmp_path, "tokenizer.json", tokenizer)
    change(tmp_path, "config.json", text_config={"model_type": "gemma", "vocab_size": 1800})
    processor = PaliGemmaProcessor.from_pretrained(tmp_path)
    assert processor.decode(processor.encode("a Precompiled b")) == "a Precompiled b"


# Long texts


class Counted:
    """A tokenizer that counts the characters that it is given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.characters = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def encode(self, text, **options):
        self.characters += len(text)
        return self.tokenizer.encode(text, **options)


LETTERS = ["\U0001f600", " ", "a", "cat ", "\n", "<loc0001>", "<image>", "<", "a<loc0001>", "<seg001>x", "é"]


@pytest.mark.parametrize("letters", LETTERS)
def test_the_work_for_a_long_text_is_bounded(folder, letters):
    processor = PaliGemmaProcessor.from_pretrained(folder)
    processor.context, text = 200, f"x{letters * (1_000_000 // len(letters))}x"
    counted = processor.tokenizer = Counted(processor.tokenizer)
    with pytest.raises(PromptError, match="characters, but"):
        processor(None, text)
    assert counted.characters == 0
    short = processor.shorten(text, 150)
    assert text.startswith(short) and 0 < len(processor.encode(short)) <= 150
    assert counted.characters < 3 * 150 * processor.longest_token


@pytest.mark.parametrize("text", [*PROMPTS, *LETTERS, "a  <seg001><seg0011> b<loc0001>", "cat " * 50])
def test_shorten_keeps_as_many_tokens_as_fit(processor, text):
    ids = processor.encode(text)
    assert processor.shorten(text, len(ids)) == text and processor.shorten(text, 0) == ""
    for count in range(1, len(ids)):
        short = processor.shorten(text, count)
        assert text.startswith(short) and count - 4 < len(processor.encode(short)) <= count  # a character has up to 4 bytes


# Texts of other types, and saving


def test_a_label_may_be_a_number_and_a_prompt_an_array(processor):
    texts = [[3, 2.5, np.int64(7), np.float32(0.1), np.str_("x"), "y"], ["3", "2.5", "7", "0.1", "x", "y"]]
    ours, expected = (processor(None, ["count"] * 6, suffixes) for suffixes in texts)
    assert_equal(ours, expected)
    for label in (3, torch.tensor(3), np.array(3)):
        assert_equal(processor(picture(), "count", label), processor(picture(), "count", "3"))
    for prompts in (np.array(["a", "cat"]), ("a", "cat"), (text for text in ("a", "cat"))):
        assert_equal(processor(picture(), prompts), processor(picture(), ["a", "cat"]))
    for label in (True, np.bool_(True), math.nan, math.inf, 10**5000, b"x", {"a": 1}, {"a"}, 1j, None):
        with pytest.raises(PromptError, match="a suffix has the type "):
            processor(None, ["count"], [label])


@pytest.mark.parametrize("source", ["hub", "own tokens", "no preprocessor", "transformers 5"])
def test_a_saved_processor_is_complete_for_us_and_for_transformers(tmp_path, source):
    from transformers import AutoProcessor

    first, second = tmp_path / "first", tmp_path / "deep" / "second"
    first.mkdir()
    if source == "own tokens":
        write_own_tokens(first)
    else:
        write_processor(first, image_size=SIDE)
    means = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.2, 0.1]}
    if source == "no preprocessor":
        (first / "preprocessor_config.json").unlink()
    elif source == "hub":
        change(first, "preprocessor_config.json", **means)
    elif source == "transformers 5":
        change(first, "preprocessor_config.json", **means)
        AutoProcessor.from_pretrained(first).save_pretrained(tmp_path / "five")
        (tmp_path / "five" / "config.json").write_bytes((first / "config.json").read_bytes())
        first = tmp_path / "five"
        assert not (first / "preprocessor_config.json").exists()
    ours = PaliGemmaProcessor.from_pretrained(first)
    ours.save_pretrained(second)
    (second / "config.json").write_bytes((first / "config.json").read_bytes())
    again, theirs = PaliGemmaProcessor.from_pretrained(second), AutoProcessor.from_pretrained(second)
    prompt = "detect <mytask> red car ; é\U0001f600 <loc0007>"
    expected = ours(picture(), prompt, "x")
    assert_equal(again(picture(), prompt, "x"), expected)
    assert_equal(expected, theirs(images=picture(), text=f"<image>{prompt}", suffix="x", return_tensors="pt"))


def test_a_processor_that_cannot_be_saved_says_so(processor, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be made"):
        processor.save_pretrained(tmp_path / "file" / "folder")
    with pytest.raises(OutputError, match="cannot be made"):
        processor.save_pretrained("a\0b")
