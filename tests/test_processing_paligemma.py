"""The processor: pixels and ids equal to transformers', control tokens that cannot be typed, text from ids."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_tokenizer import write_processor

from processing_paligemma import PaliGemmaProcessor


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("processor")
    write_processor(path)
    return path


@pytest.fixture(scope="session")
def reference(folder):
    from transformers import PaliGemmaProcessor as Reference

    return Reference.from_pretrained(folder)


@pytest.fixture(scope="session")
def processor(folder):
    return PaliGemmaProcessor.from_pretrained(folder)


def picture(width: int = 37, height: int = 23, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_everything_equals_transformers_with_an_answer(processor, reference):
    ours = processor(picture(), "detect red car ; <loc0000> é\U0001f600", "the cat")
    theirs = reference(
        images=picture(), text="<image>detect red car ; <loc0000> é\U0001f600", suffix="the cat", return_tensors="pt"
    )
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
