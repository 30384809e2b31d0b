"""Explanations: recomputed attention equals the model's own, maps and likelihoods are right, the sheet can be drawn."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from paligemma import explanation, explanation_sheet, inference
from paligemma.checkpoints import weights
from paligemma.configuration import PaliGemmaConfig
from paligemma.errors import OutputError, PromptError, UsageError
from paligemma.generation import generate, generate_steps
from paligemma.layers import int_formats
from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration, suffix_loss
from paligemma.objects.outputs import NormalizedBox
from paligemma.processing_paligemma import PaliGemmaProcessor, load_image
from paligemma.programs import commandline, verbs
from tests.tiny import FAMILIES, fill, make_batch, make_model, make_pixels, raw_config
from tests.tiny_checkpoint import make_checkpoint

ROOT = Path(__file__).parent.parent
DEMO, PICTURE = ROOT / "paligemma" / "bundled", ROOT / "examples" / "shapes.png"
HEART = (0.62, 0.60, 0.88, 0.86)  # y_min, x_min, y_max, x_max of the purple heart in PICTURE, by hand


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return PaliGemmaProcessor.from_pretrained(make_checkpoint(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(scope="module")
def demo():
    return weights.load_model(DEMO, dtype="fp32"), PaliGemmaProcessor.from_pretrained(DEMO)


def tiny_model(family, processor):
    raw = raw_config(family, vocab_size=processor.image_token_id + 64) | {"image_token_index": processor.image_token_id}
    return fill(PaliGemmaForConditionalGeneration(PaliGemmaConfig.from_hf(raw)), 0).eval()


def tiny_case(family, processor, answer="a red <loc0010><loc0020><loc0030><loc0040> cat"):
    """A model, inputs of one row, and an answer."""
    inputs = processor(Image.fromarray(noise(28, 28)), "what?")
    return tiny_model(family, processor), inputs, [*processor.encode(answer), processor.eos_token_id]


def with_answer(inputs, ids):
    """The row of picture, prompt and answer."""
    types = torch.cat((inputs["token_type_ids"], torch.ones(1, len(ids), dtype=torch.int64)), dim=1)
    return {"input_ids": torch.cat((inputs["input_ids"], torch.tensor([ids])), dim=1), "token_type_ids": types}


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def ask(demo, question):
    model, processor = demo
    picture = load_image(PICTURE)
    inputs = processor(picture, question)
    ids = [int(step) for step in generate(model, inputs, max_new_tokens=60, eos_token_id=model.config.eos_token_id)]
    return picture, explanation.explain(model, processor, inputs, ids)


# Attention


def attended(attention, weights, x):
    """The output of an attention module, computed from its attention weights float[B, N, L, L]."""
    width = getattr(attention, "width", None) or x.shape[-1] // attention.heads
    v = attention.v_proj(x).unflatten(-1, (-1, width)).transpose(1, 2)
    v = v.repeat_interleave(weights.shape[1] // v.shape[1], dim=1)
    project = attention.o_proj if hasattr(attention, "o_proj") else attention.out_proj
    return project((weights @ v).transpose(1, 2).flatten(2))


def outputs_of(modules):
    found = []
    for module in modules:
        module.register_forward_hook(lambda _module, _args, output: found.append(output))
    return found


@torch.no_grad()
@pytest.mark.parametrize(("family", "window"), [("gemma", None), ("gemma2", None), ("gemma2", 3)])
def test_decoder_weights_times_values_equal_the_output_of_the_module(family, window):
    model = make_model(family, text={"sliding_window": window}, sliding_window="config" if window else None)
    modules = [layer.self_attn for layer in model.language_model.model.layers]
    outputs = outputs_of(modules)
    with explanation.recording(modules) as calls:
        model(**make_batch([(1, 3, 5)]))
    assert len(calls) == len(outputs) == 3
    for call, output in zip(calls, outputs, strict=True):
        found = explanation.decoder_weights(*call)
        torch.testing.assert_close(found.sum(-1), torch.ones_like(found.sum(-1)), rtol=0, atol=1e-6)
        # Sums are reordered: 7e-7 is the largest gap seen; without the soft cap it would be 0.05.
        torch.testing.assert_close(attended(call[0], found, call[1]), output, rtol=0, atol=5e-6)


@torch.no_grad()
def test_tower_weights_times_values_equal_the_output_of_the_module():
    model = make_model("gemma")
    modules = [layer.self_attn for layer in model.vision_tower.vision_model.encoder.layers]
    outputs = outputs_of(modules)
    with explanation.recording(modules) as calls:
        model.encode_images(make_pixels(1))
    assert len(calls) == len(outputs) == 2
    for call, output in zip(calls, outputs, strict=True):
        torch.testing.assert_close(attended(call[0], explanation.tower_weights(*call), call[1]), output, rtol=0, atol=5e-6)


def test_recording_removes_its_hooks():
    model = make_model("gemma")
    with pytest.raises(KeyError), explanation.recording(model.modules()):
        raise KeyError
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_roll_out_of_two_layers():
    # One head. The last layer sends token 1 to token 0, the first sends token 0 to token 1; half of the weight stays each time.
    last = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
    first = torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]])
    rolled = explanation.follow_attention(torch.tensor([[0.0, 1.0]]), [last, first])
    assert rolled.tolist() == [[0.25, 0.75]]  # 0 1 -> 0.5 0.5 -> 0.25 0.75


# The maps


def test_a_words_weight_starts_one_position_before_each_of_its_tokens():
    # A prompt of three tokens and an answer of three; its words are the tokens 0 and 1, and 2.
    starts = explanation.initial_weights([range(0, 2), range(2, 3)], 3, 6)
    assert starts.tolist() == [[0, 0, 0.5, 0.5, 0, 0], [0, 0, 0, 0, 1, 0]]


@pytest.mark.parametrize("family", FAMILIES)
def test_roll_outs_sum_to_one_over_all_tokens_and_to_the_share_over_the_picture(family, processor):
    model, inputs, ids = tiny_case(family, processor)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        whole = explanation.follow_attention
        patch.setattr(explanation, "follow_attention", lambda rows, layers: seen.append(whole(rows, layers)) or seen[-1])
        found = explanation.explain(model, processor, inputs, ids)
    decoder, tower = seen
    torch.testing.assert_close(decoder.sum(1), torch.ones(len(found.words)), rtol=0, atol=1e-5)
    for word, rows, patches in zip(found.words, decoder, tower, strict=True):
        assert 0 < word.share < 1
        assert math.isclose(word.share, rows[:4].sum().item(), abs_tol=1e-5)  # the tower only moves it
        assert word.roll_out.flatten().tolist() == patches.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_roll_outs_are_the_product_of_all_layers(family, processor):
    model, inputs, ids = tiny_case(family, processor)
    found = explanation.explain(model, processor, inputs, ids)
    tower = [layer.self_attn for layer in model.vision_tower.vision_model.encoder.layers]
    decoder = [layer.self_attn for layer in model.language_model.model.layers]
    row = with_answer(inputs, ids)
    with torch.no_grad(), explanation.recording(tower) as tower_calls, explanation.recording(decoder) as decoder_calls:
        model(**row, pixel_values=inputs["pixel_values"])
    whole = []  # as in equation 1 of the paper, from the first layer to the last
    for calls, weights_of in ((tower_calls, explanation.tower_weights), (decoder_calls, explanation.decoder_weights)):
        matrices = [(weights_of(*call)[0].mean(0) + torch.eye(call[1].shape[1])) / 2 for call in calls]
        product = matrices[0]
        for matrix in matrices[1:]:
            product = matrix @ product
        whole.append(product)
    first = inputs["input_ids"].shape[1] - 1
    for word in found.words:
        rows = whole[1][first + word.tokens.start : first + word.tokens.stop].mean(0)
        torch.testing.assert_close(rows[:4] @ whole[0], word.roll_out.flatten(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_maps_agree_with_finite_differences(family, processor):
    model, inputs, ids = tiny_case(family, processor)
    found = explanation.explain(model, processor, inputs, ids)
    row = with_answer(inputs, ids)
    patch, step = 2, 0.1
    with torch.no_grad():
        features = model.encode_images(inputs["pixel_values"])
        toward = features.mean(1) - features[:, patch]  # [1, D]
        moved = features.repeat(2 * features.shape[2], 1, 1)
        for number in range(features.shape[2]):
            for side in (0, 1):
                moved[2 * number + side, patch, number] += (0.5 - side) * step * toward[0, number]
        rows = {key: value.expand(len(moved), -1) for key, value in row.items()}
        logits = model(**rows, image_features=moved)[:, -len(ids) - 1 : -1]  # [2 D, T, V]
        chosen = logits.gather(2, torch.tensor(ids).expand(len(moved), -1)[..., None])[..., 0]  # [2 D, T]
    for word in found.words:
        said = chosen[:, word.tokens.start : word.tokens.stop].sum(1)
        slopes = (said[0::2] - said[1::2]) / step
        # 7e-4 is the largest gap seen, from the rounding of logits and from the step.
        assert math.isclose(slopes.abs().sum().item(), word.gradient.flatten()[patch].item(), rel_tol=5e-3)


def test_a_gradient_map_of_the_demo_is_largest_on_the_object_of_the_question(demo):
    _, found = ask(demo, "answer en what color is the heart?")
    y, x, y_end, x_end = HEART
    row, column = divmod(int(found.words[0].gradient.argmax()), 8)
    assert found.text == "purple"
    assert y < (row + 0.5) / 8 < y_end and x < (column + 0.5) / 8 < x_end


# Likelihoods


@pytest.mark.parametrize("family", FAMILIES)
def test_likelihoods_are_those_of_a_full_forward(family, processor):
    model, inputs, ids = tiny_case(family, processor)
    found = explanation.explain(model, processor, inputs, ids)
    row = with_answer(inputs, ids)
    labels = torch.where(row["token_type_ids"] == 1, row["input_ids"], -100)
    flat = inputs["pixel_values"].mean((2, 3), keepdim=True).expand(1, 3, 28, 28)
    for pixels, logprob in ((inputs["pixel_values"], found.logprob), (flat, found.blank_logprob)):
        with torch.no_grad():
            loss = suffix_loss(model(**row, pixel_values=pixels), labels, "token").item()
        assert math.isclose(-loss * len(ids), logprob, rel_tol=1e-5)
    assert math.isclose(found.dependence, found.logprob - found.blank_logprob, abs_tol=1e-9)
    assert math.isclose(sum(token.dependence for token in found.tokens), found.dependence, abs_tol=1e-9)


def test_likelihoods_are_those_that_generation_gave(demo):
    model, processor = demo
    inputs = processor(load_image(PICTURE), "caption en")
    steps = list(generate_steps(model, inputs, max_new_tokens=60, eos_token_id=model.config.eos_token_id))
    found = explanation.explain(model, processor, inputs, [step.tokens.item() for step in steps])
    # Prefill and steps against one pass: 2e-6 measured.
    assert [token.logprob for token in found.tokens] == pytest.approx([step.logprobs.item() for step in steps], abs=2e-5)


def test_padding_changes_nothing(processor):
    model, inputs, ids = tiny_case("gemma2", processor)
    padded = {key: torch.nn.functional.pad(value, (3, 0)) for key, value in inputs.items() if key != "pixel_values"}
    there = explanation.explain(model, processor, inputs, ids)
    here = explanation.explain(model, processor, padded | {"pixel_values": inputs["pixel_values"]}, ids)
    assert here.to_json() == there.to_json()


def test_the_model_is_left_as_it_was(processor):
    model, inputs, ids = tiny_case("gemma", processor)
    explanation.explain(model, processor, inputs, ids)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(("blank_logprob", "is_warned"), [(-0.4, True), (-1.0, True), (-1.2, False), (-30.0, False)])
def test_an_answer_that_the_picture_makes_less_than_twice_as_likely_is_warned_about(blank_logprob, is_warned):
    tokens = [explanation.Token(5, "a", -0.6, -0.6, 0.0, ()), explanation.Token(6, "b", -0.4, blank_logprob, 0.0, ())]
    found = explanation.Explanation("what?", "a b", tokens, [], [])
    assert math.isclose(found.dependence, -0.4 - blank_logprob)
    assert (found.warning is not None) == is_warned


def test_a_caption_depends_on_the_picture(demo):
    _, found = ask(demo, "caption en")
    assert found.dependence > 10 and found.warning is None


def test_entropy_and_alternatives(processor):
    logprobs = torch.tensor([[0.5, 0.25, 0.25, 1e-30], [0.25, 0.25, 0.25, 0.25]]).log()
    first, second = explanation.read_tokens(logprobs, logprobs - 1, [0, 2], processor)
    assert math.isclose(first.entropy, 1.5 * math.log(2), rel_tol=1e-6)
    assert math.isclose(second.entropy, math.log(4), rel_tol=1e-6)
    assert first.alternatives[0] == ("<pad>", pytest.approx(0.5))
    assert [probability for _, probability in first.alternatives] == pytest.approx([0.5, 0.25, 0.25, 0], abs=1e-6)
    assert math.isclose(first.dependence, 1, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("nats", "words"), [(0, "1 times"), (math.log(3.14159), "3.1 times"), (-1, "0.37 times"), (27.6, "10^12 times")]
)
def test_ratios_in_words(nats, words):
    assert explanation.as_ratio(nats) == words


# Words


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("a red cat", ["a", "red", "cat"]),
        ("yes", ["yes"]),
        ("a cat, two dogs.", ["a", "cat,", "two", "dogs."]),
        ("un café ♥ là", ["un", "café", "là"]),
        ("- ; .", []),
        ("a\nb", ["a", "b"]),
        ("<loc0010><loc0020><loc0030><loc0040> big cat ; <loc0001><loc0002><loc0003><loc0004> dog", ["big cat", "dog"]),
        ("<loc0010><loc0020><loc0030><loc0040>" + "<seg001>" * 16 + " cat ; two", ["cat", "two"]),
        ("<loc0010><loc0020><loc0030><loc0040>" + "<seg001>" * 16, [""]),
        ("<loc0010><loc0020> cat", ["<loc0010><loc0020>", "cat"]),
    ],
)
def test_words_of_an_answer(answer, words, processor):
    ids = [*processor.encode(answer), processor.eos_token_id]
    found = explanation.split_words(ids, processor)
    assert [text for text, _, _ in found] == words
    for text, positions, box in found:  # the tokens of a word spell it
        assert processor.decode(ids[positions.start : positions.stop]).endswith(text) or box is None
    assert all(before[1].stop <= after[1].start for before, after in zip(found, found[1:], strict=False))
    assert all(positions.stop < len(ids) for _, positions, _ in found)  # the eos belongs to no word


def test_an_object_is_one_word_with_its_box(processor):
    ids = processor.encode("a <loc0000><loc0100><loc0511><loc1023>" + "<seg001>" * 16 + " cat ; dog")
    _, (text, positions, box), _ = explanation.split_words(ids, processor)
    assert (text, box) == ("cat", NormalizedBox(100 / 1023, 0, 1, 511 / 1023))
    assert processor.decode(ids[positions.start : positions.stop]).endswith("<seg001> cat")
    assert ids[positions.start] == processor.location_ids.start


# What is refused, and what has no gradient


@pytest.mark.parametrize(
    ("change", "ids", "message"),
    [
        ({"pixel_values": None}, [70], "an explanation needs pixels"),
        ({}, [], "the answer has 0 tokens"),
        ({}, [70] * 8192, "the answer has 8192 tokens"),
    ],
)
def test_what_cannot_be_explained_is_refused(change, ids, message, processor):
    model, inputs, _ = tiny_case("gemma", processor)
    with pytest.raises(PromptError, match=message):
        explanation.explain(model, processor, inputs | change, ids)


def test_two_pictures_and_two_rows_are_refused(processor):
    model, picture = tiny_model("gemma", processor), Image.new("RGB", (28, 28))
    with pytest.raises(PromptError, match="the row has 2 pictures"):
        explanation.explain(model, processor, processor([picture, picture], "what?"), [70])
    with pytest.raises(PromptError, match="2 rows"):
        explanation.explain(model, processor, processor([picture, picture], ["what?", "who?"]), [70])


@pytest.mark.parametrize("kind", int_formats.KINDS)
def test_quantised_models_have_roll_outs_and_likelihoods_but_no_gradient(kind, demo):
    model = weights.load_model(DEMO, dtype="fp32", quantize=kind)
    _, found = ask((model, demo[1]), "answer en what color is the heart?")
    _, exact = ask(demo, "answer en what color is the heart?")
    assert all(word.gradient is None for word in found.words) and found.notes == [explanation.NO_GRADIENT]
    assert found.dependence == pytest.approx(exact.dependence, rel=0.3)
    torch.testing.assert_close(found.words[0].roll_out, exact.words[0].roll_out, rtol=0.3, atol=0.01)


# The sheet


def test_the_heat_map_is_red_where_the_map_is_large():
    values = torch.zeros(4, 4)
    values[1, 2] = 3.0
    found = np.asarray(explanation_sheet.heat_map(Image.new("RGB", (80, 40), "grey"), values)).astype(int)
    redness = found[..., 0] - found[..., 2]
    y, x = np.unravel_index(redness.argmax(), redness.shape)
    assert 10 <= y < 20 and 40 <= x < 60
    assert redness[30:, :30].max() == 0


def test_a_map_of_zeros_leaves_the_picture_grey():
    found = np.asarray(explanation_sheet.heat_map(Image.new("RGB", (8, 8), "blue"), torch.zeros(2, 2)))
    assert (found[..., 0] == found[..., 2]).all()


@pytest.mark.parametrize("question", ["caption en", "detect heart", "answer en what color is the heart?"])
def test_the_sheet_has_a_card_for_each_word(question, demo):
    picture, found = ask(demo, question)
    sheet = explanation_sheet.draw_explanation(picture, found)
    rows = -(-len(found.words) // explanation_sheet.CARDS)
    assert sheet.mode == "RGB" and sheet.width == explanation_sheet.WIDTH
    assert sheet.height == explanation_sheet.draw_explanation(picture, found).height > 300 * (1 + rows)


@pytest.mark.parametrize("size", [(1, 1), (3000, 20), (20, 3000)])
def test_pictures_of_any_shape_fit(size, demo):
    _, found = ask(demo, "caption en")
    sheet = explanation_sheet.draw_explanation(Image.new("RGB", size, "teal"), found)
    assert sheet.width == explanation_sheet.WIDTH and sheet.height < 2500


def test_an_answer_without_words_and_one_with_very_long_ones_are_drawn(processor):
    model, inputs, _ = tiny_case("gemma", processor)
    for ids in ([processor.eos_token_id], processor.encode("x" * 150 + " 漢字")):
        found = explanation.explain(model, processor, inputs, ids)
        assert explanation_sheet.draw_explanation(Image.new("RGB", (30, 20)), found).size[0] == explanation_sheet.WIDTH


def test_text_is_cut_to_its_width():
    lines = explanation_sheet.wrapped("one two three four five six seven", 20, 90, 3)
    assert len(lines) == 3 and lines[0] == "one two" and lines[-1].endswith("…")
    assert all(explanation_sheet.lettering().width(line, 20) <= 90 for line in lines)


@pytest.mark.parametrize("family", FAMILIES)
def test_json_has_the_whole_explanation(family, processor):
    model, inputs, ids = tiny_case(family, processor)
    found = explanation.explain(model, processor, inputs, ids)
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert data["prompt"] == "what?" and data["text"] == "a red <loc0010><loc0020><loc0030><loc0040> cat"
    assert [word["text"] for word in data["words"]] == ["a", "red", "cat"]
    assert data["words"][2]["box_normalized"] == pytest.approx([20 / 1023, 10 / 1023, 40 / 1023, 30 / 1023])
    assert sum(token["logprob"] for token in data["tokens"]) == pytest.approx(data["logprob"])
    assert all(np.shape(word[kind]) == (2, 2) for word in data["words"] for kind in ("roll_out", "gradient"))
    covered = [data["tokens"][place]["text"] for place in data["words"][2]["tokens"]]
    assert covered == ["<loc0010>", "<loc0020>", "<loc0030>", "<loc0040>", " ", "c", "a", "t"]


# --explain


def run(capsys, *argv):
    """The program in this process: exit code, stdout, stderr."""
    code = commandline.run(inference.Flags, inference.program, list(argv), topics=verbs.HELP)
    return code, *capsys.readouterr()


def test_the_classic_flags_explain(tmp_path, capsys):
    file = tmp_path / "out.png"
    argv = ("--model_path", str(DEMO), "--image_file_path", str(PICTURE), "--prompt", "answer en what color is the heart?")
    code, out, err = run(capsys, *argv, "--explain", str(file))
    assert (code, out) == (0, "purple\n") and f"note: the explanation is in {file}." in err
    assert Image.open(file).width == explanation_sheet.WIDTH
    code, out, _ = run(capsys, *argv, "--explain", str(file), "--json")
    data = json.loads(out)
    assert data["text"] == "purple" and data["explanation"]["words"][0]["text"] == "purple"
    assert data["explanation"]["logprob"] == pytest.approx(sum(data["logprobs"]), abs=1e-3)


def test_a_plain_verb_explains_and_a_warning_is_a_note(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(explanation, "MIN_DEPENDENCE", 1e6)
    code, out, err = run(capsys, "ask", str(PICTURE), "what color is the heart?", "--explain", str(tmp_path / "out.png"))
    assert (code, out) == (0, "purple\n") and "note: this answer hardly depends on the picture: it is" in err


def test_verbs_explain_every_answer(tmp_path, capsys):
    argv = ("count", str(PICTURE), str(tmp_path / "none.png"), "hearts", "--json", "--explain", str(tmp_path / "out.png"))
    Image.open(PICTURE).save(tmp_path / "none.png")
    code, out, _ = run(capsys, *argv)
    assert code == 0 and sorted(path.name for path in tmp_path.glob("out*")) == ["out-1.png", "out-2.png"]
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["explanation"]["text"] for row in rows] == [row["text"] for row in rows] and len(rows) == 2


def test_a_bad_picture_gets_no_explanation_file(tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    code, _, _ = run(
        capsys, "count", str(tmp_path / "bad.png"), str(PICTURE), "hearts", "--json", "--explain", str(tmp_path / "o.png")
    )
    assert code == 8 and [path.name for path in tmp_path.glob("o*")] == ["o-2.png"]


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        ({"explain": "out.gif"}, UsageError, "--explain is 'out.gif', but a name that ends in .png"),
        ({"explain": "nowhere/out.png"}, OutputError, "there is no folder nowhere"),
        ({"explain": "out.png", "image_file_path": "a.png,b.png"}, UsageError, "--explain takes one picture"),
        ({"explain": str(PICTURE)}, UsageError, "would overwrite the picture"),
        ({"explain": str(PICTURE), "positional": ("caption", str(PICTURE))}, UsageError, "would overwrite the picture"),
    ],
)
def test_flags_that_cannot_be_explained_or_written_are_refused_at_once(flags, error, message):
    with pytest.raises(error, match=message):
        inference.Flags(**flags)


def test_alternatives_with_the_same_text_are_added_up():
    alternatives = [("cat", 0.5), ("dog", 0.2), (" cat", 0.15), ("\n", 0.05)]
    assert explanation_sheet.by_text(alternatives) == [("cat", 0.65), ("dog", 0.2), ("\\n", 0.05)]
