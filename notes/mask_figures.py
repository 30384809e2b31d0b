"""Draws the figures of mask.md and prints its numbers: `python -m notes.mask_figures`. It takes half a minute on one core.

mask.svg       the result of prefix_lm_mask (modeling_paligemma.py) for one short row
influence.svg  measured: one input token of a small random model is changed, and every position whose logits change is marked
leak.svg       measured: a small model is trained on random answers, once with and once without a border

The border separates the prompt from the answer. token_type_ids mark it: 0 for picture and prompt, 1 for the answer.
"""

import argparse
import math
from pathlib import Path

if __name__ == "__main__":  # --help and wrong flags are answered before the slow imports
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()

import torch
from torch import Tensor

from paligemma.configuration import GemmaConfig, PaliGemmaConfig, SiglipVisionConfig
from paligemma.generation import generate
from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration, prefix_lm_mask, suffix_loss
from paligemma.svg import BLUE, FAINT, ORANGE, SOFT, Axes, Drawing
from paligemma.vocabulary import IGNORE_INDEX

HERE = Path(__file__).resolve().parent
ROW = ["<image>", "<image>", "<image>", "<image>", "<bos>", "caption", "en", "\\n", "a", "red", "heart"]
PREFIX = 8  # tokens of ROW before the answer
IMAGE, WORDS = 40, 16  # id of <image>; number of different words in the random answers
CELL = 24
BATCH, PROMPT, ANSWER, STEPS = 32, 4, 6, 240
BORDERS = {  # name: values of token_type_ids
    "prefix-LM": "0 for picture and prompt, 1 for the answer",
    "causal": "1 everywhere",
    "no border": "0 everywhere",
}


def small_model(seed: int) -> PaliGemmaForConditionalGeneration:
    """A model with two layers and four image tokens, and weights large enough to make every effect visible."""
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = GemmaConfig(
        vocab_size=48, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    model = PaliGemmaForConditionalGeneration(PaliGemmaConfig(vision, text, image_token_index=IMAGE))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                scale = 0.1 if "embed_tokens" in name else parameter[0].numel() ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * scale)
    return model


def types_for(border: str, length: int, prefix: int) -> Tensor:
    """token_type_ids int64[1, L] for one of BORDERS."""
    is_answer = torch.arange(length) >= prefix
    return {"prefix-LM": is_answer, "causal": is_answer | True, "no border": is_answer & False}[border].long()[None]


def draw_grid(drawing: Drawing, left: float, top: float, cells: Tensor, color: str) -> None:
    """One square per cell of bool[L, L]; coloured where it is True."""
    for i, row in enumerate(cells.tolist()):
        for j, is_set in enumerate(row):
            drawing.rect(left + j * CELL, top + i * CELL, CELL - 2, CELL - 2, color if is_set else FAINT)


def draw_mask() -> None:
    length = len(ROW)
    mask = prefix_lm_mask(torch.ones(1, length), types_for("prefix-LM", length, PREFIX))[0, 0]  # [L, L]
    left, top = 90, 92
    drawing = Drawing(left + length * CELL + 210, top + length * CELL + 16)
    draw_grid(drawing, left, top, mask, BLUE)
    for i, word in enumerate(ROW):
        drawing.text(left - 8, top + i * CELL + 16, word, anchor="end")
        drawing.text(left + i * CELL + 15, top - 8, word, turn=-60)
    edge = PREFIX * CELL - 1
    drawing.line([(left, top + edge), (left + length * CELL, top + edge)], ORANGE, 2)
    drawing.line([(left + edge, top), (left + edge, top + length * CELL)], ORANGE, 2)
    right = left + length * CELL + 14
    drawing.text(right, top + 80, "picture and prompt:")
    drawing.text(right, top + 98, "attend to each other")
    drawing.text(right, top + edge + 34, "answer: attends to the")
    drawing.text(right, top + edge + 52, "prompt and to itself so far")
    drawing.save(HERE / "mask.svg")


@torch.no_grad()
def influence(border: str) -> Tensor:
    """bool[L, L]: whether the logits of position i change when the token at position j changes. The mask itself is not read."""
    model, length = small_model(seed=0).eval(), len(ROW)
    draw = torch.Generator().manual_seed(1)
    pictures = ROW.count("<image>")
    ids = torch.randint(3, IMAGE, (1, length), generator=draw)  # [1, L]
    ids[:, :pictures] = IMAGE
    features = torch.randn(1, pictures, 64, generator=draw)  # [1, P, D]
    types = types_for(border, length, PREFIX)
    before = model(ids, token_type_ids=types, image_features=features)[0]  # [L, V]
    changed = []
    for j in range(length):
        other_ids, other_features = ids.clone(), features.clone()
        if j < pictures:
            other_features[0, j] += 1
        else:
            other_ids[0, j] = 3 + (ids[0, j] - 2) % (IMAGE - 3)
        after = model(other_ids, token_type_ids=types, image_features=other_features)[0]  # [L, V]
        changed.append((after != before).any(-1))
    return torch.stack(changed, dim=1)


