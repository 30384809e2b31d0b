"""LoRA against peft: the same file, the same logits, the same gradients; and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import lora
import weights
from errors import CheckpointError
from modeling_paligemma import suffix_loss
from tiny import FAMILIES, gap, in_double, make_batch, make_model, make_reference, reference_logits, widen

BATCH = make_batch([(1, 5, 3), (2, 3, 2)], "right")
LABELS = torch.where(BATCH["token_type_ids"] * BATCH["attention_mask"] == 1, BATCH["input_ids"], -100)
CONFIG = lora.LoraConfig(r=3, lora_alpha=12)


def give_numbers(model):
    """Random values for every B, which is zero at first and would hide all mistakes."""
    draw = torch.Generator().manual_seed(7)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=draw) * 0.1


def save_base(folder, family="gemma", dtype=torch.float32):
    model = make_model(family, dtype=dtype)
    weights.save_model(model, folder)
    return model


def peft_adapter(folder, base, model, **options):
    """An adapter that peft made and wrote for transformers' copy of our model; returns the model that it adapted."""
    options = {"target_modules": r".*language_model.*\.(q_proj|k_proj|o_proj|up_proj|down_proj)"} | options
    theirs = get_peft_model(make_reference(model), PeftConfig(r=3, lora_alpha=12, **options)).eval()
    give_numbers(theirs)
    theirs.save_pretrained(folder)
    raw = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(raw, default=list))
    return theirs


def our_adapter(folder, base, model, names=None):
    lora.inject(model, CONFIG, names or lora.targets(model))
    give_numbers(model)
    weights.save_adapter(lora.adapter_state(model), CONFIG, folder, str(base))
    return model


# Against peft


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_of_peft_is_loaded_and_merged(family, tmp_path):
    model = save_base(tmp_path / "base", family)
    theirs = peft_adapter(tmp_path / "adapter", tmp_path / "base", model)
    ours = weights.load_model(tmp_path / "adapter")
    # Merged against beside the matrix: the sums are other ones. 5.7e-5 is the largest gap over 6 seeds, in logits of 20.
    assert gap(ours(**BATCH), reference_logits(theirs, BATCH), BATCH) < 2e-4
    assert gap(model(**BATCH), reference_logits(theirs, BATCH), BATCH) > 1  # the adapter does something


def test_merged_matrices_are_those_of_peft_to_the_last_bit(tmp_path):
    model = save_base(tmp_path / "base", dtype=torch.bfloat16)
    theirs = peft_adapter(tmp_path / "adapter", tmp_path / "base", model).merge_and_unload().state_dict()
    ours = weights.load_model(tmp_path / "adapter").state_dict()
    for layer in range(2):
        for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"):
            mine = ours[f"language_model.model.layers.{layer}.{name}.weight"]
            assert mine.dtype == torch.bfloat16
            assert torch.equal(mine, theirs[f"model.language_model.layers.{layer}.{name}.weight"]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_our_adapter_is_loaded_by_peft(family, tmp_path):
    model = our_adapter(tmp_path / "adapter", tmp_path / "base", make_model(family))
    theirs = PeftModel.from_pretrained(make_reference(make_model(family)), tmp_path / "adapter").eval()
    # Both keep A and B beside the matrix; attention sums in another order. 3.1e-5 is the largest gap over 6 seeds.
    assert gap(model.eval()(**BATCH), reference_logits(theirs, BATCH), BATCH) < 2e-4


PATTERNS = {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {r"layers\.1\.mlp.up_proj": 40}}


@pytest.mark.parametrize("options", [{"use_rslora": True}, PATTERNS])
def test_scaling_and_patterns_are_read_as_peft_reads_them(options, tmp_path):
    model = save_base(tmp_path / "base")
    theirs = peft_adapter(tmp_path / "adapter", tmp_path / "base", model, **options)
    assert gap(weights.load_model(tmp_path / "adapter")(**BATCH), reference_logits(theirs, BATCH), BATCH) < 2e-4


def test_gradients_equal_those_of_peft(tmp_path):
    """In float64 on both sides, where the order of sums, and with it the processor, is no matter."""
    model = our_adapter(tmp_path / "adapter", tmp_path / "base", make_model("gemma")).double()
    theirs = PeftModel.from_pretrained(make_reference(make_model("gemma")), tmp_path / "adapter", is_trainable=True).eval()
    theirs = widen(theirs)
    positions = BATCH["attention_mask"].cumsum(-1) * BATCH["attention_mask"]
    with in_double():
        suffix_loss(model(**BATCH), LABELS, "token").backward()
        suffix_loss(theirs(**BATCH, position_ids=positions).logits, LABELS, "token").backward()
    expected = {name.replace(".default", ""): p.grad for name, p in theirs.named_parameters() if "lora_" in name}
    found = {
        f"base_model.model.{lora.their_name(name)}.{matrix}.weight": getattr(layer, matrix).weight.grad
        for name, layer in lora.adapted(model)
        for matrix in ("lora_A", "lora_B")
    }
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-9)


