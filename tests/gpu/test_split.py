"""Which card gets which layers, and a model whose parts are treated as if they were on several cards (here, the CPU)."""

import pytest
import torch

from paligemma import machine
from paligemma.errors import DeviceError, UsageError
from paligemma.generation import Sampling, generate, generate_many
from paligemma.gpu import split
from paligemma.gpu.split import Placement, SplitCache, bytes_per_card, divide, fewest_cards, place, use_cards
from paligemma.layers.batch_cache import BatchCache
from paligemma.machine import GIB
from tests.tiny import FAMILIES, IMAGE, make_batch, make_model

CPU = torch.device("cpu")
CARDS = [torch.device("cuda", index) for index in range(3)]
ROWS = [(1, 5, 0), (2, 3, 0), (0, 4, 0)]


# Which card gets which layers


@pytest.mark.parametrize(
    "layers, rest, free, cards",
    [
        ([1, 1, 1, 1], 0, [9, 9], [0, 0, 1, 1]),
        ([1, 1, 1, 1], 2, [9, 9], [0, 1, 1, 1]),  # the first card also holds the tower and the embedding
        ([1, 1, 1, 1], 0, [30, 10], [0, 0, 0, 1]),  # in proportion to the free memory
        ([1, 1, 1, 1], 99, [9, 9], [0, 1, 1, 1]),  # each card gets a layer, even where it does not fit
        ([1, 1, 1, 1], 0, [0, 9], [0, 1, 1, 1]),
        ([5, 1, 1, 1], 0, [9, 9], [0, 1, 1, 1]),
        ([1, 1, 1, 5], 0, [9, 9], [0, 0, 0, 1]),
        ([1] * 6, 1, [10, 10, 10], [0, 1, 1, 2, 2, 2]),
        ([1, 1, 1], 9, [9, 9, 9], [0, 1, 2]),
        ([1, 1], 0, [9], [0, 0]),
    ],
)
def test_layers_are_divided_so_that_the_fullest_card_is_as_empty_as_possible(layers, rest, free, cards):
    assert divide(layers, rest, free) == cards


def test_the_largest_model_on_two_cards():
    # PaliGemma 2 28B in bfloat16: 46 layers of 1.12 GB, and 3.3 GB of tower, projector and embedding; free: 40 GB and 24 GB
    layers, rest, free = [1_120_000_000] * 46, 3_300_000_000, [40 * 10**9, 24 * 10**9]
    cards = divide(layers, rest, free)
    needed = bytes_per_card(layers, rest, cards)
    assert (cards.count(0), cards.count(1), sum(needed)) == (28, 18, 46 * 1_120_000_000 + rest)
    assert needed == [28 * 1_120_000_000 + rest, 18 * 1_120_000_000] and needed[0] < free[0] and needed[1] < free[1]


@pytest.mark.parametrize(
    "free, cards",
    [
        ([11, 11], [0]),
        ([9, 11], [1]),
        ([6, 6], [0, 1]),
        ([5, 8, 7], [1, 2]),  # the two with most free memory, the larger one first
        ([4, 4, 4, 4], [0, 1, 2]),
        ([1, 1], [0, 1]),  # too small together: all of them are named in the error
    ],
)
def test_auto_takes_the_fewest_cards_that_suffice(free, cards):
    assert fewest_cards([2, 2, 2, 2], 2, free) == cards


def test_there_are_never_more_cards_than_layers():
    assert fewest_cards([2, 2], 1, [1, 1, 1]) == [0, 1]


SIZES = {"language_model.model.embed_tokens": 2 * GIB, "vision_tower.vision_model.encoder.layers.7.mlp.fc1": GIB} | {
    f"language_model.model.layers.{layer}.{module}": GIB
    for layer in range(12)
    for module in ("mlp.down_proj", "self_attn.q_proj")
}  # 12 layers of 2 GiB, and 3 GiB of everything else


@pytest.fixture
def free(monkeypatch):
    """Sets the free GiB of each card."""

    def set_free(*gib):
        monkeypatch.setattr(machine, "free_memory", lambda card: int(gib[card.index] * GIB))

    return set_free


def test_modules_are_placed_by_the_name_of_their_layer(free):
    free(16, 16)
    placement = place(SIZES, CARDS[:2])
    assert placement == Placement((CARDS[0], CARDS[1]), (0,) * 5 + (1,) * 7)  # 13 GiB and 14 GiB
    assert placement.device("language_model.model.embed_tokens") == placement.device("multi_modal_projector.linear") == CARDS[0]
    assert placement.device("vision_tower.vision_model.encoder.layers.11.mlp.fc1") == CARDS[0]
    assert placement.device("language_model.model.layers.0.mlp.down_proj") == CARDS[0]
    assert placement.device("language_model.model.layers.11.mlp.down_proj") == CARDS[1]
    assert placement.device("language_model.model.layers.11") == CARDS[1]


def test_a_model_that_fits_one_card_stays_on_it(free):
    free(29, 99)
    assert place(SIZES, CARDS[:1], spare=CARDS[:2], room=2 * GIB) == Placement((CARDS[0],), (0,) * 12)
    assert place(SIZES, CARDS[:1], spare=CARDS[:2], room=3 * GIB) == Placement((CARDS[1],), (0,) * 12)


