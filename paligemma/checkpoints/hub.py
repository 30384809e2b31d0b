"""Resolves a folder name or a hub id to a local folder, and explains names that are neither.

The library huggingface_hub downloads the files. It reads HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE, locks its cache and
resumes interrupted downloads. It is imported only when a hub id has to be resolved.

Checked in tests/checkpoints/test_hub.py, with a local server in place of the hub.
"""

import errno
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from paligemma.checkpoints.file_names import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_NAME,
    CONFIG_NAME,
    INDEX_NAME,
    SIDE_FILES,
    SINGLE_NAME,
    cached_id,
    explain_file,
    explain_names,
    explain_no_weights,
    has_adapter,
    has_weights,
)
from paligemma.checkpoints.headers import read_index
from paligemma.errors import AccessError, CheckpointError, OutputError, PaliGemmaError, UsageError, listed
from paligemma.files import BUNDLED, expand, is_file, is_folder, names_in, similar_names, stat_path

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

FILES = (CONFIG_NAME, *SIDE_FILES, INDEX_NAME, "model*.safetensors", ADAPTER_CONFIG_NAME, ADAPTER_NAME)
PAGE = re.compile(  # the address of a model's page; group 1 is the hub id
    r"(?i:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)|hf:/)"
    r"/(?!(?:collections|datasets|spaces|papers|docs|blog)/)([^/\s]+/[^/?#\s]+?)(?:\.git)?(?:[/?#].*)?"
)
NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
# huggingface_hub raises these if the server is not a hub, for example if it answers with a login page.
NOT_A_HUB = (ValueError, KeyError, TypeError)
LOGIN = "run: hf auth login"
EXAMPLE = "google/paligemma-3b-mix-224"


def is_id(name: str) -> bool:
    """Whether a name has the form of a hub id, owner/model."""
    return re.fullmatch(r"(?!.*(--|\.\.))[A-Za-z0-9][\w.\-]{0,95}/[A-Za-z0-9][\w.\-]{0,95}", name, re.ASCII) is not None


