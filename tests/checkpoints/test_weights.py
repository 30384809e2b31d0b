"""Loading and saving whole checkpoints: what is loaded, what is refused with which message, and how much memory it takes."""

import copy
import errno
import json
import math
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from paligemma.checkpoints import weights
from paligemma.checkpoints.headers import read_header
from paligemma.configuration import PaliGemmaConfig
from paligemma.errors import CheckpointError, DeviceError, OutputError, PaliGemmaError, UsageError
from paligemma.layers import int_formats, quantization
from tests.bounds import float32_bound
from tests.tiny import FAMILIES, gap, make_batch, make_model, make_reference, raw_config, reference_logits

EMBEDDING = "language_model.model.embed_tokens.weight"
POSITIONS = "vision_tower.vision_model.embeddings.position_embedding.weight"
PATCHES = "vision_tower.vision_model.embeddings.patch_embedding.weight"
DOWN = "language_model.model.layers.1.mlp.down_proj.weight"
NORM = "language_model.model.norm.weight"


@cache
def tiny_tensors(family: str) -> dict[str, torch.Tensor]:
    return make_model(family).state_dict()


def tensors_of(family: str = "gemma") -> dict[str, torch.Tensor]:
    """The tensors of a tiny model, which a test may change."""
    return {name: tensor.clone() for name, tensor in tiny_tensors(family).items()}


