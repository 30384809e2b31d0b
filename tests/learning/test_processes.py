"""What the processes of a run do together, and what one process alone does."""

import os
import subprocess
import sys

import pytest

from paligemma.errors import DatasetError
from paligemma.learning import processes

WORKER = """
import sys
import torch
from paligemma.errors import DatasetError
from paligemma.learning import processes

def program():
    with processes.connect_processes(torch.device("cpu")):
        rank = processes.rank()
        assert (processes.world_size(), processes.num_local_processes(), processes.is_first()) == (2, 2, rank == 0)
        assert processes.gather(f"value {rank}") == ["value 0", "value 1"] and processes.sums(rank, 0.5) == [1, 1.0]
        assert processes.from_first(lambda: f"value {rank}") == "value 0"
        processes.barrier()
        def fail():
            raise DatasetError("no.", path="x.jsonl")
        try:
            processes.from_first(fail)
        except DatasetError as error:
            assert (error.message, error.path, error.code) == ("no.", "x.jsonl", 3)
            print("raised", flush=True)
            if sys.argv[1] == "fails":
                raise

try:
    program()
except DatasetError:
    print("reported", flush=True)
    processes.exit_process(3)
processes.exit_process(0)
"""


def test_one_process_is_alone(monkeypatch):
    monkeypatch.setenv("RANK", "1")  # left by another launcher: torchrun sets WORLD_SIZE, too
    assert (processes.rank(), processes.world_size(), processes.num_local_processes()) == (0, 1, 1) and processes.is_first()
    assert processes.gather("x") == ["x"] and processes.sums(2, 0.5) == [2, 0.5] and processes.from_first(lambda: 3) == 3
    assert processes.exit_process(7) == 7
    with processes.connect_processes("cpu"):
        processes.barrier()
    with pytest.raises(DatasetError):
        processes.from_first(lambda: (_ for _ in ()).throw(DatasetError("no.")))


@pytest.mark.parametrize(("ending", "reports"), [("passes", 0), ("fails", 1)])
def test_two_processes_share_values_and_report_an_error_once(tmp_path, ending, reports):
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(tmp_path / "worker.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run([*command, ending], env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode != 0) == bool(reports), done.stderr
    assert (done.stdout.count("raised"), done.stdout.count("reported")) == (2, reports)
