"""The simulated devices behave as real ones where it matters: what they refuse, what makes the CPU wait, when copies arrive."""

import pytest
import torch
from torch import nn

from tests.gpu.pretend import count, kernels, pretend, waits

DEVICES = ["cuda:0", "cuda:1", "mps:0"]


def names(device):
    return "mps" if device == "mps:0" else "cuda:0,cuda:1"


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_report_their_device_and_keep_their_numbers(device):
    with pretend(names(device)) as gpu:
        made = torch.arange(6.0, device=device).view(2, 3)
        moved = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]).to(device)
        product = made @ moved
        assert {str(x.device) for x in (made, moved, product, torch.tensor([1, 2], device=device))} == {device}
        assert product.is_cuda == (device != "mps:0") and product.to(device) is product
        assert product.tolist() == [[13.0, 16.0], [40.0, 52.0]] and product[1, 0].item() == 40
        assert torch.equal(product.cpu(), torch.tensor([[13.0, 16.0], [40.0, 52.0]]))
        with pytest.raises(TypeError, match="can't convert"):
            product.numpy()
        assert kernels(gpu.events)["mm"] == 1 and gpu.mismatches == []


def test_modules_move_to_a_device_and_back():
    layer, x = nn.Linear(3, 2), torch.ones(1, 3)
    expected = layer(x)
    with pretend("cuda:0"), torch.no_grad():
        layer.to("cuda:0")
        assert layer.weight.is_cuda and isinstance(layer.weight, nn.Parameter)
        assert torch.equal(layer(x.to("cuda:0")).cpu(), expected)
        layer.cpu()
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("other", ["cpu", "cuda:1"])
def test_operators_between_devices_are_refused(other):
    with pretend("cuda:0,cuda:1") as gpu:
        x = torch.ones(3, device="cuda:0")
        assert (x * torch.tensor(2.0)).tolist() == [2, 2, 2]  # a single number on the CPU is fine, as in torch
        assert gpu.mismatches == []
        with pytest.raises(RuntimeError, match=f"tensors are on cuda:0 and on {other}"):
            x + torch.ones(3, device=other)
        assert len(gpu.mismatches) == 1
        assert x.to(other).device == torch.device(other)


def test_float64_is_refused_on_mps():
    with pretend("mps") as gpu:
        x = torch.ones(3).to("mps")
        for make in (lambda: x.double(), lambda: torch.ones(3, dtype=torch.float64).to("mps")):
            with pytest.raises(RuntimeError, match="MPS has no float64"):
                make()
        assert len(gpu.mismatches) == 2


@pytest.mark.parametrize("device", DEVICES)
def test_reading_a_value_waits(device):
    reads = {
        "item": lambda x: x.sum().item(),
        "bool": lambda x: bool((x > 1).any()),
        "to the CPU": lambda x: x.cpu(),
        "to the device": lambda x: torch.ones(3).to(x.device),
        "nonzero": lambda x: x.nonzero(),
        "boolean index": lambda x: x[x > 1],
        "index on the CPU": lambda x: x[torch.tensor([0, 2])],
    }
    plain = [lambda x: x + 1, lambda x: x[0], lambda x: x.masked_fill(x > 1, 0), lambda x: x.topk(2), lambda x: x[1:].sort()]
    with pretend(names(device)) as gpu:
        x = torch.arange(3.0, device=device)
        for name, read in reads.items():
            with gpu.part() as events:
                read(x)
            assert len(waits(events)) == 1, name
        for work in plain:
            with gpu.part() as events:
                work(x)
            assert waits(events) == []


