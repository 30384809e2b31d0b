"""A name in, the folder of a model's files out: a folder, or a hub id; and a sentence for everything else that people type.

Downloading is huggingface_hub's: it reads HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE, locks its cache and finishes
what was interrupted. It is imported only when an id has to be resolved. Checked in tests/checkpoints/test_hub.py, with a server
in the hub's place.
"""

import errno
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paligemma.checkpoints.safetensors_files import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_NAME,
    CONFIG_NAME,
    INDEX_NAME,
    SIDE_FILES,
    SINGLE_NAME,
    explain_file,
    explain_names,
    explain_no_weights,
    has_adapter,
    has_weights,
    read_index,
)
from paligemma.errors import AccessError, CheckpointError, OutputError, PaliGemmaError, UsageError, listed
from paligemma.files import BUNDLED, expand, is_file, is_folder, names_in, similar_names, stat_path

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

FILES = (CONFIG_NAME, *SIDE_FILES, INDEX_NAME, "model*.safetensors", ADAPTER_CONFIG_NAME, ADAPTER_NAME)
PAGE = re.compile(
    r"(?i:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)|hf:/)"
    r"/(?!(?:collections|datasets|spaces|papers|docs|blog)/)([^/\s]+/[^/?#\s]+?)(?:\.git)?(?:[/?#].*)?"
)
NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
NO_HUB = (ValueError, KeyError, TypeError)  # what the library raises where the answer is no hub's: a page to log in, say
LOGIN = "run: hf auth login"
EXAMPLE = "google/paligemma-3b-mix-224"


def is_id(name: str) -> bool:
    """Whether a name has the form of a hub id, owner/model."""
    return re.fullmatch(r"(?!.*(--|\.\.))[A-Za-z0-9][\w.\-]{0,95}/[A-Za-z0-9][\w.\-]{0,95}", name, re.ASCII) is not None


def similar_folders(path: Path) -> list[str]:
    """Folders beside a path that is not there, whose names are nearly its own."""
    near = similar_names(path.name, names_in(path.parent))
    return [str(path.parent / name) for name in near if is_folder(path.parent / name)]


def is_complete(folder: Path) -> bool:
    """Whether an adapter, or config, tokenizer and all weights are there, so that the hub need not be asked."""
    try:
        weights = SINGLE_NAME if is_file(folder / SINGLE_NAME) else INDEX_NAME
        kinds = ((CONFIG_NAME, "tokenizer.json", weights), (ADAPTER_CONFIG_NAME, ADAPTER_NAME))
        is_there = any(all(is_file(folder / name) for name in names) for names in kinds)
        return is_there and not missing_shards(folder)
    except PaliGemmaError:  # a damaged index: the hub may have a better one
        return False


def missing_shards(folder: Path) -> list[str]:
    """The files of weights that are needed and not there. Raises: CheckpointError for a damaged index."""
    if is_file(folder / SINGLE_NAME) or not is_file(folder / INDEX_NAME):
        return []
    return [name for name in read_index(folder / INDEX_NAME) if not is_file(folder / name)]


def download(repo_id: str, revision: str | None = None) -> Path:
    """The folder in the cache with the files of a hub model, or adapter, downloaded if they are not there yet.

    Raises: AccessError when the hub cannot be reached or refuses, OutputError when the cache cannot be written, CheckpointError
        when there is nothing to load.
    """
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    wanted: dict[str, Any] = {"repo_id": repo_id, "revision": revision, "allow_patterns": list(FILES)}
    cached = None
    try:
        cached = Path(snapshot_download(**wanted, local_files_only=True))
    except errors.LocalEntryNotFoundError:
        pass  # nothing cached, or not all of it
    if cached is not None and (constants.HF_HUB_OFFLINE or is_complete(cached)):
        return cached
    try:
        # One question with a time limit, so that a dead network is noticed at once and not after five tries a file.
        info = HfApi().model_info(repo_id, revision=revision or "main", timeout=constants.HF_HUB_ETAG_TIMEOUT)
        names = [file.rfilename for file in info.siblings or ()]
        if names and not any(fnmatch(name, pattern) for name in names for pattern in FILES if pattern.endswith(".safetensors")):
            if INDEX_NAME not in names:
                raise CheckpointError(f"{repo_id} {explain_names(names)}", path=f"{constants.ENDPOINT}/{repo_id}")
        folder = Path(snapshot_download(**wanted))
        if shards := missing_shards(folder):  # under names of their own
            snapshot_download(repo_id=repo_id, revision=revision, allow_patterns=shards)
        return folder
    except (OSError, errors.HTTPError, RuntimeError, *NO_HUB) as error:  # RuntimeError is what the xet client raises
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
        return AccessError(f"{text}{suggest_demo()}", path=page)
    if isinstance(error, OSError) and error.errno in NOT_WRITABLE:
        text = f"the cache {cache} cannot be written: {error.strerror}. Make room, or set HF_HOME to another folder."
        return OutputError(text, path=cache)
    if isinstance(error, NO_HUB):
        text = f"{constants.ENDPOINT} does not answer as a hub does ({type(error).__name__}: {first_line(error)})."
        return AccessError(f"{text} Does the network ask you to log in, or is HF_ENDPOINT wrong?{suggest_demo()}", path=page)
    text = f"{constants.ENDPOINT} cannot be reached ({first_line(error)}), and {repo_id} is not in the cache {cache}."
    return AccessError(f"{text} {suggest_folder(repo_id)}{suggest_demo()}", path=page)


