"""Decoding steps recorded as CUDA graphs, on a simulated GPU: `graphs.record` itself runs here, but not a real card.

A simulated graph is the list of operators that were captured. Capturing it refuses what CUDA refuses: to wait for the device, and
copies between the device and the CPU.
"""

import pytest
import torch

from paligemma import devices
from paligemma.generation import Sampling, generate, generate_many
from paligemma.gpu import graphs, self_check
from paligemma.gpu.cuda_decoding import use_cuda_modules
from paligemma.gpu.graphs import RecordedPaliGemma, use_graphs
from paligemma.layers.batch_cache import BatchCache
from tests.gpu.pretend import count, kernels, pretend, waits
from tests.tiny import FAMILIES, make_batch, make_model

ROWS = [(1, 5, 0), (2, 3, 0), (0, 4, 0)]
GREEDY, SAMPLED = Sampling(), Sampling(temperature=0.8, top_p=0.9, seed=3)


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    monkeypatch.setattr(graphs, "SLOTS", 8)
    monkeypatch.delenv(devices.GRAPHS_VARIABLE, raising=False)
    self_check.reset_all()
    yield
    self_check.reset_all()


@pytest.fixture
def recordings(monkeypatch):
    """The devices on which steps were recorded."""
    found, record = [], graphs.record

    def counted(work, stream):
        found.append(stream.device)
        return record(work, stream)

    monkeypatch.setattr(graphs, "record", counted)
    return found


def on_card(family="gemma", device="cuda:0", mode=None):
    """The model as it is loaded on a card."""
    model = make_model(family).to(device)
    use_cuda_modules(model)
    return use_graphs(model, mode)


def tokens_of(model, batch, sampling=GREEDY, max_new_tokens=16):
    return torch.stack(list(generate(model, batch, max_new_tokens, sampling, eos_token_id=None)))


@pytest.mark.parametrize("late_copies", [False, True])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_steps_give_the_tokens_of_the_cpu(family, sampling, late_copies, recordings):
    expected = tokens_of(make_model(family), make_batch(ROWS), sampling)
    with pretend("cuda:0", late_copies=late_copies) as gpu:
        model = on_card(family)
        with gpu.part() as events:
            found = tokens_of(model, make_batch(ROWS), sampling)
    assert torch.equal(found, expected)
    assert gpu.mismatches == [] and graphs.RECORDED.state == "on"
    assert len(recordings) == 2 and count(events, "replay") >= 10  # in the buckets of 16 and 32 slots


def test_many_requests_of_other_lengths_get_the_answers_of_the_cpu(recordings):
    requests = [make_batch([(1, 2 + i, 0)], seed=i) for i in range(7)]
    eos = list(range(3, 30))

    def answers(model):
        found = generate_many(model, requests, rows=3, max_new_tokens=12, eos_token_id=eos)
        return sorted((answer.index, answer.token_ids) for answer in found)

    expected = answers(make_model("gemma"))
    with pretend("cuda:0") as gpu:
        assert answers(on_card()) == expected
    assert gpu.mismatches == [] and recordings


def test_ten_answers_record_once_and_later_ones_run_no_step_from_python(recordings):
    batch, expected = make_batch([(1, 5, 0)]), tokens_of(make_model("gemma"), make_batch([(1, 5, 0)]), max_new_tokens=6)
    with pretend("cuda:0") as gpu:
        model, plain = on_card(), on_card(mode="off")
        for _ in range(10):
            with gpu.part() as events:
                assert torch.equal(tokens_of(model, batch, max_new_tokens=6), expected)
        assert len(recordings) == 1
        assert count(events, "replay") == 5  # after the token of the prefill
        with gpu.part() as plain_events:
            tokens_of(plain, batch, max_new_tokens=6)
    # A layer of the tiny model takes about 30 kernels in each step.
    assert sum(kernels(plain_events).values()) - sum(kernels(events).values()) > 5 * 3 * 20


