"""The bytes of a picture, sound or clip, from whatever names it.

Owns which spellings of a source there are (paths, `file://`, `data:`, bytes, `http(s)://` where the caller allows it),
their limits, and `MediaError`. Leaves decoding to the files beside it.
"""

import base64
import binascii
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

from ..errors import Gemma4Error

# Larger files are refused before they are read: no picture or half minute of sound is near it.
MAX_BYTES = 256 << 20
TIMEOUT = 30.0  # seconds of silence of a server
DEADLINE = 120.0  # seconds for a whole download

Bytes = bytes | bytearray | memoryview


class MediaError(Gemma4Error):
    """A picture, sound or clip that cannot be read; the message names it and says why."""


def read_source(
    source: str | os.PathLike[str] | Bytes, *, what: str, allow_urls: bool = False, max_bytes: int = MAX_BYTES
) -> tuple[bytes, str]:
    """The content, and what to call it in a message.

    source: a path (`~` is the home folder), a `file://` URL, a `data:` URL, bytes, or with `allow_urls` an `http(s)`
    URL. what: "picture" or the like, for messages.

    Raises MediaError, in one line, also for anything empty or larger than `max_bytes`.
    """
    if isinstance(source, Bytes):
        data, name = bytes(source), f"the {what}"
    else:
        text = os.fspath(source)
        scheme = urlsplit(text).scheme.lower() if isinstance(source, str) and ":" in text[:8] else ""
        if scheme == "data":
            data, name = _data_url(text, what), f"the {what}"
        elif scheme in ("http", "https"):
            if not allow_urls:
                raise MediaError(
                    f"{short_name(text)} is on the network, and fetching is not allowed; download it first"
                )
            data, name = _fetch(text, max_bytes), short_name(text)
        else:
            path = path_of_url(text) if scheme == "file" else Path(text).expanduser()
            data, name = _read(path, what, max_bytes), short_name(str(path))
    if not data:
        raise MediaError(f"{name} is empty (0 bytes); download or export it again")
    if len(data) > max_bytes:
        raise _too_large(name, len(data), max_bytes)
    return data, name


def name_of(source: object, otherwise: str) -> str:
    """What to call a source in a conversation: its file's name, else `otherwise`."""
    if not isinstance(source, str | os.PathLike):
        return otherwise
    text = str(os.fspath(source))
    if text[:5].lower() == "data:":
        return otherwise
    if "://" in text[:10]:
        text = os.fsdecode(unquote_to_bytes(urlsplit(text).path))
    return short_name(Path(text).name) or otherwise


def _read(path: Path, what: str, max_bytes: int) -> bytes:
    name = short_name(str(path))
    try:
        if path.is_dir():
            raise MediaError(f"{name} is a folder; give the file of the {what}")
        if not path.exists():
            raise MediaError(f"there is no file {name}")
        if not path.is_file():  # a pipe or a device would never end
            raise MediaError(f"{name} is no ordinary file; give the file of the {what}")
        if (size := path.stat().st_size) > max_bytes:
            raise _too_large(name, size, max_bytes)
        return path.read_bytes()
    except (OSError, ValueError) as e:  # ValueError: a zero byte in the name
        raise MediaError(f"{name} cannot be read ({getattr(e, 'strerror', None) or e})") from None


def path_of_url(url: str) -> Path:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise MediaError(f"{short_name(url)} names another machine; file:// URLs are for this one (file:///path)")
    return Path(os.fsdecode(unquote_to_bytes(parts.path)))


def _data_url(url: str, what: str) -> bytes:
    head, comma, body = url.partition(",")
    try:
        if not comma:
            raise ValueError("it has no comma")
        raw = unquote_to_bytes(body)
        return base64.b64decode(raw, validate=True) if head.lower().endswith(";base64") else raw
    except (ValueError, binascii.Error) as e:
        raise MediaError(f"the data: URL of the {what} is damaged ({e}); send it again") from None


def _fetch(url: str, max_bytes: int) -> bytes:
    from urllib.error import URLError
    from urllib.request import Request, urlopen

    name, stop, parts, total = short_name(url), time.monotonic() + DEADLINE, [], 0
    try:
        with urlopen(Request(url, headers={"User-Agent": "mlx-gemma4"}), timeout=TIMEOUT) as answer:
            read: Callable[[int], Any] = answer.read1
            while part := read(1 << 16):
                parts.append(part)
                total += len(part)
                if total > max_bytes:
                    raise _too_large(name, total, max_bytes)
                if time.monotonic() > stop:
                    raise MediaError(f"{name} took longer than {DEADLINE:.0f} s; download it first")
            if (promised := answer.headers.get("Content-Length")) and total < int(promised):
                raise MediaError(f"{name} ended after {total} of {promised} bytes; try again")
    except (URLError, OSError, ValueError) as e:
        raise MediaError(f"{name} cannot be fetched ({str(getattr(e, 'reason', '') or e).splitlines()[0]})") from None
    return b"".join(parts)


def _too_large(name: str, size: int, limit: int) -> MediaError:
    at_least = "more than " if size <= limit + (1 << 16) else ""
    return MediaError(f"{name} is {at_least}{size / 1e6:.0f} MB; at most {limit / 1e6:.0f} MB are read")


def short_name(text: str) -> str:
    """A name for one line: no control characters, and not the whole of an endless one."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= 200 else f"{text[:120]}...{text[-60:]}"
