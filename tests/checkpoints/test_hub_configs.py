"""Every form of config.json on the hub: its numbers are read as in transformers, and weights of that form load.

transformers leaves fields out of a sub-config, each version others (tests/hub_configs/README.md says how the files were made).
"""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from paligemma.checkpoints import weights
from paligemma.configuration import DEFAULTS, PaliGemmaConfig
from paligemma.errors import CheckpointError
from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration
from paligemma.processing_paligemma import PaliGemmaProcessor
from tests.tiny import fill, gap, raw_config, reference_logits
from tests.tiny_tokenizer import write_json, write_preprocessor, write_tokenizer

FOLDER = Path(__file__).parent / "hub_configs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
TEXT_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "rms_norm_eps", "model_type",
)  # fmt: skip
GEMMA2_FIELDS = ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "sliding_window")
VISION_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size", "patch_size",
    "layer_norm_eps",
)  # fmt: skip
PARAMETERS = {  # with 257,216 rows in the embedding, by width of the decoder and side of the picture
    (2048, 224): 2_923_466_480,
    (2304, 224): 3_032_242_416,
    (2304, 448): 3_033_127_152,
    (3584, 224): 9_662_638_832,
    (3584, 448): 9_663_523_568,
    (4608, 224): 27_650_487_024,
    (4608, 448): 27_651_371_760,
}
# Numbers of a tiny model that replace those in the file. A field that the file does not have is not added.
TINY_TEXT = {
    "vocab_size": 160, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 12.0, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}  # fmt: skip
TINY_VISION = {
    "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 28,
    "projection_dim": 48,
}  # fmt: skip


def read(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text())


def tiny_form(name: str) -> dict:
    """The config with small numbers; the same fields are present and absent."""
    raw = read(name) | {"image_token_index": 128, "projection_dim": 48}
    for part, numbers in (("text_config", TINY_TEXT), ("vision_config", TINY_VISION)):
        raw[part] = {key: numbers.get(key, value) for key, value in raw[part].items()}
    return raw


FORMS = {json.dumps(tiny_form(name) | {"transformers_version": ""}, sort_keys=True): name for name in NAMES}  # each form once


def reference_config(raw: dict, folder: Path):
    from transformers import AutoConfig

    write_json(folder, "config.json", raw)
    return AutoConfig.from_pretrained(folder)


def assert_equal_configs(ours: PaliGemmaConfig, theirs) -> None:
    from transformers import GenerationConfig

    text = theirs.text_config
    fields = TEXT_FIELDS + (GEMMA2_FIELDS if ours.text_config.is_gemma2 else ())
    assert {name: getattr(ours.text_config, name) for name in fields} == {name: getattr(text, name) for name in fields}
    assert ours.text_config.rope_theta == text.rope_parameters["rope_theta"]
    scale = text.query_pre_attn_scalar if ours.text_config.is_gemma2 else text.head_dim
    assert ours.text_config.query_scale == scale**-0.5
    for name in VISION_FIELDS:
        assert getattr(ours.vision_config, name) == getattr(theirs.vision_config, name), name
    assert ours.image_token_index == theirs.image_token_id
    assert ours.eos_token_id == GenerationConfig.from_model_config(theirs).eos_token_id


@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_are_those_of_transformers(tmp_path, name):
    assert_equal_configs(PaliGemmaConfig.from_hf(read(name)), reference_config(read(name), tmp_path))


