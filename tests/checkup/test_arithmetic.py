"""The numerical checks: they pass where everything is right, on the CPU and on simulated GPUs, and each finds its fault."""

import pytest
import torch

from paligemma.checkup import arithmetic
from paligemma.checkup.rows import FAILED, NOTE, OK
from paligemma.generation import PendingTokens
from paligemma.gpu import capped_attention, self_check
from paligemma.layers import compiling, kernels, quantization
from paligemma.modeling_gemma import GemmaAttention
from tests.gpu.pretend import PretendedGraph, pretend

CPU = torch.device("cpu")
BOTH = (torch.float32, torch.bfloat16)
DEVICES = ["cuda:0", "mps"]


@pytest.fixture(autouse=True)
def no_checks_are_remembered():
    self_check.reset_all()
    yield
    self_check.reset_all()


@pytest.fixture
def light(monkeypatch):
    """What a GPU does in milliseconds is left out."""
    monkeypatch.setattr(arithmetic, "busy", lambda device: lambda: torch.ones(2, device=device) + 1)


def on(device, check, *args, **options):
    """The rows of a check on a simulated GPU."""
    with pretend(device, **options) as gpu:
        rows = check(*args)
        assert gpu.mismatches == []
    return rows


def states(rows):
    return {row.name: row.state for row in rows}


# Everything is right


def test_the_cpu_computes_what_it_should(tmp_path):
    rows = arithmetic.attention_rows(CPU, BOTH) + arithmetic.model_rows(tmp_path, CPU, BOTH)
    rows += arithmetic.integer_rows(CPU, torch.float32) + arithmetic.integer_rows(CPU, torch.bfloat16)
    assert {row.state for row in rows} == {OK} and len(rows) == 11
    assert all("bf16" in row.value for row in rows[:7]) and all("fp32" in row.value for row in rows[:5])


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize("device", DEVICES)
def test_a_pretended_gpu_computes_what_it_should(tmp_path, device):
    target = torch.device(device)
    rows = on(device, arithmetic.attention_rows, target, (torch.bfloat16, torch.float16))
    rows += on(device, arithmetic.model_rows, tmp_path, target, (torch.bfloat16, torch.float16))
    rows += on(device, arithmetic.copy_rows, target, late_copies=True)
    assert {row.state for row in rows} == {OK}, rows


@pytest.mark.parametrize("off", [False, True])
def test_the_kernels_for_the_cpu_are_checked_or_a_note(monkeypatch, off):
    if off:
        monkeypatch.setattr(kernels, "library", lambda: None)
    (row,) = arithmetic.kernel_rows()
    assert row.state == (NOTE if off or kernels.library() is None else OK)
    assert bool(row.advice) == (row.state == NOTE)


@pytest.mark.parametrize(
    ("variable", "compiler", "advice"), [("off", [], "PALIGEMMA_KERNELS"), ("", [], "g++"), ("", ["g++"], "--verbose")]
)
def test_why_there_are_no_kernels_decides_the_advice(monkeypatch, variable, compiler, advice):
    monkeypatch.setattr(kernels, "library", lambda: None)
    monkeypatch.setattr(compiling, "find_compiler", lambda: compiler)
    monkeypatch.setenv("PALIGEMMA_KERNELS", variable)
    assert advice in arithmetic.kernel_rows()[0].advice


@pytest.mark.filterwarnings("error")
def test_results_that_need_gradients_are_compared_without_a_warning():
    x = torch.ones(3, requires_grad=True)
    assert arithmetic.difference(x, 2 * x) == 0.5


# Faults


def wrong(function, factor=1.2):
    return lambda *args, **options: function(*args, **options) * factor


