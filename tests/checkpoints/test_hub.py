"""Downloads from a local server that imitates the hub: which files are downloaded, and the message for each refusal.

huggingface_hub reads its settings when it is imported, so all requests are made in one new process, one after the other.
"""

import ast
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from contextlib import closing
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from paligemma.checkpoints import adapters, hub, weights
from paligemma.errors import CheckpointError, PaliGemmaError
from paligemma.files import BUNDLED
from paligemma.layers import lora
from paligemma.processing_paligemma import PaliGemmaProcessor
from tests.tiny_checkpoint import make_checkpoint

FILES = {
    "config.json": b'{"model_type": "paligemma"}',
    "tokenizer.json": b"{}",
    "model.safetensors.index.json": b'{"weight_map": {"w": "model-00001-of-00001.safetensors"}}',
    "model-00001-of-00001.safetensors": b"weights of main",
    "generation_config.json": b"{}",
    "processor_config.json": b"{}",
    "vae-oid.npz": b"codec",
    "consolidated.safetensors": b"not wanted",
    "pytorch_model.bin": b"not wanted",
    "README.md": b"not wanted",
}
REPOS = {
    "owner/open": FILES,
    "owner/gated": FILES,
    "owner/adapter": {"adapter_config.json": b"{}", "adapter_model.safetensors": b"A and B", "optimizer.pt": b"not wanted"},
    "owner/pickle": {"config.json": b"{}", "pytorch_model.bin": b"not wanted"},
    "owner/pickled-adapter": {"adapter_config.json": b"{}", "adapter_model.bin": b"not wanted"},
    "owner/llama": {"paligemma-q4.gguf": b"not wanted"},
    "owner/jax": {"paligemma.npz": b"not wanted"},
    "owner/in-folders": {"one/model.safetensors": b"not wanted", "two/model.safetensors": b"not wanted"},
    "owner/own-names": {
        "config.json": b"{}",
        "tokenizer.json": b"{}",
        "model.safetensors.index.json": b'{"weight_map": {"w": "part-one.safetensors"}}',
        "part-one.safetensors": b"weights",
        "part-two.safetensors": b"not wanted",
    },
}
ODD_ANSWERS = {
    "owner/login": b"<html>Welcome to the airport: log in</html>",
    "owner/bare": b"{}",
    "owner/list": b"[]",
    "owner/nameless": b'{"id": "owner/nameless", "sha": null, "siblings": [{"x": 1}]}',
}
COMMITS = {"main": "a" * 40, "bfloat16": "b" * 40}
FINE_GRAINED = "Please enable access to public gated repositories in your fine-grained token settings to view this repository."


