"""Names of pictures as users write them: which arguments name pictures, and how a list of names is split at commas.

Checked in tests/pictures/test_names.py.
"""

import os
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

from paligemma import files
from paligemma.errors import UsageError

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".mpo")
DRAWABLE = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")  # formats in which a drawing can be saved
MAX_NAME = 255  # the largest number of characters between two slashes that Linux, macOS and Windows allow


def is_address(name: str) -> bool:
    return name[:8].lower().startswith(("data:", "http://", "https://", "file://"))


def file_of(name: str) -> Path | None:
    """The file that a picture is read from; None if it is not read from a file of this machine."""
    if name == "-":
        return Path("/dev/stdin")
    if name[:7].lower() == "file://":
        return files.split_file_address(name)[1]
    return None if is_address(name) else files.expand(name)


def looks_like_picture(word: str) -> bool:
    """Whether an argument names a picture: an address, "-", an existing path, or a name with a picture's suffix."""
    exists = os.path.exists(files.expand_text(word.partition(",")[0])) or os.path.exists(files.expand_text(word))
    return word == "-" or is_address(word) or exists or word.lower().endswith(PICTURE_SUFFIXES)


def split_pictures(text: str) -> list[str]:
    """The names between the commas. A comma in the name of an existing file, in an address or in a data: URI does not count.

    Raises: UsageError.
    """
    parts = text.split(",")
    names: list[str] = []
    listed: dict[str, list[str] | None] = {}
    start = 0
    while start < len(parts):
        if parts[start].startswith("data:"):
            end = start + 2
        elif is_address(parts[start]):
            # An address ends before the next address, "-" or existing file.
            following = range(start + 1, len(parts))
            end = next((i for i in following if ":" in parts[i] or parts[i] == "-" or os.path.exists(parts[i])), len(parts))
        else:
            end = start + count_name_parts(parts[start : start + MAX_NAME], listed)
        names.append(",".join(parts[start:end]))
        start = end
    if "" in names:
        raise UsageError(f"{text!r} has a comma with no picture before or after it. Remove the comma.")
    if names.count("-") > 1:
        raise UsageError(f"{text!r} names stdin twice, which can be read only once. Give - once.")
    return names


def count_name_parts(parts: Sequence[str], listed: dict[str, list[str] | None]) -> int:
    """The largest n such that the first n parts, joined by commas, are the name of an existing file; 1 if there is no such n.

    Args:
        listed: a cache for has_longer_name.
    """
    name, found = parts[0], 1
    for count, part in enumerate(parts, 1):
        name += f",{part}" if count > 1 else ""
        folder, slash, last = files.expand_text(name).rpartition("/")
        if len(last) > MAX_NAME or ("/" in part and not os.path.isdir(folder + slash)):
            break  # no name that begins with this name can exist
        found = count if os.path.exists(folder + slash + last) else found
        if not has_longer_name(folder + slash, last, listed):
            break
    return found


def has_longer_name(folder: str, start: str, listed: dict[str, list[str] | None]) -> bool:
    """Whether a name in the folder begins with `start` and a comma. True if the folder cannot be listed.

    Args:
        listed: a cache: folder -> its names that contain a comma; None if the folder cannot be listed.
    """
    if folder not in listed:
        try:
            listed[folder] = sorted(files.name_key(name) for name in os.listdir(folder or ".") if "," in name)
        except (OSError, ValueError):
            listed[folder] = None
    names, start = listed[folder], files.name_key(f"{start},")
    if names is None:
        return True
    index = bisect_left(names, start)
    return index < len(names) and names[index].startswith(start)
