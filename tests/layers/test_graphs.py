"""Recorded steps give the same logits as plain steps, and everything else about them that a CPU can show.

A CUDA graph cannot be made on a CPU. `Replayed` replaces it: it runs the recorded work again on the same memory and writes the
result to the same tensor. A graph must not read the value of a tensor in Python. Two other tests find that: torch.compile with
fullgraph=True refuses it, and tensors on the meta device have no values.
"""

import math
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from paligemma import modeling_gemma
from paligemma.generation import generate, generate_many
from paligemma.layers import graphs, quantization
from paligemma.layers.batch_cache import BatchCache
from paligemma.layers.graphs import CappedAttention, bucket, capped_attention, use_graphs
from paligemma.modeling_gemma import KVCache, attention
from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration
from tests.tiny import FAMILIES, IMAGE, draw, make_batch, make_model

FORMS = [("gemma", None), ("gemma2", None), ("gemma2", 8)]
ROWS = [(1, 5, 0), (2, 3, 0), (0, 4, 0)]


def make(family="gemma", window=None, **text):
    """A tiny model that has, or has not, a sliding window."""
    text |= {"sliding_window": window or 4096}
    return make_model(family, text=text, sliding_window="config" if window else None)


def script(rows, steps, seed=0):
    """Random tokens int64[steps, rows]: the tests compare the logits after them."""
    return torch.randint(3, IMAGE, (steps, rows), generator=torch.Generator().manual_seed(seed))


class Replayed:
    """`graphs.record` for a CPU."""

    def __init__(self, monkeypatch):
        self.count = self.replays = 0
        monkeypatch.setattr(graphs, "record", self.record)

    def record(self, work, pool):  # noqa: ARG002  (the signature is that of graphs.record)
        self.count += 1
        result = torch.full((len(work.__self__.tokens), 160), torch.nan)  # recording runs nothing

        def replay():
            self.replays += 1
            result.copy_(work())

        return replay, result


@pytest.fixture
def recorder(monkeypatch):
    """A stand-in that counts, and buckets small enough for tiny prompts."""
    monkeypatch.setattr(graphs, "SLOTS", 8)
    return Replayed(monkeypatch)


def recorded(family="gemma", window=None, compile_after=10**9, **text):
    return use_graphs(make(family, window, **text), compile_after)


@torch.no_grad()
def answer(model, batch, tokens, slots=40):
    """Logits of prefill and of every step, float32[steps + 1, B, V], and the cache."""
    cache = model.new_cache(len(batch["input_ids"]), slots)
    logits = [model.prefill(cache, **batch)]
    logits += [model.decode(cache, row) for row in tokens]
    return torch.stack(logits), cache


# The same logits


@pytest.mark.parametrize("rows", [ROWS[:1], ROWS])
@pytest.mark.parametrize("family, window", FORMS)
def test_recorded_steps_give_the_logits_of_plain_steps(family, window, rows, recorder):
    # A mask over more slots adds zeros to sums in another order: 1.0e-5 is the largest gap over 20 seeds, in logits of 20.
    batch, tokens = make_batch(rows, "right"), script(len(rows), 14)
    plain, _ = answer(make(family, window), batch, tokens)
    ours, cache = answer(recorded(family, window), batch, tokens)
    assert (ours - plain).abs().max() <= 4e-5
    assert recorder.replays > 0 and cache.lengths.tolist() == cache.host_lengths.tolist()


def test_a_step_outlives_bucket_after_bucket(recorder):
    batch, tokens = make_batch([(1, 2, 0), (0, 1, 0)], "right"), script(2, 33)
    plain, _ = answer(make(), batch, tokens)
    ours, cache = answer(recorded(), batch, tokens)
    assert (ours - plain).abs().max() <= 4e-5
    assert sorted(cache.steps.steps) == [(2, 8), (2, 16), (2, 32), (2, 40)]
    assert recorder.count == 3 and recorder.replays == 33 - 2 - 3 - 3 - 3  # two steps in the first bucket, warm-up in the others


