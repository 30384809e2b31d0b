"""Prefill: milliseconds from pixels and prompt to the first token, and how many of them the vision tower takes.

Every token is multiplied with every weight: about 2.5 billion multiply-adds for each of 266 tokens. The weights are read once
for many tokens, so the time depends on arithmetic. The floor is the number of multiply-adds / the rate of the processor's fastest
instruction: for bfloat16, and for the decoder of an int8 or int4 model, for 8-bit integers.

Four parts are printed: "cold", the first picture and prompt in a new process, after the model was loaded from files in the page
cache, as for a user who asks one question; "whole", later ones; "tower", the part of "whole" that the vision tower takes; and
"decoder", the difference between "whole" and "tower" in each round.
"""

from functools import partial
from pathlib import Path

from benchmarks import turns
from paligemma.files import read_json


def first_prompt(name: str, folder: Path, device: str, context: int) -> dict:
    """Loads a model in a new process; the seconds of its first prompt, without those of loading."""
    side = turns.Side(name, folder, device)
    reply = side.ask("begin", context=context, most=1)
    side.close()
    return reply


def main() -> None:
    options = turns.parse(__doc__)
    from paligemma.configuration import PaliGemmaConfig
    from paligemma.roofline import prefill_multiply_adds

    config = PaliGemmaConfig.from_hf(read_json(options.model / "config.json"))
    context = config.num_image_tokens + turns.PROMPT
    products = prefill_multiply_adds(config, 1, context)
    of_tower = prefill_multiply_adds(config, 1, 0) - prefill_multiply_adds(config, 0, 0)
    parts = {"cold": (1, 1), "whole": (1, 1), "tower": (1, 0), "decoder": (0, 1)}  # how often tower and decoder are computed

    def least(part: str, name: str, rates: dict[str, float]) -> float:
        times_tower, times_decoder = parts[part]
        decoder_rate = rates["int8" if "--quantize" in turns.ARGUMENTS[name] else "bfloat16"]
        return times_tower * of_tower / rates["bfloat16"] + times_decoder * (products - of_tower) / decoder_rate

    floors = turns.Floors(options.device)
    names = [name for name in options.sides if name != turns.STATIC]  # the static cache is compiled for decoding only
    folders = turns.folders(names, options.model, options.device)
    for folder in set(folders.values()):
        turns.read_files(folder)
    first = {f"{name}/cold": partial(first_prompt, name, folders[name], options.device, context) for name in names}
    seconds = turns.in_turn(first, options, floors=floors, is_warm=True)
    with turns.start(names, options.model, options.device) as sides:
        ways = {f"{name}/whole": partial(side.ask, "begin", context=context, most=1) for name, side in sides.items()}
        ways |= {f"{name}/tower": partial(side.ask, "tower") for name, side in sides.items()}
        seconds |= turns.in_turn(ways, options, floors=floors)
    results = {"prompt": context, "image_size": config.vision_config.image_size}
    for part, (tower, decoder) in parts.items():
        if part == "decoder":
            pairs = {name: zip(seconds[f"{name}/whole"], seconds[f"{name}/tower"], strict=True) for name in names}
            values = {name: [whole - tower for whole, tower in pairs[name]] for name in names}
        else:
            values = {name: seconds[f"{name}/{part}"] for name in names}
        lowest = floors.least(values, partial(least, part), "{}/whole" if part == "decoder" else f"{{}}/{part}")
        print(f"\n{part}, {(tower * of_tower + decoder * (products - of_tower)) / 1e9:.1f} G multiply-adds")
        results[part] = turns.compare(values, lowest)
    print(f"\none picture of {results['image_size']} px, {context} tokens; {floors.document()}")
    turns.finish(options, results | {"floors": floors.document()})


if __name__ == "__main__":
    main()
