"""Trains the demo checkpoint (3.5 million parameters) from scratch, in the stages of PaliGemma's recipe; recipe.sh runs them all.

    python -m demo.train contrastive --name tower   --pixels 84 ...      0  the vision tower alone, on captions (tower.py)
    python -m demo.train shared      --name joint   --pixels 84 ...      1  tower and decoder, on all tasks
    python -m demo.train shared      --name higher  --pixels 112 ...     2  the same with 64 instead of 36 patches,
    python -m demo.train prefix      --name last    --pixels 112 ...        then with the attention mask of inference
    python -m demo.train export      --start last.pt

There are two ways to train the decoder:
shared  The picture is encoded once for all its questions, a dozen or more. Questions attend to the picture, but the picture does
        not attend to the questions.
prefix  There is one question per row, and the picture attends to the question, as in inference (prefix-LM mask). This is slower,
        so it comes last.

recipe.sh runs three more stages. The stages `letters` and `words` have the names of what they improve; in the second table below,
the columns `words` and `letters` are kinds of questions.
letters  continues `tower` with another seed; the share of right letters nearly doubles.
polish   continues `last` with lower learning rates.
words    continues `polish`, and asks for every word that is in a picture. Its state is exported as the checkpoint.

Each stage continues from the state of another stage, `--start`. If the new stage has more patches, the position embedding is
interpolated (bilinearly, as big_vision does for PaliGemma's stages). Everything is computed in bfloat16, with weights in float32.
In the loss, each answer has weight 1, however long it is. In the answer to `detect` or `segment`, each object has weight 1. An
`ocr` answer has weight 3.

The learning rate depends on the CPU time used, and `minutes` are minutes on two cores. The table shows results on new scenes: the
share of answers in which every token is right under teacher forcing, and the mean error of a coordinate in pixels (of 112). The
stages `tower` and `letters` have no decoder, so their rows show other numbers.

    stage   minutes  steps  caption  color  shape  count  exists  where   ocr  pixels
    tower       9.8   1022  right patches: color 1.00, shape 0.99, letters 0.23; right caption of 48: 0.98; box error 1.4 pixels
    letters     8.6    895  right patches: color 1.00, shape 0.99, letters 0.45; right caption of 48: 0.98; box error 1.2 pixels
    joint         7    250     0.53   0.88   0.99   0.78    0.94   0.42  0.05    13.8
                 14    475     0.75   0.97   0.99   0.85    0.96   0.80  0.14     7.4
                 28    976     0.96   1.00   1.00   0.95    0.99   0.96  0.60     2.4
    higher        3    100     0.72   0.99   0.98   0.88    0.98   0.88  0.27     6.0
                 11    389     0.92   1.00   1.00   0.95    0.99   0.96  0.59     2.6
    last          8    425     0.90   0.96   0.99   0.92    0.99   0.91  0.50     3.1
                 23   1144     0.98   1.00   1.00   0.96    1.00   0.99  0.74     1.6
    polish      5.5    280     0.98   1.00   1.00   0.97    1.00   0.98  0.74     1.6
    words        20   1600     0.91   0.99   1.00   0.95    0.99   0.96  0.81     2.0
                 40   3100     0.97   0.99   1.00   0.97    1.00   0.99  0.92     1.2
                 58   4393     0.99   1.00   1.00   0.97    0.99   0.98  0.97     0.7

Greedy decoding on 300 pictures per unseen seed (evaluate.py):

    seed        answers  captions  detect  segment  words  letters
    after `polish`
      1000       98.7 %    98.0 %   0.870    0.821  85.0 %   13.0 %
      2000       98.7 %    98.3 %   0.852    0.800  82.6 %    9.8 %
      3000       98.4 %    98.7 %   0.841    0.791  85.3 %   16.0 %
    after `words`
      1000       99.3 %    99.0 %   0.941    0.909  97.6 %   47.8 %
      2000       99.3 %    98.7 %   0.943    0.899  95.5 %   41.5 %
      3000       99.1 %    99.0 %   0.925    0.888  98.4 %   46.7 %

The stages up to `higher` take an hour on two cores, and the stage `words` takes one more hour. `words` also halves the error of
boxes, because it has many updates and a learning rate that rises once more and then falls to zero. After 20 of its 58 minutes,
most numbers except `ocr` are worse than at its beginning. Masks are learned in minutes, because all shapes of a kind have the
same codes.

This run differed from what recipe.sh does now. In `tower`, 60 % of the scenes got a word if there was room, in the other stages
80 %. Up to `joint`, there were two `segment` questions per picture, not one. In `last` and `polish`, questions about words were
not preferred to others. And `words` started from the weights of `polish` in bfloat16.
"""

