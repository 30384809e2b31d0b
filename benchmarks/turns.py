"""The common part of the scripts of this folder: runs programs alternately and compares them.

One round runs each variant of the job once: A B C A B C ... Whatever slows down the machine for a while slows down all variants,
and ratios are computed within a round. After each round the tokens of all variants must be the same, or the script stops. The
floor, the least time in which this machine could do the job, is computed from rates measured before and after each turn, because
the rates of a shared machine change from one minute to the next.
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
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

from paligemma import machine
from paligemma.files import parse_json

HERE = Path(__file__).resolve().parent
THREADS = machine.use_cores()  # for this process and every side, because a child process inherits the number of threads

OURS, INT8, INT4, EXACT = "ours bf16", "ours int8", "ours int4", "ours fp32"
THEIRS, STATIC, COMPILED = "transformers bf16", "transformers bf16 static cache", "transformers bf16 torch.compile"
BASELINE = THEIRS  # the side that ratios refer to, unless a script names another one
PROMPT = 10  # number of text tokens (bos, prompt and newline), in the scripts that do not vary it
ARGUMENTS = {
    OURS: ["ours"],
    INT8: ["ours", "--quantize", "int8"],
    INT4: ["ours", "--quantize", "int4"],
    EXACT: ["ours", "--dtype", "fp32"],
    THEIRS: ["transformers"],
    STATIC: ["transformers", "--static"],
    COMPILED: ["transformers", "--static", "--compiled"],
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
    parser.add_argument("--save", action="store_true", help="store the JSON in results/CLASS/")
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
    with ExitStack() as stack:
        sides = {}
        for name, folder in folders(names, model, device).items():
            sides[name] = Side(name, folder, device)
            stack.callback(sides[name].close)
        for side in sides.values():
            _ = side.loaded
        yield sides


def folders(names: list[str], model: Path, device: str) -> dict[str, Path]:
    """The folder from which each side loads its model."""
    # On a GPU, quantising while loading takes seconds; on a CPU, the quantised model is stored once for all scripts.
    kinds = {name: ARGUMENTS[name][2] for name in names if "--quantize" in ARGUMENTS[name] and device == "cpu"}
    return {name: quantised(model, kinds[name], device) if name in kinds else model for name in names}


def read_files(folder: Path) -> None:
    """Brings every file of a folder into the page cache."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            while file.read(2**24):
                pass


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