def test_a_replayed_step_waits_for_nothing_and_starts_three_kernels():
    with pretend("cuda:0") as gpu, torch.no_grad():
        model, tokens = on_card(), torch.tensor([7, 8, 9], device="cuda:0")
        cache = model.new_cache(4, 30, BatchCache)[:3]
        model.prefill(cache, **make_batch(ROWS, "right"))
        for _ in range(graphs.WARM_UP + 1):
            model.decode(cache, tokens)
        with gpu.part() as events:
            model.decode(cache, tokens)
        del cache  # returns its memory to the model, which asks the device how much is free
    assert waits(events) == [] and count(events, "replay") == 1
    assert kernels(events) == {"copy_": 1, "sub_": 1, "clone": 1}  # tokens in, the length of the fourth row, logits out


def test_a_step_that_waits_for_the_device_cannot_be_recorded_and_nothing_is_recorded_again(monkeypatch, caplog, recordings):
    batch = make_batch([(1, 5, 0)])
    expected = tokens_of(make_model("gemma"), batch)
    step = RecordedPaliGemma.__mro__[1].step

    def waiting(model, cache, tokens):
        int(cache.lengths[0])
        return step(model, cache, tokens)

    monkeypatch.setattr(graphs, "plain_step", waiting)
    with pretend("cuda:0") as gpu:
        for _ in range(2):
            assert torch.equal(tokens_of(on_card(), batch), expected)
        assert gpu.graph is None
    assert len(recordings) == 1
    assert [line for line in caplog.messages if "recorded" in line] == [
        "recorded steps fail (RuntimeError: CUDA error: operation not permitted when stream is capturing): decoding without "
        "them. Please report the output of `paligemma doctor`."
    ]


def test_each_step_is_recorded_on_the_card_of_the_model_and_on_a_stream_of_its_own(monkeypatch):
    batch, found = make_batch([(1, 5, 0)]), []
    expected = tokens_of(make_model("gemma"), batch)
    with pretend("cuda:0,cuda:1") as gpu:
        graph = torch.cuda.graph

        def spy(captured, *, stream, capture_error_mode):
            found.append((stream, torch.cuda.current_device(), capture_error_mode))
            return graph(captured, stream=stream, capture_error_mode=capture_error_mode)

        monkeypatch.setattr(torch.cuda, "graph", spy)
        model = on_card(device="cuda:1")
        assert torch.equal(tokens_of(model, batch), expected)
        assert torch.cuda.current_device() == 0
        steps = model.spare.waiting[0].steps.values()
        assert gpu.mismatches == [] and len(found) == len(steps) == 2
        assert {stream for stream, *_ in found} == {step.recording.stream for step in steps}  # kept beside their graphs
    assert [(stream.device.index, card, mode) for stream, card, mode in found] == [(1, 1, "thread_local")] * 2


def test_nothing_is_recorded_on_an_amd_gpu_unless_asked_for(recordings, monkeypatch):
    batch = make_batch([(1, 5, 0)])
    with pretend("cuda:0"):
        monkeypatch.setattr(torch.version, "hip", "6.4")
        tokens_of(on_card(), batch)
        assert recordings == []
        tokens_of(on_card(mode="record"), batch)
        assert recordings != []


def test_nothing_is_recorded_and_no_cache_is_kept_on_a_card_that_is_full(recordings):
    with pretend("cuda:0", memory=graphs.MIN_FREE_BYTES - 1):
        model = on_card()
        tokens_of(model, make_batch([(1, 5, 0)]))
        assert recordings == [] and not model.spare.waiting


def test_on_apples_gpu_nothing_of_this_runs(recordings):
    batch = make_batch([(1, 5, 0)])
    expected = tokens_of(make_model("gemma"), batch)
    with pretend("mps") as gpu:
        model = make_model("gemma").to("mps")
        for mode in devices.GRAPHS:
            assert use_graphs(model, mode) is model
        assert torch.equal(tokens_of(model, batch), expected)
    assert gpu.mismatches == [] and recordings == []
