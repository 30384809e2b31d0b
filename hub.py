"""A hub id in, the folder of its files out; and a sentence for each way in which the hub says no.

Downloading is huggingface_hub's: it reads HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE, locks its cache and finishes
what was interrupted. It is imported only when an id has to be resolved. Checked in tests/test_hub.py, with a small server
in the hub's place.
"""

import difflib
import errno
import json
import re
from pathlib import Path

from checkpoint import ADAPTER_CONFIG_NAME, INDEX_NAME, SINGLE_NAME, listed, read_json
from errors import AccessError, CheckpointError, OutputError, PaliGemmaError, UsageError

FILES = (
    "config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", INDEX_NAME, "model*.safetensors",
)  # fmt: skip
NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
LOGIN = "run: hf auth login"
DEMO = "Without a network there is still demo/checkpoint, which comes with this code."


def is_id(name: str) -> bool:
    """Whether a name has the form of a hub id, owner/model."""
    return re.fullmatch(r"(?!.*(--|\.\.))[A-Za-z0-9][\w.\-]{0,95}/[A-Za-z0-9][\w.\-]{0,95}", name, re.ASCII) is not None


def similar_folders(path: Path) -> list[str]:
    """Folders beside a path that is not there, whose names are nearly its own."""
    names = [folder.name for folder in path.parent.iterdir() if folder.is_dir()] if path.parent.is_dir() else []
    return [str(path.parent / name) for name in difflib.get_close_matches(path.name, names)]


def is_complete(folder: Path) -> bool:
    """Whether config, tokenizer and all weights are there, so that nobody has to be asked."""
    names = ["config.json", "tokenizer.json", SINGLE_NAME]
    try:
        if (folder / INDEX_NAME).exists():
            index = json.loads((folder / INDEX_NAME).read_text())
            names = names[:-1] + list(index["weight_map"].values())
        return all((folder / name).is_file() for name in names)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):  # a damaged index: let the hub decide
        return False


def download(repo_id: str, revision: str | None = None) -> Path:
    """The folder in the cache with the files of a hub model, downloaded if they are not there yet.

    Raises: AccessError when the hub cannot be reached or refuses, OutputError when the cache cannot be written.
    """
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    wanted = {"repo_id": repo_id, "revision": revision, "allow_patterns": list(FILES)}
    cached = None
    try:
        cached = Path(snapshot_download(**wanted, local_files_only=True))
    except errors.LocalEntryNotFoundError:
        pass  # nothing cached, or not all of it
    if cached is not None and (constants.HF_HUB_OFFLINE or is_complete(cached)):
        return cached
    try:
        # One question with a time limit, so that a dead network is noticed at once and not after five tries a file.
        HfApi().model_info(repo_id, revision=revision or "main", timeout=constants.HF_HUB_ETAG_TIMEOUT)
        return Path(snapshot_download(**wanted))
    except (OSError, errors.HTTPError, RuntimeError) as error:  # the last is what the xet client raises
        if cached is not None and getattr(error, "response", None) is None:
            return cached  # no network, but files: if one is missing after all, loading will name it
        raise explain(error, repo_id, revision) from error


def explain(error: Exception, repo_id: str, revision: str | None) -> PaliGemmaError:
    """What happened, and what to do about it."""
    from huggingface_hub import constants, errors

    page, cache = f"{constants.ENDPOINT}/{repo_id}", constants.HF_HUB_CACHE
    if getattr(error, "response", None) is not None:
        return AccessError(explain_refusal(error, repo_id, revision), path=page)
    if isinstance(error, errors.OfflineModeIsEnabled):
        text = f"{repo_id} is not (completely) in the cache {cache}, and HF_HUB_OFFLINE forbids asking the hub. Unset it."
        return AccessError(f"{text} {DEMO}", path=page)
    if isinstance(error, OSError) and error.errno in NOT_WRITABLE:
        text = f"the cache {cache} cannot be written: {error.strerror}. Make room, or set HF_HOME to another folder."
        return OutputError(text, path=cache)
    text = f"{constants.ENDPOINT} cannot be reached ({first_line(error)}), and {repo_id} is not in the cache {cache}."
    return AccessError(f"{text} {suggest_folder(repo_id)} {DEMO}", path=page)


