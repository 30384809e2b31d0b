"""The whole model against the outputs of Google's JAX code, which oracle/README.md describes.

Google's numbers are float32, of one run that is stored. Ours are computed in float64, so that their distance is Google's rounding
and the same on every processor: at most 2.4e-5 for a logit. The bound notices a norm epsilon of 1e-5 in place of 1e-6. Our own
float32 is compared with our float64: it may be a few times as far off as Google's.
"""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from paligemma.configuration import PaliGemmaConfig
from paligemma.generation import generate_steps
from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration, prefix_lm_mask
from tests.bounds import exact_arithmetic

FOLDERS = ["paligemma1", "paligemma2"]
TRAINED = 512  # tokens; the rows after them were appended and are not compared
BOUND = 5e-5


@pytest.fixture
def exact():
    with exact_arithmetic():
        yield


def load(folder, change=lambda config: config, dtype=torch.float64, **options):
    home = Path(__file__).parent / "oracle" / folder
    config = change(PaliGemmaConfig.from_hf(json.loads((home / "config.json").read_text())))
    model = PaliGemmaForConditionalGeneration(config, **options)
    model.load_state_dict(load_file(home / "model.safetensors"))
    return model.to(dtype).eval()


@cache
def arrays(folder, name):
    with np.load(Path(__file__).parent / "oracle" / folder / f"{name}.npz") as file:
        return {key: torch.from_numpy(value) for key, value in file.items()}


def forward_batch(folder):
    inputs = arrays(folder, "inputs")
    return {key: inputs[key] for key in ("input_ids", "pixel_values", "attention_mask", "token_type_ids")}


def prompts(folder, pad):
    """Pictures and prompts without answers, for decoding."""
    inputs, prefix = arrays(folder, "inputs"), "prefill_left" if pad == "left" else "prefill"
    ids, mask = inputs[f"{prefix}_input_ids"], inputs[f"{prefix}_attention_mask"]
    pixels = inputs["pixel_values"]
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids), "pixel_values": pixels}


def equal(ours, theirs, bound=BOUND):
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, theirs.double(), rtol=0, atol=bound)


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.usefixtures("exact")
def test_each_stage_of_the_tower_equals_jax(folder):
    model, expected = load(folder), arrays(folder, "expected")
    pixels = arrays(folder, "inputs")["pixel_values"].double()
    embeddings = model.vision_tower.vision_model.embeddings
    equal(embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2), expected["image_patch_conv"])
    equal(embeddings(pixels), expected["image_with_posemb"])
    equal(model.vision_tower(pixels), expected["image_encoded"])
    equal(model.encode_images(pixels), expected["image_features"])


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.usefixtures("exact")
def test_the_inputs_of_the_decoder_equal_jax(folder):
    model, expected, batch = load(folder), arrays(folder, "expected"), forward_batch(folder)
    embeds = model.embed(batch["input_ids"], model.encode_images(batch["pixel_values"]))
    equal(embeds[expected["valid"]], expected["inputs_embeds"][expected["valid"]])


@pytest.mark.parametrize("folder", FOLDERS)
def test_mask_equals_jax(folder):
    expected, batch = arrays(folder, "expected"), forward_batch(folder)
    mask = prefix_lm_mask(batch["attention_mask"], batch["token_type_ids"])[:, 0]
    assert torch.equal(mask[expected["valid"]], expected["attn_mask"][expected["valid"]])


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.usefixtures("exact")
def test_hidden_vectors_equal_jax(folder):
    model, expected, batch = load(folder), arrays(folder, "expected"), forward_batch(folder)
    seen = []
    model.language_model.model.register_forward_hook(lambda _module, _args, output: seen.append(output))
    model(**batch)
    # These numbers, up to 27, are larger than logits, and so is their rounding.
    equal(seen[0][expected["valid"]], expected["pre_logits"][expected["valid"]], bound=1e-4)


@pytest.mark.parametrize("final_softcap, key", [("config", "fwd_logits"), (None, "fwd_logits_uncapped")])
@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.usefixtures("exact")
def test_logits_equal_jax(folder, final_softcap, key):
    model, expected = load(folder, final_softcap=final_softcap), arrays(folder, "expected")
    logits = model(**forward_batch(folder))[..., :TRAINED]
    equal(logits[expected["valid"]], expected[key][expected["valid"]])


@pytest.mark.parametrize("final_softcap, key", [("config", "decode_logits_capped"), (None, "decode_logits_uncapped")])
@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.usefixtures("exact")
def test_prefill_and_decode_equal_jax(folder, final_softcap, key):
    model, expected = load(folder, final_softcap=final_softcap), arrays(folder, "expected")
    kv_cache = model.new_cache(3, 24 + 12)
    logits = model.prefill(kv_cache, **prompts(folder, "right"))
    for step in range(12):
        equal(logits[:, :TRAINED], expected[key][:, step])
        logits = model.decode(kv_cache, expected["decode_tokens"][:, step].long())


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("final_softcap", ["config", None])
@pytest.mark.parametrize("folder", FOLDERS)
def test_greedy_tokens_equal_jax(folder, final_softcap, pad):
    model, expected = load(folder, dtype=torch.float32, final_softcap=final_softcap), arrays(folder, "expected")
    steps = list(generate_steps(model, prompts(folder, pad), max_new_tokens=12))
    assert torch.equal(torch.stack([step.tokens for step in steps], 1), expected["decode_tokens"].long())


def with_epsilon(config, epsilon):
    return replace(
        config,
        vision_config=replace(config.vision_config, layer_norm_eps=epsilon),
        text_config=replace(config.text_config, rms_norm_eps=epsilon),
    )


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.usefixtures("exact")
def test_the_bound_notices_an_epsilon_ten_times_too_large(folder):
    expected, batch = arrays(folder, "expected"), forward_batch(folder)
    logits = load(folder, lambda config: with_epsilon(config, 1e-5))(**batch)[..., :TRAINED]
    assert (logits - expected["fwd_logits"])[expected["valid"]].abs().max() > BOUND


@pytest.mark.parametrize("folder", FOLDERS)
def test_our_float32_rounds_no_more_than_googles(folder):
    expected, batch = arrays(folder, "expected"), forward_batch(folder)
    with torch.no_grad():
        ours = load(folder, dtype=torch.float32)(**batch)[..., :TRAINED]
    with exact_arithmetic():
        exact = load(folder)(**batch)[..., :TRAINED]
    ours, googles = ((logits - exact)[expected["valid"]].abs().max() for logits in (ours, expected["fwd_logits"]))
    assert ours <= 4 * googles  # the sums have different orders, so the two errors are random and of similar size
