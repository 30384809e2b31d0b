"""The time of one matrix product, by operator and number of rows: the reason for the choices in `fast_cpu.product`.

    python -m benchmarks.products --size 16384x2048

The product is x[B, X] @ W[O, X].T with W from a Gemma-2B layer. With one row (decoding), each weight is read once and used
once, so the time is bytes / read bandwidth. With 266 rows (a picture and a prompt), each weight is used 266 times, so the time
is multiply-adds / matrix rate. Between these two, each operator is best at the number of rows that it was written for. Each
line of the output has the median in ms, and the rate to compare with the floor: GB/s of weights for up to 8 rows, G
multiply-adds/s for more.

Several copies of W, together larger than any cache, are used one after the other, because decoding reads each layer's weights
only once per token. The operators take turns, so that a busy machine slows down all of them. The operators of torch and ours are:
    F.linear           the usual call, with oneDNN ("mkldnn") and without
    through float32    the weight is converted to float32, a few MB at a time, then sgemm
    ours               kernels.cpp: bfloat16 weights, int8, int4 (inputs rounded to 8 bits in groups); with PALIGEMMA_KERNELS=amx
                       also through tiles (inputs not rounded)
    torch int8         torch.ao.nn.quantized.dynamic, of fbgemm and oneDNN (inputs rounded to 8 bits with one scale)
    int8pack, int4pack torch._weight_int8pack_mm and _weight_int4pack_mm_for_cpu (inputs not rounded)
"""

import argparse
import time
import warnings
from collections.abc import Callable
from functools import partial

if __name__ == "__main__":  # --help and wrong flags are answered before the slow imports
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="16384x2048", help="outputs x inputs of W; the layers of Gemma-2B have 2048x2048, "
                        "256x2048, 16384x2048, 2048x16384, its output matrix 257216x2048")  # fmt: skip
    parser.add_argument("--rows", default="1,2,4,16,64,266")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="measure only operators whose name contains this")
    parser.add_argument("--save", action="store_true", help="store the JSON in results/CLASS/")
    options = parser.parse_args()

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# isort: off
from benchmarks import turns
from paligemma.layers import fast_cpu, int_formats, kernels
from paligemma.layers import quantization
# isort: on

COPIES_BYTES = 2**28  # size of all copies of a weight together: larger than the last-level cache
FEW_ROWS = 8  # up to this number of rows, the floor is the time to read the weights


def without_mkldnn(x: Tensor, w: Tensor) -> Tensor:
    with torch.backends.mkldnn.flags(enabled=False):
        return F.linear(x, w)


def torch_int8(w: Tensor, engine: str) -> Callable[[Tensor], Tensor]:
    torch.backends.quantized.engine = engine
    linear = nn.Linear(*reversed(w.shape), bias=False)
    linear.weight = nn.Parameter(w.float(), requires_grad=False)
    linear.qconfig = torch.ao.quantization.per_channel_dynamic_qconfig
    made = torch.ao.nn.quantized.dynamic.Linear.from_float(linear)
    return lambda x: made(x.float())


def int8_pack(w: Tensor) -> Callable[[Tensor], Tensor]:
    q, scales = int_formats.round_rows(w.float(), "int8")
    return lambda x: torch._weight_int8pack_mm(x, q, scales[:, 0])


def int4_pack(w: Tensor) -> Callable[[Tensor], Tensor]:
    q, scales = int_formats.round_rows(w.float(), "int4")
    packed = torch._convert_weight_to_int4pack_for_cpu((q + 8).int(), 1)
    scales_and_zeros = torch.stack((scales, torch.zeros_like(scales)), 2).transpose(0, 1).contiguous()
    return lambda x: torch._weight_int4pack_mm_for_cpu(x, packed, 32, scales_and_zeros)


def ours(w: Tensor, kind: str, has_tiles: bool = False) -> Callable[[Tensor], Tensor]:
    """Our product, with AMX or without."""
    if kind == "bf16":
        made = partial(kernels.product, "bf16", matrices=[(w, None, len(w))], dtype=torch.bfloat16)
    else:
        with torch.device("meta"):
            linear = nn.Linear(*reversed(w.shape), bias=False)
        made = quantization.quantize_module(linear, kind, {"weight": w})

    def multiply(x: Tensor) -> Tensor:
        if (library := kernels.library()) is not None:
            kernels.tuning(library).tile_rows = 1 if has_tiles else 2**62
        return made(x)

    return multiply


