"""Memory: the peak of a process that loads the model, reads a picture and a prompt, and generates a few tokens.

On the CPU, the peak is the kernel's VmHWM. It counts pages of mapped files as soon as they are touched, so it is the memory that
the machine must have. The floor is the size of the weights. Programs often need twice as much while loading, because of a copy in
another dtype or a state dict next to the model. There, a quantised model is measured twice: quantised from the bf16 files while
loading, and mapped from its own file. On CUDA, the peak is the most GPU memory that torch had allocated; CPU memory is stored as
well.
"""


from benchmarks import turns
from paligemma.files import read_json


def peak(name: str, model: object, device: str, context: int) -> tuple[turns.Side, dict]:
    """Loads the model and generates 8 tokens in a new process. Returns the process, which has ended, and its memory."""
    side = turns.Side(name, model, device)
    side.ask("begin", context=context, most=8)
    side.ask("decode", count=7)
    memory = side.ask("memory")
    side.close()
    return side, memory


def main() -> None:
    options = turns.parse(__doc__, rounds=1)
    raw = read_json(options.model / "config.json")
    context = raw["text_config"]["num_image_tokens"] + turns.PROMPT
    folders = {}
    for name in sorted((name for name in options.sides if name != turns.STATIC), key=lambda name: name != turns.BASELINE):
        folders[name] = options.model
        if name in (turns.INT8, turns.INT4) and options.device == "cpu":
            folders[f"{name}, from its own file"] = turns.quantised(options.model, name.split()[1], options.device)
    sides, rows = {}, {}
    print(f"{'GB':34}{'peak':>8}{'weights':>9}{'of ' + turns.BASELINE:>22}")
    for name, folder in folders.items():
        sides[name], memory = peak(name.partition(",")[0], folder, options.device, context)
        peaks = memory.get("cuda", memory["VmHWM"])
        rows[name] = {key: round(value / 1e9, 3) for key, value in memory.items()} | {"peak_GB": round(peaks / 1e9, 3)}
        rows[name]["ratio"] = round(peaks / 1e9 / rows[turns.BASELINE]["peak_GB"], 3)
        if "model_bytes" in sides[name].loaded:
            rows[name]["weights_GB"] = round(sides[name].loaded["model_bytes"] / 1e9, 3)
        print(f"{name:34}{rows[name]['peak_GB']:8.2f}{rows[name].get('weights_GB', ''):>9}{rows[name]['ratio']:22.3f}")
    turns.finish(options, {"prompt": context, "answer": 8, "ways": rows})


if __name__ == "__main__":
    main()
