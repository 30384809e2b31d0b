"""Recorded steps give the same logits as plain steps, and everything else about them that a CPU can show.

A CUDA graph cannot be made on a CPU. `Replayed` replaces it: it runs the recorded work again on the same memory and writes the
result to the same tensor. A graph must not read the value of a tensor in Python. Two other tests find that: torch.compile with
fullgraph=True refuses it, and tensors on the meta device have no values.
"""

import copy
import gc
import math
import re
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from paligemma import devices, modeling_gemma
from paligemma.errors import UsageError
from paligemma.generation import generate, generate_many
from paligemma.gpu import graphs, packed_products, self_check
from paligemma.gpu.graphs import bucket, use_graphs
from paligemma.layers import quantization
from paligemma.layers.batch_cache import BatchCache
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
        self.harm = None  # what goes wrong in each replay
        self.bakes = False  # whether the token of the recorded step is used in each replay
        monkeypatch.setattr(graphs, "record", self.record)

    def record(self, work, _stream):
        self.count += 1
        with torch.inference_mode(False):  # a graph writes to the result in any mode
            result = torch.full((len(work.__self__.tokens), 160), torch.nan, device="cpu")  # recording runs nothing
        recorded_tokens = work.__self__.tokens.clone()
        work = weakref.WeakMethod(work)  # a graph does not keep the step

        def replay():
            self.replays += 1
            step = work().__self__
            tokens = step.tokens
            step.tokens = recorded_tokens if self.bakes else tokens
            result.copy_(step.work())
            step.tokens = tokens
            if self.harm is not None:
                self.harm(step)

        return replay, result


@pytest.fixture
def recorder(monkeypatch):
    """A stand-in that counts, and buckets small enough for tiny prompts."""
    monkeypatch.setattr(graphs, "SLOTS", 8)
    return Replayed(monkeypatch)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """What torch.cuda would say about a card with enough memory; and no check of another test is remembered."""
    monkeypatch.setattr(graphs, "own_stream", lambda _device: object())
    monkeypatch.setattr(graphs, "free_bytes", lambda _device: 2**40)
    self_check.reset_all()
    yield
    self_check.reset_all()


def recorded(family="gemma", window=None, mode="record", **text):
    return graphs.RecordedPaliGemma(make(family, window, **text), compiles=mode == "compile")


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
    assert recorder.count == 4 and recorder.replays == 33 - 4 * graphs.WARM_UP


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
    assert recorder.replays == 5 - graphs.WARM_UP


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


def test_a_recorded_model_has_the_parameters_of_the_model():
    model = recorded("gemma2")
    assert isinstance(model, PaliGemmaForConditionalGeneration)
    assert list(model.state_dict()) == list(make("gemma2").state_dict())


@pytest.mark.parametrize("mode, records, is_recorded", [
    ("off", True, False), ("auto", True, True), ("auto", False, False), ("record", False, True), ("compile", False, True),
])  # fmt: skip
def test_the_mode_and_the_profile_decide_what_is_recorded(mode, records, is_recorded, monkeypatch):
    monkeypatch.setattr(devices, "profile", lambda _device: devices.Profile("test", ("float32",), records))
    model = make()
    assert use_graphs(model, mode) is model  # on a CPU
    monkeypatch.setattr(PaliGemmaForConditionalGeneration, "device", torch.device("cuda"))
    chosen = use_graphs(model, mode)
    assert isinstance(chosen, graphs.RecordedPaliGemma) == is_recorded and (is_recorded or chosen is model)
    assert not is_recorded or chosen.compiles == (mode == "compile")
    monkeypatch.setenv("PALIGEMMA_GRAPHS", mode)
    assert type(use_graphs(model)) is type(chosen)


@pytest.mark.parametrize("device, hip", [("cpu", None), ("mps", None), ("cuda", "6.4")])
def test_nothing_is_recorded_on_a_cpu_on_apples_and_on_amds_gpus(device, hip, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "a card")
    assert not devices.profile(torch.device(device)).records


