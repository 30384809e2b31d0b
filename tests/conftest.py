"""What every test runs under: no network, one thread (equal numbers on every machine, and no fight over cores)."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch

torch.set_num_threads(1)
