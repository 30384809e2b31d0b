"""Whole programs on simulated GPUs give the answers of the CPU, and ask for nothing that a GPU would refuse.

On CUDA, decoding steps are recorded and replayed, and copies that do not block arrive late. On MPS they would arrive late, too.
What computes in float32 in another order than the CPU can differ in the last digit of a probability, but not in a token.
"""

from contextlib import contextmanager

import numpy as np
import pytest
import torch

import paligemma
from paligemma.generation import Sampling, generate, generate_many
from paligemma.gpu import graphs
from paligemma.gpu.cuda_decoding import use_cuda_modules
from paligemma.layers.batch_cache import BatchCache
from paligemma.learning import training
from paligemma.model import DetectionResult, Model
from paligemma.modeling_gemma import KVCache
from tests import test_shape_comments as primes
from tests.gpu.pretend import count, pretend
from tests.learning.test_training import make_trainer, toy_batch
from tests.tiny import FAMILIES, make_batch, make_model

DEVICES = ["cuda:0", "mps"]
SAMPLINGS = {"greedy": Sampling(), "top_p": Sampling(temperature=0.8, top_p=0.9, seed=3), "top_k": Sampling(top_k=9, seed=4)}
ROWS = [(1, 5, 0), (2, 3, 0), (0, 4, 0)]


@contextmanager
def on_device(model, device: str):
    """The model on a simulated device, as `load` would place it there. Nothing may have been refused at the end."""
    with pretend("cuda:0,cuda:1" if device == "cuda:1" else device, late_copies=True) as gpu:
        model.to(device)
        if device.startswith("cuda"):
            use_cuda_modules(model)
            model = graphs.use_graphs(model)
        yield gpu, model
        assert gpu.mismatches == []


@pytest.mark.parametrize("device", [*DEVICES, "cuda:1"])  # the last one is not the current device
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_generate(family, sampling, device):
    expected = [step.tolist() for step in generate(make_model(family), make_batch(ROWS), 12, sampling)]
    with on_device(make_model(family), device) as (gpu, model):
        assert [step.tolist() for step in generate(model, make_batch(ROWS), 12, sampling)] == expected
        assert (count(gpu.events, "replay") > 5) == device.startswith("cuda")
        assert {event.device for event in gpu.events} == {torch.device(device, 0) if device == "mps" else torch.device(device)}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_many(family, device):
    """Seven requests in three rows: answers end at different times, and new ones take their rows."""
    requests = [make_batch([(1, n, 0)], seed=n) for n in (5, 3, 9, 2, 7, 4, 6)]
    settings = {"rows": 3, "max_new_tokens": 9, "eos_token_id": list(range(40)), "sampling": Sampling(4.0, seed=0)}
    expected = {answer.index: answer.token_ids for answer in generate_many(make_model(family), requests, **settings)}
    assert len(expected) == 7 and len({len(tokens) for tokens in expected.values()}) > 2
    with on_device(make_model(family), device) as (_, model):
        assert {answer.index: answer.token_ids for answer in generate_many(model, requests, **settings)} == expected


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [KVCache, BatchCache])
def test_lengths_reach_the_device_before_they_change(kind, device):
    """Prefill and steps without a wait in between: each step changes the lengths on the CPU at once."""

    def logits(model):
        cache, batch = model.new_cache(3, 40, kind), make_batch([(1, 5, 0), (1, 9, 0), (1, 2, 0)], pad="right")
        found = [model.prefill(cache, **batch)]
        found += [model.decode(cache, torch.arange(20, 23) + i).to(model.device) for i in range(3)]
        return torch.stack(found).cpu()

    with torch.no_grad():
        expected = logits(make_model("gemma"))
        with on_device(make_model("gemma"), device) as (_, model):
            torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_sizes_that_are_prime_numbers(device):
    """No size is a multiple of another one, and none of 2: rows, tokens, patches, widths, heads, vocabulary."""
    batch = primes.make_batch([primes.LENGTH, 31, 40, 55, 29])
    batch = {key: value for key, value in batch.items() if key != "labels"}
    for options in ({"family": "gemma"}, {"family": "gemma2"}, {"family": "gemma2", "window": True}):
        model = primes.make_model(**options).eval()
        with torch.no_grad():
            expected, tokens = model(**batch), torch.stack(list(generate(model, batch, 7)))
        with on_device(model, device) as (_, model), torch.no_grad():
            found = model(**batch).cpu()
            assert torch.equal(torch.stack(list(generate(model, batch, 7))), tokens)
        is_token = batch["attention_mask"].bool()
        torch.testing.assert_close(found[is_token], expected[is_token], rtol=1e-4, atol=1e-4)


