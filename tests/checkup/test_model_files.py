"""The checks of a model's files: a folder with a fault gets a failed line with what to do, and faults do not hide each other."""

import json
import math
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from paligemma.checkpoints import weights
from paligemma.checkpoints.adapters import save_adapter
from paligemma.checkpoints.weights import PATCHES, POSITIONS
from paligemma.checkup import model_files
from paligemma.checkup.model_files import checkpoint_rows, enlarged_from
from paligemma.checkup.rows import FAILED, NOTE, OK, run_check
from paligemma.files import BUNDLED
from paligemma.layers import lora
from paligemma.modeling_gemma import GemmaEmbedding
from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration
from tests.tiny_checkpoint import make_checkpoint

DOWN, NORM = "language_model.model.layers.1.mlp.down_proj.weight", "language_model.model.norm.weight"
EMBEDDING = "language_model.model.embed_tokens.weight"
PROJECTOR = "multi_modal_projector.linear.weight"
FILE = "model.safetensors"


@pytest.fixture
def model(tmp_path):
    return make_checkpoint(tmp_path / "model")


def rows_of(folder, is_full=False, base_model=None):
    return list(checkpoint_rows(folder, None, base_model, is_full, run_check))


def failed_rows(folder, **options):
    """The failed rows by name, all of which say what to do."""
    rows = [row for row in rows_of(folder, **options) if row.state == FAILED]
    assert all(row.advice and row.code for row in rows)
    return {row.name: row for row in rows}


def edit_json(file, **values):
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_tensors(folder, change):
    tensors = load_file(folder / FILE)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / FILE)


# Sound models


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_a_sound_model_has_no_failed_row(model, quantize):
    if quantize:
        weights.save_model(weights.load_model(model, quantize=quantize, quantize_vision=quantize == "int4"), model)
    rows = {row.name: row for row in rows_of(str(model))}
    assert {row.state for row in rows.values()} == {OK}
    assert list(rows) == [
        "name", "model", "weights", "names and shapes", "position table", "tokenizer", "pictures", "numbers",
        "factors on vectors", "norms of vectors",
    ]  # fmt: skip
    assert rows["model"].value.startswith("PaliGemma 1, 0.2 million parameters, 2 + 3 layers, width 40, 28 px")
    assert "<loc> 356 to 1379, <seg> 1380 to 1507, <image> 1508" in rows["tokenizer"].value
    assert rows["position table"].value == "4 rows for 2 x 2 patches"
    assert "picture 1, words 6.3" in rows["factors on vectors"].value
    assert (f"stored as {quantize}" in rows["names and shapes"].value) == bool(quantize)


def test_the_vectors_of_the_bundled_model_are_those_of_the_notes():
    rows = {row.name: row for row in rows_of(None)}
    assert rows["norms of vectors"].value.startswith("picture 58.3, words ")
    assert rows["norms of vectors"].state == OK and "random" not in rows["norms of vectors"].value
    assert rows["name"].value == "the bundled model"


def test_an_adapter_is_checked_with_its_base(model, tmp_path):
    network = weights.load_model(model)
    config = lora.LoraConfig(r=2, lora_alpha=4)
    lora.inject(network, config, lora.targets(network))
    save_adapter(lora.adapter_state(network), config, tmp_path / "adapter", str(model))
    rows = {row.name: row for row in rows_of(str(tmp_path / "adapter"))}
    assert {row.state for row in rows.values()} == {OK} and "changes" in rows["adapter"].value
    edit_json(tmp_path / "adapter" / "adapter_config.json", r=3)
    assert failed_rows(str(tmp_path / "adapter")).keys() == {"adapter"}
    edit_json(tmp_path / "adapter" / "adapter_config.json", r=2, base_model_name_or_path=None)
    assert "names no base model" in failed_rows(str(tmp_path / "adapter"))["settings"].value
    assert failed_rows(str(tmp_path / "adapter"), base_model=str(model)) == {}
    edit_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "nowhere"))
    (found,) = failed_rows(str(tmp_path / "adapter")).values()  # nothing is said about weights, which the base has
    assert "there is no folder" in found.value and "--base_model" in found.advice


def test_an_adapter_with_nan_is_found(model, tmp_path):
    network = weights.load_model(model)
    config = lora.LoraConfig(r=2, lora_alpha=4)
    lora.inject(network, config, lora.targets(network))
    state = lora.adapter_state(network)
    name = sorted(state)[0]
    state[name].view(-1)[3] = math.nan
    save_adapter(state, config, tmp_path / "adapter", str(model))
    (found,) = failed_rows(str(tmp_path / "adapter")).values()
    assert name.partition(".lora_")[0] in found.value and found.code == 4


