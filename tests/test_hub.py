"""The hub, played by a small server on this machine: what is downloaded, and what each refusal says.

huggingface_hub reads its settings when it is imported, so the questions are asked in one fresh process, all in a row.
"""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import hub

FILES = {
    "config.json": b'{"model_type": "paligemma"}',
    "tokenizer.json": b"{}",
    "model.safetensors.index.json": b'{"weight_map": {"w": "model-00001-of-00001.safetensors"}}',
    "model-00001-of-00001.safetensors": b"weights of main",
    "consolidated.safetensors": b"not wanted",
    "pytorch_model.bin": b"not wanted",
    "README.md": b"not wanted",
}
COMMITS = {"main": "a" * 40, "bfloat16": "b" * 40}
FINE_GRAINED = "Please enable access to public gated repositories in your fine-grained token settings to view this repository."


class Hub(BaseHTTPRequestHandler):
    """Answers as the real one does for the few questions of a download. `asked` is the list of what was asked."""

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
        elif repo == "owner/down":
            self.refuse(503, "", "The hub is resting")
        elif repo not in ("owner/open", "owner/gated"):
            self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        elif commit not in COMMITS.values():
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif what == "revision":
            self.give(json.dumps({"id": repo, "sha": commit, "siblings": []}).encode())
        elif what == "tree":
            entries = [{"type": "file", "path": key, "size": len(value), "oid": "0" * 40} for key, value in FILES.items()]
            self.give(json.dumps(entries).encode())
        elif repo == "owner/gated" and not token:
            self.refuse(401, "GatedRepo", "Access to model owner/gated is restricted. You must be authenticated")
        elif repo == "owner/gated" and token == "hf_fine":
            self.refuse(403, "GatedRepo", FINE_GRAINED)
        elif repo == "owner/gated" and token == "hf_stranger":
            self.refuse(403, "GatedRepo", "Access to model owner/gated is restricted and you are not in the authorized list")
        else:
            self.give(FILES[name].replace(b"main", b"bfloat16" if commit == COMMITS["bfloat16"] else b"main"), commit)

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


# One line a question: where to ask, which token, which id, which revision; what came of it goes out as JSON.
CHILD = """
import json, os, sys, time
import hub
from errors import PaliGemmaError
from huggingface_hub import HfApi, constants, errors, get_token, snapshot_download
for line in sys.stdin:
    question = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    if question["token"]:
        os.environ["HF_TOKEN"] = question["token"]
    constants.HF_HUB_OFFLINE = question["offline"]
    start = time.perf_counter()
    try:
        answer = {"folder": str(hub.download(question["id"], question["revision"]))}
    except PaliGemmaError as error:
        answer = {"error": type(error).__name__, "code": error.code, "message": error.message, "path": error.path}
    print(json.dumps(answer | {"seconds": time.perf_counter() - start}), flush=True)
"""


class Asker:
    """The fresh process."""

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
            cwd=Path(__file__).parents[1],
        )  # fmt: skip

    def __call__(self, name: str, revision: str | None = None, token: str = "", offline: bool = False) -> dict:
        question = {"id": name, "revision": revision, "token": token, "offline": offline}
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


def assert_refused(answer: dict, *says: str) -> None:
    assert answer.get("error") == "AccessError", answer
    assert answer["code"] == 5
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
    assert len(Hub.asked) == before  # a complete cache asks nobody


def test_a_revision_is_another_folder(ask):
    folder = Path(ask("owner/open", "bfloat16")["folder"])
    assert folder.name == COMMITS["bfloat16"]
    assert (folder / "model-00001-of-00001.safetensors").read_bytes() == b"weights of bfloat16"


def test_an_incomplete_cache_is_completed(ask):
    folder = Path(ask("owner/open")["folder"])
    shard = folder / "model-00001-of-00001.safetensors"
    shard.resolve().unlink()
    shard.unlink()
    assert_refused(ask("owner/open", offline=True), "not (completely) in the cache", "HF_HUB_OFFLINE")
    assert Path(ask("owner/open")["folder"]) == folder
    assert shard.read_bytes() == b"weights of main"


def test_no_token(ask):
    assert_refused(ask("owner/gated"), "behind a licence and no token was sent", f"{ask.endpoint}/owner/gated", "hf auth login")


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
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with closing(Asker(f"http://127.0.0.1:{nobody.getsockname()[1]}", tmp_path)) as ask:
            for is_silent in (False, True):  # connections are refused; then they are taken, and never answered
                if is_silent:
                    nobody.listen()
                answer = ask("google/paligemma-3b-mix-224")
                assert_refused(answer, "cannot be reached", "google/paligemma-3b-mix-224 is not in the cache", "demo/checkpoint")
                assert answer["seconds"] < 10  # 1 s is the limit that was set; five tries would take a minute
            assert_refused(ask("owner/open", offline=True), "HF_HUB_OFFLINE forbids asking", "demo/checkpoint")


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
