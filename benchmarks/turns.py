"""The common part of the scripts of this folder: runs programs alternately and compares them.

One round runs each variant of the job once: A B C A B C ... Whatever slows down the machine for a while slows down all variants,
and ratios are computed within a round. After each round the tokens of all variants must be the same, or the script stops. The
floor, the least time in which this machine could do the job, is computed from rates measured before and after the rounds.
"""

import argparse
import json
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path

from paligemma import machine
from paligemma.files import parse_json

HERE = Path(__file__).resolve().parent
THREADS = machine.use_cores()  # for this process and every side, because a child process inherits the number of threads

OURS, INT8, INT4, EXACT = "ours bf16", "ours int8", "ours int4", "ours fp32"
THEIRS, STATIC = "transformers bf16", "transformers bf16 static cache"
BASELINE = THEIRS  # the side that ratios refer to, unless a script names another one
PROMPT = 10  # number of text tokens (bos, prompt and newline), in the scripts that do not vary it
ARGUMENTS = {
    OURS: ["ours"],
    INT8: ["ours", "--quantize", "int8"],
    INT4: ["ours", "--quantize", "int4"],
    EXACT: ["ours", "--dtype", "fp32"],
    THEIRS: ["transformers"],
    STATIC: ["transformers", "--static"],
}
ARGUMENTS |= {f"{name} compiled": [*ARGUMENTS[name], "--compiled"] for name in (OURS, INT8, INT4)}  # on CUDA, for decoding


def default_sides(device: str) -> list[str]:
    """The sides to compare by default; on CUDA also transformers with a static cache, which it compiles."""
    return [OURS, INT8, INT4, THEIRS, *([STATIC] if device.startswith("cuda") else [])]


def parse(doc: str, *, rounds: int = 5, flags: dict[str, dict] | None = None) -> argparse.Namespace:
    """Parses the flags that every script has, and further ones. With --quick there is one round, without a warm-up round."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a checkpoint, such as make_checkpoint.py writes")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--quick", action="store_true", help="run briefly, only to see that the script works")
    parser.add_argument("--save", action="store_true", help="store the JSON in results/")
    parser.add_argument("--out", type=Path, help="append each measurement, as soon as it is made, to this file as a line of JSON")
    parser.add_argument("--sides", help=f"any of the following, separated by commas: {', '.join(ARGUMENTS)}")
    for name, description in (flags or {}).items():
        parser.add_argument(name, **description)
    options = parser.parse_args()
    options.sides = options.sides.split(",") if options.sides else default_sides(options.device)
    options.script = Path(sys.argv[0]).stem
    options.rounds = 1 if options.quick else options.rounds
    return options


class Side:
    """A process that runs sides.py with one model in memory."""

    def __init__(self, name: str, model: Path, device: str):
        command = [sys.executable, "-m", "benchmarks.sides", *ARGUMENTS[name], "--device", device]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.send("load", model=str(model))  # the reply is read later, so that all sides load at the same time

    @cached_property
    def loaded(self) -> dict:
        return self.receive()

    def ask(self, do: str, **arguments: object) -> dict:
        _ = self.loaded
        self.send(do, **arguments)
        return self.receive()

    def send(self, do: str, **arguments: object) -> None:
        self.process.stdin.write(json.dumps({"do": do} | arguments) + "\n")
        self.process.stdin.flush()

    def receive(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{shlex.join(self.process.args)} ended without a reply; its error is above.")
        return parse_json(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


@contextmanager
def start(names: list[str], model: Path, device: str) -> Iterator[dict[str, Side]]:
    """Starts one side per name, each with its model in memory, and ends them at the end of the `with` block."""
    # On a GPU, quantising while loading takes seconds; on a CPU, the quantised model is stored once for all scripts.
    kinds = {name: ARGUMENTS[name][2] for name in names if "--quantize" in ARGUMENTS[name] and device == "cpu"}
    folders = {name: quantised(model, kinds[name], device) if name in kinds else model for name in names}
    with ExitStack() as stack:
        sides = {}
        for name, folder in folders.items():
            sides[name] = Side(name, folder, device)
            stack.callback(sides[name].close)
        for side in sides.values():
            _ = side.loaded
        yield sides


def append(options: argparse.Namespace, row: dict) -> None:
    """Appends a line of JSON to the file given as --out, in the scripts whose flags are those of `parse`."""
    if getattr(options, "out", None):
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"script": options.script} | row) + "\n")


def quantised(model: Path, kind: str, device: str = "cpu") -> Path:
    """The folder MODEL-KIND with the quantised model, as save_model writes it. It is made if it does not exist."""
    folder = model.with_name(f"{model.name}-{kind}")
    if not (folder / "config.json").exists():
        side = Side(f"ours {kind}", model, device)
        side.ask("save", out=str(folder))
        side.close()
    return folder


def together(sides: dict[str, Side], do: str, **arguments: object) -> dict[str, dict]:
    """Runs a command on all sides at the same time, for long work that is not measured."""
    for side in sides.values():
        side.send(do, **arguments)
    return {name: side.receive() for name, side in sides.items()}


def in_turn(ways: dict[str, Callable[[], dict]], options: argparse.Namespace, *, is_warm: bool = False) -> dict[str, list[float]]:
    """Seconds of each variant in each round. There is a warm-up round unless `is_warm`. Ends the script if tokens differ.

    Each number is printed at once, so that an interrupted run has shown what it measured.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(0 if is_warm or options.quick else -1, options.rounds):
        replies = {}
        for name, work in ways.items():
            replies[name] = work()
            row = {"round": i, "side": name, "seconds": replies[name]["seconds"]}
            append(options, row)
            print(f"round {i if i >= 0 else 'to warm up'}: {name:34} {row['seconds']:.4g} s", flush=True)
        require_same(replies)
        if i >= 0:
            for name, reply in replies.items():
                seconds[name].append(reply["seconds"])
    return seconds