# Faults


def put(name, make):
    """A fault: the tensor of that name is what `make` makes of it."""
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.update({name: make(tensors.get(name))}))


def write_index(file_name):
    """A fault: an index names one file, and the single file is gone."""

    def damage(folder):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": file_name}}))
        (folder / FILE).unlink()

    return damage


def swap_tokens(folder):
    """A fault: two <loc> tokens have each other's ids."""
    content = json.loads((folder / "tokenizer.json").read_text())
    tokens = {token["content"]: token for token in content["added_tokens"]}
    first, second = tokens["<loc0003>"], tokens["<loc0700>"]
    first["content"], second["content"] = second["content"], first["content"]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def cut_embedding(folder):
    """A fault: the embedding has fewer rows than the tokenizer has tokens."""
    edit_tensors(folder, lambda tensors: tensors.update({EMBEDDING: tensors[EMBEDDING][:1400].clone()}))
    config = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", text_config=config["text_config"] | {"vocab_size": 1400})


def add_layers(folder):
    """A fault: config.json is of a model with more layers."""
    config = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", text_config=config["text_config"] | {"num_hidden_layers": 9})


def split_by_expression(folder):
    """A fault: the tokenizer splits text as Llama's does."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "\\s+"}, "behavior": "Isolated", "invert": False}
    (folder / "tokenizer.json").write_text(json.dumps(content))


FAULTS = {  # what is done to the folder, the name of the failed row, words in it, words in its advice
    "no config.json": (lambda f: (f / "config.json").unlink(), "settings", "config.json is missing", "Download"),
    "config.json is not JSON": (lambda f: (f / "config.json").write_text("{"), "settings", "config.json:1:2", "download"),
    "config.json is a list": (lambda f: (f / "config.json").write_text("[]"), "settings", "a list", "download"),
    "negative layers": (
        lambda f: edit_json(f / "config.json", text_config={"model_type": "gemma", "num_hidden_layers": -3}),
        "model", "num_hidden_layers is -3", "Correct this file",
    ),
    "another kind of model": (lambda f: edit_json(f / "config.json", model_type="gemma"), "model", "gemma", "Give a PaliGemma"),
    "another number of layers": (
        add_layers,
        "names and shapes", "the weights have 3.", "same model",
    ),
    "no weights": (lambda f: (f / FILE).unlink(), "weights", "no weights", "Download"),
    "a cut file": (lambda f: os.truncate(f / FILE, 20_000), "weights", "cut off", "Download"),
    "an empty file": (lambda f: os.truncate(f / FILE, 0), "weights", "has 0 bytes", "Download"),
    "a web page": (lambda f: (f / FILE).write_text("<html>login"), "weights", "web page", "Download"),
    "a pickle": (lambda f: os.rename(f / FILE, f / "pytorch_model.bin"), "weights", "pytorch_model.bin", ""),
    "a shard is missing": (
        write_index("a.safetensors"),
        "weights", "lacks 1 of 1 files", "run it again",
    ),
    "an index leads out of the folder": (
        write_index("../a"),
        "weights", "'../a'", "bare file name",
    ),
    "a tensor is missing": (
        lambda f: edit_tensors(f, lambda t: t.pop(DOWN)), "names and shapes", f"1 missing: {DOWN}", "same model",
    ),
    "a foreign tensor": (
        put("other.weight", lambda _: torch.ones(2, 2)),
        "names and shapes", "1 unexpected: other.weight", "same model",
    ),
    "a wrong shape": (
        put(NORM, lambda _: torch.ones(41)), "names and shapes", "[41], not [40]", "same model",
    ),
    "a wrong dtype": (
        put(DOWN, lambda x: x.to(torch.int8)), "names and shapes", "dtype I8", "--quantize",
    ),
    "quantised by another program": (
        lambda f: edit_json(f / "config.json", quantization_config={"quant_method": "gptq"}),
        "names and shapes", "another program", "unquantised",
    ),
    "NaN": (lambda f: edit_tensors(f, lambda t: t[DOWN].view(-1)[7:8].fill_(math.nan)), "NaN or infinity", DOWN, "Download"),
    "infinity": (lambda f: edit_tensors(f, lambda t: t[NORM][-1:].fill_(-math.inf)), "NaN or infinity", NORM, "Download"),
    "zeros": (lambda f: edit_tensors(f, lambda t: t[DOWN].zero_()), "only zeros", DOWN, "Download"),
    "one value": (lambda f: edit_tensors(f, lambda t: t[DOWN].fill_(0.5)), "only one value", DOWN, "Download"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer", "neither tokenizer.json", "Download"),
    "tokenizer is not JSON": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer", "not JSON", "download"),
    "<loc> tokens in another order": (swap_tokens, "tokenizer", "<loc> tokens are not consecutive", "PaliGemma checkpoint"),
    "more tokens than rows": (cut_embedding, "tokenizer", "has 1509 tokens, but", "download both"),
    "a tokenizer of another model": (split_by_expression, "tokenizer", "Split by a regular expression", "PaliGemma checkpoint"),
    "other id of <image>": (
        lambda f: edit_json(f / "config.json", image_token_index=1400), "tokenizer", "<image> the id 1508", "download both",
    ),
    "other bos": (lambda f: edit_json(f / "config.json", bos_token_id=3), "tokenizer", "<bos> the id 2", "download both"),
    "other picture size": (
        lambda f: edit_json(f / "preprocessor_config.json", size={"height": 56, "width": 56}), "pictures", "28 x 28", "again",
    ),
    "no bicubic filter": (
        lambda f: edit_json(f / "preprocessor_config.json", resample=2), "pictures", "'resample': 2", "bicubic",
    ),
    "a resolution that the weights do not have": (
        put(POSITIONS, lambda _: torch.randn(16, 48)), "position table", "16 rows for 2 x 2", "56",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_a_failed_row_with_what_to_do(model, fault):
    damage, name, value, advice = FAULTS[fault]
    damage(model)
    found = failed_rows(str(model))
    assert name in found, found
    assert value in found[name].value and advice in found[name].advice, found[name]
    assert found[name].code == 4
    # What is wrong with a model is not a bug of this project.
    assert not any("--debug" in row.advice or "KeyError" in row.value for row in found.values()), found


def test_a_model_of_text_only_is_one_failed_row(model):
    """The checks that need a PaliGemma model are not made, and do not fail with exceptions of their own."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config["text_config"]))
    edit_tensors(model, lambda tensors: [tensors.pop(name) for name in list(tensors) if not name.startswith("language_model")])
    found = failed_rows(str(model))
    assert list(found) == ["model"] and "Give a PaliGemma model." in found["model"].advice


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_vectors_that_are_not_finite_are_not_called_a_fault_of_the_program(model, value):
    edit_tensors(model, lambda tensors: tensors[PROJECTOR].view(-1)[:1].fill_(value))
    assert {name: row.code for name, row in failed_rows(str(model)).items()} == {"NaN or infinity": 4, "norms of vectors": 4}