def in_turn(
    ways: dict[str, Callable[[], dict]], options: argparse.Namespace, *, floors: "Floors | None" = None, is_warm: bool = False
) -> dict[str, list[float]]:
    """Seconds of each variant in each round. There is a warm-up round unless `is_warm`. Ends the script if tokens differ.

    Each number is printed at once, so that an interrupted run has shown what it measured.

    Args:
        floors: measure the rates of the machine before and after each turn.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    if floors:
        floors.beside |= {name: [] for name in ways}  # without the turns of an earlier call
    for i in range(0 if is_warm or options.quick else -1, options.rounds):
        replies = {}
        for name, work in ways.items():
            replies[name] = work()
            row = {"round": i, "side": name, "seconds": replies[name]["seconds"]}
            append(options, row)
            print(f"round {i if i >= 0 else 'to warm up'}: {name:34} {row['seconds']:.4g} s", flush=True)
            if floors:
                floors.measure(name if i >= 0 else None)
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


def copy_bandwidth(device: object, size: int = 2**30) -> float:
    """The usual measure of a GPU's bandwidth: bytes read plus bytes written per second while `size` bytes are copied."""
    import torch

    from paligemma import roofline

    source = torch.zeros(size // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / roofline.best_seconds(lambda: target.copy_(source), device)


class Floors:
    """The rates of this machine, and from them the least seconds of a job. "read": bytes per second; the others, named like
    dtypes: multiply-adds per second.
    """

    ATTEMPTS = 20  # at measuring a rate that is not lower than what a side has reached

    def __init__(self, device: str):
        import torch

        self.device = torch.device(device)
        self.last: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.beside: dict[str, list[dict[str, float]]] = {}  # for each side the bandwidth beside each of its turns
        self.measure()

    def measure(self, side: str | None = None) -> None:
        """Measures the rates. Args: side: the one whose turn was between this measurement and the last one."""
        import torch

        from paligemma import roofline

        now = {"read": roofline.read_bandwidth(self.device)}
        if self.device.type == "cuda":
            now["read"] = max(now["read"], copy_bandwidth(self.device))
        for dtype in (torch.float32, torch.bfloat16, torch.int8):
            now[str(dtype).removeprefix("torch.")] = roofline.matrix_rate(self.device, dtype)
        if side is not None:
            self.beside[side].append({"read": max(self.last.get("read", 0), now["read"])})
        self.last = now
        self.best = {name: max(rate, self.best.get(name, 0)) for name, rate in now.items()}

    def least(
        self, seconds: dict[str, list[float]], job: Callable[[str, dict[str, float]], float], beside: str = "{}"
    ) -> dict[str, list[float]]:
        """The least possible seconds of each turn, from the bandwidth measured beside it and the best other rates of the run.

        Other programs take bandwidth for minutes, but the rates of instructions are those of the processor. Where a turn took
        less, the bandwidth beside it was measured in slower moments than the turn, and the best of the run is taken. Ends the
        script if a turn took less time than these allow, although they are measured again and again.

        Args:
            seconds: from in_turn, or computed from it.
            job: the least seconds for the work of one turn, from the name of the side and the rates.
            beside: the name under which in_turn measured a side, with {} for the side's name.
        """
        found: dict[str, list[float]] = {}
        for name, values in seconds.items():
            found[name] = []
            for value, rates in zip(values, self.beside[beside.format(name)], strict=True):
                least = job(name, self.best | rates)
                for _ in range(self.ATTEMPTS):
                    if least <= value:
                        break
                    least = min(least, job(name, self.best))
                    if least > value:
                        self.measure()
                else:
                    raise SystemExit(
                        f"{name} took {value:.4g} s, less than the floor of {least:.4g} s, so the rates of this machine were "
                        "measured too low. End all other programs, and run the script again."
                    )
                found[name].append(least)
        return found

    def reading(self, count: float) -> float:
        """Least seconds to read `count` bytes."""
        return count / self.best["read"]

    def document(self) -> dict:
        """The best rates of the run."""
        return {"read_GB_per_s": round(self.best["read"] / 1e9, 2)} | {
            f"{name}_Gmadd_per_s": round(rate / 1e9, 1) for name, rate in self.best.items() if name != "read"
        }


def spread(values: list[float]) -> dict:
    """Median, lowest and highest value, rounded to four digits."""
    return {key: float(f"{f(values):.4g}") for key, f in (("median", statistics.median), ("low", min), ("high", max))}


def compare(
    seconds: dict[str, list[float]],
    floors: dict[str, list[float]] | None = None,
    scale: float = 1e3,
    unit: str = "ms",
    baseline: str = BASELINE,
) -> dict:
    """Prints a line per variant and returns the numbers as a document.

    Args:
        seconds: from in_turn; multiplied by `scale` they are in `unit`.
        floors: the least possible seconds of each turn, where they are known.
        baseline: the variant that ratios refer to. If it was not measured, they refer to the first one.
    """
    rows = {}
    baseline = baseline if baseline in seconds else next(iter(seconds))
    print(f"{'':34}{'median ' + unit:>12}{'spread':>20}{'floor':>10}{'share':>7}   times as fast as {baseline}")
    for name, values in seconds.items():
        row = {unit: spread([value * scale for value in values])}
        line = f"{name:34}{row[unit]['median']:12.4g}{row[unit]['low']:>10.4g} ..{row[unit]['high']:>7.4g}"
        if floors and name in floors:
            row["floor"] = float(f"{statistics.median(floors[name]) * scale:.4g}")
            shares = [least / value for least, value in zip(floors[name], values, strict=True)]
            row["share"] = float(f"{statistics.median(shares):.3g}")  # of the bandwidth or matrix rate
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


def class_of(device: str) -> str:
    """The folder of results/ for this machine: "cuda", or the best instruction set of its processor, such as "avx512_bf16"."""
    from paligemma.layers import instruction_sets

    return "cuda" if device.startswith("cuda") else instruction_sets.available()[0].name


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
        folder = HERE / "results" / class_of(options.device)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{options.script}.json").write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))
