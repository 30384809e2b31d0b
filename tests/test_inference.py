"""The program as a user meets it: flags, pictures, answers, exit codes, terminals and signals."""

import contextlib
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer

from paligemma import devices, inference, opened
from paligemma.checkpoints import adapters, weights
from paligemma.errors import GenerationError, ImageError, PromptError, UsageError
from paligemma.inference import Flags
from paligemma.objects import mask_codec, masks
from paligemma.objects.outputs import NormalizedBox, ParsedAnswer, ParsedObject
from paligemma.pictures import folders, images
from paligemma.processing_paligemma import PaliGemmaProcessor
from paligemma.programs import commandline, options, verbs
from paligemma.programs.results import ResultWriter
from paligemma.tasks import Annotator, Result
from tests.tiny_checkpoint import CONTEXT, make_checkpoint

ROOT = Path(__file__).resolve().parent.parent
PICTURE_TOKENS = 4  # of the tiny model


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with a tiny checkpoint, its variants, and a picture."""
    folder = tmp_path_factory.mktemp("world")
    make_checkpoint(folder / "model")
    make_checkpoint(folder / "long", context=100_000)
    Image.linear_gradient("L").convert("RGB").save(folder / "cat.png")
    return folder


@pytest.fixture
def ask(world, monkeypatch, capsys):
    """Runs the program in this process, in the world's folder: ask("--json") -> exit code, stdout, stderr."""
    monkeypatch.chdir(world)

    def run(*flags, model="model", picture="cat.png", prompt="caption en"):
        defaults = {"model_path": model, "image_file_path": picture, "prompt": prompt}
        argv = [f"--{name}={value}" for name, value in defaults.items() if value is not None]
        code = commandline.run(Flags, inference.program, ["--max_tokens_to_generate=8", *argv, *flags])
        return code, *capsys.readouterr()

    return run


def answer_of(result):
    code, out, err = result
    assert code == 0, err
    return json.loads(out)


@pytest.mark.parametrize("flag", ["model_path", "base_model", "mask_codec"])
@pytest.mark.parametrize("name", ["~nosuchuser/x", "x" * 300, "nowhere", "loop", "pipe"])
def test_names_of_files_that_cannot_be_read_are_one_line(ask, world, flag, name):
    if name == "loop" and not (world / name).is_symlink():
        (world / name).symlink_to(name)
    if name == "pipe" and not (world / name).exists():
        os.mkfifo(world / name)
    code, out, err = ask(f"--{flag}={name}", model=None if flag == "model_path" else "model", prompt="segment cat")
    assert code in (2, 4) and not out, err
    assert [line.partition(": ")[0] for line in err.splitlines() if not line.startswith("note")] == ["error"]


def test_an_adapter_whose_base_is_elsewhere_answers_with_base_model(ask, world, tmp_path):
    from paligemma.checkpoints import weights
    from paligemma.layers import lora

    model = weights.load_model(world / "model")
    lora.inject(model, lora.LoraConfig(r=2), lora.targets(model))
    adapters.save_adapter(lora.adapter_state(model), lora.LoraConfig(r=2), tmp_path, "/elsewhere/model")
    plain = ask("--json")
    code, _, err = ask(model=tmp_path)
    assert code == 4 and "adapter_config.json names the base model '/elsewhere/model'" in err and "--base_model" in err
    adapted = ask("--json", f"--base_model={world / 'model'}", model=tmp_path)  # B is zero: it says what its base says
    assert answer_of(adapted)["text"] == answer_of(plain)["text"]


def start(world, *flags, **options):
    """The program in a process of its own."""
    command = [sys.executable, str(ROOT / "inference.py"), *flags]
    options = {"cwd": world, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL} | options
    return subprocess.Popen(command, **options)


ENDLESS = ("--model_path=long", "--image_file_path=cat.png", "--prompt=ocr", "--max_tokens_to_generate=90000")


# Flags


