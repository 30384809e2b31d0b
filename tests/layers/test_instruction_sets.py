"""instruction_sets.py: what a processor has, is read from its flags; what PALIGEMMA_KERNELS allows."""

import pytest

from paligemma.errors import UsageError
from paligemma.layers import fast_cpu, instruction_sets
from paligemma.layers.instruction_sets import SETS, VARIABLE, allowed, available, bf16_instructions

AVX512 = {"avx2", "fma", "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
COOPER_LAKE = AVX512 | {"avx512_vnni", "avx512_bf16"}
PROCESSORS = {  # flags, available sets, bfloat16 products of torch
    "old": ({"sse4_2"}, ["generic"], "nothing"),
    "Haswell": ({"avx2", "fma"}, ["avx2", "generic"], "nothing"),
    "Alder Lake": ({"avx2", "fma", "avx_vnni"}, ["avx_vnni", "avx2", "generic"], "nothing"),
    "Skylake": (AVX512, ["avx512", "avx2", "generic"], "nothing"),
    "Cascade Lake": (AVX512 | {"avx512_vnni"}, ["avx512_vnni", "avx512", "avx2", "generic"], "nothing"),
    "Zen 4": (COOPER_LAKE, ["avx512_bf16", "avx512_vnni", "avx512", "avx2", "generic"], "pairs"),
    "Sapphire Rapids": (
        COOPER_LAKE | {"avx_vnni", "amx_tile", "amx_bf16", "amx_int8"},
        ["amx", "avx512_bf16", "avx512_vnni", "avx512", "avx_vnni", "avx2", "generic"],
        "matrices",
    ),
    "Graviton 2": ({"fp", "asimd"}, ["arm", "generic"], "nothing"),
    "Graviton 3": ({"fp", "asimd", "bf16", "i8mm"}, ["arm_bf16", "arm", "generic"], "matrices"),
    "not listed": (set(), ["native", "generic"], "matrices"),  # torch knows best
}


@pytest.fixture(params=PROCESSORS)
def processor(request, monkeypatch):
    flags, *rest = PROCESSORS[request.param]
    monkeypatch.setattr(instruction_sets, "cpu_flags", lambda: frozenset(flags))
    return rest


def test_what_a_processor_has_is_read_from_its_flags(processor):
    names, bf16 = processor
    assert [each.name for each in available()] == names
    assert bf16_instructions.__wrapped__() == bf16 and bf16 in fast_cpu.BF16_ROWS


def test_the_variable_is_an_upper_limit_and_amx_needs_to_be_named(processor, monkeypatch):
    names, _ = processor
    for value, expected in (
        ("", [name for name in names if name != "amx"]),
        ("amx", names),
        ("avx512", [name for name in names if not name.startswith(("amx", "avx512_"))]),
        ("generic", ["generic"]),
        ("off", []),
    ):
        monkeypatch.setenv(VARIABLE, value)
        assert [each.name for each in allowed()] == expected
    monkeypatch.delenv(VARIABLE)
    assert "amx" not in [each.name for each in allowed()]


@pytest.mark.parametrize("value", ["on", "AVX2", "avx512,avx2", " "])
def test_any_other_value_names_those_that_are_possible(monkeypatch, value):
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(UsageError) as caught:
        allowed()
    assert str(caught.value).startswith(f"PALIGEMMA_KERNELS is {value!r}. Take off, amx, avx512_bf16,") and caught.value.code == 2
    assert all(each.name in str(caught.value) for each in SETS)


def test_a_set_that_is_included_in_another_comes_after_it():
    for place, each in enumerate(SETS):
        assert not any(before.needs < each.needs for before in SETS[:place] if before.needs)


def test_flags_of_the_compiler_are_named_after_the_features():
    flags = {each.name: each.flags for each in SETS}
    assert {"-mavx512bf16", "-mavx512vnni", "-mamx-tile", "-mamx-bf16"} <= set(flags["amx"])
    assert flags["avx_vnni"] == ("-mtune=native", "-mavx2", "-mfma", "-mavxvnni", "-O1") and flags["generic"] == ("-O1",)
