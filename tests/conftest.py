"""What every test runs under: no network, no time limits, one thread (equal numbers everywhere, and no fight over cores)."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("slow machines", deadline=None)
settings.load_profile("slow machines")
