"""The check of the hub, against a local server that imitates it. huggingface_hub reads its settings when it is imported."""

import json
import os
import socket
import subprocess
import sys
import threading
from contextlib import closing
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from paligemma.checkpoints import hub
from paligemma.checkup import network
from paligemma.checkup.rows import FAILED, NOTE, OK, Row
from tests.checkpoints.test_hub import Hub

ROOT = Path(__file__).resolve().parents[2]
CHILD = """
import json, os, sys
from huggingface_hub import constants
from paligemma.checkup import network
for repo_id, token, offline, timeout in json.loads(sys.argv[1]):
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    constants.HF_HUB_OFFLINE, network.TIMEOUT_S = offline, timeout
    print(json.dumps([[row.state, row.value, row.advice, row.code] for row in network.hub_rows(repo_id)]), flush=True)
"""


def ask(tmp_path, endpoint, *questions):
    """The rows for each question, from a new process: (state, value, advice, code)."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", CHILD, json.dumps(questions)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """The rows by name of the case."""
    cases = {
        "open": ("owner/open", None, False, 5), "with token": ("owner/open", "hf_valid", False, 5),
        "revoked": ("owner/open", "hf_revoked", False, 5), "unknown": ("owner/nothing", "hf_valid", False, 5),
        "down": ("owner/down", None, False, 5), "login page": ("owner/login", None, False, 5),
        "offline": ("owner/open", None, True, 5),
    }  # fmt: skip
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        found = ask(tmp_path_factory.mktemp("home"), endpoint, *cases.values())
    finally:
        server.shutdown()
    return dict(zip(cases, found, strict=True))


def test_a_hub_that_answers_is_ok(answers):
    ((state, value, advice, _),) = answers["open"]
    assert state == OK and value.startswith("answered in ") and "another hub" in value and "token" not in value and not advice
    ((state, value, _, _),) = answers["with token"]
    assert state == OK and value.endswith("with the token")


@pytest.mark.parametrize(
    ("case", "value", "advice"),
    [
        ("revoked", "does not accept the token", "Create a new token"),
        ("unknown", "the hub has no model owner/nothing", "Check the spelling"),
        ("down", "answered 503", "Try again later"),
        ("login page", "does not answer like a hub", ""),
    ],
)
def test_a_refusal_is_failed_with_what_to_do(answers, case, value, advice):
    ((state, found, what_to_do, code),) = answers[case]
    assert state == FAILED and value in found and advice in what_to_do and what_to_do and code == 5


def test_offline_mode_is_a_note(answers):
    ((state, value, advice, _),) = answers["offline"]
    assert state == NOTE and "HF_HUB_OFFLINE" in value and advice


def test_a_hub_that_cannot_be_reached_or_never_answers_is_failed(tmp_path):
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:  # accepts connections, and answers none
        port = silent.getsockname()[1]
        ((found,),) = ask(tmp_path, f"http://127.0.0.1:{port}", ("owner/open", None, False, 0.2))
        assert found[0] == FAILED and found[3] == 5
    ((found,),) = ask(tmp_path, f"http://127.0.0.1:{port}", ("owner/open", None, False, 5))  # the port is closed now
    assert found[0] == FAILED and "cannot be reached" in found[1] and "HTTPS_PROXY" in found[2] and found[3] == 5


def test_the_hub_is_not_asked_for_a_folder(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(network, "ask", lambda name: asked.append(name) or [Row("hub", "answered")])
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in (str(tmp_path), "owner/model", "runs/mine/model", None, "owner/other"):
        network.hub_rows(name)
    assert asked == [hub.EXAMPLE] * 4 + ["owner/other"]


def test_a_look_up_of_the_name_that_hangs_is_failed_after_a_while(monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(network, "TIMEOUT_S", -0.9)
    monkeypatch.setattr(network, "ask", lambda _: [release.wait(60) and Row("hub", "late")])
    (row,) = network.hub_rows(None)
    release.set()
    assert row.state == FAILED and "did not answer" in row.value and "HTTPS_PROXY" in row.advice