# By itself


def test_a_new_adapter_changes_nothing():
    model = make_model("gemma")
    before = model(**BATCH)
    lora.inject(model, CONFIG, lora.targets(model))
    assert torch.equal(model(**BATCH), before)  # B is zero, and x + 0 is x


def test_merging_leaves_a_plain_model_that_says_the_same(tmp_path):
    model = our_adapter(tmp_path, None, make_model("gemma"))
    beside = model(**BATCH)
    lora.merge(model)
    assert {type(module) for module in model.modules()} == {type(module) for module in make_model("gemma").modules()}
    assert model.state_dict().keys() == make_model("gemma").state_dict().keys()
    assert gap(model(**BATCH), beside, BATCH) < 1e-4  # 6.4e-6 seen
    with pytest.raises(ValueError, match="no adapter"):
        lora.merge(model)


def test_the_language_model_is_the_default_and_the_tower_only_on_request():
    model = make_model("gemma")
    assert all(name.startswith("language_model.") for name in lora.targets(model))
    assert lora.targets(model, ("vision",), ("q_proj",)) == [
        f"vision_tower.vision_model.encoder.layers.{layer}.self_attn.q_proj" for layer in range(2)
    ]
    with pytest.raises(ValueError, match="q_prj names no matrix of language"):
        lora.targets(model, ("language",), ("q_prj",))
    with pytest.raises(ValueError, match="'tower' is no part"):
        lora.targets(model, ("tower",))


def test_the_revision_of_the_base_is_kept(tmp_path):
    model = save_base(tmp_path / "base", "gemma")
    lora.inject(model, CONFIG, lora.targets(model))
    weights.save_adapter(lora.adapter_state(model), CONFIG, tmp_path / "adapter", "google/base", "bfloat16")
    raw = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (raw["base_model_name_or_path"], raw["revision"]) == ("google/base", "bfloat16")
    assert PeftConfig.from_pretrained(tmp_path / "adapter").revision == "bfloat16"


@pytest.mark.parametrize("parts", [("language",), ("vision",), ("language", "vision")])
def test_target_modules_mean_the_same_modules_to_peft(parts):
    model = make_model("gemma")
    names = lora.targets(model, parts, ("q_proj", "v_proj"))
    written = CONFIG.to_peft(None, names)["target_modules"]
    theirs = get_peft_model(make_reference(model), PeftConfig(r=3, target_modules=written))
    hit = {name.removeprefix("base_model.model.") for name, module in theirs.named_modules() if hasattr(module, "lora_A")}
    assert hit == {lora.their_name(name) for name in names}


def test_only_a_and_b_are_trained():
    model = make_model("gemma")
    lora.inject(model, CONFIG, lora.targets(model))
    trained = {name.split(".")[-2] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"lora_A", "lora_B"}