def require_same(replies: dict[str, dict]) -> None:
    """Ends the script if the sides generated different tokens, because then they did different work."""
    answers = {name: reply["tokens"] for name, reply in replies.items() if "tokens" in reply}
    first = next(iter(answers.values()), None)
    if any(tokens != first for tokens in answers.values()):
        lines = [f"  {name}: {tokens}" for name, tokens in answers.items()]
        raise SystemExit("\n".join(["the sides did not generate the same tokens:", *lines]))


def product_bandwidth() -> float:
    """The read bandwidth that our own kernel for one row reaches, in bytes per second; 0 if the kernels are not available.

    On some processors this is more than any of torch's operators reaches.
    """
    import torch

    from paligemma import roofline
    from paligemma.layers import kernels

    if kernels.library() is None:
        return 0.0
    matrix, x = torch.ones(65536, 2048, dtype=torch.bfloat16), torch.ones(1, 2048, dtype=torch.bfloat16)
    work = partial(kernels.product, "bf16", x, [(matrix, None, len(matrix))], torch.bfloat16)
    return matrix.nbytes / roofline.best_seconds(work, x.device)


def copy_bandwidth(device: object, size: int = 2**30) -> float:
    """The usual measure of a GPU's bandwidth: bytes read plus bytes written per second while `size` bytes are copied."""
    import torch

    from paligemma import roofline

    source = torch.zeros(size // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / roofline.best_seconds(lambda: target.copy_(source), device)


class Floors:
    """The best rates of this machine in all measurements so far: bytes read and multiply-adds per second."""

    def __init__(self, device: str):
        import torch

        self.device = torch.device(device)
        self.bytes_per_s = 0.0
        self.products_per_s: dict[str, float] = {}
        self.measure()

    def measure(self) -> None:
        import torch

        from paligemma import roofline

        self.bytes_per_s = max(self.bytes_per_s, roofline.read_bandwidth(self.device))
        faster = copy_bandwidth(self.device) if self.device.type == "cuda" else product_bandwidth()
        self.bytes_per_s = max(self.bytes_per_s, faster)
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            self.products_per_s[name] = max(self.products_per_s.get(name, 0), roofline.matrix_rate(self.device, dtype))

    def reading(self, count: float) -> float:
        """Least seconds to read `count` bytes."""
        return count / self.bytes_per_s

    def multiplying(self, count: float) -> float:
        """Least seconds for `count` multiply-adds, in the floating-point type that is fastest on this machine."""
        return count / max(self.products_per_s.values())

    def document(self) -> dict:
        return {"read_GB_per_s": round(self.bytes_per_s / 1e9, 2)} | {
            f"{name}_Gmadd_per_s": round(rate / 1e9, 1) for name, rate in self.products_per_s.items()
        }


def spread(values: list[float]) -> dict:
    """Median, lowest and highest value, rounded to four digits."""
    return {key: float(f"{f(values):.4g}") for key, f in (("median", statistics.median), ("low", min), ("high", max))}


def compare(
    seconds: dict[str, list[float]],
    floors: dict[str, float] | None = None,
    scale: float = 1e3,
    unit: str = "ms",
    baseline: str = BASELINE,
) -> dict:
    """Prints a line per variant and returns the numbers as a document.

    Args:
        seconds: from in_turn; multiplied by `scale` they are in `unit`.
        floors: the least possible seconds, where they are known.
        baseline: the variant that ratios refer to. If it was not measured, they refer to the first one.
    """
    rows = {}
    baseline = baseline if baseline in seconds else next(iter(seconds))
    print(f"{'':34}{'median ' + unit:>12}{'spread':>20}{'floor':>10}{'share':>7}   times as fast as {baseline}")
    for name, values in seconds.items():
        row = {unit: spread([value * scale for value in values])}
        line = f"{name:34}{row[unit]['median']:12.4g}{row[unit]['low']:>10.4g} ..{row[unit]['high']:>7.4g}"
        if floors and name in floors:
            row["floor"] = float(f"{floors[name] * scale:.4g}")
            row["share"] = float(f"{row['floor'] / row[unit]['median']:.3g}")  # of the bandwidth or matrix rate
        line += f"{row.get('floor', ''):>10}{row.get('share', ''):>7}"
        row["ratio"] = spread([theirs / ours for theirs, ours in zip(seconds[baseline], values, strict=True)])
        line += f"   {row['ratio']['median']:.2f} ({row['ratio']['low']:.2f} .. {row['ratio']['high']:.2f})"
        print(line)
        rows[name] = row
    return rows


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def finish(options: argparse.Namespace, results: dict) -> None:
    """Prints machine, versions and results as one line of JSON, and stores it with --save."""
    about = {"machine": processor_name(), "threads": THREADS}
    if options.device.startswith("cuda"):
        import torch

        about["machine"] = torch.cuda.get_device_name(options.device)
    sides = getattr(options, "sides", [THEIRS])  # a script with flags of its own has no --sides
    packages = ("torch", *(["transformers"] if any(name.startswith("transformers") for name in sides) else []))
    about["versions"] = {"python": platform.python_version()} | {name: version(name) for name in packages}
    print(about)
    command = ["python", "-m", f"benchmarks.{options.script}", *sys.argv[1:]]
    document = {"command": shlex.join(command)} | about | {"rounds": options.rounds} | results
    append(options, document)
    if options.save:
        name = options.script + ("" if options.device == "cpu" else "-" + options.device.partition(":")[0])
        (HERE / "results").mkdir(exist_ok=True)
        (HERE / "results" / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))