class Hub(BaseHTTPRequestHandler):
    """Answers the few requests of a download as the real hub does. `asked` lists the requests."""

    asked: list[str] = []

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def log_message(self, *_):
        pass

    def answer(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0].removeprefix("/api/models").strip("/").split("/")
        repo, what, revision, name = "/".join(path[:2]), *path[2:4], "/".join(path[4:])
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        commit = COMMITS.get(revision, revision)
        if token == "hf_revoked":
            self.refuse(401, "", "Invalid credentials in Authorization header")
        elif repo in ODD_ANSWERS:
            self.give(ODD_ANSWERS[repo])
        elif repo == "owner/down":
            self.refuse(503, "", "The hub is resting")
        elif repo not in REPOS:
            self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        elif commit not in COMMITS.values():
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif what == "revision":
            siblings = [{"rfilename": key} for key in REPOS[repo]]
            self.give(json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode())
        elif what == "tree":
            entries = [{"type": "file", "path": key, "size": len(value), "oid": "0" * 40} for key, value in REPOS[repo].items()]
            self.give(json.dumps(entries).encode())
        elif repo == "owner/gated" and not token:
            self.refuse(401, "GatedRepo", "Access to model owner/gated is restricted. You must be authenticated")
        elif repo == "owner/gated" and token == "hf_fine":
            self.refuse(403, "GatedRepo", FINE_GRAINED)
        elif repo == "owner/gated" and token == "hf_stranger":
            self.refuse(403, "GatedRepo", "Access to model owner/gated is restricted and you are not in the authorized list")
        else:
            content = REPOS[repo][name]
            is_other = repo == "owner/open" and commit == COMMITS["bfloat16"]
            self.give(content.replace(b"weights of main", b"weights of bfloat16") if is_other else content, commit)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def give(self, body: bytes, commit: str = "") -> None:
        self.send_response(200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


# Each input line is one request: address of the hub, token, id, revision. The result is printed as JSON.
CHILD = """
import json, os, sys, time
from paligemma.checkpoints import hub
from paligemma.errors import PaliGemmaError
from huggingface_hub import HfApi, constants, errors, get_token, snapshot_download
for line in sys.stdin:
    question = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    if question["token"]:
        os.environ["HF_TOKEN"] = question["token"]
    constants.HF_HUB_OFFLINE = question["offline"]
    start = time.perf_counter()
    try:
        if question["what"] == "download":
            answer = {"folder": str(hub.download(question["id"], question["revision"]))}
        elif question["what"] == "processor":
            from paligemma.processing_paligemma import PaliGemmaProcessor
            answer = {"table": PaliGemmaProcessor.from_pretrained(question["id"]).pixel_table.tolist()}
        else:
            from paligemma.checkpoints.weights import load_model
            model = load_model(question["id"])
            answer = {"sum": sum(float(x.double().sum()) for x in model.state_dict().values())}
    except PaliGemmaError as error:
        answer = {"error": type(error).__name__, "code": error.code, "message": error.message, "path": error.path}
    print(json.dumps(answer | {"seconds": time.perf_counter() - start}), flush=True)
"""


class Asker:
    """The new process."""

    def __init__(self, endpoint: str, cache: Path):
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        environment |= {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_ETAG_TIMEOUT": "1",
        }
        self.endpoint = endpoint
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip

    def __call__(
        self, name: str, revision: str | None = None, token: str = "", offline: bool = False, what: str = "download"
    ) -> dict:
        question = {"id": name, "revision": revision, "token": token, "offline": offline, "what": what}
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def ask(server, tmp_path_factory):
    with closing(Asker(server, tmp_path_factory.mktemp("cache"))) as asker:
        yield asker


def assert_refused(answer: dict, *says: str, kind: str = "AccessError", code: int = 5) -> None:
    assert answer.get("error") == kind, answer
    assert answer["code"] == code
    assert "\n" not in answer["message"]
    for words in says:
        assert words in answer["message"]


def test_a_model_is_downloaded_once_and_only_what_is_needed(ask):
    folder = Path(ask("owner/open")["folder"])
    wanted = {name for name, content in FILES.items() if content != b"not wanted"}
    assert {path.name for path in folder.iterdir()} == wanted
    assert (folder / "model-00001-of-00001.safetensors").read_bytes() == b"weights of main"
    before = len(Hub.asked)
    assert Path(ask("owner/open")["folder"]) == folder
    assert Path(ask("owner/open", offline=True)["folder"]) == folder
    assert len(Hub.asked) == before  # for a complete cache no request is sent


def test_an_adapter_is_downloaded_once(ask):
    folder = Path(ask("owner/adapter")["folder"])
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    before = len(Hub.asked)
    assert Path(ask("owner/adapter")["folder"]) == folder
    assert len(Hub.asked) == before


def test_weights_under_names_of_their_own_are_downloaded_by_the_index(ask):
    folder = Path(ask("owner/own-names")["folder"])
    assert (folder / "part-one.safetensors").read_bytes() == b"weights"
    assert not (folder / "part-two.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("owner/pickle", "owner/pickle holds only pytorch_model.bin. Unpickling"),
        ("owner/pickled-adapter", "holds an adapter only as adapter_model.bin"),
        ("owner/llama", "holds paligemma-q4.gguf"),
        ("owner/jax", "holds paligemma.npz. If it is a big_vision checkpoint"),
        ("owner/in-folders", "its folders one, two are. Download one of them"),
    ],
)
def test_a_hub_model_without_safetensors_is_named_for_what_it_is(ask, name, says):
    assert_refused(ask(name), says, kind="CheckpointError", code=4)


