"""Opens a checkpoint: resolves its name once, reads each settings file once, makes its processor, and loads weights on request.

To see how a checkpoint is opened, read next: checkpoints/weights.py (ModelFiles: the files of a model, and how it is loaded),
checkpoints/hub.py (a name -> a folder) and checkpoints/safetensors_files.py (the format). Importing this file imports torch.
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
        name: the name that was given, a folder or a hub id.
        kind: what the checkpoint was trained for, see tasks.checkpoint_kind.
        processor: made from the files of the model; an adapter's own files replace those of its base model.
    """

    def __init__(self, name: str, revision: str | None = None, base_model: str | Path | None = None):
        super().__init__(name, revision, base_model)
        self.name = name
        self.kind = checkpoint_kind(name)
        self.processor = PaliGemmaProcessor.from_files(self)


def open_checkpoint(
    name: str | Path | None = None, *, revision: str | None = None, base_model: str | Path | None = None
) -> Checkpoint:
    """The checkpoint of that name, before its weights are loaded; the bundled checkpoint if no name is given.

    Args: as in weights.load_model.
    Raises: CheckpointError, TokenizerError, AccessError or UsageError.
    """
    return Checkpoint(str(BUNDLED if name is None else name), revision, base_model)
