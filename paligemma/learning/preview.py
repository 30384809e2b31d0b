"""A page of examples as they will be learned, boxes and masks drawn from their tokens.

Checked in tests/programs/test_finetune.py.
"""

import math
from pathlib import Path

from PIL import Image, ImageOps

from paligemma.learning.dataset import Examples, spread
from paligemma.objects import drawing
from paligemma.objects.lettering import lettering
from paligemma.objects.mask_codec import MaskCodec, with_masks
from paligemma.objects.outputs import parse_text

MOST, COLUMNS = 12, 4  # pictures on the page, and side by side
SIDE, LINE = 336, 20  # pixels of a picture's field and of a line of text below it
LETTERS = 48  # of a line


def draw_preview(examples: Examples, codec: MaskCodec | None, file: Path) -> None:
    """Draws examples from all over the file, augmented as they will be. Raises: OutputError.

    Args:
        codec: decodes masks, if there is one.
    """
    shown_lines = spread(len(examples.lines), MOST)
    count = len(shown_lines)
    columns = min(COLUMNS, count)
    page = Image.new("RGB", (columns * SIDE, math.ceil(count / columns) * (SIDE + 2 * LINE + 8)), "white")
    for number, line in enumerate(shown_lines):
        picture, prefix, suffix = examples[0, line]
        objects = parse_text(suffix).objects
        if codec is not None:
            objects = with_masks(objects, codec, *picture.size)
        shown = ImageOps.contain(drawing.draw(picture, objects), (SIDE - 8, SIDE - 8))
        x, y = number % columns * SIDE, number // columns * (SIDE + 2 * LINE + 8)
        page.paste(shown, (x + 4, y + 4))
        answer = " ; ".join(found.label for found in objects) if objects else suffix or "(nothing)"
        for row, text in enumerate((prefix, answer)):
            place = x + 6, y + SIDE + row * LINE
            lettering().write(page, place, drawing.clean(text)[:LETTERS], 13, "black" if row else "#555555")
    drawing.save(page, file)
