"""Lets programs work in turn and says how they compare: what the scripts of this folder have in common.

One round asks each way of doing the job once: A B C A B C ... Whatever slows the machine for a while slows all of them, and
ratios are taken round by round. After each round the tokens must be the same, or the script stops. The floor, what the
machine could do at best, is measured in the same run, before and after the rounds.
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
THREADS = machine.use_cores()  # here, and in every side that is started: a child inherits the number of threads

OURS, INT8, INT4, EXACT = "ours bf16", "ours int8", "ours int4", "ours fp32"
THEIRS, STATIC = "transformers bf16", "transformers bf16, static cache"
BASELINE = THEIRS  # what ratios refer to where a script does not say otherwise
PROMPT = 10  # tokens of bos, prompt and newline in the scripts that do not vary them
ARGUMENTS = {
    OURS: ["ours"],
    INT8: ["ours", "--quantize", "int8"],
    INT4: ["ours", "--quantize", "int4"],
    EXACT: ["ours", "--dtype", "fp32"],
    THEIRS: ["transformers"],
    STATIC: ["transformers", "--static"],
}
COMPILED = {f"{name}, compiled": [*ARGUMENTS[name], "--compiled"] for name in (OURS, INT8, INT4)}  # on CUDA, for decoding
ARGUMENTS |= COMPILED


def default_sides(device: str) -> list[str]:
    """Everything that is worth comparing: on CUDA also transformers with a static cache, which it then compiles."""
    return [OURS, INT8, INT4, THEIRS, *([STATIC] if device.startswith("cuda") else [])]


def parse(doc: str, *, rounds: int = 5, flags: dict[str, dict] | None = None) -> argparse.Namespace:
    """The flags that every script has, and further ones as argparse takes them; with --quick one round, and none to warm up."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint, such as make_checkpoint.py writes")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--quick", action="store_true", help="only to see that it works")
    parser.add_argument("--save", action="store_true", help="keep the JSON in results/")
    parser.add_argument("--sides", help=f"of {', '.join(ARGUMENTS)}; several with commas between them")
    for name, description in (flags or {}).items():
        parser.add_argument(name, **description)
    options = parser.parse_args()
    options.sides = options.sides.split(",") if options.sides else default_sides(options.device)
    options.script = Path(sys.argv[0]).stem
    options.rounds = 1 if options.quick else options.rounds
    return options


