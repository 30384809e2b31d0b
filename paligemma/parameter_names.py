"""The parameter names of one model, as different programs write them: a table of prefixes, and conversion in both directions.

There are four spellings. This is how each spells the name of one matrix of the language model and of one of the vision tower:
1. files of the hub, and this project
    language_model.model.layers.0.self_attn.q_proj.weight
    vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight
2. files of transformers 4.52 and later 4.x
    model.language_model.layers.0.self_attn.q_proj.weight
    model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight
3. state dicts of transformers 5, and PEFT
    model.language_model.layers.0.self_attn.q_proj.weight
    model.vision_tower.encoder.layers.0.mlp.fc1.weight
4. files of transformers 5
    language_model.model.layers.0.self_attn.q_proj.weight
    vision_tower.encoder.layers.0.mlp.fc1.weight
Checked in tests/checkpoints/test_weights.py, with one test per spelling, and in tests/layers/test_lora.py.
"""

import re
from functools import lru_cache

# Pairs of a prefix in the file and our prefix, which the hub also uses. The first one that matches is used, so longer prefixes
# come before shorter ones.
SPELLINGS = (
    ("model.vision_tower.vision_model.", "vision_tower.vision_model."),  # files of transformers 4.52 and later 4.x
    ("model.vision_tower.", "vision_tower.vision_model."),  # state dicts of transformers 5
    ("model.language_model.", "language_model.model."),  # files of transformers 4.52 and later 4.x, state dicts of transformers 5
    ("model.multi_modal_projector.", "multi_modal_projector."),  # the same programs as in the line above
    ("vision_tower.vision_model.", "vision_tower.vision_model."),  # the hub
    ("vision_tower.", "vision_tower.vision_model."),  # files of transformers 5
    # The output matrix is the embedding matrix. Some files store it under both names, some only as lm_head.
    ("language_model.lm_head.", "lm_head."),
)
WRAPPERS = re.compile(r"^(?:base_model\.model\.|module\.)+")  # prefixes that PEFT and DistributedDataParallel add


def canonical_name(name: str) -> str:
    """Our name of a parameter, whatever program wrote the file."""
    name = name.replace("_orig_mod.", "")  # torch.compile adds this text in front of every compiled part
    name = WRAPPERS.sub("", name, count=1)
    for theirs, ours in SPELLINGS:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


@lru_cache(maxsize=4096)
def all_spellings(name: str) -> tuple[str, ...]:
    """The name of one of our modules or parameters in every spelling, ours first."""
    return (name, *(theirs + name.removeprefix(ours) for theirs, ours in SPELLINGS if name.startswith(ours)))


def peft_name(name: str) -> str:
    """The name that PEFT gives to one of our modules, as in the state dict of transformers 5."""
    shorter = name.replace("language_model.model.", "language_model.").replace("vision_tower.vision_model.", "vision_tower.")
    return f"model.{shorter}"