def draw_influence() -> None:
    length, gap, top = len(ROW), 28, 58
    drawing = Drawing(3 * (length * CELL + gap) + gap, top + length * CELL + 20)
    for index, (border, setting) in enumerate(BORDERS.items()):
        cells = influence(border)
        left = gap + index * (length * CELL + gap)
        draw_grid(drawing, left, top, cells, BLUE)
        edge = PREFIX * CELL - 1
        drawing.line([(left, top + edge), (left + length * CELL, top + edge)], ORANGE, 2)
        drawing.line([(left + edge, top), (left + edge, top + length * CELL)], ORANGE, 2)
        drawing.text(left, top - 30, border, size=15)
        drawing.text(left, top - 11, setting, size=12, fill=SOFT)
        answer, prefix = cells[PREFIX:, PREFIX:].triu(1).sum(), cells[:PREFIX, :PREFIX].triu(1).sum()
        print(
            f"{border:9}  pairs in which the later token changes the earlier logits: answer {int(answer)} of 3, "
            f"picture and prompt {int(prefix)} of {PREFIX * (PREFIX - 1) // 2}"
        )
    drawing.save(HERE / "influence.svg")


def random_batch(draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of random prompts and random answers: input_ids and labels int64[B, L], picture vectors [B, P, D]."""
    ids = torch.randint(3, 3 + WORDS, (BATCH, 4 + PROMPT + ANSWER), generator=draw)
    ids[:, :4] = IMAGE
    labels = ids.clone()
    labels[:, : 4 + PROMPT] = IGNORE_INDEX
    return ids, labels, torch.randn(BATCH, 4, 64, generator=draw)


def train(border: str) -> tuple[list[float], PaliGemmaForConditionalGeneration]:
    """The loss of every step in nats per word, and the trained model."""
    model, draw, losses = small_model(seed=0).train(), torch.Generator().manual_seed(2), []
    optimiser = torch.optim.AdamW(model.language_model.parameters(), lr=2e-3)
    types = types_for(border, 4 + PROMPT + ANSWER, 4 + PROMPT)
    for _ in range(STEPS):
        ids, labels, features = random_batch(draw)
        loss = suffix_loss(model(ids, token_type_ids=types.expand_as(ids), image_features=features), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses, model.eval()


def share_right(model: PaliGemmaForConditionalGeneration) -> float:
    """The share of right words when the model generates the answer, so that no word of the answer is in its input."""
    ids, _, features = random_batch(torch.Generator().manual_seed(3))
    prompt = {"input_ids": ids[:, : 4 + PROMPT], "image_features": features}
    prompt["token_type_ids"] = torch.zeros_like(prompt["input_ids"])
    generated = torch.stack(list(generate(model, prompt, max_new_tokens=ANSWER, eos_token_id=None)), dim=1)  # [B, L]
    return (generated == ids[:, 4 + PROMPT :]).float().mean().item()


def draw_leak() -> None:
    drawing = Drawing(690, 330)
    axes = Axes(drawing, (60, 50, 470, 270), x=(0, STEPS), y=(0, 5))
    axes.frame([0, 60, 120, 180, 240], [0, 1, 2, 3, 4, 5], "training steps", "loss, nats per word")
    chance = math.log(WORDS)
    axes.curve([(0, chance), (STEPS, chance)], SOFT, "4 4")
    drawing.text(478, axes.at(0, chance)[1] - 16, f"ln {WORDS}: the best possible loss", fill=SOFT, size=12)
    for border, color in (("prefix-LM", BLUE), ("no border", ORANGE)):
        losses, model = train(border)
        axes.curve(list(enumerate(losses)), color)
        drawing.text(478, axes.at(0, losses[-1])[1] + 5, border, fill=color)
        share = share_right(model)
        print(f"{border:9}  loss after {STEPS} steps {losses[-1]:.2f} nats; right words {share:.0%} (chance 6%)")
    drawing.save(HERE / "leak.svg")


if __name__ == "__main__":
    torch.set_num_threads(1)
    draw_mask()
    draw_influence()
    draw_leak()
