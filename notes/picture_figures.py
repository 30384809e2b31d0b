"""Draws the figures of picture.md and prints its numbers, with the demo checkpoint: `python -m notes.picture_figures`.

patches.png  the picture as the vision tower receives it, cut into patches, and one patch enlarged
scale.svg    the share of right captions when the picture's vectors are multiplied by a factor, on new scenes
matters.png  the patches that an answer depends on. For each patch, its vector and those of its neighbours are replaced by the
             mean of all patch vectors, and the change of the answer's probability is measured
"""

import argparse
import math
from pathlib import Path

if __name__ == "__main__":  # --help and wrong flags are answered before the slow imports
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from demo import shapes
from paligemma.checkpoints.weights import load_model
from paligemma.generation import generate
from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration
from paligemma.processing_paligemma import PaliGemmaProcessor, load_image
from paligemma.svg import BLUE, ORANGE, SOFT, Axes, Drawing

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PICTURE, QUESTION, ANSWER = ROOT / "examples" / "shapes.png", "answer en what color is the heart?", "purple"
SCENES, SEED = 100, 20_001  # the demo checkpoint was trained on other seeds
SIDE = 448  # pixels: the side of the picture in a figure
PALE = (215, 215, 215)


def patch_grid(model: PaliGemmaForConditionalGeneration, pixels: Tensor) -> Image.Image:
    """The pixels, float32[3, H, W] in [-1, 1], as a picture of SIDE pixels with lines between the patches."""
    vision = model.config.vision_config
    array = ((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()  # [H, W, 3]
    picture = Image.fromarray(array).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    draw, step = ImageDraw.Draw(picture), SIDE * vision.patch_size // vision.image_size
    for place in range(step, SIDE, step):
        draw.line([(place, 0), (place, SIDE)], PALE)
        draw.line([(0, place), (SIDE, place)], PALE)
    return picture


def draw_patches(model: PaliGemmaForConditionalGeneration, pixels: Tensor) -> None:
    """Draws patches.png; prints how closely one matrix product over the cut patches equals the tower's convolution."""
    vision = model.config.vision_config
    size, across = vision.patch_size, vision.image_size // vision.patch_size
    grid = patch_grid(model, pixels)
    cuts = F.unfold(pixels[None], kernel_size=size, stride=size)[0].T  # [P, 3*14*14], in reading order
    number = int(cuts.unflatten(1, (3, -1)).var(dim=2).sum(dim=1).argmax())  # the patch with the most variation
    row, column = divmod(number, across)
    step = SIDE // across
    sheet = Image.new("RGB", (SIDE + 290, SIDE), "white")
    sheet.paste(grid, (0, 0))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    draw.rectangle([column * step, row * step, column * step + step, row * step + step], outline=ORANGE, width=3)
    one = cuts[number].view(3, size, size).permute(1, 2, 0)
    one = Image.fromarray(((one + 1) * 127.5).round().byte().numpy()).resize((224, 224), Image.Resampling.NEAREST)
    sheet.paste(one, (SIDE + 36, 64))
    draw.rectangle([SIDE + 35, 63, SIDE + 260, 288], outline=ORANGE, width=3)
    width = vision.hidden_size
    for line, words in enumerate((
        f"patch {number} of 0 to {across * across - 1}", f"row {row}, column {column}", "",
        f"{size} x {size} pixels x 3 colours", f"= {3 * size * size} numbers", f"-> one vector of {width}",
    )):  # fmt: skip
        draw.text((SIDE + 36, 300 + 20 * line), words, "black", font)
    sheet.save(HERE / "patches.png", optimize=True)

    embedding = model.vision_tower.vision_model.embeddings.patch_embedding
    as_product = F.linear(cuts, embedding.weight.flatten(1), embedding.bias)  # [P, D]
    as_convolution = embedding(pixels[None])[0].flatten(1).T
    gap = (as_product - as_convolution).abs().max().item()
    print(f"{len(cuts)} patches, each with {cuts.shape[1]} numbers; convolution and matrix product differ by at most {gap:.0e}")


def right_captions(model: PaliGemmaForConditionalGeneration, processor: PaliGemmaProcessor, factors: list[float]) -> list[float]:
    """For each factor, the share of captions that are exactly right when the picture's vectors are multiplied by the factor."""
    scenes = [shapes.make_scene(np.random.default_rng([SEED, index])) for index in range(SCENES)]
    truths = [shapes.ask_caption(scene, np.random.default_rng())[1] for scene in scenes]
    inputs = processor([shapes.draw(scene) for scene in scenes], ["caption en"] * SCENES)
    features = model.encode_images(inputs.pop("pixel_values"))  # [I, P, D]
    shares = []
    for factor in factors:
        steps = generate(model, inputs | {"image_features": features * factor}, max_new_tokens=40)
        generated = torch.stack(list(steps), dim=1)  # [B, L]
        shares.append(sum(processor.decode(ids) == truth for ids, truth in zip(generated, truths, strict=True)) / SCENES)
    return shares


def draw_scale(model: PaliGemmaForConditionalGeneration, processor: PaliGemmaProcessor, pixels: Tensor) -> None:
    """Draws scale.svg; prints the mean norm of the vectors of words and of patches."""
    root = model.config.text_config.hidden_size**0.5
    words = processor([], "caption en what color is the heart?")["input_ids"]
    norms = model.language_model.model.embed_tokens(words).norm(dim=-1), model.encode_images(pixels[None]).norm(dim=-1)
    print(f"mean norm of the vectors that enter the decoder: words {norms[0].mean():.1f}, patches {norms[1].mean():.1f}")
    factors = sorted([1 / root, 0.25, 0.5, 0.7, 1.0, 1.5, 2.0, 4.0, root])
    shares = right_captions(model, processor, factors)
    drawing = Drawing(640, 330)
    axes = Axes(drawing, (60, 50, 600, 270), x=(factors[0] / 1.2, factors[-1] * 1.2), y=(0, 1), is_log=(True, False))
    ticks = [0.1, 0.25, 0.5, 1, 2, 4, 10], [0, 0.25, 0.5, 0.75, 1]
    axes.frame(*ticks, "factor on the picture's vectors", "share of captions that are exactly right")
    axes.curve(list(zip(factors, shares, strict=True)), SOFT)
    for factor, right in zip(factors, shares, strict=True):
        name = {1 / root: "1 / sqrt(D)", root: "sqrt(D)"}.get(factor, f"{factor:g}")
        print(f"factor {name:>11}: {right:.0%} of captions right")
        place = axes.at(factor, right)
        drawing.dot(*place, BLUE if factor == 1 else ORANGE)
        if factor in (1 / root, root):
            drawing.text(place[0], place[1] + 20, name, anchor="middle", size=12)
    drawing.save(HERE / "scale.svg")


@torch.no_grad()
def importance(
    model: PaliGemmaForConditionalGeneration, processor: PaliGemmaProcessor, picture: Image.Image, radius: int
) -> Tensor:
    """float[P]: for each patch, how much the log-probability of the answer falls without the patch and its neighbours, in nats.

    The vectors of these patches are replaced by the mean of all patch vectors.

    Args:
        radius: how far away neighbours may be, in patches.
    """
    inputs = processor(picture, QUESTION)
    features = model.encode_images(inputs.pop("pixel_values"))  # [1, P, D]
    count, across = features.shape[1], math.isqrt(features.shape[1])
    row, column = torch.arange(count) // across, torch.arange(count) % across
    is_near = ((row[:, None] - row).abs() <= radius) & ((column[:, None] - column).abs() <= radius)  # [P, P]
    without = torch.where(is_near[..., None], features.mean(dim=1), features)  # [P, P, D]
    rows = {key: value.expand(count + 1, -1) for key, value in inputs.items()}
    logprobs = model(**rows, image_features=torch.cat((without, features)))[:, -1].log_softmax(-1)  # [P + 1, V]
    labels = processor(picture, QUESTION, ANSWER)["labels"]
    first = labels[labels >= 0][0]
    return logprobs[-1, first] - logprobs[:-1, first]


def draw_importance(model: PaliGemmaForConditionalGeneration, processor: PaliGemmaProcessor, picture: Image.Image) -> None:
    """Draws matters.png: the picture, and a grey copy with the patches that the answer depends on in orange."""
    for radius, words in ((0, "one patch"), (1, "a patch and its neighbours")):
        loss = importance(model, processor, picture, radius)
        across = math.isqrt(len(loss))
        place = int(loss.argmax())
        print(f'"{QUESTION}" without {words}: "{ANSWER}" loses up to {loss[place]:.2f} nats, '
              f"at row {place // across}, column {place % across}")  # fmt: skip
    shares = (loss / loss.max()).clamp(0, 1).view(across, across)
    weight = Image.fromarray((shares * 255).byte().numpy()).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    grey = picture.convert("L").convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    pale = Image.blend(grey, Image.new("RGB", grey.size, "white"), 0.4)
    marked = Image.composite(Image.new("RGB", grey.size, ORANGE), pale, weight.point(lambda value: value * 3 // 5))
    sheet = Image.new("RGB", (2 * SIDE + 12, SIDE), "white")
    sheet.paste(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (0, 0))
    sheet.paste(marked, (SIDE + 12, 0))
    sheet.quantize(128).save(HERE / "matters.png", optimize=True)


def main() -> None:
    torch.set_num_threads(1)
    folder = ROOT / "paligemma" / "bundled"
    model, processor = load_model(folder, dtype="fp32"), PaliGemmaProcessor.from_pretrained(folder)
    picture = load_image(PICTURE)
    pixels = processor(picture, "caption en")["pixel_values"][0]  # [3, H, W]
    with torch.no_grad():
        draw_patches(model, pixels)
        draw_scale(model, processor, pixels)
        draw_importance(model, processor, picture)


if __name__ == "__main__":
    main()
