"""LoRA compared with peft: the same files, logits and gradients; and which adapters are refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from paligemma.checkpoints import adapters, weights
from paligemma.errors import CheckpointError, OutputError, UsageError
from paligemma.layers import lora
from paligemma.modeling_paligemma import suffix_loss
from paligemma.parameter_names import peft_name
from tests.tiny import FAMILIES, gap, in_double, make_batch, make_model, make_reference, reference_logits, widen

BATCH = make_batch([(1, 5, 3), (2, 3, 2)], "right")
LABELS = torch.where(BATCH["token_type_ids"] * BATCH["attention_mask"] == 1, BATCH["input_ids"], -100)
CONFIG = lora.LoraConfig(r=3, lora_alpha=12)


def give_numbers(model):
    """Sets every B to random values: it starts at zero, which would hide all mistakes."""
    draw = torch.Generator().manual_seed(7)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=draw) * 0.1


def save_base(folder, family="gemma", dtype=torch.float32):
    model = make_model(family, dtype=dtype)
    weights.save_model(model, folder)
    return model


def peft_adapter(folder, base, model, **options):
    """Makes and saves an adapter with peft, for a transformers model with our weights; returns the adapted model."""
    options = {"target_modules": r".*language_model.*\.(q_proj|k_proj|o_proj|up_proj|down_proj)"} | options
    theirs = get_peft_model(make_reference(model), PeftConfig(**{"r": 3, "lora_alpha": 12} | options)).eval()
    give_numbers(theirs)
    theirs.save_pretrained(folder)
    raw = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(raw, default=list))
    return theirs


def our_adapter(folder, base, model, names=None):
    lora.inject(model, CONFIG, names or lora.targets(model))
    give_numbers(model)
    adapters.save_adapter(lora.adapter_state(model), CONFIG, folder, str(base))
    return model


# Against peft


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_of_peft_is_loaded_and_merged(family, tmp_path):
    model = save_base(tmp_path / "base", family)
    theirs = peft_adapter(tmp_path / "adapter", tmp_path / "base", model)
    ours = weights.load_model(tmp_path / "adapter")
    # One model is merged, the other adds B A x: their sums differ. 5.7e-5 is the largest gap over 6 seeds, in logits of 20.
    assert gap(ours(**BATCH), reference_logits(theirs, BATCH), BATCH) < 2e-4
    assert gap(model(**BATCH), reference_logits(theirs, BATCH), BATCH) > 1  # the adapter changes the logits


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
    # Both add B A x to W x; attention sums in another order. 3.1e-5 is the largest gap over 6 seeds.
    assert gap(model.eval()(**BATCH), reference_logits(theirs, BATCH), BATCH) < 2e-4


PATTERNS = {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {r"layers\.1\.mlp.up_proj": 40}}


@pytest.mark.parametrize("options", [{"use_rslora": True}, PATTERNS])
def test_scaling_and_patterns_are_read_as_peft_reads_them(options, tmp_path):
    model = save_base(tmp_path / "base")
    theirs = peft_adapter(tmp_path / "adapter", tmp_path / "base", model, **options)
    assert gap(weights.load_model(tmp_path / "adapter")(**BATCH), reference_logits(theirs, BATCH), BATCH) < 2e-4


def test_gradients_equal_those_of_peft(tmp_path):
    """Both sides compute in float64, so the order of sums, and with it the processor, does not matter."""
    model = our_adapter(tmp_path / "adapter", tmp_path / "base", make_model("gemma")).double()
    theirs = PeftModel.from_pretrained(make_reference(make_model("gemma")), tmp_path / "adapter", is_trainable=True).eval()
    theirs = widen(theirs)
    positions = BATCH["attention_mask"].cumsum(-1) * BATCH["attention_mask"]
    with in_double():
        suffix_loss(model(**BATCH), LABELS, "token").backward()
        suffix_loss(theirs(**BATCH, position_ids=positions).logits, LABELS, "token").backward()
    expected = {name.replace(".default", ""): p.grad for name, p in theirs.named_parameters() if "lora_" in name}
    found = {
        f"base_model.model.{peft_name(name)}.{matrix}.weight": getattr(layer, matrix).weight.grad
        for name, layer in lora.adapted(model)
        for matrix in ("lora_A", "lora_B")
    }
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-9)


# Without peft


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
    assert gap(model(**BATCH), beside, BATCH) < 1e-4  # 6.4e-6 measured
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
    with pytest.raises(ValueError, match="'tower' is not a part"):
        lora.targets(model, ("tower",))


def test_the_revision_of_the_base_is_kept(tmp_path):
    model = save_base(tmp_path / "base", "gemma")
    lora.inject(model, CONFIG, lora.targets(model))
    adapters.save_adapter(lora.adapter_state(model), CONFIG, tmp_path / "adapter", "google/base", "bfloat16")
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
    assert hit == {peft_name(name) for name in names}


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
        ({"bias": "all"}, "it asks for bias 'all'"),
        ({"r": 0}, "the rank r is 0"),
        ({"r": "8"}, "the rank r is '8'"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"r": 4}, r"down_proj are \[3, 56\] and \[40, 3\]; \[4, 56\] and \[40, 4\] are needed"),
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
EMBEDDING = "base_model.model.model.language_model.embed_tokens"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(f"{FIRST}.lora_B.weight"), r"q_proj are \[3, 40\] and missing"),
        (lambda t: t.update({f"{FIRST}.lora_A.weight": torch.zeros(3, 41)}), r"\[3, 41\]"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(2, 2)}), "supported. Train the adapter without"),
        (lambda t: t.update({f"{EMBEDDING}.weight": torch.zeros(9, 40)}), "holds .*embed_tokens.weight.*or merge the adapter"),
        (lambda t: t.update({f"{EMBEDDING}.lora_embedding_A": torch.zeros(3, 9)}), "holds .*lora_embedding_A, .*supported"),
        (lambda t: t.update({f"{FIRST}.x": torch.zeros(2, 2)}), "neither an A nor a B"),
        (lambda t: t.update({f"{FIRST[:-7]}.x_proj.lora_A.weight": torch.zeros(3, 40)}), "does not have"),
        (lambda t: t.update({f"{FIRST}.lora_A.weight": torch.full((3, 40), torch.nan)}), "NaN"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, change, says):
    altered_tensors(folder, change)
    with pytest.raises(CheckpointError, match=says) as caught:
        weights.load_model(folder)
    assert "\n" not in caught.value.message


def test_a_sum_that_is_too_large_for_the_dtype_is_named(folder):
    names = [f"{FIRST}.lora_{matrix}.weight" for matrix in "AB"]
    altered_tensors(folder, lambda t: t.update({name: torch.full_like(t[name], 200) for name in names}))
    assert weights.load_model(folder, dtype="fp32")
    with pytest.raises(CheckpointError, match="layers.0.self_attn.q_proj after merging the adapter holds NaN or .* float16"):
        weights.load_model(folder, dtype="fp16")
    assert weights.load_model(folder, dtype="fp16", allow_nonfinite=True)


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
    with pytest.raises(CheckpointError, match="stored as int8.*unquantised checkpoint"):
        weights.load_model(folder)


def test_an_adapter_answers_on_the_command_line(tmp_path):
    from paligemma import inference

    base = Path(__file__).resolve().parents[2] / "paligemma" / "bundled"
    model = weights.load_model(base)
    lora.inject(model, CONFIG, lora.targets(model))
    adapters.save_adapter(lora.adapter_state(model), CONFIG, tmp_path, str(base))
    given = [f"--model_path={tmp_path}", "--prompt=caption en", f"--image_file_path={base.parent.parent / 'examples/shapes.png'}"]
    assert inference.commandline.run(inference.Flags, inference.program, given) == 0


# What other programs write into adapter_config.json


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "mica"])
def test_ways_to_begin_that_keep_the_base_are_merged_as_peft_merges_them(start, tmp_path):
    model = save_base(tmp_path / "base")
    theirs = peft_adapter(tmp_path / "adapter", tmp_path / "base", model, init_lora_weights=start, r=4)
    loaded = PeftModel.from_pretrained(make_reference(model), tmp_path / "adapter").merge_and_unload().state_dict()
    ours = weights.load_model(tmp_path / "adapter").state_dict()
    name = "layers.1.self_attn.o_proj.weight"
    assert torch.equal(ours[f"language_model.model.{name}"], loaded[f"model.language_model.{name}"])
    assert gap(weights.load_model(tmp_path / "adapter")(**BATCH), reference_logits(theirs, BATCH), BATCH) < 2e-4


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_adapters_that_took_a_part_out_of_the_base_are_refused(start, tmp_path):
    model = save_base(tmp_path / "base")
    peft_adapter(tmp_path / "adapter", tmp_path / "base", model, init_lora_weights=start)
    with pytest.raises(CheckpointError, match=f"init_lora_weights is '{start}'.*path_initial_model_for_weight_conversion"):
        weights.load_model(tmp_path / "adapter")


def test_a_pissa_adapter_that_peft_converted_is_merged_as_peft_merges_it(tmp_path):
    model = save_base(tmp_path / "base")
    options = {"target_modules": ["q_proj"], "init_lora_weights": "pissa", "use_rslora": False}
    theirs = get_peft_model(make_reference(model), PeftConfig(r=3, lora_alpha=12, **options)).eval()
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    give_numbers(theirs)
    theirs.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    alter(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 6
    # The part that was subtracted and added again is rounded twice.
    assert gap(weights.load_model(tmp_path / "adapter")(**BATCH), reference_logits(theirs, BATCH), BATCH) < 1e-3


def test_every_field_of_peft_is_known_to_be_harmless_or_is_refused_by_its_name(folder):
    raw = json.loads((folder / "adapter_config.json").read_text())
    assert len(raw) > 40  # all fields of this version of PEFT
    for key, value in raw.items():
        asks = {"made_up": 1} if isinstance(value, dict) else True if isinstance(value, bool) or value is None else ["x"]
        if key in lora.ACCEPTED_KEYS or key == "init_lora_weights":
            continue
        with pytest.raises(ValueError, match=f"it asks for {key} "):
            lora.LoraConfig.from_peft(raw | {key: asks})
    with pytest.raises(ValueError, match="it asks for invented_next_year 0.5"):
        lora.LoraConfig.from_peft(raw | {"invented_next_year": 0.5})
    assert lora.LoraConfig.from_peft(raw | {"invented_next_year": None}).r == 3


@pytest.mark.parametrize(
    "fields",
    [
        {"fan_in_fan_out": True},
        {"layers_to_transform": [0], "layers_pattern": "layers"},
        {"exclude_modules": ["v_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": "(([a-z_.0-9]+)+)+!"},
        {"eva_config": {"rho": 2.0}, "init_lora_weights": "eva"},
        {"auto_mapping": {"base_model_class": "PaliGemmaForConditionalGeneration"}},
    ],
)
def test_fields_that_change_nothing_of_a_finished_adapter_are_passed_over(folder, fields):
    before = weights.load_model(folder).state_dict()
    alter(folder, **fields)
    after = weights.load_model(folder).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_numbers_that_a_file_leaves_out_are_those_of_peft():
    config = lora.LoraConfig.from_peft({"peft_type": "LORA"})
    theirs = PeftConfig()
    assert (config.r, config.lora_alpha, config.use_rslora) == (theirs.r, theirs.lora_alpha, theirs.use_rslora)


@pytest.mark.parametrize(
    "key",
    [
        "q_proj",
        "layers.1.self_attn.q_proj",
        "language_model.model.layers.1.self_attn.q_proj",  # transformers up to 4.51
        "model.language_model.layers.1.self_attn.q_proj",  # later versions
        "^language_model.model.layers.1.self_attn.q_proj",
        "base_model.model.language_model.model.layers.1.self_attn.q_proj",
        r"base_model\.model\.model\.language_model\.layers\.1\.self_attn\.q_proj",
        r"^model\.language_model\.layers\.\d+\.self_attn\.(q|k)_proj$",
        r".*language_model.*\.layers\.[01]\..*q_proj",
        "q.proj",  # a dot matches any character, as in PEFT
    ],
)
def test_keys_of_patterns_are_understood_in_every_spelling_of_names(key):
    config = lora.LoraConfig(r=2, lora_alpha=4, alpha_pattern={"nothing": 6, key: 10, ".*": 4})
    assert config.scaling("language_model.model.layers.1.self_attn.q_proj") == 5
    assert config.scaling("language_model.model.layers.1.self_attn.v_proj") == 2
    assert config.unused_keys(["language_model.model.layers.1.self_attn.q_proj"]) == ["nothing"]


def test_keys_that_mean_the_whole_name_do_not_fit_its_end():
    name = "vision_tower.vision_model.encoder.layers.1.mlp.fc1"
    assert not lora.fits("^layers.1.mlp.fc1", name) and lora.fits("layers.1.mlp.fc1", name)
    assert not lora.fits("ayers.1.mlp.fc1", name)


def test_patterns_in_the_spelling_of_older_transformers_give_the_scaling_they_were_trained_with(tmp_path):
    model = save_base(tmp_path / "base")
    now = {"model.language_model.layers.1.mlp.up_proj": 40}
    theirs = peft_adapter(tmp_path / "adapter", tmp_path / "base", model, alpha_pattern=now)
    alter(tmp_path / "adapter", alpha_pattern={"language_model.model.layers.1.mlp.up_proj": 40})
    assert gap(weights.load_model(tmp_path / "adapter")(**BATCH), reference_logits(theirs, BATCH), BATCH) < 2e-4


def test_a_pattern_that_means_nothing_is_named(folder, caplog):
    alter(folder, alpha_pattern={"layers.77.q_proj": 2})
    weights.load_model(folder)
    assert "layers.77.q_proj match none of the modules" in caplog.text


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"lora_alpha": True}, "lora_alpha is True"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"r": 10**400}, "the rank r is 1000"),
        ({"alpha_pattern": {"q_proj": 1e300}}, "lora_alpha is 1e"),
        ({"rank_pattern": [1]}, r"rank_pattern is \[1\]"),
        ({"rank_pattern": "q_proj"}, "rank_pattern is 'q_proj'"),
        ({"rank_pattern": {"q_proj": [3]}}, r"the rank r is \[3\]"),
        ({"rank_pattern": {"(": 3}}, r"the pattern '\(' is not usable: a bracket is not closed"),
        ({"rank_pattern": {"a)|(b": 3}}, "closes a bracket that was not opened"),
        ({"alpha_pattern": {"(": 3}}, "a bracket is not closed"),
        ({"alpha_pattern": {f"x{i}": 3 for i in range(3000)}}, "3000 keys"),
        ({"alpha_pattern": {f"x{i}*": 3 for i in range(100)}}, "100 of them expressions"),
        ({"lora_dropout": "no"}, "lora_dropout is 'no'"),
        ({"use_rslora": "no"}, "use_rslora is 'no'"),
        ({"init_lora_weights": [1]}, "init_lora_weights is"),
        ({"peft_type": ["LORA"]}, "peft_type is"),
        ({"base_model_name_or_path": {"a": 1}}, "names no base model"),
        ({"base_model_name_or_path": "~nosuchuser/x"}, "no folder ~nosuchuser/x"),
        ({"base_model_name_or_path": "x" * 300}, "too long"),
        ({"base_model_name_or_path": "a\0b"}, "cannot be opened"),
    ],
)
def test_values_of_any_type_and_size_are_one_line(folder, fields, says):
    alter(folder, **fields)
    with pytest.raises(CheckpointError, match=says) as caught:
        weights.load_model(folder)
    assert caught.value.message.isprintable()


def test_a_pattern_that_keeps_re_busy_for_years_is_matched_at_once(folder):
    alter(folder, alpha_pattern={"(([a-z_.0-9]+)+)+!": 2})
    weights.load_model(folder)


def test_a_tensor_that_is_there_in_two_spellings_or_as_integers_is_refused(folder):
    old = FIRST.replace("model.language_model", "language_model.model") + ".lora_A.weight"
    altered_tensors(folder, lambda t: t.update({old: t[f"{FIRST}.lora_A.weight"].clone()}))
    weights.load_model(folder)  # the same tensor twice
    altered_tensors(folder, lambda t: t.update({old: t[f"{FIRST}.lora_A.weight"] + 1}))
    with pytest.raises(CheckpointError, match="the same parameter with different values"):
        weights.load_model(folder)
    altered_tensors(folder, lambda t: t.update({old: t[old].to(torch.int8)}))
    with pytest.raises(CheckpointError, match="has dtype I8; floats are needed"):
        weights.load_model(folder)


# Where the base is


def test_a_base_on_another_machine_is_named_with_the_way_out(folder, tmp_path):
    before = weights.load_model(folder).state_dict()
    alter(folder, base_model_name_or_path="/elsewhere/base")
    with pytest.raises(CheckpointError, match="adapter_config.json names the base model '/elsewhere/base', but.*--base_model"):
        weights.load_model(folder)
    after = weights.load_model(folder, base_model=tmp_path / "base").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(UsageError, match="is allowed only for an adapter"):
        weights.load_model(tmp_path / "base", base_model=folder)


def test_an_adapter_beside_its_base_is_merged_as_transformers_does(folder, tmp_path):
    import transformers

    expected = weights.load_model(folder).state_dict()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(folder / name, tmp_path / "base" / name)
    alter(tmp_path / "base", base_model_name_or_path="/elsewhere/base")  # the weights in the same folder are the base's
    ours = weights.load_model(tmp_path / "base").state_dict()
    assert all(torch.equal(expected[name], ours[name]) for name in expected)
    theirs = transformers.PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "base", attn_implementation="eager").eval()
    assert gap(weights.load_model(tmp_path / "base")(**BATCH), reference_logits(theirs, BATCH), BATCH) < 2e-4
    (tmp_path / "base" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="a whole model and an adapter_config.json, but no"):
        weights.load_model(tmp_path / "base")


def test_an_adapter_as_a_pickle_is_named(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="only as adapter_model.bin. Unpickling.*PeftModel"):
        weights.load_model(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match="only as adapter_model.bin. Unpickling.*PeftModel"):
        weights.load_model(folder)


def test_a_model_is_not_saved_beside_an_adapter_nor_an_adapter_beside_a_model(folder, tmp_path):
    model = weights.load_model(folder)
    with pytest.raises(OutputError, match="holds an adapter"):
        weights.save_model(model, folder)
    with pytest.raises(OutputError, match="holds a whole model"):
        adapters.save_adapter({}, CONFIG, tmp_path / "base", None)


def test_a_float16_model_is_refused():
    model = make_model("gemma", dtype=torch.float16)
    with pytest.raises(ValueError, match="bfloat16 or float32"):
        lora.inject(model, CONFIG, lora.targets(model))
    assert all(parameter.requires_grad for parameter in model.parameters())
