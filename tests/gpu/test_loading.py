"""Loading a checkpoint onto simulated GPUs: which dtype, which settings, how much memory is asked for."""

import logging
from contextlib import contextmanager

import pytest
import torch

from paligemma import devices
from paligemma.checkpoints import fitting, weights
from paligemma.errors import DeviceError
from paligemma.generation import generate
from paligemma.gpu import packed_products
from paligemma.gpu.graphs import RecordedPaliGemma
from paligemma.gpu.patch_product import PatchProduct
from paligemma.layers import quantization
from tests.checkpoints.test_weights import tensors_of, write_checkpoint
from tests.gpu.pretend import pretend, waits
from tests.tiny import make_batch

T4, L4, H100 = (7, 5), (8, 9), (9, 0)


@pytest.fixture(autouse=True)
def unchanged_settings(monkeypatch):
    """The settings of the process are put back after each test."""
    monkeypatch.delenv(devices.GRAPHS_VARIABLE, raising=False)
    is_on = torch.backends.cuda.cudnn_sdp_enabled()
    yield
    torch.backends.cuda.enable_cudnn_sdp(is_on)


@pytest.fixture
def float32(tmp_path):
    return write_checkpoint(tmp_path / "float32")


@contextmanager
def card(capability, memory=16 * 2**30, device="cuda:0"):
    with pretend(device, capability=capability, memory=memory, name="Card") as gpu:
        yield gpu
        assert gpu.mismatches == []


@pytest.mark.parametrize(
    ("device", "capability", "stored", "asked", "dtype", "why"),
    [
        ("cuda", T4, "bf16", None, "float32", "stored as bfloat16, which this device does not compute fast"),
        ("cuda", T4, "fp32", None, "float32", "as stored"),
        ("cuda", T4, "fp16", None, "float16", "as stored"),
        ("cuda", T4, "bf16", "bf16", "bfloat16", "as asked for"),
        ("cuda", L4, "fp32", None, "bfloat16", "stored as float32, which this device does not compute fast"),
        ("cuda", H100, "bf16", None, "bfloat16", "as stored"),
        ("cuda", H100, "fp16", None, "float16", "as stored"),
        ("cuda", H100, "fp32", "fp32", "float32", "as asked for"),
        ("mps", H100, "fp32", None, "bfloat16", "stored as float32, which this device does not compute fast"),
        ("mps", H100, "fp64", None, "bfloat16", "stored as float64, which this device does not compute fast"),
        ("cuda", H100, "fp64", None, "bfloat16", "stored as float64, which this device does not compute fast"),
        ("mps", H100, "bf16", None, "bfloat16", "as stored"),
        ("cpu", H100, "fp32", None, "float32", "as stored"),
        ("cpu", H100, "bf16", None, "bfloat16", "as stored"),
        ("cpu", H100, "fp16", None, "float16", "as stored"),
    ],
)
def test_the_dtype_is_one_that_the_device_computes_fast(tmp_path, caplog, device, capability, stored, asked, dtype, why):
    names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
    tensors = {name: tensor.to(names[stored]) for name, tensor in tensors_of("gemma").items()}
    folder = write_checkpoint(tmp_path / "model", tensors)
    caplog.set_level(logging.INFO)
    with card(capability, device="mps" if device == "mps" else "cuda:0"):
        model = weights.load_model(folder, device=device, dtype=asked)
        assert (model.device.type, model.dtype) == (device, getattr(torch, dtype))
        name = devices.profile(model.device).name
    assert f"the model computes in {dtype} ({why}) on {name}." in caplog.messages


def test_an_older_card_gets_float16_where_float32_does_not_fit(float32, caplog):
    """The limit is exact: the weights and what one answer needs."""
    caplog.set_level(logging.INFO)
    files = weights.ModelFiles(float32)
    room = fitting.room_to_answer(files.config, [], torch.float32)
    need = sum(tensor.num_bytes for tensor in files.tensors.values()) + room
    assert room > fitting.WORKSPACE
    for memory, dtype in ((need, torch.float32), (need - 1, torch.float16)):
        with card(T4, memory):
            assert weights.load_model(float32, device="cuda").dtype == dtype
    assert "the model computes in float16 (float32 needs 0.25 GiB, and 0.25 GiB are free) on Card (sm_75)." in caplog.messages
    with card(T4, fitting.WORKSPACE), pytest.raises(DeviceError, match="the weights and one answer take 0.25 GiB") as caught:
        weights.load_model(float32, device="cuda")
    assert caught.value.code == 6


