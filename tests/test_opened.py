"""open_checkpoint: everything about a checkpoint is resolved and read once."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from paligemma import opened
from paligemma.checkpoints import adapters, hub, weights
from paligemma.errors import CheckpointError, UsageError
from paligemma.layers import lora
from paligemma.opened import open_checkpoint
from paligemma.programs import annotate, commandline, finetune
from tests.tiny_checkpoint import make_checkpoint

COUNTED = ("config.json", "adapter_config.json", "generation_config.json")
OPENS: list[Path] = []  # paths of COUNTED names that this process has opened


def on_event(event: str, arguments: tuple) -> None:
    if event == "open" and isinstance(arguments[0], (str, Path)) and Path(arguments[0]).name in COUNTED:
        OPENS.append(Path(arguments[0]))


sys.addaudithook(on_event)  # sees every file that Python opens; a hook cannot be removed


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, an adapter for it, a picture and examples to train on."""
    folder = tmp_path_factory.mktemp("world")
    model = weights.load_model(make_checkpoint(folder / "model"))
    lora.inject(model, config := lora.LoraConfig(r=2), lora.targets(model))
    adapters.save_adapter(lora.adapter_state(model), config, folder / "adapter", str(folder / "model"))
    Image.new("RGB", (20, 20), "red").save(folder / "cat.png")
    example = {"image": "cat.png", "prefix": "color", "suffix": "red"}
    (folder / "train.jsonl").write_text(json.dumps(example) + "\n")
    return folder


@pytest.fixture
def counted(world, monkeypatch):
    """The files of `world` that were opened and the names that were resolved since the test began, each with its count."""
    resolved, real = [], hub.resolve
    for module in (hub, weights):
        monkeypatch.setattr(module, "resolve", lambda name, *rest: resolved.append(Path(name).name) or real(name, *rest))
    OPENS.clear()
    return lambda: (Counter(str(path.relative_to(world)) for path in OPENS if path.is_relative_to(world)), Counter(resolved))


def starts(world: Path, output: Path) -> dict:
    """Each program: its flags, what runs it, and a command line."""
    from paligemma import inference

    picture, data = str(world / "cat.png"), str(world / "train.jsonl")
    return {
        "inference": (inference.Flags, inference.program, [f"--image_file_path={picture}", "--prompt=ocr"]),
        "annotate": (annotate.Flags, annotate.program, [picture, "--task=ocr", f"--output={output / 'rows.jsonl'}"]),
        "finetune": (finetune.Flags, finetune.program, [f"--train={data}", "--steps=1", f"--output={output / 'run'}"]),
    }


@pytest.mark.parametrize("name", ["model", "adapter"])
@pytest.mark.parametrize("program", ["inference", "annotate", "finetune"])
def test_a_program_resolves_and_reads_everything_once(program, name, world, tmp_path, counted):
    flags, run, given = starts(world, tmp_path)[program]
    assert commandline.run(flags, run, [f"--model_path={world / name}", *given]) == 0
    opens, resolved = counted()
    expected = {f"model/{file}": 1 for file in ("config.json", "generation_config.json") if (world / "model" / file).exists()}
    expected |= {"adapter/adapter_config.json": 1} if name == "adapter" else {}
    assert opens == expected
    assert resolved == {each: 1 for each in {name, "model"}}


def test_without_a_name_the_bundled_checkpoint_is_opened():
    checkpoint = open_checkpoint()
    assert checkpoint.folder == checkpoint.base == opened.BUNDLED
    assert checkpoint.name == str(opened.BUNDLED) and checkpoint.kind == "other" and checkpoint.adapter_config is None
    assert checkpoint.processor.num_image_tokens == checkpoint.config.num_image_tokens


def test_an_adapter_has_two_folders_and_a_fingerprint_of_both(world):
    model, adapter = open_checkpoint(world / "model"), open_checkpoint(world / "adapter")
    assert (adapter.folder, adapter.base) == (world / "adapter", world / "model") and adapter.config == model.config
    assert adapter.fingerprint != model.fingerprint == open_checkpoint(world / "model").fingerprint
    assert {path.parent for _, path in adapter.files} == {world / "adapter", world / "model"}


def test_what_is_wrong_is_said_before_weights_are_read(world, tmp_path):
    with pytest.raises(UsageError, match="is allowed only for an adapter"):
        open_checkpoint(world / "model", base_model=world / "model")
    with pytest.raises(CheckpointError, match="there is no folder"):
        open_checkpoint(tmp_path / "nowhere")
