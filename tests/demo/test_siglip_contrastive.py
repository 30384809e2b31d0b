"""Both towers, their logits and losses against transformers; the loss in blocks against the loss at once."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from demo.siglip_contrastive import SiglipModel, SiglipTextConfig, sigmoid_loss, softmax_loss
from paligemma.configuration import SiglipVisionConfig

VISION = {"hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"image_size": 28, "patch_size": 14}
TEXT = {"vocab_size": 99, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3}
TEXT |= {"max_position_embeddings": 12, "projection_size": 48}


def make_model(seed=0):
    torch.manual_seed(seed)
    model = SiglipModel(SiglipVisionConfig(**VISION), SiglipTextConfig(**TEXT)).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2
    return model


def make_reference(model):
    from transformers import SiglipConfig
    from transformers import SiglipModel as Reference

    config = SiglipConfig(text_config=TEXT, vision_config=VISION)
    reference = Reference._from_config(config, attn_implementation="sdpa").eval()
    reference.load_state_dict(model.state_dict())  # every name is the same, and none is left over
    return reference


# Both sides compute in float64, so that how a processor sums float32 does not matter. A sum of some hundred products is then off
# by 1e-14 or so, and a term that is missing or counted twice by 1e-3.
SAME = 1e-10


def in_double(model, batch):
    return model.double(), (batch[0].double(), batch[1])


def make_batch(seed=0, count=5):
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 28, 28, generator=draw) * 2 - 1, torch.randint(99, (count, 12), generator=draw)


@pytest.mark.parametrize("seed", range(3))
def test_logits_and_loss_equal_those_of_transformers(seed):
    model, (pixels, ids) = in_double(make_model(seed), make_batch(seed))
    reference = make_reference(model).double()
    theirs = reference(input_ids=ids, pixel_values=pixels, return_loss=True)
    torch.testing.assert_close(model(pixels, ids), theirs.logits_per_image, rtol=0, atol=SAME)
    torch.testing.assert_close(model.loss(pixels, ids), theirs.loss, rtol=0, atol=10 * SAME)  # a sum of 25 logarithms


def test_gradients_equal_those_of_transformers():
    model, (pixels, ids) = in_double(make_model(), make_batch())
    reference = make_reference(model).double()
    model.loss(pixels, ids).backward()
    reference(input_ids=ids, pixel_values=pixels, return_loss=True).loss.backward()
    expected = dict(reference.named_parameters())
    for name, ours in model.named_parameters():
        torch.testing.assert_close(ours.grad, expected[name].grad, rtol=SAME, atol=SAME)


def test_softmax_loss_written_out():
    image, text = (F.normalize(torch.randn(6, 8, dtype=torch.float64), dim=-1) for _ in range(2))
    odds = (text @ image.T * 9.0).exp()
    of_texts, of_pictures = (-(odds.diagonal() / odds.sum(dim)).log().mean() for dim in (1, 0))
    torch.testing.assert_close(softmax_loss(image, text, torch.tensor(9.0)), (of_texts + of_pictures) / 2, rtol=0, atol=SAME)


def test_sigmoid_loss_worked_example():
    # Two pairs, cosines of 1 and 0, scale 2 and bias -1: logits 1 on the diagonal and -1 off it, each right with sigmoid(1).
    eye = torch.eye(2)
    expected = -2 * torch.sigmoid(torch.tensor(1.0)).log()
    losses = sigmoid_loss(eye, eye, torch.tensor(2.0), torch.tensor(-1.0))
    torch.testing.assert_close(losses, expected.expand(2))


def test_blocks_sum_to_the_whole():
    image, text = (F.normalize(torch.randn(6, 8, dtype=torch.float64), dim=-1) for _ in range(2))
    scale, bias = torch.tensor(5.0), torch.tensor(-2.0)
    blocks = [sigmoid_loss(image[i : i + 2], text, scale, bias, offset=-i) for i in range(0, 6, 2)]
    torch.testing.assert_close(sum(blocks), sigmoid_loss(image, text, scale, bias), rtol=0, atol=SAME)


def test_zero_shot_finds_the_text_of_each_picture_after_a_little_training():
    torch.manual_seed(0)
    model, (pixels, ids) = SiglipModel(SiglipVisionConfig(**VISION), SiglipTextConfig(**TEXT)), make_batch()
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        optimiser.zero_grad()
        model.loss(pixels, ids).backward()
        optimiser.step()
    found = model.eval().zero_shot(pixels, ids)
    assert found.argmax(1).tolist() == list(range(5)) and found.diagonal().min() > 0.5


def test_texts_that_are_too_long_are_refused():
    with pytest.raises(ValueError, match="the texts have 13 tokens"):
        make_model()(torch.zeros(1, 3, 28, 28), torch.zeros(1, 13, dtype=torch.int64))


WORKER = """
import sys, torch
from torch import distributed
from tests.demo import test_siglip_contrastive as test
from demo.siglip_contrastive import distributed_sigmoid_loss
distributed.init_process_group("gloo")
rank, world = distributed.get_rank(), distributed.get_world_size()
model, (pixels, ids) = test.in_double(test.make_model(), test.make_batch(count=6))
mine = slice(rank * 3, rank * 3 + 3)
loss = distributed_sigmoid_loss(
    model.encode_images(pixels[mine]), model.encode_texts(ids[mine]), model.logit_scale.exp(), model.logit_bias
)
loss.backward()
whole = loss.detach().clone()
distributed.all_reduce(whole)
whole_model = test.make_model().double()
expected = whole_model.loss(pixels, ids)
expected.backward()
torch.testing.assert_close(whole / world, expected.detach(), rtol=0, atol=test.SAME)
for ours, theirs in zip(model.parameters(), whole_model.parameters(), strict=True):
    distributed.all_reduce(ours.grad)
    torch.testing.assert_close(ours.grad / world, theirs.grad, rtol=test.SAME, atol=test.SAME)
distributed.destroy_process_group()
"""


def test_two_processes_have_the_loss_and_the_gradients_of_one(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(tmp_path / "worker.py")]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