def test_a_late_copy_to_the_cpu_arrives_when_something_waits_for_it():
    with pretend("cuda:0", late_copies=True):
        x = torch.ones(3, device="cuda:0")
        first = x.to("cpu", non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        x += 1  # the copy has the numbers from before, because the device works in order
        second = (2 * x).to("cpu", non_blocking=True)
        assert first.isnan().all() and second.isnan().all()
        event.synchronize()
        assert first.tolist() == [1, 1, 1] and second.isnan().all()
        torch.cuda.synchronize()
        assert second.tolist() == [4, 4, 4]


def test_an_event_waits_for_the_card_of_its_stream_only():
    with pretend("cuda:0,cuda:1", late_copies=True) as gpu:
        copy = torch.ones(3, device="cuda:1").to("cuda:0").to("cuda:1").to("cpu", non_blocking=True)
        assert count(gpu.events, "d2d") == 2
        for stream, has_arrived in ((None, False), (torch.cuda.current_stream("cuda:1"), True)):
            event = torch.cuda.Event()
            event.record(stream)
            event.synchronize()
            assert (copy.tolist() == [1, 1, 1]) == has_arrived


@pytest.mark.parametrize("device", ["cuda:0", "mps:0"])
def test_a_source_that_changes_during_its_copy_is_a_race(device):
    with pretend(names(device), late_copies=True) as gpu:
        for changes in (False, True):
            source = torch.ones(3).pin_memory()
            target = source.to(device, non_blocking=True)
            if changes:
                source[1] = 5
            target.sum().item()
            source[2] = 7  # after something has waited, this is no fault
            target.sum().item()
            assert [event.kind for event in gpu.mismatches] == ["RACE"] * changes


def test_cuda_waits_for_copies_of_pageable_memory():
    with pretend("cuda:0") as gpu:
        with gpu.part() as events:
            torch.ones(3).to("cuda:0", non_blocking=True)
        assert len(waits(events)) == 1
        with gpu.part() as events:
            x = torch.ones(3).pin_memory().to("cuda:0", non_blocking=True)
            x.to("cpu", non_blocking=True)  # torch allocates pinned memory for the result
        assert waits(events) == [] and count(events, "h2d", "d2h") == 2


def test_a_captured_graph_runs_on_the_same_memory_at_each_replay():
    with pretend("cuda:0") as gpu:
        given, total = torch.ones(2, device="cuda:0"), torch.zeros(2, device="cuda:0")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            total.add_(given)
            result = total.view(2, 1).expand(2, 3) * 10
        assert total.tolist() == [0, 0] and result.isnan().all()  # capturing runs nothing
        for step in (1, 2):
            given[0] = step
            with gpu.part() as events:
                graph.replay()
            assert len(events) == 1
        assert total.tolist() == [3, 2] and result.tolist() == [[30] * 3, [20] * 3]


def test_waiting_is_refused_while_a_graph_is_captured():
    with pretend("cuda:0"):
        x = torch.ones(2, device="cuda:0")
        with (
            pytest.raises(RuntimeError, match="not permitted when stream is capturing"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            x.sum().item()
        assert x.sum().item() == 2


def test_kernels_of_another_card_are_refused_while_a_graph_is_captured():
    """A real card would run them at once instead of capturing them."""
    with pretend("cuda:0,cuda:1") as gpu:
        x = torch.ones(2, device="cuda:1")
        with torch.cuda.device(1), torch.cuda.graph(torch.cuda.CUDAGraph()):
            x.add_(1)
        with pytest.raises(RuntimeError, match="instead of being captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            x.add_(1)
        assert x.tolist() == [1, 1] and len(gpu.mismatches) == 1


def test_the_memory_of_a_card_and_its_name_can_be_chosen():
    with pretend("cuda:0,cuda:1", capability=(7, 5), memory=15 * 2**30, name="Tesla T4"):
        assert torch.cuda.is_available() and torch.cuda.device_count() == 2
        assert torch.cuda.mem_get_info(1) == (15 * 2**30, 15 * 2**30)
        assert torch.cuda.get_device_name(1) == "Tesla T4" and torch.cuda.get_device_capability() == (7, 5)
        assert torch.cuda.is_bf16_supported() and not torch.cuda.is_bf16_supported(including_emulation=False)
        torch.cuda.set_device(1)
        assert torch.ones(2, device="cuda").device == torch.device("cuda:1")
        with pytest.raises(RuntimeError, match="invalid device ordinal"):
            torch.ones(2, device="cuda:2")


def test_operators_that_only_a_gpu_has_are_one_kernel_each():
    a, b, weight = torch.randn(2, 3, 4), torch.randn(2, 4, 5), torch.randn(5)
    with pretend("cuda:0") as gpu:
        x = torch.bmm(a.bfloat16().to("cuda:0"), b.bfloat16().to("cuda:0"), out_dtype=torch.float32)
        y = nn.functional.rms_norm(x, (5,), weight.to("cuda:0"), 1e-6)
        assert kernels(gpu.events) == {"bmm": 1, "rms_norm": 1}
        x, y = x.cpu(), y.cpu()
    assert torch.equal(x, torch.bmm(a.bfloat16().float(), b.bfloat16().float()))
    assert torch.equal(y, nn.functional.rms_norm(x, (5,), weight, 1e-6))


def test_everything_is_as_before_afterwards():
    owners = (torch.cuda, torch.mps, torch.backends.mps, torch.version, torch.Tensor, torch.nn.functional)
    before = [dict(vars(owner)) for owner in owners]
    for devices in ("cuda:0,cuda:1", "mps"):
        with pretend(devices):
            torch.ones(2, device=torch.device(devices.split(",")[-1]))
        assert [dict(vars(owner)) for owner in owners] == before
        with pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
            torch.ones(2, device=devices.split(":")[0])
    assert torch.tensor([1, 2]).sum().item() == 3
