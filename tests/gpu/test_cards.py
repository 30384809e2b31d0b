"""A model on two simulated cards: the answers of one device, nothing refused, and exactly the copies that are needed."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import paligemma
from paligemma import devices, explanation, inference, machine
from paligemma.checkpoints import weights
from paligemma.checkpoints.adapters import save_adapter
from paligemma.checkpoints.weights import ModelFiles, save_model
from paligemma.errors import DeviceError, UsageError
from paligemma.generation import Sampling, generate, generate_many
from paligemma.gpu import cuda_decoding, self_check
from paligemma.gpu.split import SplitCache, SplitPaliGemma
from paligemma.layers import lora
from paligemma.layers.batch_cache import BatchCache
from paligemma.machine import GIB
from paligemma.programs import annotate, commandline, finetune
from tests.gpu.pretend import pretend, waits
from tests.gpu.test_packed_products import have_operators, int4_product_of_cuda, triton_product
from tests.tiny import FAMILIES, make_batch, make_model
from tests.tiny_checkpoint import make_checkpoint

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "examples" / "shapes.png"
CARDS = "cuda:0,cuda:1"
GREEDY = Sampling()
ROWS = [(1, 5, 0), (2, 3, 0), (0, 4, 0)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint of each family, and an adapter of the first."""
    folders = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in folders.items():
        save_model(make_model(family), folder)
    model, config = make_model("gemma"), lora.LoraConfig(r=2)
    torch.manual_seed(0)
    lora.inject(model, config, lora.targets(model))
    state = {name: torch.randn(tensor.shape) / 10 for name, tensor in lora.adapter_state(model).items()}
    folders["adapter"] = tmp_path_factory.mktemp("adapter")
    save_adapter(state, config, folders["adapter"], str(folders["gemma"]))
    return folders


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint with a tokenizer."""
    return make_checkpoint(tmp_path_factory.mktemp("whole"))


def copies(events):
    """The shapes of what is copied between two cards."""
    return [event.shapes[0] for event in events if event.kind == "d2d"]


def tokens_of(model, batch, sampling=GREEDY):
    return torch.stack(list(generate(model, batch, 8, sampling, eos_token_id=None)))


def tensors_of(module):
    return [*module.parameters(), *module.buffers()]


# The same answers


@pytest.mark.parametrize("device", ["cuda:1", "cpu"])
def test_a_divided_model_can_be_moved_to_one_device(folders, device):
    batch = make_batch([(1, 5, 0)])
    with pretend(CARDS) as gpu:
        model = weights.load_model(folders["gemma"], device=CARDS, dtype="fp32")
        expected = tokens_of(model, batch).cpu()
        assert torch.equal(tokens_of(model.to(device), batch).cpu(), expected)
        assert {str(tensor.device) for tensor in tensors_of(model)} == {device} and gpu.mismatches == []


def test_kernels_that_only_the_second_card_lacks_are_used_on_neither(folders, monkeypatch):
    """For example, a card before sm_80 has no products of bfloat16 with a float32 result."""

    def product(a, b):
        if a.device.index == 1:
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")
        return torch.bmm(a.float(), b.float())

    self_check.reset_all()
    monkeypatch.setattr(cuda_decoding, "float32_product", product)
    batch = make_batch([(1, 5, 0)])
    with pretend(CARDS):
        model = weights.load_model(folders["gemma"], device=CARDS, dtype="bf16")
        assert tokens_of(model, batch).shape == (8, 1)
        assert not any(isinstance(module, cuda_decoding.CudaAttention) for module in model.modules())
    self_check.reset_all()


@pytest.mark.parametrize(
    "name, options",
    [
        ("gemma", {}),
        ("gemma2", {}),
        ("gemma2", {"sliding_window": "config"}),
        ("adapter", {}),
        ("gemma", {"quantize": "int8", "quantize_vision": True}),
        ("gemma2", {"quantize": "int4"}),
        ("gemma", {"dtype": "bf16"}),
        ("gemma", {"dtype": "fp16"}),
    ],
)
@torch.no_grad()
def test_tokens_are_those_of_the_cpu(folders, name, options, monkeypatch):
    monkeypatch.setattr(devices, "has_triton", lambda: True)
    have_operators()
    self_check.reset_all()
    files, batch = ModelFiles(folders[name]), make_batch(ROWS)
    cards = CARDS if "dtype" in options else "cuda:1,cuda:0"  # the inputs go to the card that is named first
    options = {"dtype": "fp32"} | options
    with pretend(CARDS, late_copies=True) as gpu:
        gpu.stand_ins |= {"paligemma::int8_product": triton_product("int8"), "_weight_int4pack_mm": int4_product_of_cuda}
        one, several = (files.load(device=device, **options) for device in ("cuda:0", cards))
        assert isinstance(several, SplitPaliGemma) and str(several.device) == cards.split(",")[0]
        found = tokens_of(several, batch)
        assert torch.equal(found, tokens_of(one, batch))
        sampling = Sampling(top_p=0.9, seed=1)
        assert torch.equal(tokens_of(several, batch, sampling), tokens_of(one, batch, sampling))
        assert gpu.mismatches == [] and {way["state"] for way in self_check.all_ways()} <= {"on", "unchecked"}
    if options["dtype"] == "fp32" and "quantize" not in options:
        assert torch.equal(found, tokens_of(files.load(**options), batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_end_are_refilled(folders, family):
    files = ModelFiles(folders[family])
    requests = [make_batch([(index % 2, 3 + index, 0)], seed=index) for index in range(7)]
    options = {"max_new_tokens": 9, "rows": 3, "eos_token_id": list(range(60, 90))}
    expected = list(generate_many(files.load(), requests, **options))
    with pretend(CARDS, late_copies=True) as gpu:
        answers = list(generate_many(files.load(device=CARDS, dtype="fp32"), requests, **options))
        assert gpu.mismatches == []
    assert [replace(answer, logprobs=[]) for answer in answers] == [replace(answer, logprobs=[]) for answer in expected]
    assert len({len(answer.token_ids) for answer in answers}) > 1


def test_tasks_and_explanations(checkpoint, monkeypatch):
    # torch's backward pass needs a simulated device of its own, see pretend.py
    zeros = lambda _chosen, spans, features: torch.zeros(len(spans), features.shape[1], device=features.device)  # noqa: E731
    monkeypatch.setattr(explanation, "gradient_maps", zeros)
    found = []
    for device in ("cpu", CARDS):
        with pretend(CARDS, late_copies=True) as gpu:
            model = paligemma.load(checkpoint, device=device, dtype="fp32")
            answers = model.ask([PICTURE, PICTURE], "what?", max_new_tokens=5)
            explained = model.explain(PICTURE, "what?", answers[0])
            found.append((answers, explained.text, np.array([word.roll_out.tolist() for word in explained.words])))
            assert gpu.mismatches == [] and explained.words
    assert found[0][:2] == found[1][:2]
    assert np.abs(found[0][2] - found[1][2]).max() < 1e-6  # the attention of the CPU is computed by other kernels


def test_programs(checkpoint, tmp_path, capsys):
    printed = []
    for device in ("cpu", CARDS):
        with pretend(CARDS, late_copies=True) as gpu:
            given = [f"--model_path={checkpoint}", f"--device={device}", "--dtype=fp32"]
            assert commandline.run(inference.Flags, inference.program, ["ask", str(PICTURE), "what?", *given]) == 0
            output = tmp_path / f"{device[:3]}.jsonl"
            given += [f"--output={output}", "--max_tokens_to_generate=5"]
            asked = [str(PICTURE), "--task=ask", "what?"]
            assert commandline.run(annotate.Flags, annotate.program, [*asked, *given]) == 0
            rows = [json.loads(line) for line in output.read_text().splitlines()[1:]]
            printed.append((capsys.readouterr().out, [(row["image"], row["text"], row["finish_reason"]) for row in rows]))
            assert gpu.mismatches == []
    assert printed[0] == printed[1] and len(printed[0][1]) == 1


# Copies


@pytest.mark.parametrize(
    "family, window, rows, expected",
    [
        ("gemma", None, [(1, 5, 0)], {(1, 1, 40): 2, (1, 1): 1}),  # one row needs no mask
        ("gemma", None, ROWS, {(3, 1, 40): 2, (3, 1): 1, (3, 1, 1, 12): 1}),
        ("gemma2", "config", ROWS, {(3, 1, 40): 2, (3, 1): 1, (3, 1, 1, 12): 2}),
    ],
)
@torch.no_grad()
def test_a_step_copies_hidden_vectors_positions_and_masks_once(folders, family, window, rows, expected):
    """The hidden vectors go to the second card and back. Nothing waits, and nothing is copied per layer."""
    with pretend(CARDS) as gpu:
        model = ModelFiles(folders[family]).load(device=CARDS, sliding_window=window)
        cache = model.new_cache(len(rows), 40, BatchCache)
        model.prefill(cache, **make_batch(rows, "right"))
        tokens = torch.full((len(rows),), 5, device="cuda:0")
        with gpu.part() as events:
            model.decode(cache, tokens)
        assert Counter(copies(events)) == expected and waits(events) == [] and gpu.mismatches == []


@torch.no_grad()
def test_a_step_on_three_cards_copies_at_two_boundaries_and_back(folders):
    with pretend("cuda:0,cuda:1,cuda:2") as gpu:
        model = ModelFiles(folders["gemma"]).load(device="cuda:0,cuda:1,cuda:2")
        cache = model.new_cache(1, 40)
        model.prefill(cache, **make_batch(ROWS[:1]))
        with gpu.part() as events:
            model.decode(cache, torch.full((1,), 5, device="cuda:0"))
        assert Counter(copies(events)) == {(1, 1, 40): 3, (1, 1): 2}


# Loading


@pytest.mark.parametrize("options", [{}, {"quantize": "int8"}])
def test_each_tensor_is_read_onto_its_own_card(folders, options):
    with pretend(CARDS) as gpu:
        model = ModelFiles(folders["gemma"]).load(device=CARDS, **options)
        assert copies(gpu.events) == [] and gpu.mismatches == []
        placement = model.placement
        assert set(placement.cards) == {0, 1}
        layers = model.language_model.model.layers
        own = {id(tensor): card for layer, card in zip(layers, placement.cards, strict=True) for tensor in tensors_of(layer)}
        assert all(str(tensor.device) == f"cuda:{own.get(id(tensor), 0)}" for tensor in tensors_of(model))
        cache = model.new_cache(2, 8)
        assert isinstance(cache, SplitCache) and [str(part.keys.device) for part in cache.parts] == CARDS.split(",")
        assert str(cache.lengths.device) == str(model.device) == "cuda:0"


def test_auto_takes_a_second_card_if_one_is_too_small(folders, monkeypatch):
    files = ModelFiles(folders["gemma"])
    monkeypatch.setattr(weights, "room_to_answer", lambda *_: 0)
    for free, kind in ((9 * GIB, False), (400_000, True)):  # the weights take 440 KB
        monkeypatch.setattr(machine, "free_memory", lambda _device, free=free: free)
        with pretend(CARDS):
            assert isinstance(files.load(device="auto", dtype="fp32"), SplitPaliGemma) == kind
            if kind:
                with pytest.raises(DeviceError, match="the weights take 0.00 GiB on cuda:0, which has 0.00 GiB free"):
                    files.load(device="cuda:0", dtype="fp32")  # a card was named


# Refusals


@pytest.mark.parametrize(
    "device, error, says",
    [
        ("cuda:0,cuda:0", UsageError, "device is 'cuda:0,cuda:0', which names a card twice. Name each card once."),
        ("cuda:0,cpu", UsageError, "device is 'cuda:0,cpu'. auto, cpu, mps, cuda, cuda:N or several cards"),
        ("cuda,cuda:1", UsageError, "device is 'cuda,cuda:1'. auto, cpu, mps, cuda, cuda:N or several cards"),
        ("cuda:0,cuda:9", DeviceError, "device cuda:9 is not available. This machine has cuda:0"),
        ("cuda:0,cuda:1,cuda:2,cuda:3", UsageError, "the decoder has 3 layers, and each card needs one. Name fewer cards."),
    ],
)
def test_cards_that_cannot_be_used_are_refused(folders, device, error, says):
    with pretend("cuda:0,cuda:1,cuda:2,cuda:3"), pytest.raises(error) as caught:
        ModelFiles(folders["gemma"]).load(device=device)
    assert says in caught.value.message


def test_a_program_ends_with_code_6_and_names_each_card_that_is_too_small(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(machine, "free_memory", lambda _device: 100_000)
    with pretend(CARDS):
        given = ["ask", str(PICTURE), "what?", f"--model_path={checkpoint}", f"--device={CARDS}"]
        assert commandline.run(inference.Flags, inference.program, given) == 6
    said = capsys.readouterr().err
    assert "the weights, divided among 2 cards, and one answer take 0.25 GiB on cuda:0, which has 0.00 GiB free; 0.25" in said


def test_fine_tuning_takes_one_card_per_process(tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text("")
    given = [f"--train={tmp_path / 'train.jsonl'}", f"--output={tmp_path / 'run'}", f"--device={CARDS}"]
    assert commandline.run(finetune.Flags, finetune.program, given) == 2
    assert "torchrun --nproc_per_node 2" in capsys.readouterr().err