import argparse
import math
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from paligemma.files import BUNDLED

if __name__ == "__main__":  # --help and wrong flags are answered before the slow imports
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["contrastive", "shared", "prefix", "export"])
    parser.add_argument("--name", default="stage", help="name of the stage in the log, and of its state, RUNS/NAME.pt")
    parser.add_argument("--pixels", type=int, default=112, help="side of a picture; 14 x 14 pixels become one token")
    parser.add_argument("--minutes", type=float, default=15, help="CPU minutes per process")
    parser.add_argument("--start", help="state of an earlier stage in RUNS, or `checkpoint`: the bundled weights")
    parser.add_argument("--questions", type=int, default=4, help="questions per picture in the stage prefix")
    parser.add_argument(
        "--bins", type=float, default=25,
        help="standard deviation of the targets of <loc> tokens, in bins; it falls to a fifth during the stage",
    )  # fmt: skip
    parser.add_argument("--head_weight", type=float, default=0.2, help="weight of the patch head's loss")
    parser.add_argument("--batch", type=int, default=20, help="pictures per step and process")
    parser.add_argument("--processes", type=int, default=2, help="number of processes, one core each")
    parser.add_argument("--port", type=int, default=29511)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--muon_lr", type=float, default=0.02)
    parser.add_argument("--adam_lr", type=float, default=2e-3)
    parser.add_argument("--tower_rate", type=float, default=0.25, help="relative learning rate of the tower; 0 freezes it")
    parser.add_argument("--final", type=float, default=0.0, help="learning rate at the end, relative to its peak")
    parser.add_argument("--out", type=Path, default=BUNDLED, help="folder for export")
    parser.add_argument("--runs", type=Path, default=BUNDLED.parents[1] / "runs")
    options = parser.parse_args()

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from demo import shapes
from demo.optimisers import Trainer, init, save
from demo.tokenizer import make_tokenizer, write_files
from demo.tower import VISION, PatchHead, draw_batch, train_contrastive
from paligemma.configuration import PaliGemmaConfig
from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration, prefix_lm_mask
from paligemma.vocabulary import CODE_TOKENS, IGNORE_INDEX, LOCATION_TOKENS

TEXT: dict[str, Any] = {
    "model_type": "gemma", "hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 3,
    "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 512,
}  # fmt: skip
QUESTIONS = {
    "caption": 1, "color": 1, "shape": 1, "count": 2, "exists": 2, "where": 2, "detect": 2, "segment": 1, "absent": 1,
    "several": 2, "ocr": 1, "letters": 1, "blank": 1,
}  # fmt: skip  # how often each kind of question is tried per picture
OCR_WEIGHT = 3.0  # weight of an OCR answer in the loss; other answers have 1
CODE_WEIGHT = 0.1  # weight of a mask code relative to a coordinate; small, because all shapes of a kind have the same codes
GROUPS = 8  # the rows of a batch are grouped by length, because an answer with masks is ten times as long as most others


