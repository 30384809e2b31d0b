"""Trains the demo checkpoint: 3.5 million parameters, from nothing, in two hours on two cores.

    python demo/train.py tower --minutes 14 --batch 48
    python demo/train.py packed --minutes 42 --final 0.1
    python demo/train.py packed --start packed.pt --seed 2 --minutes 21 --muon_lr 0.014 --adam_lr 1.5e-3 --bins 14 --final 0.1
    python demo/train.py rows --start packed.pt --seed 3 --minutes 27 --batch 12 --muon_lr 0.006 --adam_lr 6e-4 --bins 6
    python demo/train.py export --start rows.pt && python demo/evaluate.py

tower   The vision tower alone. A linear head, thrown away later, says for each patch which shape covers it. That is a much
        stronger teacher than answers are: every patch of every picture has one.
packed  Tower and decoder. All questions about a picture stand in one row behind it and do not see each other, so the picture's
        64 tokens are read once for a dozen answers. The picture does not see the questions yet.
rows    One question a row, and the picture sees it: the prefix-LM pass that generation does. Slower, so it comes last.

The learning rate follows the time that the processor has worked (--minutes, of each process), so that a phase does the same work
whatever else the machine does, and may be stopped for a while; two processes of one thread each average their gradients. Each
answer counts as one in the loss, however long it is. How it went (share of answers right to the
letter, on new scenes, since none is drawn twice; mean error of a coordinate in pixels of 112):

    phase   minutes  steps  caption  color  shape  count  exists  where  pixels
    tower        14    911        -   1.00   1.00      -       -      -     1.2   (of patches; box edges)
    packed        4    175     0.58   0.56   0.98   0.73    0.85   0.50    11.8
                 15    625     0.70   0.85   0.99   0.79    0.95   0.88     5.8
                 28   1025     0.86   0.88   0.99   0.87    0.96   0.93     4.0
    packed        9    325     0.91   1.00   0.98   0.87    0.97   0.94     3.0
    again        21    775     0.99   1.00   1.00   0.94    0.99   0.98     1.4
    rows         10    475     0.96   1.00   1.00   0.90    0.95   0.97     2.2
                 27   1000     0.98   1.00   1.00   0.92    1.00   0.98     1.7

Then, said greedily about 150 pictures of an unseen seed (evaluate.py --count 150; 1326 questions): answers 97.4 %, captions
100 %, detect 0.833. Before the rows (24 pictures, float32): 98.0 %, 100 %, 0.786. What it still gets wrong is several shapes of
one kind: it counts or boxes one too few.

The first packed run was stopped after 28 of its 42 minutes: the two processes had made different tokenizers (two pairs of words
had swapped ids), which is why colours and captions lagged. Since then there is one tokenizer file for all.

Then it learned to segment, and to find nothing where nothing is. The states above were gone, so it went on from its own
bfloat16 weights; the tower stayed as it was (--tower_rate 0, all four times), and no vector of a <seg> token had been used yet.

    python demo/codec.py
    ... rows --start checkpoint --seed 4 --minutes 6 --batch 6 --muon_lr 0.004 --adam_lr 1e-3 --bins 5 --final 0.4
    ... rows --start rows.pt --seed 6 --minutes 4.5 --batch 6 --muon_lr 0.004 --adam_lr 8e-4 --bins 4
    ... rows --start rows.pt --seed 7 --minutes 9 --batch 8 --muon_lr 0.005 --adam_lr 8e-4 --bins 4
    ... rows --start rows.pt --seed 8 --minutes 6 --batch 8 --muon_lr 0.004 --adam_lr 6e-4 --bins 2.5

Between the first two, another run was stopped after 50 steps; in both, a code weighed as much as any other token. Said about
the same 150 pictures (1626 questions now; mAP is that of detect, without and with scores), the last line by what is shipped:

    minutes  steps  answers  captions  detect  segment  absent  mAP
          0      0     97.4       100   0.831        0     2.0  0.574  0.662
       11.0   1391     96.9       100   0.809    0.635    99.3  0.672  0.700
       20.0   2233     97.2       100   0.839    0.704     100  0.698  0.737
       26.0   2786     97.6      99.3   0.854    0.728    99.3  0.718  0.751
"""