@pytest.mark.parametrize(
    ("capability", "stored", "dtype"),
    [
        (H100, torch.bfloat16, torch.bfloat16),
        (L4, torch.float32, torch.bfloat16),
        (H100, torch.float16, torch.float16),
        (T4, torch.bfloat16, torch.float16),
        (T4, torch.float32, torch.float16),
    ],
)
def test_a_model_that_fits_in_no_dtype_gets_the_smallest_and_of_equal_ones_the_best(capability, stored, dtype):
    """It may be divided among cards afterwards, so the dtype matters: float16 would not save memory over bfloat16."""
    with card(capability):
        need = lambda dtype: 2**40 * dtype.itemsize  # noqa: E731
        assert fitting.choose_dtype(None, stored, [torch.device("cuda:0")], need) == dtype


def test_room_counts_the_blocks_of_quantised_weights_that_are_floats_at_a_time(float32):
    files = weights.ModelFiles(float32)
    model = weights.empty_model(files.config)
    modules = [quantization.empty_module(model.get_submodule(name), "int8") for name in quantization.targets(model)]
    rooms = [fitting.room_to_answer(files.config, some, torch.bfloat16) for some in ([], modules)]
    assert rooms[1] - rooms[0] == packed_products.BLOCK_BYTES  # test_packed_products.py measures it


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_weights_get_the_layout_of_the_device_while_they_are_loaded(float32, kind):
    """Not during the first prompt, when the cache and other modules take memory, too."""
    with card(H100):
        model = weights.load_model(float32, device="cuda", quantize=kind, graphs="off")
        modules = [module for module in model.modules() if isinstance(module, quantization.QuantizedLinear)]
        assert modules and not any(module.is_tiled for module in modules)


def test_float32_is_exact_and_cudnn_plans_no_attention(float32):
    """cuDNN would round the pixels to TF32, and would plan its attention anew for each shape."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    batch = make_batch([(1, 3, 0)])
    expected = list(generate(weights.load_model(float32), batch, 4))
    assert torch.backends.cuda.cudnn_sdp_enabled()  # a model on the CPU changes nothing
    with card(H100) as gpu:
        model = weights.load_model(float32, device="cuda", dtype="fp32", graphs="off")
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        with gpu.part() as events:
            found = list(generate(model, batch, 4))
    assert found == expected
    assert [event.op for event in events if "conv" in event.op] == []
    assert isinstance(model.vision_tower.vision_model.embeddings.patch_embedding, PatchProduct)


@pytest.mark.parametrize(
    ("flag", "variable", "is_recorded"), [(None, "off", False), ("off", "auto", False), ("auto", "off", True)]
)
def test_the_variable_sets_how_steps_run_unless_the_argument_does(float32, monkeypatch, flag, variable, is_recorded):
    monkeypatch.setenv(devices.GRAPHS_VARIABLE, variable)
    with card(H100):
        assert isinstance(weights.load_model(float32, device="cuda", graphs=flag), RecordedPaliGemma) == is_recorded


@pytest.mark.parametrize("device", ["cuda:0", "mps"])
def test_to_device_waits_only_where_it_must_and_reads_the_numbers_at_once(device):
    with pretend(device, late_copies=True) as gpu:
        source = torch.arange(3)
        with gpu.part() as events:
            copy = devices.to_device(source, torch.device(device))
        source += 10  # the copy may still be under way
        assert copy.device.type == device[:4].rstrip(":") and copy.tolist() == [0, 1, 2]
        assert len(waits(events)) == (device == "mps")
        assert devices.to_device(copy, copy.device) is copy
    assert gpu.mismatches == []


def test_a_tensor_that_was_expanded_is_copied(float32):
    """pin_memory keeps strides, and torch refuses to write several numbers to one place."""
    one_row = make_batch([(1, 3, 0)])
    batch = {key: tensor.expand(3, *tensor.shape[1:]) for key, tensor in one_row.items()}
    with card(H100), torch.no_grad():
        assert devices.to_device(torch.arange(2).expand(3, 2), torch.device("cuda")).tolist() == [[0, 1]] * 3
        model = weights.load_model(float32, device="cuda", graphs="off")
        logits, expected = model(**batch), model(**one_row)
        torch.testing.assert_close(logits.cpu(), expected.cpu().expand(3, -1, -1), rtol=1e-2, atol=1e-2)
