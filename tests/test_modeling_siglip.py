"""The vision tower, part by part, against transformers' SigLIP with the same weights."""

from dataclasses import asdict

import pytest
import torch

from paligemma.configuration import SiglipVisionConfig
from paligemma.modeling_siglip import SiglipVisionModel
from tests.tiny import fill, make_pixels, raw_config

DTYPES = [torch.float32, torch.bfloat16]


def make_towers(dtype=torch.float32, attention="sdpa", seed=0):
    """Our tower and transformers', filled alike."""
    from transformers import SiglipVisionConfig as ReferenceConfig
    from transformers import SiglipVisionModel as Reference

    raw = raw_config("gemma")["vision_config"]
    ours = fill(SiglipVisionModel(SiglipVisionConfig.from_hf(raw)), seed).to(dtype).eval()
    config = ReferenceConfig.from_dict(raw)
    config._attn_implementation = attention
    theirs = Reference(config).to(dtype).eval()
    theirs.load_state_dict({name.removeprefix("vision_model."): tensor for name, tensor in ours.state_dict().items()})
    return ours, theirs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", ["embeddings", "self_attn", "mlp", "layer_norm1", "layer_norm2", "layer", "post_layernorm"])
@torch.no_grad()
def test_each_part_equals_transformers(part, dtype):
    ours, theirs = make_towers(dtype)
    x = make_pixels(2).to(dtype)
    if part == "embeddings":
        mine, other = ours.vision_model.embeddings(x), theirs.embeddings(x)
    else:
        x = ours.vision_model.embeddings(x)
        if part == "post_layernorm":
            mine, other = ours.vision_model.post_layernorm(x), theirs.post_layernorm(x)
        else:
            layer, reference = ours.vision_model.encoder.layers[1], theirs.encoder.layers[1]
            if part == "layer":
                mine, other = layer(x), reference(x, attention_mask=None)
            else:
                mine, other = getattr(layer, part)(x), getattr(reference, part)(x)
    other = other[0] if isinstance(other, tuple) else other
    torch.testing.assert_close(mine, other, rtol=0, atol=0)  # same operations, same order: exact


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_tower_equals_transformers(dtype):
    ours, theirs = make_towers(dtype)
    pixels = make_pixels(3)
    expected = theirs(pixels.to(dtype)).last_hidden_state
    torch.testing.assert_close(ours(pixels), expected, rtol=0, atol=0)  # same operations, same order: exact


@torch.no_grad()
def test_tower_equals_attention_written_out():
    # Eager attention sums in another order: 8.4e-7 is the largest gap over 20 seeds, so 5e-6 leaves a factor of 6.
    for seed in range(3):
        ours, theirs = make_towers(attention="eager", seed=seed)
        pixels = make_pixels(3, seed)
        torch.testing.assert_close(ours(pixels), theirs(pixels).last_hidden_state, rtol=0, atol=5e-6)


@torch.no_grad()
def test_patches_come_out_in_reading_order():
    ours, _ = make_towers()
    embeddings = ours.vision_model.embeddings
    pixels = torch.zeros(1, 3, 28, 28)
    nothing = embeddings(pixels)
    for patch, (row, column) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        lit = pixels.clone()
        lit[:, :, 14 * row : 14 * row + 14, 14 * column : 14 * column + 14] = 1
        changed = (embeddings(lit) != nothing).any(-1)[0]
        assert changed.tolist() == [i == patch for i in range(4)]


@torch.no_grad()
def test_pictures_do_not_see_each_other():
    # Equal to the last bit over 20 seeds here; another processor may sum larger matrices in another order.
    ours, _ = make_towers()
    pixels = make_pixels(3)
    together = ours(pixels)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], ours(pixels[i : i + 1]), rtol=0, atol=5e-6)


@torch.no_grad()
def test_pixels_are_cast_to_the_weights():
    ours, _ = make_towers(torch.bfloat16)
    pixels = make_pixels(1)
    assert ours(pixels).dtype == torch.bfloat16
    assert torch.equal(ours(pixels), ours(pixels.bfloat16()))


@pytest.mark.parametrize("shape", [(1, 3, 28, 14), (1, 1, 28, 28), (3, 28, 28), (1, 28, 28, 3), (1, 3, 56, 56)])
def test_pixels_of_another_shape_are_refused(shape):
    ours, _ = make_towers()
    with pytest.raises(ValueError, match=r"\[pictures, 3, 28, 28\] is needed"):
        ours(torch.zeros(shape))


def test_parameter_names_are_those_of_the_hub():
    names = set(dict(make_towers()[0].named_parameters()))
    for i in range(2):
        for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"):
            assert f"vision_model.encoder.layers.{i}.{part}.weight" in names
        assert f"vision_model.encoder.layers.{i}.layer_norm2.bias" in names
    assert {"vision_model.embeddings.patch_embedding.bias", "vision_model.embeddings.position_embedding.weight"} <= names
    assert len(names) == 3 + 2 * 16 + 2


def test_what_a_file_leaves_out_is_the_default_of_transformers_class():
    from transformers import SiglipVisionConfig as ReferenceConfig

    theirs = ReferenceConfig()
    ours = SiglipVisionConfig.from_hf({"model_type": "siglip_vision_model"})
    assert asdict(ours) == {name: getattr(theirs, name) for name in asdict(ours)}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_hidden_layers": -3}, "num_hidden_layers is -3"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"hidden_size": "1152"}, "hidden_size is '1152'"),
        ({"hidden_size": 2**40}, "hidden_size is 1099511627776"),
        ({"intermediate_size": 4304.0}, "intermediate_size is 4304.0"),
        ({"num_attention_heads": 7}, "num_attention_heads 7 does not divide hidden_size 48"),
        ({"image_size": 225}, "patch_size 14 does not divide image_size 225"),
        ({"layer_norm_eps": 0}, "layer_norm_eps is 0"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps is nan"),
        ({"layer_norm_eps": 1e-300}, "layer_norm_eps is 1e-300"),
        ({"image_size": 14 * 2**12}, "image_size is 57344"),
        ({"image_size": 1024, "patch_size": 1}, "asks for 1048576 patches"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"hidden_act": [1]}, "hidden_act is [1]"),
        ({"model_type": "clip_vision_model"}, "model_type is 'clip_vision_model'"),
    ],
)
def test_absurd_config_is_refused_in_one_sentence(change, message):
    with pytest.raises(ValueError, match="vision_config") as caught:
        SiglipVisionConfig.from_hf(raw_config("gemma")["vision_config"] | change)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
