"""tiles.h: products on AMX, computed with an emulation of its instructions (emulated_tiles.h) and compared with float64.

test_quantization.py runs its tests of kernels with emulated tiles, too.
"""

import ctypes
import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paligemma.layers import compiling, fast_cpu, int_formats, kernels
from paligemma.layers.int_formats import KINDS
from paligemma.layers.replacing import extended
from tests.bounds import UNIT, assert_within, product_bound
from tests.processors import QUICK_FLAGS, TILES

IN_BOUNDS = Path(__file__).with_name("tiles_in_bounds.cpp")
ROWS = [16, 17, 32, 63, 530]  # a tile; a tile and a row; two tiles; almost four; more than one block of rows
SIZES = [(37, 64), (96, 288), (300, 32), (16, 4304)]  # O x X: partial strip; a step and a tile; one tile; half a tile at the end
X86 = platform.machine() in ("x86_64", "AMD64")


def with_types(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of the functions of emulated_tiles.h."""
    library.emulated_fault.restype, library.emulated_products.restype = ctypes.c_char_p, ctypes.c_int64
    return library


@pytest.fixture
def library(variants, monkeypatch):
    """The kernels with emulated tiles, installed as kernels.library(); None without a compiler."""
    library = variants("emulated tiles")
    monkeypatch.setattr(kernels, "library", lambda: library)
    yield library and with_types(library)
    if library:
        assert library.emulated_fault() is None
        kernels.tuning(library).tile_rows = 16


@pytest.fixture
def threads():
    """Several threads, of which some get no task. Set back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def make_matrix(kind: str, outputs: int, inputs: int, seed: int = 0, bias: bool = False) -> tuple[kernels.Matrix, Tensor]:
    """A random matrix for `product`, and the weights that it represents, float64[O, X]."""
    torch.manual_seed(seed)
    weight = (torch.randn(outputs, inputs) * 0.1).bfloat16()
    add = torch.randn(outputs).bfloat16() if bias else None
    if kind == "bf16":
        return kernels.Matrix(weight, None, outputs, add), weight.double()
    packed, scales = int_formats.quantize(weight, kind)
    q = int_formats.from_tiles(packed, kind)
    exact = int_formats.dequantize(q, int_formats.scales_from_tiles(scales).double(), torch.float64)
    return kernels.Matrix(packed, scales, outputs, add), exact[:outputs]


def padded(kind: str, inputs: int) -> int:
    return inputs if kind == "bf16" else int_formats.padded(inputs, int_formats.GROUP[kind])


def sums(kind: str, x: Tensor, matrix: kernels.Matrix, weight: Tensor, result: torch.dtype) -> tuple[Tensor, Tensor]:
    """The exact x @ weight.T + bias, and how far the kernel's may be off: only weights of int4 are rounded before the product."""
    exact, bound = x.double() @ weight.T, product_bound(x, weight, result)
    if kind == "int4":
        bound = bound + 1.01 * UNIT[torch.bfloat16] * (x.double().abs() @ weight.abs().T)
    if matrix.bias is not None:
        exact = exact + matrix.bias.double()
        bound = bound + 2 * UNIT[result] * (exact.abs() + bound)
    return exact, bound


def gelu(exact: Tensor, bound: Tensor, result: torch.dtype) -> tuple[Tensor, Tensor]:
    """GELU of numbers with an error, and the error of the result.

    Its slope is at most 1.13. e^z with z between -88 and 88, which is off by three roundings, is off by 268 of them in all.
    """
    y = F.gelu(exact, approximate="tanh")
    return y, 1.13 * bound + (UNIT[result] + 280 * UNIT[torch.float32]) * (y.abs() + 1.13 * bound)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["bf16", *KINDS])
