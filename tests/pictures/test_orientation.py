"""A picture with an orientation tag is rotated once in every program: the model gets the pixels of the upright picture."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from paligemma import inference
from paligemma.checkpoints import weights
from paligemma.errors import ImageError
from paligemma.learning import evaluation, preview
from paligemma.learning.dataset import Examples, read_split
from paligemma.objects import drawing
from paligemma.pictures import folders, images
from paligemma.pictures.images import load_image
from paligemma.processing_paligemma import PaliGemmaProcessor
from paligemma.programs import annotate, commandline, finetune
from paligemma.tasks import Annotator, Request
from tests.tiny_checkpoint import make_checkpoint

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "paligemma" / "bundled"
T = Image.Transpose
TURNS = {  # the operation on the stored picture, by the EXIF standard
    1: (),
    2: (T.FLIP_LEFT_RIGHT,),
    3: (T.ROTATE_180,),
    4: (T.FLIP_TOP_BOTTOM,),
    5: (T.FLIP_LEFT_RIGHT, T.ROTATE_90),
    6: (T.ROTATE_270,),
    7: (T.FLIP_LEFT_RIGHT, T.ROTATE_270),
    8: (T.ROTATE_90,),
}
KINDS = {"JPEG": {"quality": 90}, "PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}}
CASES = [(kind, number) for kind in KINDS for number in TURNS]


def stored(seed: int = 0) -> Image.Image:
    """A picture without symmetry, wider than high."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 14, 3), dtype=np.uint8)).resize((42, 27))


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **KINDS[kind] | options)
    return buffer.getvalue()


def tag(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def upright(kind: str, number: int, seed: int = 0) -> Image.Image:
    """The expected picture: the file without a tag, decoded by Pillow and rotated here."""
    image = Image.open(io.BytesIO(saved(stored(seed), kind))).convert("RGB")
    for turn in TURNS[number]:
        image = image.transpose(turn)
    return Image.fromarray(np.asarray(image))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("orientation") / "model", context=512)