# The Python interface, with the bundled checkpoint


PICTURE = paligemma.EXAMPLE_PICTURE


def objects(found: DetectionResult) -> list[tuple[str, tuple[float, ...]]]:
    return [(thing.label, thing.xyxy) for thing in found.objects]


def look(model: Model) -> list[object]:
    with model.look(PICTURE) as encoded:
        return [encoded.count("hearts"), encoded.ask("what color is the heart?")]


VERBS = {  # what each verb answers about the bundled picture
    "caption": lambda model: model.caption([PICTURE] * 3),
    "sampled": lambda model: model.caption(PICTURE, sampling=Sampling(top_p=0.9, seed=0)),
    "ask": lambda model: model.ask(PICTURE, "what color is the heart?"),
    "detect": lambda model: objects(model.detect(PICTURE, "heart", grammar=True)),
    "segment": lambda model: objects(model.segment(PICTURE, "circle")),
    "ocr": lambda model: model.ocr(PICTURE),
    "count": lambda model: model.count(PICTURE, "circles"),
    "stream": lambda model: "".join(model.stream(PICTURE, "answer en what color is the cross?")),
    "look": look,
}


def assert_same_answer(found: object, expected: object) -> None:
    """Equal texts and numbers. The corners of boxes are means over bins, and rounding moves them by a few of 448 pixels."""
    if isinstance(expected, list) and isinstance(expected[0], tuple):
        assert [label for label, _ in found] == [label for label, _ in expected]
        assert np.abs(np.array([box for _, box in found]) - np.array([box for _, box in expected])).max() < 8
    else:
        assert found == expected


@pytest.fixture(scope="module")
def on_cpu() -> Model:
    return paligemma.load(device="cpu")


@pytest.mark.parametrize("device", DEVICES)
def test_every_verb_of_a_loaded_model(device, on_cpu):
    with pretend(device, late_copies=True) as gpu:
        model = paligemma.load(device=device)
        assert model.network.device.type == device.partition(":")[0] and model.network.dtype == torch.bfloat16
        found = {verb: answer(model) for verb, answer in VERBS.items()}
        embedded = model.embed(PICTURE)
        assert gpu.mismatches == [] and isinstance(embedded, torch.Tensor) and embedded.device.type == "cpu"
        assert (count(gpu.events, "replay") > 20) == (device == "cuda:0")
        del model
    for verb, answer in VERBS.items():
        assert_same_answer(found[verb], answer(on_cpu))


# Training


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recomputes", [False, True])
def test_an_update_of_a_trainer(family, recomputes, device, monkeypatch):
    """torch's autograd does not run on a device that does not exist: the gradient is a constant here, on both sides."""

    def backward(_loss):
        for parameter in trainer.trained.values():
            parameter.grad = torch.full_like(parameter, 0.01) + (0 if parameter.grad is None else parameter.grad)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    trainer = make_trainer(family)
    expected = [trainer.update() for _ in range(3)]
    with pretend(device, late_copies=True) as gpu:
        model = make_model(family).to(device)
        training.freeze_except(model, training.ALL)
        if recomputes:
            training.checkpoint_activations(model)
        trainer = training.Trainer(model, trainer.plan, toy_batch, trainer.count)
        found = [trainer.update() for _ in range(3)]
        assert gpu.mismatches == []
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-4) and ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)
        assert not ours.is_skipped
