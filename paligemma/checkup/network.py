"""Can the hub be reached, and does it accept the token? One request with a short time limit; only for `--network`.

Checked in tests/checkup/test_network.py, with a local server that imitates the hub.
"""

import threading
import time

from paligemma.checkpoints import hub
from paligemma.checkup.rows import Row, failed_by, note
from paligemma.errors import AccessError
from paligemma.files import expand, is_folder

TIMEOUT_S = 4
CHECK_NETWORK = "Check the network, a proxy ($HTTPS_PROXY) and $HF_ENDPOINT."


def hub_rows(name: str | None) -> list[Row]:
    """Whether the hub answers a request about a model.

    The request runs in a thread, because looking up a name (DNS) cannot be given a time limit.

    Args:
        name: the model. If it is a folder or None, the request is about hub.EXAMPLE.
    """
    is_on_hub = name is not None and hub.is_id(name) and not is_folder(expand(name))
    repo_id, found = name if is_on_hub else hub.EXAMPLE, []
    thread = threading.Thread(target=lambda: found.extend(ask(repo_id)), daemon=True)
    thread.start()
    thread.join(TIMEOUT_S + 1)
    error = AccessError(f"the hub did not answer within {TIMEOUT_S} s. {CHECK_NETWORK}")
    return found[:] or [failed_by("hub", error)]


def ask(repo_id: str) -> list[Row]:
    """The row for the answer of the hub. Errors have the text that a download would show."""
    from huggingface_hub import HfApi, constants, errors, get_token

    start = time.perf_counter()
    try:
        info = HfApi().model_info(repo_id, revision="main", timeout=TIMEOUT_S)
    except errors.OfflineModeIsEnabled:
        return [note("hub", "not asked, because HF_HUB_OFFLINE is set", "Unset it to download models.")]
    except (OSError, errors.HTTPError, RuntimeError, *hub.NOT_A_HUB) as error:
        if getattr(error, "response", None) is not None or isinstance(error, hub.NOT_A_HUB):
            return [failed_by("hub", hub.explain(error, repo_id, None))]
        text = f"{constants.ENDPOINT} cannot be reached ({hub.first_line(error)}). {CHECK_NETWORK}"
        return [failed_by("hub", AccessError(text))]
    other = "" if constants.ENDPOINT == "https://huggingface.co" else " (HF_ENDPOINT names another hub)"
    rows = [Row("hub", f"answered in {time.perf_counter() - start:.1f} s{other}{', with the token' if get_token() else ''}")]
    if info.gated and not get_token():
        advice = f"Accept the licence on the page of {repo_id}, then {hub.LOGIN}"
        rows.append(note("licence", f"{repo_id} has a licence that must be accepted, and there is no token", advice))
    return rows
