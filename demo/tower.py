"""Stage 0 of the recipe: a vision tower that learns from pictures and their captions, before there is a decoder.

The stage trains SigLIP's two towers with SigLIP's loss (siglip_contrastive.py): does this caption belong to this picture? A
caption names the shapes from left to right, and the word that is written in the picture, if there is one. This loss teaches the
tower what is in a picture, but hardly where it is. SigLIP was trained on ten billion pictures, this tower is trained on a hundred
thousand, so it needs a second loss: from the vector of each patch, a linear head predicts which shape covers the patch, where the
edges of that shape's box are, and which letters are in the patch. The head is not part of the exported checkpoint. (SigLIP 2,
arXiv:2502.14786, section 2, also adds losses on patches to the contrastive loss.)
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, distributed, nn

from demo import shapes
from demo.optimisers import Trainer, init, save
from demo.siglip_contrastive import SiglipModel, SiglipTextConfig, distributed_sigmoid_loss
from paligemma.configuration import SiglipVisionConfig
from paligemma.modeling_siglip import SiglipVisionTransformer

PATCH = 14
VISION = {
    "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 5, "num_attention_heads": 3, "patch_size": PATCH,
}  # fmt: skip
CAPTION_LENGTH = 40  # tokens; the longest caption has 36
TEXT = {
    "hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 3,
    "max_position_embeddings": CAPTION_LENGTH, "projection_size": VISION["hidden_size"],
}  # fmt: skip
DRAWN_SIZES = (112, 112, 160, 224)
MIN_COVERED_SHARE = 0.25  # a shape covers a patch if its box covers at least this share of the patch
MAX_LETTERS = 3  # in one patch
COLORS, KINDS = list(shapes.COLORS), list(shapes.KINDS)


def pixels_of(scene: shapes.Scene, side: int, rng: np.random.Generator) -> np.ndarray:
    """uint8[3, H, W]: the scene is drawn at a random size, then resized with PIL's bicubic filter, as the processor does."""
    picture = shapes.draw(scene, int(rng.choice(DRAWN_SIZES)))
    if picture.width != side:
        picture = picture.resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(picture).transpose(2, 0, 1)


def patch_targets(scene: shapes.Scene, grid: int) -> tuple[np.ndarray, np.ndarray]:
    """The targets of the patch head for each of grid x grid patches.

    Returns:
        int64[P, 4 + MAX_LETTERS]: whether a shape covers the patch; this shape's colour, kind and rank from left to right; the
            letters whose centres lie in the patch, 1 = A, 0 = none.
        float32[P, 4]: the shape's box minus the patch's centre.
    """
    edge = np.arange(grid) / grid
    centre = edge + 0.5 / grid
    labels = np.zeros((grid, grid, 4 + MAX_LETTERS), dtype=np.int64)
    boxes = np.zeros((grid, grid, 4), dtype=np.float32)
    largest_share = np.full((grid, grid), MIN_COVERED_SHARE)
    for rank, shape in enumerate(scene.shapes):
        top, left, bottom, right = shape.box
        rows = np.clip(np.minimum(edge + 1 / grid, bottom) - np.maximum(edge, top), 0, None) * grid
        columns = np.clip(np.minimum(edge + 1 / grid, right) - np.maximum(edge, left), 0, None) * grid
        share = rows[:, None] * columns
        mine = share >= largest_share
        largest_share = np.where(mine, share, largest_share)
        labels[mine, :4] = 1, COLORS.index(shape.color), KINDS.index(shape.kind), rank
        offsets = np.stack(
            np.broadcast_arrays(top - centre[:, None], left - centre, bottom - centre[:, None], right - centre), axis=-1
        )
        boxes[mine] = offsets[mine]
    for letter, (x, y) in zip(scene.word.text, scene.word.centers(), strict=True) if scene.word else ():
        slots = labels[int(y * grid), int(x * grid), 4:]
        free = np.flatnonzero(slots == 0)[:1]
        slots[free] = shapes.LETTERS.index(letter) + 1
    return labels.reshape(-1, 4 + MAX_LETTERS), boxes.reshape(-1, 4)