@pytest.mark.usefixtures("recorder")
@torch.no_grad()
def test_rows_that_are_not_decoded_are_left_as_they_were():
    # Five rows in a cache of eight: a graph of eight rows steps over the fifth and three that were never used.
    batch = make_batch([(1, 5, 0), (1, 3, 0), (0, 4, 0), (1, 2, 0), (0, 6, 0)], "right")
    logits = {}
    for name, model in (("plain", make()), ("ours", recorded())):
        cache = model.new_cache(8, 24, BatchCache)
        model.prefill(cache[:5], **batch)
        for row in script(4, 6):
            logits[name] = model.decode(cache[:4], row)
        assert cache.lengths.tolist() == cache.host_lengths.tolist() == [15, 13, 10, 12, 6, 0, 0, 0]
        for row in script(5, 6):
            logits[name] = model.decode(cache[:5], row)
        assert cache.lengths.tolist() == cache.host_lengths.tolist() == [21, 19, 16, 18, 12, 0, 0, 0]
    assert (logits["ours"] - logits["plain"]).abs().max() <= 4e-5
    assert {rows for rows, _ in cache.steps.steps} == {4, 8}


@torch.no_grad()
def test_a_row_that_is_full_is_never_part_of_a_larger_graph(recorder):
    model = recorded()
    cache = model.new_cache(4, 8)
    model.prefill(cache, **make_batch([(0, 3, 0), (0, 3, 0), (0, 3, 0), (1, 4, 0)], "right"))
    for row in script(3, 5):
        model.decode(cache[:3], row)
    assert cache.lengths.tolist() == [8, 8, 8, 8] and set(cache.steps.steps) == {(3, 8)}
    assert recorder.replays == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_many_answers_are_the_same_as_without_graphs(family, recorder):
    # Seven requests of other lengths through three rows: rows end, are moved and are filled again.
    requests = [make_batch([(1, 2 + i, 0)], seed=i) for i in range(7)]
    plain, ours = make(family), recorded(family)
    eos = list(range(3, 30))  # of 125 words, so that most answers end early
    expected, found = (
        sorted(generate_many(model, requests, rows=3, max_new_tokens=12, eos_token_id=eos), key=lambda answer: answer.index)
        for model in (plain, ours)
    )
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]
    assert len({len(answer.token_ids) for answer in found}) > 1 and recorder.replays > 5


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_gives_the_same_tokens_as_without_graphs(family, recorder):
    batch = make_batch(ROWS)
    plain, ours = (torch.stack(list(generate(model, batch, max_new_tokens=20))) for model in (make(family), recorded(family)))
    assert torch.equal(plain, ours) and recorder.replays > 10


# When what is done


def test_buckets():
    assert [bucket(n, 1, 6) for n in (1, 2, 3, 4, 5, 6)] == [1, 2, 4, 4, 6, 6]
    assert [bucket(n, 256, 1280) for n in (1, 256, 257, 513, 1024, 1025, 1280)] == [256, 256, 512, 1024, 1024, 1280, 1280]


def test_a_cache_holds_what_was_asked_for_and_is_a_multiple_of_what_a_graph_reads():
    model = recorded()
    assert [model.new_cache(1, slots).slots for slots in (1, 256, 257)] == [256, 256, 512]


@pytest.mark.usefixtures("recorder")
def test_parts_of_a_cache_share_its_steps():
    model = recorded()
    cache = model.new_cache(4, 16)
    assert cache[:2].steps is cache.steps is cache[:3][:1].steps
    assert not hasattr(cache.steps.cache, "steps")  # no cycle, so that the memory is free when the cache is


@torch.no_grad()
def test_what_cannot_be_recorded_is_decoded_normally(recorder):
    model, tokens = recorded(), script(2, 6)
    part = model.new_cache(3, 24)[1:]  # graphs begin at row 0
    other = KVCache(model.config.text_config, 2, 24, device=model.device, dtype=model.dtype)
    batch = make_batch(ROWS[:2], "right")
    for cache in (part, other):
        model.prefill(cache, **batch)
        for row in tokens:
            model.decode(cache, row)
        assert cache.lengths.tolist() == [15, 17]
        assert recorder.count == 0
    cache = model.new_cache(2, 24)
    model.__class__ = type("FSDPPaliGemma", (graphs.RecordedPaliGemma,), {})  # as sharding does it
    model.prefill(cache, **batch)
    for row in tokens:
        model.decode(cache, row)
    assert recorder.count == 0


@pytest.mark.usefixtures("recorder")
def test_a_step_with_gradients_is_not_recorded():
    model = recorded()
    cache = model.new_cache(1, 16)
    with torch.no_grad():
        model.prefill(cache, **make_batch(ROWS[:1], "right"))
    assert model.decode(cache, script(1, 1)[0]).requires_grad and cache.steps.steps == {}