def test_model_adapter_and_processor_are_loaded_by_their_ids(ask, tmp_path):
    base = make_checkpoint(tmp_path / "base")
    (base / "preprocessor_config.json").unlink()  # transformers 5 writes only processor_config.json
    side = json.loads((base / "config.json").read_text())["vision_config"]["image_size"]
    sizes = {"size": {"height": side, "width": side}, "resample": 3, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.25] * 3}
    (base / "processor_config.json").write_text(json.dumps({"image_processor": sizes, "processor_class": "PaliGemmaProcessor"}))
    model = weights.load_model(base)
    plain = sum(float(x.double().sum()) for x in model.state_dict().values())
    lora.inject(model, lora.LoraConfig(r=2), lora.targets(model))
    for _, layer in lora.adapted(model):
        torch.nn.init.ones_(layer.lora_B.weight)
    adapters.save_adapter(lora.adapter_state(model), lora.LoraConfig(r=2), tmp_path / "tuned", "owner/tiny")
    for folder, repo in ((base, "owner/tiny"), (tmp_path / "tuned", "owner/tuned")):
        REPOS[repo] = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert ask("owner/tiny", what="model")["sum"] == plain
    lora.merge(model)
    merged = sum(float(x.double().sum()) for x in model.state_dict().values())
    assert ask("owner/tuned", what="model")["sum"] == pytest.approx(merged, abs=1e-6 * abs(merged))
    assert abs(merged - plain) > 1e-3 * abs(merged)
    table = PaliGemmaProcessor.from_pretrained(base).pixel_table.tolist()
    assert ask("owner/tiny", what="processor")["table"] == ask("owner/tuned", what="processor")["table"] == table
    assert table[0][0] == pytest.approx(-0.4) and table[2][0] == pytest.approx(-1.2)


def test_every_file_that_is_read_is_downloaded():
    root, pattern = Path(hub.__file__).parents[1], re.compile(r"[\w.\-]+\.(json|npz|model|safetensors)")
    of_others = {"results.json", "settings.json", "model.npz"}
    for module in (
        "checkpoints/safetensors_files", "checkpoints/weights", "processing_paligemma", "objects/mask_codec", "generation",
        "programs/options", "tasks",
    ):
        nodes = ast.walk(ast.parse((root / f"{module}.py").read_text(encoding="utf-8")))
        texts = [node.value for node in nodes if isinstance(node, ast.Constant)]
        names = {text for text in texts if isinstance(text, str) and pattern.fullmatch(text)} - of_others
        assert [name for name in sorted(names) if not any(fnmatch(name, wanted) for wanted in hub.FILES)] == [], module


def test_a_revision_is_another_folder(ask):
    folder = Path(ask("owner/open", "bfloat16")["folder"])
    assert folder.name == COMMITS["bfloat16"]
    assert (folder / "model-00001-of-00001.safetensors").read_bytes() == b"weights of bfloat16"


def test_an_incomplete_cache_is_completed(ask):
    folder = Path(ask("owner/open")["folder"])
    shard = folder / "model-00001-of-00001.safetensors"
    shard.resolve().unlink()
    shard.unlink()
    assert_refused(ask("owner/open", offline=True), "not, or not completely, in the cache", "HF_HUB_OFFLINE")
    assert Path(ask("owner/open")["folder"]) == folder
    assert shard.read_bytes() == b"weights of main"


@pytest.mark.parametrize("name", ODD_ANSWERS)
def test_an_answer_that_is_none_of_a_hub(ask, name):
    assert_refused(ask(name), "does not answer like a hub", "Does the network ask you to log in")


def test_no_token(ask):
    says = "has a licence that you must accept, and no token was sent"
    assert_refused(ask("owner/gated"), says, f"{ask.endpoint}/owner/gated", "hf auth")


def test_licence_not_accepted(ask):
    answer = ask("owner/gated", token="hf_stranger")
    assert_refused(answer, "has not accepted the licence of owner/gated", f"Accept it at {ask.endpoint}/owner/gated")


def test_token_of_too_few_rights(ask):
    assert_refused(ask("owner/gated", token="hf_fine"), "fine-grained", f"{ask.endpoint}/settings/tokens")


@pytest.mark.parametrize("name", ["owner/gated", "owner/open2"])
def test_token_that_is_revoked_or_mistyped(ask, name):
    assert_refused(ask(name, token="hf_revoked"), "does not accept the token: Invalid credentials", "HF_TOKEN")


def test_a_token_that_may_read_reads(ask):
    assert Path(ask("owner/gated", token="hf_good")["folder"]).name == COMMITS["main"]


def test_no_such_model(ask):
    assert_refused(ask("owner/nothing", token="hf_good"), "no model owner/nothing", "Check the spelling")
    assert_refused(ask("owner/nothing"), "no model owner/nothing", "If it is private: set HF_TOKEN")


def test_no_such_revision(ask):
    assert_refused(ask("owner/open", "float7"), "no revision 'float7'", f"{ask.endpoint}/owner/open/tree/main")