def test_another_mode_is_refused(monkeypatch):
    with pytest.raises(UsageError, match="graphs is 'on'"):
        use_graphs(make(), "on")
    monkeypatch.setenv("PALIGEMMA_GRAPHS", "on")
    with pytest.raises(UsageError, match="PALIGEMMA_GRAPHS is 'on'"):
        use_graphs(make())


# When recording fails, or is wrong


REPORT = "decoding without them. Please report the output of `paligemma doctor`."


def test_after_a_recording_that_fails_nothing_is_recorded_in_this_process(monkeypatch, caplog):
    attempts = []

    def fail(work, _stream):
        attempts.append(work)
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(graphs, "record", fail)
    batch, tokens = make_batch(ROWS, "right"), script(3, 9)
    plain, _ = answer(make(), batch, tokens)
    for _ in range(2):
        ours, cache = answer(recorded(), batch, tokens)
        assert (ours - plain).abs().max() <= 4e-5
    assert len(attempts) == 1 and cache.steps.steps == {}  # later steps read no more slots than they need
    assert caplog.messages == [f"recorded steps fail (RuntimeError: operation not permitted): {REPORT}"]


def spoil_logits(step):
    step.recording.logits.mul_(-1)


def spoil_keys(step):
    step.cache.keys[1][torch.arange(len(step.tokens)), :, step.cache.lengths - 1] += 5


def forget_values(step):
    for values in step.cache.values:
        values[torch.arange(len(step.tokens)), :, step.cache.lengths - 1] = 0


def count_twice(step):
    step.cache.lengths += 1


def overflow(step):
    step.recording.logits[0, 3] = torch.nan


def fault(_step):
    raise RuntimeError("illegal memory access")


@pytest.mark.parametrize("harm", [spoil_logits, spoil_keys, forget_values, overflow, fault])
def test_a_recording_that_is_wrong_is_found_at_its_first_replay(harm, recorder, caplog):
    batch, tokens = make_batch(ROWS, "right"), script(3, 9)
    plain, _ = answer(make(), batch, tokens)
    recorder.harm = harm
    for _ in range(2):
        ours, _ = answer(recorded(), batch, tokens)
        assert (ours - plain).abs().max() <= 4e-5
    assert (recorder.count, recorder.replays) == (1, 1)
    (line,) = caplog.messages
    assert line.startswith("recorded steps fail (RuntimeError: illegal" if harm is fault else "recorded steps differ on cpu (rel")
    assert line.endswith(REPORT)


def test_what_was_recorded_of_one_step_only_is_found(recorder):
    """A graph that has a number of the recorded step in it, instead of reading it in each step."""
    batch, tokens = make_batch(ROWS, "right"), script(3, 9)
    plain, _ = answer(make(), batch, tokens)
    recorder.bakes = True
    ours, _ = answer(recorded(), batch, tokens)
    assert (ours - plain).abs().max() <= 4e-5 and recorder.replays == 1 and not graphs.RECORDED.is_on


def test_the_check_costs_one_step_per_shape(recorder, monkeypatch):
    steps = []
    monkeypatch.setattr(graphs, "plain_step", lambda *arguments: steps.append(arguments) or plain_step(*arguments))
    plain_step = PaliGemmaForConditionalGeneration.step
    answer(recorded(), make_batch([(1, 5, 0)], "right"), script(1, 6))
    assert len(steps) - recorder.replays == graphs.WARM_UP + 1 and recorder.replays == 4  # a replay of the fake is a step, too


def test_a_step_that_overflows_in_both_ways_is_no_difference(recorder):
    model = recorded()
    with torch.no_grad():
        model.language_model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.inf
    logits, _ = answer(model, make_batch([(1, 5, 0)], "right"), script(1, 6))
    assert recorder.replays == 4 and graphs.RECORDED.is_on and logits.isnan().any()