@pytest.mark.usefixtures("recorder")
@torch.no_grad()
def test_logits_stay_when_the_next_step_has_run():
    model = recorded()
    cache = model.new_cache(1, 24)
    model.prefill(cache, **make_batch(ROWS[:1], "right"))
    kept = [model.decode(cache, row) for row in script(1, 6)]  # in one bucket, the last three from its graph
    copies = [logits.clone() for logits in kept]
    model.decode(cache, script(1, 1)[0])
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True)) and not torch.equal(kept[-1], kept[-2])


def test_a_recording_that_fails_is_logged_once_and_decoding_continues(monkeypatch, caplog):
    def fail(work, pool):  # noqa: ARG001  (the signature is that of graphs.record)
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(graphs, "record", fail)
    graphs.warn_once.cache_clear()
    batch, tokens = make_batch(ROWS, "right"), script(3, 9)
    plain, _ = answer(make(), batch, tokens)
    for _ in range(2):
        ours, _ = answer(recorded(), batch, tokens)
        assert (ours - plain).abs().max() <= 4e-5
    assert caplog.messages == ["decoding is not recorded as a CUDA graph: operation not permitted"]


def test_a_model_without_graphs_is_the_model_itself():
    model = make("gemma2")
    names = list(model.state_dict())
    model = use_graphs(model)
    assert isinstance(model, PaliGemmaForConditionalGeneration) and list(model.state_dict()) == names
    assert model.compile_after == graphs.COMPILE_AFTER


# Compiled


def test_inductor_knows_the_options_of_the_compiled_step():
    assert callable(graphs.compiled_step())  # torch.compile refuses others


@pytest.fixture
def compiled(monkeypatch):
    """Compiles as graphs.py does, fullgraph, but runs what was traced as it is: inductor would take minutes on a CPU."""
    compiled = torch.compile(PaliGemmaForConditionalGeneration.step, fullgraph=True, dynamic=False, backend="eager")
    monkeypatch.setattr(graphs, "compiled_step", lambda: compiled)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("family, window", FORMS)
def test_the_compiled_step_has_no_graph_break_and_gives_the_same_logits(family, window, recorder):
    batch, tokens = make_batch(ROWS, "right"), script(3, 4)
    plain, _ = answer(make(family, window, num_hidden_layers=2), batch, tokens)
    ours, cache = answer(recorded(family, window, compile_after=0, num_hidden_layers=2), batch, tokens)
    assert (ours - plain).abs().max() <= 4e-5
    (step,) = cache.steps.steps.values()
    assert step.function is graphs.compiled_step() and (recorder.count, recorder.replays) == (1, 4)  # recorded at once


@pytest.mark.usefixtures("compiled")
def test_a_step_is_compiled_after_so_many(recorder):
    batch, tokens = make_batch(ROWS[:1], "right"), script(1, 7)
    plain, _ = answer(make(num_hidden_layers=1), batch, tokens)
    ours, cache = answer(recorded(compile_after=5, num_hidden_layers=1), batch, tokens)
    assert (ours - plain).abs().max() <= 4e-5
    assert recorder.count == 2 and cache.steps.steps[1, 16].function is graphs.compiled_step()


@pytest.mark.usefixtures("recorder")
def test_compiling_that_fails_is_logged_once_and_decoding_continues(monkeypatch, caplog):
    import torch._dynamo

    def fail(model, cache, tokens):  # noqa: ARG001  (the signature is that of a step)
        cache.lengths += 1
        raise torch._dynamo.exc.TorchRuntimeError("no working compiler", None)

    monkeypatch.setattr(graphs, "compiled_step", lambda: fail)
    graphs.warn_once.cache_clear()
    batch, tokens = make_batch(ROWS, "right"), script(3, 9)
    plain, _ = answer(make(), batch, tokens)
    ours, _ = answer(recorded(compile_after=4), batch, tokens)
    assert (ours - plain).abs().max() <= 4e-5
    assert caplog.messages == ["decoding is not compiled: no working compiler"]


