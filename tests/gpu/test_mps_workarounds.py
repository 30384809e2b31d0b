"""On a simulated Apple GPU with torch's two errors, models give what they give on the CPU."""

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import paligemma
from paligemma import files
from paligemma.checkpoints import weights
from paligemma.generation import generate
from paligemma.gpu import mps_workarounds
from paligemma.layers import float16, int_formats, quantization
from paligemma.pictures.images import load_image
from tests.bounds import Float16Roundings, assert_within, product_bound
from tests.gpu.pretend import pretend
from tests.tiny import draw, make_batch, make_model

LONG = {"intermediate_size": 36864, "num_hidden_layers": 1}  # as in PaliGemma 2 28B


def wrong_product(a: Tensor, b: Tensor) -> Tensor:
    """torch.mm on M1 and M2: from 32767 terms on, something is added, if the result has at least 16 rows and columns."""
    y = torch.mm(a, b)
    return y + 1000 if a.shape[1] >= 32767 and min(y.shape) >= 16 else y


def wrong_attention(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch's attention on MPS before pytorch#184180: every row has the mask of the first."""

    def wrong(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *, scale: float | None = None) -> Tensor:
        is_wrong = attn_mask is not None and q.shape[2] <= 8 and q.shape[3] in (64, 96, 128)
        return attend(q, k, v, attn_mask=attn_mask[:1] if is_wrong else attn_mask, scale=scale)

    return wrong


@pytest.fixture
def mac():
    with pretend("mps") as gpu, torch.no_grad():
        gpu.stand_ins |= {"mm": wrong_product, "addmm": lambda bias, a, b: bias + wrong_product(a, b)}
        yield gpu
        assert not gpu.mismatches


@pytest.mark.usefixtures("mac")
@pytest.mark.parametrize("inputs, rows, outputs", [(36864, 20, 24), (65533, 16, 16), (32767, 16, 16)])
def test_long_sums_are_split(inputs, rows, outputs):
    x, weight, bias = draw(2, rows // 2, inputs), draw(outputs, inputs, seed=1), draw(outputs, seed=2)
    on_mac = mps_workarounds.linear(x.to("mps"), weight.to("mps"), bias.to("mps")).cpu()
    exact = x.double() @ weight.double().T + bias.double()
    assert_within(on_mac, exact, product_bound(x, weight, torch.float32) + 2.0**-20 * bias.abs())
    assert (F.linear(x.to("mps"), weight.to("mps")).cpu() - x @ weight.T).abs().min() > 500  # and would be wrong


@pytest.mark.parametrize(
    "inputs, rows, outputs, device",
    [(32766, 16, 16, "mps"), (36864, 15, 24, "mps"), (36864, 16, 8, "mps"), (36864, 20, 24, "cpu")],
)
def test_products_that_are_right_are_not_split(mac, inputs, rows, outputs, device):
    x, weight = draw(rows, inputs).to(device), draw(outputs, inputs, seed=1).to(device)
    with mac.part() as events:
        y = mps_workarounds.linear(x, weight)
    assert torch.equal(y.cpu(), x.cpu() @ weight.cpu().T)
    assert [event.op for event in events if event.kind == "kernel"] == ["mm"] * (device == "mps")


@pytest.mark.usefixtures("mac")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_model_with_the_width_of_28b_is_right(tmp_path, dtype):
    model, batch = make_model("gemma2", text=LONG, dtype=dtype), make_batch([(1, 5, 4), (2, 3, 3)])
    weights.save_model(model, tmp_path)
    on_mac = weights.load_model(tmp_path, device="mps", dtype=dtype)
    assert sum(isinstance(module, mps_workarounds.LongLinear) for module in on_mac.modules()) == (dtype == torch.float32)
    logits = on_mac(**batch)[:, -1, 7].cpu()
    with patch.object(Tensor, "float", Tensor.double), Float16Roundings() as roundings, torch.enable_grad():
        exact = model.double()(**batch)[:, -1, 7]
        # The bound is that of float16, which rounds 2^13 times as coarsely as float32. The split adds one rounding, of the parts.
        share = 2 if dtype == torch.float16 else 2.0**-10
        bounds = torch.tensor([share * roundings.error_bound(number) for number in exact])
    assert ((logits - exact).abs() <= bounds).all()


@pytest.mark.usefixtures("mac")
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_sums_are_split(kind):
    weight, x = draw(24, 36864), draw(20, 36864, seed=1)
    module = quantization.QuantizedLinear(kind, 24, 36864, *int_formats.quantize(weight, kind))
    exact = x.double() @ module.weight_as_floats().double().T
    bound = product_bound(x, module.weight_as_floats(), torch.float32)
    assert_within(module.to("mps")(x.to("mps")).cpu(), exact, bound)


@pytest.mark.usefixtures("mac")
def test_rows_of_a_batch_keep_their_own_masks(monkeypatch):
    """The second prompt is longer: with the mask of the first, its answer would not see its own last tokens."""
    bundled = paligemma.load(device="cpu", dtype="fp32")
    picture = load_image(paligemma.EXAMPLE_PICTURE)
    inputs = bundled.processor([picture, picture], ["caption en", "detect heart ; cross ; circle"])
    expected = list(generate(bundled.network, inputs, 40))
    network = weights.load_model(files.BUNDLED, dtype="fp32", device="mps")
    monkeypatch.setattr(F, "scaled_dot_product_attention", wrong_attention(F.scaled_dot_product_attention))
    tokens = list(generate(network, inputs, 40))
    assert torch.equal(torch.stack(tokens), torch.stack(expected))


@pytest.mark.parametrize(
    "family, width, is_replaced",
    [("gemma", 64, True), ("gemma", 128, True), ("gemma", 256, False), ("gemma2", 128, False)],  # bundled, -, 3B, 28B
)
def test_only_models_with_the_error_attend_row_by_row(family, width, is_replaced):
    model = make_model(family, text={"head_dim": width})
    mps_workarounds.work_around(model)
    layers = model.language_model.model.layers
    assert {isinstance(layer.self_attn, mps_workarounds.RowByRowAttention) for layer in layers} == {is_replaced}


def test_float16_keeps_its_protection():
    model = make_model("gemma", text=LONG | {"head_dim": 64}, dtype=torch.float16)
    float16.protect(model)
    mps_workarounds.work_around(model)
    layer = model.language_model.model.layers[0]
    assert type(layer.mlp.down_proj) is float16.ScaledLinear
    assert isinstance(layer.self_attn, float16.Float16Attention)
    assert isinstance(layer.self_attn, mps_workarounds.RowByRowAttention)