def test_a_step_is_recorded_by_the_thread_in_which_it_ran(recorder):
    model, batch, tokens = recorded(), make_batch([(1, 2, 0)], "right"), script(1, 9)
    plain, _ = answer(make(), batch, tokens)
    cache = model.new_cache(1, 24)
    logits = [model.prefill(cache, **batch)]
    order, thread_steps = [], []
    run = graphs.Step.work

    def decode(row):
        with torch.no_grad():
            logits.append(model.decode(cache, row))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs.Step, "work", lambda step: thread_steps.append(threading.get_ident()) or run(step))
        patch.setattr(graphs, "record", lambda *arguments: order.append(threading.get_ident()) or recorder.record(*arguments))
        for row in tokens[:2]:  # to the end of the bucket of 8 slots
            decode(row)
        order.clear(), thread_steps.clear()
        for start in (2, 3, 4):  # a thread per step: none is long enough at work
            with ThreadPoolExecutor(1) as pool:
                pool.submit(decode, tokens[start]).result()
        assert order == [] and len(set(thread_steps)) >= 1
        for row in tokens[5:]:
            decode(row)
    assert order == [threading.get_ident()] and thread_steps[-graphs.WARM_UP - 1 :].count(order[0]) >= graphs.WARM_UP
    assert (torch.stack(logits) - plain).abs().max() <= 4e-5


def test_nothing_is_recorded_while_memory_is_short(recorder, monkeypatch):
    model, batch = recorded(), make_batch([(1, 5, 0)], "right")
    monkeypatch.setattr(graphs, "free_bytes", lambda _device: graphs.MIN_FREE_BYTES - 1)
    answer(model, batch, script(1, 6))
    assert recorder.count == 0 and model.spare.take() is None and graphs.RECORDED.state == "unchecked"
    monkeypatch.setattr(graphs, "free_bytes", lambda _device: graphs.MIN_FREE_BYTES)
    answer(model, batch, script(1, 6))
    assert recorder.count == 1


def test_a_model_that_was_moved_to_the_cpu_records_nothing_and_says_nothing(recorder, monkeypatch, caplog):
    batch, tokens = make_batch(ROWS, "right"), script(3, 9)
    plain, _ = answer(make(), batch, tokens)
    monkeypatch.undo()
    model = recorded()
    assert (answer(model, batch, tokens)[0] - plain).abs().max() <= 4e-5
    assert recorder.count == 0 and not model.spare.waiting and caplog.messages == [] and graphs.RECORDED.is_on


class Stream:
    """torch.cuda.Stream: the 32 streams of a device, in turn."""

    handed_out = 0

    def __init__(self, device):
        self.device, self.number = device, Stream.handed_out % 32
        Stream.handed_out += 1

    def __eq__(self, other):
        return self.number == other.number

    def __hash__(self):
        return self.number