@pytest.fixture(scope="module")
def processor(model):
    return PaliGemmaProcessor.from_pretrained(model)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a different picture for each case and a JSONL file about them; and {file name: upright picture}."""
    folder, pictures, lines = tmp_path_factory.mktemp("files"), {}, []
    for seed, (kind, number) in enumerate(CASES):
        name = f"{seed:02d}.{kind.lower()}" if kind != "JPEG" else f"{seed:02d}.jpg"
        (folder / name).write_bytes(saved(stored(seed), kind, exif=tag(number)))
        pictures[name] = upright(kind, number, seed)
        lines.append({"image": name, "prefix": f"caption {seed}", "suffix": "<loc0100><loc0200><loc0300><loc0400> x"})
    (folder / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder, pictures


@pytest.fixture
def seen(monkeypatch):
    """The pixel values of each picture that the model gets, in order."""
    rows, pixels = [], PaliGemmaProcessor.pixels

    def record(*given: object, **options: object) -> torch.Tensor:
        values = pixels(*given, **options)
        rows.extend(values)
        return values

    monkeypatch.setattr(PaliGemmaProcessor, "pixels", record)
    return rows


def expected(processor: PaliGemmaProcessor, pictures: dict) -> list[torch.Tensor]:
    return list(processor.pixels(list(pictures.values())))


def same(ours: list, theirs: list) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


# One picture


@pytest.mark.parametrize(("kind", "number"), CASES)
def test_a_file_an_opened_file_and_a_turned_picture_give_the_pixels_of_the_upright_one(kind, number, processor):
    data, right = saved(stored(), kind, exif=tag(number)), upright(kind, number)
    values = processor.pixels([right])
    loaded = load_image(data)
    assert np.array_equal(np.asarray(loaded), np.asarray(right))
    again = load_image(loaded)
    assert again is loaded and (loaded.info, loaded.format, dict(loaded.getexif())) == ({}, None, {})
    opened = Image.open(io.BytesIO(data))
    for picture in (data, loaded, opened, Image.open(io.BytesIO(data)).convert("RGB"), ImageOps.exif_transpose(opened)):
        if kind == "TIFF" and isinstance(picture, Image.Image) and picture.format is None and picture is not loaded:
            assert picture.size == right.size  # Pillow has rotated it
        assert torch.equal(processor.pixels([picture]), values)
    unturned = load_image(data, ignore_exif=True)
    assert np.array_equal(np.asarray(unturned), np.asarray(upright(kind, 1)))
    assert torch.equal(processor.pixels([unturned]), processor.pixels([upright(kind, 1)]))  # it is not rotated later either


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_drawings_of_an_opened_file_are_upright_too(kind):
    data = saved(stored(), kind, exif=tag(6))
    drawn = drawing.draw(Image.open(io.BytesIO(data)), [])
    assert np.array_equal(np.asarray(drawn), np.asarray(upright(kind, 6)))
    finished = load_image(data)
    assert drawing.draw(finished, []) is not finished


def xmp(number: int) -> bytes:
    return f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="{number}"/></x:xmpmeta>'.encode()


def text_chunk(name: str, text: str) -> PngInfo:
    info = PngInfo()
    info.add_itxt(name, text) if name.startswith("XML") else info.add_text(name, text, zip=True)
    return info


@pytest.mark.parametrize("number", [1, 3, 6, 8])
def test_xmp_and_the_raw_profile_of_a_png_count_as_exif_does(number, processor):
    exif = tag(number).tobytes()
    profile = f"\nexif\n{len(exif):8}\n{exif.hex()}\n"
    for kind, options in (
        ("JPEG", {"xmp": xmp(number)}),
        ("WEBP", {"xmp": xmp(number)}),
        ("PNG", {"pnginfo": text_chunk("XML:com.adobe.xmp", xmp(number).decode())}),
        ("PNG", {"pnginfo": text_chunk("Raw profile type exif", profile)}),
        ("JPEG", {"xmp": xmp(5), "exif": tag(number)}),  # EXIF is preferred
    ):
        data, values = saved(stored(), kind, **options), processor.pixels([upright(kind, number)])
        assert torch.equal(processor.pixels([data]), values)
        assert torch.equal(processor.pixels([load_image(data)]), values)
        assert torch.equal(processor.pixels([load_image(data, ignore_exif=True)]), processor.pixels([upright(kind, 1)]))
        assert torch.equal(processor.pixels([ImageOps.exif_transpose(Image.open(io.BytesIO(data)))]), values)


@pytest.mark.parametrize("ignored", [False, True])
def test_each_page_of_a_tiff_has_an_orientation_of_its_own(ignored):
    buffer = io.BytesIO()
    pages = [stored(), stored(1)]
    pages[0].save(buffer, "TIFF", save_all=True, append_images=pages[1:], tiffinfo={0x0112: 8})
    data = bytearray(buffer.getvalue())
    first = data.index(b"\x12\x01\x03\x00\x01\x00\x00\x00\x08")
    data[first + 8] = 1  # the first page is upright, the second is not
    for frame, number in ((0, 1), (1, 8)):
        right = upright("TIFF", 1 if ignored else number, seed=frame)
        assert np.array_equal(np.asarray(load_image(bytes(data), frame=frame, ignore_exif=ignored)), np.asarray(right))


def test_a_tag_that_is_no_orientation_turns_nothing(processor):
    for number in (0, 9, 65535):
        assert torch.equal(processor.pixels([saved(stored(), "PNG", exif=tag(number))]), processor.pixels([stored()]))


def test_a_finished_picture_keeps_what_it_was_read_with(processor, monkeypatch):
    """The processor once loaded such a picture again and refused it, although --max_pixels allowed it."""
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    data = saved(stored(), "PNG")
    with pytest.raises(ImageError, match="over the limit of 100"):
        processor.pixels([data])
    assert torch.equal(processor.pixels([load_image(data, max_pixels=9999)]), processor.pixels([stored()]))
    clear = stored().convert("RGBA")
    clear.putalpha(0)
    black = load_image(saved(clear, "PNG"), max_pixels=9999, background="black")
    assert torch.equal(processor.pixels([black]), processor.pixels([Image.new("RGB", (1, 1))]))


# The programs


def run(flags: type, program: object, *given: str) -> int:
    return commandline.run(flags, program, [*map(str, given)])


def test_inference_shows_the_model_upright_pictures(files, model, processor, seen, monkeypatch):
    folder, pictures = files
    monkeypatch.chdir(folder)
    right = expected(processor, pictures)
    seen.clear()
    flags = [f"--model_path={model}", "--max_tokens_to_generate=1"]
    classic = [f"--image_file_path={','.join(pictures)}", "--prompt=caption en"]
    assert run(inference.Flags, inference.program, *flags, *classic) == 0
    assert same(seen, right)
    seen.clear()
    assert run(inference.Flags, inference.program, "caption", *pictures, *flags) == 0
    assert same(seen, right)
    seen.clear()
    assert run(inference.Flags, inference.program, "caption", *pictures, *flags, "--ignore_exif") == 0
    shown = list(seen)
    assert same(shown, list(processor.pixels([load_image(folder / name, ignore_exif=True) for name in pictures])))


def test_annotate_shows_the_model_upright_pictures(files, model, processor, seen, tmp_path):
    folder, pictures = files
    right = expected(processor, pictures)
    seen.clear()
    output = tmp_path / "rows.jsonl"
    given = [folder, "--task=caption", f"--output={output}", f"--model_path={model}", "--max_tokens_to_generate=1"]
    assert run(annotate.Flags, annotate.program, *given) == 0
    assert same(seen, right)
    rows = {Path(row["image"]).name: row for row in map(json.loads, output.read_text().splitlines()) if "image" in row}
    assert {name: (row["width"], row["height"]) for name, row in rows.items()} == {n: p.size for n, p in pictures.items()}


def test_cluster_reads_as_annotate_does(files, processor):
    folder, pictures = files
    for name, right in pictures.items():
        loaded = folders.load(str(folder / name), processor.image_size)
        assert torch.equal(processor.pixels([loaded.picture]), processor.pixels([right])) and loaded.size == right.size


def test_finetune_learns_from_upright_pictures_and_previews_the_same(files, processor, seen, monkeypatch, tmp_path):
    folder, pictures = files
    right = expected(processor, pictures)
    seen.clear()
    split = read_split(folder / "lines.jsonl")
    for augment in ("none", "zoom"):
        examples = Examples(split, processor, augment=augment)
        batch = examples.batch([(0, i) for i in range(len(CASES))])
        alone = [load_image(examples[0, i][0]) for i in range(len(CASES))]
        assert torch.equal(batch["pixel_values"], processor.pixels(alone))
        if augment == "none":
            assert same(list(batch["pixel_values"]), right)
    drawn, draw = [], preview.drawing.draw
    monkeypatch.setattr(preview.drawing, "draw", lambda picture, objects: drawn.append(picture) or draw(picture, objects))
    preview.draw_preview(Examples(split, processor), None, tmp_path / "page.png")
    right = [np.asarray(picture) for picture in pictures.values()]
    assert drawn and all(any(np.array_equal(np.asarray(picture), other) for other in right) for picture in drawn)


def test_evaluation_asks_about_upright_pictures(files, model, processor, seen):
    folder, pictures = files
    right = expected(processor, pictures)
    seen.clear()
    examples = Examples(read_split(folder / "lines.jsonl"), processor)
    judge = evaluation.Judge(examples, None, batch_size=4, count=99, scores=["map"])
    judge.max_new_tokens = 1
    judge.ask(weights.load_model(model))
    assert same(seen, right)


def test_the_demo_model_finds_the_cross_where_it_is(tmp_path, capsys):
    """examples/shapes.png, stored sideways as by a phone. When it was rotated twice, its cross was at 80, 15."""
    picture = Image.open(ROOT / "examples" / "shapes.png").convert("RGB").transpose(T.ROTATE_90)
    picture.save(tmp_path / "phone.jpg", exif=tag(6), quality=95)
    flags = [f"--model_path={DEMO}", "--only_cpu"]
    assert run(inference.Flags, inference.program, "detect", tmp_path / "phone.jpg", "cross", *flags) == 0
    label, _, x_min, y_min, *_ = capsys.readouterr().out.split()
    assert label == "cross" and abs(float(x_min) - 14) < 3 and abs(float(y_min) - 243) < 3
    annotator = Annotator(weights.load_model(DEMO), PaliGemmaProcessor.from_pretrained(DEMO))
    with Image.open(tmp_path / "phone.jpg") as opened:
        [(_, result)] = annotator.run([Request(picture=opened, task="detect", text="cross")])
    box = result.parsed.objects[0].box
    assert abs(box.x_min * 448 - 14) < 3 and abs(box.y_min * 448 - 243) < 3


def test_finetune_reads_pictures_as_its_flags_say(files, tmp_path, monkeypatch):
    folder, shown = files[0], []
    monkeypatch.setattr(preview, "draw_preview", lambda examples, *_: shown.append(examples))
    Image.fromarray(np.array([[0, 4095], [2048, 1024]], dtype=np.uint16)).save(tmp_path / "12 bits.png")
    line = {"image": "12 bits.png", "prefix": "caption", "suffix": "x"}
    (tmp_path / "deep.jsonl").write_text(json.dumps(line))
    given = [f"--model_path={DEMO}", f"--output={tmp_path / 'run'}", "--preview"]
    assert run(finetune.Flags, finetune.program, f"--train={folder / 'lines.jsonl'}", "--ignore_exif", *given) == 0
    assert [shown[0][0, i][0].size for i in range(len(CASES))] == [stored().size] * len(CASES)
    assert run(finetune.Flags, finetune.program, f"--train={tmp_path / 'deep.jsonl'}", "--stretch", *given) == 0
    assert np.asarray(shown[1][0, 0][0])[:, :, 0].tolist() == [[0, 255], [128, 64]]
    assert run(finetune.Flags, finetune.program, f"--train={folder / 'lines.jsonl'}", "--max_pixels=9", *given) == 3
