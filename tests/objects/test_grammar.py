"""Constrained decoding: exactly the answers of the grammar's definition are possible, whatever the logits are."""

import itertools
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers

from paligemma.checkpoints.weights import load_model
from paligemma.configuration import GemmaConfig, PaliGemmaConfig
from paligemma.errors import GenerationError, PromptError
from paligemma.generation import Sampling, generate, generate_many, generate_steps, sample_allowed
from paligemma.modeling_gemma import KVCache
from paligemma.objects.grammar import Ending, Grammar
from paligemma.objects.outputs import NO_AREA, parse_ids
from paligemma.pictures.images import load_image
from paligemma.processing_paligemma import PaliGemmaProcessor
from tests.tiny import raw_config
from tests.tiny_checkpoint import make_tokenizer
from tests.tiny_tokenizer import write_processor

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "paligemma" / "bundled"
NORMALIZATION = (np.full(3, 1 / 255), np.full(3, 0.5, np.float32), np.full(3, 0.5, np.float32))
LABELS = ["cat", "cat food", "a cat", "ca", "dog", "red  car", "person's hat", "Münze 5 €", "猫", "🦊-like"]
LABELS += ["<loc12>", "<loc0012", "<eos>", "<seg>"]  # ordinary text, not tokens


def merging_tokenizer() -> Tokenizer:
    """A tokenizer that merges across word boundaries, so that the ids of a label depend on whether another object follows."""
    plain = make_tokenizer()
    merges = [("t", "▁"), ("t▁", ";"), ("▁", ";"), ("r", "▁;"), (";", "▁"), ("▁", "d"), ("▁", "c"), ("▁c", "a")]
    vocab = {token: number for token, number in plain.get_vocab().items() if number < plain.token_to_id("<loc0000>")}
    vocab |= {left + right: len(vocab) + i for i, (left, right) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    for _, token in sorted(plain.get_added_tokens_decoder().items()):
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    return tokenizer


def processor_of(tokenizer: Tokenizer) -> PaliGemmaProcessor:
    names = {"image": "<image>", "pad": "<pad>", "bos": "<bos>", "eos": "<eos>", "newline": "\n"}
    ids = {f"{kind}_token_id": tokenizer.token_to_id(token) for kind, token in names.items()}
    return PaliGemmaProcessor(tokenizer, ids, image_size=28, num_image_tokens=4, normalization=NORMALIZATION)


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_processor(folder)
    return {
        "words": PaliGemmaProcessor.from_pretrained(folder),
        "letters": processor_of(make_tokenizer()),
        "merging": processor_of(merging_tokenizer()),
        "demo": PaliGemmaProcessor.from_pretrained(DEMO),
    }


NAMES = ["words", "letters", "merging", "demo"]


# A second implementation of the definition


def suffix_of(objects) -> str:
    """The answer that names these objects, each (locations, codes, label)."""
    return " ; ".join(
        "".join(f"<loc{v:04d}>" for v in box) + "".join(f"<seg{code:03d}>" for code in codes) + (f" {label}" if label else "")
        for box, codes, label in objects
    )


def parse(text, labels, with_masks):
    """The objects of a valid answer; AssertionError for any other text."""
    objects = []
    for item in text.split(" ; ") if text else []:
        found = re.fullmatch(r"((?:<loc\d{4}>){4})((?:<seg\d{3}>){16})?(?: (.+))?", item)
        assert found, (item, text)
        locations = tuple(int(v) for v in re.findall(r"\d{4}", found[1]))
        codes = tuple(int(v) for v in re.findall(r"\d{3}", found[2] or ""))
        assert locations[0] <= locations[2] and locations[1] <= locations[3]
        assert (len(codes) == 16) == with_masks
        assert (found[3] or "") in labels
        objects.append((locations, codes, found[3] or ""))
    assert len({(locations, label) for locations, _, label in objects}) == len(objects)
    return objects


def random_objects(draw, labels, with_masks, most=5):
    """Random objects with few different numbers, so that boxes and sides are often equal."""
    objects, seen = [], set()
    for _ in range(draw.randint(0, most)):
        y, x = (sorted(draw.choice((0, 5, 1023, draw.randrange(1024))) for _ in range(2)) for _ in range(2))
        locations, label = (y[0], x[0], y[1], x[1]), draw.choice(labels)
        if (locations, label) not in seen:
            seen.add((locations, label))
            objects.append((locations, tuple(draw.choices(range(128), k=16)) if with_masks else (), label))
    return objects


def first_refused(grammar, ids, limit=10**6):
    """The index of the first id that the grammar does not allow; None if it allows all and only eos can follow."""
    state = grammar.start(limit)
    for i, token in enumerate(ids):
        if token not in state.allowed_tokens().tolist():
            return i
        state.advance(token)
    assert state.is_over and state.allowed_tokens().tolist() == [grammar.eos]
    return None


# Accepted answers


@pytest.mark.parametrize("with_masks", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_ids_of_every_valid_answer_are_accepted(processors, name, with_masks):
    processor, draw = processors[name], random.Random(0)
    for _ in range(60):
        labels = draw.sample(LABELS, draw.randint(1, len(LABELS)))
        grammar = Grammar.for_objects(processor, labels, with_masks)
        objects = random_objects(draw, labels, with_masks)
        ids = [*processor.encode(suffix_of(objects)), processor.eos_token_id]
        assert first_refused(grammar, ids) is None
        # With the smallest limit at which the longest label fits where the last object begins, the answer is still accepted.
        last = len(processor.encode(suffix_of(objects[:-1]) + " ; ")) if len(objects) > 1 else 0
        limit = last + grammar.max_last_object_length if objects else 1
        assert first_refused(grammar, ids, limit) is None
        if objects:
            assert first_refused(grammar, ids, limit - 1) is not None


def test_one_of_the_tokenizers_merges_across_word_boundaries():
    processor = processor_of(merging_tokenizer())
    assert processor.encode(" cat") + processor.encode(" ; ") != processor.encode(" cat ; ")
    assert processor.encode(" cat ; ")[: len(processor.encode(" cat"))] != processor.encode(" cat")


def test_an_object_without_a_label_is_accepted_if_the_label_is_empty(processors):
    for processor in processors.values():
        grammar = Grammar.for_objects(processor, [""], with_masks=True, max_objects=1)
        ids = [*processor.encode("<loc0001><loc0002><loc0003><loc0004>" + "<seg001>" * 16), processor.eos_token_id]
        assert first_refused(grammar, ids) is None
        assert first_refused(grammar, [*ids[:-1], *processor.encode(" ; ")]) == 20


BOX, OTHER = "<loc0100><loc0200><loc0300><loc0400>", "<loc0000><loc0200><loc0300><loc1023>"


@pytest.mark.parametrize(
    "text, accepted",
    [
        ("", ""),
        ("nothing", ""),
        ("cat", ""),
        (f"{BOX} cat", f"{BOX} cat"),
        (f"{BOX} cow", f"{BOX}"),
        (f"{BOX} cat food", f"{BOX} cat"),  # not among the labels of this test
        (BOX, BOX),
        (f"{BOX} cat ; ", f"{BOX} cat ; "),
        (f"{BOX} cat ; dog", f"{BOX} cat ; "),
        (f"{BOX} cat ; {OTHER} dog", f"{BOX} cat ; {OTHER} dog"),
        (f"{BOX} cat ; {BOX} dog", f"{BOX} cat ; {BOX} dog"),
        (f"{BOX} cat ; {BOX} cat", f"{BOX} cat ; {BOX}"),
        (f"{BOX} cat ; {BOX} dog ; {BOX} cat", f"{BOX} cat ; {BOX} dog ; <loc0100><loc0200><loc0300>"),  # the box has both labels
        ("<loc0100><loc0200><loc0099><loc0400> cat", "<loc0100><loc0200>"),
        ("<loc0100><loc0200><loc0100><loc0199> cat", "<loc0100><loc0200><loc0100>"),
        ("<loc0100><loc0200><loc0100><loc0200> cat", "<loc0100><loc0200><loc0100><loc0200> cat"),
        ("<loc0100><loc0200><loc0300> cat", "<loc0100><loc0200><loc0300>"),
        (f"{BOX}<loc0001> cat", BOX),
        (f"{BOX}<seg001> cat", BOX),
        ("<seg001>", ""),
        (f"{BOX} cat{OTHER} dog", f"{BOX} cat"),
    ],
)
def test_an_answer_is_accepted_up_to_its_first_fault(processors, text, accepted):
    processor = processors["demo"]
    ids = [*processor.encode(text), processor.eos_token_id]
    refused = first_refused(Grammar.for_objects(processor, ["cat", "dog"]), ids)
    generated = processor.decode(ids[:refused])
    # A label that was not asked for can begin with the same tokens as one that was.
    assert generated.startswith(accepted) and (generated == accepted or text == f"{BOX} cow")
    assert (refused is None) == (text == accepted and not text.endswith(("; ", ">")))


def test_a_mask_has_sixteen_codes(processors):
    processor = processors["demo"]
    grammar = Grammar.for_objects(processor, ["cat"], with_masks=True)
    for count in (0, 1, 15, 16, 17):
        ids = [*processor.encode(BOX + "<seg005>" * count + " cat"), processor.eos_token_id]
        assert first_refused(grammar, ids) == (None if count == 16 else 4 + min(count, 16))


def toy_language(grammar, labels, limit, most):
    """Every answer of a grammar with two locations, built from the definition."""
    locations = [b for b in itertools.product(range(2), repeat=4) if b[0] <= b[2] and b[1] <= b[3]]
    pairs = list(itertools.product(locations, range(len(labels))))
    language = {(grammar.eos,)}
    for count in range(1, most + 1):
        for objects in itertools.permutations(pairs, count):
            generated, fits = [], True
            for i, (box, label) in enumerate(objects):
                fits = fits and len(generated) + grammar.max_last_object_length <= limit
                last, followed = labels[label]
                generated += [grammar.location_ids[v] for v in box] + list(last if i == count - 1 else followed)
            if fits:
                language.add(tuple(generated))
    return language


def all_answers(grammar, limit, most):
    """Every answer that the grammar allows, found by trying each allowed id; there must be at most `most`."""
    answers, open_ends = set(), [()]
    while open_ends:
        generated = open_ends.pop()
        state = grammar.start(limit)
        for token in generated:
            state.advance(token)
        if state.is_over and generated:
            answers.add(generated)
            assert len(answers) <= most
        else:
            allowed = state.allowed_tokens().tolist()
            assert allowed and len(set(allowed)) == len(allowed) and len(generated) < limit
            open_ends += [(*generated, token) for token in allowed]
    return answers


@pytest.mark.parametrize(
    "labels, limit, most",
    [
        ([((5, 1), (5, 6))], 100, 3),
        ([((5, 1), (5, 6)), ((5, 5, 1), (5, 5, 6))], 100, 2),  # two labels with the same first id
        ([((5, 1), (5, 6)), ((5, 6, 5, 1), (5, 6, 5, 6))], 100, 2),  # a label with the separator in it
        ([((5, 1), (7, 6)), ((7, 1), (5,))], 100, 2),  # the ids change when an object follows; one id is both
        ([((1,), (6,))], 100, 2),  # no label
        ([((5, 1), (5, 6)), ((5, 5, 1), (5, 5, 6))], 13, 2),  # a second object fits only after the shorter label
        ([((5, 1), (5, 6))], 6, 2),
        ([((5, 1), (5, 6))], 5, 2),  # no object fits
        ([((5, 1), (5, 6))], 1, 2),
    ],
)
def test_exactly_the_answers_of_the_definition_are_allowed(labels, limit, most):
    endings = []
    for number, (last, followed) in enumerate(labels):
        endings += [Ending(number, last, True), Ending(number, followed, False)]
    grammar = Grammar(range(10, 12), range(20, 22), 1, tuple(endings), max_objects=most)
    expected = toy_language(grammar, labels, limit, most)
    assert all_answers(grammar, limit, len(expected)) == expected
    assert len(expected) > 1 or limit < grammar.max_last_object_length


# Any logits


class Noise(torch.nn.Module):
    """A model whose logits are made by `draw`. It uses nothing of its inputs but the number of tokens so far."""

    def __init__(self, processor, draw):
        super().__init__()
        image = processor.image_token_id
        text = {"vocab_size": image + 16, "num_hidden_layers": 1}
        self.config = PaliGemmaConfig.from_hf(raw_config("gemma", **text) | {"image_token_index": image})
        self.draw = draw
        self.dtype = torch.float32

    def new_cache(self, batch, slots, kind=KVCache):
        return kind(GemmaConfig(9, 2, 2, 1, 1, 1, head_dim=2), batch, slots, device=torch.device("cpu"), dtype=torch.float32)

    def prefill(self, cache, attention_mask, **_):
        cache.set_lengths(attention_mask.sum(1))
        return self.draw(len(cache.lengths), self.config.text_config.vocab_size)

    def decode(self, cache, _tokens):
        cache.reserve()
        cache.lengths.add_(1)
        return self.draw(len(cache.lengths), self.config.text_config.vocab_size)


def noise(seed, scale=3.0):
    random_numbers = torch.Generator().manual_seed(seed)
    return lambda rows, vocabulary: torch.randn(rows, vocabulary, generator=random_numbers) * scale


def question(**more):
    return {"input_ids": torch.tensor([[3, 4]])} | more


@pytest.mark.parametrize("name", NAMES)
def test_answers_from_random_logits_are_valid_and_end_within_any_limit(processors, name):
    processor, draw = processors[name], random.Random(1)
    model = Noise(processor, noise(0))
    sizes = [1, 2, 5, 6, 7, 8, 9, 12, 24, 25, 30, 60, 200]
    num_objects = 0
    for limit in sizes:
        asked = [(draw.sample(LABELS, draw.randint(1, 4)), draw.random() < 0.5) for _ in range(12)]
        grammars = [Grammar.for_objects(processor, labels, with_masks) for labels, with_masks in asked]
        requests = [question(grammar=grammar) for grammar in grammars]
        options = {"rows": 4, "max_new_tokens": limit, "eos_token_id": processor.eos_token_id}
        options["sampling"] = Sampling(temperature=1, seed=limit)
        for answer in generate_many(model, requests, **options):
            labels, with_masks = asked[answer.index]
            assert answer.finish_reason == "stop"
            assert first_refused(grammars[answer.index], answer.token_ids, limit) is None
            objects = parse(processor.decode(answer.token_ids), labels, with_masks)
            assert processor.encode(suffix_of(objects)) == answer.token_ids[:-1]
            reading = parse_ids(answer.token_ids, processor)
            assert [(found.locations, found.codes or (), found.label) for found in reading.objects] == objects
            assert set(reading.problems) <= {NO_AREA}  # sides may be equal
            num_objects += len(objects)
    assert num_objects > 50


def test_a_model_that_prefers_a_single_location_still_ends_its_answer(processors):
    # Soon all labels have the box in the last corner. Then every beginning that leads only to this box must be refused, too.
    processor = processors["demo"]
    for wanted in (0, 1, 1022, 1023):
        logits = torch.zeros(processor.image_token_id + 16)
        logits[processor.eos_token_id] = -9.0
        logits[processor.location_ids[wanted]] = 9.0
        model = Noise(processor, lambda rows, _, logits=logits: logits.repeat(rows, 1))
        grammar = Grammar.for_objects(processor, ["cat", "dog"], max_objects=40)
        generated = torch.cat(list(generate(model, question(), max_new_tokens=2000, eos_token_id=1, grammar=grammar))).tolist()
        assert first_refused(grammar, generated) is None
        assert len(parse(processor.decode(generated), ["cat", "dog"], False)) == 40


def test_an_answer_has_no_more_objects_than_allowed(processors):
    processor = processors["letters"]
    logits = torch.randn(processor.image_token_id + 16, generator=torch.Generator().manual_seed(0))
    logits[processor.eos_token_id] = -99.0
    model = Noise(processor, lambda rows, _: logits.repeat(rows, 1))
    for most in (1, 2, 7):
        grammar = Grammar.for_objects(processor, ["cat", "cat food"], max_objects=most)
        generated = torch.cat(list(generate(model, question(), max_new_tokens=500, eos_token_id=1, grammar=grammar))).tolist()
        assert len(parse(processor.decode(generated), ["cat", "cat food"], False)) == most


def test_the_most_probable_allowed_token_is_chosen_with_the_models_own_logprob(processors):
    processor = processors["words"]
    draw, seen = noise(3), []
    model = Noise(processor, lambda *size: seen.append(draw(*size)) or seen[-1].clone())
    grammar = Grammar.for_objects(processor, ["cat", "dog"], max_objects=5)
    state = grammar.start(80)
    for step in generate_steps(model, question(), max_new_tokens=80, eos_token_id=1, grammar=grammar):
        logits = seen[-1][0]
        logits[processor.image_token_id] = -torch.inf  # as without a grammar
        allowed = state.allowed_tokens()
        assert int(step.tokens) == int(allowed[logits[allowed].argmax()])
        # The sums have another order: one or two ulps of numbers near 8.
        torch.testing.assert_close(step.logprobs[0], logits.log_softmax(-1)[step.tokens[0]], rtol=0, atol=4e-6)
        state.advance(int(step.tokens))
    assert state.is_over


def test_samples_of_allowed_tokens_have_the_models_relative_probabilities(processors):
    # 4000 rows; four standard deviations of a share are at most 4 * sqrt(1/4 / 4000) = 0.032.
    processor = processors["demo"]
    logits = torch.zeros(processor.image_token_id + 16)
    first, eos = processor.location_ids.start, processor.eos_token_id
    logits[eos], logits[first + 7], logits[first + 9] = 8.0, 9.0, 9.5
    logits[5] = 50.0  # a token that is not allowed
    model = Noise(processor, lambda rows, _: logits.repeat(rows, 1))
    inputs = {"input_ids": torch.tensor([[3]] * 4000)}
    grammar = Grammar.for_objects(processor, ["cat"])
    generated = next(generate(model, inputs, max_new_tokens=9, sampling=Sampling(temperature=1, seed=0), grammar=grammar))
    ids = [eos, *processor.location_ids]
    expected = logits[ids].softmax(-1)
    shares = torch.bincount(generated, minlength=len(logits))[ids] / 4000
    assert shares.sum() == 1
    torch.testing.assert_close(shares, expected, rtol=0, atol=0.032)
    cut = next(generate(model, inputs, max_new_tokens=9, sampling=Sampling(top_k=2, seed=0), grammar=grammar))
    assert set(cut.tolist()) == {first + 7, first + 9}


def test_samples_of_a_row_do_not_depend_on_the_allowed_tokens_of_other_rows():
    # With evenly spaced draws, a count can be wrong by at most one draw at each end of a token's interval.
    logits = torch.tensor([0.1, 0.2, 0.0, 0.3, 0.4]).log().expand(2000, -1)
    few, all_of_them = torch.tensor([3, 1]), torch.arange(5)
    draws = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    generated = sample_allowed(logits, Sampling(temperature=1), draws, [few] * 1999 + [all_of_them])[:-1]
    shares = torch.bincount(generated, minlength=5) / 1999
    torch.testing.assert_close(shares, torch.tensor([0, 0.4, 0, 0.6, 0]), rtol=0, atol=1.6e-3)


def test_rows_without_a_grammar_are_unconstrained_in_a_batch_with_constrained_rows(processors):
    processor = processors["words"]
    held = Grammar.for_objects(processor, ["cat"])
    requests = [question(grammar=held if i % 2 else None) for i in range(6)]
    constant = noise(5)(1, processor.image_token_id + 16)
    model = Noise(processor, lambda rows, _: constant.repeat(rows, 1))
    options = {"max_new_tokens": 12, "eos_token_id": processor.eos_token_id}
    first = Sampling(temperature=1, seed=0)
    for answer in generate_many(model, requests, rows=4, sampling=first, grammar=held, **options):
        grammar = held if answer.index % 2 else None
        sampling = Sampling(temperature=1, seed=answer.index)
        alone = torch.cat(list(generate(model, question(), sampling=sampling, grammar=grammar, **options))).tolist()
        assert answer.token_ids == alone
        assert (first_refused(held, alone, 12) is None) == bool(answer.index % 2)
    (answer,) = generate_many(model, [question()], rows=4, sampling=first, grammar=held, **options)  # the grammar of all requests
    assert first_refused(held, answer.token_ids, 12) is None


# A trained model


@pytest.fixture(scope="module")
def demo():
    return load_model(DEMO, device="cpu", dtype=torch.float32), PaliGemmaProcessor.from_pretrained(DEMO)


def test_a_valid_answer_is_not_changed_and_others_become_valid(demo):
    model, processor = demo
    picture = load_image(ROOT / "examples" / "shapes.png")
    questions = [["yellow circle"], ["circle"], ["circle", "square"], ["triangle"], ["cat"], ["orange cross", "purple heart"]]
    num_same = 0
    for labels in questions:
        inputs = processor(picture, "detect " + " ; ".join(labels))
        grammar = Grammar.for_objects(processor, labels)
        free, held = (
            torch.cat(list(generate(model, inputs, max_new_tokens=64, eos_token_id=1, grammar=rule))).tolist()
            for rule in (None, grammar)
        )
        parse(processor.decode(held), labels, False)
        if first_refused(grammar, free, 64) is None:
            assert held == free
            num_same += len(free) > 1
    assert num_same


# Refused arguments


@pytest.mark.parametrize(
    "labels, message",
    [
        ([], "the labels are \\[\\]"),
        ("cat", "the labels are 'cat'"),
        (["cat ; dog"], "the label 'cat ; dog' contains a separator"),
        (["a;b"], "the label 'a;b' contains a separator"),
        (["two\nlines"], "contains a separator or a location"),
        (["cat", "<loc0012> dog"], "the label '<loc0012> dog' contains a separator or a location"),
        (["x<seg127>"], "contains a separator or a location"),
        (["\ud800"], "not valid UTF-8"),
    ],
)
def test_labels_that_could_not_be_parsed_again_are_refused(processors, labels, message):
    with pytest.raises(PromptError, match=message) as caught:
        Grammar.for_objects(processors["demo"], labels)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("most", [0, -1, 1.5, True, None])
def test_a_bad_number_of_objects_is_refused(processors, most):
    with pytest.raises(GenerationError, match="max_objects is ") as caught:
        Grammar.for_objects(processors["demo"], ["cat"], max_objects=most)
    assert caught.value.code == 2


def test_a_label_given_twice_counts_once(processors):
    grammar = Grammar.for_objects(processors["demo"], ["cat", " cat ", "cat"])
    assert grammar.num_labels == 1
    assert grammar == Grammar.for_objects(processors["demo"], ["cat"])


def test_the_processor_has_the_ids_of_locations_and_codes(processors):
    for processor in processors.values():
        ends = [processor.location_ids[0], processor.location_ids[-1], processor.code_ids[0], processor.code_ids[-1]]
        assert processor.encode("<loc0000><loc1023><seg000><seg127>") == ends
        assert (len(processor.location_ids), len(processor.code_ids)) == (1024, 128)
