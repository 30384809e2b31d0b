"""float16 with float32 between the products: right where plain float16 overflows, and no further off than the rounding allows."""

import copy
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import paligemma
from paligemma import explanation, files
from paligemma.checkpoints import weights
from paligemma.generation import generate
from paligemma.gpu import cuda_decoding
from paligemma.layers import float16, kernels, quantization
from paligemma.modeling_gemma import GemmaRMSNorm
from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration
from paligemma.pictures.images import load_image
from tests.bounds import Float16Roundings, assert_within, exact_arithmetic, product_bound
from tests.tiny import FAMILIES, draw, make_batch, make_model

ROOT = Path(__file__).resolve().parent.parent.parent
ROWS = [(1, 4, 3), (1, 2, 2), (0, 3, 1)]


# Models that overflow: some of their weights are multiplied by powers of two


def scale(power: int, *tensors: Tensor) -> None:
    for tensor in tensors:
        tensor.mul_(2.0**power)


def scale_norm(power: int, norm: torch.nn.Module) -> None:
    norm.weight.add_(1).mul_(2.0**power).sub_(1)


def enlarge_token_vectors(model):
    """One dimension is large; times sqrt(D) it is above 65504 for some tokens. The last norm makes the logits small again."""
    decoder = model.language_model.model
    scale(14, decoder.embed_tokens.weight[:, 7])
    decoder.norm.weight[7] = 2.0**-8 - 1


def enlarge_residual_stream(model):
    """Every addend fits, but their sum does not (Gemma 1), or every addend is above 65504 (Gemma 2, after the norm)."""
    for layer in model.language_model.model.layers:
        if layer.is_gemma2:
            scale_norm(13, layer.post_attention_layernorm)
            scale_norm(13, layer.post_feedforward_layernorm)
        else:
            scale(12, layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight)


def enlarge_gated_values(model):
    """gate and up reach hundreds, so their product is above 65504; down_proj makes it small again."""
    for layer in model.language_model.model.layers:
        scale_norm(8, layer.pre_feedforward_layernorm if layer.is_gemma2 else layer.post_attention_layernorm)
        scale(-12, layer.mlp.down_proj.weight)


def enlarge_outputs_of_layers(model):
    """o_proj and down_proj give numbers above 65504; in Gemma 2 a norm follows."""
    for layer in model.language_model.model.layers:
        scale(13, layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight)
        scale(4, layer.self_attn.v_proj.weight, layer.mlp.up_proj.weight)


def enlarge_scores(model):
    """q k^T is above 65504; the scale, which is smaller than usual, makes the scores small again."""
    for layer in model.language_model.model.layers:
        scale(7, layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight)
        layer.self_attn.scale *= 2.0**-14


def enlarge_logits(model):
    scale(7, model.language_model.model.embed_tokens.weight)
    scale_norm(7, model.language_model.model.norm)


def enlarge_picture_vectors(model):
    linear = model.multi_modal_projector.linear
    scale(13, linear.weight, linear.bias)
    scale(3, model.vision_tower.vision_model.post_layernorm.weight, model.vision_tower.vision_model.post_layernorm.bias)


def enlarge_stream_of_tower(model):
    tower = model.vision_tower.vision_model
    for layer in tower.encoder.layers:
        for linear in (layer.self_attn.out_proj, layer.mlp.fc2):
            scale(11, linear.weight, linear.bias)
        scale(5, layer.self_attn.v_proj.weight, layer.mlp.fc1.weight)


PLACES = [
    enlarge_token_vectors, enlarge_residual_stream, enlarge_gated_values, enlarge_outputs_of_layers, enlarge_scores,
    enlarge_logits, enlarge_picture_vectors, enlarge_stream_of_tower,
]  # fmt: skip


@torch.no_grad()
def enlarged(place, family: str) -> PaliGemmaForConditionalGeneration:
    """A plain float16 model that overflows at this place. It has no final cap, which would hide the size of the logits."""
    model = make_model(family, dtype=torch.float64, final_softcap=None)
    place(model)
    return model.half()


def protected(model: PaliGemmaForConditionalGeneration) -> PaliGemmaForConditionalGeneration:
    model = copy.deepcopy(model)
    float16.protect(model)
    return model


def exact_logits(model, batch: dict, **options) -> tuple[Tensor, Float16Roundings]:
    """The logits of a plain model in float64, and where float16 rounds on the way to them."""
    with patch.object(Tensor, "float", Tensor.double), Float16Roundings(**options) as roundings:
        return copy.deepcopy(model).double()(**batch), roundings