import argparse
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, distributed, multiprocessing, nn

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "demo" / "checkpoint"
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

import shapes  # noqa: E402
from modeling_paligemma import PaliGemmaConfig, PaliGemmaForConditionalGeneration, prefix_lm_mask  # noqa: E402
from modeling_siglip import SiglipVisionConfig, SiglipVisionModel  # noqa: E402
from tokenizer import make_tokenizer, write_files  # noqa: E402

VISION = {
    "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 5, "num_attention_heads": 3, "image_size": 112,
    "patch_size": 14,
}  # fmt: skip
TEXT = {
    "model_type": "gemma", "hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 3,
    "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 512,
}  # fmt: skip
QUESTIONS = {
    "caption": 1, "color": 1, "shape": 1, "count": 2, "exists": 2, "where": 2, "detect": 3, "segment": 3, "absent": 1,
}  # fmt: skip  # tries a picture
GROUPS = 3  # of rows by length, in the phase rows
GRID = VISION["image_size"] // VISION["patch_size"]
DRAWN_SIZES = (112, 112, 160, 224)
IS_COVERED = 0.25  # a patch belongs to a shape whose box covers that much of it
COLORS, KINDS = list(shapes.COLORS), list(shapes.KINDS)


def pixels_of(scene: shapes.Scene, rng: np.random.Generator) -> np.ndarray:
    """uint8[3, R, R], as the processor makes them: drawn at some size, resized by PIL's bicubic filter."""
    side = VISION["image_size"]
    picture = shapes.draw(scene, int(rng.choice(DRAWN_SIZES)))
    if picture.width != side:
        picture = picture.resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(picture).transpose(2, 0, 1)


def patch_targets(scene: shapes.Scene) -> tuple[np.ndarray, np.ndarray]:
    """What the patch head has to say of each patch: int64[P, 4] = covered, colour, kind, rank; float32[P, 4] = box - centre."""
    edge = np.arange(GRID) / GRID
    centre = edge + 0.5 / GRID
    words = np.zeros((GRID, GRID, 4), dtype=np.int64)
    boxes = np.zeros((GRID, GRID, 4), dtype=np.float32)
    best = np.full((GRID, GRID), IS_COVERED)
    for rank, shape in enumerate(scene.shapes):
        top, left, bottom, right = shape.box
        rows = np.clip(np.minimum(edge + 1 / GRID, bottom) - np.maximum(edge, top), 0, None) * GRID
        columns = np.clip(np.minimum(edge + 1 / GRID, right) - np.maximum(edge, left), 0, None) * GRID
        share = rows[:, None] * columns
        mine = share >= best
        best = np.where(mine, share, best)
        words[mine] = 1, COLORS.index(shape.color), KINDS.index(shape.kind), rank
        offsets = np.stack(
            np.broadcast_arrays(top - centre[:, None], left - centre, bottom - centre[:, None], right - centre), axis=-1
        )
        boxes[mine] = offsets[mine]
    return words.reshape(-1, 4), boxes.reshape(-1, 4)


def draw_batch(rng: np.random.Generator, count: int) -> tuple[list[shapes.Scene], Tensor, Tensor, Tensor]:
    """New scenes, their pixels float32[I, 3, R, R] in [-1, 1], and what the patch head has to say of them."""
    scenes = [shapes.make_scene(rng) for _ in range(count)]
    pixels = torch.from_numpy(np.stack([pixels_of(scene, rng) for scene in scenes])).float() / 127.5 - 1
    words, boxes = (torch.from_numpy(np.stack(part)) for part in zip(*map(patch_targets, scenes), strict=True))
    return scenes, pixels, words, boxes