def test_several_faults_are_all_listed(model):
    (model / "tokenizer.json").write_text("{")
    edit_json(model / "preprocessor_config.json", resample=2)
    edit_tensors(model, lambda tensors: (tensors.pop(DOWN), tensors[NORM].fill_(math.nan), tensors[PATCHES].zero_()))
    assert failed_rows(str(model)).keys() == {"names and shapes", "NaN or infinity", "only zeros", "tokenizer", "pictures"}
    (model / "config.json").unlink()
    os.truncate(model / FILE, 50)
    assert failed_rows(str(model)).keys() == {"settings", "weights without settings"}


def test_a_fault_that_several_checks_meet_is_listed_once(model):
    os.truncate(model / FILE, 20_000)
    assert list(failed_rows(str(model))) == ["weights"]


def test_a_name_that_is_no_model(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in (tmp_path / "missing", tmp_path / "empty"):
        (row,) = failed_rows(str(name)).values()
        assert row.code == 4 and row.advice


def test_a_base_model_for_the_bundled_model_is_refused():
    (row,) = failed_rows(None, base_model="x").values()
    assert "base_model x is allowed only for an adapter" in row.value and row.code == 2


# What is read


def test_numbers_of_large_files_are_sampled_unless_all_are_asked_for(model, monkeypatch):
    monkeypatch.setattr(model_files, "SMALL_BYTES", 0)
    monkeypatch.setattr(model_files, "SAMPLE_BYTES", 64)
    assert "middle and end" in next(row.value for row in rows_of(str(model)) if row.name == "numbers")
    edit_tensors(model, lambda tensors: tensors[DOWN].view(-1)[200:201].fill_(math.nan))  # none of the three samples
    assert failed_rows(str(model)) == {}
    assert list(failed_rows(str(model), is_full=True)) == ["NaN or infinity"]
    for place in (0, -1, tensor_middle(model)):
        edit_tensors(model, lambda tensors, place=place: tensors[DOWN].fill_(1).view(-1)[[0, place]].fill_(1))
        edit_tensors(model, lambda tensors, place=place: tensors[DOWN].view(-1).__setitem__(place, math.inf))
        assert list(failed_rows(str(model))) == ["NaN or infinity"], place


def tensor_middle(folder):
    return load_file(folder / FILE)[DOWN].numel() // 2


# Position table and vectors


@pytest.mark.parametrize("aligned", [True, False])
def test_a_table_that_was_enlarged_is_recognised(aligned):
    small = torch.randn(1, 24, 8, 8, generator=torch.Generator().manual_seed(0))
    large = torch.nn.functional.interpolate(small, size=16, mode="bilinear", align_corners=aligned)
    table = large[0].flatten(1).T.contiguous()
    assert enlarged_from(table) == 8
    for dtype in (torch.bfloat16, torch.float16):  # in which most models are stored
        assert enlarged_from(table.to(dtype).float(), dtype) == 8
        assert enlarged_from(table.to(dtype).float() + 0.05 * table.std() * torch.randn_like(table), dtype) is None
    noise = torch.randn(256, 24, generator=torch.Generator().manual_seed(1))
    assert enlarged_from(table + 0.05 * table.std() * noise) is None and enlarged_from(noise) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_enlarged_table_of_a_model_is_a_note(model, dtype):
    def enlarge(tensors):
        small = torch.randn(1, 48, 2, 2)
        large = torch.nn.functional.interpolate(small, size=4, mode="bilinear", align_corners=True)
        tensors[POSITIONS] = large[0].flatten(1).T.contiguous().to(dtype)

    edit_tensors(model, enlarge)
    config = json.loads((model / "config.json").read_text())
    edit_json(model / "config.json", vision_config=config["vision_config"] | {"image_size": 56})
    edit_json(model / "preprocessor_config.json", size=None)
    rows = {row.name: row for row in rows_of(str(model))}
    assert rows["position table"].state == NOTE and "enlarged from 2 x 2" in rows["position table"].value


def test_the_pixel_settings_of_another_model_are_noted(model):
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # those of CLIP
    edit_json(model / "preprocessor_config.json", image_mean=mean, image_std=std)
    (row,) = [row for row in rows_of(str(model)) if row.state == NOTE]
    assert row.name == "numbers for pixels" and row.value.startswith("black is -1.8 and white is 2.1")
    assert "Copy preprocessor_config.json" in row.advice


@pytest.mark.parametrize("power", [-1, 1])
def test_a_factor_of_sqrt_d_in_the_weights_is_noted(model, power):
    def scale(tensors):
        for name in (PROJECTOR, PROJECTOR.replace("weight", "bias")):
            tensors[name] *= 40 ** (power / 2)

    edit_tensors(model, scale)
    row = next(row for row in rows_of(str(model)) if row.name == "norms of vectors")
    assert row.state == NOTE and f"scales {'picture' if power > 0 else 'word'} vectors" in row.advice


def test_random_weights_have_no_expected_ratio(model):
    edit_tensors(model, lambda tensors: tensors["vision_tower.vision_model.post_layernorm.weight"].fill_(1))
    edit_tensors(model, lambda tensors: tensors[PROJECTOR].mul_(100))
    row = next(row for row in rows_of(str(model)) if row.name == "norms of vectors")
    assert row.state == OK and "the weights are random" in row.value


@pytest.mark.parametrize("fault", ["picture divided", "picture multiplied", "words not scaled", "words scaled twice"])
def test_wrong_factors_in_the_code_are_found(model, monkeypatch, fault):
    plain_embed, plain_forward = PaliGemmaForConditionalGeneration.embed, GemmaEmbedding.forward
    if fault.startswith("picture"):
        factor = 40 ** (0.5 if fault.endswith("multiplied") else -0.5)
        monkeypatch.setattr(PaliGemmaForConditionalGeneration, "embed", lambda self, ids, x: plain_embed(self, ids, x * factor))
    else:
        power = -0.5 if "not" in fault else 0.5
        monkeypatch.setattr(GemmaEmbedding, "forward", lambda self, ids: plain_forward(self, ids) * 40**power)
    found = failed_rows(str(model))
    assert list(found) == ["factors on vectors"] and found["factors on vectors"].code == 1


def test_large_pictures_are_encoded_by_a_sample_of_patches(monkeypatch):
    monkeypatch.setattr(model_files, "MAX_PATCHES", 16)
    opened = model_files.Opened(BUNDLED)
    vectors = model_files.encode_sample(opened, model_files.load_front(opened))
    assert vectors.shape == (1, 16, 192)