@dataclass
class Pack:
    """Questions and answers as tensors, one question per row, without the picture's tokens; L is the length of the longest row.

    The target of a position is the next token if that token belongs to an answer, else IGNORE_INDEX.
    """

    picture: Tensor  # int64[B], index of the picture that each row is about
    ids: Tensor  # int64[B, L]
    is_token: Tensor  # int64[B, L], 0 = padding, which is on the right
    is_answer: Tensor  # int64[B, L], 1 = token of the answer
    targets: Tensor  # int64[B, L]
    weights: Tensor  # float32[B, L], weights of the targets in the loss; 0 outside of answers
    kinds: Tensor  # int64[B], kind of question, as an index into QUESTIONS


class Packer:
    """Turns questions into a Pack."""

    def __init__(self, tokenizer: Tokenizer):
        self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
        self.bos, self.eos, self.newline = (tokenizer.token_to_id(token) for token in ("<bos>", "<eos>", "\n"))
        self.locs = range(tokenizer.token_to_id(LOCATION_TOKENS[0]), tokenizer.token_to_id(LOCATION_TOKENS[-1]) + 1)
        self.segs = range(tokenizer.token_to_id(CODE_TOKENS[0]), tokenizer.token_to_id(CODE_TOKENS[-1]) + 1)
        self.prefixes: dict[str, list[int]] = {}

    def weigh(self, kind: str, answer: list[int]) -> list[float]:
        """The weight in the loss of each token of an answer."""
        shares = [CODE_WEIGHT if token in self.segs else 1.0 for token in answer]
        boxes = sum(token in self.locs for token in answer) // 4
        total = OCR_WEIGHT if kind in ("ocr", "letters") else max(1, boxes)
        return [share * total / sum(shares) for share in shares]

    def __call__(self, rows: list[tuple[int, str, str, str]]) -> Pack:
        """Args: rows: for each question the index of its picture, its kind, its prefix and its suffix."""
        ids: list[list[int]] = []
        is_token: list[list[int]] = []
        is_answer: list[list[int]] = []
        targets: list[list[int]] = []
        weights: list[list[float]] = []
        for _, kind, prefix, suffix in rows:
            if prefix not in self.prefixes:
                self.prefixes[prefix] = [self.bos, *self.encode(prefix), self.newline]
            start, answer = self.prefixes[prefix], [*self.encode(suffix), self.eos]
            n, a = len(start), len(answer)
            ids.append(start + answer[:-1])
            is_token.append([1] * (n + a - 1))
            is_answer.append([0] * n + [1] * (a - 1))
            targets.append([IGNORE_INDEX] * (n - 1) + answer)
            weights.append([0.0] * (n - 1) + self.weigh(kind, answer))
        longest = max(map(len, ids))

        def padded(values: list, padding: float) -> Tensor:
            return torch.tensor([row + [padding] * (longest - len(row)) for row in values])

        return Pack(
            picture=torch.tensor([number for number, _, _, _ in rows]),
            ids=padded(ids, 0),
            is_token=padded(is_token, 0),
            is_answer=padded(is_answer, 0),
            targets=padded(targets, IGNORE_INDEX),
            weights=padded(weights, 0.0),
            kinds=torch.tensor([list(QUESTIONS).index(kind) for _, kind, _, _ in rows]),
        )


