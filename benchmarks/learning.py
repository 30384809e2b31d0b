"""Examples per second and peak memory of fine-tuning, compared with transformers and, for LoRA, with peft.

    python -m benchmarks.learning --model paligemma/bundled
    python -m benchmarks.make_checkpoint --out /tmp/wide --layers 1
    python -m benchmarks.learning --model /tmp/wide --rows 2 --steps 4        full width, one layer in each part

Each measurement is a new process that loads the model, makes one update to warm up and then --steps updates. So the peak is that
of fine-tuning alone, and there is never more than one model in memory. Both sides train on the same rows (a picture of noise, a
prompt of ten tokens, an answer of sixteen) with the same loss (mean over answer tokens), AdamW, clipping, float32 master weights,
bfloat16 compute (torch.autocast; with LoRA, the base weights are bfloat16, too), and the same number of threads. The transformers
side is the training loop of its documentation. If the losses of the first update differ by more than 2 %, the script stops.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import turns
from paligemma.files import parse_json, read_json
from paligemma.vocabulary import IGNORE_INDEX

ANSWER, VOCABULARY = 16, (10, 250)  # number of tokens of an answer; the range of their ids, which exist in every tokenizer
LEARNING_RATE, RANK, ALPHA = 1e-4, 8, 16
SIDES = {
    "ours full": ("ours", "full"),
    "transformers full": ("transformers", "full"),
    "ours lora": ("ours", "lora"),
    "transformers + peft lora": ("transformers", "lora"),
}
BASELINES = {"full": "transformers full", "lora": "transformers + peft lora"}


# One side, which runs in a process of its own


def make_batch(config: dict, rows: int, step: int) -> dict:
    """What a processor returns for `rows` training examples: int64[B, L] tensors and pixel_values float32[B, 3, H, W]."""
    import torch

    vision, draw = config["vision_config"], torch.Generator().manual_seed(step)
    side = vision["image_size"]
    patches = (side // vision["patch_size"]) ** 2
    words = torch.randint(*VOCABULARY, (rows, turns.PROMPT + ANSWER), generator=draw)
    words[:, 0] = config["bos_token_id"]
    ids = torch.cat([torch.full((rows, patches), config["image_token_index"]), words], dim=1)
    is_answer = (torch.arange(ids.shape[1]) >= patches + turns.PROMPT).long().expand_as(ids)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": is_answer,
        "labels": ids.masked_fill(is_answer == 0, IGNORE_INDEX),
        "pixel_values": torch.rand(rows, 3, side, side, generator=draw) * 2 - 1,
    }


def ours(options: argparse.Namespace, config: dict) -> Callable[[int], float]:
    """A function that makes update number `step` and returns its loss."""
    import torch

    from paligemma.checkpoints import weights
    from paligemma.layers import lora
    from paligemma.learning import training

    model = weights.load_model(options.model, device=torch.device(options.device), dtype=torch.bfloat16)
    if options.method == "lora":
        lora.inject(model, lora.LoraConfig(RANK, ALPHA), lora.targets(model, ["language"], lora.MATRICES))
    else:
        training.freeze_except(model, training.ALL)
    plan = training.Plan(1000, options.rows, options.rows, LEARNING_RATE, warmup=0.0, reduction="token")
    trainer = training.Trainer(model, plan, lambda _: make_batch(config, options.rows, trainer.step), 1_000_000)
    return lambda _: trainer.update().loss  # the trainer counts the steps itself


def theirs(options: argparse.Namespace, config: dict) -> Callable[[int], float]:
    """The same function for transformers and peft."""
    import torch
    from transformers import PaliGemmaForConditionalGeneration

    dtype = torch.bfloat16 if options.method == "lora" else torch.float32
    model = PaliGemmaForConditionalGeneration.from_pretrained(options.model, dtype=dtype).to(options.device)
    if options.method == "lora":
        from peft import LoraConfig, get_peft_model

        targets = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))
    model.train()
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(learned, LEARNING_RATE, weight_decay=0.0)

    def update(step: int) -> float:
        batch = {name: value.to(options.device) for name, value in make_batch(config, options.rows, step).items()}
        with torch.autocast(options.device.partition(":")[0], torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return float(loss.detach())

    return update


def work(options: argparse.Namespace) -> None:
    """Runs one measurement of one side; prints a line of JSON."""
    config = read_json(options.model / "config.json")
    update = {"ours": ours, "transformers": theirs}[options.side](options, config)
    losses, seconds = [update(0)], []
    for step in range(1, options.steps + 1):
        start = time.perf_counter()
        losses.append(update(step))
        seconds.append(time.perf_counter() - start)
    if options.device == "cpu":
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        peak = int(status["VmHWM"].split()[0]) * 1024
    else:
        import torch

        peak = torch.cuda.max_memory_allocated()
    print(json.dumps({"seconds": seconds, "losses": losses, "peak": peak}))


# The comparison


def measure(name: str, options: argparse.Namespace) -> dict:
    """Runs `work` for one side in a new process."""
    side, method = SIDES[name]
    flags = {"model": options.model, "device": options.device, "rows": options.rows, "steps": options.steps}
    command = [sys.executable, "-m", "benchmarks.learning", "--side", side, "--method", method]
    command += [*(f"--{k}={v}" for k, v in flags.items())]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if run.returncode:
        raise SystemExit(f"{name} ended with {run.returncode}; see its error above.")
    return parse_json(run.stdout.splitlines()[-1])


def main() -> None:
    flags = {
        "--rows": {"type": int, "default": 4, "help": "examples per update"},
        "--steps": {"type": int, "default": 10, "help": "updates per measurement"},
        "--method": {"choices": ("full", "lora"), "help": "measure only this method"},
        "--side": {"choices": ("ours", "transformers"), "help": "run only this side (used by the script itself)"},
    }
    options = turns.parse(__doc__, rounds=3, flags=flags)
    if options.side:
        return work(options)
    options.steps = 2 if options.quick else options.steps
    results: dict = {}
    for method in [options.method] if options.method else BASELINES:
        names = [name for name in SIDES if SIDES[name][1] == method]
        seconds: dict[str, list[float]] = {name: [] for name in names}
        peaks: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(options.rounds):
            replies = {name: measure(name, options) for name in names}
            first = [reply["losses"][0] for reply in replies.values()]
            if max(first) > 1.02 * min(first):
                raise SystemExit(f"the sides do not do the same work: their first losses are {first}.")
            for name, reply in replies.items():
                seconds[name].append(statistics.median(reply["seconds"]))
                peaks[name].append(reply["peak"])
        print(f"\n{method}: an update of {options.rows} examples")
        rows = turns.compare(seconds, baseline=BASELINES[method])
        for name in names:
            ratio = statistics.median(peaks[name]) / statistics.median(peaks[BASELINES[method]])
            rows[name] |= {
                "examples_per_s": turns.spread([options.rows / value for value in seconds[name]]),
                "peak_GB": turns.spread([value / 1e9 for value in peaks[name]]),
                "peak_ratio": round(ratio, 3),
            }
            print(f"{name:34}peak {rows[name]['peak_GB']['median']:.3f} GB, {ratio:.2f} times that of {BASELINES[method]}")
        results[method] = rows
    turns.finish(options, {"rows": options.rows, "steps": options.steps, "ways": results})


if __name__ == "__main__":
    main()
