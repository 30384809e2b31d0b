"""A float16 model on a simulated CUDA card: in range in the prefill and in every step, recorded or not."""

import pytest
import torch

from paligemma.checkpoints import weights
from paligemma.gpu import graphs
from paligemma.layers.batch_cache import BatchCache
from tests.gpu.pretend import pretend, waits
from tests.layers.test_float16 import enlarge_residual_stream, enlarged, exact_logits
from tests.tiny import FAMILIES, make_batch

STEPS = 6  # the fourth step is recorded


@pytest.mark.parametrize("device, mode", [("cuda:0", "off"), ("cuda:0", "record"), ("cuda:0,cuda:1", "off")])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_float16_model_on_a_t4_stays_in_range(family, device, mode, tmp_path):
    """The residual stream is above 65504. The logits are as near to those in float64 as rounding to float16 allows."""
    weights.save_model(enlarged(enlarge_residual_stream, family), tmp_path)
    batch = make_batch([(1, 3, STEPS)])
    answer = batch["token_type_ids"][0].bool()
    prompt = {key: value if key == "pixel_values" else value[:, ~answer] for key, value in batch.items()}
    with pretend(device, capability=(7, 5), name="Tesla T4") as gpu, torch.no_grad():
        model = weights.load_model(tmp_path, device=device, dtype="fp16", graphs=mode, final_softcap=None)
        assert isinstance(model, graphs.RecordedPaliGemma) == (mode == "record")
        first, dtypes = model.vision_tower.vision_model.encoder.layers[0], []
        first.register_forward_pre_hook(lambda _module, inputs: dtypes.append(inputs[0].dtype))
        cache = model.new_cache(1, len(answer), BatchCache)
        assert model.dtype == torch.float16
        found = [model.prefill(cache, **prompt).cpu()]
        assert dtypes == [torch.float32]
        for token in batch["input_ids"][0, answer].to("cuda:0"):
            with gpu.part() as events:
                logits = model.decode(cache, token[None])
            # The first recorded step waits: before it is recorded, and where it is compared with the plain step.
            own = [event for event in events if event.file not in ("graphs.py", "self_check.py")]
            assert waits(own) == []
            found.append(logits.cpu())
        assert not gpu.mismatches
        del cache  # before the card is gone
    exact, roundings = exact_logits(weights.load_model(tmp_path, final_softcap=None, dtype="fp32").half(), batch)
    for logits, position in zip(torch.cat(found), range(int((~answer).sum()) - 1, len(answer)), strict=True):
        token = int(exact[0, position].argmax())
        assert abs(logits[token] - exact[0, position, token].detach()) <= roundings.error_bound(exact[0, position, token])