class PatchHead(nn.Linear):
    """Thrown away after training: from a patch's vector, which shape covers it. Teaches the tower faster than answers do."""

    sizes = (1, len(COLORS), len(KINDS), 4, 4)

    def __init__(self, width: int):
        super().__init__(width, sum(self.sizes))

    def loss(self, x: Tensor, words: Tensor, boxes: Tensor) -> tuple[Tensor, dict[str, float]]:
        covered, color, kind, rank, box = self(x).float().split(self.sizes, dim=-1)
        is_covered = words[..., 0].bool()
        loss = F.binary_cross_entropy_with_logits(covered[..., 0], words[..., 0].float())
        right = {}
        for index, (name, logits) in enumerate((("color", color), ("kind", kind), ("rank", rank)), start=1):
            loss = loss + F.cross_entropy(logits[is_covered], words[..., index][is_covered])
            right[name] = (logits[is_covered].argmax(-1) == words[..., index][is_covered]).float().mean().item()
        distance = (box[is_covered] - boxes[is_covered]).abs()
        right["box_px"] = distance.mean().item() * VISION["image_size"]
        return loss + F.smooth_l1_loss(box[is_covered] * 10, boxes[is_covered] * 10, beta=0.2), right


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: each matrix moves in all its directions alike (Jordan, 2024: kellerjordan.github.io/posts/muon).

    As torch.optim.Muon, but in float32, since bfloat16 is slow on a CPU, and for all matrices of one shape at a time.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @staticmethod
    def orthogonalise(x: Tensor, steps: int = 5) -> Tensor:
        """The nearest matrices whose singular values are all about 1, by Newton and Schulz's iteration; x is [N, r, c]."""
        is_tall = x.shape[1] > x.shape[2]
        x = x.mT if is_tall else x
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(steps):
            gram = x @ x.mT
            x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
        return x.mT if is_tall else x

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes_seen: dict[tuple, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes_seen.setdefault(tuple(parameter.shape), []).append(parameter)
            for (rows, columns), alike in shapes_seen.items():
                pushes = []
                for parameter in alike:
                    speed = self.state[parameter].setdefault("speed", torch.zeros_like(parameter))
                    speed.lerp_(parameter.grad, 1 - group["momentum"])
                    pushes.append(parameter.grad.lerp(speed, group["momentum"]))
                moves = torch.zeros(len(alike), rows, columns)  # each process does its share; the sum has them all
                mine = slice(distributed.get_rank(), None, distributed.get_world_size())
                moves[mine] = self.orthogonalise(torch.stack(pushes)[mine]) * max(1, rows / columns) ** 0.5
                distributed.all_reduce(moves)
                for parameter, move in zip(alike, moves, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(move, alpha=group["lr"])


class Trainer:
    """Two optimisers, a learning rate that follows the time that the processor has worked, a log.

    Muon moves the matrices of the layers, AdamW all else. In the joint phases the tower, which knows its trade, moves slowly.
    """

    def __init__(self, modules: nn.Module, options: argparse.Namespace):
        self.seconds, self.start, self.steps, self.progress = options.minutes * 60, time.process_time(), 0, 0.0
        self.final = options.final
        self.parameters = [p for p in modules.parameters() if p.requires_grad]
        groups: dict[tuple[bool, bool], list] = {}
        for name, p in modules.named_parameters():
            groups.setdefault((p.dim() == 2 and ".layers." in name, "vision_tower" in name), []).append(p)
        self.optimisers = []
        for (is_matrix, is_tower), parameters in groups.items():
            peak = (options.muon_lr if is_matrix else options.adam_lr) * (options.tower_rate if is_tower else 1)
            if is_matrix:
                self.optimisers.append((peak, Muon(parameters, peak, weight_decay=0.01)))
            else:
                self.optimisers.append((peak, torch.optim.AdamW(parameters, peak, betas=(0.9, 0.98), weight_decay=0.01)))

    @property
    def clock(self) -> float:
        return (time.process_time() - self.start) / self.seconds

    def step(self, loss: Tensor) -> None:
        """One update with the mean gradient of all processes.

        The rate rises during the first 3 % of the time, stays until 40 %, and falls to `final` of it at the end.
        """
        loss.backward()
        grads = [p.grad for p in self.parameters]
        flat = torch.cat([torch.full((1,), self.clock), *(grad.flatten() for grad in grads)]) / distributed.get_world_size()
        distributed.all_reduce(flat)
        self.progress = float(flat[0])
        for grad, mean in zip(grads, flat[1:].split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(mean.view_as(grad))
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        rate = min(1.0, self.progress / 0.03 + 0.01, self.final + (1 - self.final) * max(0.0, 1 - self.progress) / 0.6)
        for peak, optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = peak * rate
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.steps += 1


def log(trainer: "Trainer", **numbers: float) -> None:
    line = {"minutes": trainer.progress * trainer.seconds / 60, "steps": trainer.steps, **numbers}
    print(json.dumps({key: round(value, 4) for key, value in line.items()}), flush=True)


def save(folder: Path, name: str, state: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / f"{name}.part")
    os.replace(folder / f"{name}.part", folder / name)


def init(module: nn.Module) -> None:
    """Small normal weights; the tower's position embedding, too."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.normal_(child.weight, std=child.in_features**-0.5 * 0.8)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, nn.Embedding):
            nn.init.normal_(child.weight, std=child.embedding_dim**-0.5)
    for name, parameter in module.named_parameters():
        if name.endswith(("out_proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight")):
            parameter.data.mul_(0.3)


def train_tower(options: argparse.Namespace, rng: np.random.Generator) -> None:
    """The tower alone, under the patch head."""
    tower = SiglipVisionModel(SiglipVisionConfig(**VISION))
    init(tower)
    both = nn.ModuleDict({"tower": tower, "head": PatchHead(VISION["hidden_size"])})
    trainer = Trainer(both, options)
    while trainer.progress < 1:
        _, pixels, words, boxes = draw_batch(rng, options.batch)
        loss, right = both["head"].loss(tower(pixels), words, boxes)
        trainer.step(loss)
        if distributed.get_rank() == 0 and (trainer.steps % 50 == 0 or trainer.progress >= 1):
            log(trainer, loss=loss.item(), **right)
            save(options.runs, "tower.pt", both.state_dict())


@dataclass
class Pack:
    """Questions about pictures as tensors, every row `picture | question answer | question answer | ...`, without the picture.

    A position's target is the token after it, if that is of an answer, else -100. U is the text length, the longest row's.
    """

    ids: Tensor  # int64[B, U]
    position_ids: Tensor  # int64[B, U]; each question starts as if it came right after the picture
    question: Tensor  # int64[B, U], 1, 2, ... within a row; -1 = padding
    is_prefix: Tensor  # bool[B, U]
    targets: Tensor  # int64[B, U]
    weights: Tensor  # float32[B, U], of an answer's tokens; they sum to 1: an answer counts as one, however long it is
    kinds: Tensor  # int64[B, U], what kind of question it is, as an index of QUESTIONS


class Packer:
    """From questions to a Pack."""

    def __init__(self, tokenizer: Tokenizer, num_image_tokens: int):
        self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
        self.bos, self.eos, self.newline = (tokenizer.token_to_id(token) for token in ("<bos>", "<eos>", "\n"))
        self.segs = range(tokenizer.token_to_id("<seg000>"), tokenizer.token_to_id("<seg127>") + 1)
        self.offset = num_image_tokens
        self.prefixes: dict[str, list[int]] = {}

    def __call__(self, rows: list[list[tuple[str, str, str]]]) -> Pack:
        """rows: for each row its questions as (kind, prefix, suffix)."""
        names = list(QUESTIONS)
        packed = []
        for row in rows:
            columns: list[list] = [[] for _ in range(7)]
            for number, (kind, prefix, suffix) in enumerate(row, start=1):
                if prefix not in self.prefixes:
                    self.prefixes[prefix] = [self.bos, *self.encode(prefix), self.newline]
                start, answer = self.prefixes[prefix], [*self.encode(suffix), self.eos]
                n, a = len(start), len(answer)
                counts = [0.25 if token in self.segs else 1.0 for token in answer]  # a mask weighs as much as its box
                size = n + a - 1
                columns[0] += start + answer[:-1]
                columns[1] += range(self.offset + 1, self.offset + 1 + size)
                columns[2] += [number] * size
                columns[3] += [True] * n + [False] * (a - 1)
                columns[4] += [-100] * (n - 1) + answer
                columns[5] += [0.0] * (n - 1) + [count / sum(counts) for count in counts]
                columns[6] += [names.index(kind)] * size
            packed.append(columns)
        longest = max(len(columns[0]) for columns in packed)
        fill = (0, 1, -1, False, -100, 0.0, 0)
        return Pack(
            *(
                torch.tensor([columns[i] + [fill[i]] * (longest - len(columns[i])) for columns in packed])
                for i in range(len(fill))
            )
        )


def packed_mask(pack: Pack, num_image_tokens: int) -> Tensor:
    """Who may look at whom when many questions share a picture: bool[B, 1, L, L], L = P + U.

    The picture sees itself only. A question sees the picture and itself in both directions, its answer looks back; neither sees
    another question. (In the model as it is used the picture sees the question, too: that is what the last phase is for.)
    """
    picture = pack.question.new_zeros(len(pack.question), num_image_tokens)
    question = torch.cat([picture, pack.question], dim=1)
    is_prefix = torch.cat([picture == 0, pack.is_prefix], dim=1)
    index = torch.arange(question.shape[1])
    back = (index <= index[:, None]) | (is_prefix[:, None] & is_prefix[:, :, None])
    mask = (question[:, None] == 0) | ((question[:, None] == question[:, :, None]) & back)
    return mask[:, None]


class Smooth:
    """Cross entropy in which a neighbouring <loc> is nearly right: its target is a bell of `bins` around the true one.

    The bins themselves stay exact, and so do the tokens that the model reads; only the wish is softened, less and less.
    """

    def __init__(self, first_loc: int):
        self.first_loc, self.bins, self.table = first_loc, 0.0, None

    def narrow(self, bins: float) -> None:
        if self.table is None or abs(bins - self.bins) > 0.05 * self.bins:
            at = torch.arange(1024.0)
            self.bins, self.table = bins, torch.softmax(-0.5 * ((at - at[:, None]) / bins) ** 2, dim=-1)

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        surprise = -logits.log_softmax(-1)
        loss = surprise.gather(1, targets[:, None])[:, 0]
        is_loc = (targets >= self.first_loc) & (targets < self.first_loc + 1024)
        wished = self.table[targets[is_loc] - self.first_loc]
        soft = (surprise[is_loc, self.first_loc : self.first_loc + 1024] * wished).sum(-1)
        return loss.masked_scatter(is_loc, soft)


@torch.no_grad()
def scores(logits: Tensor, pack: Pack, chosen: Tensor, first_loc: int) -> dict[str, float]:
    """Share of answers with every token right, by kind of question (greedy decoding would say them), and the error of boxes."""
    said, targets = logits.argmax(-1), pack.targets[chosen]
    row = torch.arange(len(pack.ids))[:, None].expand_as(pack.ids)
    answer = (row * 100 + pack.question)[chosen]
    ids, answer = answer.unique(return_inverse=True)
    wrong = torch.zeros(len(ids)).index_add(0, answer, (said != targets).float())
    kind = torch.zeros(len(ids), dtype=torch.int64).index_copy(0, answer, pack.kinds[chosen])
    result = {name: (wrong[kind == i] == 0).float().mean().item() for i, name in enumerate(QUESTIONS) if (kind == i).any()}
    is_loc = (targets >= first_loc) & (targets < first_loc + 1024)
    for name in ("detect", "segment"):  # no bin is right to the letter
        result.pop(name, None)
    is_seg = (targets >= first_loc + 1024) & (targets < first_loc + 1152)
    if is_seg.any():
        result["seg"] = (said == targets)[is_seg].float().mean().item()
    if is_loc.any():
        bins = (said - targets)[is_loc].abs().clamp(max=1024).float().mean().item()
        result["loc_px"] = bins / 1023 * VISION["image_size"]
    return result


def new_model(tokenizer: Tokenizer) -> PaliGemmaForConditionalGeneration:
    """First weights. Neighbouring <loc> tokens start with vectors that are alike: sums of waves over the coordinate."""
    raw = {"model_type": "paligemma", "vision_config": VISION, "image_token_index": tokenizer.token_to_id("<image>")}
    vocabulary = math.ceil(tokenizer.get_vocab_size() / 64) * 64
    raw["text_config"] = TEXT | {"vocab_size": vocabulary}
    model = PaliGemmaForConditionalGeneration(PaliGemmaConfig.from_hf(raw))
    init(model)
    first, width = tokenizer.token_to_id("<loc0000>"), TEXT["hidden_size"]
    waves = torch.logspace(math.log10(0.3), math.log10(24), width)
    place = torch.arange(1024)[:, None] / 1023
    vectors = torch.sin(2 * math.pi * (place * waves + torch.rand(width)))
    model.language_model.model.embed_tokens.weight.data[first : first + 1024] = vectors * 2**0.5 * width**-0.5
    return model


class Joint:
    """What both joint phases share: the model, the patch head as a small extra loss, scenes, the log."""

    def __init__(self, options: argparse.Namespace, rng: np.random.Generator):
        self.options, self.rng = options, rng
        self.tokenizer = Tokenizer.from_file(str(options.runs / "tokenizer.json"))
        self.model = new_model(self.tokenizer)
        self.head = PatchHead(VISION["hidden_size"])
        self.both = nn.ModuleDict({"model": self.model, "head": self.head})
        self.model.vision_tower.requires_grad_(options.tower_rate > 0)
        self.head.requires_grad_(options.tower_rate > 0)
        self.packer = Packer(self.tokenizer, self.model.config.num_image_tokens)
        self.first_loc = self.tokenizer.token_to_id("<loc0000>")
        self.smooth = Smooth(self.first_loc)
        self.kinds = [kind for kind, tries in QUESTIONS.items() for _ in range(tries)]
        self.recent: dict[str, list[float]] = {}

    def batch(self) -> tuple[Tensor, Tensor, list[list[tuple[str, str, str]]]]:
        """The tower's view of new scenes [I, P, D], the loss of the patch head, and each scene's questions."""
        scenes, pixels, words, boxes = draw_batch(self.rng, self.options.batch)
        rows = []
        for scene in scenes:
            asked = {}
            for kind in self.kinds:
                question = shapes.QUESTIONS[kind](scene, self.rng)
                if question is not None:
                    asked[question] = kind
            rows.append([(kind, *question) for question, kind in asked.items()])
        x = self.model.vision_tower(pixels)
        return x, self.head.loss(x, words, boxes)[0], rows

    def load(self, start: str) -> None:
        """The state of a phase, or the weights of the shipped checkpoint; these come without the patch head."""
        if start == "checkpoint":
            self.model.load_state_dict(load_file(CHECKPOINT / "model.safetensors"))  # copied, and so float32 again
        else:
            self.both.load_state_dict(torch.load(self.options.runs / start, weights_only=True))

    def loss(self, features: Tensor, pack: Pack, mask: Tensor, progress: float) -> Tensor:
        """Mean over answers of the mean over an answer's tokens."""
        decoder = self.model.language_model
        p = features.shape[1]
        picture_positions = torch.arange(1, p + 1).expand(len(features), p)
        inputs = torch.cat([features, decoder.model.embed_tokens(pack.ids)], dim=1)
        x = decoder.model(inputs, torch.cat([picture_positions, pack.position_ids], dim=1), mask)[:, p:]
        chosen = pack.weights > 0
        logits = decoder.logits(x[chosen])
        self.smooth.narrow(self.options.bins * 0.2**progress)
        weights = pack.weights[chosen]
        for name, value in scores(logits, pack, chosen, self.first_loc).items():
            self.recent.setdefault(name, []).append(value)
        return (self.smooth(logits, pack.targets[chosen]) * weights).sum() / weights.sum()

    def finish_step(self, trainer: Trainer, loss: Tensor, extra: Tensor) -> None:
        """One update; every 25 of them a line of means since the last one, and the state on disk."""
        trainer.step(loss + self.options.head_weight * extra)
        self.recent.setdefault("loss", []).append(loss.item())
        self.recent.setdefault("head", []).append(extra.item())
        if distributed.get_rank() == 0 and (trainer.steps % 25 == 0 or trainer.progress >= 1):
            log(trainer, **{name: float(np.mean(values)) for name, values in self.recent.items()})
            self.recent.clear()
            save(self.options.runs, f"{self.options.phase}.pt", self.both.state_dict())


def train_packed(options: argparse.Namespace, rng: np.random.Generator) -> None:
    """Picture and answers together, all questions about a picture in one row."""
    joint = Joint(options, rng)
    if options.start == "tower.pt":
        state = torch.load(options.runs / options.start, weights_only=True)
        for part, module in (("tower.", joint.model.vision_tower), ("head.", joint.head)):
            module.load_state_dict({key.removeprefix(part): value for key, value in state.items() if key.startswith(part)})
    else:
        joint.load(options.start)
    trainer = Trainer(joint.both, options)
    while trainer.progress < 1:
        x, extra, rows = joint.batch()
        pack = joint.packer(rows)
        features = joint.model.multi_modal_projector(x)
        mask = packed_mask(pack, features.shape[1])
        joint.finish_step(trainer, joint.loss(features, pack, mask, trainer.progress), extra)


def train_rows(options: argparse.Namespace, rng: np.random.Generator) -> None:
    """One question a row, and the picture sees it: the pass that generation will do.

    Rows of alike length go through the decoder together, since an answer with masks is ten times as long as most.
    """
    joint = Joint(options, rng)
    joint.load(options.start)
    trainer = Trainer(joint.both, options)
    while trainer.progress < 1:
        x, extra, rows = joint.batch()
        projected = joint.model.multi_modal_projector(x)
        picks = [(i, row[j]) for i, row in enumerate(rows) for j in rng.permutation(len(row))[: options.questions]]
        picks.sort(key=lambda pick: len(pick[1][2]))
        loss = torch.zeros(())
        for part in np.array_split(np.arange(len(picks)), GROUPS):
            chosen = [picks[k] for k in part]
            pack = joint.packer([[question] for _, question in chosen])
            features = projected[torch.tensor([i for i, _ in chosen])]
            picture = torch.ones(features.shape[:2], dtype=torch.int64)
            is_token = torch.cat([picture, (pack.question > 0).long()], dim=1)
            is_answer = torch.cat([picture * 0, (~pack.is_prefix).long()], dim=1)
            mask = prefix_lm_mask(is_token, is_answer)
            loss = loss + joint.loss(features, pack, mask, trainer.progress) * len(part) / len(picks)
        joint.finish_step(trainer, loss, extra)


def export(options: argparse.Namespace) -> None:
    """The state of a phase as a checkpoint folder in bfloat16, as the hub has it."""
    from weights import save_model

    joint = Joint(options, np.random.default_rng(0))
    joint.load(options.start)
    config = joint.model.config
    write_files(options.out, joint.tokenizer, config.vision_config.image_size, config.num_image_tokens)
    save_model(joint.model.to(torch.bfloat16), options.out)


def run(rank: int, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{options.port}"
    patience = timedelta(days=1)  # a process may be stopped for a while and go on
    distributed.init_process_group("gloo", rank=rank, world_size=options.processes, init_method=address, timeout=patience)
    torch.manual_seed(options.seed)  # the same first weights in all processes, but other scenes
    PHASES[options.phase](options, np.random.default_rng([options.seed, rank, list(PHASES).index(options.phase)]))
    distributed.destroy_process_group()


PHASES = {"tower": train_tower, "packed": train_packed, "rows": train_rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=[*PHASES, "export"])
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--start", default="tower.pt", help="state of an earlier phase, in --runs; or checkpoint")
    parser.add_argument("--questions", type=int, default=4, help="of each picture, in the phase rows")
    parser.add_argument("--bins", type=float, default=25, help="width of the bell around a <loc>; at the end a fifth")
    parser.add_argument("--head_weight", type=float, default=0.2)
    parser.add_argument("--batch", type=int, default=20, help="pictures a step and process")
    parser.add_argument("--processes", type=int, default=2, help="one core each")
    parser.add_argument("--port", type=int, default=29511)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--muon_lr", type=float, default=0.02)
    parser.add_argument("--adam_lr", type=float, default=2e-3)
    parser.add_argument("--tower_rate", type=float, default=0.25, help="learning rate of the tower, relative; 0: it stays")
    parser.add_argument("--final", type=float, default=0.0, help="learning rate at the end, relative")
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="folder, for the phase export")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs")
    options = parser.parse_args()
    if not (options.runs / "tokenizer.json").exists():  # made once: all processes and phases must mean the same by an id
        options.runs.mkdir(parents=True, exist_ok=True)
        make_tokenizer().save(str(options.runs / "tokenizer.json"))
    if options.phase == "export":
        return export(options)
    multiprocessing.spawn(run, (options,), nprocs=options.processes)


if __name__ == "__main__":
    main()
