"""Draws the architecture of PaliGemma 3B at 224 pixels: `python -m notes.architecture_figures`.

architecture.svg  the modules of the model and the shapes of the tensors between them

All numbers come from the code: the script builds the model on torch's meta device (shapes without memory), sends a picture and a
prompt through its modules, and reads the shapes of the results and the numbers of parameters.
"""

import argparse
from pathlib import Path

if __name__ == "__main__":  # --help and wrong flags are answered before the slow imports
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()

import torch
from torch import Tensor, nn

from notes.tables import model_config
from paligemma.checkpoints.weights import empty_model
from paligemma.svg import BLUE, FAINT, GREEN, INK, ORANGE, PURPLE, SOFT, Drawing

HERE = Path(__file__).resolve().parent
NAME = "PaliGemma 3B"
PROMPT = ["<bos>", "caption", "en", "\\n"]
LEFT, RIGHT, WIDTH = 20, 420, 350  # pixels: the left edges of the two columns of boxes, and the width of a box
CELL = 26


def box(drawing: Drawing, x: float, y: float, title: str, lines: list[str], color: str, width: float = WIDTH) -> float:
    """Draws a module as a box with a coloured edge; returns the y of its lower edge."""
    height = 30 + 17 * len(lines)
    drawing.rect(x, y, width, height, "#fafafa", FAINT)
    drawing.rect(x, y, 5, height, color)
    drawing.text(x + 16, y + 21, title, size=14)
    for number, line in enumerate(lines):
        drawing.text(x + 16, y + 39 + 17 * number, line, size=12, fill=SOFT)
    return y + height


def arrow(drawing: Drawing, x: float, top: float, bottom: float, words: str = "", color: str = INK) -> None:
    """Draws an arrow downwards, with words to its right."""
    drawing.line([(x, top), (x, bottom)], color, 1.2)
    drawing.line([(x - 4, bottom - 6), (x, bottom), (x + 4, bottom - 6)], color, 1.2)
    drawing.text(x + 10, (top + bottom) / 2 + 4, words, size=12)


def shape(tensor: Tensor) -> str:
    return f"[{', '.join(map(str, tensor.shape))}]"


def size(module: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:,.0f} M parameters"


@torch.no_grad()
def draw_architecture() -> None:
    config = model_config(NAME)
    model, vision, text = empty_model(config), config.vision_config, config.text_config
    pixel_values = torch.empty(1, 3, vision.image_size, vision.image_size, device="meta")  # [B, C, H, W]
    patches = model.vision_tower(pixel_values)  # [B, P, D]
    features = model.multi_modal_projector(patches)  # [B, P, D]
    input_ids = torch.zeros(1, config.num_image_tokens + len(PROMPT), dtype=torch.long, device="meta")  # [B, L]
    embeds = model.language_model.model.embed_tokens(input_ids)  # [B, L, D]
    logits = model.language_model.logits(embeds[:, -1])  # [B, V]

    drawing = Drawing(RIGHT + WIDTH + 40, 626)
    left, right, centre = LEFT + 150, RIGHT + 50, LEFT + 300  # x of the arrows
    drawing.text(LEFT, 24, "a picture of any size", size=14)
    arrow(drawing, left, 34, 76, f"resize, scale to [-1, 1]: {shape(pixel_values)}")
    bottom = box(
        drawing, LEFT, 76, "SigLIP vision tower · modeling_siglip.py",
        [f"{patches.shape[1]} patches of {vision.patch_size} x {vision.patch_size} pixels; {vision.num_hidden_layers} layers of",
         f"attention ({vision.num_attention_heads} heads) and MLP (width {vision.intermediate_size})",
         size(model.vision_tower)], BLUE,
    )  # fmt: skip
    arrow(drawing, left, bottom, bottom + 36, f"one vector per patch: {shape(patches)}")
    title = "projector · modeling_paligemma.py"
    bottom = box(drawing, LEFT, bottom + 36, title, [f"one linear layer, {size(model.multi_modal_projector)}"], GREEN)
    arrow(drawing, left, bottom, 318, f"image_features {shape(features)}", BLUE)

    drawing.text(RIGHT, 24, "the prompt “caption en”", size=14)
    arrow(drawing, right, 34, 76, f"tokenizer: input_ids {shape(input_ids)}")
    bottom = box(
        drawing, RIGHT, 76, "processor · processing_paligemma.py",
        [f"row: <image> x {config.num_image_tokens}, then {', '.join(PROMPT)}",
         f"P1 to P{config.num_image_tokens} take the places of the <image> tokens"], PURPLE,
    )  # fmt: skip
    arrow(drawing, right, bottom, bottom + 36)
    bottom = box(
        drawing, RIGHT, bottom + 36, "embedding · modeling_gemma.py",
        [f"one of {text.vocab_size:,} vectors, times the square root of {text.hidden_size}"], ORANGE,
    )  # fmt: skip
    arrow(drawing, right, bottom, 318, f"one vector per token: {shape(embeds)}", ORANGE)

    cells = ["P1", "P2", "P3", "...", f"P{config.num_image_tokens}", *PROMPT]
    widths = [52] * 5 + [len(word) * 7 + 18 for word in PROMPT]
    x = LEFT + 100
    drawing.text(x - 8, 339, "inputs_embeds", anchor="end", size=12)
    for number, (word, width) in enumerate(zip(cells, widths, strict=True)):
        drawing.rect(x, 322, width - 2, CELL, "#dce8f6" if number < 5 else "#f8e4d2")
        drawing.text(x + width / 2 - 1, 339, word, anchor="middle", size=12)
        x += width
    drawing.text(x + 6, 339, shape(embeds), size=12)
    arrow(drawing, centre, 350, 388, "prefix-LM mask: picture and prompt attend to each other in both directions")
    attention = f"{text.num_attention_heads} query heads of width {text.head_dim}, {text.num_key_value_heads} key/value head"
    wide = RIGHT + WIDTH - LEFT
    bottom = box(
        drawing, LEFT, 388, "Gemma decoder · modeling_gemma.py",
        [f"{text.num_hidden_layers} layers of attention ({attention}) and gated MLP (width {text.intermediate_size})",
         "the KV cache keeps the keys and values of every token, so that each is computed once",
         f"{size(model.language_model)} with the embedding, which is also the output matrix"], ORANGE, wide,
    )  # fmt: skip
    arrow(drawing, centre, bottom, bottom + 36, f"logits of the next token: {shape(logits)}")
    bottom = box(
        drawing, LEFT, bottom + 36, "next token · generation.py", ["the most likely one (greedy), or a random draw"], GREEN, wide
    )
    arrow(drawing, centre, bottom, bottom + 28)
    drawing.text(centre, bottom + 46, "“a”, “red”, “heart”, <eos>", anchor="middle", size=14)
    side, low, high = LEFT + wide, bottom - 24, 430
    drawing.line([(side, low), (side + 26, low), (side + 26, high), (side + 4, high)], SOFT, 1.2, "4 3")
    drawing.line([(side + 10, high - 4), (side + 3, high), (side + 10, high + 4)], SOFT, 1.2)
    drawing.text(side - 14, low + 4, "until <eos>, each token is fed back", anchor="end", size=12, fill=SOFT)
    drawing.save(HERE / "architecture.svg")


if __name__ == "__main__":
    draw_architecture()
