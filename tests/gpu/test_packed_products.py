"""packed_products.py on simulated devices: which kernel multiplies, in which layout, and what happens if it differs."""

import contextlib
import functools
import importlib.util
import sys
import types
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from paligemma import devices
from paligemma.gpu import packed_products
from paligemma.layers import int_formats
from paligemma.layers.int_formats import GROUP, KINDS
from paligemma.modeling_gemma import GemmaEmbedding
from tests.gpu.pretend import kernels, pretend, waits
from tests.layers.test_quantization import gap, quantized, random_linear

TURING, AMPERE, HOPPER = (7, 5), (8, 6), (9, 0)
BLOCKS = {"mm"}  # the operator of F.linear, which multiplies with blocks of floats


def int4_product_of_cuda(x, packed, group, scales_and_zeros):
    """torch._weight_int4pack_mm on CUDA, written out after aten/src/ATen/native/cuda/int4mm.cu: one weight at a time."""
    assert x.dtype == scales_and_zeros.dtype == torch.bfloat16 and packed.dtype == torch.int32 and group == 32
    outputs, inputs, words = len(packed) * 8, x.shape[1], packed.shape[3]
    assert packed.shape == (outputs // 8, inputs // (32 * words), 32, words)
    assert scales_and_zeros.shape == (inputs // 32, outputs, 2) and packed.is_contiguous() and scales_and_zeros.is_contiguous()
    weight = torch.empty(outputs, inputs, dtype=torch.float64)
    for thread in range(32):
        for word in range(words):
            bits = packed[:, :, thread, word].long() & 0xFFFFFFFF
            column = 32 * word + 2 * (thread % 4)
            for place, offset in enumerate((0, 8, 16, 24, 1, 9, 17, 25)):  # of the halves of a word's bytes, the lowest first
                values = (bits >> 4 * place & 15) - 8
                weight[thread // 4 :: 8, column + offset :: 32 * words] = values.double()
    scales, zeros = scales_and_zeros.double().repeat_interleave(32, 0).unbind(2)
    return (x.double() @ (weight * scales.T + zeros.T).bfloat16().double().T).bfloat16()


def int4_product_of_mps(x, packed, group, scales_and_zeros):
    """torch._weight_int4pack_mm on MPS, after Quantized.metal: bytes of an output in order, the first input in the low half."""
    assert x.dtype == scales_and_zeros.dtype and packed.dtype == torch.int32 and packed.ndim == 4 and group == 32
    halves = packed.contiguous().view(torch.uint8).view(len(packed) * 8, -1)
    weight = torch.stack((halves & 15, halves >> 4), 2).flatten(1).double() - 8
    scales, zeros = scales_and_zeros.double().repeat_interleave(32, 0).unbind(2)
    return (x.double() @ (weight * scales.T + zeros.T).T).to(x.dtype)


def int8_product_of_mps(x, packed, scales):
    assert len(packed) % 32 == 0 and x.shape[1] % 32 == 0 and scales.dtype == x.dtype
    return torch._weight_int8pack_mm(x, packed, scales)


def triton_product(kind):
    """What the kernels of triton_products.py compute: float32 sums of float32 weights, rounded once."""

    def product(x, packed, scales):
        assert scales.dtype == torch.float32 and x.is_contiguous()
        weight = int_formats.dequantize(int_formats.from_rows(packed, kind), scales, torch.float32)
        return (x.float() @ weight.T).to(x.dtype)

    return product


@functools.cache
def have_operators():
    """Defines the operators of triton_products.py where Triton is not installed; their kernels are stand-ins here anyway."""
    if importlib.util.find_spec("triton") is None:
        for kind in KINDS:
            torch.library.define(f"paligemma::{kind}_product", "(Tensor x, Tensor packed, Tensor scales) -> Tensor")
        sys.modules["paligemma.gpu.triton_products"] = types.ModuleType("triton_products")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Every test starts with ways that have not been checked."""
    for way in (packed_products.TRITON, packed_products.TORCH):
        way.reset()
    monkeypatch.setattr(devices, "has_triton", lambda: True)
    have_operators()
    yield
    for way in (packed_products.TRITON, packed_products.TORCH):
        way.reset()


@pytest.fixture
def on_gpu():
    """A function that opens a simulated device, with stand-ins for the operators that the CPU does not have."""

    def open_gpu(names="cuda:0", **options):
        gpu = contexts.enter_context(pretend(names, **options))
        mps = names == "mps"
        gpu.stand_ins["_weight_int4pack_mm"] = int4_product_of_mps if mps else int4_product_of_cuda
        if mps:
            gpu.stand_ins["_weight_int8pack_mm"] = int8_product_of_mps
        for kind in KINDS:
            gpu.stand_ins[f"paligemma::{kind}_product"] = triton_product(kind)
        return gpu

    with contextlib.ExitStack() as contexts:
        yield open_gpu


@torch.no_grad()
def product_on(gpu, module, x):
    """The product on the device, and which operators multiplied."""
    x = x.to(gpu.devices[0])
    with gpu.part() as events:
        y = module(x)
    names = {name for name in kernels(events) if name.endswith("_product") or "pack_mm" in name or name in ("mm", "addmm")}
    return y.cpu(), names


WAYS = [  # device, capability, kind, the operator that multiplies few rows
    ("cuda:0", TURING, "int8", "paligemma::int8_product"),
    ("cuda:0", TURING, "int4", "paligemma::int4_product"),
    ("cuda:0", AMPERE, "int8", "paligemma::int8_product"),
    ("cuda:0", HOPPER, "int4", "_weight_int4pack_mm"),
    ("mps", HOPPER, "int8", "_weight_int8pack_mm"),
    ("mps", HOPPER, "int4", "_weight_int4pack_mm"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("names", "capability", "kind", "operator"), WAYS)
def test_few_rows_take_the_kernel_of_the_device_and_many_take_blocks(on_gpu, names, capability, kind, operator, dtype):
    module = quantized(random_linear(96, 128, dtype=dtype), kind)
    weight = module.weight_as_floats()
    gpu = on_gpu(names, capability=capability)
    module.to(gpu.devices[0])
    for rows in (1, 2, 3, 5, 16, 17, 40):
        x = torch.randn(rows, 128).to(dtype)
        product_on(gpu, module, x)  # the first product with a number of rows is compared with the blocks
        y, used = product_on(gpu, module, x)
        assert used == ({operator} if rows <= packed_products.MAX_ROWS else BLOCKS)
        assert y.dtype == dtype
        # Rounding of the result, and of x and weights to bfloat16 in torch's int4 products and in blocks.
        assert gap(y, x.float() @ weight.T) < (1e-5 if dtype is torch.float32 and "int4pack" not in operator else 6e-3)
    assert gpu.mismatches == []


@pytest.mark.parametrize(("names", "capability", "kind", "operator"), WAYS)
@pytest.mark.parametrize("outputs", [37, 64])
def test_odd_sizes(on_gpu, names, capability, kind, operator, outputs, caplog):
    module = quantized(random_linear(outputs, 100, bias=True), kind)
    expected = torch.randn(2, 3, 100), module.weight_as_floats()
    gpu = on_gpu(names, capability=capability)
    module.to(gpu.devices[0])
    y, used = product_on(gpu, module, expected[0])
    assert y.shape == (2, 3, outputs)
    assert gap(y, expected[0] @ expected[1].T + module.bias.cpu()) < 6e-3
    # MPS has int8 products for multiples of 32 outputs; 37 are padded to 48.
    assert used == (BLOCKS if names == "mps" and kind == "int8" and outputs == 37 else {operator} | BLOCKS)
    assert caplog.messages == []


@pytest.mark.parametrize(("names", "capability", "kind", "_operator"), WAYS)
def test_vectors_logits_and_saved_tensors_are_those_of_the_cpu(on_gpu, names, capability, kind, _operator):
    torch.manual_seed(0)
    embedding = quantized(GemmaEmbedding(300, 96).requires_grad_(False), kind)
    ids, x = torch.tensor([[0, 299, 5], [16, 5, 131]]), torch.randn(2, 96)
    expected, weight = embedding(ids), embedding.weight_as_floats()
    saved = {key: value.clone() for key, value in embedding.state_dict().items()}
    gpu = on_gpu(names, capability=capability)
    embedding.to(gpu.devices[0])
    with torch.no_grad():
        for _ in range(2):  # in tiles; then in the layout of the device
            assert torch.equal(embedding(ids.to(gpu.devices[0])).cpu(), expected)
            assert gap(embedding.logits(x.to(gpu.devices[0])).cpu(), x @ weight.T) < 6e-3
    assert not embedding.is_tiled
    stored = {key: value.cpu() for key, value in embedding.state_dict().items()}
    assert all(torch.equal(saved[key], value) for key, value in stored.items())
    assert torch.equal(embedding.weight_as_floats().cpu(), weight)
    embedding.to("cpu")  # back in tiles, which the CPU's kernels take
    assert embedding.is_tiled and torch.equal(embedding.packed, saved["packed"]) and embedding.scales.dtype == torch.bfloat16


FAILURES = {
    "a compiler that fails": RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
    "no Triton": ImportError("No module named 'triton'"),
    "an internal check": AssertionError(),
    "too little shared memory": type("OutOfResources", (Exception,), {})("out of resource: shared memory"),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize(("names", "capability", "kind", "operator"), WAYS)
def test_a_kernel_that_fails_is_replaced_by_blocks_with_one_line(on_gpu, names, capability, kind, operator, failure, caplog):
    module, x = quantized(random_linear(96, 128), kind), torch.randn(3, 128)
    weight = module.weight_as_floats()
    gpu = on_gpu(names, capability=capability)

    def fail(*_arguments):
        calls.append(1)
        raise FAILURES[failure]

    calls = []
    gpu.stand_ins[operator] = fail
    module.to(gpu.devices[0])
    for _ in range(3):
        y, _ = product_on(gpu, module, x)
        assert gap(y, x @ weight.T) < 1e-5
    (line,) = caplog.messages
    assert len(calls) == 1
    assert line.startswith(("products of packed weights by Triton fail", "torch's products of packed weights fail"))
    assert "in blocks" in line and "bug" not in line


@pytest.mark.parametrize(("names", "capability", "kind", "operator"), WAYS)
def test_a_kernel_that_computes_something_else_is_not_used(on_gpu, names, capability, kind, operator, caplog):
    module, x = quantized(random_linear(96, 128), kind), torch.randn(3, 128)
    weight = module.weight_as_floats()
    gpu = on_gpu(names, capability=capability)
    right = gpu.stand_ins[operator]
    gpu.stand_ins[operator] = lambda *arguments: right(*arguments).roll(1, 1)  # the outputs in another order
    module.to(gpu.devices[0])
    for _ in range(2):
        y, _ = product_on(gpu, module, x)
        assert gap(y, x @ weight.T) < 1e-5
    (line,) = caplog.messages
    assert "differ on" in line


@pytest.mark.parametrize(("names", "capability", "kind", "operator"), WAYS)
def test_a_kernel_that_is_wrong_for_one_size_of_matrix_only_is_found(on_gpu, names, capability, kind, operator, caplog):
    modules = [quantized(random_linear(96, inputs), kind) for inputs in (128, 192)]
    gpu = on_gpu(names, capability=capability)
    right = gpu.stand_ins[operator]
    gpu.stand_ins[operator] = lambda x, *rest: right(x, *rest) * (1 if x.shape[1] == 128 else 2)
    for module in modules:
        x, weight = torch.randn(3, module.in_features), module.weight_as_floats()
        y, _ = product_on(gpu, module.to(gpu.devices[0]), x)
        assert gap(y, x @ weight.T) < 6e-3
    (line,) = caplog.messages
    assert "differ on" in line


def test_each_number_of_rows_is_compared_once_and_without_it_nothing_waits(on_gpu):
    module = quantized(random_linear(64, 64), "int8")
    gpu = on_gpu()
    module.to("cuda:0")
    found = []
    for rows in (1, 1, 2, 3, 4, 3, 7, 8, 9, 11, 12, 16):
        _, used = product_on(gpu, module, torch.randn(rows, 64))
        found.append(used >= BLOCKS)
    assert found == [True, False, True, True, False, False, True, False, True, False, True, False]
    with torch.no_grad(), gpu.part() as events:
        module(torch.zeros(4, 64, device="cuda:0"))
    assert waits(events) == []


def test_without_triton_and_int4pack_a_device_multiplies_in_blocks(on_gpu, monkeypatch):
    monkeypatch.setattr(devices, "has_triton", lambda: False)
    modules = [quantized(random_linear(64, 64), kind) for kind in KINDS]
    gpu = on_gpu(capability=TURING)
    for module in modules:
        assert product_on(gpu, module.to("cuda:0"), torch.randn(3, 64))[1] == BLOCKS


@pytest.mark.parametrize(("names", "capability", "kind", "_operator"), WAYS)
def test_bytes_per_weight(on_gpu, names, capability, kind, _operator):
    linear = nn.Linear(256, 64, bias=False).requires_grad_(False)
    module = quantized(linear, kind)
    gpu = on_gpu(names, capability=capability)
    module.to(gpu.devices[0])
    before = sum(tensor.numel() * tensor.element_size() for tensor in module.buffers())
    promised = before + module.more_bytes_on_gpu
    module.change_layout()
    after = sum(tensor.numel() * tensor.element_size() for tensor in module.buffers())
    assert after == promised
    assert after / linear.weight.numel() == {"int8": 1 + 4 / 256, "int4": 0.5 + 4 / GROUP["int4"]}[kind]


# ---------------------------------------------------------------- memory


class Memory(TorchDispatchMode):
    """The most bytes that tensors made inside this context held at a time (`peak`); the CPU allocates as a GPU does."""

    def __init__(self, *known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.tensors, self.peak = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.tensors += [weakref.ref(leaf) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.tensors = [reference for reference in self.tensors if reference() is not None]
        storages = [tensor.untyped_storage() for reference in self.tensors if (tensor := reference()) is not None]
        held = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr() not in self.known}
        self.peak = max(self.peak, sum(held.values()))
        return result


def num_bytes(*tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize(("kind", "row"), [("int8", "sm_75"), ("int4", "sm_75"), ("int4", "sm_80")])
def test_memory_for_other_layouts_and_for_blocks_is_bounded(kind, row, monkeypatch):
    """A matrix of 512 K weights in blocks of 32 K: not more than the result and a few bytes per weight of one block."""
    monkeypatch.setattr(packed_products, "profile", lambda _device: devices.PROFILES[row])
    monkeypatch.setattr(int_formats, "CHUNK_WEIGHTS", 2**15)
    tiles, scales = int_formats.quantize(torch.randn(512, 1024), kind)
    to_pack = int_formats.to_int4pack if row == "sm_80" else functools.partial(int_formats.to_rows, kind=kind)
    with Memory(tiles) as memory:
        packed = int_formats.repack(tiles, kind, to_pack)
    assert num_bytes(packed) < memory.peak <= num_bytes(packed) + 3.6 * 2**15
    scales = int_formats.scales_from_tiles(scales)
    scales = int_formats.with_zero_points(scales) if row == "sm_80" else scales.float()
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(40, 1024, dtype=dtype)
        with Memory(packed, scales, x) as memory:
            y = packed_products.product_in_blocks(x, packed, scales, kind, 2**15)
        rest = num_bytes(y) + num_bytes(x) + num_bytes(scales)  # the result, a block of it, and a view of the scales
        assert 2**15 < memory.peak <= packed_products.BLOCK_BYTES / packed_products.BLOCK_WEIGHTS * 2**15 + rest
