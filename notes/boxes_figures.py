"""Draws the figure of boxes and their scores: `python notes/boxes_figures.py`. Measures nothing.

scores.svg  precision against recall of the demo checkpoint's boxes, with and without scores, from
            benchmarks/results/detection.json: python demo/evaluate.py | tail -1 > benchmarks/results/detection.json
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from svg import BLUE, ORANGE, SOFT, Axes, Drawing  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "detection.json"
IOU = "0.75"
CURVES = {
    "scores_and_expected": ("expected boxes, with scores", BLUE),
    "scores": ("boxes as said, with scores", ORANGE),
    "plain": ("boxes as said, no scores", SOFT),
}
TICKS = [0, 0.2, 0.4, 0.6, 0.8, 1]


def draw_scores() -> None:
    detection = json.loads(RESULTS.read_text(encoding="utf-8"))["detection"]
    drawing = Drawing(640, 400)
    axes = Axes(drawing, (60, 50, 610, 340), x=(0, 1), y=(0, 1))
    axes.frame(TICKS, TICKS, f"recall: share of the {detection['true_boxes']} boxes that are found, IoU {IOU} and more",
               "precision: share of right ones among the boxes that are kept")  # fmt: skip
    legend = []
    for name, (words, color) in CURVES.items():
        points = [(i / 100, precision) for i, precision in enumerate(detection["curves"][name][IOU])]
        axes.curve([point for point in points if point[1] > 0], color)
        legend.append((axes.at(0, 0.36)[1] + 17 * len(legend), f"{words}: mAP {detection['map'][name]:.3f}", color))
    drawing.labels(axes.box[0] + 20, legend)
    drawing.save(HERE / "scores.svg")


if __name__ == "__main__":
    draw_scores()
