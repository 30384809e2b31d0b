"""Reads the bytes of a picture from a path, an http(s) or file: address, a data: URI or an open file, without decoding them.

Checked in tests/pictures/test_images.py.
"""

import base64
import os
import re
import urllib.parse
from contextlib import suppress
from pathlib import Path
from typing import IO

from paligemma.errors import AccessError, ImageError, one_line
from paligemma.files import expand_text, names_in, printable_path, read_regular, similar_names, split_file_address, stat_path
from paligemma.pictures.decoding import describe, sniff

MAX_FILE_BYTES = 256 << 20
MAX_DATA_BYTES = 32 << 20  # in a data: URI


def read_file(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a regular file. Raises: ImageError if there is none, or it is too large."""
    if stat_path(path, ImageError) is None:
        raise ImageError(explain_missing(Path(os.fsdecode(path))), path=printable_path(path))
    return read_regular(path, MAX_FILE_BYTES, ImageError, "Name another file.")


def explain_missing(path: Path) -> str:
    """The message for a file that does not exist, with similar names in its folder."""
    name = printable_path(path)
    try:
        if path.is_symlink():
            return f"{name} is a link to a file that does not exist. Correct the link."
        if not os.path.isdir(path.parent):
            return f"{name} does not exist, nor does the folder {printable_path(path.parent)}. Check the path."
    except (OSError, ValueError):  # the name is too long, or a folder may not be searched
        return f"{name} does not exist. Check the path."
    close = similar_names(path.name, names_in(path.parent))
    advice = f"Did you mean {' or '.join(map(printable_path, close))}?" if close else "Check the path."
    return f"{name} does not exist. {advice}"


def read_data_uri(uri: str) -> bytes:
    """The bytes in a data: URI. Raises: ImageError, whose message never contains the data."""
    head, comma, body = uri.partition(",")
    if not comma:
        raise ImageError("a data: URI has no comma. It is written data:image/png;base64,iVBOR...", path="data:")
    if not body.isascii():
        raise ImageError("a data: URI holds characters beyond ASCII. Encode the file again, in base64.", path="data:")
    if len(body) > MAX_DATA_BYTES * 4 // 3 + 4:
        raise ImageError(f"a data: URI holds more than {MAX_DATA_BYTES >> 20} MB. Save it to a file.", path="data:")
    data = urllib.parse.unquote_to_bytes(body)
    if not head.lower().endswith(";base64"):
        return data
    data = bytes(data.translate(None, b" \t\r\n"))
    try:
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except ValueError as error:
        raise ImageError(f"a data: URI is not valid base64: {error}. Encode the file again.", path="data:") from error


def read_object(source: IO[bytes], name: str) -> bytes:
    """The bytes of an open file, from its beginning if the file can seek. Raises: ImageError."""
    try:
        with suppress(OSError, AttributeError):  # a pipe or an HTTP response cannot seek
            source.seek(0)
        parts, left = [], MAX_FILE_BYTES + 1
        while left > 0 and (part := source.read(left)) != b"":  # a pipe returns only what has arrived so far
            if not isinstance(part, bytes):
                raise ImageError(f'{name} gives {type(part).__name__}, not bytes. Open the file with mode "rb".', path=name)
            parts.append(part)
            left -= len(part)
    except (OSError, ValueError, TypeError) as error:  # ValueError: the file is closed; TypeError: read() takes no number
        raise ImageError(f"{name} cannot be read: {one_line(error).rstrip('.')}. Open it again.", path=name) from error
    if left <= 0:
        raise ImageError(f"{name} has over {MAX_FILE_BYTES >> 20} MB, which is the limit. Make the picture smaller.", path=name)
    return b"".join(parts)


def read_address(source: str, name: str, is_typed: bool) -> bytes:
    """The bytes at an http(s) address. Raises: AccessError, also if the response is not a picture."""
    from paligemma.pictures.fetch import fetch  # imports ssl and http.client, which a local picture does not need

    data, kind = fetch(source, may_be_private=is_typed)
    if sniff(data) is None and not kind.startswith("image/"):
        raise AccessError(f"{name} answered 200 OK with {one_line(kind) or 'no type'}: {describe(data)}.", path=name)
    return data


def as_path(source: str, is_typed: bool) -> str:
    """The path. A ~ is expanded if a user typed the path and no file has exactly this name."""
    try:
        return expand_text(source) if is_typed and source.startswith("~") and not os.path.lexists(source) else source
    except ValueError:  # the path holds a NUL
        return source


def read_bytes(source: object, is_typed: bool) -> tuple[bytes, str]:
    """The bytes of a picture file, and a name for it in messages.

    Args:
        source, is_typed: as in images.load_image.
    Raises: ImageError, AccessError.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source), "the picture"
    if not isinstance(source, str | os.PathLike):
        name = f"the {type(source).__name__}"
        return read_object(source, name), name
    if not isinstance(source, str):
        path = os.fspath(source)
        return read_file(as_path(path, is_typed) if isinstance(path, str) else path), printable_path(source)
    if source[:5].lower() == "data:":
        return read_data_uri(source), "data:"
    name = printable_path(source)
    scheme = re.match("([A-Za-z][A-Za-z0-9+.-]+)://", source)
    if not scheme:  # the pattern needs two letters, because a single letter before :// is a Windows drive
        return read_file(as_path(source, is_typed)), name
    kind = scheme[1].lower()
    if kind in ("http", "https"):
        return read_address(source, name, is_typed), name
    if kind != "file":
        raise ImageError(f"{name} begins with {kind}:. Give a path, or an address with http(s).", path=name)
    if not is_typed:
        raise ImageError(f"{name} comes from a data file, where file: is not allowed. Write the path instead.", path=name)
    host, path = split_file_address(source)
    if host:
        raise ImageError(f"{name} names the machine {one_line(host)}. Write file:///, then the path.", path=name)
    return read_file(path), name
