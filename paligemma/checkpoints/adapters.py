"""LoRA adapters as files, in the format of PEFT: adapter_config.json and adapter_model.safetensors, read and written.

The mathematics, and what adapter_config.json may say, are in layers/lora.py. Checked in tests/layers/test_lora.py.
"""

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paligemma.checkpoints.file_names import ADAPTER_CONFIG_NAME, ADAPTER_NAME, explain_no_adapter, has_weights
from paligemma.checkpoints.headers import FLOATS, StoredTensor, read_header
from paligemma.checkpoints.safetensors_files import TensorReader, check_equal, check_values, write_tensors
from paligemma.errors import CheckpointError, OutputError, listed
from paligemma.files import move_into_place, staging_folder, stat_path, sync_folder
from paligemma.layers import lora
from paligemma.parameter_names import canonical_name, peft_name

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter in a folder: its settings, and where its file stores each A and B. No tensor is loaded yet."""

    folder: Path
    config: lora.LoraConfig
    stored: dict[str, StoredTensor]  # by our parameter names

    def checked_scalings(self, model: nn.Module) -> dict[str, float]:
        """The scaling factor of the LoRA update (the matrix product B A) of each adapted module, by the name of the module.

        Raises: CheckpointError unless every tensor belongs to a matrix of this model.
        """
        try:
            shapes = {name: tensor.shape for name, tensor in self.stored.items()}
            bases = {f"{name}.weight": tuple(m.weight.shape) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
            scalings = {name: self.config.scaling(name) for name in lora.modules_of(shapes, self.config, bases)}
            unused = self.config.unused_keys(scalings)
        except ValueError as error:
            text = f"{self.folder} does not fit its base model: {error} Give the right base model as --base_model."
            raise CheckpointError(text, path=self.folder) from error
        if unused:
            file = self.folder / ADAPTER_CONFIG_NAME
            log.warning("%s: the patterns %s match none of the modules that the adapter changes.", file, listed(unused))
        return scalings

    def merged(self, name: str, weight: Tensor, scaling: float, reader: TensorReader) -> Tensor:
        """The matrix `weight` of the module `name`, plus the update that the adapter makes to it."""
        a, b = (reader.read(self.stored[f"{name}.{matrix}.weight"], torch.float32) for matrix in ("lora_A", "lora_B"))
        merged = lora.merged_weight(weight, a, b, scaling)
        if not reader.allow_nonfinite:
            check_values(merged, replace(self.stored[f"{name}.lora_B.weight"], name=f"{name} after merging the adapter"))
        return merged


def read_adapter(folder: Path, raw: dict[str, Any]) -> Adapter:
    """The adapter in a folder. Raises: CheckpointError for an adapter that cannot be used.

    Args:
        raw: content of adapter_config.json.
    """
    file = folder / ADAPTER_CONFIG_NAME
    try:
        config = lora.LoraConfig.from_peft(raw)
    except ValueError as error:
        text = f"{file}: {error} Or merge the adapter with the program that made it, and load the merged model."
        raise CheckpointError(text, path=file) from error
    if stat_path(folder / ADAPTER_NAME) is None and not (folder / ADAPTER_NAME).is_symlink():
        raise CheckpointError(explain_no_adapter(folder), path=folder / ADAPTER_NAME)
    stored: dict[str, StoredTensor] = {}
    for tensor in read_header(folder / ADAPTER_NAME).values():
        name = canonical_name(tensor.name)
        if tensor.dtype not in FLOATS:
            raise CheckpointError(f"{tensor.file}: {tensor.name} has dtype {tensor.dtype}; floats are needed.", path=tensor.file)
        if name in stored:
            check_equal(stored[name], tensor)
        stored[name] = tensor
    if others := [tensor.name for name, tensor in stored.items() if lora.OTHER_MODULES & {*name.split(".")}]:
        text = f"{folder / ADAPTER_NAME} holds {listed(others)}, but adapters of embeddings and of lm_head are not supported."
        text += " Train the adapter without these modules, or merge the adapter with the program that made it."
        raise CheckpointError(text, path=folder / ADAPTER_NAME)
    return Adapter(folder, config, stored)


def save_adapter(
    state: dict[str, Tensor], config: lora.LoraConfig, folder: str | Path, base: str | None, revision: str | None = None
) -> None:
    """Writes an adapter of a few MB in the format of PEFT; load_model and PEFT read it.

    Args:
        state: from lora.adapter_state.
        base: folder or hub id of the model that was adapted.
        revision: branch, tag or commit of the hub id.
    Raises: OutputError if the folder cannot be written; the old files are then unchanged.
    """
    folder = Path(folder)
    if has_weights(folder, OutputError):
        text = f"{folder} holds a whole model, and an adapter in the same folder would be added to it. Choose another folder."
        raise OutputError(text, path=folder)
    names = dict.fromkeys(name.rsplit(".", 2)[0] for name in state)
    tensors = {f"base_model.model.{peft_name(name)}": tensor for name, tensor in state.items()}
    settings = json.dumps(config.to_peft(base, names, revision), indent=2) + "\n"
    with staging_folder(folder, "Free disk space, or choose another folder.") as temporary:
        write_tensors(temporary / ADAPTER_NAME, tensors)
        (temporary / ADAPTER_CONFIG_NAME).write_text(settings, encoding="utf-8")
        sync_folder(temporary)
        for name in (ADAPTER_NAME, ADAPTER_CONFIG_NAME):
            move_into_place(temporary / name, folder / name)