def test_no_two_graphs_have_the_same_stream(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(graphs, "STREAMS_IN_USE", weakref.WeakSet())
    first = [graphs.own_stream("cuda:0") for _ in range(10)]
    del first[3]
    others = [graphs.own_stream("cuda:0") for _ in range(23)]
    assert len({stream.number for stream in first + others}) == 32
    assert graphs.own_stream("cuda:0") is None
    number = others.pop(7).number
    assert graphs.own_stream("cuda:0").number == number


def test_without_a_stream_of_its_own_a_step_is_not_recorded(recorder, monkeypatch):
    monkeypatch.setattr(graphs, "own_stream", lambda _device: None)
    answer(recorded(), make_batch([(1, 5, 0)], "right"), script(1, 6))
    assert recorder.count == 0 and graphs.RECORDED.is_on


# A cache outlives the answer


def test_nothing_is_compiled_unless_asked_for(recorder, monkeypatch):
    monkeypatch.setattr(graphs, "compiled_step", lambda: 1 / 0)
    answer(recorded(), make_batch(ROWS, "right"), script(3, 9))
    assert graphs.COMPILED.state == "unchecked" and recorder.replays > 0


def test_ten_answers_record_once(recorder):
    batch, tokens = make_batch(ROWS, "right"), script(3, 5)
    model = recorded()
    fresh, _ = answer(make(), batch, tokens)
    for _ in range(10):
        ours, cache = answer(model, batch, tokens, slots=16)
        assert (ours - fresh).abs().max() <= 4e-5
        del cache
    assert recorder.count == 1 and recorder.replays == 10 * 5 - graphs.WARM_UP


def test_answers_of_generate_record_once(recorder):
    model, plain = recorded(), make()
    for length in (5, 6):
        batch = make_batch([(1, length, 0), (1, 2, 0)])
        for _ in range(2):
            ours, expected = (list(generate(each, batch, max_new_tokens=6, eos_token_id=None)) for each in (model, plain))
            assert torch.equal(torch.stack(ours), torch.stack(expected))
    assert recorder.count == 1  # all steps are in the bucket of 16 slots


def memory(cache):
    return cache.keys.untyped_storage().data_ptr()


def test_a_cache_in_use_is_not_handed_out_again_and_the_larger_one_is_kept():
    model = recorded()
    first, second, third = model.new_cache(1, 16), model.new_cache(4, 16), model.new_cache(2, 16)
    assert len({memory(each) for each in (first, second, third)}) == 3
    kept = memory(second)
    del second, first, third
    assert len(model.spare.waiting) == 1
    again = model.new_cache(3, 16)
    assert memory(again) == kept and again.lengths.shape == again.host_lengths.shape == (3,) and again.keys.shape[1] == 3


def test_a_part_of_a_cache_keeps_it_in_use():
    model = recorded()
    cache = model.new_cache(4, 16)
    place, part = memory(cache), cache[:2][:1]
    del cache
    assert memory(model.new_cache(4, 16)) != place
    del part
    assert memory(model.new_cache(4, 16)) == place


@pytest.mark.parametrize("rows, slots", [(3, 16), (2, 24)])
@pytest.mark.usefixtures("recorder")
def test_a_cache_that_is_too_small_is_freed_before_a_larger_one_is_made(rows, slots, monkeypatch):
    model = recorded()
    cache = model.new_cache(2, 16)
    small = weakref.ref(cache.steps)
    make_steps, alive = graphs.Steps, []
    monkeypatch.setattr(graphs, "Steps", lambda *arguments: alive.append(small()) or make_steps(*arguments))
    del cache
    assert small() is not None
    assert model.new_cache(rows, slots).slots >= slots and alive == [None]


@pytest.mark.usefixtures("recorder")
@torch.no_grad()
def test_nothing_of_an_answer_is_left_in_the_next_one():
    batch, tokens = make_batch(ROWS, "right"), script(3, 9)
    expected, _ = answer(recorded(), batch, tokens, slots=24)
    self_check.reset_all()
    model = recorded()
    cache = model.new_cache(3, 24)
    place = memory(cache)
    model.prefill(cache, **make_batch([(2, 6, 0), (1, 7, 0), (1, 2, 0)], "right"))
    cache.keys.fill_(torch.nan), cache.values.fill_(torch.inf)
    del cache
    ours, cache = answer(model, batch, tokens, slots=24)
    assert memory(cache) == place and torch.equal(ours, expected)


def test_an_answer_that_is_broken_off_returns_its_cache(monkeypatch):
    model = recorded()
    steps = generate(model, make_batch([(1, 5, 0)]), max_new_tokens=9)
    next(steps), next(steps)
    assert not model.spare.waiting
    del steps
    assert len(model.spare.waiting) == 1

    def fail(_cache, _tokens):
        raise ValueError("in the middle")

    monkeypatch.setattr(model, "decode", fail)
    with pytest.raises(ValueError, match="middle") as caught:
        list(generate(model, make_batch([(1, 5, 0)]), max_new_tokens=9))
    del caught
    assert len(model.spare.waiting) == 1


def moved(model):
    model.language_model.model.norm.weight.data = model.language_model.model.norm.weight.data.clone()


def halved(model):
    model.to(torch.bfloat16)


def replaced(model):
    model.language_model.model.layers[0].self_attn.q_proj = torch.nn.Linear(40, 64, bias=False)


@pytest.mark.parametrize("change", [moved, halved, replaced])
def test_graphs_of_other_weights_are_not_used(change):
    model = recorded()
    steps = weakref.ref(model.new_cache(1, 16).steps)
    assert model.new_cache(1, 16).steps is steps()
    change(model)
    cache = model.new_cache(1, 16)
    assert steps() is None and cache.keys.dtype == model.dtype


def test_a_cache_of_another_stream_is_not_used(monkeypatch):
    model = recorded()
    steps = weakref.ref(model.new_cache(1, 16).steps)
    monkeypatch.setattr(graphs, "current_stream", lambda _device: "another")
    assert model.new_cache(1, 16).steps is not steps() and steps() is None


def test_models_do_not_share_a_cache(recorder):
    first, second = recorded(), recorded("gemma2")
    batch, tokens = make_batch(ROWS[:1], "right"), script(1, 5)
    places = [memory(answer(model, batch, tokens)[1]) for model in (first, second, first)]
    assert places[0] == places[2] != places[1] and recorder.count == 2
    twin = copy.copy(first)  # shares modules and spare cache
    assert twin.new_cache(1, 40).steps.model() is twin


def test_the_spare_cache_goes_with_the_model_and_when_training_begins(recorder):
    model = recorded()
    answer(model, make_batch(ROWS[:1], "right"), script(1, 5))
    assert recorder.count == 1 and model.spare.waiting
    twin = copy.deepcopy(model)
    assert not twin.spare.waiting
    model.eval()
    assert model.spare.waiting
    steps = weakref.ref(model.spare.waiting[0])
    gc.disable()
    try:
        model.train()
        assert steps() is None
        answer(model.eval(), make_batch(ROWS[:1], "right"), script(1, 5))
        steps, cache = weakref.ref(model.spare.waiting[0]), model.new_cache(1, 40)
        del model
        assert steps() is cache.steps
        del cache
        assert steps() is None
    finally:
        gc.enable()


@pytest.mark.usefixtures("compiled")
def test_a_graph_that_is_no_longer_used_lives_as_long_as_its_cache(recorder):
    model, batch = recorded(mode="compile", num_hidden_layers=1), make_batch(ROWS[:1], "right")
    cache = model.new_cache(1, 16)
    with torch.no_grad():
        model.prefill(cache, **batch)
        for row in script(1, 4):
            model.decode(cache, row)
        (step,) = cache.steps.steps.values()
        graph, stream = weakref.ref(step.recording), step.recording.stream
        assert step.recording.logits is not None and recorder.replays == 2
        graphs.COMPILED.turn_off("are wrong")  # found in a step of another shape
        model.decode(cache, script(1, 1)[0])
    assert step.recording is None and step.function is graphs.plain_step
    assert graph() is not None and cache.steps.unused_recordings == [graph()] and graph().stream is stream
    del cache, step, model
    gc.collect()
    assert graph() is None


@pytest.mark.usefixtures("compiled")
@torch.no_grad()
def test_when_recording_is_found_wrong_elsewhere_a_compiled_step_goes_on_without_its_graph(recorder):
    model = recorded(mode="compile", num_hidden_layers=1)
    cache = model.new_cache(1, 16)
    model.prefill(cache, **make_batch(ROWS[:1], "right"))
    for row in script(1, 4):
        model.decode(cache, row)
    assert recorder.replays == 2
    graphs.RECORDED.turn_off("are wrong")
    for row in script(1, 2):
        model.decode(cache, row)
    (step,) = cache.steps.steps.values()
    assert recorder.replays == 2 and step.recording is None and step.function is graphs.compiled_step()
    assert len(cache.steps.unused_recordings) == 1


@pytest.mark.usefixtures("recorder")
def test_a_cache_made_in_inference_mode_serves_afterwards():
    model, batch, tokens = recorded(), make_batch(ROWS[:1], "right"), script(1, 7)
    with torch.inference_mode():
        first, cache = answer(model, batch, tokens)
    place = memory(cache)
    del cache
    second, cache = answer(model, batch, tokens)
    assert memory(cache) == place and torch.equal(first[-1], second[-1])


def test_steps_inside_autocast_are_not_recorded(recorder):
    with torch.autocast("cpu", torch.bfloat16):
        answer(recorded(), make_batch(ROWS[:1], "right"), script(1, 6))
    assert recorder.count == 0


def test_the_default_device_of_torch_does_not_matter(recorder):
    """A tensor that is made without a device would be on the meta device, where its values cannot be read."""
    tokens, model = script(1, 9), recorded()
    torch.set_default_device("meta")
    try:
        cache = model.new_cache(1, 40)
        assert cache.host_lengths.device == cache.lengths.device == torch.device("cpu")
        cache.lengths += 5
        cache.host_lengths += 5
        with torch.no_grad():
            for row in tokens:
                cache.reserve()
                cache.steps.find(1, cache.slots_read)(row)
    finally:
        torch.set_default_device(None)
    assert recorder.count == 2 and recorder.replays == 5 and graphs.RECORDED.state == "on"


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
    ours, cache = answer(recorded(family, window, "compile", num_hidden_layers=2), batch, tokens)
    assert (ours - plain).abs().max() <= 4e-5
    (step,) = cache.steps.steps.values()
    assert step.function is graphs.compiled_step() and (recorder.count, recorder.replays) == (1, 2)
    assert [way.state for way in (graphs.COMPILED, graphs.RECORDED)] == ["on", "on"]


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
    """The kernels for few rows, which were checked when the step ran without being compiled, become operators of the step."""
    model = make(num_hidden_layers=1)
    kernel = lambda x, packed, scales: packed_products.product_in_blocks(x, packed, scales, kind)  # noqa: E731
    monkeypatch.setattr(packed_products, "by_triton", kernel)
    for name in quantization.targets(model):
        module = model.get_submodule(name)
        module = quantization.quantize_module(module, kind, {"weight": module.weight.detach()})
        model.set_submodule(name, module)
        module.change_layout()
        module.profile = devices.PROFILES["sm_75"]  # as on a GPU with Triton
    cache = model.new_cache(2, 24, BatchCache)
    with torch.no_grad():
        model.prefill(cache, **make_batch(ROWS[:2], "right"))
        plain = model.step(cache.fixed(16), script(2, 1)[0])
        cache.lengths.sub_(1)
        torch._dynamo.reset()
        monkeypatch.setattr(packed_products.TRITON, "run", None)  # a check while compiling would fail
        step = torch.compile(PaliGemmaForConditionalGeneration.step, fullgraph=True, dynamic=False, backend="eager")
        assert (step(model, cache.fixed(16), script(2, 1)[0]) - plain).abs().max() <= 4e-5
    torch._dynamo.reset()
    packed_products.TRITON.reset()


# No step waits for the device


@pytest.mark.parametrize("family, window", FORMS)
@torch.no_grad()
def test_prefill_and_decode_ask_the_device_for_nothing(family, window):
    """Tensors on the meta device have a shape but no data, so reading a value raises an error."""
    model = make(family, window).to("meta")
    cache = model.new_cache(3, 24, BatchCache)
    assert model.prefill(cache[:1], **make_batch([(1, 5, 0)])).is_meta  # open to all
    assert model.prefill(cache, **make_batch([(1, 5, 0), (2, 3, 0), (0, 4, 2)], "right")).is_meta
    assert model.decode(cache, torch.tensor([5, 6, 7])).is_meta
    with pytest.raises(RuntimeError, match="meta"):
        model.decode(cache, torch.tensor([5, 6, 7]))[0, 0].item()


# Attention


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
    assert all(logits.equal(answer(model, batch, tokens)[0]) for logits in answers) and len(model.spare.waiting) == 1