def draw_batch(rng: np.random.Generator, count: int, side: int) -> tuple[list[shapes.Scene], Tensor, Tensor, Tensor]:
    """New scenes, their pixels float32[I, 3, H, W] in [-1, 1], and the labels and boxes that the patch head should predict."""
    scenes = [shapes.make_scene(rng) for _ in range(count)]
    pixels = torch.from_numpy(np.stack([pixels_of(scene, side, rng) for scene in scenes])).float() / 127.5 - 1
    targets = zip(*(patch_targets(scene, side // PATCH) for scene in scenes), strict=True)
    labels, boxes = (torch.from_numpy(np.stack(part)) for part in targets)
    return scenes, pixels, labels, boxes


class PatchHead(nn.Linear):
    """Predicts from a patch's vector what the patch shows.

    The tower learns faster with this loss than from captions and answers alone. The head is not exported.
    """

    sizes = (1, len(COLORS), len(KINDS), 4, 4, MAX_LETTERS * (len(shapes.LETTERS) + 1))

    def __init__(self, width: int):
        super().__init__(width, sum(self.sizes))

    def loss(self, x: Tensor, labels: Tensor, boxes: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The loss, and for each target the share of right patches ("box": mean error as a share of the picture's side)."""
        covered, color, kind, rank, box, letters = self(x).float().split(self.sizes, dim=-1)
        is_covered = labels[..., 0].bool()
        loss = F.binary_cross_entropy_with_logits(covered[..., 0], labels[..., 0].float())
        metrics = {}
        for index, (name, logits) in enumerate((("color", color), ("kind", kind), ("rank", rank)), start=1):
            loss = loss + F.cross_entropy(logits[is_covered], labels[..., index][is_covered])
            metrics[name] = (logits[is_covered].argmax(-1) == labels[..., index][is_covered]).float().mean().item()
        distance = (box[is_covered] - boxes[is_covered]).abs()
        metrics["box"] = distance.mean().item()
        loss = loss + F.smooth_l1_loss(box[is_covered] * 10, boxes[is_covered] * 10, beta=0.2)
        letters, true = letters.unflatten(-1, (MAX_LETTERS, -1)), labels[..., 4:]
        has_letters = true[..., 0] > 0
        for chosen, weight in ((has_letters, 1.0), (~has_letters, 0.5)):
            if chosen.any():
                loss = loss + weight * F.cross_entropy(letters[chosen].flatten(0, 1), true[chosen].flatten())
        if has_letters.any():
            metrics["letters"] = (letters.argmax(-1) == true)[has_letters].all(-1).float().mean().item()
        return loss, metrics


def caption(scene: shapes.Scene) -> str:
    """The text for the text tower: the caption, and the word if there is one."""
    text = shapes.ask_caption(scene, np.random.default_rng())[1]
    return f"{text} ; {scene.word.text}" if scene.word else text


class Captions:
    """Tokenised captions of scenes, int64[B, L], padded to one length."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, scenes: list[shapes.Scene]) -> Tensor:
        rows = [self.tokenizer.encode(caption(scene), add_special_tokens=False).ids for scene in scenes]
        return torch.tensor([row + [0] * (CAPTION_LENGTH - len(row)) for row in rows])


def train_contrastive(options: argparse.Namespace, rng: np.random.Generator) -> None:
    """Trains both towers and the patch head, and saves their weights. The next stages use the vision tower and the head."""
    tokenizer = Tokenizer.from_file(str(options.runs / "tokenizer.json"))
    vision, text = VISION | {"image_size": options.pixels}, TEXT | {"vocab_size": tokenizer.get_vocab_size()}
    siglip = SiglipModel(SiglipVisionConfig(**vision), SiglipTextConfig(**text))
    init(siglip)
    both = nn.ModuleDict({"siglip": siglip, "head": PatchHead(VISION["hidden_size"])})
    if options.start:
        both.load_state_dict(torch.load(options.runs / options.start, weights_only=True))
    trainer, captions = Trainer(both, options), Captions(tokenizer)
    recent: dict[str, list[float]] = {}
    while trainer.progress < 1:
        scenes, pixels, labels, boxes = draw_batch(rng, options.batch, options.pixels)
        with torch.autocast("cpu", torch.bfloat16):
            x = SiglipVisionTransformer.forward(siglip.vision_model, pixels)  # [I, P, D], before the pooling
            patches, metrics = both["head"].loss(x, labels, boxes)
            images = F.normalize(siglip.vision_model.head(x).float(), dim=-1)  # [I, D]
            texts = siglip.encode_texts(captions(scenes)).float()  # [I, D]
        contrast = distributed_sigmoid_loss(images, texts, siglip.logit_scale.exp(), siglip.logit_bias)
        trainer.step(contrast + options.head_weight * patches)
        metrics["retrieval"] = ((images @ texts.T).argmax(1) == torch.arange(len(images))).float().mean().item()
        for name, value in (metrics | {"loss": contrast.item(), "head": patches.item()}).items():
            recent.setdefault(name, []).append(value)
        if distributed.get_rank() == 0 and (trainer.steps % 50 == 0 or trainer.progress >= 1):
            trainer.log(options, {name: float(np.mean(values)) for name, values in recent.items()})
            recent.clear()
            save(options.runs, f"{options.name}.pt", both.state_dict())
