"""A checkpoint, opened once: its name resolved, its settings, tokenizer and image settings read, the weights on request.

To follow the opening, read on in checkpoints/weights.py (ModelFiles: which files there are, how they become a model),
checkpoints/hub.py (name -> folder) and checkpoints/safetensors_files.py (the format). Importing this file imports torch.
Checked in tests/test_opened.py.
"""

from pathlib import Path

from paligemma.checkpoints.weights import ModelFiles
from paligemma.files import BUNDLED
from paligemma.processing_paligemma import PaliGemmaProcessor
from paligemma.tasks import checkpoint_kind


class Checkpoint(ModelFiles):
    """The files of a model, and its processor, so that prompts can be checked before `load` loads the weights.

    Attributes: those of ModelFiles, and
        name: as it was given.
        kind: what the checkpoint was trained for, see tasks.checkpoint_kind.
        processor: of the model or, where an adapter brings its own files, of the adapter.
    """

    def __init__(self, name: str, revision: str | None = None, base_model: str | Path | None = None):
        super().__init__(name, revision, base_model)
        self.name = name
        self.kind = checkpoint_kind(name)
        self.processor = PaliGemmaProcessor.from_files(self)


def open_checkpoint(
    name: str | Path | None = None, *, revision: str | None = None, base_model: str | Path | None = None
) -> Checkpoint:
    """The checkpoint of that name, without its weights; the bundled one if no name is given.

    Args: as of weights.load_model.
    Raises: CheckpointError, TokenizerError, AccessError, UsageError, each with one sentence.
    """
    return Checkpoint(str(name or BUNDLED), revision, base_model)
