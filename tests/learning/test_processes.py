"""What the processes of a run do together, and what one process alone does."""

import os
import subprocess
import sys

import pytest
import torch

from paligemma.errors import DatasetError, DeviceError, UsageError
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


@pytest.fixture
def torchrun(monkeypatch):
    """Sets the variables of a process that torchrun has started, and the number of cards that torch finds."""

    def set_variables(local_rank, local_world_size=2, cards=2, nodes=1):
        variables = {"RANK": local_rank, "WORLD_SIZE": local_world_size * nodes, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
        variables |= {"LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_world_size}
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cards > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)

    return set_variables


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_process_takes_its_own_card(torchrun, name):
    found = []
    for rank in range(3):
        torchrun(rank, 3, cards=4)
        found.append(processes.own_device(name))
    assert found == ["cuda:0", "cuda:1", "cuda:2"]
    torchrun(1, cards=1)  # the launcher shows each process one card
    assert processes.own_device(name) == name
    torchrun(1, cards=0)
    assert (processes.own_device(name), processes.own_device("cpu")) == (name, "cpu")
    torchrun(2, 4, cards=2)
    with pytest.raises(DeviceError, match="this machine has 2 GPUs for 4 processes, and each .* Take --nproc_per_node 2"):
        processes.own_device(name)


def test_one_process_keeps_the_device_that_was_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [processes.own_device(name) for name in ("auto", "cuda", "cuda:3", "mps")] == ["auto", "cuda", "cuda:3", "mps"]
    processes.check_device("cuda:3")


def test_several_cards_for_a_process_or_several_processes_for_a_card_are_refused(torchrun):
    with pytest.raises(UsageError, match="a process trains on one card.*: torchrun --nproc_per_node 3 -m paligemma"):
        processes.check_device("cuda:0,cuda:1,cuda:2")
    torchrun(1)
    with pytest.raises(UsageError, match="--device cuda:0 would put 2 processes on one card. Leave it out"):
        processes.check_device("cuda:0")
    torchrun(0, local_world_size=1, nodes=2)  # one process per machine: the card may be named
    for name in ("cuda:1", "auto", "cpu"):
        processes.check_device(name)


def test_the_card_of_a_process_is_current_before_anything_is_loaded_and_known_to_nccl(torchrun, monkeypatch):
    torchrun(1)
    calls = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(("current", str(device))))
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda backend, **options: calls.append((backend, str(options.get("device_id"))))
    )
    with processes.connect_processes(torch.device("cuda:1")):
        calls.append("loads")
    assert calls == [("current", "cuda:1"), ("cpu:gloo,cuda:nccl", "cuda:1"), "loads"]
    calls.clear()
    with processes.connect_processes(torch.device("cpu")):
        pass
    assert calls == [("gloo", "None")]


def test_two_processes_with_one_gpu_are_one_line(torchrun, monkeypatch):
    torchrun(0)

    def fail(*_arguments, **_options):
        raise RuntimeError("NCCL error: invalid usage\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000")

    monkeypatch.setattr(torch.cuda, "set_device", lambda _device: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", fail)
    with pytest.raises(DeviceError, match="two processes have the same GPU"):
        with processes.connect_processes(torch.device("cuda")):
            pass