def chosen(logits: Tensor, batch: dict) -> list[tuple[int, int, int]]:
    """Positions in the logits: for the first and the last token of each row, the likeliest token and two others."""
    found = []
    for row, is_token in enumerate(batch["attention_mask"]):
        for position in (int(is_token.nonzero()[0]), int(is_token.nonzero()[-1])):
            found += [(row, position, token) for token in (int(logits[row, position].argmax()), 5, 77)]
    return found


def attention_of_apple(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """torch's attention on Apple GPUs: q k^T has the dtype of q, and is multiplied by the scale in float32 afterwards."""
    scores = (q @ k.transpose(2, 3)).float() * (scale or q.shape[-1] ** -0.5)
    scores = scores if attn_mask is None else scores.masked_fill(~attn_mask, -torch.inf)
    return (scores.softmax(-1) @ v.float()).to(q.dtype)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("place", PLACES)
def test_where_float16_overflows_the_protected_model_is_right(place, family, monkeypatch):
    model, batch = enlarged(place, family), make_batch(ROWS)
    exact, roundings = exact_logits(model, batch)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention_of_apple)  # others keep float32 scores
    exact, with_graph = exact.detach(), exact
    with torch.no_grad():
        plain, ours = model(**batch), protected(model)(**batch)
    found = chosen(exact, batch)
    bounds = torch.tensor([roundings.error_bound(with_graph[at]) for at in found])
    error, error_of_plain = (torch.tensor([abs(logits[at] - exact[at]) for at in found]) for logits in (ours, plain))
    assert (error <= bounds).all(), error / bounds
    assert not (error_of_plain <= bounds).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_with_a_cache_is_right_too(family):
    """Prefill and three steps, in a model whose residual stream and gated values are too large for float16."""
    model = enlarged(enlarge_residual_stream, family)
    with torch.no_grad():
        enlarge_gated_values(model)
    batch = make_batch([(1, 3, 3)], pad="right")
    exact, roundings = exact_logits(model, batch)
    answer = batch["token_type_ids"][0].bool()
    prompt = {key: value if key == "pixel_values" else value[:, ~answer] for key, value in batch.items()}
    ours = protected(model)
    cache = ours.new_cache(1, batch["input_ids"].shape[1])
    assert cache.keys.dtype == torch.float16
    with torch.no_grad():
        logits = [ours.prefill(cache, **prompt), *(ours.decode(cache, token[None]) for token in batch["input_ids"][0, answer])]
    for found, position in zip(torch.cat(logits), range(int((~answer).sum()) - 1, len(answer)), strict=True):
        token = int(exact[0, position].argmax())
        assert abs(found[token] - exact[0, position, token].detach()) <= roundings.error_bound(exact[0, position, token])


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("place", [enlarge_token_vectors, enlarge_gated_values, enlarge_logits])
def test_quantised_models_are_right_too(place, family, kind, monkeypatch):
    """Their products are those of torch's operators, because our kernels for the CPU round the inputs to 8 bits."""
    monkeypatch.setattr(kernels, "library", lambda: None)
    plain, batch = enlarged(place, family), make_batch(ROWS)
    quantised = copy.deepcopy(plain)
    for name in quantization.targets(plain):
        module = plain.get_submodule(name)
        new = quantization.quantize_module(module, kind, {"weight": module.weight.detach()})
        quantised.set_submodule(name, new)
        module.weight.data = new.weight_as_floats()
    exact, roundings = exact_logits(plain.double(), batch, with_weights=True)
    ours = protected(quantised)
    assert ours.dtype == torch.float16 and ours.new_cache(1, 8).keys.dtype == torch.float16
    with torch.no_grad():
        logits = ours(**batch)
    assert not quantised(**batch).isfinite().all()
    for at in chosen(exact.detach(), batch):
        assert abs(logits[at] - exact[at].detach()) <= roundings.error_bound(exact[at])


EXAMPLES = [
    ("shapes.png", "caption en", 11), ("shapes.png", "detect heart ; cross ; circle", 8), ("cat.png", "caption en", 2),
    ("coffee.png", "caption en", 8),
]  # fmt: skip


@pytest.mark.parametrize("picture, prompt, least", EXAMPLES)
def test_tokens_of_the_demo_checkpoint_equal_those_of_float32(picture, prompt, least):
    """Wherever the best token is further ahead of the second than rounding to float16 can move them.

    Args:
        least: the number of tokens of the answer of which this is true; a fact about the float64 model, not about a machine.
    """
    bundled = paligemma.load(dtype="fp16")
    exact_model = weights.load_model(files.BUNDLED, dtype="fp32").half().float()  # the weights that the float16 model has
    inputs = dict(bundled.processor([load_image(ROOT / "examples" / picture)], [prompt]))
    tokens, expected = (torch.stack(list(generate(model, inputs, 60)), 1) for model in (bundled.network, exact_model))
    length = inputs["input_ids"].shape[1]
    row = {"input_ids": torch.cat((inputs["input_ids"], expected), 1), "pixel_values": inputs["pixel_values"]}
    row["token_type_ids"] = (torch.arange(row["input_ids"].shape[1]) >= length).long()[None]
    logits, roundings = exact_logits(exact_model, row)
    decided = 0
    for position, token in enumerate(expected[0].tolist()):
        best = logits[0, length - 1 + position].topk(2)
        ahead = best.values[0] - best.values[1]
        if ahead > roundings.error_bound(ahead):
            decided += 1
            assert best.indices[0] == token == tokens[0, position]
        if tokens[0, position] != token:
            break  # from here on, the float16 model answers to another text
    assert decided >= least


