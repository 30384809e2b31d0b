"""Nothing but errors of errors.py escapes a few seeded inputs of each fuzzer; and the harness sees each kind of fault.

A night tries more: `python -m tests.fuzz --seconds 600`.
"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paligemma.errors import CheckpointError, ImageError
from tests.fuzz import harness
from tests.fuzz.all import FUZZERS
from tests.fuzz.harness import Fuzzer, alarm, faults_of

ROOT = Path(__file__).parent.parent.parent
ALARM_SECONDS = 60  # of computing, for one input: three times what a night allows, as tests may run on a slow machine
SMALL = ("masks", "prompts", "flags", "yaml")  # whose inputs are short and quick enough for hypothesis to shrink


@pytest.fixture(scope="module")
def fuzzer(request, tmp_path_factory):
    return FUZZERS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("fuzzer", FUZZERS, indirect=True)
def test_only_our_errors_escape(fuzzer):
    for seed in range(len(fuzzer.known()) + fuzzer.inputs):
        with alarm(ALARM_SECONDS):
            faults = faults_of(fuzzer, fuzzer.input(seed))
        assert faults == [], f"python -m tests.fuzz --only {fuzzer.name} --seed {seed} --count 1"


@pytest.mark.parametrize("fuzzer", SMALL, indirect=True)
@given(random=st.randoms(use_true_random=False))
@settings(max_examples=20, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_only_our_errors_escape_what_hypothesis_draws(fuzzer, random):
    with alarm(ALARM_SECONDS):
        assert faults_of(fuzzer, fuzzer.make(random)) == []


@pytest.mark.parametrize("fuzzer", FUZZERS, indirect=True)
def test_an_input_without_a_fault_is_taken(fuzzer, tmp_path):
    fuzzer.check(fuzzer.sound(), tmp_path)


@pytest.mark.parametrize("fuzzer", FUZZERS, indirect=True)
def test_a_seed_always_gives_the_same_input(fuzzer):
    seed = len(fuzzer.known()) + 7
    assert fuzzer.input(seed) == fuzzer.input(seed) != fuzzer.input(seed + 1)


# The harness


class Faulty(Fuzzer):
    """Its inputs are names of what goes wrong."""

    name, codes = "faulty", (4,)

    def __init__(self, folder, *faults):
        super().__init__(folder)
        self.faults = faults

    def make(self, random: Random):
        return {"fault": random.choice(self.faults).encode()}

    def check(self, files, folder):
        match files["fault"].decode():
            case "none":
                assert list(folder.iterdir()) == []
            case "ours":
                raise CheckpointError("the file is damaged. Download it again.")
            case "other code":
                raise ImageError("no picture.")
            case "long":
                raise CheckpointError("x" * 10**5 + ".\u202e")
            case "turned":
                raise CheckpointError("a\u202eb.")
            case "value error":
                int("x")
            case "panic":
                raise PanicException("index out of range")
            case "native":
                os.write(2, b"thread panicked at model.rs\n")
            case "opinion":
                raise AssertionError("the library refuses it")
            case "crash":
                os.kill(os.getpid(), signal.SIGKILL)
            case "endless":
                while True:
                    pass
            case "memory":
                bytearray(300 << 20)


class PanicException(BaseException):
    """What native code raises."""


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("none", None),
        ("ours", None),
        ("other code", r"ImageError with code 3"),
        ("turned", None),  # commandline.note leaves it out
        ("value error", r"ValueError \(test_fuzz.py:\d+\): invalid literal"),
        ("panic", r"PanicException \(test_fuzz.py:\d+\): index out of range"),
        ("native", "native code wrote on stderr: thread panicked"),
        ("opinion", "AssertionError .*the library refuses it"),
    ],
)
def test_the_harness_sees_each_fault(tmp_path, fault, said):
    faults = faults_of(Faulty(tmp_path), {"fault": fault.encode()})
    assert [bool(re.search(said or "^$", text)) for text in faults] == ([] if said is None else [True])


@pytest.mark.parametrize(
    ("fault", "said"), [("crash", "the process ended: SIGKILL"), ("endless", "took more than 1 s"), ("memory", "took ")]
)
def test_the_end_of_a_process_is_a_fault_of_its_input(tmp_path, monkeypatch, fault, said):
    monkeypatch.setattr(harness, "MOST_SECONDS", 1)
    monkeypatch.setattr(harness, "MOST_BYTES", 200 << 20)
    monkeypatch.setitem(harness.ENDS, signal.SIGPROF, "took more than 1 s")
    report = harness.run(Faulty(tmp_path, "none", fault), seconds=60, seed=0, count=6, save=tmp_path / "saved")
    seeds = [seed for seed in range(6) if Faulty(tmp_path, "none", fault).input(seed)["fault"] == fault.encode()]
    assert report.inputs == 6 and sorted(report.errors) == seeds and 0 < len(seeds) < 6
    assert {faults[0][: len(said)] for faults in report.errors.values()} == {said}
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == sorted(f"faulty-{seed}" for seed in seeds)
    assert f"{len(seeds)} with a fault" in str(report) and f"seed {seeds[0]}" in str(report)


def test_a_night_says_how_many_inputs_were_tried(tmp_path):
    command = [sys.executable, "-m", "tests.fuzz", "--only", "masks", "--seed", "100", "--count", "3", "--save", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("masks") and " 3 inputs, 0 with a fault" in done.stdout