def test_a_card_that_is_too_small_is_told_with_the_memory_of_all(free, monkeypatch):
    free(20, 18)
    monkeypatch.setattr(split, "usable_cards", lambda: [0, 1])
    with pytest.raises(DeviceError) as caught:
        place(SIZES, CARDS[:1], room=GIB)
    assert caught.value.message == (
        "the weights and one answer take 28.00 GiB on cuda:0, which has 20.00 GiB free. The 2 GPUs of this machine have "
        "38.00 GiB free together: take --device cuda:0,cuda:1. Or take --dtype bf16, --quantize int8 or int4, a smaller "
        "model, or another device."
    )


def test_auto_takes_more_cards_only_if_one_is_too_small(free):
    free(20, 4, 18)
    placement = place(SIZES, CARDS[:1], spare=CARDS)
    assert placement.devices == (CARDS[0], CARDS[2]) and placement.cards.count(1) == 6
    with pytest.raises(DeviceError, match=r"the weights take 27.00 GiB on cuda:0, which has 20.00 GiB free"):
        place(SIZES, CARDS[:1])  # a card was named


def test_cards_that_are_too_small_are_all_named(free):
    free(5, 4.5)
    with pytest.raises(DeviceError) as caught:
        place(SIZES, CARDS[:2], room=GIB // 2)
    assert caught.value.code == 6
    assert caught.value.message.startswith(
        "the weights, divided among 2 cards, and one answer take 15.50 GiB on cuda:0, which has 5.00 GiB free; "
        "12.50 GiB on cuda:1, which has 4.50 GiB free. Take --dtype bf16, --quantize"
    )


def test_more_cards_than_layers_are_refused(free):
    free(9, 9, 9)
    with pytest.raises(UsageError, match="device is cuda:0,cuda:1,cuda:2, but the decoder has 2 layers, and each card needs one"):
        place({name: size for name, size in SIZES.items() if "layers.0." in name or "layers.1." in name}, CARDS)


# A model on several cards


def divided(family, cards, **options):
    return use_cards(make_model(family, **options), Placement((CPU,) * (cards[-1] + 1), cards))


@pytest.mark.parametrize("cards", [(0, 0, 1), (0, 1, 2)])
@pytest.mark.parametrize("family, window", [("gemma", None), ("gemma2", None), ("gemma2", 8)])
@torch.no_grad()
def test_logits_are_those_of_one_card(family, window, cards):
    options = {"text": {"sliding_window": window or 4096}, "sliding_window": "config" if window else None}
    plain, model = make_model(family, **options), divided(family, cards, **options)
    batch, tokens = make_batch(ROWS, "right"), torch.randint(3, IMAGE, (12, 3), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(**batch), plain(**batch))
    ours, theirs = model.new_cache(3, 40, BatchCache), plain.new_cache(3, 40, BatchCache)
    assert torch.equal(model.prefill(ours, **batch), plain.prefill(theirs, **batch))
    for step in tokens:
        assert torch.equal(model.decode(ours, step), plain.decode(theirs, step))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_p=0.9, seed=3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_one_card_where_rows_end_and_are_refilled(family, sampling):
    plain, model = make_model(family), divided(family, (0, 1, 1))
    requests = [make_batch([(index % 2, 3 + index, 0)], seed=index) for index in range(7)]
    limits = {"max_new_tokens": 9, "sampling": sampling, "rows": 3, "eos_token_id": list(range(60, 90))}
    ours, theirs = (list(generate_many(each, requests, **limits)) for each in (model, plain))
    assert ours == theirs and len({len(answer.token_ids) for answer in ours}) > 1
    batch = make_batch(ROWS)
    ours, theirs = (torch.stack(list(generate(each, batch, 9, sampling, eos_token_id=None))) for each in (model, plain))
    assert torch.equal(ours, theirs)


def test_a_cache_has_the_layers_of_each_card_and_keeps_rows_that_move_or_grow():
    model, plain = divided("gemma", (0, 1, 1)), make_model("gemma")
    caches = [each.new_cache(3, slots, BatchCache) for each in (model, plain) for slots in (20, 30)]
    ours, larger, theirs, larger_plain = caches
    assert [part.keys.shape[0] for part in ours.parts] == [1, 2] and (ours.slots, larger.slots) == (20, 30)
    batch = make_batch(ROWS, "right")
    with torch.no_grad():
        model.prefill(ours, **batch)
        plain.prefill(theirs, **batch)
    for cache, into in ((ours, larger), (theirs, larger_plain)):
        cache.move_row(2, 0)
        into.copy_from(cache)
    assert torch.equal(torch.cat([part.keys for part in larger.parts]), larger_plain.keys)
    assert torch.equal(torch.cat([part.values for part in larger.parts]), larger_plain.values)
    assert larger.lengths.tolist() == larger.host_lengths.tolist() == larger_plain.lengths.tolist()
    assert larger[1:2].lengths.data_ptr() == larger.lengths[1:].data_ptr()


def test_weights_keep_their_names():
    plain, model = make_model("gemma"), divided("gemma", (0, 1, 1))
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]


def test_another_kind_of_cache_is_refused():
    class Other(BatchCache):
        pass

    with pytest.raises(ValueError, match="an? Other is on one device"):
        divided("gemma", (0, 0, 1)).new_cache(1, 8, Other)
    assert isinstance(divided("gemma", (0, 0, 1)).new_cache(1, 8), SplitCache)


def test_what_each_card_holds_is_said(free, caplog):
    free(16, 16)
    with caplog.at_level("INFO", logger=split.log.name):
        place(SIZES, CARDS[:2])
    assert len(caplog.messages) == 2 and caplog.messages[1].startswith("cuda:1 holds layers ")
