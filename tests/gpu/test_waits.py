"""Where the CPU waits for a GPU, and what it copies there: the table of docs/gpu.md, counted on a simulated GPU.

While the CPU waits, the GPU has nothing to do next. A decoding step may wait only for the tokens of the step before it, after the
next step has been started.
"""

from collections import Counter

import pytest
import torch

from paligemma import explanation, generation
from paligemma.generation import RunningBatch, Sampling, generate_many, generate_steps, sample, split_rows
from paligemma.gpu import graphs
from paligemma.gpu.cuda_decoding import use_cuda_modules
from paligemma.objects.grammar import Grammar
from paligemma.processing_paligemma import PaliGemmaProcessor
from tests.gpu.pretend import WAITS, Event, PretendedGpu, count, pretend, waits
from tests.test_explanation import tiny_case
from tests.tiny import FAMILIES, make_batch, make_model
from tests.tiny_checkpoint import make_checkpoint

GREEDY = Sampling()
TOKENS = "generation.py wait: event.synchronize"  # the wait for the tokens of a step
SAMPLED = Sampling(temperature=0.8, seed=3)
TOP_P = Sampling(temperature=0.8, top_p=0.9, seed=3)
TOP_K = Sampling(top_k=5, seed=3)


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return PaliGemmaProcessor.from_pretrained(make_checkpoint(tmp_path_factory.mktemp("checkpoint")))


def on_cuda(family: str, **options: object):
    """A model that decodes as a loaded one does on CUDA: with fewer kernels, and with recorded steps."""
    model = make_model(family, **options).to("cuda:0")
    use_cuda_modules(model)
    return graphs.use_graphs(model)


def warm(model, batch: dict, sampling: Sampling = GREEDY, grammar: Grammar | None = None) -> RunningBatch:
    """A running batch after six tokens: its steps are recorded, and compared with plain ones."""
    running = RunningBatch(model, len(batch["input_ids"]), 40, sampling, None)
    running.admit([(i, row | {"grammar": grammar}) for i, row in enumerate(split_rows(batch, model.config))])
    for _ in range(6):
        running.step()
    return running


def prefill_events(gpu: PretendedGpu, family: str, batch: dict) -> list[Event]:
    """What the second prefill of a model asks of the device."""
    model = on_cuda(family)
    warm(model, batch)
    running = RunningBatch(model, len(batch["input_ids"]), 40)
    requests = list(enumerate(split_rows(batch, model.config)))
    with gpu.part() as events:
        running.admit(requests)
    return events


def step_events(gpu: PretendedGpu, running: RunningBatch, steps: int = 1) -> list[list[Event]]:
    """What each of the next steps asks of the device."""
    found = []
    for _ in range(steps):
        with gpu.part() as events:
            running.step()
        found.append(events)
    return found


def copies(events: list[Event]) -> Counter[str]:
    """How often each place copies something to the device."""
    return Counter(event.place for event in events if event.kind == "h2d" or (event.kind in WAITS and "h2d" in event.note))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("rows", "inputs"),
    [
        ([(1, 5, 0)], {"encode_images": 1, "embed": 1}),  # pixels, ids
        ([(0, 5, 0)], {"embed": 1}),
        ([(1, 5, 0), (2, 5, 0)], {"encode_images": 1, "embed": 1, "hidden": 2}),  # pixels, ids, padding, ends of prompts
    ],
)
def test_a_prefill_waits_for_nothing(family, rows, inputs):
    with pretend("cuda:0") as gpu:
        events = prefill_events(gpu, family, make_batch(rows))
        assert waits(events) == [TOKENS]  # of the first tokens, when everything has been started
        assert [event.kind for event in events if event.kind != "view"][-1] == "event-wait"
        inputs = {f"modeling_paligemma.py {function}": number for function, number in inputs.items()}
        others = {"batch_cache.py set_lengths": 1, "generation.py choose_next": 1}  # the latter: ids that are never generated
        assert copies(events) == inputs | others and count(events, "h2d") == sum(inputs.values()) + 2
        assert gpu.mismatches == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, TOP_P, TOP_K], ids=["greedy", "sampled", "top_p", "top_k"])
def test_a_step_waits_only_for_the_tokens_of_the_step_before_it(family, sampling):
    with pretend("cuda:0", late_copies=True) as gpu:
        for events in step_events(gpu, warm(on_cuda(family), make_batch([(1, 5, 0), (2, 3, 0), (0, 4, 0)]), sampling), 4):
            assert waits(events) == [TOKENS]
            kinds = [event.kind for event in events]
            assert kinds.index("replay") < kinds.index("event-record") < kinds.index("event-wait") == len(kinds) - 1
            assert count(events, "replay", "d2h") == 2
            assert copies(events) == ({} if sampling.is_greedy else {"generation.py sample": 1})  # the random numbers
        assert gpu.mismatches == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sampling", [GREEDY, TOP_P], ids=["greedy", "top_p"])