def explain_refusal(error: Exception, repo_id: str, revision: str | None) -> str:
    """The hub's answer in a sentence: token, licence, name or revision. A status alone says too little, so its words count."""
    from huggingface_hub import constants, errors, get_token

    page, tokens = f"{constants.ENDPOINT}/{repo_id}", f"{constants.ENDPOINT}/settings/tokens"
    status = error.response.status_code
    said = error.response.headers.get("X-Error-Message") or first_line(error)
    is_gated = isinstance(error, errors.GatedRepoError)
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo_id} has no revision {revision!r}. {page}/tree/main lists those that there are."
    if status == 401 and get_token():
        return f"the hub does not accept the token: {said}. Make a new one at {tokens}, then set HF_TOKEN or {LOGIN}"
    if status == 401 and is_gated:
        return f"{repo_id} is behind a licence and no token was sent. Accept the licence at {page}, then set HF_TOKEN or {LOGIN}"
    if status == 403 and re.search("fine-?grained", f"{said} {error}", re.IGNORECASE):
        return f"the token is fine-grained and may not read gated models. Allow it to at {tokens}, or make one of type read."
    if is_gated:
        return f"the owner of the token has not accepted the licence of {repo_id}. Accept it at {page}, then try again."
    if isinstance(error, errors.RepositoryNotFoundError):
        private = "" if get_token() else f" If it is private: set HF_TOKEN or {LOGIN}"
        return f"the hub has no model {repo_id}. Check the spelling. {suggest_folder(repo_id)}{private}"
    return f"the hub answered {status} for {repo_id}: {said}. Try again later, or see {page}."


def suggest_folder(name: str) -> str:
    """For somebody who meant a folder and not the hub."""
    near = similar_folders(Path(name))
    return f"Did you mean the folder {near[0]}?" if near else "Nor is there a folder of that name."


def first_line(error: Exception) -> str:
    """What an exception says, without the lines of advice that follow."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def resolve(path_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint; a hub id ("google/paligemma-3b-mix-224") is downloaded, or found in the cache.

    Args:
        revision: branch, tag or commit of a hub id, such as "bfloat16"; a folder has none.
    Raises: CheckpointError when it is neither, AccessError when the hub does not give it.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        if revision is not None:
            raise UsageError(f"revision {revision} is for ids of the hub, and {path} is a folder. Leave it out.")
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file. Name the folder with config.json and the weights.", path=path)
    if is_id(str(path_or_hub_id)):
        return download(str(path_or_hub_id), revision)
    near = similar_folders(path)
    hint = f"Did you mean {listed(near)}?" if near else "Name a folder, or an id of the hub (google/paligemma-3b-mix-224)."
    raise CheckpointError(f"there is no folder {path}. {hint}", path=path)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a LoRA adapter and no weights of its own."""
    has_weights = any((folder / name).exists() for name in (SINGLE_NAME, INDEX_NAME))
    return (folder / ADAPTER_CONFIG_NAME).exists() and not has_weights


def base_folder(folder: str | Path) -> Path:
    """The folder with config.json, tokenizer and weights: this one or, of an adapter, that of its base model.

    Raises: CheckpointError for an adapter that names no base; as `resolve` where the base is not found.
    """
    folder = Path(folder)
    if not is_adapter(folder):
        return folder
    file = folder / ADAPTER_CONFIG_NAME
    raw = read_json(file)
    name = raw.get("base_model_name_or_path")
    if not (isinstance(name, str) and name):
        text = f"{file} names no base model. Write a folder or a hub id as its base_model_name_or_path."
        raise CheckpointError(text, path=file)
    revision = raw.get("revision")
    base = resolve(name, revision if isinstance(revision, str) and is_id(name) else None)
    if is_adapter(base):
        raise CheckpointError(f"{file} names {name} as its base, which is an adapter itself. Merge that one first.", path=file)
    return base