@pytest.mark.parametrize("name", NAMES)
def test_the_model_has_the_published_number_of_parameters(name):
    config = PaliGemmaConfig.from_hf(read(name))
    model = weights.empty_model(config)
    expected = PARAMETERS[config.text_config.hidden_size, config.vision_config.image_size]
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    side = 448 if name.endswith("448") else 224
    assert config.num_image_tokens == (side // 14) ** 2


@pytest.mark.parametrize("name", [name for name in NAMES if "num_attention_heads" not in read(name)["text_config"]])
def test_a_field_with_its_default_may_be_present(name):
    raw = read(name)
    given = raw | {"text_config": raw["text_config"] | {"num_attention_heads": 8, "head_dim": 256}}
    assert PaliGemmaConfig.from_hf(given) == PaliGemmaConfig.from_hf(raw)


@pytest.mark.parametrize("name", FORMS.values())
def test_weights_of_this_form_load_and_equal_transformers(tmp_path, name):
    from transformers import PaliGemmaForConditionalGeneration as Reference

    raw = tiny_form(name)
    model = fill(PaliGemmaForConditionalGeneration(PaliGemmaConfig.from_hf(raw)), 0)
    write_json(tmp_path, "config.json", raw)
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    reference, report = Reference.from_pretrained(tmp_path, attn_implementation="eager", output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    patches, side = model.config.num_image_tokens, model.config.vision_config.image_size
    draw = torch.Generator().manual_seed(0)
    ids = torch.cat((torch.full((1, patches), 128), torch.randint(3, 128, (1, 9), generator=draw)), 1)
    types = (torch.arange(ids.shape[1]) >= patches + 5).long()[None]
    pixels = torch.rand(1, 3, side, side, generator=draw) * 2 - 1
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": types, "pixel_values": pixels}
    with torch.no_grad():
        ours = weights.load_model(tmp_path)(**batch)
    # The attention kernels differ: the largest measured difference is 3e-5 in logits of up to 12.
    assert gap(ours, reference_logits(reference.eval(), batch), batch) < 2e-4


@pytest.mark.parametrize("name", NAMES)
def test_the_processor_reads_the_same_numbers(tmp_path, name):
    ids = write_tokenizer(tmp_path, num_words=1)
    raw = read(name) | {"image_token_index": ids["image_token_index"]}
    write_json(tmp_path, "config.json", raw)
    config = weights.ModelFiles(tmp_path).config
    write_preprocessor(tmp_path, config.vision_config.image_size)
    processor = PaliGemmaProcessor.from_pretrained(tmp_path)
    assert (processor.image_size, processor.num_image_tokens) == (config.vision_config.image_size, config.num_image_tokens)


def test_model_and_processor_derive_a_missing_image_size_from_the_weights(tmp_path):
    ids = write_tokenizer(tmp_path, num_words=1)
    raw = raw_config("gemma", vocab_size=ids["vocab_size"]) | {"image_token_index": ids["image_token_index"]}
    raw["vision_config"]["image_size"] = 56
    model = PaliGemmaForConditionalGeneration(PaliGemmaConfig.from_hf(raw))
    save_file(fill(model, 0).state_dict(), tmp_path / "model.safetensors")
    del raw["vision_config"]["image_size"]
    write_json(tmp_path, "config.json", raw)
    processor = PaliGemmaProcessor.from_pretrained(tmp_path)
    assert (processor.image_size, processor.num_image_tokens) == (56, 16)
    assert weights.load_model(tmp_path).config == model.config
    write_preprocessor(tmp_path, 224)
    with pytest.raises(CheckpointError, match="'height': 224.* but the model needs 56 x 56 pixels"):
        PaliGemmaProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
@pytest.mark.parametrize("family", ["gemma", "gemma2"])
def test_any_field_may_be_absent(tmp_path, family, part):
    raw = raw_config(family, hidden_size=48, num_attention_heads=16)  # divisible by the defaults of the other fields
    raw["vision_config"]["image_size"] = 112
    for name in [name for name in raw[part] if name != "model_type"]:
        changed = copy.deepcopy(raw)
        del changed[part][name]
        changed["projection_dim"] = PaliGemmaConfig.from_hf(changed | {"projection_dim": None}).text_config.hidden_size
        assert_equal_configs(PaliGemmaConfig.from_hf(changed), reference_config(changed, tmp_path))


@pytest.mark.parametrize("family", ["gemma", "gemma2"])
def test_a_default_that_contradicts_the_weights_is_named(tmp_path, family):
    raw = raw_config(family, num_attention_heads=48)  # divisible by the default numbers of key heads
    model = fill(PaliGemmaForConditionalGeneration(PaliGemmaConfig.from_hf(raw)), 0)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    for name in ("num_attention_heads", "num_key_value_heads", "num_hidden_layers", "intermediate_size", "vocab_size"):
        changed = copy.deepcopy(raw)
        del changed["text_config"][name]
        write_json(tmp_path, "config.json", changed)
        default = DEFAULTS[family][name]
        says = f"text_config.{name} is absent from config.json, so the default {default} is used, and the weights have "
        with pytest.raises(CheckpointError) as caught:
            weights.load_model(tmp_path)
        assert says + str(raw["text_config"][name]) in caught.value.message and "\n" not in caught.value.message


def test_a_field_of_the_tower_that_contradicts_the_weights_is_named(tmp_path):
    raw = raw_config("gemma")
    model = fill(PaliGemmaForConditionalGeneration(PaliGemmaConfig.from_hf(raw)), 0)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    for name, wrong, right in (("num_hidden_layers", 3, 2), ("intermediate_size", 80, 72), ("image_size", 56, 28)):
        changed = copy.deepcopy(raw)
        changed["vision_config"][name] = wrong
        write_json(tmp_path, "config.json", changed)
        says = f"vision_config.{name} is {wrong} in config.json, and the weights have {right}"
        with pytest.raises(CheckpointError) as caught:
            weights.load_model(tmp_path)
        assert says in caught.value.message