class SharedPicture:
    """Replaces a KVCache when many questions share a picture, whose keys and values are computed once and used by all questions.

    Gradients flow through the keys and values. First the decoder reads the pictures, whose keys and values have the shape
    [I, K, P, E] per layer. Then `picture` is set to int64[B], and the decoder reads rows of questions: the keys and values of a
    row's picture are put before the row's own.
    """

    def __init__(self):
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.picture: Tensor | None = None

    def write(self, layer: int, _position_ids: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.picture is None:
            self.layers.append((k, v))
            return k, v
        seen = (x[self.picture] for x in self.layers[layer])
        return tuple(torch.cat([picture, own], dim=2) for picture, own in zip(seen, (k, v), strict=True))


class SmoothedCrossEntropy:
    """Cross entropy with soft targets for <loc> tokens: a Gaussian around the true bin.

    `narrow` sets the standard deviation of the Gaussian, in bins, and makes it smaller during a stage. Only the targets are soft;
    the tokens that the model reads stay exact.
    """

    def __init__(self, first_loc: int):
        self.first_loc, self.deviation, self.table = first_loc, 0.0, None

    def narrow(self, deviation: float) -> None:
        if self.table is None or abs(deviation - self.deviation) > 0.05 * self.deviation:
            at = torch.arange(1024.0)
            self.deviation, self.table = deviation, torch.softmax(-0.5 * ((at - at[:, None]) / deviation) ** 2, dim=-1)

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        losses = -logits.log_softmax(-1)
        loss = losses.gather(1, targets[:, None])[:, 0]
        is_loc = (targets >= self.first_loc) & (targets < self.first_loc + 1024)
        wanted = self.table[targets[is_loc] - self.first_loc]
        soft = (losses[is_loc, self.first_loc : self.first_loc + 1024] * wanted).sum(-1)
        return loss.masked_scatter(is_loc, soft)


@torch.no_grad()
def scores(logits: Tensor, pack: Pack, chosen: Tensor, first_loc: int) -> dict[str, float]:
    """The share of answers with every token right under teacher forcing, by kind of question, and the mean error of boxes."""
    predicted, targets = logits.argmax(-1), pack.targets[chosen]
    row = torch.arange(len(pack.ids))[:, None].expand_as(pack.ids)[chosen]
    is_right = torch.zeros(len(pack.ids)).index_add(0, row, (predicted != targets).float()) == 0
    found = {kind: (pack.kinds == i) for i, kind in enumerate(QUESTIONS)}
    result = {kind: is_right[mine].float().mean().item() for kind, mine in found.items() if mine.any()}
    for kind in ("detect", "segment", "several"):  # coordinates are hardly ever exact
        result.pop(kind, None)
    is_loc = (targets >= first_loc) & (targets < first_loc + 1024)
    is_seg = (targets >= first_loc + 1024) & (targets < first_loc + 1152)
    if is_seg.any():
        result["codes"] = (predicted == targets)[is_seg].float().mean().item()
    if is_loc.any():
        result["location"] = (predicted - targets)[is_loc].abs().clamp(max=1023).float().mean().item() / 1023
    return result


def new_model(tokenizer: Tokenizer, pixels: int) -> PaliGemmaForConditionalGeneration:
    """A model with initial weights. Neighbouring <loc> tokens start with similar vectors: sine waves over the coordinate."""
    vision = VISION | {"image_size": pixels}
    raw = {"model_type": "paligemma", "vision_config": vision, "image_token_index": tokenizer.token_to_id("<image>")}
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


def stretch(positions: Tensor, patches: int) -> Tensor:
    """A position embedding [P, D], interpolated for another number of patches; both numbers are squares."""
    old, new = math.isqrt(len(positions)), math.isqrt(patches)
    grid = positions.T.reshape(1, -1, old, old)  # [1, D, H, W]
    return F.interpolate(grid, size=(new, new), mode="bilinear", align_corners=False)[0].flatten(1).T


class DecoderTraining:
    """What all stages with a decoder need: the model, the patch head (for a small extra loss), random scenes, and the log."""

    def __init__(self, options: argparse.Namespace, rng: np.random.Generator):
        self.options, self.rng = options, rng
        self.tokenizer = Tokenizer.from_file(str(options.runs / "tokenizer.json"))
        self.model = new_model(self.tokenizer, options.pixels)
        self.head = PatchHead(VISION["hidden_size"])
        self.both = nn.ModuleDict({"model": self.model, "head": self.head})
        self.model.vision_tower.requires_grad_(options.tower_rate > 0)
        self.head.requires_grad_(options.tower_rate > 0)
        self.packer = Packer(self.tokenizer)
        self.smooth = SmoothedCrossEntropy(self.packer.locs.start)
        self.kinds = [kind for kind, tries in QUESTIONS.items() for _ in range(tries)]
        self.recent: dict[str, list[float]] = {}

    def batch(self) -> tuple[Tensor, Tensor, list[list[tuple[int, str, str, str]]]]:
        """New scenes: their image features [I, P, D], the loss of the patch head, and the questions about each scene."""
        scenes, pixels, labels, boxes = draw_batch(self.rng, self.options.batch, self.options.pixels)
        rows = []
        for number, scene in enumerate(scenes):
            asked = {}
            for kind in self.kinds:
                question = shapes.QUESTIONS[kind](scene, self.rng)
                if question is not None:
                    asked[question] = kind
            rows.append([(number, kind, *question) for question, kind in asked.items()])
        x = self.model.vision_tower(pixels)
        return self.model.multi_modal_projector(x), self.head.loss(x, labels, boxes)[0], rows

    def load(self, start: str) -> None:
        """Loads the state of a stage (of a contrastive stage: tower and head), or the weights of the bundled checkpoint."""
        if start == "checkpoint":
            return self.model.load_state_dict(load_file(BUNDLED / "model.safetensors"))  # copies into float32
        state = torch.load(self.options.runs / start, weights_only=True)
        prefix = "model.vision_tower.vision_model."
        if not any(key.startswith("model.") for key in state):
            tower = {key.replace("siglip.vision_model.", prefix): value for key, value in state.items()}
            state = self.both.state_dict()
            state |= {key: value for key, value in tower.items() if key in state}
        positions = f"{prefix}embeddings.position_embedding.weight"
        if len(state[positions]) != self.model.config.num_image_tokens:
            state[positions] = stretch(state[positions], self.model.config.num_image_tokens)
        self.both.load_state_dict(state)

    def groups(self, rows: list[tuple[int, str, str, str]]) -> list[Pack]:
        """Groups of rows with similar lengths, which go through the decoder together."""
        rows = sorted(rows, key=lambda row: (len(row[3]), len(row[2])))
        return [self.packer([rows[i] for i in part]) for part in np.array_split(np.arange(len(rows)), GROUPS)]

    def loss(self, x: Tensor, pack: Pack, progress: float) -> Tensor:
        """The weighted sum of the loss over answer tokens; x is the decoder's output, [B, L, D]."""
        chosen = pack.weights > 0
        logits = self.model.language_model.logits(x[chosen])
        self.smooth.narrow(self.options.bins * 0.2**progress)
        for name, value in scores(logits, pack, chosen, self.smooth.first_loc).items():
            self.recent.setdefault(name, []).append(value)
        return (self.smooth(logits, pack.targets[chosen]) * pack.weights[chosen]).sum()

    def shared(self, features: Tensor, packs: list[Pack], progress: float) -> Tensor:
        """The loss of the stage `shared`, where pictures do not attend to questions: a weighted mean over answers."""
        decoder, p = self.model.language_model.model, features.shape[1]
        cache = SharedPicture()
        decoder(features, torch.arange(1, p + 1).expand(len(features), p), None, cache)
        total, count = torch.zeros(()), 0.0
        for pack in packs:
            cache.picture = pack.picture
            rows, length = pack.ids.shape
            is_token = torch.cat([torch.ones(rows, p, dtype=torch.int64), pack.is_token], dim=1)
            is_answer = torch.cat([torch.zeros(rows, p, dtype=torch.int64), pack.is_answer], dim=1)
            # Drop the rows of the mask for the picture's own queries, which come first and were computed above.
            mask = prefix_lm_mask(is_token, is_answer)[:, :, p:]  # [B, 1, L, P+L]
            positions = torch.arange(p + 1, p + length + 1).expand(rows, length)
            x = decoder(decoder.embed_tokens(pack.ids).to(features.dtype), positions, mask, cache)
            total, count = total + self.loss(x, pack, progress), count + float(pack.weights.sum())
        return total / count

    def prefix(self, features: Tensor, packs: list[Pack], progress: float) -> Tensor:
        """The loss of the stage `prefix`, with the attention mask of inference: a weighted mean over answers."""
        decoder, p = self.model.language_model.model, features.shape[1]
        total, count = torch.zeros(()), 0.0
        for pack in packs:
            inputs = torch.cat([features[pack.picture], decoder.embed_tokens(pack.ids).to(features.dtype)], dim=1)
            picture = torch.ones(inputs.shape[0], p, dtype=torch.int64)
            mask = prefix_lm_mask(torch.cat([picture, pack.is_token], 1), torch.cat([picture * 0, pack.is_answer], 1))
            x = decoder(inputs, torch.arange(1, inputs.shape[1] + 1).expand(inputs.shape[:2]), mask)[:, p:]
            total, count = total + self.loss(x, pack, progress), count + float(pack.weights.sum())
        return total / count

    def finish_step(self, trainer: Trainer, loss: Tensor, extra: Tensor) -> None:
        """Makes an update. Every 25 updates, logs the means since the last log line, and saves the state."""
        trainer.step(loss + self.options.head_weight * extra)
        self.recent.setdefault("loss", []).append(loss.item())
        self.recent.setdefault("head", []).append(extra.item())
        if distributed.get_rank() == 0 and (trainer.steps % 25 == 0 or trainer.progress >= 1):
            trainer.log(self.options, {name: float(np.mean(values)) for name, values in self.recent.items()})
            self.recent.clear()
            save(self.options.runs, f"{self.options.name}.pt", self.both.state_dict())


def is_not_ocr(question: tuple[int, str, str, str]) -> bool:
    """The sort key of questions. Questions about words come first: they are the hardest, so none of them should be left out."""
    return question[1] not in ("ocr", "letters")


def train_decoder(options: argparse.Namespace, rng: np.random.Generator) -> None:
    """Trains the stages `shared` and `prefix`."""
    training = DecoderTraining(options, rng)
    training.load(options.start)
    trainer = Trainer(training.both, options)
    while trainer.progress < 1:
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):  # for short rows, the flash kernel is slower
            features, extra, rows = training.batch()
            if options.stage == "prefix":
                rows = [sorted((row[j] for j in rng.permutation(len(row))), key=is_not_ocr)[: options.questions] for row in rows]
            packs = training.groups([question for row in rows for question in row])
            loss = getattr(training, options.stage)(features, packs, trainer.progress)
        training.finish_step(trainer, loss, extra)


