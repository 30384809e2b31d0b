"""The optimisers of the demo's training: Muon for the matrices of layers, AdamW for all other weights.

Training runs in several processes with one core each, which average their gradients. The learning rate is a function of the CPU
time used so far, so a stage does the same amount of work whatever else runs on the machine, and the processes may be paused.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
from torch import Tensor, distributed, nn

from paligemma.files import open_atomic

WARMUP, PLATEAU = 0.03, 0.4  # shares of a stage at which the learning rate reaches its peak, and at which it begins to fall


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates (Jordan, 2024: kellerjordan.github.io/posts/muon).

    This is torch.optim.Muon, except that it handles all matrices of one shape at once, and each process orthogonalises its
    share of them.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @staticmethod
    def orthogonalise(x: Tensor, steps: int = 5) -> Tensor:
        """The nearest matrices whose singular values are all about 1, by Newton-Schulz iteration; x is a stack of matrices."""
        is_tall = x.shape[1] > x.shape[2]
        x = x.mT if is_tall else x
        x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
        for _ in range(steps):
            gram = x @ x.mT
            x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
        return (x.mT if is_tall else x).float()

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
            for (rows, columns), parameters in by_shape.items():
                updates = []
                for parameter in parameters:
                    buffer = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
                    buffer.lerp_(parameter.grad, 1 - group["momentum"])
                    updates.append(parameter.grad.lerp(buffer, group["momentum"]))
                orthogonal = torch.zeros(len(parameters), rows, columns)  # each process fills its share; all_reduce adds them
                mine = slice(distributed.get_rank(), None, distributed.get_world_size())
                if len(orthogonal[mine]):
                    orthogonal[mine] = self.orthogonalise(torch.stack(updates)[mine]) * max(1, rows / columns) ** 0.5
                distributed.all_reduce(orthogonal)
                for parameter, update in zip(parameters, orthogonal, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])


class Trainer:
    """Updates modules with both optimisers, sets the learning rate, and writes a log.

    Args:
        modules: the modules to train. Parameters of a `vision_tower` get `options.tower_rate` times the learning rate.
        options: minutes, muon_lr, adam_lr, tower_rate, and final (the learning rate at the end, relative to its peak).
    """

    def __init__(self, modules: nn.Module, options: argparse.Namespace):
        self.seconds, self.start, self.steps, self.progress = options.minutes * 60, time.process_time(), 0, 0.0
        self.final, self.parent = options.final, os.getppid()
        self.parameters = [p for p in modules.parameters() if p.requires_grad]
        groups: dict[tuple[bool, bool], list] = {}
        for name, p in modules.named_parameters():
            groups.setdefault((p.dim() == 2 and ".layers." in name, "vision_tower" in name), []).append(p)
        self.optimisers = []
        for (is_matrix, is_tower), parameters in groups.items():
            peak = (options.muon_lr if is_matrix else options.adam_lr) * (options.tower_rate if is_tower else 1)
            if is_matrix:
                self.optimisers.append((peak, Muon(parameters, peak, weight_decay=0.01)))
            else:
                self.optimisers.append((peak, torch.optim.AdamW(parameters, peak, betas=(0.9, 0.98), weight_decay=0.01)))

    @property
    def clock(self) -> float:
        """CPU time used by this process, as a fraction of its budget, `minutes`. `progress` is the mean over all processes."""
        return (time.process_time() - self.start) / self.seconds

    def step(self, loss: Tensor) -> None:
        """One update with the mean gradient of all processes.

        The learning rate rises until WARMUP, stays until PLATEAU, and falls to `final` times its peak at the end.
        """
        if os.getppid() != self.parent:
            raise SystemExit("the process that started this one has ended.")
        loss.backward()
        grads = [p.grad for p in self.parameters]
        flat = torch.cat([torch.full((1,), self.clock), *(grad.flatten() for grad in grads)]) / distributed.get_world_size()
        distributed.all_reduce(flat)
        self.progress = float(flat[0])
        for grad, mean in zip(grads, flat[1:].split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(mean.view_as(grad))
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        left = max(0.0, 1 - self.progress) / (1 - PLATEAU)
        rate = min(1.0, self.progress / WARMUP + 0.01, self.final + (1 - self.final) * left)
        for peak, optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = peak * rate
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.steps += 1

    def log(self, options: argparse.Namespace, numbers: dict[str, float]) -> None:
        """Appends a line to runs/log.jsonl, and prints it."""
        spent = {"minutes": self.progress * self.seconds / 60, "steps": self.steps, **numbers}
        line = {"stage": options.name, "pixels": options.pixels} | {name: round(value, 4) for name, value in spent.items()}
        with (options.runs / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


def save(folder: Path, name: str, state: dict) -> None:
    """Writes the state to folder/name. If the program is interrupted, the old file stays unchanged."""
    with open_atomic(folder / name) as stream:
        torch.save(state, stream)


def init(module: nn.Module) -> None:
    """Initialises weights with small normal values, the tower's position embedding included."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.normal_(child.weight, std=child.in_features**-0.5 * 0.8)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, nn.Embedding):
            nn.init.normal_(child.weight, std=child.embedding_dim**-0.5)
    for name, parameter in module.named_parameters():
        if name.endswith(("out_proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight")):
            parameter.data.mul_(0.3)