def test_dropout_acts_on_the_adapter_alone_and_only_while_training():
    layer = lora.LoRALinear(torch.nn.Linear(64, 8), rank=4, scaling=1.0, dropout=0.5)
    layer.lora_B.weight.data.normal_()
    x = torch.randn(3, 64)
    assert not torch.equal(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_an_adapter_is_merged_before_it_is_quantised(tmp_path):
    model = save_base(tmp_path / "base", dtype=torch.bfloat16)
    peft_adapter(tmp_path / "adapter", tmp_path / "base", model)
    weights.save_model(weights.load_model(tmp_path / "adapter"), tmp_path / "merged")
    ours = weights.load_model(tmp_path / "adapter", quantize="int8").state_dict()
    expected = weights.load_model(tmp_path / "merged", quantize="int8").state_dict()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_the_files_of_the_base_stay_as_they_are(tmp_path):
    model = save_base(tmp_path / "base")
    peft_adapter(tmp_path / "adapter", tmp_path / "base", model)
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    weights.load_model(tmp_path / "adapter")
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == before


# What is refused


@pytest.fixture
def folder(tmp_path):
    """An adapter that loads."""
    model = save_base(tmp_path / "base")
    peft_adapter(tmp_path / "adapter", tmp_path / "base", model)
    weights.load_model(tmp_path / "adapter")
    return tmp_path / "adapter"


def alter(folder, **fields):
    raw = json.loads((folder / "adapter_config.json").read_text()) | fields
    (folder / "adapter_config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; LORA is needed"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "'bias': 'all'"),
        ({"r": 0}, "the rank r is 0"),
        ({"r": "8"}, "the rank r is '8'"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"r": 4}, r"down_proj are \[3, 56\] and \[40, 3\]; \[4, 56\] and \[40, 4\] fit"),
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"base_model_name_or_path": "no/such/folder"}, "there is no folder no/such/folder"),
    ],
)
def test_a_config_that_asks_for_something_else_is_refused(folder, fields, says):
    alter(folder, **fields)
    with pytest.raises(CheckpointError, match=says) as caught:
        weights.load_model(folder)
    assert "\n" not in caught.value.message


def test_an_adapter_of_an_adapter_is_refused(folder):
    alter(folder, base_model_name_or_path=str(folder))
    with pytest.raises(CheckpointError, match="an adapter itself"):
        weights.load_model(folder)


def altered_tensors(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


FIRST = "base_model.model.model.language_model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(f"{FIRST}.lora_B.weight"), r"q_proj are \[3, 40\] and missing"),
        (lambda t: t.update({f"{FIRST}.lora_A.weight": torch.zeros(3, 41)}), r"\[3, 41\]"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(2, 2)}), "neither an A nor a B"),
        (lambda t: t.update({f"{FIRST[:-7]}.x_proj.lora_A.weight": torch.zeros(3, 40)}), "does not have"),
        (lambda t: t.update({f"{FIRST}.lora_A.weight": torch.full((3, 40), torch.nan)}), "NaN"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, change, says):
    altered_tensors(folder, change)
    with pytest.raises(CheckpointError, match=says) as caught:
        weights.load_model(folder)
    assert "\n" not in caught.value.message


def test_a_missing_or_damaged_file_is_named(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="adapter_model.safetensors"):
        weights.load_model(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match="adapter_model.safetensors is missing"):
        weights.load_model(folder)


def test_an_adapter_is_not_merged_into_integers(folder, tmp_path):
    weights.save_model(weights.load_model(tmp_path / "base", quantize="int8"), tmp_path / "int8")
    alter(folder, base_model_name_or_path=str(tmp_path / "int8"))
    with pytest.raises(CheckpointError, match="stored as int8.*plain checkpoint"):
        weights.load_model(folder)


def test_an_adapter_answers_on_the_command_line(tmp_path):
    import inference

    base = Path(__file__).resolve().parent.parent / "demo" / "checkpoint"
    model = weights.load_model(base)
    lora.inject(model, CONFIG, lora.targets(model))
    weights.save_adapter(lora.adapter_state(model), CONFIG, tmp_path, str(base))
    given = [f"--model_path={tmp_path}", "--prompt=caption en", f"--image_file_path={base.parent.parent / 'examples/shapes.png'}"]
    assert inference.commandline.run(inference.Flags, inference.program, given) == 0
