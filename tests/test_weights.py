"""Loading and saving whole checkpoints: what loads, what is refused with which sentence, and at what cost."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import weights
from tiny import make_model, raw_config

EMBEDDING = "language_model.model.embed_tokens.weight"
POSITIONS = "vision_tower.vision_model.embeddings.position_embedding.weight"


def write_checkpoint(folder: Path, tensors: dict | None = None, *, family: str = "gemma", shards: int = 1, **config) -> Path:
    """A tiny checkpoint written by the library, not by our own writer; `config` overrides config.json's top level."""
    folder.mkdir(exist_ok=True)
    tensors = make_model(family).state_dict() if tensors is None else tensors
    (folder / "config.json").write_text(json.dumps(raw_config(family) | config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names, weight_map = list(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in names[i::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[i::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def edit_config(folder: Path, change) -> None:
    """Lets `change` alter the dict of config.json."""
    raw = json.loads((folder / "config.json").read_text())
    change(raw)
    (folder / "config.json").write_text(json.dumps(raw))


def respell(tensors: dict, tower: str, decoder: str, projector: str, prefix: str = "") -> dict:
    """The same tensors under the keys of another program."""
    renamed = {}
    for name, tensor in tensors.items():
        name = name.replace("vision_tower.vision_model.", tower).replace("language_model.model.", decoder)
        renamed[prefix + name.replace("multi_modal_projector.", projector)] = tensor
    return renamed


def assert_same(model: torch.nn.Module, tensors: dict) -> None:
    state = model.state_dict()
    assert state.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=0)


SPELLINGS = {
    "hub": ("vision_tower.vision_model.", "language_model.model.", "multi_modal_projector."),
    "transformers 5 file": ("vision_tower.", "language_model.model.", "multi_modal_projector."),
    "transformers 5 state dict": ("model.vision_tower.", "model.language_model.", "model.multi_modal_projector."),
    "transformers 4.52 file": ("model.vision_tower.vision_model.", "model.language_model.", "model.multi_modal_projector."),
}


@pytest.mark.parametrize("prefix", ["", "base_model.model.", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_loads(tmp_path, spelling, prefix):
    tensors = make_model("gemma2").state_dict()
    folder = write_checkpoint(tmp_path, respell(tensors, *SPELLINGS[spelling], prefix), family="gemma2")
    assert_same(weights.load_model(folder), tensors)