@torch.no_grad()
def test_inductor_writes_a_token_without_copying_the_cache():
    """inductor's own code for the step, made but not run: it has no buffer of a layer's cache, and no piece of what is read."""
    from torch._inductor.utils import get_code

    model = make("gemma2", 8, num_hidden_layers=2)
    cache = model.new_cache(2, 40, BatchCache)
    torch._dynamo.reset()
    with torch._inductor.config.patch({"force_disable_caches": True, "compile_threads": 1, "cpp.simdlen": 1}):
        step = torch.compile(PaliGemmaForConditionalGeneration.step, fullgraph=True, dynamic=False)
        code = "\n".join(get_code(step, model, cache.fixed(24), torch.tensor([5, 6])))
    torch._dynamo.reset()
    heads, width = model.config.text_config.num_key_value_heads, model.config.text_config.head_dim
    buffers = [eval(shape) for shape in re.findall(r"empty_strided_cpu\((\([^)]*\))", code)]
    assert len(buffers) > 10
    assert max(math.prod(shape) for shape in buffers) < 2 * heads * 24 * width


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantised_step_compiles_without_a_break(kind, monkeypatch):
    """The product of few rows, which is compiled by itself elsewhere, becomes a part of the step."""
    model = make(num_hidden_layers=1)
    for name in quantization.targets(model):
        module = model.get_submodule(name)
        model.set_submodule(name, quantization.quantize_module(module, kind, {"weight": module.weight.detach()}))
        model.get_submodule(name).change_to_rows()  # as on CUDA
    monkeypatch.setattr(quantization, "compiled_small_batch_product", lambda: quantization.small_batch_product_in_float32)
    product = quantization.small_batch_product
    monkeypatch.setattr(quantization, "product_of_row_layout", lambda *arguments: product(*arguments[:4]))
    cache = model.new_cache(2, 24, BatchCache)
    with torch.no_grad():
        model.prefill(cache, **make_batch(ROWS[:2], "right"))
        plain = model.step(cache.fixed(16), script(2, 1)[0])
        cache.lengths.sub_(1)
        torch._dynamo.reset()
        monkeypatch.setattr(quantization, "compiled_small_batch_product", None)  # a call while compiling would fail
        step = torch.compile(PaliGemmaForConditionalGeneration.step, fullgraph=True, dynamic=False, backend="eager")
        assert (step(model, cache.fixed(16), script(2, 1)[0]) - plain).abs().max() <= 4e-5
    torch._dynamo.reset()


# No step waits for the device


@pytest.mark.parametrize("family, window", FORMS)
@torch.no_grad()
def test_prefill_and_decode_ask_the_device_for_nothing(family, window):
    """On the meta device tensors have a shape but no numbers, so that reading a number is an error."""
    model = make(family, window).to("meta")
    cache = model.new_cache(3, 24, BatchCache)
    assert model.prefill(cache[:1], **make_batch([(1, 5, 0)])).is_meta  # open to all
    assert model.prefill(cache, **make_batch([(1, 5, 0), (2, 3, 0), (0, 4, 2)], "right")).is_meta
    assert model.decode(cache, torch.tensor([5, 6, 7])).is_meta
    with pytest.raises(RuntimeError, match="meta"):
        model.decode(cache, torch.tensor([5, 6, 7]))[0, 0].item()


# Attention


@pytest.mark.parametrize("heads, key_heads, mask", [(4, 2, None), (4, 2, "ragged"), (4, 1, "ragged"), (3, 3, "per row")])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_capped_attention_equals_plain_attention(heads, key_heads, mask):
    # Sums in another order: 4.8e-7 is the largest gap over 20 seeds, of values of size 1; 3e-6 leaves a factor of 6.
    q, k, v = draw(2, heads, 13, 16), draw(2, key_heads, 13, 16, seed=1), draw(2, key_heads, 13, 16, seed=2)
    if mask:
        looks = draw(2 if mask == "ragged" else 1, 1, 13, 13, seed=3) > 0
        mask = (looks | torch.eye(13, dtype=torch.bool)).expand(2, -1, -1, -1)
    written_out = attention(q, k, v, mask, 0.3, 2.0)
    assert (capped_attention(q, k, v, mask, 0.3, 2.0) - written_out).abs().max() <= 3e-6
    assert (attention(q, k, v, mask, 0.3, 1e6) - written_out).abs().max() > 0.05  # the cap changes the result


def test_capped_attention_compiles_without_a_break():
    q, k, v = draw(2, 4, 13, 16), draw(2, 2, 13, 16, seed=1), draw(2, 2, 13, 16, seed=2)
    mask = torch.ones(2, 1, 13, 13, dtype=torch.bool).tril()
    torch._dynamo.reset()
    compiled = torch.compile(capped_attention, fullgraph=True, backend="eager")
    for looks in (mask, None):
        with torch.no_grad():
            ours, plain = compiled(q, k, v, looks, 0.3, 2.0), attention(q, k, v, looks, 0.3, 2.0)
        assert (ours - plain).abs().max() <= 3e-6
    torch._dynamo.reset()


