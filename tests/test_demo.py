"""demo/: scenes and their annotations, the tokenizer, the measure, the packing of many questions, the codec, the checkpoint."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
DEMO, CHECKPOINT = ROOT / "demo", ROOT / "demo" / "checkpoint"
sys.path.insert(0, str(DEMO))

import codec  # noqa: E402
import evaluate  # noqa: E402
import masks  # noqa: E402
import outputs  # noqa: E402
import shapes  # noqa: E402
import tokenizer as demo_tokenizer  # noqa: E402
import train  # noqa: E402
from generation import generate  # noqa: E402
from processing_paligemma import PaliGemmaProcessor  # noqa: E402
from segmentation import CODE_WIDTH, Codebook, MaskCodec, load_codec  # noqa: E402
from weights import load_model  # noqa: E402

ANSWERED = ("caption", *evaluate.ANSWERS)
UNSEEN_SEED = 4711  # training used seeds below 100


def scene(index: int, seed: int = 7) -> tuple[shapes.Scene, np.random.Generator]:
    rng = np.random.default_rng([seed, index])
    return shapes.make_scene(rng), rng


def bins_of(suffix: str) -> list[list[int]]:
    """The boxes of an answer as they are said: y_min, x_min, y_max, x_max from 0 to 1023."""
    numbers = [int(number) for number in re.findall(r"<loc(\d{4})>", suffix)]
    return [numbers[i : i + 4] for i in range(0, len(numbers), 4)]


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Area that two masks share over area that they cover."""
    return float((a & b).sum() / (a | b).sum())


@pytest.fixture(scope="module")
def mask_codec() -> MaskCodec:
    return load_codec(shapes.CODEC)


@pytest.fixture(scope="module")
def processor() -> PaliGemmaProcessor:
    return PaliGemmaProcessor.from_pretrained(CHECKPOINT)