def test_a_step_with_a_grammar_waits_only_for_its_own_tokens(family, sampling, processor):
    grammar = Grammar.for_objects(processor, ["cat", "red dog"])
    vocabulary = {"vocab_size": processor.image_token_id + 64, "max_position_embeddings": 256}
    with pretend("cuda:0") as gpu:
        running = warm(on_cuda(family, text=vocabulary), make_batch([(0, 5, 0), (0, 3, 0)]), sampling, grammar)
        (events,) = step_events(gpu, running)
        draws = {} if sampling.is_greedy else {"generation.py sample": 1}
        assert copies(events) == {"generation.py sample_allowed": 1} | draws  # the ids that are allowed
        running.rows[0].constraint = None  # now only one of the two rows has a grammar
        (mixed,) = step_events(gpu, running)
        assert waits(events) == waits(mixed) == [TOKENS] and gpu.mismatches == []
        del running


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_that_end_and_begin_add_no_wait(family):
    requests = [make_batch([(1, n, 0)], seed=n) for n in (5, 3, 9, 2, 7, 4, 6)]
    settings = {"rows": 3, "max_new_tokens": 9, "eos_token_id": list(range(40)), "sampling": Sampling(4.0, seed=0)}
    with pretend("cuda:0") as gpu:
        model = on_cuda(family)
        list(generate_many(model, requests, **settings))  # steps are recorded and compared with plain ones
        with gpu.part() as events:
            answers = list(generate_many(model, requests, **settings))
        assert len({len(answer.token_ids) for answer in answers}) > 2
        assert set(waits(events)) == {TOKENS} and gpu.mismatches == []


def test_a_default_device_changes_nothing():
    """torch.set_default_device is for the user's own tensors: ours that belong on the CPU stay there."""
    batch = make_batch([(1, 5, 0), (2, 3, 0), (0, 4, 0)])
    for sampling in (GREEDY, TOP_P):
        steps = []
        for default in ("cpu", "cuda:0"):
            with pretend("cuda:0") as gpu:
                model = on_cuda("gemma")
                warm(model, batch)
                torch.set_default_device(default)
                try:
                    with gpu.part() as events:
                        tokens = [step.tokens for step in generate_steps(model, batch, 9, sampling)]
                finally:
                    torch.set_default_device(None)
                assert all(token.device.type == "cpu" for token in tokens) and gpu.mismatches == []
                steps.append((torch.stack(tokens).tolist(), Counter(waits(events)), copies(events)))
        assert steps[0] == steps[1]


# top_p


def reference(logits: torch.Tensor, probs: torch.Tensor, top_p: float) -> list[list[int]]:
    """The tokens that top_p keeps, written out: likeliest first, and of equal logits the smaller id first."""
    kept = []
    for scores, chances in zip(logits.tolist(), probs.tolist(), strict=True):
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        total, row = 0.0, []
        for token in order:
            row.append(token)
            total += chances[token]
            if total >= top_p:
                break
        kept.append(row)
    return kept


CASES = {
    "peaked": lambda x: 8 * x,
    "flat": lambda x: 0.01 * x,
    "many equal": lambda x: x.round(),
    "all equal": lambda x: 0 * x,
    "equal and suppressed": lambda x: x.round().masked_fill(x < 0, -torch.inf),
    "bfloat16": lambda x: (2 * x).bfloat16().float(),
}


@pytest.mark.parametrize("case", CASES)
def test_top_p_on_cuda_waits_for_nothing_and_keeps_the_tokens_of_the_cpu(case, monkeypatch):
    monkeypatch.setattr(generation, "FIRST_CANDIDATES", 8)
    generator = torch.Generator().manual_seed(0)
    for top_p in (1e-9, 0.1, 0.5, 0.9, 0.999, 1 - 1e-12):
        logits = CASES[case](torch.randn(5, 700, generator=generator))
        probs = generation.probabilities(logits, 1.0)
        best, ids = generation.nucleus(logits, probs, top_p, None)
        expected = reference(logits, probs, top_p)
        assert [row[chance > 0].tolist() for row, chance in zip(ids, best, strict=True)] == [
            [token for token in row if probs[i, token] > 0] for i, row in enumerate(expected)
        ]
        uniforms = torch.rand(5, dtype=torch.float64, generator=generator)
        for u in (uniforms, torch.zeros(5, dtype=torch.float64), torch.full((5,), 1 - 2**-53, dtype=torch.float64)):
            with pretend("cuda:0") as gpu:
                on_gpu = logits.to("cuda:0")
                with gpu.part() as events:
                    found = sample(on_gpu, Sampling(top_p=top_p), u)
                assert waits(events) == []
                found = found.cpu()
            assert torch.equal(found, sample(logits, Sampling(top_p=top_p), u))


# Explanations


@pytest.mark.parametrize("family", FAMILIES)
def test_an_explanation_waits_three_times_however_long_the_answer_is(family, processor, monkeypatch):
    # torch's autograd does not run on a device that does not exist, so the gradients are replaced.
    monkeypatch.setattr(torch.autograd, "grad", lambda _y, x, **_options: (x.detach() * 0.5,))
    for answer in ("a red cat", "a red <loc0010><loc0020><loc0030><loc0040> cat, on the left of two small dogs"):
        model, inputs, ids = tiny_case(family, processor, answer)
        expected = explanation.explain(model, processor, inputs, ids)
        with pretend("cuda:0") as gpu:
            model.to("cuda:0")
            with gpu.part() as events:
                found = explanation.explain(model, processor, inputs, ids)
            assert waits(events) == ["explanation.py read_tokens: to", "explanation.py explain: to", "explanation.py explain: to"]
            assert gpu.mismatches == []
        assert [(word.text, word.tokens) for word in found.words] == [(word.text, word.tokens) for word in expected.words]
        for ours, theirs in zip(found.words, expected.words, strict=True):
            torch.testing.assert_close(ours.roll_out, theirs.roll_out)
            torch.testing.assert_close(ours.gradient, theirs.gradient)
        assert found.logprob == pytest.approx(expected.logprob, abs=1e-3)