def test_rows_are_multiplied_with_weights(kind, size, library):
    if library is None:
        return
    outputs, inputs = size[0], padded(kind, size[1])
    matrix, weight = make_matrix(kind, outputs, inputs)
    for rows in ROWS:
        x = torch.randn(rows, inputs).bfloat16()
        before = library.emulated_products()
        y = kernels.product(kind, x, [matrix], torch.float32)
        # As many tile products as there are tiles: 32 outputs in a strip, of which the second half may be empty.
        assert library.emulated_products() - before == -(-rows // 16) * -(-outputs // 32) * 2 * -(-inputs // 32)
        assert_within(y, *sums(kind, x, matrix, weight, torch.float32))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("result", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("kind", ["bf16", *KINDS])
def test_several_matrices_have_biases_and_an_activation(kind, activation, result, library):
    if library is None:
        return
    made = [make_matrix(kind, outputs, 320, seed, bias=seed != 1) for seed, outputs in enumerate((70, 1, 48))]
    for rows in (17, 48):
        x = torch.randn(rows, 320).bfloat16()
        y = kernels.product(kind, x, [matrix for matrix, _ in made], result, activation)
        parts = [sums(kind, x, matrix, weight, result) for matrix, weight in made]
        if activation == "gelu":
            parts = [gelu(*part, result) for part in parts]
        assert_within(y, *(torch.cat(column, 1) for column in zip(*parts, strict=True)))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("outputs", [16, 37])
@pytest.mark.parametrize("result", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bf16", *KINDS])
def test_two_matrices_are_gated(kind, result, outputs, library):
    if library is None:
        return
    gate, up = (make_matrix(kind, outputs, 320, seed, bias=True) for seed in (0, 1))
    x = torch.randn(50, 320).bfloat16()
    y = kernels.product(kind, x, [gate[0], up[0]], result, "gated")
    first, first_bound = gelu(*sums(kind, x, *gate, torch.float32), torch.float32)
    second, second_bound = sums(kind, x, *up, torch.float32)
    bound = first.abs() * second_bound + second.abs() * first_bound + first_bound * second_bound
    assert_within(y, first * second, bound + (UNIT[result] + UNIT[torch.float32]) * ((first * second).abs() + bound))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["bf16", *KINDS])
def test_what_is_not_finite_reaches_its_row_or_its_output_only(kind, value, library):
    if library is None:
        return
    matrix, _ = make_matrix(kind, 40, 64)
    x = torch.randn(20, 64).bfloat16()
    x[3, 50] = value
    y = kernels.product(kind, x, [matrix], torch.float32)
    assert not y[3].isfinite().any()
    assert y[:3].isfinite().all() and y[4:].isfinite().all()
    if kind != "bf16":
        matrix.scales[0, 0, 5] = value
        y = kernels.product(kind, x[4:], [matrix], torch.float32)
        assert not y[:, 5].isfinite().any()
        assert y[:, :5].isfinite().all() and y[:, 6:].isfinite().all()


@pytest.mark.parametrize("kind", ["bf16", *KINDS])
def test_tiles_are_used_only_where_they_should_be(kind, library):
    if library is None:
        return
    matrix, weight = make_matrix(kind, 40, 64)

    def uses_tiles(rows: int, dtype: torch.dtype = torch.bfloat16) -> bool:
        before, x = library.emulated_products(), torch.randn(rows, 64).to(dtype)
        y = kernels.product(kind, x, [matrix], torch.float32)
        assert_within(y, x.double() @ weight.T, product_bound(x, weight, torch.float32, group=64))
        return library.emulated_products() > before

    assert not uses_tiles(15) and uses_tiles(16)
    assert kind == "bf16" or not uses_tiles(16, torch.float32)
    kernels.tuning(library).tile_rows = 40
    assert not uses_tiles(39) and uses_tiles(40)


def test_without_permission_the_other_kernels_compute(variants, tmp_path, monkeypatch):
    if variants("emulated tiles") is None:
        return
    monkeypatch.setenv("REFUSE_TILES", "1")
    copy = shutil.copy(variants("emulated tiles")._name, tmp_path / "another.so")  # permission is asked for once per library
    library = with_types(kernels.open_library(copy))
    monkeypatch.setattr(kernels, "library", lambda: library)
    for kind in ("bf16", *KINDS):
        matrix, weight = make_matrix(kind, 40, 64)
        x = torch.randn(50, 64).bfloat16()
        y = kernels.product(kind, x, [matrix], torch.float32)
        assert_within(y, x.double() @ weight.T, product_bound(x, weight, torch.float32, group=64))
    assert library.emulated_products() == 0 and library.emulated_fault() is None


def test_models_use_tiles_if_amx_is_named(library, monkeypatch):
    if library is None:
        return
    linear = extended(nn.Linear(64, 40).bfloat16().requires_grad_(False), fast_cpu.FastLinear)
    monkeypatch.setattr(fast_cpu, "bf16_instructions", lambda: "matrices")
    for name in ("avx512_bf16", "amx"):
        monkeypatch.setattr(kernels, "LOADED", [kernels.Loaded(library, name)])
        before = library.emulated_products()
        linear(torch.randn(2, 20, 64).bfloat16())
        assert (library.emulated_products() > before) == (name == "amx")


def compiled_program(folder: Path, *flags: str) -> Path | None:
    """IN_BOUNDS as a program; None if it does not compile with these flags."""
    # Without -O1, because AddressSanitizer makes optimising slow.
    shared = [flag for flag in QUICK_FLAGS if flag not in ("-shared", "-fPIC", "-O1")]
    program = folder / "program"
    command = [*compiling.find_compiler(), *shared, *TILES.flags, *flags, str(IN_BOUNDS), "-o", str(program)]
    return program if subprocess.run(command, capture_output=True, timeout=300).returncode == 0 else None


def test_tiles_stay_within_the_memory_they_are_given(tmp_path):
    if not compiling.find_compiler():
        return
    # A compiler may come without AddressSanitizer; the emulation's own checks are left then.
    program = compiled_program(tmp_path, "-fsanitize=address") or compiled_program(tmp_path)
    assert program is not None
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run([program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[:3000]
    assert int(done.stdout) > 1000


def test_the_real_instructions_compile(tmp_path):
    compiler = compiling.find_compiler()
    if not compiler or not X86:
        return
    made = tmp_path / "kernels.so"
    command = [*compiler, *QUICK_FLAGS, "-march=sapphirerapids", str(compiling.SOURCE), "-o", str(made)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[:3000]
    if shutil.which("objdump"):
        code = subprocess.run(["objdump", "-d", made], capture_output=True, text=True, timeout=300, check=True).stdout
        for name in ("ldtilecfg", "tileloadd", "tdpbf16ps", "tilestored", "tilerelease", "syscall"):
            assert name in code, f"{name} is missing in the compiled code."