@pytest.fixture
def capped(monkeypatch):
    """Capped attention for every length, as it is when not compiled; its calls."""
    calls = []

    def run(*arguments):
        calls.append(arguments)
        return capped_attention(*arguments)

    monkeypatch.setattr(graphs, "MIN_TOKENS_TO_COMPILE_CAP", 2)
    monkeypatch.setattr(graphs, "compiled_capped_attention", lambda: run)
    monkeypatch.setattr(CappedAttention, "is_working", True)
    return calls


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 8])
def test_a_long_prompt_goes_through_capped_attention_only_in_gemma_2(window, capped):
    batch = make_batch(ROWS, "right")
    plain, _ = answer(make("gemma2", window), batch, script(3, 2))
    ours, _ = answer(recorded("gemma2", window), batch, script(3, 2))
    assert len(capped) == 3 and (ours - plain).abs().max() <= 4e-5  # a layer each, and none in decoding
    answer(recorded("gemma"), batch, [])
    model = recorded("gemma2")
    model(**batch)  # with gradients
    assert len(capped) == 3


def test_capped_attention_that_fails_falls_back_to_plain_attention(monkeypatch, capped, caplog):
    def fail(*_):
        raise RuntimeError("out of shared memory\nReduce block sizes")

    monkeypatch.setattr(graphs, "compiled_capped_attention", lambda: fail)
    graphs.warn_once.cache_clear()
    batch = make_batch(ROWS, "right")
    ours, _ = answer(recorded("gemma2"), batch, [])
    assert torch.equal(ours, answer(make("gemma2"), batch, [])[0])
    assert caplog.messages == ["attention with soft caps is not compiled: out of shared memory"] and not capped


class KeysSeen(TorchDispatchMode):
    """What torch's attention is given as keys."""

    def __init__(self):
        super().__init__()
        self.keys = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "scaled_dot_product" in str(function):
            self.keys.append(args[1])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("key_heads, length", [(1, 13), (2, 13), (1, 1), (2, 1)])
@pytest.mark.parametrize("is_masked", [False, True])
def test_every_kernel_gets_as_many_key_heads_as_query_heads(key_heads, length, is_masked):
    # With enable_gqa, CUDA's kernels for a mask or for float32 step aside for one that writes out all scores in float32.
    q, k, v = draw(2, 4, length, 16), draw(2, key_heads, 13, 16, seed=1), draw(2, key_heads, 13, 16, seed=2)
    with torch.no_grad(), KeysSeen() as seen:
        attention(q, k, v, torch.ones(2, 1, length, 13, dtype=torch.bool) if is_masked else None, 0.3, None)
    (keys,) = seen.keys
    assert keys.shape[1] == (4 if length > 1 else key_heads)
    assert (keys.data_ptr() == k.data_ptr()) == (key_heads == 1 or length == 1)  # one head is spread without a copy


class Largest(TorchDispatchMode):
    """The largest float tensor, in numbers, that any operation makes."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float32]
        self.size = max([self.size, *(leaf.numel() for leaf in made)])
        return result


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_one_picture_of_many_tokens_makes_no_scores_of_all_by_all(family, monkeypatch):
    """4096 tokens of 896 px, to scale: 144 tokens, and 8 queries at a time where scores are written out."""
    monkeypatch.setattr(modeling_gemma, "QUERY_BLOCK", 8)
    tokens, heads, ids = 144, 4, torch.full((1, 144), 5)
    model = make(family, intermediate_size=40)
    cache = model.new_cache(1, tokens)
    with Largest() as largest:
        model.prefill(cache, ids, token_type_ids=torch.zeros_like(ids))
    assert tokens * 64 <= largest.size <= max(tokens * 64, 8 * heads * tokens)  # queries, or the scores of a block
    assert largest.size < tokens * tokens


# Threads


def test_threads_record_one_after_the_other_and_get_the_answers_of_one(recorder, monkeypatch):
    model, batch, inside, together = recorded(), make_batch(ROWS, "right"), threading.Semaphore(1), []
    tokens = script(3, 8)

    def record(work, pool):
        together.append(not inside.acquire(blocking=False))
        time.sleep(0.01)
        inside.release()
        return recorder.record(work, pool)

    monkeypatch.setattr(graphs, "record", record)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: answer(model, batch, tokens)[0], range(4)))
    assert together == [False] * len(together) and len(together) >= 4
    assert all(logits.equal(answer(model, batch, tokens)[0]) for logits in answers)