def test_a_hub_that_is_down(ask):
    assert_refused(ask("owner/down"), "answered 503", "The hub is resting", "Try again later")


def test_no_network_is_told_fast_with_the_model_that_needs_none(tmp_path):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        with closing(Asker(f"http://127.0.0.1:{server.getsockname()[1]}", tmp_path)) as ask:
            for is_silent in (False, True):  # first connections are refused; then they are accepted, but get no reply
                if is_silent:
                    server.listen()
                answer = ask("google/paligemma-3b-mix-224")
                assert_refused(answer, "cannot be reached", "paligemma-3b-mix-224 is not in the cache", "paligemma/bundled")
                assert answer["seconds"] < 10  # the timeout is 1 s; five tries would take a minute
            assert_refused(ask("owner/open", offline=True), "HF_HUB_OFFLINE is set", "paligemma/bundled")


@pytest.mark.parametrize("name", ["google/paligemma-3b-mix-224", "a/b", "Owner_1/m.odel-2"])
def test_ids_are_known_by_their_form(name):
    assert hub.is_id(name)


@pytest.mark.parametrize(
    "name", ["model", "./a/b", "/a/b", "a/b/c", "a//b", "~/b", "a/b c", "a--b/c", "a/..", "../b", "a/é", "a/b\n", ""]
)
def test_paths_are_no_ids(name):
    assert not hub.is_id(name)


def test_folders_of_a_similar_name_are_found(tmp_path):
    for name in ("checkpoint", "other"):
        (tmp_path / name).mkdir()
    assert hub.similar_folders(tmp_path / "chekpoint") == [str(tmp_path / "checkpoint")]
    assert hub.similar_folders(tmp_path / "none" / "chekpoint") == []


def test_a_cache_that_cannot_be_written_is_an_output_error():
    error = hub.explain(OSError(28, "No space left on device"), "owner/open", None)
    assert (type(error).__name__, error.code) == ("OutputError", 7)
    assert "No space left on device" in error.message


# What people type instead of a folder or an id


def refusal(name, error=CheckpointError):
    with pytest.raises(error) as caught:
        hub.resolve(name)
    assert caught.value.message.isprintable()
    return caught.value.message


@pytest.mark.parametrize(
    "address",
    [
        "https://huggingface.co/google/paligemma-3b-mix-224",
        "https://huggingface.co/google/paligemma-3b-mix-224/tree/main",
        "huggingface.co/google/paligemma-3b-mix-224/blob/main/config.json?raw=1",
        "http://hf.co/google/paligemma-3b-mix-224#files",
        "hf://google/paligemma-3b-mix-224",
        "HTTPS://HuggingFace.co/google/paligemma-3b-mix-224/",
        "https://huggingface.co/google/paligemma-3b-mix-224.git",
    ],
)
def test_the_address_of_a_page_gives_its_id(address):
    assert "the address of a page. Give the model's id, google/paligemma-3b-mix-224." in refusal(address)


@pytest.mark.parametrize("kind", ["collections", "datasets", "spaces", "papers"])
def test_the_address_of_a_page_of_another_kind_is_no_id(kind):
    assert "is an address. Give a folder, or an id of the hub" in refusal(f"https://huggingface.co/{kind}/google/paligemma")


def test_a_name_of_the_cache_gives_its_id():
    assert "Did you mean google/paligemma-3b-mix-224?" in refusal("models--google--paligemma-3b-mix-224")


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["training_args.bin", "optimizer.pt", "rng_state_0.pth"], "holds no weights: neither"),
        (["zero_to_fp32.py", "global_step500", "training_args.bin"], "saved in parts, global_step500, zero_to"),
        (["pytorch_model_fsdp_0", "optimizer_0"], "in parts.* merge-weights. .FSDP"),
        (["onnx"], "holds onnx. Only safetensors files are read"),
        (["flax_model.msgpack"], "holds flax_model.msgpack. Only safetensors"),
    ],
)
def test_what_lies_in_a_folder_in_place_of_weights_is_named(tmp_path, names, says):
    for name in ("config.json", *names):
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=says):
        weights.find_tensors(tmp_path)


@pytest.mark.parametrize(
    ("head", "says"), [(b"PK\x03\x04", "pickle of PyTorch"), (b"GGUF\x03", "llama.cpp"), (b"\x1f\x8b\x08", "packed by gzip")]
)
def test_a_file_that_was_renamed_is_not_called_damaged(tmp_path, head, says):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(head + b"x" * 100)
    with pytest.raises(CheckpointError, match=f"model.safetensors is .*{says}"):
        weights.find_tensors(tmp_path)