# name: (bytes per weight, largest number of rows to measure (more rows would take seconds), function from W to its product)
OPERATORS = {
    "F.linear bf16": (2, 266, lambda w: lambda x: F.linear(x, w)),
    "F.linear bf16, mkldnn off": (2, 16, lambda w: lambda x: without_mkldnn(x, w)),
    "bf16 through float32": (2, 266, lambda w: lambda x: fast_cpu.upcast_product(x, w)),
    "ours bf16": (2, 266, lambda w: ours(w, "bf16")),
    "ours bf16, tiles": (2, 266, lambda w: ours(w, "bf16", has_tiles=True)),
    "torch int8, fbgemm": (1, 266, lambda w: torch_int8(w, "fbgemm")),
    "torch int8, onednn": (1, 266, lambda w: torch_int8(w, "onednn")),
    "int8pack": (1, 16, int8_pack),
    "ours int8": (1, 266, lambda w: ours(w, "int8")),
    "ours int8, tiles": (1, 266, lambda w: ours(w, "int8", has_tiles=True)),
    "int4pack": (0.5625, 16, int4_pack),
    "ours int4": (0.5625, 266, lambda w: ours(w, "int4")),
    "ours int4, tiles": (0.5625, 266, lambda w: ours(w, "int4", has_tiles=True)),
}


def measure(ways: dict[str, list[Callable[[Tensor], Tensor]]], x: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of one product of each operator, measured alternately; each call uses the next copy of the weight."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(-1, rounds):  # the first round warms up
        for name, copies in ways.items():
            start = time.perf_counter()
            for copy in copies:
                copy(x)
            if i >= 0:
                seconds[name].append((time.perf_counter() - start) / len(copies))
    return seconds


def main(options: argparse.Namespace) -> None:
    warnings.simplefilter("ignore")  # torch warns at every call that its int8 layers are deprecated
    options.device, options.script, options.model = "cpu", "products", None
    n, k = (int(size) for size in options.size.split("x"))
    names = [name for name in OPERATORS if (options.only or "") in name]
    if kernels.library() is None:
        names = [name for name in names if name != "ours bf16"]
    if kernels.load()[0].name != "amx":
        names = [name for name in names if not name.endswith(", tiles")]
    torch.manual_seed(0)
    floors = turns.Floors("cpu")
    weights = torch.randn(n, k).mul_(0.02).bfloat16()
    with torch.inference_mode(False), torch.no_grad():
        made = {}
        for name in names:
            size, _, make = OPERATORS[name]
            made[name] = [make(weights.clone()) for _ in range(max(1, round(COPIES_BYTES / (n * k * size))))]
        results = {}
        for rows in (int(part) for part in options.rows.split(",")):
            x = torch.randn(rows, k).bfloat16()
            ways = {name: made[name] for name in names if rows <= OPERATORS[name][1]}
            seconds = measure(ways, x, options.rounds)
            floors.measure()
            print(f"\n{rows} rows, {n} x {k}; {floors.document()}")
            print(f"{'':28}{'median ms':>10}{'spread':>18}" + (f"{'GB/s':>8}" if rows <= FEW_ROWS else f"{'Gmadd/s':>9}"))
            results[rows] = {}
            for name, values in seconds.items():
                row = {"ms": turns.spread([value * 1e3 for value in values])}
                row["GB_per_s"] = float(f"{n * k * OPERATORS[name][0] / row['ms']['median'] / 1e6:.3g}")
                row["Gmadd_per_s"] = float(f"{rows * n * k / row['ms']['median'] / 1e6:.3g}")
                rate = row["GB_per_s"] if rows <= FEW_ROWS else row["Gmadd_per_s"]
                print(f"{name:28}{row['ms']['median']:10.4g}{row['ms']['low']:9.4g} ..{row['ms']['high']:6.4g}{rate:9.4g}")
                results[rows][name] = row
    turns.finish(options, {"size": [n, k], "floors": floors.document(), "rows": results})


if __name__ == "__main__":
    main(options)
