"""Prints the numbers of decoding.md and draws its first figure, without measuring: `python -m notes.decoding_figures`.

roofline.svg  the time of one matrix product of the decoder against the number of rows, from products.json in benchmarks/results/
"""

import argparse
from pathlib import Path

if __name__ == "__main__":  # --help and wrong flags are answered before the slow imports
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()

import torch

from notes.tables import model_config
from paligemma import roofline
from paligemma.checkpoints.weights import empty_model
from paligemma.configuration import PaliGemmaConfig
from paligemma.files import read_json
from paligemma.layers import int_formats, quantization
from paligemma.svg import BLUE, GREEN, ORANGE, PURPLE, SOFT, Axes, Drawing

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = ROOT / "benchmarks" / "results" / "avx512_vnni" / "products.json"
CURVES = {"F.linear bf16": ORANGE, "ours bf16": BLUE, "ours int8": GREEN, "ours int4": PURPLE}
PROMPT, ANSWER = 266, 20  # tokens


def count_work(config: PaliGemmaConfig) -> None:
    """Prints the bytes and multiply-adds of one token and of one prompt, counted on the meta device (shapes without memory)."""
    for kind in (None, *int_formats.KINDS):
        model = empty_model(config).to(torch.bfloat16)
        for name in quantization.targets(model) if kind else ():
            model.set_submodule(name, quantization.empty_module(model.get_submodule(name), kind))
        weights = roofline.decode_bytes(model.language_model)
        products = roofline.prefill_multiply_adds(config, 0, 1)
        print(f"one token, {kind or 'bf16'}: {weights / 1e9:.2f} GB read, {products / 1e9:.2f} G multiply-adds, "
              f"{products / weights:.1f} per byte")  # fmt: skip
    products = roofline.prefill_multiply_adds(config, 1, PROMPT)
    print(f"one picture and prompt, {PROMPT} tokens: {products / 1e9:.0f} G multiply-adds")
    cached = roofline.prefill_multiply_adds(config, 1, PROMPT) + (ANSWER - 1) * roofline.prefill_multiply_adds(config, 0, 1)
    plain = sum(roofline.prefill_multiply_adds(config, 0 if i else 1, PROMPT + i) for i in range(ANSWER))
    repeated = sum(roofline.prefill_multiply_adds(config, 1, PROMPT + i) for i in range(ANSWER))
    print(
        f"an answer of {ANSWER} tokens: {cached / 1e9:.0f} G multiply-adds with a cache, {plain / cached:.0f} times as many "
        f"without, {repeated / cached:.0f} times with the vision tower in every step as well"
    )


def draw_roofline() -> None:
    document = read_json(RESULTS)
    weights = document["size"][0] * document["size"][1]
    counts = [int(rows) for rows in document["rows"]]
    floors = document["floors"]
    reading = weights * 2 / floors["read_GB_per_s"] / 1e6  # ms for bfloat16
    multiplying = weights / max(floors["float32_Gmadd_per_s"], floors["bfloat16_Gmadd_per_s"]) / 1e6  # ms per row
    drawing = Drawing(720, 400)
    axes = Axes(drawing, (60, 50, 580, 340), x=(1, counts[-1]), y=(0.3, 400), is_log=(True, True))
    axes.frame(counts, [0.3, 1, 3, 10, 30, 100, 300], "rows at once (1 = decoding, 266 = picture and prompt)", "milliseconds")
    axes.curve([(rows, max(reading, rows * multiplying)) for rows in range(1, counts[-1] + 1)], SOFT, "5 4")
    ends = [(axes.at(counts[-1], counts[-1] * multiplying)[1], "floor of bf16", SOFT)]
    for name, color in CURVES.items():
        points = [(rows, document["rows"][str(rows)][name]["ms"]["median"]) for rows in counts]
        axes.curve(points, color)
        for point in points:
            drawing.dot(*axes.at(*point), color, 3)
        ends.append((axes.at(*points[-1])[1], name, color))
    drawing.labels(axes.box[2] + 8, ends)
    drawing.save(HERE / "roofline.svg")


if __name__ == "__main__":
    count_work(model_config("PaliGemma 3B"))
    draw_roofline()