@pytest.mark.parametrize("case", arithmetic.attention_cases())
def test_wrong_attention_is_found(monkeypatch, case):
    plain, (numbers, _, cap) = arithmetic.attention, arithmetic.attention_cases()[case]

    def sometimes_wrong(q, k, v, mask, scale, soft_cap):
        y = plain(q, k, v, mask, scale, soft_cap)
        is_case = (q.shape[1:3], k.shape[1], q.shape[3], soft_cap) == ((numbers[0], numbers[2]), numbers[1], numbers[4], cap)
        has_mask = mask is not None
        return y * 1.2 if is_case and has_mask == (arithmetic.attention_cases()[case][1] is not None) else y

    monkeypatch.setattr(arithmetic, "attention", sometimes_wrong)
    found = {row.name: row for row in arithmetic.attention_rows(CPU, BOTH)}
    assert {name for name, row in found.items() if row.state == FAILED} == {case}
    assert found[case].code == 6 and "--device cpu" in found[case].advice and "report" in found[case].advice


def test_attention_that_ignores_the_mask_is_found(monkeypatch):
    plain = arithmetic.attention
    monkeypatch.setattr(arithmetic, "attention", lambda q, k, v, _, scale, cap: plain(q, k, v, None, scale, cap))
    found = states(arithmetic.attention_rows(CPU, BOTH))
    masked = {"attention with a mask", "attention with soft caps", "attention of one token"}
    assert {name for name, state in found.items() if state == FAILED} == masked


def test_float32_that_is_rounded_to_tf32_is_found(monkeypatch):
    plain = arithmetic.attention

    def rounded(q, *rest):
        bits = q.view(torch.int32) & ~0x1FFF if q.dtype == torch.float32 else None  # TF32 has 10 fraction bits
        return plain(q if bits is None else bits.view(torch.float32), *rest)

    monkeypatch.setattr(arithmetic, "attention", rounded)
    assert set(states(arithmetic.attention_rows(CPU, BOTH)).values()) == {FAILED}
    assert set(states(arithmetic.attention_rows(CPU, BOTH[1:])).values()) == {OK}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_found(monkeypatch, tmp_path, value):
    monkeypatch.setattr(GemmaAttention, "attend", lambda _, q, *__: torch.full_like(q, value))
    assert FAILED in states(arithmetic.model_rows(tmp_path, CPU, BOTH[1:])).values()


def test_a_device_that_computes_wrongly_is_found(monkeypatch, tmp_path):
    plain = GemmaAttention.attend

    def on_gpu(self, q, k, v, mask):
        y = plain(self, q, k, v, mask)
        return y.roll(1, -1) if q.is_cuda and q.dtype == torch.bfloat16 else y  # a factor would be normalised away

    monkeypatch.setattr(GemmaAttention, "attend", on_gpu)
    rows = on("cuda:0", arithmetic.model_rows, tmp_path, torch.device("cuda:0"), BOTH[:1])
    assert {row.state for row in rows} == {OK}
    rows = on("cuda:0", arithmetic.model_rows, tmp_path, torch.device("cuda:0"), BOTH)
    assert {row.state for row in rows} == {FAILED} and "--dtype" in rows[0].advice


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_wrong_products_of_integers_are_found(monkeypatch, kind):
    plain = quantization.QuantizedLinear.product

    def product(self, x, dtype):
        return plain(self, x, dtype) * (1.1 if self.kind == kind and len(x) == 16 else 1)

    monkeypatch.setattr(quantization.QuantizedLinear, "product", product)
    rows = {row.name: row for row in arithmetic.integer_rows(CPU, torch.bfloat16)}
    assert [name for name, row in rows.items() if row.state == FAILED] == [f"{kind} products"]
    assert "do not use --quantize" in rows[f"{kind} products"].advice


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize("device", DEVICES)
def test_tokens_that_are_read_before_they_arrive_are_found(monkeypatch, device):
    class Impatient(PendingTokens):
        def __init__(self, rows, numbers):
            self.rows, self.copy_done = rows, None
            self.numbers = numbers.to("cpu", non_blocking=True)

    monkeypatch.setattr(arithmetic, "PendingTokens", Impatient)
    (row,) = on(device, arithmetic.copy_rows, torch.device(device), late_copies=True)
    assert row.state == FAILED and "0 of 20 copies" in row.value and "--device cpu" in row.advice


