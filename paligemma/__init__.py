"""PaliGemma generates text from a picture and a prompt.

    import paligemma

    model = paligemma.load()                       # the bundled demo model; load(name) takes a hub id or a folder
    model.caption("cat.jpg")                       # str
    model.ask("cat.jpg", "what is on the table?")  # str
    found = model.detect("street.jpg", "car", "person")
    for thing in found.objects:
        print(thing.label, thing.score, thing.xyxy)
    found.save("out.png")

Every public name is in __all__. A name is imported when it is first used, so `import paligemma` is fast and does not import
torch. Checked in tests/test_model.py.
"""

__version__ = "0.1.0"  # pyproject.toml and --version read it here

# Type checkers treat this name as True. It is not imported from typing, because that import is slow.
TYPE_CHECKING = False
if TYPE_CHECKING:  # the names of _SOURCES, for type checkers and editors
    from paligemma import errors
    from paligemma.checkpoints.weights import load_model, save_model
    from paligemma.configuration import PaliGemmaConfig
    from paligemma.errors import (
        AccessError,
        CheckpointError,
        DatasetError,
        DeviceError,
        GenerationError,
        ImageError,
        OutputError,
        PaliGemmaError,
        PromptError,
        TokenizerError,
        UsageError,
    )
    from paligemma.explanation import Explanation
    from paligemma.generation import Sampling, generate, generate_many
    from paligemma.model import (
        EXAMPLE_PICTURE,
        DetectedObject,
        DetectionResult,
        EncodedPicture,
        Model,
        load,
    )
    from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration
    from paligemma.pictures.images import load_image
    from paligemma.processing_paligemma import PaliGemmaProcessor
    from paligemma.tasks import Annotator, Request, Result

__all__ = [
    "EXAMPLE_PICTURE", "AccessError", "Annotator", "CheckpointError", "DatasetError", "DetectedObject", "DetectionResult",
    "DeviceError", "EncodedPicture", "Explanation", "GenerationError", "ImageError", "Model", "OutputError", "PaliGemmaConfig",
    "PaliGemmaError", "PaliGemmaForConditionalGeneration", "PaliGemmaProcessor", "PromptError", "Request", "Result", "Sampling",
    "TokenizerError", "UsageError", "errors", "generate", "generate_many", "load", "load_image", "load_model", "save_model",
]  # fmt: skip

if not TYPE_CHECKING:  # a type checker that saw __getattr__ would accept every name
    _SOURCES = {
        "checkpoints.weights": ("load_model", "save_model"),
        "configuration": ("PaliGemmaConfig",),
        "errors": tuple(name for name in __all__ if name.endswith("Error")),
        "explanation": ("Explanation",),
        "generation": ("Sampling", "generate", "generate_many"),
        "model": ("EXAMPLE_PICTURE", "DetectedObject", "DetectionResult", "EncodedPicture", "Model", "load"),
        "modeling_paligemma": ("PaliGemmaForConditionalGeneration",),
        "pictures.images": ("load_image",),
        "processing_paligemma": ("PaliGemmaProcessor",),
        "tasks": ("Annotator", "Request", "Result"),
    }

    def __getattr__(name):
        """Imports the module of a public name (PEP 562)."""
        import importlib

        if name == "errors":
            return importlib.import_module("paligemma.errors")
        for module, names in _SOURCES.items():
            if name in names:
                value = globals()[name] = getattr(importlib.import_module(f"paligemma.{module}"), name)
                return value
        raise AttributeError(f"module 'paligemma' has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__all__})