def test_an_empty_name_is_not_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(make_checkpoint(tmp_path / "model"))
    assert "the name of the model is empty" in refusal("")


@pytest.mark.parametrize("address", ["https://huggingface.co", "https://www.kaggle.com/models/google/paligemma", "s3://bucket/x"])
def test_other_addresses_are_refused(address):
    assert "is an address. Give a folder" in refusal(address)


def test_an_id_without_its_owner_is_completed():
    assert "Did you mean google/paligemma2-3b-mix-224?" in refusal("paligemma2-3b-mix-224")


def test_the_bundled_model_is_recommended_by_its_place(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    place = str(BUNDLED)
    assert f"Did you mean the folder {place}?" in hub.explain(OSError("no route"), "paligemma/bundled", None).message
    assert f"Without a network, use {place}" in hub.explain(OSError("no route"), "google/x", None).message


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("model.gguf", b"GGUF", "a file of llama.cpp. Only safetensors"),
        ("model", b"GGUF....", "a file of llama.cpp. Only safetensors"),
        ("paligemma.npz", b"PK", "convert_paligemma_weights_to_hf.py"),
        ("vae-oid.npz", b"PK", "Give it as --mask_codec"),
        ("pytorch_model.bin", b"PK", "Unpickling runs any code"),
        ("model.tar.gz", b"", "an archive. Unpack it"),
        ("notes.txt", b"", "is a file. Give the folder"),
    ],
)
def test_a_file_in_place_of_a_folder_is_named_for_what_it_is(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    assert says in refusal(tmp_path / name)


def test_a_pipe_in_place_of_a_folder_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.gguf")
    assert "llama.cpp" in refusal(tmp_path / "model.gguf")


def model_at(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")


def test_the_folders_of_the_cache_give_the_id_and_the_snapshot(tmp_path):
    cache = tmp_path / "models--google--paligemma-3b"
    model_at(cache / "snapshots" / ("a" * 40))
    (cache / "refs").mkdir()
    message = refusal(cache)
    assert "the hub's cache of google/paligemma-3b" in message and str(cache / "snapshots" / ("a" * 40)) in message
    assert "Give google/paligemma-3b" in refusal(cache / "refs")
    assert f"or its folder {cache / 'snapshots' / ('a' * 40)}" in refusal(cache / "snapshots")
    assert "is the hub's cache. Give the id of a model in it: google/paligemma-3b." in refusal(tmp_path)


def test_the_output_of_a_trainer_gives_its_last_checkpoint(tmp_path):
    for step in (1000, 500, 90):
        model_at(tmp_path / f"checkpoint-{step}")
    assert f"such as {tmp_path / 'checkpoint-1000'}." in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="but holds checkpoint-90, checkpoint-500, checkpoint-1000"):
        weights.load_model(tmp_path)


def test_the_output_of_finetune_gives_its_model(tmp_path):
    model_at(tmp_path / "adapter")
    model_at(tmp_path / "model")
    assert f"such as {tmp_path / 'model'}." in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("pytorch_model.bin", "Unpickling"),
        ("q4.gguf", "Only safetensors"),
        ("x.npz", "big_vision"),
        ("adapter_model.safetensors", "without its adapter_config.json"),
        ("notes.txt", "config.json is missing, and there are no weights"),
    ],
)
def test_a_folder_without_a_model_is_named_for_what_it_holds(tmp_path, name, says):
    (tmp_path / name).touch()
    assert says in refusal(tmp_path)


@pytest.mark.parametrize("name", ["~nosuchuser/x", "x" * 300, "a\0b", "", ".../x", "a/" * 3000])
def test_names_of_any_form_are_refused_in_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refusal(name)


def test_a_pointer_of_git_lfs_and_a_web_page_are_recognised(tmp_path):
    base = make_checkpoint(tmp_path / "base")
    for name in ("tokenizer.json", "model.safetensors", "config.json"):
        for content, says in ((b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
                              (b"<!DOCTYPE html><html>", "a web page")):  # fmt: skip
            before = (base / name).read_bytes()
            (base / name).write_bytes(content)
            load = PaliGemmaProcessor.from_pretrained if name == "tokenizer.json" else weights.load_model
            with pytest.raises(PaliGemmaError, match=f"{name} is .*{says}"):
                load(base)
            (base / name).write_bytes(before)