class Side:
    """A process of sides.py with a model in it."""

    def __init__(self, name: str, model: Path, device: str):
        command = [sys.executable, "-m", "benchmarks.sides", *ARGUMENTS[name], "--device", device]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.tell("load", model=str(model))  # the answer is read when it is needed, so that sides load at the same time

    @cached_property
    def loaded(self) -> dict:
        return self.hear()

    def ask(self, do: str, **arguments: object) -> dict:
        _ = self.loaded
        self.tell(do, **arguments)
        return self.hear()

    def tell(self, do: str, **arguments: object) -> None:
        self.process.stdin.write(json.dumps({"do": do} | arguments) + "\n")
        self.process.stdin.flush()

    def hear(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{shlex.join(self.process.args)} ended without an answer; see its error above.")
        return parse_json(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


@contextmanager
def start(names: list[str], model: Path, device: str) -> Iterator[dict[str, Side]]:
    """One side for each name, all with their model in memory; they end with the block."""
    kinds = {name: ARGUMENTS[name][2] for name in names if "--quantize" in ARGUMENTS[name]}
    folders = {name: quantised(model, kinds[name], device) if name in kinds else model for name in names}
    with ExitStack() as stack:
        sides = {}
        for name, folder in folders.items():
            sides[name] = Side(name, folder, device)
            stack.callback(sides[name].close)
        for side in sides.values():
            _ = side.loaded
        yield sides


def quantised(model: Path, kind: str, device: str = "cpu") -> Path:
    """The model as save_model writes it when quantised, beside the original; made if it is not there."""
    folder = model.with_name(f"{model.name}-{kind}")
    if not (folder / "config.json").exists():
        side = Side(f"ours {kind}", model, device)
        side.ask("save", out=str(folder))
        side.close()
    return folder


def together(sides: dict[str, Side], do: str, **arguments: object) -> dict[str, dict]:
    """Asks all sides at the same time: for work that takes long and is not measured."""
    for side in sides.values():
        side.tell(do, **arguments)
    return {name: side.hear() for name, side in sides.items()}


def in_turn(ways: dict[str, Callable[[], dict]], options: argparse.Namespace, *, is_warm: bool = False) -> dict[str, list[float]]:
    """Seconds of each way, round by round, after a round to warm up if need be. Stops the script if tokens differ."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(0 if is_warm or options.quick else -1, options.rounds):
        replies = {name: work() for name, work in ways.items()}
        require_same(replies)
        if i >= 0:
            for name, reply in replies.items():
                seconds[name].append(reply["seconds"])
    return seconds


def require_same(replies: dict[str, dict]) -> None:
    """Different answers would mean different work."""
    said = {name: reply["tokens"] for name, reply in replies.items() if "tokens" in reply}
    first = next(iter(said.values()), None)
    if any(tokens != first for tokens in said.values()):
        raise SystemExit("the sides do not say the same tokens:\n" + "\n".join(f"  {name}: {t}" for name, t in said.items()))


def product_bandwidth() -> float:
    """Bytes a second that our own product of one row reads, on some processors more than anything of torch does; 0 = none."""
    import torch

    from paligemma import roofline
    from paligemma.layers import kernels

    if kernels.library() is None:
        return 0.0
    matrix, x = torch.ones(65536, 2048, dtype=torch.bfloat16), torch.ones(1, 2048, dtype=torch.bfloat16)
    work = partial(kernels.product, "bf16", x, [(matrix, None, len(matrix))], torch.bfloat16)
    return matrix.nbytes / roofline.best_seconds(work, x.device)


def copy_bandwidth(device: object, size: int = 2**30) -> float:
    """Bytes a second, read and written, of copying `size` bytes: the rate that a GPU is judged by."""
    import torch

    from paligemma import roofline

    source = torch.zeros(size // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / roofline.best_seconds(lambda: target.copy_(source), device)


class Floors:
    """What this machine can do at best: bytes read and multiply-adds a second; the best of the measurements so far."""

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
        """Seconds to read so many bytes."""
        return count / self.bytes_per_s

    def multiplying(self, count: float) -> float:
        """Seconds for so many multiply-adds, in the floating-point type that this machine is best at."""
        return count / max(self.products_per_s.values())

    def document(self) -> dict:
        return {"read_GB_per_s": round(self.bytes_per_s / 1e9, 2)} | {
            f"{name}_Gmadd_per_s": round(rate / 1e9, 1) for name, rate in self.products_per_s.items()
        }


def spread(values: list[float]) -> dict:
    """Median, lowest and highest, rounded for reading."""
    return {key: float(f"{f(values):.4g}") for key, f in (("median", statistics.median), ("low", min), ("high", max))}


def compare(
    seconds: dict[str, list[float]],
    floors: dict[str, float] | None = None,
    scale: float = 1e3,
    unit: str = "ms",
    baseline: str = BASELINE,
) -> dict:
    """Prints a line for each way and returns them as a document.

    Args:
        seconds: from in_turn. Times `scale` they are in `unit`.
        floors: the least seconds possible, where that is known.
        baseline: the way that ratios refer to; without it there are none.
    """
    rows = {}
    print(f"{'':34}{'median ' + unit:>12}{'spread':>20}{'floor':>10}{'share':>7}   times as fast as {baseline}")
    for name, values in seconds.items():
        row = {unit: spread([value * scale for value in values])}
        line = f"{name:34}{row[unit]['median']:12.4g}{row[unit]['low']:>10.4g} ..{row[unit]['high']:>7.4g}"
        if floors and name in floors:
            row["floor"] = float(f"{floors[name] * scale:.4g}")
            row["share"] = float(f"{row['floor'] / row[unit]['median']:.3g}")  # of the bandwidth or matrix rate there is
        line += f"{row.get('floor', ''):>10}{row.get('share', ''):>7}"
        if baseline in seconds:
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
    """Prints machine, versions and results as one line of JSON, and keeps it if asked to."""
    about = {"machine": processor_name(), "threads": THREADS}
    if options.device.startswith("cuda"):
        import torch

        about["machine"] = torch.cuda.get_device_name(options.device)
    about["versions"] = {"python": platform.python_version()} | {name: version(name) for name in ("torch", "transformers")}
    print(about)
    command = ["python", "-m", f"benchmarks.{options.script}", *sys.argv[1:]]
    document = {"command": shlex.join(command)} | about | {"rounds": options.rounds} | results
    if options.save:
        name = options.script + ("" if options.device == "cpu" else "-" + options.device.partition(":")[0])
        (HERE / "results").mkdir(exist_ok=True)
        (HERE / "results" / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))