def test_the_gradient_is_a_scaled_product_too():
    """Inputs of a million, and gradients of which some are above 65504 and some below the smallest float16."""
    x, weight = (draw(6, 48) * 1e6).requires_grad_(), draw(32, 48, seed=1).half()
    gradient = draw(6, 32, seed=2) * torch.tensor([1.0, 1e-12, 1e9, 0.0, 1e-30, 3.0])[:, None]
    (found,) = torch.autograd.grad(float16.scaled_linear(x, weight), x, gradient)
    powers = float16.powers_of_two(gradient)
    bound = product_bound(gradient / powers, weight.T, torch.float16, factors=torch.float16) + 2.0**-24
    assert_within(found, gradient.double() @ weight.double(), bound * powers)


def test_scaled_rows_lie_between_one_and_two():
    x = torch.tensor([[1e-20, -3e-21], [0.0, 0.0], [3e38, 1.0], [-1.0, 0.5], [65504.0, 1.0], [-1.9999999, 0.0]])
    powers = float16.powers_of_two(x)
    assert torch.equal(powers.log2(), powers.log2().round())
    assert [bool(1 <= row.abs().max() < 2) for row in x / powers] == [True, False, True, True, True, True]
    assert torch.equal(x / powers * powers, x)
    broken = torch.tensor([[torch.inf, 1.0], [torch.nan, 1.0]])
    assert float16.scaled_linear(broken, torch.ones(1, 2).half()).isnan().all()


def test_a_power_of_two_changes_no_bit():
    """Nothing overflows here, so the plain product is right, too."""
    x, weight = (1 + draw(5, 48).abs()) * 100, (1 + draw(32, 48, seed=1).abs()).half()
    assert torch.equal(float16.scaled_linear(x, weight), torch.nn.functional.linear(x.half(), weight).float())


@pytest.mark.parametrize("family", FAMILIES)
def test_maps_of_an_explanation_are_finite_where_plain_float16_gives_none(family):
    model, batch = enlarged(enlarge_gated_values, family), make_batch([(1, 4, 3)])
    for wanted, network in ((False, model), (True, protected(model))):
        with torch.no_grad(), explanation.recording([network.language_model.model.layers[0].self_attn]) as calls:
            features = network.encode_images(batch["pixel_values"])
            network(**batch)
        row = {key: batch[key] for key in ("input_ids", "token_type_ids")}
        logits = explanation.answer_logits(network, row, features.requires_grad_())  # [T, V]
        (found,) = explanation.gradient_maps(logits[:, 5], [range(3)], features)
        assert bool(found.isfinite().all()) == wanted
        shares = explanation.decoder_weights(*calls[0])
        assert shares.dtype == torch.float32 and torch.allclose(shares.sum(-1), torch.ones(()))


def test_an_explanation_computes_scores_beyond_float16():
    q, k = torch.full((1, 1, 2, 16), 120.0).half(), torch.full((1, 1, 3, 16), 60.0).half()  # q k^T = 115200
    shares = explanation.attention_weights(q, k, None, 0.25, None)
    assert torch.equal(shares, torch.full((1, 1, 2, 3), 1 / 3))


def test_protecting_changes_no_name_and_no_weight():
    model = make_model("gemma2", dtype=torch.float16)
    state = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    types = [type(module) for module in model.modules()]
    float16.protect(model)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == state
    assert model.dtype == torch.float16 and not model.training
    once = [type(module) for module in model.modules()]
    assert once != types
    float16.protect(model)
    assert [type(module) for module in model.modules()] == once


