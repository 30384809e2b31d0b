"""Draws results/CLASS/speed.svg from the stored JSON, for each class of processors that was measured.

    python -m benchmarks.plot

There is a panel per benchmark, a bar per side, and a mark at the floor (the best possible). Shorter bars are better. This script
measures nothing; results/CLASS/*.json contain the command and the machine of each measurement.
"""

import argparse
from itertools import zip_longest
from pathlib import Path

from paligemma.files import read_json
from paligemma.svg import BLUE, GREEN, INK, ORANGE, PURPLE, SOFT, Axes, Drawing

HERE = Path(__file__).resolve().parent
COLORS = {"transformers": ORANGE, "ours bf16": BLUE, "ours int8": GREEN, "ours int4": PURPLE}
WIDTH, PANEL = 820, 390  # pixels: width of the sheet, and of a panel
ROW, LEFT = 22, 180  # pixels: height of a bar with its gap, and the left end of the bars in a panel


def color(name: str) -> str:
    return next((tint for prefix, tint in COLORS.items() if name.startswith(prefix)), SOFT)


def read(folder: Path, name: str) -> dict | None:
    path = folder / f"{name}.json"
    return read_json(path) if path.exists() else None


def panels(folder: Path) -> list[tuple[str, dict[str, tuple[float, float | None]]]]:
    """For each panel its title and, for each side, (value, floor)."""
    found = []
    if decode := read(folder, "decode"):
        rows = {name: (row["ms"]["median"], row.get("floor")) for name, row in decode["ways"].items()}
        found.append(("Decoding, ms per token", rows))
    if llama := read(folder, "llama"):
        rows = {name: (row["ms"]["median"], row.get("floor")) for name, row in llama["ways"].items()}
        found.append(("Decoding, compared with llama.cpp, ms per token", rows))
    if peers := read(folder, "peers"):
        rows = {name.partition(",")[0]: (row["ms"]["median"], row.get("floor")) for name, row in peers["ways"].items()}
        found.append(("Decoding, compared with other libraries, ms per token", rows))
    if prefill := read(folder, "prefill"):
        rows = {name: (row["ms"]["median"] / 1e3, row.get("floor", 0) / 1e3 or None) for name, row in prefill["whole"].items()}
        found.append((f"Prefill, one picture of {prefill['image_size']} px, s", rows))
    if start := read(folder, "start"):
        found.append(
            ("Process start to first token, s", {name: (row["s"]["median"], None) for name, row in start["ways"].items()})
        )
    if memory := read(folder, "memory"):
        rows = {name: (row["peak_GB"], row.get("weights_GB")) for name, row in memory["ways"].items() if "," not in name}
        found.append(("Peak memory, GB (mark: the weights)", rows))
    if batch := read(folder, "batch"):
        rows = {name: (1 / rate, None) for name, rate in batch["best_pictures_per_s"].items()}
        found.append(("Captions of many pictures, s per picture, best batch", rows))
    return found


def draw_bars(sheet: Drawing, x: float, y: float, title: str, rows: dict[str, tuple[float, float | None]]) -> None:
    """Draws one panel: name, bar, number, and a dark mark at the floor."""
    room = PANEL - LEFT - 50
    longest = max(value for value, _ in rows.values())
    sheet.text(x, y, title, size=14)
    for i, (name, (value, floor)) in enumerate(rows.items()):
        top = y + 12 + ROW * i
        sheet.text(x, top + 13, name, size=11)
        sheet.rect(x + LEFT, top, room * value / longest, ROW - 6, color(name))
        sheet.text(x + LEFT + room * value / longest + 5, top + 13, f"{value:.3g}", size=11, fill=SOFT)
        if floor is not None:
            sheet.rect(x + LEFT + room * floor / longest - 1, top - 2, 2, ROW - 2, INK)


def draw_growth(sheet: Drawing, x: float, y: float, growth: dict, phase: str) -> None:
    """Draws time against context, on logarithmic axes."""
    lines = {
        name: [(run["tokens"], run[phase][name]["ms"]["median"]) for run in growth["context"]]
        for name in growth["context"][0][phase]
    }
    values = [value for points in lines.values() for _, value in points]
    low, high = min(values) / 1.3, max(values) * 1.3
    tokens = [run["tokens"] for run in growth["context"]]
    box = (x + 55, y + 30, x + PANEL - 25, y + 190)
    axes = Axes(sheet, box, (min(tokens), max(tokens)), (low, high), (True, True))
    ticks = [step * 10**power for power in range(-2, 7) for step in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high][:: 1 if high / low < 50 else 3]
    axes.frame(tokens, ticks, "tokens of picture and prompt", f"{phase.capitalize()} against context, one layer, ms")
    for name, points in lines.items():
        axes.curve(points, color(name))
        for point in points:
            sheet.dot(*axes.at(*point), color(name), 3)


def draw(folder: Path) -> Path:
    """Draws the measurements in a folder. Returns the file of the drawing."""
    bars, growth = panels(folder), read(folder, "growth")
    sheet, y = Drawing(WIDTH, 0), 30
    for left, right in zip_longest(bars[::2], bars[1::2]):
        draw_bars(sheet, 10, y, *left)
        if right:
            draw_bars(sheet, WIDTH / 2 + 10, y, *right)
        y += 40 + ROW * max(len(panel[1]) for panel in (left, right) if panel)
    if growth:
        draw_growth(sheet, 10, y, growth, "prefill")
        draw_growth(sheet, WIDTH / 2 + 10, y, growth, "decode")
        y += 240
    sheet.height = y
    path = folder / "speed.svg"
    sheet.save(path)
    return path


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for decode in sorted((HERE / "results").glob("*/decode.json")):
        print(draw(decode.parent))


if __name__ == "__main__":
    main()