@pytest.mark.parametrize("name", ["product", "bf16_rms_norm", "bf16_gate", "bf16_attend"])
def test_a_wrong_kernel_is_found(monkeypatch, name):
    if kernels.library() is None:
        return
    assert arithmetic.kernel_rows()[0].state == OK
    monkeypatch.setattr(kernels, name, wrong(getattr(kernels, name)))
    (row,) = arithmetic.kernel_rows()
    assert row.state == FAILED and "PALIGEMMA_KERNELS=off" in row.advice


def test_an_instruction_set_that_could_not_be_used_is_a_note_with_its_reason(monkeypatch):
    if kernels.library() is None:
        return
    loaded = kernels.load()[0]
    (row,) = arithmetic.kernel_rows()
    assert row.state == OK and row.value.startswith(loaded.name)
    monkeypatch.setattr(kernels, "LOADED", [loaded._replace(failures={"amx": "its check ended with SIGILL"})])
    (row,) = arithmetic.kernel_rows()
    assert row.state == NOTE and "not amx: its check ended with SIGILL" in row.value and "report" in row.advice


@pytest.mark.parametrize("factor", [1, 1.2])
def test_compiled_attention_with_soft_caps_is_checked(monkeypatch, factor):
    assert [row.value for row in arithmetic.flex_rows(CPU, torch.bfloat16)] == ["not used on this device"]
    monkeypatch.setattr(capped_attention, "kernel_options", lambda *_: {})
    computed = wrong(capped_attention.capped_attention, factor)  # not compiled, which would take long
    monkeypatch.setattr(capped_attention, "compiled_capped_attention", lambda: computed)
    (row,) = arithmetic.flex_rows(CPU, torch.bfloat16)
    assert row.state == (OK if factor == 1 else FAILED)


@pytest.mark.parametrize(
    ("reason", "state"), [("differ on NVIDIA L4 (relative difference 0.5)", FAILED), ("need a C compiler", NOTE)]
)
def test_ways_that_turned_themselves_off_are_listed(reason, state):
    way = self_check.FastWay("fast products", 0.1)
    try:
        assert arithmetic.fast_way_rows() == []
        way.turn_off(reason)
        (row,) = arithmetic.fast_way_rows()
        assert row.state == state and reason in row.value and row.advice
    finally:
        del self_check.WAYS["fast products"]


def test_recorded_steps_that_differ_are_found(monkeypatch, tmp_path):
    plain = PretendedGraph.replay

    def replay(self):
        plain(self)
        results = [x for *_, tensors in self.work for x in tensors if x.dtype == torch.float32 and x.dim() == 2]
        results[-1].mul_(-1)  # the logits

    with pretend("cuda:0"):
        device = torch.device("cuda:0")
        assert states(arithmetic.recorded_rows(tmp_path, device, torch.bfloat16, "record")) == {"recorded steps": OK}
        assert arithmetic.fast_way_rows() == []
        monkeypatch.setattr(PretendedGraph, "replay", replay)
        rows = arithmetic.recorded_rows(tmp_path, device, torch.bfloat16, "record") + arithmetic.fast_way_rows()
    assert FAILED in states(rows).values(), rows


# Speed


def test_the_speed_is_not_measured_where_memory_is_short(monkeypatch):
    monkeypatch.setattr(arithmetic, "read_bandwidth", lambda _: 40e9)
    monkeypatch.setattr(arithmetic, "matrix_rate", lambda *_: 2e12)
    memory, products = arithmetic.speed_rows(CPU, torch.bfloat16, None)
    assert memory.value.startswith("40.0 GB/s") and "8.0 in bf16, 26.7 in int4" in memory.value
    assert products.value == "G multiply-adds/s: 2,000 in bf16, 2,000 in int8"
    (row,) = arithmetic.speed_rows(CPU, torch.bfloat16, 2**20)
    assert row.state == NOTE


def test_bounds_are_between_rounding_and_real_errors():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert 2 * torch.finfo(dtype).eps < arithmetic.bound(dtype) < 0.05
    assert arithmetic.bound(torch.float32) < torch.finfo(torch.float16).eps / 16  # TF32 is found
