"""Decoding: milliseconds for one more token, batch 1, after one picture and a short prompt.

To generate one token, the processor reads every weight of the decoder and the output matrix once, and does little else: two
multiply-adds per four bytes. So the floor is bytes / read bandwidth, and the only way to lower it is fewer bytes: int8 halves
them, int4 halves them again. Everything else that a program does (a product that reads slowly, allocation, Python between the
layers, a cache that grows by copying) makes it slower than the floor.

All sides have the same prompt. Each reads it once, and they alternately generate the next few tokens. On the CPU, transformers
is also measured with torch's oneDNN products switched off while decoding, which is faster on some processors. On CUDA, ours is
a recorded graph (graphs.py), "compiled" means a recorded graph of a compiled step, and "share" is the share of the bandwidth
that is used.
"""

from functools import partial

from benchmarks import turns
from paligemma.files import read_json

RECORDING = 8  # tokens on CUDA until graphs are recorded and steps compiled (minutes); all sides do it at the same time


def main() -> None:
    options = turns.parse(__doc__)
    config = read_json(options.model / "config.json")
    is_gpu = options.device.startswith("cuda")
    count = 2 if options.quick else 16 if is_gpu else 8  # so few that no further graph is recorded while measuring
    names = [*options.sides, *(turns.COMPILED if is_gpu and turns.INT4 in options.sides else ())]
    context = config["text_config"]["num_image_tokens"] + turns.PROMPT
    floors = turns.Floors(options.device)
    with turns.start(names, options.model, options.device) as sides:
        most = 1 + RECORDING + 2 * count * (options.rounds + 1)  # two variants share the answer of transformers
        turns.require_same({name: side.ask("begin", context=context, most=most) for name, side in sides.items()})
        if is_gpu:
            turns.require_same(turns.together(sides, "decode", count=RECORDING))
        ways = {name: partial(side.ask, "decode", count=count) for name, side in sides.items()}
        if options.device == "cpu" and turns.THEIRS in sides:
            ways["transformers bf16, mkldnn off"] = partial(sides[turns.THEIRS].ask, "decode", count=count, mkldnn=False)
        seconds = turns.in_turn(ways, options)
        floors.measure()
    ours_bf16 = sides[turns.OURS].loaded["decoder_bytes"]  # transformers reads the same weights
    read = {name: sides[name].loaded.get("decoder_bytes", ours_bf16) if name in sides else ours_bf16 for name in ways}
    print(f"one token after {context}, {count} tokens per turn; {floors.document()}")
    rows = turns.compare(
        {name: [value / count for value in values] for name, values in seconds.items()},
        {name: floors.reading(read[name]) for name in ways},
    )
    for name, row in rows.items():
        row["GB_per_s"] = round(read[name] / row["ms"]["median"] / 1e6, 2)
    turns.finish(options, {"prompt": context, "tokens_a_turn": count, "floors": floors.document(), "ways": rows})


if __name__ == "__main__":
    main()