def write_checkpoint(folder: Path, tensors: dict | None = None, *, family: str = "gemma", raw: dict | None = None) -> Path:
    """Writes a tiny checkpoint with the safetensors library, not with our own writer."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw or raw_config(family)))
    save_file(tensors_of(family) if tensors is None else tensors, folder / "model.safetensors")
    return folder


def write_shards(folder: Path, shards: list[dict], weight_map: dict | None = None) -> Path:
    """Writes a checkpoint in several files; by default the index is correct."""
    (folder / "config.json").write_text(json.dumps(raw_config("gemma")))
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name)
    if weight_map is None:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def respell(tensors: dict, tower: str, decoder: str, projector: str, prefix: str = "") -> dict:
    """The tensors under the names that another program gives them."""
    renamed = {}
    for name, tensor in tensors.items():
        name = name.replace("vision_tower.vision_model.", tower).replace("language_model.model.", decoder)
        renamed[prefix + name.replace("multi_modal_projector.", projector)] = tensor
    return renamed


def assert_same(model: torch.nn.Module, tensors: dict) -> None:
    state = model.state_dict()
    assert state.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(state[name], tensor), name


# ---------------------------------------------------------------- names

SPELLINGS = {
    "hub": ("vision_tower.vision_model.", "language_model.model.", "multi_modal_projector."),
    "transformers 5 file": ("vision_tower.", "language_model.model.", "multi_modal_projector."),
    "transformers 5 state dict": ("model.vision_tower.", "model.language_model.", "model.multi_modal_projector."),
    "transformers 4.52 file": ("model.vision_tower.vision_model.", "model.language_model.", "model.multi_modal_projector."),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_loads(tmp_path, spelling):
    folder = write_checkpoint(tmp_path, respell(tensors_of("gemma2"), *SPELLINGS[spelling]), family="gemma2")
    assert_same(weights.load_model(folder), tensors_of("gemma2"))


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("prefix", ["base_model.model.", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_what_programs_put_in_front_of_keys_is_taken_off(spelling, prefix):
    for name in tiny_tensors("gemma2"):
        (theirs,) = respell({name: None}, *SPELLINGS[spelling], prefix)
        assert weights.canonical_name(theirs) == name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_of_transformers_loads_and_gives_its_logits(tmp_path, family):
    reference = make_reference(make_model(family), raw_config(family))
    reference.save_pretrained(tmp_path)
    batch = make_batch([(1, 3, 2), (1, 5, 1)])
    model = weights.load_model(tmp_path)
    # The attention kernels differ.
    assert gap(model(**batch), reference_logits(reference, batch), batch) <= float32_bound(model, batch)


@pytest.mark.parametrize("name", ["lm_head.weight", "language_model.lm_head.weight", "base_model.model.lm_head.weight"])
def test_a_second_copy_of_the_embedding_must_be_equal(tmp_path, name):
    tensors = tensors_of()
    assert_same(weights.load_model(write_checkpoint(tmp_path, tensors | {name: tensors[EMBEDDING].clone()})), tensors)
    changed = tensors[EMBEDDING].clone()
    changed[-1, -1] += 1
    for wrong in (changed, changed[:-1]):
        with pytest.raises(CheckpointError, match=f"{name} .* trained on its own .untied.*Train again without lm_head"):
            weights.load_model(write_checkpoint(tmp_path, tensors | {name: wrong}))


@pytest.mark.parametrize("name", ["lm_head.weight", "language_model.lm_head.weight"])
def test_the_output_matrix_may_be_the_only_copy_of_the_embedding(tmp_path, name):
    tensors = tensors_of()
    renamed = {name if key == EMBEDDING else key: tensor for key, tensor in tensors.items()}
    assert_same(weights.load_model(write_checkpoint(tmp_path, renamed)), tensors)


@pytest.mark.parametrize("part", ["", "text_config"])
def test_matrices_that_are_not_tied_but_equal_are_loaded(tmp_path, part):
    raw, tensors = raw_config("gemma"), tensors_of()
    (raw[part] if part else raw)["tie_word_embeddings"] = False
    twice = tensors | {"lm_head.weight": tensors[EMBEDDING].clone()}
    assert_same(weights.load_model(write_checkpoint(tmp_path, twice, raw=raw)), tensors)
    write_checkpoint(tmp_path, tensors, raw=raw)
    if part:  # transformers reads only the entry at the top level
        assert_same(weights.load_model(tmp_path), tensors)
        return
    with pytest.raises(CheckpointError, match="tie_word_embeddings is false, but the weights do not hold both lm_head"):
        weights.load_model(tmp_path)


def test_known_extras_are_dropped(tmp_path):
    extras = {
        "vision_tower.vision_model.head.probe": torch.rand(1, 1, 48),
        "vision_tower.head.mlp.fc1.weight": torch.rand(3, 3),
        "model.vision_tower.vision_model.head.attention.in_proj_bias": torch.rand(3),
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(4)[None],
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(8),
        "model.language_model.rotary_emb.inv_freq": torch.rand(8),
        "language_model.model.rotary_emb.original_inv_freq": torch.rand(8).half(),
        "model.language_model.embed_tokens.embed_scale": torch.tensor(6.3),
        "language_model.model.causal_mask": torch.ones(1, 1, 3, 3, dtype=torch.bool),
    }
    assert_same(weights.load_model(write_checkpoint(tmp_path, tensors_of() | extras)), tensors_of())


def test_missing_and_unexpected_and_misshapen_are_one_error_that_names_them(tmp_path):
    tensors = tensors_of()
    del tensors[DOWN]
    tensors["language_model.model.layers.7.extra.weight"] = torch.rand(2)
    tensors[NORM] = torch.rand(41)
    with pytest.raises(CheckpointError) as caught:
        weights.load_model(write_checkpoint(tmp_path, tensors))
    assert f"1 missing: {DOWN}." in caught.value.message
    assert "1 unexpected: language_model.model.layers.7.extra.weight." in caught.value.message
    assert f"1 with another shape: {NORM} has shape [41], not [40]." in caught.value.message
    assert "\n" not in caught.value.message


def test_many_missing_tensors_are_counted(tmp_path):
    tensors = {name: tensor for name, tensor in tensors_of().items() if "layers.1." not in name}
    with pytest.raises(CheckpointError, match=r"25 missing: .*layers\.1\..* and 20 more\."):
        weights.load_model(write_checkpoint(tmp_path, tensors))


def test_weights_of_another_resolution_are_told_so(tmp_path):
    tensors = tensors_of()
    tensors[POSITIONS] = torch.rand(16, 48)
    with pytest.raises(CheckpointError, match=f"{POSITIONS} has shape .16, 48.*image_size is 28 in config.json, and .* have 56"):
        weights.load_model(write_checkpoint(tmp_path, tensors))


def test_weights_of_another_vocabulary_are_told_so(tmp_path):
    tensors = tensors_of()
    tensors[EMBEDDING] = torch.rand(130, 40)
    with pytest.raises(CheckpointError, match="vocab_size is 160 in config.json, and the weights have 130"):
        weights.load_model(write_checkpoint(tmp_path, tensors))


def test_an_adapter_that_was_not_merged_is_told_so(tmp_path):
    tensors = tensors_of()
    name = "language_model.model.layers.0.self_attn.q_proj"
    tensors[f"{name}.base_layer.weight"] = tensors.pop(f"{name}.weight")
    tensors[f"{name}.lora_A.default.weight"] = torch.rand(2, 40)
    with pytest.raises(CheckpointError, match="not merged.*merge_and_unload"):
        weights.load_model(write_checkpoint(tmp_path, tensors))


# ---------------------------------------------------------------- files


def test_shards_load_by_the_index(tmp_path):
    tensors = tensors_of()
    names = list(tensors)
    folder = write_shards(tmp_path, [{name: tensors[name] for name in names[i::3]} for i in range(3)])
    save_file(
        {name: tensor + 1 for name, tensor in tensors.items()}, folder / "consolidated.safetensors"
    )  # stale: not in the index
    assert_same(weights.load_model(folder), tensors)


def test_an_index_left_beside_a_single_file_is_ignored_as_in_transformers(tmp_path):
    from transformers import PaliGemmaForConditionalGeneration

    tensors = tensors_of()
    folder = write_checkpoint(tmp_path, tensors)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-00001-of-00002.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    theirs = PaliGemmaForConditionalGeneration.from_pretrained(folder)
    assert torch.equal(theirs.get_input_embeddings().weight, tensors[EMBEDDING])
    assert_same(weights.load_model(folder), tensors)


def test_a_tensor_in_two_shards_must_be_equal(tmp_path):
    tensors = tensors_of()
    assert_same(weights.load_model(write_shards(tmp_path, [tensors, {NORM: tensors[NORM]}])), tensors)
    with pytest.raises(CheckpointError, match=f"{NORM} in model-00001-of-00002.* and {NORM} in model-00002-of-00002"):
        weights.load_model(write_shards(tmp_path, [tensors, {NORM: tensors[NORM] + 1}]))


def test_two_spellings_of_a_tensor_must_be_equal(tmp_path):
    tensors = tensors_of()
    twice = tensors | {"model.language_model.norm.weight": tensors[NORM] + 1}
    with pytest.raises(CheckpointError, match="model.language_model.norm.weight .* different values"):
        weights.load_model(write_checkpoint(tmp_path, twice))


@pytest.mark.parametrize("bytes_left", [0, 5, 100, 20_000])
def test_a_truncated_file_is_refused_by_name(tmp_path, bytes_left):
    folder = write_checkpoint(tmp_path)
    os.truncate(folder / "model.safetensors", bytes_left)
    with pytest.raises(CheckpointError, match="model.safetensors is damaged"):
        weights.load_model(folder)


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [None, "bf16", "float16", torch.float32])
def test_dtype_is_that_of_the_file_or_the_one_asked_for(tmp_path, stored, dtype):
    tensors = {name: tensor.to(stored) for name, tensor in tensors_of().items()}
    model = weights.load_model(write_checkpoint(tmp_path, tensors), dtype=dtype)
    wanted = {None: stored, "bf16": torch.bfloat16, "float16": torch.float16, torch.float32: torch.float32}[dtype]
    assert_same(model, {name: tensor.to(wanted) for name, tensor in tensors.items()})
    assert model.dtype == wanted
    assert not model.training


def test_mixed_files_take_the_dtype_of_most_bytes(tmp_path, caplog):
    caplog.set_level("INFO")
    tensors = {name: tensor if tensor.dim() == 1 else tensor.bfloat16() for name, tensor in tensors_of().items()}
    model = weights.load_model(write_checkpoint(tmp_path, tensors))
    assert_same(model, {name: tensor.bfloat16() for name, tensor in tensors.items()})
    assert "mix BF16, F32" in caplog.text


def test_tensors_are_views_of_the_file_where_the_dtype_is_equal(tmp_path):
    places = read_header(write_checkpoint(tmp_path) / "model.safetensors")
    for dtype, is_mapped in (("fp32", True), ("bf16", False)):
        state = weights.load_model(tmp_path, dtype=dtype).state_dict()
        starts = {tensor.data_ptr() - places[name].start for name, tensor in state.items()}  # where the file is mapped
        assert (len(starts) == 1) == is_mapped


def test_tensors_at_odd_places_of_a_file_load(tmp_path):
    """The safetensors library aligns tensors when it writes them, but the format does not require it."""
    folder = write_checkpoint(tmp_path)
    data = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip() + b" "
    header += b" " * ((8 + len(header)) % 2 == 0)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    model = weights.load_model(folder)
    assert_same(model, tensors_of())
    assert all(tensor.data_ptr() % 4 == 0 for tensor in model.state_dict().values())


@pytest.mark.parametrize("name", [DOWN, NORM, PATCHES, EMBEDDING])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_are_refused_by_name_unless_allowed(tmp_path, name, value, dtype):
    tensors = {key: tensor.to(dtype) for key, tensor in tensors_of().items()}
    tensors[name].view(-1)[-2] = value
    folder = write_checkpoint(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinity"):
        weights.load_model(folder)
    model = weights.load_model(folder, allow_nonfinite=True)
    assert not model.state_dict()[name].isfinite().all()


def test_infinities_that_cancel_in_a_row_are_found(tmp_path):
    tensors = tensors_of()
    tensors[DOWN][3, 4], tensors[DOWN][3, 5] = math.inf, -math.inf
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        weights.load_model(write_checkpoint(tmp_path, tensors))


def test_large_finite_numbers_are_not_taken_for_infinities(tmp_path):
    tensors = tensors_of()
    tensors[DOWN][0] = torch.finfo(torch.float32).max
    assert_same(weights.load_model(write_checkpoint(tmp_path, tensors)), tensors)


def test_numbers_that_float16_cannot_hold_are_refused(tmp_path):
    tensors = tensors_of()
    tensors[DOWN][2, 2] = 1e5
    folder = write_checkpoint(tmp_path, tensors)
    with pytest.raises(CheckpointError, match="infinity as float16.*65504"):
        weights.load_model(folder, dtype="fp16")
    weights.load_model(folder, dtype="bf16")


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_a_constant_matrix_is_warned_of_and_a_constant_vector_is_not(tmp_path, caplog, value):
    tensors = tensors_of()
    tensors[DOWN].fill_(value)
    tensors[NORM].fill_(value)
    weights.load_model(write_checkpoint(tmp_path, tensors))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"every value of {DOWN} is {value:g}" in caplog.text


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn, torch.int64])
def test_integers_in_place_of_floats_are_refused(tmp_path, dtype):
    tensors = tensors_of()
    tensors[DOWN] = tensors[DOWN].to(dtype)
    with pytest.raises(CheckpointError, match=f"{DOWN} has dtype .*quantised"):
        weights.load_model(write_checkpoint(tmp_path, tensors))


@pytest.mark.parametrize("part", [None, "text_config"])
@pytest.mark.parametrize(
    ("key", "entry"),
    [
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ("quantization_config", {"quant_method": "gptq"}),
        ("quantization_config", {"bits": 4}),
        ("quantization_config", "int8"),
        ("quantization_config", [1]),
        ("quantization", {"group_size": 64, "bits": 4}),
        ("compression_config", {"format": "pack-quantized"}),
    ],
)
def test_quantised_checkpoints_of_other_programs_are_recognised_before_their_headers_are_judged(tmp_path, part, key, entry):
    raw = altered(part, **{key: entry})
    folder = write_checkpoint(tmp_path, raw=raw)
    (folder / "model.safetensors").write_bytes(b"a header of another kind")
    with pytest.raises(CheckpointError, match=f"quantised by another program .{key} in config.json"):
        weights.load_model(folder)


@pytest.mark.parametrize("method", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int32, torch.float8_e8m0fnu])
def test_packed_numbers_are_no_damage(tmp_path, method):
    tensors = tensors_of()
    tensors[DOWN] = torch.zeros(3, 4, dtype=torch.uint8).repeat(1, 8).view(method)
    with pytest.raises(CheckpointError, match=f"{DOWN} has dtype .*quantised checkpoint of another program"):
        weights.load_model(write_checkpoint(tmp_path, tensors))
    tensors[DOWN] = tensors_of()[DOWN]
    spare = torch.zeros(8, dtype=torch.uint8).view(method)
    extra = {"vision_tower.vision_model.head.probe": spare, "vision_tower.head.probe": spare.clone()}
    assert_same(weights.load_model(write_checkpoint(tmp_path, tensors | extra)), tensors)


@pytest.mark.parametrize("dtype", ["int8", "double", torch.float64, torch.int8, 16])
def test_an_unknown_dtype_is_wrong_usage(tmp_path, dtype):
    with pytest.raises(UsageError, match="bf16, fp16 or fp32"):
        weights.load_model(tmp_path, dtype=dtype)


# ---------------------------------------------------------------- config.json


def altered(part: str | None, **changes: object) -> dict:
    """config.json with some entries changed, or removed if the new value is None."""
    raw = copy.deepcopy(raw_config("gemma"))
    place = raw[part] if part else raw
    for key, value in changes.items():
        place.pop(key, None)
        if value is not None:
            place[key] = value
    return raw


@pytest.mark.parametrize(
    ("part", "changes", "says"),
    [
        ("text_config", {"num_hidden_layers": -3}, "text_config.num_hidden_layers is -3"),
        ("text_config", {"num_hidden_layers": 1_000_000}, "text_config.num_hidden_layers is 1000000"),
        ("vision_config", {"num_hidden_layers": 1_000_000}, "vision_config.num_hidden_layers is 1000000"),
        ("text_config", {"hidden_size": 2**40}, "text_config.hidden_size is 1099511627776"),
        ("text_config", {"hidden_size": "40"}, "text_config.hidden_size is '40'"),
        ("text_config", {"hidden_size": 40.0}, "text_config.hidden_size is 40.0"),
        ("text_config", {"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide"),
        ("text_config", {"model_type": "llama"}, "'llama'"),
        ("text_config", {"rope_parameters": [1]}, "rope_parameters"),
        ("vision_config", {"image_size": 30}, "patch_size 14 does not divide image_size 30"),
        ("vision_config", {"num_attention_heads": 5}, "num_attention_heads 5 does not divide"),
        (None, {"text_config": None}, "text_config is None"),
        (None, {"vision_config": [1]}, "vision_config is .1."),
        (None, {"image_token_index": None}, "image_token_index is missing"),
        (None, {"model_type": "gemma2"}, "a 'gemma2' model; model_type 'paligemma' is needed"),
        (None, {"model_type": "qwen2_vl"}, "a 'qwen2_vl' model"),
        (None, {"model_type": None}, "a None model"),
    ],
)
def test_a_wrong_config_is_refused_by_field_before_the_weights_are_looked_at(tmp_path, part, changes, says):
    (tmp_path / "config.json").write_text(json.dumps(altered(part, **changes)))
    with pytest.raises(CheckpointError, match=says) as caught:
        assert weights.ModelFiles(tmp_path).config
    assert caught.value.message.startswith(f"{tmp_path}/config.json: ")


def leaves(raw: dict, path: tuple = ()) -> list[tuple]:
    """The path of every entry."""
    inner = [leaf for key, value in raw.items() if isinstance(value, dict) for leaf in leaves(value, (*path, key))]
    return [(*path, key) for key in raw] + inner


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from([0, 1, 28, 2**20, 10**400]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["rope_type", "rope_theta"]), inner),
    max_leaves=3,
)
EXTRA_KEYS = [
    ("quantization_config",), ("quantization",), ("text_config", "rope_parameters"), ("text_config", "rope_theta"),
    ("text_config", "layer_types"), ("text_config", "rms_norm_eps"), ("vision_config", "layer_norm_eps"),
    ("vision_config", "hidden_act"), ("text_config", "max_position_embeddings"), ("torch_dtype",), ("tie_word_embeddings",),
]  # fmt: skip
KEYS = leaves(raw_config("gemma2")) + EXTRA_KEYS


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.sampled_from(KEYS), VALUES), min_size=1, max_size=2))
def test_random_configs_raise_nothing_but_our_errors(tmp_path, edits):
    raw = copy.deepcopy(raw_config("gemma2"))
    for path, value in edits:
        place = raw
        for key in path[:-1]:
            place = place.get(key, {}) if isinstance(place, dict) else {}
        if isinstance(place, dict):
            place[path[-1]] = value
    if not (tmp_path / "model.safetensors").exists():
        save_file(tensors_of("gemma2"), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    try:
        weights.load_model(tmp_path)
    except PaliGemmaError as error:
        assert "\n" not in error.message


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="config.json is missing"):
        weights.load_model(tmp_path)


def test_the_side_of_the_picture_is_taken_from_the_weights_where_config_is_silent(tmp_path):
    tensors = tensors_of() | {POSITIONS: torch.rand(16, 48)}
    folder = write_checkpoint(tmp_path, tensors, raw=altered("vision_config", image_size=None))
    assert weights.ModelFiles(folder).config.vision_config.image_size == 56
    assert weights.load_model(folder).config.num_image_tokens == 16
    write_checkpoint(tmp_path, tensors, raw=altered("vision_config", image_size=None, patch_size=7))
    assert weights.ModelFiles(folder).config.vision_config.image_size == 28


def test_position_embeddings_that_are_no_square_are_refused(tmp_path):
    tensors = tensors_of() | {POSITIONS: torch.rand(15, 48)}
    write_checkpoint(tmp_path, tensors, raw=altered("vision_config", image_size=None))
    with pytest.raises(CheckpointError, match="15 position embeddings, which is not a square"):
        weights.load_model(tmp_path)


def test_tensors_that_are_not_read_are_no_evidence_against_the_weights(tmp_path):
    unread = {"num_positions": 1024, "num_image_tokens": 9, "projection_dim": 7, "vision_use_head": True}
    raw = altered("vision_config", image_size=None, **unread) | {"vocab_size": 3, "hidden_size": 5}
    folder = write_checkpoint(tmp_path, tensors_of(), raw=raw)
    assert weights.load_model(folder).config == weights.ModelFiles(folder).config == PaliGemmaConfig.from_hf(raw_config("gemma"))


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [1, 107]}, 1, (1, 107)),
        ({"eos_token_id": 107}, [1, 107], 107),
        ({"eos_token_id": None}, 7, 7),
        ({"eos_token_id": []}, [1, 7], (1, 7)),
        ({}, 7, 7),
    ],
)
def test_generation_config_says_what_ends_an_answer_as_in_transformers(tmp_path, generation, config, expected):
    (tmp_path / "config.json").write_text(json.dumps(raw_config("gemma") | {"eos_token_id": config}))
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert weights.ModelFiles(tmp_path).config.eos_token_id == expected


@pytest.mark.parametrize("value", ["1", True, 1.0, -1, 10**400, [1, None], [[1]], {"a": 1}])
def test_an_end_that_is_no_token_is_refused_by_file(tmp_path, value):
    (tmp_path / "config.json").write_text(json.dumps(raw_config("gemma")))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(CheckpointError, match="generation_config.json: eos_token_id is"):
        assert weights.ModelFiles(tmp_path).config


TOWER = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16,
    "num_hidden_layers": 27, "patch_size": 14, "projector_hidden_act": "gelu_fast", "vision_use_head": False,
}  # fmt: skip
GEMMA1 = {
    "model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "num_attention_heads": 8, "num_hidden_layers": 18,
    "num_image_tokens": 256, "num_key_value_heads": 1, "vocab_size": 257216, "torch_dtype": "float32",
}  # fmt: skip
GEMMA2 = {
    "model_type": "gemma2", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096,
    "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 8192, "vocab_size": 257216,
}  # fmt: skip
GEMMA2_SIZES = {
    "3b": (2304, 9216, 26, 8, 4, 256, 256),
    "10b": (3584, 14336, 42, 16, 8, 256, 256),
    "28b": (4608, 36864, 46, 32, 16, 128, 144),
}
GEMMA2_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "query_pre_attn_scalar",
)  # fmt: skip


def published_config(name: str, side: int) -> dict:
    """The relevant fields of a config.json on the hub. For 224 pixels it has no image_size."""
    text = GEMMA1
    if name != "paligemma-3b":
        text = GEMMA2 | dict(zip(GEMMA2_FIELDS, GEMMA2_SIZES[name.partition("-")[2]], strict=True))
    tower = TOWER | {"projection_dim": text["hidden_size"], "num_image_tokens": (side // 14) ** 2}
    if side != 224:
        tower["image_size"] = side
    return {
        "model_type": "paligemma", "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "hidden_size": 2048,
        "ignore_index": -100, "image_token_index": 257152, "projection_dim": text["hidden_size"], "vocab_size": 257216,
        "text_config": text, "vision_config": tower,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "side", "parameters"),
    [
        ("paligemma-3b", 224, 2_923_466_480),
        ("paligemma-3b", 448, 2_924_351_216),
        ("paligemma-3b", 896, 2_927_890_160),
        ("paligemma2-3b", 224, 3_032_242_416),
        ("paligemma2-3b", 448, 3_032_242_416 + 884_736),
        ("paligemma2-3b", 896, 3_032_242_416 + 4_423_680),
        ("paligemma2-10b", 224, 9_662_638_832),
        ("paligemma2-10b", 448, 9_662_638_832 + 884_736),
        ("paligemma2-10b", 896, 9_662_638_832 + 4_423_680),
        ("paligemma2-28b", 224, 27_650_487_024),
        ("paligemma2-28b", 448, 27_650_487_024 + 884_736),
        ("paligemma2-28b", 896, 27_650_487_024 + 4_423_680),
    ],
)
def test_published_models_have_the_published_parameters(name, side, parameters):
    config = PaliGemmaConfig.from_hf(published_config(name, side))
    shapes = {key: tuple(tensor.shape) for key, tensor in weights.empty_model(config).state_dict().items()}
    assert sum(math.prod(shape) for shape in shapes.values()) == parameters
    text, layers = config.text_config, config.text_config.num_hidden_layers
    width, queries, keys = text.hidden_size, text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    norms = ["input_layernorm", "post_attention_layernorm"]
    if name != "paligemma-3b":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    block = {"q_proj": (queries, width), "k_proj": (keys, width), "v_proj": (keys, width), "o_proj": (width, queries)}
    mlp = {"gate_proj": (text.intermediate_size, width), "up_proj": (text.intermediate_size, width)}
    mlp["down_proj"] = (width, text.intermediate_size)
    expected = {EMBEDDING: (257216, width), NORM: (width,)}
    for i in range(layers):
        layer = f"language_model.model.layers.{i}"
        expected |= {f"{layer}.self_attn.{key}.weight": shape for key, shape in block.items()}
        expected |= {f"{layer}.mlp.{key}.weight": shape for key, shape in mlp.items()}
        expected |= {f"{layer}.{key}.weight": (width,) for key in norms}
    tower = "vision_tower.vision_model"
    expected |= {f"{tower}.embeddings.patch_embedding.weight": (1152, 3, 14, 14), POSITIONS: ((side // 14) ** 2, 1152)}
    linears = {f"self_attn.{key}_proj": (1152, 1152) for key in ("q", "k", "v", "out")}
    linears |= {"mlp.fc1": (4304, 1152), "mlp.fc2": (1152, 4304)}
    for i in range(27):
        for key, shape in linears.items():
            expected |= {f"{tower}.encoder.layers.{i}.{key}.weight": shape, f"{tower}.encoder.layers.{i}.{key}.bias": shape[:1]}
        for key in ("layer_norm1", "layer_norm2"):
            expected |= {f"{tower}.encoder.layers.{i}.{key}.{part}": (1152,) for part in ("weight", "bias")}
    expected |= {f"{tower}.post_layernorm.{part}": (1152,) for part in ("weight", "bias")}
    expected |= {f"{tower}.embeddings.patch_embedding.bias": (1152,)}
    expected |= {"multi_modal_projector.linear.weight": (width, 1152), "multi_modal_projector.linear.bias": (width,)}
    assert shapes == expected


# ---------------------------------------------------------------- quantised


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", int_formats.KINDS)
@pytest.mark.parametrize("with_vision", [False, True])
def test_quantising_while_loading_equals_quantising_the_loaded_model(tmp_path, family, kind, with_vision):
    whole = weights.load_model(write_checkpoint(tmp_path, family=family))
    model = weights.load_model(tmp_path, quantize=kind, quantize_vision=with_vision)
    names = {name for name, module in model.named_modules() if isinstance(module, quantization.QuantizedLinear)}
    assert names == set(quantization.targets(whole, vision=with_vision))
    assert any(name.startswith("vision_tower.") for name in names) == with_vision
    state = model.state_dict()
    for name, module in whole.named_modules():
        if name in names:
            packed, scales = int_formats.quantize(module.weight.detach(), kind)
            assert torch.equal(state.pop(f"{name}.packed"), packed)
            assert torch.equal(state.pop(f"{name}.scales"), scales)
    for name, tensor in state.items():  # norms, biases, projector, and the tower if it is not quantised
        assert torch.equal(whole.state_dict()[name], tensor)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", int_formats.KINDS)
@pytest.mark.parametrize("with_vision", [False, True])
def test_a_quantised_model_is_saved_and_mapped_back(tmp_path, dtype, kind, with_vision):
    model = weights.load_model(
        write_checkpoint(tmp_path / "plain", family="gemma2"), dtype=dtype, quantize=kind, quantize_vision=with_vision
    )
    weights.save_model(model, tmp_path / "small")
    again = weights.load_model(tmp_path / "small")
    assert again.dtype == model.dtype
    assert_same(again, model.state_dict())
    places = read_header(tmp_path / "small" / "model.safetensors")
    assert len({tensor.data_ptr() - places[name].start for name, tensor in again.state_dict().items()}) == 1
    batch = make_batch([(1, 3, 2), (1, 5, 1)])
    assert torch.equal(model(**batch), again(**batch))
    weights.save_model(again, tmp_path / "small")  # this replaces the files that the model is mapped from
    assert_same(weights.load_model(tmp_path / "small", quantize=kind), model.state_dict())


def test_a_quantised_folder_computes_in_the_dtype_that_config_names(tmp_path):
    """Most floats in its files are scales, which are always bfloat16."""
    weights.save_model(weights.load_model(write_checkpoint(tmp_path), quantize="int4"), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["torch_dtype"] == "float32"
    (tmp_path / "config.json").write_text(json.dumps(raw | {"torch_dtype": "float16"}))
    assert weights.load_model(tmp_path).dtype == torch.float16
    assert weights.load_model(tmp_path, dtype="bf16").dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_transformers_refuses_a_quantised_folder_and_loads_no_random_matrices(tmp_path, kind):
    from transformers import AutoModelForImageTextToText, PaliGemmaForConditionalGeneration

    weights.save_model(weights.load_model(write_checkpoint(tmp_path), quantize=kind), tmp_path)
    for loader in (AutoModelForImageTextToText, PaliGemmaForConditionalGeneration):
        with pytest.raises(ValueError, match="quantization config"):
            loader.from_pretrained(tmp_path)


def test_a_quantised_folder_of_an_older_version_loads(tmp_path):
    model = weights.load_model(write_checkpoint(tmp_path), quantize="int8")
    weights.save_model(model, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["quantization_config"]["quant_method"] = raw["quantization_config"].pop("format")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert_same(weights.load_model(tmp_path), model.state_dict())


def test_a_quantised_folder_cannot_become_another_kind(tmp_path):
    model = weights.load_model(write_checkpoint(tmp_path / "plain"), quantize="int8")
    weights.save_model(model, tmp_path / "small")
    with pytest.raises(UsageError, match="stored as int8 and cannot become int4"):
        weights.load_model(tmp_path / "small", quantize="int4")
    with pytest.raises(UsageError, match="quantize is 'int3'. int8 or int4"):
        weights.load_model(tmp_path / "plain", quantize="int3")


@pytest.mark.parametrize("change", [{"layout": 99}, {"kind": "int3"}, {"kind": None}])
def test_a_quantised_folder_of_another_version_is_refused(tmp_path, change):
    model = weights.load_model(write_checkpoint(tmp_path), quantize="int8")
    weights.save_model(model, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="this version reads int8, int4 in layout"):
        weights.load_model(tmp_path)


def test_a_quantised_folder_with_floats_in_place_of_bytes_is_refused(tmp_path):
    weights.save_model(weights.load_model(write_checkpoint(tmp_path), quantize="int8"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = DOWN.replace("weight", "packed")
    tensors[name] = tensors[name].float()
    save_file(tensors, tmp_path / "new.safetensors")
    os.replace(tmp_path / "new.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} has dtype F32"):
        weights.load_model(tmp_path)


def test_nan_is_refused_before_it_is_quantised(tmp_path):
    tensors = tensors_of()
    tensors[DOWN][0, 0] = math.nan
    with pytest.raises(CheckpointError, match=f"{DOWN} holds NaN"):
        weights.load_model(write_checkpoint(tmp_path, tensors), quantize="int8")


# ---------------------------------------------------------------- cost

MEASURE = """
import sys
from paligemma.checkpoints import weights
def peak():
    try:
        lines = open("/proc/self/status").read().splitlines()
    except FileNotFoundError:  # macOS
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
before = peak()
model = weights.load_model(sys.argv[1], dtype="bf16", quantize=sys.argv[2] if len(sys.argv) > 2 else None)
print(peak() - before, sum(tensor.nbytes for tensor in model.state_dict().values()))
print(*(name for name in ("sympy", "transformers", "huggingface_hub") if name in sys.modules))
"""


@pytest.fixture(scope="module")
def larger_checkpoints(tmp_path_factory):
    """The same model of 58 million parameters in float32 and bfloat16: 230 and 115 MB."""
    raw = raw_config("gemma", hidden_size=512, intermediate_size=4096, vocab_size=60_000, num_hidden_layers=4)
    raw["projection_dim"] = raw["vision_config"]["projection_dim"] = 512
    model = weights.empty_model(PaliGemmaConfig.from_hf(raw))
    tensors = {name: torch.randn(tensor.shape[-1]).expand(tensor.shape) for name, tensor in model.state_dict().items()}
    folders = {}
    for dtype in (torch.float32, torch.bfloat16):
        folders[dtype] = tmp_path_factory.mktemp("larger")
        converted = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
        write_checkpoint(folders[dtype], converted, raw=raw)
    return folders


def measure(folder: Path, *quantize: str) -> tuple[int, int, str]:
    """For a new process: growth of its peak memory in bytes, mapped pages included; bytes of the weights; slow imports."""
    command = [sys.executable, "-c", MEASURE, str(folder), *quantize]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    numbers, slow = run.stdout.split("\n")[:2]
    grown, size = map(int, numbers.split())
    assert grown > size * 0.95  # the measurement is plausible: all weights were in memory
    return grown, size, slow


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_loading_never_holds_two_copies_and_imports_nothing_slow(larger_checkpoints, stored):
    grown, size, slow = measure(larger_checkpoints[stored])
    assert grown < size * 1.1 + 70 * 2**20  # in addition to the weights: a buffer, and memory of torch's first calls
    assert slow == ""


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_quantising_never_holds_the_whole_model(larger_checkpoints, stored):
    """The embedding, a third of all weights, comes first; in bfloat16 it is as large as the whole quantised model."""
    grown, size = measure(larger_checkpoints[stored], "int8")[:2]
    assert grown < size * 1.1 + 70 * 2**20
    assert grown < 2 * size + 10 * 2**20  # the bfloat16 model alone


def test_weights_larger_than_memory_are_refused_before_they_are_touched(tmp_path):
    raw = raw_config("gemma", hidden_size=2**16, intermediate_size=2**18, vocab_size=2**20)
    raw["projection_dim"] = raw["vision_config"]["projection_dim"] = 2**16
    header, end = {}, 0
    for name, tensor in weights.empty_model(PaliGemmaConfig.from_hf(raw)).state_dict().items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + tensor.numel() * 4]}
        end += tensor.numel() * 4
    text = json.dumps(header).encode()
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(tmp_path / "model.safetensors", 8 + len(text) + end)  # a sparse file of 860 GB takes no space
    with pytest.raises(DeviceError, match=f"{end / 2**30:.2f} GiB on cpu.*free.*--dtype bf16"):
        weights.load_model(tmp_path)


# ---------------------------------------------------------------- saving


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 30_000])
def test_transformers_loads_what_is_saved_and_gives_equal_logits(tmp_path, family, max_shard_bytes):
    from transformers import PaliGemmaForConditionalGeneration as Reference

    model = make_model(family)
    weights.save_model(model, tmp_path, max_shard_bytes=max_shard_bytes)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_bytes == 30_000)
    reference, info = Reference.from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not any(info.values())
    batch = make_batch([(1, 3, 2), (1, 5, 1)])
    # The attention kernels differ.
    assert gap(model(**batch), reference_logits(reference, batch), batch) <= float32_bound(model, batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_loads_as_it_was(tmp_path, dtype):
    model = make_model("gemma2", dtype=dtype)
    weights.save_model(model, tmp_path / "new" / "folder")
    again = weights.load_model(tmp_path / "new" / "folder")
    assert_same(again, model.state_dict())
    assert again.config == model.config
    assert json.loads((tmp_path / "new" / "folder" / "config.json").read_text())["torch_dtype"] == str(dtype)[6:]
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["config.json", "model.safetensors"]


def test_a_model_can_be_saved_over_the_files_it_was_loaded_from(tmp_path):
    tensors = tensors_of()
    folder = write_shards(tmp_path, [dict(list(tensors.items())[:20]), dict(list(tensors.items())[20:])])
    model = weights.load_model(folder)
    with torch.no_grad():
        model.language_model.model.norm.weight += 1  # the file does not change: the mapping is private
    weights.save_model(model, folder)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    assert_same(weights.load_model(folder), tensors | {NORM: tensors[NORM] + 1})
    assert_same(model, tensors | {NORM: tensors[NORM] + 1})


def test_a_full_disk_leaves_the_old_model_and_nothing_else(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OutputError, match="No space left on device.*Free disk space"):
        patch.setattr(os, "fsync", full)
        weights.save_model(make_model("gemma", seed=1), folder)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    assert_same(weights.load_model(folder), tensors_of())


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be made"):
        weights.save_model(make_model("gemma"), tmp_path / "file")


def test_a_model_that_is_saved_is_not_copied(tmp_path):
    model = make_model("gemma")
    weights.save_model(model, tmp_path)
    assert torch.equal(load_file(tmp_path / "model.safetensors")[EMBEDDING], model.state_dict()[EMBEDDING])


# ---------------------------------------------------------------- devices and names


def test_a_folder_with_a_typo_is_told_with_its_neighbours(tmp_path):
    write_checkpoint(tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match=f"no folder {tmp_path}/chekpoint. Did you mean {tmp_path}/checkpoint"):
        weights.load_model(tmp_path / "chekpoint")
    with pytest.raises(CheckpointError, match="Give a folder, or an id of the hub"):
        weights.load_model(tmp_path / "nothing" / "like" / "it")


def test_a_file_in_place_of_a_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is a file of a model. Give its folder"):
        weights.load_model(write_checkpoint(tmp_path) / "model.safetensors")


def test_a_folder_has_no_revision(tmp_path):
    with pytest.raises(UsageError, match="revision bfloat16 is allowed only for a hub id"):
        weights.load_model(write_checkpoint(tmp_path), revision="bfloat16")


def test_a_device_that_is_not_there_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(DeviceError, match="device cuda:99 is not available"):
        weights.load_model(tmp_path / "nothing", device="cuda:99")
