"""Draws the figures of boxes.md and prints its numbers: `python -m notes.boxes_figures`.

scores.svg  precision against recall of the demo checkpoint's boxes, with and without scores. The numbers are read from
            benchmarks/results/detection.json, the output of: python -m demo.evaluate | tail -1
codec.png   the masks of three shapes, their codes, and the masks that the codec decodes from the codes

A coordinate is generated (the token with the highest probability) or expected (the mean of all 1024 locations, weighted by their
probabilities).
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if __name__ == "__main__":  # --help and wrong flags are answered before the slow imports
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()

from demo import shapes
from paligemma.files import read_json
from paligemma.learning.scores import mask_iou
from paligemma.objects.mask_codec import load_codec
from paligemma.objects.masks import crop, paste
from paligemma.objects.outputs import NormalizedBox, ParsedObject, parse_text, to_suffix
from paligemma.svg import BLUE, ORANGE, SOFT, Axes, Drawing

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = ROOT / "benchmarks" / "results" / "detection.json"
IOU = "0.75"
CURVES = {
    "scores_and_expected": ("boxes of mean coordinates, with scores", BLUE),
    "scores": ("generated boxes, with scores", ORANGE),
    "plain": ("generated boxes, no scores", SOFT),
}
TICKS = [0, 0.2, 0.4, 0.6, 0.8, 1]


def draw_scores() -> None:
    detection = read_json(RESULTS)["detection"]
    drawing = Drawing(640, 400)
    axes = Axes(drawing, (60, 50, 610, 340), x=(0, 1), y=(0, 1))
    axes.frame(TICKS, TICKS, f"recall: share of the {detection['true_boxes']} boxes that are found, IoU {IOU} or more",
               "precision: share of right boxes among the boxes that are kept")  # fmt: skip
    legend = []
    for name, (title, color) in CURVES.items():
        points = [(i / 100, precision) for i, precision in enumerate(detection["curves"][name][IOU])]
        axes.curve([point for point in points if point[1] > 0], color)
        legend.append((axes.at(0, 0.36)[1] + 17 * len(legend), f"{title}: mAP {detection['map'][name]:.3f}", color))
    drawing.labels(axes.box[0] + 20, legend)
    drawing.save(HERE / "scores.svg")


def examples() -> list[tuple[shapes.Shape, np.ndarray, NormalizedBox]]:
    """Three shapes with their masks, bool[448, 448], and boxes."""
    kinds = {"star": (0.2, 0.3, 0.36), "heart": (0.5, 0.1, 0.3), "cross": (0.12, 0.55, 0.25)}
    found = []
    for kind, (x, y, side) in kinds.items():
        shape = shapes.Shape(kind, "red", shapes.COLORS["red"], x, y, side)
        found.append((shape, shapes.silhouette(shape, 448), NormalizedBox.from_locations(shape.box, denominator=1)))
    return found


def draw_codec() -> None:
    """Draws codec.png: for each shape its mask, the 64 x 64 crop, the sixteen codes and the decoded mask. Prints the overlaps."""
    import torch

    codec = load_codec(ROOT / "paligemma" / "bundled" / "vae-oid.npz")
    side, gap = 176, 12
    page = Image.new("RGB", (4 * side + 5 * gap, 3 * side + 4 * gap), "white")
    pen = ImageDraw.Draw(page)
    for row, (shape, mask, box) in enumerate(examples()):
        cropped = crop(mask, box)
        codes = codec.encode(torch.from_numpy(cropped)[None])
        decoded = codec.decode(codes)[0].detach().numpy()
        pasted = paste(decoded, box, *mask.shape)
        found = ParsedObject(shape.kind, box, codes=tuple(codes[0].tolist()))
        suffix = to_suffix([found])
        assert parse_text(suffix).objects[0].codes == found.codes
        print(f"{suffix}\n  overlap of the decoded mask with the true mask: IoU {mask_iou(pasted, mask):.3f}")
        top = gap + row * (side + gap)
        for column, values in ((0, mask), (1, cropped), (3, decoded / 2 + 0.5)):
            levels = Image.fromarray((np.clip(values, 0, 1) * 255).astype(np.uint8))
            page.paste(levels.resize((side, side), Image.Resampling.NEAREST), (gap + column * (side + gap), top))
        left = gap + 2 * (side + gap)
        for index, code in enumerate(found.codes):
            x, y = left + index % 4 * side // 4, top + index // 4 * side // 4
            pen.rectangle([x, y, x + side // 4 - 2, y + side // 4 - 2], fill="#e8eef6")
            pen.text((x + side // 8, y + side // 8), str(code), "#222222", ImageFont.load_default(15), anchor="mm")
    page.save(HERE / "codec.png", optimize=True)


def main() -> None:
    numbers = read_json(RESULTS)["detection"]
    precision = numbers["map"]
    print(f"mAP {precision['plain']:.3f} without scores, {precision['scores']:.3f} with, {precision['scores_and_expected']:.3f} "
          "with expected coordinates")  # fmt: skip
    print(f"mean error of a coordinate, in thousandths of the picture's side: {numbers['bin_error'] * 1e3:.2f} generated, "
          f"{numbers['expected_error'] * 1e3:.2f} expected")  # fmt: skip
    draw_scores()
    draw_codec()


if __name__ == "__main__":
    main()