def explain_refusal(error: "HfHubHTTPError", repo_id: str, revision: str | None) -> str:
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
        return f"{repo_id} has a licence to accept, and no token was sent. Accept it at {page}, then set HF_TOKEN or {LOGIN}"
    if status == 403 and re.search("fine-?grained", f"{said} {error}", re.IGNORECASE):
        return f"the token is fine-grained and may not read gated models. Allow it to at {tokens}, or make one of type read."
    if is_gated:
        return f"the owner of the token has not accepted the licence of {repo_id}. Accept it at {page}, then try again."
    if isinstance(error, errors.RepositoryNotFoundError):
        private = "" if get_token() else f" If it is private: set HF_TOKEN or {LOGIN}"
        return f"the hub has no model {repo_id}. Check the spelling. {suggest_folder(repo_id)}{private}"
    return f"the hub answered {status} for {repo_id}: {said}. Try again later, or see {page}."


def suggest_folder(name: str) -> str:
    """For a user who meant a folder and not the hub."""
    near = similar_folders(Path(name))
    if name == "paligemma/bundled":
        near = [str(BUNDLED)]
    return f"Did you mean the folder {near[0]}?" if near else "Nor is there a folder of that name."


def suggest_demo() -> str:
    """The model for which no network is needed, by its place on this machine."""
    return f" Without a network there is still {BUNDLED}, which comes with this code."


def first_line(error: Exception) -> str:
    """What an exception says, without the lines of advice that follow."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def resolve(path_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint; a hub id ("google/paligemma-3b-mix-224") is downloaded, or found in the cache.

    Args:
        revision: branch, tag or commit of a hub id, such as "bfloat16"; a folder has none.
    Raises: CheckpointError when it is neither, with what it is instead; AccessError when the hub does not give it.
    """
    name = str(path_or_hub_id)
    path = expand(name)
    if is_folder(path):
        if revision is not None:
            raise UsageError(f"revision {revision} is for ids of the hub, and {path} is a folder. Leave it out.")
        if stat_path(path / CONFIG_NAME) is None and not has_adapter(path) and not has_weights(path):
            raise CheckpointError(explain_no_weights(path), path=path)
        return path
    if stat_path(path) is not None:
        raise CheckpointError(explain_file(path), path=path)
    page = PAGE.fullmatch(name)
    if page is not None and is_id(page[1]):
        raise CheckpointError(f"{name} is the address of a page. Name the model's id, {page[1]}.", path=name)
    if "://" in name:
        raise CheckpointError(f"{name} is an address. Name a folder, or an id of the hub such as {EXAMPLE}.", path=name)
    if is_id(name):
        return download(name, revision)
    near = similar_folders(path)
    near += [f"google/{name}"] if re.fullmatch(r"paligemma2?-[\w-]+", name) else []
    cached = name.removeprefix("models--").replace("--", "/")  # how the hub's cache spells an id
    near += [cached] if cached != name and is_id(cached) else []
    hint = f"Did you mean {listed(near)}?" if near else f"Name a folder, or an id of the hub such as {EXAMPLE}."
    raise CheckpointError(f"there is no folder {path}. {hint}", path=path)


def find_base(folder: Path, adapter_config: dict | None, base_model: str | Path | None = None) -> Path:
    """The folder with config.json, tokenizer and weights: `folder` itself or, for an adapter without weights, its base model's.

    Args:
        adapter_config: content of the folder's adapter_config.json, None if there is none.
        base_model: folder or hub id of an adapter's base, in place of the one that adapter_config.json names.
    Raises: CheckpointError for an adapter that names no base, and for everything that `resolve` raises it for; AccessError;
        UsageError for a base_model if the folder has weights of its own.
    """
    if adapter_config is None or has_weights(folder):
        if base_model is not None:
            raise UsageError(f"base_model {base_model} is for adapters, and {folder} is a whole model. Leave it out.")
        return folder
    file = folder / ADAPTER_CONFIG_NAME
    name, revision = adapter_config.get("base_model_name_or_path"), adapter_config.get("revision")
    if base_model is not None:
        base = resolve(base_model)
    elif not (isinstance(name, str) and name):
        raise CheckpointError(f"{file} names no base model. Give a folder or a hub id as --base_model.", path=file)
    else:
        try:
            base = resolve(name, revision if isinstance(revision, str) and is_id(name) else None)
        except (CheckpointError, AccessError) as error:
            text = f"{file} names the base model {name!r:.200}, but {error.message} To use another one, give --base_model."
            raise type(error)(text, path=file) from error
    if has_adapter(base):
        raise CheckpointError(f"{base}, the base model of {folder}, has an adapter itself. Merge that one first.", path=file)
    return base
