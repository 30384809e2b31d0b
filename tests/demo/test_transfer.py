"""demo/transfer.py: `paligemma finetune` accepts what it writes, without changes."""

import json
import sys
from itertools import islice
from pathlib import Path

import numpy as np

from demo import shapes, transfer
from paligemma.files import BUNDLED
from paligemma.learning import dataset
from paligemma.processing_paligemma import PaliGemmaProcessor
from paligemma.programs import finetune
from paligemma.programs.config_file import read_config

DEMO = Path(__file__).resolve().parents[2] / "demo"


def test_the_named_shape_is_clearly_the_largest():
    for scene, name in islice(transfer.scenes(5), 30):
        largest = max(scene.shapes, key=lambda shape: shape.side)
        assert largest.name == name and len(scene.shapes) > 1
        assert all(shape is largest or largest.side > 1.1 * shape.side for shape in scene.shapes)


def test_the_question_is_new():
    rng = np.random.default_rng(0)
    kinds = 3 * list(shapes.QUESTIONS)
    asked = {prefix for _ in range(50) for prefix, _ in shapes.ask(shapes.make_scene(rng), rng, kinds)}
    assert transfer.QUESTION not in asked


def test_what_is_written_passes_every_check(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["transfer.py", "--out", str(tmp_path), "--count", "8", "--size", "32"])
    transfer.main()
    train, valid = (dataset.read_split(tmp_path / f"{name}.jsonl") for name in ("train", "valid"))
    for split in (train, valid):
        dataset.check_pictures(split)
        dataset.check_texts(split, PaliGemmaProcessor.from_pretrained(BUNDLED), 64)
    assert (len(train.examples), len(valid.examples)) == (8, 2)
    assert train.faults == valid.faults == train.warnings == valid.warnings == dataset.compare(train, valid) == []
    given = read_config(str(tmp_path / "finetune.yaml"), finetune.SETTINGS)
    assert f"--train={tmp_path}/train.jsonl" in given
    assert json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])["prefix"] == transfer.QUESTION