def similar_folders(path: Path) -> list[str]:
    """Existing folders with a name similar to that of a missing path."""
    similar = similar_names(path.name, names_in(path.parent))
    return [str(path.parent / name) for name in similar if is_folder(path.parent / name)]


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a complete adapter or a complete model (config, tokenizer, all weights)."""
    try:
        weights = SINGLE_NAME if is_file(folder / SINGLE_NAME) else INDEX_NAME
        kinds = ((CONFIG_NAME, "tokenizer.json", weights), (ADAPTER_CONFIG_NAME, ADAPTER_NAME))
        is_there = any(all(is_file(folder / name) for name in names) for names in kinds)
        return is_there and not missing_shards(folder)
    except PaliGemmaError:  # the index is damaged, and the hub may have a better one
        return False


def missing_shards(folder: Path) -> list[str]:
    """The weight files that are needed and missing. Raises: CheckpointError for a damaged index."""
    if is_file(folder / SINGLE_NAME) or not is_file(folder / INDEX_NAME):
        return []
    return [name for name in read_index(folder / INDEX_NAME) if not is_file(folder / name)]


def find_cached(repo_id: str, revision: str | None = None) -> Path | None:
    """The folder of a hub model or adapter in the cache; some of its files may be missing. None if there is no such folder."""
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(FILES), local_files_only=True))
    except errors.LocalEntryNotFoundError:
        return None


def download(repo_id: str, revision: str | None = None) -> Path:
    """The folder in the cache with the files of a hub model or adapter. Files that are missing there are downloaded.

    Raises: AccessError if the hub cannot be reached or refuses, OutputError if the cache cannot be written, CheckpointError
        if the repository holds nothing that can be loaded.
    """
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    cached = find_cached(repo_id, revision)
    if cached is not None and (constants.HF_HUB_OFFLINE or is_complete(cached)):
        return cached
    try:
        # One request with a timeout comes first: without a network, huggingface_hub would try five times per file.
        info = HfApi().model_info(repo_id, revision=revision or "main", timeout=constants.HF_HUB_ETAG_TIMEOUT)
        names = [file.rfilename for file in info.siblings or ()]
        if names and not any(fnmatch(name, pattern) for name in names for pattern in FILES if pattern.endswith(".safetensors")):
            if INDEX_NAME not in names:
                raise CheckpointError(f"{repo_id} {explain_names(names)}", path=f"{constants.ENDPOINT}/{repo_id}")
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(FILES)))
        if shards := missing_shards(folder):  # shards whose names do not match the patterns in FILES
            snapshot_download(repo_id=repo_id, revision=revision, allow_patterns=shards)
        return folder
    except (OSError, errors.HTTPError, RuntimeError, *NOT_A_HUB) as error:  # the xet client raises RuntimeError
        if cached is not None and getattr(error, "response", None) is None:
            return cached  # there is no network, so the cached files are used; loading reports any file that is missing
        raise explain(error, repo_id, revision) from error


def explain(error: Exception, repo_id: str, revision: str | None) -> PaliGemmaError:
    """The error to raise instead of `error`. Its message says what happened and what to do."""
    from huggingface_hub import constants, errors

    page, cache = f"{constants.ENDPOINT}/{repo_id}", constants.HF_HUB_CACHE
    if getattr(error, "response", None) is not None:
        return AccessError(explain_refusal(error, repo_id, revision), path=page)
    if isinstance(error, errors.OfflineModeIsEnabled):
        text = f"{repo_id} is not, or not completely, in the cache {cache}, and HF_HUB_OFFLINE is set. Unset it to ask the hub."
        return AccessError(f"{text}{suggest_bundled()}", path=page)
    if isinstance(error, OSError) and error.errno in NOT_WRITABLE:
        text = f"the cache {cache} cannot be written: {error.strerror}. Free disk space, or set HF_HOME to another folder."
        return OutputError(text, path=cache)
    if isinstance(error, NOT_A_HUB):
        text = f"{constants.ENDPOINT} does not answer like a hub ({type(error).__name__}: {first_line(error)})."
        return AccessError(f"{text} Does the network ask you to log in, or is HF_ENDPOINT wrong?{suggest_bundled()}", path=page)
    text = f"{constants.ENDPOINT} cannot be reached ({first_line(error)}), and {repo_id} is not in the cache {cache}."
    return AccessError(f"{text} {suggest_folder(repo_id)}{suggest_bundled()}", path=page)


def explain_refusal(error: "HfHubHTTPError", repo_id: str, revision: str | None) -> str:
    """Says why the hub refused: because of the token, the licence, the name or the revision.

    The HTTP status alone is ambiguous, so the message of the server is used as well.
    """
    from huggingface_hub import constants, errors, get_token

    page, tokens = f"{constants.ENDPOINT}/{repo_id}", f"{constants.ENDPOINT}/settings/tokens"
    status = error.response.status_code
    message = error.response.headers.get("X-Error-Message") or first_line(error)
    is_gated = isinstance(error, errors.GatedRepoError)
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo_id} has no revision {revision!r}. {page}/tree/main lists the revisions."
    if status == 401 and get_token():
        return f"the hub does not accept the token: {message}. Create a new token at {tokens}, then set HF_TOKEN or {LOGIN}"
    if status == 401 and is_gated:
        text = f"{repo_id} has a licence that you must accept, and no token was sent."
        return f"{text} Accept the licence at {page}, then set HF_TOKEN or {LOGIN}"
    if status == 403 and re.search("fine-?grained", f"{message} {error}", re.IGNORECASE):
        return f"the token is fine-grained and may not read gated models. Allow it at {tokens}, or create a token of type read."
    if is_gated:
        return f"the owner of the token has not accepted the licence of {repo_id}. Accept it at {page}, then try again."
    if isinstance(error, errors.RepositoryNotFoundError):
        private = "" if get_token() else f" If it is private: set HF_TOKEN or {LOGIN}"
        return f"the hub has no model {repo_id}. {suggest_folder(repo_id)} Check the spelling.{private}"
    return f"the hub answered {status} for {repo_id}: {message}. Try again later, or see {page}."


def suggest_folder(name: str) -> str:
    """A hint for users who meant a folder, not a hub id."""
    similar = similar_folders(Path(name))
    if name == "paligemma/bundled":
        similar = [str(BUNDLED)]
    return f"Did you mean the folder {similar[0]}?" if similar else "There is no folder of that name either."


def suggest_bundled() -> str:
    """A hint that names the path of the bundled model, which needs no network."""
    return f" Without a network, use {BUNDLED}, which comes with this code."


def first_line(error: Exception) -> str:
    """The message of an exception without the lines of advice that follow it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def resolve(path_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint. A hub id ("google/paligemma-3b-mix-224") is looked up in the cache, and downloaded if missing.

    Args:
        revision: branch, tag or commit of a hub id, such as "bfloat16"; not allowed for a folder.
    Raises:
        CheckpointError: the name is empty, or neither a folder nor a hub id. The message says what the name refers to instead,
            such as a file or the address of a page.
        UsageError: a revision is given for a folder.
        AccessError, OutputError: as `download`.
    """
    name = str(path_or_hub_id)
    if not name:
        raise CheckpointError(f"the name of the model is empty. Give a folder, or a hub id such as {EXAMPLE}.")
    path = expand(name)
    if is_folder(path):
        if revision is not None:
            raise UsageError(f"revision {revision} is allowed only for a hub id, but {path} is a folder. Leave out the revision.")
        if stat_path(path / CONFIG_NAME) is None and not has_adapter(path) and not has_weights(path):
            raise CheckpointError(explain_no_weights(path), path=path)
        return path
    if stat_path(path) is not None:
        raise CheckpointError(explain_file(path), path=path)
    page = PAGE.fullmatch(name)
    if page is not None and is_id(page[1]):
        raise CheckpointError(f"{name} is the address of a page. Give the model's id, {page[1]}.", path=name)
    if "://" in name:
        raise CheckpointError(f"{name} is an address. Give a folder, or an id of the hub such as {EXAMPLE}.", path=name)
    if is_id(name):
        return download(name, revision)
    similar = similar_folders(path)
    similar += [f"google/{name}"] if re.fullmatch(r"paligemma2?-[\w-]+", name) else []
    in_cache = cached_id(name)
    similar += [in_cache] if in_cache != name and is_id(in_cache) else []
    hint = f"Did you mean {listed(similar)}?" if similar else f"Give a folder, or an id of the hub such as {EXAMPLE}."
    raise CheckpointError(f"there is no folder {path}. {hint}", path=path)


def find_base(folder: Path, adapter_config: dict | None, base_model: str | Path | None = None) -> Path:
    """The folder with config.json, tokenizer and weights: the base model's if `folder` holds only an adapter, else `folder`.

    Args:
        adapter_config: content of the folder's adapter_config.json, None if there is none.
        base_model: folder or hub id of an adapter's base, in place of the one that adapter_config.json names.
    Raises:
        CheckpointError: the adapter names no base, or its base has an adapter itself.
        UsageError: base_model is given, but `folder` itself has weights.
        The errors of `resolve`.
    """
    if adapter_config is None or has_weights(folder):
        if base_model is not None:
            text = f"base_model {base_model} is allowed only for an adapter, but {folder} is a whole model."
            raise UsageError(f"{text} Leave out base_model.")
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
            text = f"{file} names the base model {name!r:.200}, but {error.message} To use another base model, give --base_model."
            raise type(error)(text, path=file) from error
    if has_adapter(base):
        raise CheckpointError(f"{base}, the base model of {folder}, has an adapter itself. Merge that adapter first.", path=file)
    return base