def test_a_seed_draws_the_same_pictures_and_another_seed_others(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        shapes.write(tmp_path / name, count=3, seed=seed, size=64)
    files = {name: sorted((tmp_path / name).iterdir()) for name in "abc"}
    content = {name: [file.read_bytes() for file in files[name]] for name in "abc"}
    assert [file.name for file in files["a"]] == ["000000.png", "000001.png", "000002.png", "annotations.jsonl"]
    assert content["a"] == content["b"]
    assert all(one != other for one, other in zip(content["a"], content["c"], strict=True))


def test_questions_do_not_depend_on_the_hashes_of_a_process():
    """A set of words has another order in each process; one in shapes.py once made two processes disagree."""
    code = "import numpy as np, shapes as s; rng = np.random.default_rng(0)\n"
    code += "print([s.ask(s.make_scene(rng), rng, list(s.QUESTIONS)) for _ in range(100)])"
    environments = ({"PYTHONHASHSEED": seed} for seed in ("1", "2"))
    runs = [subprocess.check_output([sys.executable, "-c", code], cwd=DEMO, env=environment) for environment in environments]
    assert runs[0] == runs[1] and len(runs[0]) > 5000


def test_annotations_name_pictures_beside_them_and_several_questions_each(tmp_path):
    shapes.write(tmp_path, count=4, seed=1, size=48)
    lines = [json.loads(line) for line in (tmp_path / "annotations.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(set(line) == {"image", "prefix", "suffix"} for line in lines)
    nothing = [line["prefix"].split()[0] for line in lines if not line["suffix"]]
    assert len(nothing) == 4 and set(nothing) <= {"detect", "segment"}  # one a picture asks for what is not there
    for name in {line["image"] for line in lines}:
        prefixes = [line["prefix"] for line in lines if line["image"] == name]
        assert (tmp_path / name).is_file() and len(prefixes) >= 6
        assert len(set(prefixes)) == len(prefixes)
    assert len({line["image"] for line in lines}) == 4


def test_the_program_answers_without_torch_and_refuses_nonsense():
    code = "import sys, shapes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=DEMO).returncode == 0
    refused = subprocess.run([sys.executable, "shapes.py", "--out", "x", "--size", "0"], cwd=DEMO, capture_output=True, text=True)
    assert refused.returncode == 2 and "--size" in refused.stderr


@pytest.mark.parametrize("kind", shapes.KINDS)
def test_a_box_bounds_the_pixels_of_its_shape(kind):
    size = 224
    shape = shapes.Shape(kind, "white", (255, 255, 255), x=0.3037, y=0.5511, side=0.2713)
    dark = shapes.Scene((shape,), "flat", ((0, 0, 0), (0, 0, 0)), 0.0, 0.0, 0)
    rows, columns = np.nonzero(np.array(shapes.draw(dark, size))[..., 0])
    drawn = np.array([rows.min(), columns.min(), rows.max() + 1, columns.max() + 1])
    # Edges fall between pixels, so a box may lie up to one inside of the pixels that show some of the shape.
    np.testing.assert_allclose(drawn, np.array(shape.box) * size, atol=1.01)


@pytest.mark.parametrize("kind", shapes.KINDS)
def test_a_silhouette_is_the_shape_that_is_drawn(kind):
    size = 224
    shape = shapes.Shape(kind, "white", (255, 255, 255), x=0.3037, y=0.5511, side=0.2713)
    dark = shapes.Scene((shape,), "flat", ((0, 0, 0), (0, 0, 0)), 0.0, 0.0, 0)
    drawn = np.array(shapes.draw(dark, size))[..., 0] > 127
    # PIL also fills the small pixels that an outline only grazes: a quarter of a pixel all around.
    assert overlap(shapes.silhouette(shape, size), drawn) > 0.965


def test_shapes_do_not_touch_and_stand_in_their_own_columns():
    for index in range(60):
        drawn, _ = scene(index)
        centres = [shape.center[0] for shape in drawn.shapes]
        assert (np.diff(centres) >= 0.08).all()
        for i, a in enumerate(drawn.shapes):
            assert min(a.box) >= 0 and max(a.box) <= 1
            for b in drawn.shapes[:i]:
                assert outputs.Box(*a.box).iou(outputs.Box(*b.box)) == 0


def test_every_answer_follows_from_the_scene():
    """Each question is answered a second time here, from its words alone."""
    checked = set()
    for index in range(150):
        drawn, rng = scene(index)
        there = drawn.shapes
        for prefix, suffix in shapes.ask(drawn, rng, list(shapes.QUESTIONS)):
            words = prefix.rstrip("?").removeprefix("answer en ").split()

            def named(words=tuple(words), there=there):
                kinds = {"crosses": "cross"} | {f"{kind}s": kind for kind in shapes.KINDS if kind != "cross"}
                colors = [word for word in words if word in shapes.COLORS]
                kind = [kinds.get(word, word) for word in words if kinds.get(word, word) in shapes.KINDS]
                return [s for s in there if (not colors or s.color in colors) and (not kind or s.kind in kind)]

            if prefix.startswith("answer en what"):
                (one,) = named()
                assert suffix == (one.color if "color" in words else one.kind)
            elif "many" in words:
                assert suffix == str(len(named()))
            elif "there" in words:
                assert suffix == ("yes" if named() else "no")
            elif "where" in words:
                (one,) = named()
                column, row = (np.digitize(v, [1 / 3, 2 / 3]) for v in one.center)
                table = [["top left", "top", "top right"], ["left", "center", "right"], ["bottom left", "bottom", "bottom right"]]
                assert suffix == table[row][column]
            elif prefix == "caption en":
                assert [word for word in suffix.replace(",", "").split() if word in shapes.KINDS] == [s.kind for s in there]
            elif prefix == "detect shape":
                np.testing.assert_allclose(bins_of(suffix), [np.array(s.box) * 1023 for s in there], atol=0.5 + 1e-6)
            elif not suffix:
                assert named() == []  # detect or segment of what is not there
            checked.add(words[0] + " " + words[1])
    assert len(checked) >= 8


def test_what_was_asked_before_there_were_masks_is_still_asked():
    """Measures of older checkpoints stay comparable: the first questions about a picture are those that they were asked."""
    drawn, rng = scene(5)
    asked = shapes.ask(drawn, rng, list(shapes.ASKED))
    assert asked[:-2] == [
        ("caption en", "a green circle, a purple circle and a blue square"),
        ("answer en what color is the square?", "blue"),
        ("answer en what shape is blue?", "square"),
        ("answer en how many circles are there?", "2"),
        ("answer en is there a green cross?", "no"),
        ("answer en where is the purple circle?", "center"),
        ("detect green circle ; blue square",
         "<loc0813><loc0130><loc1005><loc0322> green circle ; <loc0295><loc0626><loc0474><loc0806> blue square"),
        ("answer en how many shapes are there?", "3"),
        ("answer en is there a purple circle?", "yes"),
        ("detect square", "<loc0295><loc0626><loc0474><loc0806> square"),
    ]  # fmt: skip
    assert asked[-2][0].startswith("segment ") and asked[-1][1] == ""


def test_yes_and_no_are_asked_for_equally_often():
    rng = np.random.default_rng(0)
    said = [shapes.ask_exists(shapes.make_scene(rng), rng)[1] for _ in range(600)]
    assert 0.43 < said.count("yes") / len(said) < 0.57  # three and a half standard deviations


def test_a_segment_answer_is_boxes_with_masks_and_the_words_asked_for():
    kinds_seen = set()
    for index in range(40):
        drawn, rng = scene(index)
        prefix, suffix = shapes.ask_segment(drawn, rng)
        words = prefix.removeprefix("segment ").split(" ; ")
        meant = [shape for word in words for shape in drawn.shapes if word in ("shape", shape.kind, shape.name)]
        said = suffix.split(" ; ")
        assert len(said) == len(meant)
        for text, shape in zip(said, meant, strict=True):
            found = re.fullmatch(r"((?:<loc\d{4}>){4})((?:<seg\d{3}>){16}) ([a-z ]+)", text)
            assert found and found[3] in words
            assert bins_of(found[1])[0] == pytest.approx(np.array(shape.box) * 1023, abs=0.5)
            assert found[2] == shapes.mask_tokens(shape.kind)
            kinds_seen.add(shape.kind)
    assert kinds_seen == set(shapes.KINDS)


@pytest.mark.parametrize("kind", shapes.KINDS)
def test_the_codes_of_a_kind_are_its_silhouette(kind, mask_codec):
    shape = shapes.Shape(kind, "red", (255, 0, 0), x=0.21, y=0.4, side=0.33)
    codes = tuple(int(code) for code in re.findall(r"\d{3}", shapes.mask_tokens(kind)))
    mask = mask_codec.decode(torch.tensor([codes]))[0].numpy()
    box = outputs.Box(*shape.box)
    assert overlap(masks.paste(mask, box, 448, 448), shapes.silhouette(shape, 448)) > 0.93  # stars 0.94, the others 0.96 and more
    assert overlap(masks.paste(mask, box, 448, 448), shapes.silhouette(shape, 448).T) < 0.9  # nothing is in another place


@pytest.mark.parametrize(
    "text",
    ["answer en what color is the circle?", "a red circle, an orange star and a blue cross", "  two  spaces ", "naïve 狗 🐶\n",
     "<loc0000><loc1023><seg000><seg127> red square ; <loc0001>"],
)  # fmt: skip
def test_tokenizer_round_trip(text):
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_tokenizer_has_the_form_of_the_real_one_and_is_the_one_we_make():
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    ids = [tokenizer.token_to_id(token) for token in ("<pad>", "<eos>", "<bos>", "<unk>")]
    assert ids == [0, 1, 2, 3]
    first = tokenizer.token_to_id("<loc0000>")
    assert tokenizer.token_to_id("<loc1023>") == first + 1023
    assert tokenizer.token_to_id("<seg127>") == first + 1024 + 127
    assert tokenizer.token_to_id("<image>") == first + 1024 + 128 == tokenizer.get_vocab_size() - 1
    tokens = tokenizer.encode("answer en is there a red square?\n", add_special_tokens=False).tokens
    assert tokens == ["answer", "▁en", "▁is", "▁there", "▁a", "▁red", "▁square", "?", "\n"]
    assert tokenizer.encode("é", add_special_tokens=False).tokens == ["<0xC3>", "<0xA9>"]


def test_the_committed_tokenizer_is_the_one_we_make():
    committed = json.loads((CHECKPOINT / "tokenizer.json").read_text(encoding="utf-8"))
    assert json.loads(demo_tokenizer.make_tokenizer().to_str()) == committed


def test_every_word_of_the_demo_is_one_token(processor):
    for text in demo_tokenizer.corpus(scenes=30):
        words = text.replace("?", " ?").replace(",", " ,").split()
        assert len(processor.tokenizer.encode(text, add_special_tokens=False).ids) == len(words), text


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("<loc0000><loc0000><loc0512><loc0512> a ; <loc0600><loc0600><loc0900><loc0900> b", 1.0),
        ("<loc0600><loc0600><loc0900><loc0900> b ; <loc0000><loc0000><loc0512><loc0512> a", 1.0),  # order does not count
        ("<loc0000><loc0000><loc0512><loc0512> a", 0.5),  # one is missing
        ("<loc0000><loc0000><loc0512><loc0512> b ; <loc0600><loc0600><loc0900><loc0900> a", 0.0),  # labels count
        ("<loc0000><loc0000><loc0512><loc0256> a ; <loc0600><loc0600><loc0900><loc0900> b", 0.75),
        ("<loc0000><loc0000><loc0512><loc0512> a ; " * 3 + "<loc0600><loc0600><loc0900><loc0900> b", 1.0),  # repeats are one
        ("<loc0000><loc0000><loc0512><loc0512> a ; <loc0000><loc0000><loc0512><loc0511> a ; "
         "<loc0000><loc0000><loc0512><loc0510> a ; <loc0600><loc0600><loc0900><loc0900> b", 0.5),  # two too many
        ("", 0.0),
        ("<loc0512><loc0512><loc0000><loc0000> a", 0.5),  # turned around, and put in order
    ],
)
def test_objects_score(said, score):
    true = "<loc0000><loc0000><loc0512><loc0512> a ; <loc0600><loc0600><loc0900><loc0900> b"
    said, true = (outputs.read_text(text).objects for text in (said, true))
    assert evaluate.objects_score(said, true, evaluate.box_overlap) == pytest.approx(score)


def test_masks_are_scored_by_the_pixels_they_share():
    mask = np.zeros((4, 4), dtype=bool)
    mask[:2] = True
    box = outputs.Box(0, 0, 1, 1)
    true = [outputs.Found("a", box, mask=mask)]
    assert evaluate.objects_score(true, true, evaluate.mask_overlap) == 1
    assert evaluate.objects_score([outputs.Found("a", box, mask=mask.T)], true, evaluate.mask_overlap) == pytest.approx(4 / 12)
    assert evaluate.objects_score([outputs.Found("a", box)], true, evaluate.mask_overlap) == 0  # a box without a mask


def test_a_scene_says_what_detect_and_segment_should_find():
    for drawn, asked in evaluate.questions(count=30, seed=3):
        for question in asked:
            said = outputs.read_text(question.suffix).objects if question.task != "ask" else []
            assert [(one.label, one.box.bins()) for one in question.true] == [(one.label, one.bins) for one in said]
            assert all((one.mask is not None) == (question.task == "segment") for one in question.true)
            assert question.kind != "absent" or question.true == []
        assert any(question.task == "detect" for question in asked) and drawn.shapes


def boxed(y, score=None, expected=None):
    return outputs.Found("cat", outputs.Box(y, 0, y + 0.5, 1), score=score, expected=expected)


def test_scores_and_expected_values_count_where_they_are_right():
    """Three questions: a cat that is not there comes first; two that are, with boxes a tenth of their height off."""
    right = outputs.Box(0.2, 0, 0.7, 1)
    said = [[boxed(0.1, score=0.2)], [boxed(0.25, 0.9, right)], [boxed(0.25, 0.8, right)]]
    result = evaluate.detection(said, [[], [boxed(0.2)], [boxed(0.2)]])
    assert result["map_50"]["plain"] == pytest.approx(2 / 3, abs=0.01)  # precision of the last of three, at every recall
    assert result["map_50"]["scores"] == result["map_50"]["scores_and_expected"] == pytest.approx(1)
    assert result["map"]["scores"] == pytest.approx(0.7)  # an IoU of 9 / 11 passes seven of ten thresholds
    assert result["map"]["scores_and_expected"] == pytest.approx(1)
    assert result["curves"]["scores"]["0.50"] == [1.0] * 101
    assert result["bin_error"] == pytest.approx(0.025) and result["expected_error"] == 0
    assert (result["boxes"], result["true_boxes"], result["matched"]) == (3, 2, 2)


def test_a_box_counts_only_for_the_word_it_was_said_for():
    dog = outputs.Found("dog", outputs.Box(0.2, 0, 0.7, 1))
    assert evaluate.detection([[boxed(0.2)]], [[dog]])["map"]["plain"] == 0
    assert evaluate.detection([[]], [[dog]])["map"] == {"plain": 0, "scores": 0, "scores_and_expected": 0}


def evaluated(monkeypatch, capsys, *flags) -> tuple[list[str], dict, str]:
    """Lines, JSON and stderr of the program."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--count", "2", *flags])
    evaluate.main()
    out, err = capsys.readouterr()
    *lines, last = out.splitlines()
    return lines, json.loads(last), err


def test_evaluate_prints_a_line_a_measure_and_ends_with_json(monkeypatch, capsys):
    lines, result, _ = evaluated(monkeypatch, capsys)
    assert re.fullmatch(r"caption +\d+\.\d% of 2", lines[0])
    assert re.fullmatch(r"mAP +\d+\.\d% without scores, \d+\.\d% with scores, \d+\.\d% of expected boxes with scores", lines[-3])
    assert {"answer", "caption", "detect", "questions", "seed", "detection"} <= result.keys()
    assert len(result["detection"]["curves"]["plain"]["0.75"]) == 101


def test_evaluate_does_without_pycocotools(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    lines, result, err = evaluated(monkeypatch, capsys)
    assert "pip install pycocotools" in err and "detection" not in result and not any("mAP" in line for line in lines)


def test_the_figure_of_scores_is_what_its_script_draws(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "notes"))
    import boxes_figures

    committed = (boxes_figures.HERE / "scores.svg").read_text(encoding="utf-8")
    monkeypatch.setattr(boxes_figures, "HERE", tmp_path)
    boxes_figures.draw_scores()
    assert (tmp_path / "scores.svg").read_text(encoding="utf-8") == committed


def test_questions_about_one_picture_do_not_see_each_other():
    pack = train.Pack(*(torch.zeros(1, 5, dtype=torch.int64) for _ in range(7)))
    pack.question = torch.tensor([[1, 1, 1, 2, -1]])
    pack.is_prefix = torch.tensor([[True, True, False, True, False]])
    mask = train.packed_mask(pack, num_image_tokens=2)[0, 0].int()
    assert mask.tolist() == [
        [1, 1, 0, 0, 0, 0, 0],  # the picture
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],  # a question of two tokens
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0],  # and its answer
        [1, 1, 0, 0, 0, 1, 0],  # another question
        [1, 1, 0, 0, 0, 0, 1],  # padding
    ]


def test_a_packed_row_asks_for_each_answer_behind_its_question(processor):
    tokenizer = processor.tokenizer
    packer = train.Packer(tokenizer, num_image_tokens=64)
    pack = packer([[("color", "answer en what color is the star?", "red"), ("caption", "caption en", "a red star")]])
    text = [tokenizer.id_to_token(i) for i in pack.ids[0].tolist()]
    wanted = [tokenizer.id_to_token(i) if i >= 0 else "" for i in pack.targets[0].tolist()]
    first = ["<bos>", "answer", "▁en", "▁what", "▁color", "▁is", "▁the", "▁star", "?", "\n", "red"]
    assert text == [*first, "<bos>", "caption", "▁en", "\n", "a", "▁red", "▁star"]
    assert wanted == [*[""] * 9, "red", "<eos>", "", "", "", "a", "▁red", "▁star", "<eos>"]
    assert pack.position_ids[0].tolist() == [*range(65, 76), *range(65, 72)]
    assert pack.weights[0].sum().item() == pytest.approx(2)  # each answer counts as one


def test_the_codes_of_a_mask_weigh_as_much_as_its_box(processor):
    answer = "".join(f"<loc{i:04d}>" for i in range(4)) + "".join(f"<seg{i:03d}>" for i in range(16)) + " star"
    pack = train.Packer(processor.tokenizer, num_image_tokens=64)([[("segment", "segment star", answer)]])
    weights = pack.weights[0][pack.weights[0] > 0].tolist()
    assert weights == pytest.approx([0.1] * 4 + [0.025] * 16 + [0.1, 0.1])


def test_orthogonalised_matrices_move_all_directions_alike():
    torch.manual_seed(0)
    moved = train.Muon.orthogonalise(torch.randn(2, 24, 64))
    values = torch.linalg.svdvals(moved)
    assert 0.5 < values.min() and values.max() < 1.5  # the iteration aims at 0.7 to 1.2


# The codec


def test_the_codec_brings_masks_back_that_it_has_not_seen(mask_codec):
    rng = np.random.default_rng(UNSEEN_SEED)
    drawn = {kind: np.stack([codec.draw_mask(kind, rng) for _ in range(12)]) for kind in (*shapes.KINDS, *codec.OTHERS)}
    back = {kind: codec.round_trip(mask_codec, torch.from_numpy(masks)).mean() for kind, masks in drawn.items()}
    assert all(back[kind] > 0.95 for kind in shapes.KINDS), back
    assert all(back[kind] > 0.9 for kind in codec.OTHERS), back


def test_the_codec_uses_its_codebook_and_is_small(mask_codec):
    used = mask_codec.encode(codec.draw_masks(np.random.default_rng(0), 60)).unique()
    assert len(used) > 90
    assert shapes.CODEC.stat().st_size < 4_000_000


def test_a_code_follows_what_it_stands_for_and_one_that_stands_for_nothing_starts_again():
    torch.manual_seed(0)
    codebook = Codebook()
    codes, vectors, table = codec.Codes(codebook), torch.randn(8, CODE_WIDTH), codebook._embedding
    for _ in range(400):  # a code is given up after 170 steps without a vector
        codes.follow(vectors, torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]))
    torch.testing.assert_close(table[0], vectors[:4].mean(0), rtol=0, atol=0.01)
    torch.testing.assert_close(table[1], vectors[4:].mean(0), rtol=0, atol=0.01)
    assert torch.cdist(table[2:], vectors).min(dim=1).values.max() < 0.1  # the vectors are 30 apart


def test_a_few_steps_make_a_codec_better(capsys):
    rng = np.random.default_rng(0)
    drawn = codec.draw_masks(rng, 16)
    trained = codec.train(steps=16, batch=4, seed=0, rate=1e-3)
    error = ((trained.decode(trained.encode(drawn)) - (2 * drawn - 1)) ** 2).mean()
    assert error < 1.0  # saying nothing costs that
    assert capsys.readouterr().out == ""


# The checkpoint


def test_the_checkpoint_answers_unseen_scenes(processor):
    asked = evaluate.questions(count=8, seed=UNSEEN_SEED)
    said = evaluate.answers(evaluate.Annotator(load_model(CHECKPOINT), processor, rows=64, max_new_tokens=48), asked)
    flat = [question for _, scene_questions in asked for question in scene_questions]
    values = [(question.kind, evaluate.score(question, result)) for question, result in zip(flat, said, strict=True)]
    exact = [value for kind, value in values if kind in ANSWERED]
    boxes = [value for kind, value in values if kind == "detect"]
    assert np.mean(exact) >= 0.85, exact
    assert np.mean(boxes) >= 0.6, boxes
    found = [found for result in said for found in (result.reading.objects if result.reading else []) if found.box]
    assert found and all(0 < one.score <= 1 and one.expected.iou(one.box) > 0.7 for one in found)


def test_the_checkpoint_segments_unseen_scenes_and_finds_nothing_where_nothing_is(processor, mask_codec):
    asked = evaluate.questions(count=12, seed=UNSEEN_SEED)
    asked = [(drawn, [question for question in questions if question.task == "segment"]) for drawn, questions in asked]
    annotator = evaluate.Annotator(load_model(CHECKPOINT), processor, codec=mask_codec, rows=64, max_new_tokens=112)
    said = evaluate.answers(annotator, asked)
    flat = [question for _, questions in asked for question in questions]
    assert {question.kind for question in flat} == {"segment", "absent"}
    values = [evaluate.score(question, result) for question, result in zip(flat, said, strict=True)]
    assert np.mean(values) >= 0.7, values
    # The masks, not only the boxes: of what was found, they cover the shapes, and whole boxes would not.
    found = [
        (overlap(one.mask, true.mask), true.mask.mean() / true.box.area)
        for question, result in zip(flat, said, strict=True)
        for _, one, true in evaluate.matches(result.reading.objects, question.true, evaluate.box_overlap)
        if one.box.iou(true.box) > 0.8
    ]
    both = [(mask, box) for mask, box in found if box < 0.9]  # a square is its box
    assert len(both) > 10
    of_masks, of_boxes = np.mean(both, axis=0)
    assert of_masks > of_boxes + 0.15


def test_training_goes_on_from_the_committed_weights():
    options = argparse.Namespace(runs=CHECKPOINT, tower_rate=0.0, batch=1, questions=1)
    joint = train.Joint(options, np.random.default_rng(0))
    joint.load("checkpoint")
    stored = load_file(CHECKPOINT / "model.safetensors")
    state = joint.model.state_dict()
    assert state.keys() == stored.keys() and {value.dtype for value in state.values()} == {torch.float32}
    assert all(torch.equal(state[name], value.float()) for name, value in stored.items())
    frozen = {name.split(".")[1] for name, parameter in joint.both.named_parameters() if not parameter.requires_grad}
    assert frozen == {"vision_tower", "weight", "bias"}  # the tower and the patch head


def test_the_checkpoint_says_the_same_in_transformers(processor):
    from transformers import AutoProcessor, PaliGemmaForConditionalGeneration

    ours = load_model(CHECKPOINT, dtype="float32")
    theirs = PaliGemmaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    their_processor = AutoProcessor.from_pretrained(CHECKPOINT)
    drawn, rng = scene(3, UNSEEN_SEED)
    picture = shapes.draw(drawn)
    prompts = [prefix for prefix, _ in shapes.ask(drawn, rng, list(shapes.QUESTIONS))]
    assert len(prompts) >= 6
    for prompt in prompts:
        inputs = their_processor(images=picture, text=f"<image>{prompt}", return_tensors="pt")
        inputs.pop("labels", None)
        mine = processor(picture, prompt)
        assert mine["input_ids"].tolist() == inputs["input_ids"].tolist()
        with torch.no_grad():
            logits = theirs(**inputs).logits
            # Sums are ordered otherwise.
            torch.testing.assert_close(ours(**mine), logits.float(), rtol=0, atol=1e-3)
            whole = theirs.generate(**inputs, max_new_tokens=48, do_sample=False)
        answer = whole[0, inputs["input_ids"].shape[1] :].tolist()
        said = [int(step) for step in generate(ours, mine, max_new_tokens=48, eos_token_id=processor.eos_token_id)]
        assert said == answer[: len(said)] and set(answer[len(said) :]) <= {processor.pad_token_id}
