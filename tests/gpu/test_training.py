"""Fine-tuning on a simulated GPU. Only the backward pass is missing: torch cannot run it there, so gradients are constants."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from paligemma.checkpoints.weights import load_model
from paligemma.files import BUNDLED
from paligemma.gpu.cuda_decoding import CudaAttention, CudaModel
from paligemma.gpu.mps_workarounds import RowByRowAttention
from paligemma.gpu.patch_product import PatchProduct
from paligemma.learning import run, run_folder, training
from paligemma.programs import commandline, finetune
from tests.gpu.pretend import count, kernels, pretend, waits
from tests.learning.test_training import COUNT, make_trainer, toy_batch
from tests.tiny_checkpoint import make_checkpoint


@pytest.fixture
def pretended(monkeypatch):
    """A function that makes a trainer on a simulated GPU, and the GPU."""
    with pretend("cuda:0") as gpu:

        def make(**plan):
            trainer = make_trainer(**plan)
            trainer = training.Trainer(trainer.model.to("cuda:0"), trainer.plan, toy_batch, COUNT)

            def backward(_loss):
                for parameter in trainer.trained.values():
                    parameter.grad = torch.full_like(parameter, 0.01)

            monkeypatch.setattr(torch.Tensor, "backward", backward)
            return trainer

        yield make, gpu
        assert gpu.mismatches == []


@pytest.mark.parametrize("micro_batch_size", [4, 1])
def test_the_cpu_waits_once_per_update(pretended, micro_batch_size):
    make, gpu = pretended
    trainer = make(micro_batch_size=micro_batch_size)
    for _ in range(2):
        with gpu.part() as events:
            trainer.update()
        assert waits(events) == ["training.py update: to"]
        # For each micro-batch pixels, ids, padding, ends of the prompts; rows, positions, ids and weights of the answer tokens
        assert count(events, "h2d") == 8 * (4 // micro_batch_size)


def test_the_optimiser_changes_weights_in_place_on_a_gpu_and_keeps_its_bits_on_the_cpu(pretended, tmp_path):
    make, gpu = pretended
    trainer = make(learning_rate=1e-3)
    before = {name: parameter.detach().cpu() for name, parameter in trainer.trained.items()}
    with gpu.part() as events:
        trainer.update()
    done = kernels(events)
    assert done["_fused_adamw_"] > 0 and done["_foreach_lerp_"] == done["_foreach_addcdiv_"] == 0
    moved = 1e-3 * trainer.plan.schedule_factor(0)  # the first update of AdamW moves each weight by the learning rate
    for name, parameter in trainer.trained.items():
        torch.testing.assert_close(parameter.detach().cpu(), before[name] - moved, rtol=0, atol=1e-6)
    other = make(learning_rate=1e-3)
    other.restore(trainer.save(tmp_path))
    assert other.step == 1 and all(str(state["step"].device) == "cuda:0" for state in other.optimiser.state.values())
    other.update()
    assert make_trainer().optimiser.defaults["fused"] is None


@pytest.mark.parametrize(
    "method, capability, is_slow",
    [
        (["--dtype=bf16"], (8, 0), False),
        (["--dtype=bf16", "--method=lora"], (7, 5), True),
        (["--dtype=fp32", "--method=lora", "--gradient_checkpointing"], (7, 5), False),
    ],
)
def test_the_program_trains_evaluates_and_saves_on_the_card_that_is_named(
    method, capability, is_slow, tmp_path, monkeypatch, capsys
):
    """cuDNN's attention is off in training, too: it would build a plan for each new length of a batch."""
    (tmp_path / "model").mkdir()
    model = make_checkpoint(tmp_path / "model", context=512)
    lines = []
    for number, color in enumerate(("red", "green", "blue")):
        Image.new("RGB", (20, 20), color).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "prefix": "color", "suffix": color}))
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    trainers, update, cudnn = [], training.Trainer.update, []

    def backward(_loss):
        for parameter in trainers[-1].trained.values():
            parameter.grad = torch.full_like(parameter, 0.01)

    def record(trainer):
        trainers.append(trainer)
        cudnn.append(torch.backends.cuda.cudnn_sdp_enabled())
        return update(trainer)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(training.Trainer, "update", record)
    given = [f"--model_path={model}", f"--train={tmp_path / 'train.jsonl'}", f"--valid={tmp_path / 'train.jsonl'}", *method]
    given += [f"--output={tmp_path / 'run'}", "--device=cuda:1", "--batch_size=2", "--micro_batch_size=1", "--steps=3"]
    with pretend("cuda:0,cuda:1", late_copies=True, capability=capability) as gpu:
        assert commandline.run(finetune.Flags, finetune.program, given) == 0
        assert gpu.mismatches == [] and waits(gpu.events).count("training.py update: to") == 3
        assert {str(event.device) for event in gpu.events} == {"cuda:1"} and not any(cudnn) and len(cudnn) == 3
        final = {f"model.{name}": weight.detach().cpu() for name, weight in trainers[-1].trained.items()}
    (*_, saved) = run_folder.checkpoints(tmp_path / "run" / "checkpoints")
    tensors = {name: tensor for file in saved.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert all(torch.equal(tensors[name], weight) for name, weight in final.items())
    assert (tmp_path / "run" / "model" / "config.json").exists()
    scored = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all("anls" in line for line in scored if "valid_loss" in line)
    assert ("bfloat16 is slow on Pretended GPU (sm_75), which emulates it" in capsys.readouterr().err) == is_slow


@pytest.mark.parametrize("device, modules", [("mps", {RowByRowAttention}), ("cuda:0", {CudaAttention, CudaModel, PatchProduct})])
def test_the_model_of_an_evaluation_has_the_modules_for_its_device(device, modules):
    """Without them, batches of the bundled model would be wrong on Macs, and float32 would be TF32 in its first layer on CUDA."""
    with pretend(device) as gpu:
        model = load_model(BUNDLED, device=device)
        training.freeze_except(model, ["projector"])
        merged = run.merged_model(model, torch.bfloat16)
        assert all(any(isinstance(module, kind) for module in merged.modules()) for kind in modules)
        assert merged.state_dict().keys() == model.state_dict().keys()
        assert gpu.mismatches == []
