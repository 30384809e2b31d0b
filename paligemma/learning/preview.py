"""A page of training examples as the model will see them: boxes and masks are drawn from the tokens of the answers.

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

MAX_PICTURES, COLUMNS = 12, 4
SIDE, LINE = 336, 20  # in pixels: side of the square for a picture; height of a line of text below this square
MAX_LETTERS = 48  # in a line of text


def draw_preview(examples: Examples, codec: MaskCodec | None, file: Path) -> None:
    """Draws examples that are spread evenly over the data, augmented as in the first epoch. Raises: OutputError.

    Args:
        codec: decodes masks; None if there is no codec.
    """
    indices = spread(len(examples.items), MAX_PICTURES)
    count = len(indices)
    columns = min(COLUMNS, count)
    page = Image.new("RGB", (columns * SIDE, math.ceil(count / columns) * (SIDE + 2 * LINE + 8)), "white")
    for number, index in enumerate(indices):
        picture, prefix, suffix = examples[0, index]
        objects = parse_text(suffix).objects
        if codec is not None:
            objects = with_masks(objects, codec, *picture.size)
        shown = ImageOps.contain(drawing.draw(picture, objects), (SIDE - 8, SIDE - 8))
        x, y = number % columns * SIDE, number // columns * (SIDE + 2 * LINE + 8)
        page.paste(shown, (x + 4, y + 4))
        answer = " ; ".join(obj.label for obj in objects) if objects else suffix or "(nothing)"
        for row, text in enumerate((prefix, answer)):
            position = x + 6, y + SIDE + row * LINE
            lettering().write(page, position, drawing.clean(text)[:MAX_LETTERS], 13, "black" if row else "#555555")
    drawing.save(page, file)