def export(options: argparse.Namespace) -> None:
    """Writes the state of a stage as a checkpoint folder in bfloat16, in the hub's layout."""
    from paligemma.checkpoints.weights import save_model

    training = DecoderTraining(options, np.random.default_rng(0))
    training.load(options.start)
    config = training.model.config
    write_files(options.out, training.tokenizer, config.vision_config.image_size, config.num_image_tokens)
    save_model(training.model.to(torch.bfloat16), options.out)


def run(rank: int, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{options.port}"
    timeout = timedelta(days=1)  # long, because a process may be paused
    distributed.init_process_group("gloo", rank=rank, world_size=options.processes, init_method=address, timeout=timeout)
    torch.manual_seed(options.seed)  # the same initial weights in all processes; the scenes differ
    STAGES[options.stage](options, np.random.default_rng([options.seed, rank, list(STAGES).index(options.stage)]))
    distributed.destroy_process_group()


STAGES = {"contrastive": train_contrastive, "shared": train_decoder, "prefix": train_decoder}


def main(options: argparse.Namespace) -> None:
    options.runs.mkdir(parents=True, exist_ok=True)
    if not (options.runs / "tokenizer.json").exists():  # made once, because all processes and stages must use the same ids
        make_tokenizer().save(str(options.runs / "tokenizer.json"))
    if options.stage == "export":
        return export(options)
    multiprocessing.spawn(run, (options,), nprocs=options.processes)


if __name__ == "__main__":
    main(options)