def test_what_is_float32_and_what_is_float16():
    model, batch = protected(make_model("gemma2", dtype=torch.float16)), make_batch(ROWS)
    dtypes = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _module, _inputs, result, name=name: dtypes.update({name: result.dtype}))
    features = model.encode_images(batch["pixel_values"])
    model(**batch)
    wide = ("o_proj", "down_proj", "out_proj", "fc2", "linear", "patch_embedding", "post_attention_layernorm", "embed_tokens")
    wide += ("post_feedforward_layernorm", "layers.0", "layers.1", "mlp", "self_attn", "encoder", "embeddings")
    narrow = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1", "input_layernorm", "pre_feedforward_layernorm", "norm")
    for name, dtype in dtypes.items():
        assert not name.endswith(wide) or dtype == torch.float32, name
        assert not name.endswith(tuple(f".{last}" for last in narrow)) or dtype == torch.float16, name
    assert features.dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_a_protected_step_reads_no_number_on_the_cpu(family):
    """Tensors on the meta device have no data, and fullgraph refuses operations that read a value on the CPU."""
    model = protected(make_model(family, dtype=torch.float16)).to("meta")
    cache = model.new_cache(2, 16)
    assert model.prefill(cache, **make_batch([(1, 5, 0), (0, 4, 2)], "right")).is_meta
    assert model.decode(cache, torch.tensor([5, 6])).is_meta
    model = protected(make_model(family, dtype=torch.float16))
    cache = model.new_cache(2, 16)
    step = torch.compile(PaliGemmaForConditionalGeneration.step, fullgraph=True, dynamic=False, backend="eager")
    with torch.no_grad():
        model.prefill(cache, **make_batch([(0, 5, 0), (0, 4, 2)], "right"))
        other = copy.deepcopy(cache)
        tokens = torch.tensor([5, 6])
        for each in (cache, other):
            each.reserve()
        assert torch.equal(step(model, cache, tokens), model.step(other, tokens))


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_modules_for_cuda_keep_the_protection(family):
    """They compute one token with other operations, and lie in front of the protected modules."""
    model, batch = enlarged(enlarge_residual_stream, family), make_batch([(1, 3, 1)], pad="right")
    exact, roundings = exact_logits(model, batch)
    ours = protected(model)
    for layer in ours.language_model.model.layers:
        for name, module in list(layer.named_children()):
            if isinstance(module, GemmaRMSNorm):
                setattr(layer, name, cuda_decoding.extended(module, cuda_decoding.CudaRMSNorm))
    ours.language_model.model.norm = cuda_decoding.extended(ours.language_model.model.norm, cuda_decoding.CudaRMSNorm)
    with torch.no_grad():
        logits = ours(**batch)
    for at in chosen(exact.detach(), batch):
        assert abs(logits[at] - exact[at].detach()) <= roundings.error_bound(exact[at])


def test_sums_of_split_products_stay_in_float32_on_cuda(monkeypatch):
    settings = torch.backends.cuda.matmul
    before = settings.allow_fp16_reduced_precision_reduction
    try:
        float16.protect(make_model("gemma", dtype=torch.float16))
        assert settings.allow_fp16_reduced_precision_reduction == before  # a model on the CPU changes nothing
        monkeypatch.setattr(PaliGemmaForConditionalGeneration, "device", torch.device("cuda"))
        float16.protect(make_model("gemma", dtype=torch.float16))
        assert not settings.allow_fp16_reduced_precision_reduction
    finally:
        settings.allow_fp16_reduced_precision_reduction = before


# What the weights prove


@pytest.mark.parametrize("family", FAMILIES)
def test_the_largest_output_is_reached_and_never_passed(family):
    model = make_model(family, dtype=torch.float64)
    layer = model.language_model.model.layers[1]
    norm = layer.pre_feedforward_layernorm if layer.is_gemma2 else layer.post_attention_layernorm
    norm.eps = 0.0
    with exact_arithmetic():
        largest = float16.largest_outputs(model)["language_model.model.layers.1.mlp.gate_proj"]
        rows = layer.mlp.gate_proj.weight * (1 + norm.weight)  # the input that points along a row gives the largest output
        reached = layer.mlp.gate_proj(norm(rows)).max().item()
    assert reached == pytest.approx(largest, rel=1e-9)


def test_the_weights_prove_that_the_demo_checkpoint_cannot_overflow_where_it_is_not_scaled():
    largest = float16.largest_outputs(paligemma.load(dtype="fp16").network)
    assert len(largest) == 5 * 4 and round(max(largest.values())) == 68  # as docs/gpu.md says; far below 65504


@pytest.mark.parametrize("kind", [None, "int8"])
def test_a_float16_model_is_protected_when_it_is_loaded(kind, tmp_path):
    weights.save_model(enlarged(enlarge_token_vectors, "gemma"), tmp_path)
    model = weights.load_model(tmp_path, quantize=kind)
    assert model.dtype == torch.float16
    with torch.no_grad():
        assert model(**make_batch(ROWS)).isfinite().all()
    weights.save_model(model, tmp_path / "again")
    again = weights.load_model(tmp_path / "again")
    assert [*again.state_dict()] == [*model.state_dict()] and again.dtype == torch.float16
