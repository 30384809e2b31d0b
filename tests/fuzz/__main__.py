"""Fuzzes the readers of this project for a night: `python -m tests.fuzz --seconds 600` gives each fuzzer ten minutes.

Prints for each fuzzer how many inputs it tried, what escaped, the slowest input and the one that took most memory. What escaped
is repeated by `python -m tests.fuzz --only NAME --seed SEED --count 1`, and its files are saved. Runs on Linux.
"""

import argparse
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import torch

from tests.fuzz import harness
from tests.fuzz.all import FUZZERS


def night(name: str, arguments: argparse.Namespace) -> harness.Report:
    """The report of one fuzzer."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = FUZZERS[name](Path(folder))
        return harness.run(fuzzer, arguments.seconds, arguments.seed, arguments.count, arguments.save)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600, help="for each fuzzer")
    parser.add_argument("--only", action="append", choices=FUZZERS, help="this fuzzer; may be repeated")
    parser.add_argument("--seed", type=int, default=0, help="of the first input; the next ones count up")
    parser.add_argument("--count", type=int, help="number of inputs, instead of a time")
    parser.add_argument("--jobs", type=int, default=1, help="fuzzers at a time")
    parser.add_argument("--save", type=Path, default=Path(tempfile.gettempdir()) / "fuzz", help="folder for inputs that escaped")
    arguments = parser.parse_args()
    num_faults = 0
    with ProcessPoolExecutor(arguments.jobs, get_context("fork")) as pool:
        for done in as_completed([pool.submit(night, name, arguments) for name in arguments.only or FUZZERS]):
            print(done.result(), flush=True)
            num_faults += len(done.result().errors)
    if num_faults:
        print(f"the files of {num_faults} inputs are in {arguments.save}")
    return 1 if num_faults else 0


if __name__ == "__main__":
    sys.exit(main())