@pytest.mark.parametrize(
    "flag",
    [
        "temperature=-1", "temperature=nan", "temperature=inf", "top_p=0", "top_p=1.5", "top_p=-0.1", "top_p=nan", "top_k=0",
        "max_tokens_to_generate=0", "max_tokens_to_generate=-1", "max_tokens_to_generate=1.5", "seed=-1", f"seed={2**70}",
        "device=gpu", "device=cuda:x", "dtype=int8", "quantize=int3", "quantize_vision", "frame=-1", "max_pixels=0",
        "image_file_path=", "model_path=", "max_tokens=5", "only_cpu --device=cuda", "json --stream", "min_score=1.1",
        "min_score=nan", "denominator=1000", "language=french", "mask_codec=", "save=out.png", "export=out.json", "grammar",
    ],
)  # fmt: skip
def test_flags_out_of_range_are_2_and_named(flag, capsys):
    assert commandline.run(Flags, lambda _: pytest.fail("it ran"), [f"--{flag}" for flag in flag.split(" --")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and flag.partition("=")[0].split()[0] in err


def test_the_edges_of_the_ranges_are_fine():
    Flags(temperature=0.0, top_p=1.0, top_k=1, seed=2**63 - 1, max_tokens_to_generate=1, device="cuda:1", dtype="bf16")


def test_wrong_usage_is_answered_before_anything_slow_is_imported(world):
    script = (
        "import sys; from paligemma import inference; code = inference.main(); "
        "slow = {'torch', 'numpy', 'PIL', 'tokenizers', 'safetensors', 'transformers', 'huggingface_hub'} & set(sys.modules); "
        "print(code, sorted(slow))"
    )
    wrong_verbs = "detct a.png b,detect,detect nothing,ocr cat.png --save=x.png,detect cat.png a --stream,ocr cat.png --save=x.y"
    wrong = [["--promt", "x"], ["--temperature", "-1"], *(words.split() for words in wrong_verbs.split(","))]
    for argv in (*wrong, ["--help"], ["detect", "--help"]):
        done = subprocess.run([sys.executable, "-c", script, *argv], cwd=world, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == ("0 []" if "--help" in argv else "2 []"), done.stderr


def test_running_imports_neither_transformers_nor_the_hub(world):
    script = (
        "import sys; from paligemma import inference; code = inference.main(); "
        "print(code, sorted({'transformers', 'huggingface_hub', 'torchvision'} & set(sys.modules)))"
    )
    flags = ["--model_path=model", "--image_file_path=cat.png", "--prompt=ocr", "--max_tokens_to_generate=1"]
    done = subprocess.run([sys.executable, "-c", script, *flags], cwd=world, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr


# Pictures and prompts


def test_a_prompt_is_the_bytes_that_were_typed():
    assert inference.as_utf8("日本".encode().decode("ascii", "surrogateescape")) == "日本"
    assert inference.as_utf8("日本") == "日本"
    with pytest.raises(PromptError):
        inference.as_utf8("\udcff")


def test_a_missing_picture_is_3_and_comes_before_the_model(ask):
    code, out, err = ask(picture="cta.png", model="no such model")
    assert code == 3 and out == "" and "cta.png" in err and "cat.png" in err


def test_several_pictures_take_their_tokens(ask, world):
    Image.new("RGB", (30, 20), "red").save(world / "red.png")
    one, two = answer_of(ask("--json")), answer_of(ask("--json", picture="cat.png,red.png"))
    assert two["prompt_tokens"] == one["prompt_tokens"] + PICTURE_TOKENS
    assert two["text"] != one["text"]


def test_a_picture_comes_through_stdin(ask, world, monkeypatch):
    class Pipe(io.StringIO):
        buffer = io.BytesIO((world / "cat.png").read_bytes())

    expected = answer_of(ask("--json"))
    monkeypatch.setattr(sys, "stdin", Pipe())
    assert answer_of(ask("--json", picture="-"))["token_ids"] == expected["token_ids"]


def test_too_much_on_stdin_is_3(monkeypatch):
    class Pipe(io.StringIO):
        buffer = io.BytesIO(b"x" * 100)

    monkeypatch.setattr(sys, "stdin", Pipe())
    monkeypatch.setattr(options, "STDIN_BYTES", 99)
    with pytest.raises(ImageError):
        options.read_stdin()


def test_a_picture_without_a_prompt_is_captioned_with_a_note(ask):
    expected = answer_of(ask("--json"))
    result = ask("--json", prompt=None)
    assert answer_of(result)["token_ids"] == expected["token_ids"]
    assert "caption en" in result[2]


def test_an_explicitly_empty_prompt_is_empty(ask):
    result = ask("--json", prompt="")
    assert answer_of(result)["prompt_tokens"] == PICTURE_TOKENS + 2  # <bos> and the newline
    assert result[2] == ""


@pytest.mark.parametrize("prompt", ["cat # dog", "None", "[a]", "12", "日本 🐈"])
def test_prompts_reach_the_tokenizer_as_they_were_typed(ask, world, prompt):
    tokens = PaliGemmaProcessor.from_pretrained(world / "model").tokenizer.encode(prompt, add_special_tokens=False).ids
    assert answer_of(ask("--json", prompt=prompt))["prompt_tokens"] == PICTURE_TOKENS + 2 + len(tokens)


def test_a_prompt_beyond_the_context_is_3_with_both_numbers(ask):
    code, _, err = ask(prompt="x" * 1000)
    assert code == 3 and "1002 tokens" in err and str(CONTEXT) in err and "--truncate_prompt" in err


def test_a_prompt_beyond_the_context_is_cut_on_request(ask):
    result = ask("--truncate_prompt", "--json", prompt="x" * 1000)
    assert answer_of(result)["prompt_tokens"] == CONTEXT - 1 - inference.ANSWER_ROOM
    assert "note: the prompt takes 1002 tokens" in result[2]


def test_nothing_given_asks_the_bundled_question_about_the_bundled_picture(ask, world, monkeypatch):
    monkeypatch.setattr(opened, "BUNDLED", world / "model")
    monkeypatch.setattr(inference, "BUNDLED_PICTURE", str(world / "cat.png"))
    monkeypatch.setattr(inference, "BUNDLED_QUESTION", "caption en")
    expected = answer_of(ask("--json"))
    result = ask("--json", model=None, picture=None, prompt=None)
    answer = answer_of(result)
    assert 'note: this asks "caption en" about the bundled picture' in result[2]
    assert answer == expected | {"model": str(world / "model"), "seconds": answer["seconds"]}


# Answers


def test_the_answer_is_that_of_generate(ask, world):
    from paligemma.generation import generate

    model = weights.load_model(world / "model")
    processor = PaliGemmaProcessor.from_pretrained(world / "model")
    inputs = processor(Image.open(world / "cat.png"), "caption en")
    ids = [int(tokens) for tokens in generate(model, inputs, max_new_tokens=8, eos_token_id=model.config.eos_token_id)]
    assert answer_of(ask("--json"))["token_ids"] == ids
    assert ask() == (0, processor.decode(ids) + "\n", "")


def test_json_holds_what_was_promised(ask):
    answer = answer_of(ask("--json"))
    assert list(answer) == "text token_ids logprobs finish_reason prompt_tokens seconds model seed".split()
    assert len(answer["token_ids"]) == len(answer["logprobs"]) == 8
    assert all(logprob <= 0 for logprob in answer["logprobs"])
    assert answer["finish_reason"] == "length" and answer["model"] == "model" and answer["seed"] is None
    assert answer["prompt_tokens"] == PICTURE_TOKENS + len("caption en") + 2 and 0 < answer["seconds"] < 60


def test_it_stops_at_eos(ask, world):
    third = answer_of(ask("--json"))["token_ids"][2]
    raw = json.loads((world / "model" / "config.json").read_text())
    folder = world / "stops"
    folder.mkdir()
    for file in (world / "model").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text(json.dumps(raw | {"eos_token_id": [1, third]}))
    answer = answer_of(ask("--json", model="stops"))
    assert answer["finish_reason"] == "stop" and answer["token_ids"][-1] == third and len(answer["token_ids"]) <= 3


def test_streaming_prints_the_same_piece_by_piece(ask, monkeypatch):
    whole, pieces = ask(), []
    write = commandline.write
    monkeypatch.setattr(inference, "write", lambda text: (pieces.append(text), write(text)))
    assert ask("--stream") == whole
    assert len([piece for piece in pieces if piece]) > 2


def test_a_seed_repeats_a_sample_and_json_names_the_seed_it_drew(ask):
    sample = ("--do_sample", "--temperature=3", "--top_p=1", "--json")
    first = answer_of(ask(*sample))
    again = answer_of(ask(*sample, f"--seed={first['seed']}"))
    other = answer_of(ask(*sample, f"--seed={first['seed'] + 1}"))
    assert first["token_ids"] == again["token_ids"] != other["token_ids"]


def test_do_sample_false_is_greedy_and_so_is_temperature_0(ask):
    greedy = answer_of(ask("--json"))["token_ids"]
    assert answer_of(ask("--json", "--do_sample", "false", "--seed=1"))["token_ids"] == greedy
    assert answer_of(ask("--json", "--do_sample", "--temperature=0"))["token_ids"] == greedy


def test_sampling_flags_that_change_nothing_are_noted(ask):
    assert "note: --temperature, --seed without --do_sample changes nothing." in ask("--temperature=0.5", "--seed=3")[2]


def test_more_tokens_than_the_context_are_cut_with_a_note(ask):
    result = ask("--json", "--max_tokens_to_generate=1000000000")
    answer = answer_of(result)
    assert answer["prompt_tokens"] + len(answer["token_ids"]) <= CONTEXT
    assert "note: --max_tokens_to_generate 1000000000 is cut to" in result[2]


def test_a_listing_that_repeats_itself_is_a_loop():
    box = "<loc0001><loc0002><loc0003><loc0004>"
    assert inference.is_looping(f"{box} cat ; {box} cat ; {box} cat ;")
    assert not inference.is_looping(f"{box} cat ; {box} cat ; {box} dog ;")
    assert not inference.is_looping(f"{box} cat ; {box} cat ;")
    assert not inference.is_looping("no ; no ; no ; no ;")


def test_verbose_prints_times_and_their_lower_bounds(ask):
    code, _, err = ask("--verbose")
    assert code == 0
    assert re.search(r"^loaded model in .* s: torch.float32, cpu, threads: 1$", err, re.MULTILINE)
    assert re.search(r"^prefill: [\d.]+ ms for 16 tokens; lower bound [\d.]+ ms", err, re.MULTILINE)
    assert re.search(r"^decode: [\d.]+ ms per token, .* lower bound [\d.]+ ms", err, re.MULTILINE)


@pytest.mark.parametrize("flags", [("--dtype=bf16",), ("--quantize=int8",), ("--quantize=int4", "--quantize_vision")])
def test_other_number_formats_answer_too(ask, flags):
    assert len(answer_of(ask("--json", *flags))["token_ids"]) == 8


# Faults


def test_no_such_model_is_an_error_line(ask):
    code, out, err = ask(model="./no/such/model")
    assert code in (4, 5) and out == "" and err.startswith("error: ") and err.count("\n") == 1


def test_errors_are_objects_with_json(ask):
    code, out, _ = ask("--json", picture="gone.png")
    error = json.loads(out)["error"]
    assert (code, error["code"], error["type"], error["path"]) == (3, 3, "ImageError", "gone.png")


def test_a_gpu_that_is_not_there_is_6(ask, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = ask("--device=cuda")
    assert code == 6 and err.startswith("error: device cuda") and "--device cpu" in err


@pytest.mark.parametrize(
    ("flag", "variable", "message"),
    [
        ("--graphs=fast", "", "--graphs is 'fast', but auto, off, record or compile is needed."),
        ("--json", "fast", "PALIGEMMA_GRAPHS is 'fast'. Take auto, off, record or compile."),
        ("--device=cuda:0,cuda:0", "", "device is 'cuda:0,cuda:0', which names a card twice. Name each card once."),
        ("--device=cuda:0,cpu", "", "--device is 'cuda:0,cpu', but auto, cpu, mps, cuda, cuda:N or several cards such as"),
    ],
)
def test_a_wrong_device_or_mode_is_2_in_one_line(ask, monkeypatch, flag, variable, message):
    monkeypatch.setenv("PALIGEMMA_GRAPHS", variable)
    code, _, err = ask(flag)
    assert code == 2 and err.startswith(f"error: {message}") and err.count("\n") == 1


def test_a_wrong_instruction_set_for_the_kernels_is_2_in_one_line(ask, monkeypatch):
    monkeypatch.setenv("PALIGEMMA_KERNELS", "sse")
    code, _, err = ask()
    assert code == 2 and err.startswith("error: PALIGEMMA_KERNELS is 'sse'. Take off, amx, ") and err.count("\n") == 1


def test_the_cpu_beside_a_gpu_is_one_line_with_the_command_unless_the_cpu_is_asked_for(ask, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices, "nvidia_hardware", lambda *_: devices.Hardware(580, (("Tesla T4", (7, 5)),)))
    devices.warn_once.cache_clear()
    code, _, err = ask()
    command = "pip install torch==2.13.0+cu130 --index-url https://download.pytorch.org/whl/cu130"
    reason = "The CPU is used although this machine has an NVIDIA GPU (Tesla T4). This torch (2.13.0+cpu) is a CPU build."
    assert (code, err) == (0, f"warning: {reason} Run: {command}\n")
    devices.warn_once.cache_clear()
    for flag in ("--only_cpu", "--device=cpu"):
        code, _, err = ask(flag)
        assert (code, err) == (0, "")


def test_a_program_computes_float32_exactly_where_a_container_sets_tf32(ask, request):
    request.addfinalizer(lambda: torch.set_float32_matmul_precision("highest"))
    torch.set_float32_matmul_precision("high")  # what TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 does in NVIDIA's containers
    assert ask()[0] == 0
    assert torch.get_float32_matmul_precision() == "highest" and torch.backends.cuda.matmul.fp32_precision == "ieee"


def test_weights_that_are_not_numbers_are_4_and_when_allowed_6(ask, world):
    model = weights.load_model(world / "model")
    with torch.no_grad():
        model.language_model.model.norm.weight[0] = torch.nan
    for file in (world / "model").iterdir():
        if file.suffix != ".safetensors":
            (world / "nan").mkdir(exist_ok=True)
            (world / "nan" / file.name).write_bytes(file.read_bytes())
    weights.save_model(model, world / "nan")
    assert ask(model="nan")[0] == 4
    code, out, err = ask("--allow_nonfinite", model="nan")
    assert code == 6 and "not finite" in err


def test_an_error_in_the_middle_ends_the_line_of_what_was_generated(ask, monkeypatch):
    def broken(*_):
        yield from ((300, -1.0), (301, -1.0))
        raise GenerationError("the model's logits are not numbers.")

    monkeypatch.setattr(inference.Session, "steps", broken)
    code, out, err = ask("--stream")
    assert code == 6 and len(out) == 3 and out.endswith("\n") and err == "error: the model's logits are not numbers.\n"


@pytest.mark.parametrize("part", ["empty_model", "fill", "acceleration.accelerate"])
def test_memory_that_runs_out_is_6(ask, monkeypatch, part):
    def greedy(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    monkeypatch.setattr(f"paligemma.checkpoints.weights.{part}", greedy)
    code, _, err = ask()
    assert code == 6 and "memory ran out while loading" in err and "--quantize int8" in err


# Verbs


@pytest.fixture
def verb(tmp_path, monkeypatch, capsys):
    """Runs a verb in this process, in an empty folder, with the bundled checkpoint: verb("caption", SHAPES) -> code, out, err."""
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        code = commandline.run(Flags, inference.program, list(argv), verbs.HELP)
        return code, *capsys.readouterr()

    return run


SHAPES, CAT = str(ROOT / "examples" / "shapes.png"), str(ROOT / "examples" / "cat.png")
CAPTION = "an orange cross, a yellow circle and a purple heart"


def test_verbs_answer_in_plain_text(verb):
    assert verb("caption", SHAPES) == (0, f"{CAPTION}\n", "")
    assert verb("ask", SHAPES, "how", "many", "shapes", "are", "there?") == (0, "3\n", "")
    assert verb("count", SHAPES, "circles ; stars") == (0, "circles\t1\nstars\t0\n", "")
    code, out, err = verb("detect", SHAPES, "circle")
    label, score, *corners = out.split("\t")
    assert (code, err, label) == (0, "", "circle") and 0 < float(score) < 1
    assert [round(float(corner) / 20) for corner in corners] == [7, 2, 15, 10]


def test_verbs_answer_in_typed_json(verb):
    found = answer_of(verb("detect", SHAPES, "circle", "--json"))
    assert (found["prompt"], found["status"], found["objects"][0]["label"]) == ("detect circle", "objects", "circle")
    assert answer_of(verb("count", SHAPES, "circles", "--json"))["count"] == 1
    assert answer_of(verb("caption", SHAPES, "--json"))["text"] == CAPTION


def test_words_after_a_verb_are_objects_and_pictures_in_any_number():
    def job(*words):
        job = verbs.parse_positional(words)
        return [Path(name).name for name in job.pictures], list(job.texts)

    assert job("detect", SHAPES, "cat ; dog", "bird") == (["shapes.png"], ["cat ; dog ; bird"])
    assert job("detect", SHAPES, CAT, "gone.jpg", "cat") == (["shapes.png", "cat.png", "gone.jpg"], ["cat"])
    assert job("segment", f"{SHAPES},{CAT}", "https://x.org/a", "-", "cat") == (["shapes.png", "cat.png", "a", "-"], ["cat"])
    assert job("count", SHAPES, "red", "cars;people") == (["shapes.png"], ["red cars", "people"])
    assert job("caption", SHAPES) == (["shapes.png"], [""])


def test_a_folder_or_file_named_like_the_object_is_no_picture(verb, tmp_path):
    (tmp_path / "circle").mkdir()
    (tmp_path / "star").write_text("a file")
    assert verb("detect", SHAPES, "circle", "--json")[0] == 0
    code, out, err = verb("detect", SHAPES, "star", "--json")
    assert code == 0 and json.loads(out)["prompt"] == "detect star"
    assert err == "note: 'star' is used as the text (something to look for), although a file has this name.\n"
    code, out, err = verb("detect", SHAPES, "star", "circle", "--json")
    assert code == 0 and json.loads(out)["prompt"] == "detect star ; circle" and "'star' is used as the text" in err
    (tmp_path / "star").write_bytes(Path(SHAPES).read_bytes())
    out = verb("detect", SHAPES, "star", "circle", "--json")[1]
    assert [json.loads(line)["image"] for line in out.splitlines()] == [SHAPES, "star"]
    code, _, err = verb("detect", SHAPES, "gone.png")
    assert code == 2 and f"needs something to look for after the picture, but {SHAPES!r}, 'gone.png' were read as pictures" in err


def test_several_pictures_keep_their_order_and_a_bad_one_is_8(verb, tmp_path):
    (tmp_path / "bad.png").write_text("no picture")
    code, out, err = verb("caption", SHAPES, "bad.png", CAT)
    assert code == 8 and [line.split("\t")[0] for line in out.splitlines()] == [SHAPES, CAT]
    assert "error: bad.png" in err and "error: 1 of 3 answers failed" in err
    code, out, _ = verb("detect", SHAPES, "bad.png", CAT, "circle", "--json")
    first, bad, last = map(json.loads, out.splitlines()[:3])
    assert code == 8 and (first["image"], bad["error"]["code"], last["image"]) == (SHAPES, 3, CAT)


def test_a_bug_over_one_picture_ends_nothing(verb, monkeypatch):
    load = images.load_image
    monkeypatch.setattr(images, "load_image", lambda source, **more: 1 / 0 if source == CAT else load(source, **more))
    code, out, err = verb("caption", SHAPES, CAT, SHAPES)
    assert code == 8 and out == f"{SHAPES}\t{CAPTION}\n" * 2 and "ZeroDivisionError" in err
    code, _, err = verb("caption", CAT, "--model_path=no such model")
    assert code == 3 and err.startswith("error: reading ")


def test_pictures_that_wait_for_an_earlier_answer_are_small(verb, monkeypatch, tmp_path):
    sides, run = [], Annotator.run

    def watched(self, requests):
        return run(self, [sides.append(max(request.picture.size)) or request for request in requests])

    monkeypatch.setattr(Annotator, "run", watched)
    Image.new("RGB", (900, 700)).save(tmp_path / "big.png")
    code, out, _ = verb("detect", SHAPES, "big.png", CAT, "circle", "--save", "out.png", "--json")
    assert code == 0 and max(sides[1:]) <= 224 and Image.open("out-2.png").size == (900, 700)
    assert [json.loads(line)["width"] for line in out.splitlines()] == [Image.open(SHAPES).width, 900, Image.open(CAT).width]


def test_a_picture_that_changes_before_it_is_drawn_is_its_error(verb, monkeypatch, tmp_path):
    (tmp_path / "b.png").write_bytes(Path(SHAPES).read_bytes())

    def gone(*_):
        raise ImageError("b.png changed")

    monkeypatch.setattr(folders, "load_again", gone)
    code, out, err = verb("detect", SHAPES, "b.png", "circle", "--save", "out.png", "--json")
    assert code == 8 and [("error" in json.loads(line)) for line in out.splitlines()[:2]] == [False, True]


def test_a_single_bad_picture_is_its_error_before_the_model_is_touched(verb, tmp_path):
    for name, code in (("gone.png", 3), (str(tmp_path), 3)):
        assert verb("detect", name, "cat", "--model_path=no such model")[0] == code
    assert "-m paligemma annotate" in verb("caption", str(tmp_path))[2]


def test_save_draws_into_a_copy_of_the_picture(verb, tmp_path):
    code, _, err = verb("detect", SHAPES, "circle", "--save", "out.png")
    drawn, before = Image.open("out.png"), Image.open(SHAPES)
    assert code == 0 and "out.png" in err and drawn.size == before.size
    assert drawn.tobytes() != before.convert("RGB").tobytes()
    assert verb("detect", SHAPES, CAT, "circle", "--save", "out.jpg")[0] == 0
    assert Image.open("out-1.jpg").format == "JPEG" and Image.open("out-2.jpg").size == Image.open(CAT).size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out-1.jpg", "out-2.jpg", "out.png"]


def test_what_was_found_is_exported_in_the_form_that_the_ending_names(verb, tmp_path):
    (tmp_path / "other.png").write_bytes(Path(SHAPES).read_bytes())
    for name, made in (("o.json", "o.json"), ("o.csv", "o.csv"), ("o.XML", "o/other.xml"), ("o.txt", "o/other.txt")):
        code, out, err = verb("detect", SHAPES, "other.png", "circle", "--export", name)
        assert code == 0 and out.count("\n") >= 2 and "note: " in err
        assert (tmp_path / made).stat().st_size > 0


def test_masks_come_as_run_lengths_and_as_polygons(capsys):
    mask = np.zeros((30, 40), bool)
    mask[10:20, 5:25] = True
    reading = ParsedAnswer(
        [ParsedObject("cat", NormalizedBox(0, 0, 1, 1), mask=mask), ParsedObject("dog", NormalizedBox(0, 0, 1, 1))],
        [],
        "objects",
        "",
    )
    result = Result(image="a.png", task="segment", asked="cat", prompt="segment cat", width=40, height=30, parsed=reading)
    flags = Flags(positional=("segment", SHAPES, "cat"), json=True)
    ResultWriter(flags.query, flags, flags.style, {"model": "m"}).write(result, None)
    row = json.loads(capsys.readouterr().out)
    cat, dog = row["objects"]
    assert cat["mask"]["size"] == [30, 40] and "polygons" not in dog and row["model"] == "m"
    assert (masks.fill(cat["polygons"], 30, 40) == mask).mean() > 0.99


def test_what_cannot_be_written_is_7_before_the_model_is_touched(verb, tmp_path):
    code, _, err = verb("detect", SHAPES, "circle", "--save=no/out.png", "--model_path=no such model")
    assert code == 7 and "no folder no" in err
    (tmp_path / "out.png").mkdir()
    assert verb("detect", SHAPES, "circle", "--save=out.png")[0] == 7
    os.mkfifo("pipe.json")
    (tmp_path / "file").write_text("")
    for name in ("pipe.json", "x" * 300 + ".json", "file/o.json", "file/o/p.txt", "~nosuchuser/o.json"):
        code, _, err = verb("detect", SHAPES, CAT, "circle", "--export", name, "--model_path=no such model")
        assert code == 7 and err.count("\n") == 1, (name, err)


def test_pictures_whose_files_would_have_one_name_are_told_apart(verb, tmp_path):
    for name in ("1.png", "1.jpg", "1.png.gif"):
        Image.open(SHAPES).convert("RGB").save(tmp_path / name)
    assert verb("detect", "1.png", "./1.png", "././1.png", "circle", "--export", "o.txt")[0] == 0
    assert sorted(os.listdir("o")) == ["1.png-2.txt", "1.png.txt", "1.txt", "classes.txt"]
    assert verb("detect", "1.jpg", "1.png.gif", "1.png", "circle", "--export", "p.xml")[0] == 0
    assert sorted(os.listdir("p")) == ["1.png-2.xml", "1.png.xml", "1.xml"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["1.png", "circle", "--save=o.png", "--explain=./o.png"], "--save and --explain would both write"),
        ([SHAPES, CAT, "circle", "--save=o.png", "--explain=O-1.PNG"], ""),  # O-1-1.PNG and O-1-2.PNG: others
        (["1.png", "circle", "--save=O-1.png", "--explain=o-1.PNG"], "--save and --explain would both write"),
        (["1.png", "circle", "--save=link.png"], "--save link.png would overwrite the picture 1.png"),
        (["file://localhost{}/1.png", "circle", "--save=link.png"], "--save link.png would overwrite the picture"),
        (["1.png", "circle", "--export=classes.txt"], "--export would write classes.txt twice"),
        ([SHAPES, "1.png", "circle", "--save=photo.png"], "photo-1.png, which this program did not draw"),
        (["1.png", "circle", "--explain=hard.png"], "--explain hard.png would overwrite the picture 1.png"),
        (["1.png", "circle", "--model_path=m", "--export=m/config.json"], "would overwrite a file of the model"),
    ],
)
def test_no_file_of_a_command_is_another_one_or_one_that_is_read(verb, tmp_path, monkeypatch, argv, says):
    data = Path(SHAPES).read_bytes()
    for name in ("1.png", "photo-1.png"):
        (tmp_path / name).write_bytes(data)
    (tmp_path / "link.png").symlink_to("1.png")
    os.link(tmp_path / "1.png", tmp_path / "hard.png")
    shutil.copytree(ROOT / "paligemma" / "bundled", tmp_path / "m")
    monkeypatch.setattr(weights.ModelFiles, "load", lambda *_, **__: pytest.fail("it was loaded") if says else real(*_, **__))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    code, _, err = verb("detect", *(word.format(tmp_path) for word in argv))
    assert code == (2 if says else 0) and says in err
    assert all(file.read_bytes() == content for file, content in before.items())


real = weights.ModelFiles.load


def test_a_drawing_of_this_program_is_drawn_again(verb):
    for ending in ("png", "jpg", "webp", "tiff", "bmp"):
        for _ in range(2):
            assert verb("detect", SHAPES, CAT, "circle", f"--save=out.{ending}")[0] == 0


def test_a_prompt_about_very_many_pictures_is_refused_before_they_are_read(ask, monkeypatch):
    monkeypatch.setattr(inference, "read_picture", lambda *_: pytest.fail("it was read"))
    code, _, err = ask(picture=",".join(["cat.png"] * 65))
    assert code == 2 and "65 were given" in err and "Use a verb" in err


@pytest.mark.parametrize("name", ["", ".png", "out/.png", "..png", "png", ".json", "a.json/"])
@pytest.mark.parametrize("flag", ["save", "export", "explain"])
def test_a_name_without_an_ending_is_refused(verb, flag, name):
    assert verb("detect", SHAPES, "circle", f"--{flag}={name}", "--model_path=none")[0] == 2


def test_what_streams_lead_to_is_never_overwritten(tmp_path):
    for stream, output in (("<", "--save=a.png"), (">", "--export=a.json"), ("2>", "--export=a.json")):
        shutil.copy(SHAPES, tmp_path / "a.png")
        shutil.copy(SHAPES, tmp_path / "a.json")
        file = output.partition("=")[2]
        command = f"'{sys.executable}' '{ROOT}/inference.py' detect - circle {output} --model_path=none {stream} {file}"
        done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 2 and (stream == "2>" or "would overwrite" in done.stderr)


def test_a_name_of_several_lines_takes_one(verb, tmp_path):
    for name in ("a\tb.png", "c\nd.png"):
        shutil.copy(SHAPES, tmp_path / name)
    lines = verb("detect", "a\tb.png", "c\nd.png", "circle")[1].splitlines()
    assert [line.split("\t")[:2] for line in lines] == [["a b.png", "circle"], ["c d.png", "circle"]]


def test_the_picture_itself_is_never_overwritten(verb, tmp_path):
    data = Path(SHAPES).read_bytes()
    (tmp_path / "a.png").write_bytes(data)
    (tmp_path / "b-2.png").symlink_to("a.png")
    for argv in (["a.png", "cat", "--save=./a.png"], [SHAPES, "a.png", "cat", "--save=b.png"]):
        code, _, err = verb("detect", *argv)
        assert code == 2 and "overwrite" in err
    assert (tmp_path / "a.png").read_bytes() == data


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["detct", SHAPES], "Did you mean detect?"), (["finetun"], "Did you mean python -m paligemma finetune?"),
        (["cat.png"], "{command} caption cat.png"),
        (["detect"], "detect needs a picture: {command} detect PICTURE TEXT."),
        (["detect", SHAPES], "needs something to look for"),
        (["detect", "cat"], "'cat' is not an existing picture"), (["caption", SHAPES, "cat"], "takes no text"),
        (["caption", "-", "-"], "only once"), (["caption", SHAPES, "--save=x.png"], "goes with detect and segment"),
        (["detect", SHAPES, "a", "--mask_codec=x"], "goes with segment"), (["ocr", SHAPES, "--language=fr"], "does not go with"),
        (["detect", SHAPES, "a", "--prompt=b"], "exclude each other"), (["--grammar"], "needs a verb"),
        (["detect", SHAPES, "a", "--save=x.gif"], "ends in .png"), (["detect", SHAPES, "a", "--export=x.yaml"], "ends in .json"),
    ],
)  # fmt: skip
def test_verbs_without_sense_are_2_in_one_line(verb, argv, message):
    code, out, err = verb(*argv)
    assert (code, out, err.count("\n")) == (2, "", 1) and message.format(command=commandline.command()) in err


def test_words_are_checked_before_fire_is_imported():
    with pytest.raises(UsageError, match="not a verb"):
        Flags.check_positional(("detct",))


def test_help_begins_with_examples_of_the_verb(verb):
    for task in verbs.TASKS:
        out = verb(task, "--help")[1]
        assert f"{commandline.command()} {task} " in out and "--model_path" in out and "Which model, and where it runs:" in out
    assert f"{commandline.command()} detect street.jpg" in verb("--help")[1]


def test_grammar_makes_objects_even_of_noise(verb, world):
    noise = ("detect", str(world / "cat.png"), "cat ; dog", "--json", f"--model_path={world / 'model'}")
    free, held = answer_of(verb(*noise)), answer_of(verb(*noise, "--grammar", "--max_tokens_to_generate=40"))
    assert free["status"] == "unparsable" and held["status"] == "objects"
    assert held["problems"] == [] and {found["label"] for found in held["objects"]} <= {"cat", "dog"}


def test_min_score_and_denominator_reach_the_run(verb):
    plain = answer_of(verb("detect", SHAPES, "orange cross", "purple heart", "--json"))
    none = answer_of(verb("detect", SHAPES, "orange cross", "purple heart", "--json", "--min_score=1"))
    assert plain["objects"] and (none["status"], none["objects"]) == ("nothing", [])
    other = answer_of(verb("detect", SHAPES, "orange cross", "purple heart", "--json", "--denominator=1024"))
    assert other["objects"][0]["box"][2] == pytest.approx(plain["objects"][0]["box"][2] * 1023 / 1024, abs=0.02)


def test_sampling_goes_with_verbs_too(verb):
    sample = ("caption", CAT, "--json", "--do_sample", "--temperature=2", "--top_p=1")
    first = answer_of(verb(*sample))
    assert answer_of(verb(*sample, f"--seed={first['seed']}"))["text"] == first["text"]
    others = {answer_of(verb(*sample, f"--seed={seed}"))["text"] for seed in range(8)}
    assert len(others) > 1  # the bundled model is sure of much, so that two of them may well be equal


def test_segment_without_a_codec_gives_boxes_and_says_how_to_get_masks(verb, monkeypatch):
    monkeypatch.setattr(mask_codec, "find_codec", lambda *_: None)
    assert "--mask_codec" in verb("segment", SHAPES, "circle")[2]


def test_a_codec_that_is_not_there_is_4(verb):
    assert verb("segment", SHAPES, "circle", "--mask_codec=gone.npz")[0] == 4


def test_a_task_the_checkpoint_does_not_know_is_noted(verb, tmp_path):
    (tmp_path / "paligemma-3b-ft-docvqa-224").symlink_to(ROOT / "paligemma" / "bundled")
    err = verb("detect", SHAPES, "circle", "--model_path=paligemma-3b-ft-docvqa-224")[2]
    assert "note: this checkpoint was fine-tuned on docvqa" in err


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.mark.parametrize("no_color", [False, True])
def test_a_terminal_gets_a_table_and_colours_only_if_it_wants_them(monkeypatch, no_color):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    commandline.run(Flags, inference.program, ["detect", SHAPES, "circle"])
    assert "circle" in screen.getvalue() and "█" in screen.getvalue() and ("\x1b[" in screen.getvalue()) is not no_color


def test_a_label_moves_no_cursor():
    from paligemma.objects.tables import listing, table

    found = [ParsedObject("cat\x1b[2J\n", NormalizedBox(0, 0, 1, 1), score=0.5)]
    assert "\x1b" not in table(found, 9, 9, False) + listing(found, 9, 9)


def test_a_verb_in_a_process_of_its_own(world):
    process = start(world, "detect", SHAPES, "circle", "--save=drawn.png")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert (world / "drawn.png").exists() and err == b"note: the drawing is in drawn.png.\n"


# Terminals, signals, pipes


def read_until(terminal, text, timeout=120.0):
    """What a terminal shows until the text comes; a failure shows what came instead."""
    shown, deadline = "", time.monotonic() + timeout
    while text not in shown:
        assert time.monotonic() < deadline, shown
        if select.select([terminal], [], [], 0.1)[0]:
            with contextlib.suppress(OSError):  # Linux's way to say that the other side has gone
                shown += os.read(terminal, 1000).decode(errors="replace")
    return shown


@pytest.fixture
def terminal():
    ours, theirs = pty.openpty()
    yield ours, theirs
    os.close(ours)


def test_on_a_terminal_it_asks_again_and_again_and_encodes_the_picture_once(world, terminal):
    ours, theirs = terminal
    flags = ("--model_path=model", "--image_file_path=cat.png", "--max_tokens_to_generate=5")
    process = start(world, *flags, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    read_until(ours, "> ")
    os.write(ours, b"caption en\n")
    first = read_until(ours, "\r\n> ")
    os.write(ours, b"x" * 600 + b"\n")
    assert "error: the prompt takes 602 tokens" in read_until(ours, "\r\n> ").replace("\r\n", "\n")
    os.write(ours, b"caption en\n")
    again = read_until(ours, "\r\n> ")
    assert first.split("\n")[-2:] == again.split("\n")[-2:]
    os.write(ours, b"\x04")
    assert process.wait(timeout=60) == 0


def test_answers_of_a_terminal_session_can_go_to_a_file(world, terminal):
    ours, theirs = terminal
    flags = ("--model_path=model", "--image_file_path=cat.png", "--max_tokens_to_generate=5", "--json")
    process = start(world, *flags, stdin=theirs, stderr=theirs)
    os.close(theirs)
    read_until(ours, "> ")
    os.write(ours, b"caf\xe9\n")
    assert "error: the prompt is not valid UTF-8." in read_until(ours, "\r\n> ")
    os.write(ours, "日本\n".encode())
    read_until(ours, "\r\n> ")
    os.write(ours, b"\x04")
    first, second = map(json.loads, process.communicate(timeout=60)[0].splitlines())
    assert process.returncode == 0
    assert first["error"]["type"] == "PromptError" and second["prompt_tokens"] == PICTURE_TOKENS + 2 + len("日本".encode())


def test_ctrl_c_at_the_question_mark_is_130(world, terminal):
    ours, theirs = terminal
    flags = ("--model_path=model", "--image_file_path=cat.png")
    process = start(world, *flags, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    read_until(ours, "> ")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert "Traceback" not in read_until(ours, "\n")


def test_the_picture_is_encoded_once_for_many_questions(ask, world, monkeypatch):
    from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration

    calls = []
    encode = PaliGemmaForConditionalGeneration.encode_images
    monkeypatch.setattr(PaliGemmaForConditionalGeneration, "encode_images", lambda *a: (calls.append(1), encode(*a))[1])
    monkeypatch.setattr(inference, "choose_prompt", lambda _: None)
    monkeypatch.setattr(inference, "typed_prompts", lambda: iter(["caption en", "ocr", "caption en"]))
    code, out, _ = ask(prompt=None)
    lines = out.splitlines()
    assert code == 0 and lines[0] == lines[2] and len(calls) == 1
    monkeypatch.undo()
    monkeypatch.chdir(world)
    assert ask(prompt="caption en")[1].splitlines()[0] == lines[0]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_what_was_generated_and_ends_the_line(world, signum, code):
    process = start(world, *ENDLESS, "--stream")
    first = process.stdout.read(1)
    process.send_signal(signum)
    rest, err = process.communicate(timeout=120)
    assert process.returncode == code and (first + rest).endswith(b"\n") and err == b""


def test_a_signal_keeps_what_was_generated_for_json_too(world):
    process = start(world, *ENDLESS, "--json", "--verbose")
    process.stderr.readline()  # the model is loaded
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    answer = json.loads(process.communicate(timeout=120)[0])
    assert process.returncode == 130 and answer["finish_reason"] == "interrupted"
    assert len(answer["token_ids"]) == len(answer["logprobs"])


def test_a_reader_that_goes_away_ends_it_quietly(world):
    process = start(world, *ENDLESS, "--stream")
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(timeout=120) == 141


def test_it_works_without_streams_in_a_locale_without_letters_and_without_a_home(world):
    flags = "--model_path=model --image_file_path=cat.png --prompt=日本 --max_tokens_to_generate=30"
    command = f"exec '{sys.executable}' '{ROOT / 'inference.py'}' {flags}"
    environment = os.environ | {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "HOME": "/nonexistent"}
    for closed in ("<&-", ">&-"):
        done = subprocess.run(["bash", "-c", f"{command} {closed}"], cwd=world, env=environment, capture_output=True, timeout=120)
        assert (done.returncode, done.stderr) == (0, b"") and done.stdout.isascii()
        assert len(done.stdout) >= 30 if closed == "<&-" else done.stdout == b""


def test_flags_of_drawings_change_them_and_need_one(verb, tmp_path):
    asked = ("segment", SHAPES, "circle")
    for name, flags in {"usual": [], "plain": ["--plain"], "bare": ["--no_labels"], "wide": ["--line_width=9"]}.items():
        assert verb(*asked, f"--save={name}.png", *flags)[0] == 0
    pictures = {name: (tmp_path / f"{name}.png").read_bytes() for name in ("usual", "plain", "bare", "wide")}
    assert len(set(pictures.values())) == 4
    code, _, err = verb(*asked, "--plain")
    assert (code, err) == (2, "error: --plain changes only drawings, and no drawing is asked for. Add --save.\n")
    assert verb("caption", SHAPES, "--no_labels")[0] == 2 and verb(*asked, "--save=a.png", "--line_width=0")[0] == 2
    (tmp_path / "no.ttf").write_bytes(b"none")
    code, _, err = verb(*asked, "--save=a.png", "--font=no.ttf")
    assert code == 2 and "--font no.ttf" in err and not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<loc0001> cat ; " * 3, True),
        ("<loc0001> cat ; " * 2, False),
        ("x ; " + "<loc0001> cat ; " * 3, True),
        ("cat ; " * 3, False),
        ("<loc0001> cat ; <loc0001> cat ; <loc0001> cat", False),
        ("<loc0001> cat;<loc0001> cat ;<loc0001> cat ; y", True),
        ("", False),
    ],
)
def test_a_listing_that_repeats_itself_is_seen_from_its_end(text, expected):
    assert inference.is_looping(text) is expected


@pytest.fixture
def tuned(world):
    """A model whose fine-tune added two tokens after <image>, and which would rather say ids that have no token."""
    folder = world / "tuned"
    shutil.copytree(world / "model", folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    own = [tokenizer.get_vocab_size(), tokenizer.get_vocab_size() + 1]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("<yes>", "<no>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    model = weights.load_model(folder)
    with torch.no_grad():  # of a vector and its negative one has a large logit, whatever the hidden vector is
        rows = model.language_model.model.embed_tokens.weight
        rows[own[0]] = torch.linspace(-9, 9, rows.shape[1])
        rows[own[1]] = -rows[own[0]]
        rows[own[1] + 1 : own[1] + 3] = 2 * rows[own]
        rows[own[0] - 1] = 3 * rows[own[0]]  # <image>
    weights.save_model(model, folder)
    yield folder, own
    shutil.rmtree(folder)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.5, "temperature": 3.0, "seed": 1}])
def test_added_tokens_are_generated_and_ids_without_a_token_never(ask, tuned, options):
    from paligemma.generation import Sampling, generate, generate_many

    folder, own = tuned
    flags = [f"--{name}={value}" for name, value in options.items()] + ["--do_sample"] * bool(options)
    for words in ([], ["ask", "cat.png", "what is this?"]):
        given = {} if not words else {"picture": None, "prompt": None}
        code, out, err = ask("--json", *flags, *words, model="tuned", **given)
        assert code == 0, err
        assert re.fullmatch("(<yes>|<no>){8}", json.loads(out)["text"])
    model, processor = weights.load_model(folder), PaliGemmaProcessor.from_pretrained(folder)
    inputs = processor(Image.open(folder.parent / "cat.png"), "caption en")
    unused = processor.unused_ids(model.config.text_config.vocab_size)
    options = {"sampling": Sampling(**options), "max_new_tokens": 8, "suppress_tokens": unused}
    (answer,) = generate_many(model, [inputs], rows=1, **options)
    assert set(answer.token_ids) <= set(own)
    assert torch.cat(list(generate(model, inputs, **options))).tolist() == answer.token_ids
