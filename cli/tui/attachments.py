"""Files in a typed line: what a terminal pastes when a picture, sound or clip is dragged into it.

Owns how terminals write paths (backslashes, single and double quotes, `file://`, `~`, nothing at all), which files
count as media, and what remains of the text. Leaves reading the files to `mlx_gemma4.media`.

    split("what is this? /Users/me/My\\ cat.png ")   text "what is this?", one picture

A path counts where a word may begin, if it is absolute or starts with `~/`, `./` or `../`, or if the line holds
nothing but paths, and only if it names an existing file of a kind that is read. Everything else is text, slashes or
not.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit

_SUFFIXES = {
    "image": "png jpg jpeg jpe webp gif bmp tif tiff heic heif avif jp2 ico ppm tga",
    "audio": "wav flac mp3 ogg oga opus m4a aac aif aiff caf",
    "video": "mp4 m4v mov webm mkv avi mpg mpeg 3gp ogv",
}
KINDS = tuple(_SUFFIXES)
_KIND_OF_SUFFIX = {f".{suffix}": kind for kind, suffixes in _SUFFIXES.items() for suffix in suffixes.split()}

# First bytes, for files without a known suffix; a dot stands for any byte. The general form of a kind comes last.
_SIGNATURES = (
    ("image", rb"\x89PNG|\xff\xd8\xff|GIF8|II\*\0|MM\0\*|BM.{4}\0{4}|RIFF.{4}WEBP|.{4}ftyp(?:hei|hev|mif1|msf1|avif)"),
    ("audio", rb"RIFF.{4}WAVE|FORM.{4}AIF|fLaC|ID3|caff|.{4}ftypM4[AB]|\xff[\xe2\xe3\xf2\xf3\xfa\xfb]|OggS"),
    ("video", rb".{4}ftyp|\x1a\x45\xdf\xa3|RIFF.{4}AVI |\0\0\x01\xba"),
)

# Not str.isspace: macOS puts a narrow no-break space into the names of screenshots.
_SPACE = " \t\r\n"
_ROOTED = ("/", "~/", "./", "../", "file:")
_AFTER_A_PATH = ".,;:!?)]}>\"'"
_LONGEST_PATH = 1024  # characters; what macOS allows
_SUFFIX_ENDS = re.compile(
    rf"(?:{'|'.join(map(re.escape, _KIND_OF_SUFFIX))})(?=[{re.escape(_SPACE + _AFTER_A_PATH)}]|$)", re.IGNORECASE
)

KindOf = Callable[[str], str | None]


@dataclass(frozen=True)
class File:
    """An existing file; `kind` is "image", "audio" or "video"."""

    kind: str
    path: str

    @property
    def name(self) -> str:
        return os.path.basename(self.path)


@dataclass(frozen=True)
class Typed:
    """What was typed: the files in it, in their order, and the rest."""

    text: str
    files: tuple[File, ...] = ()


def kind_of_file(path: str) -> str | None:
    """ "image", "audio" or "video" for an existing ordinary file, by suffix or else by its first bytes; else None."""
    try:
        if not Path(path).is_file():
            return None
        if kind := _KIND_OF_SUFFIX.get(Path(path).suffix.lower()):
            return kind
        with open(path, "rb") as file:
            head = file.read(64)
    except (OSError, ValueError):  # a name too long, a zero byte in it, no permission
        return None
    return next((kind for kind, pattern in _SIGNATURES if re.match(pattern, head, re.DOTALL)), None)


def split(line: str, kind_of: KindOf = kind_of_file) -> Typed:
    """The files named in a line, and its text without them.

    A path between words leaves its file's name behind, so that "is /tmp/a.png older than /tmp/b.png?" remains a
    question; one before or after the text leaves nothing.
    """
    pieces = _nothing_but_files(line, kind_of) or _pieces(line, kind_of)
    files = tuple(piece for piece in pieces if isinstance(piece, File))
    if not files:
        return Typed(line)
    words = [i for i, piece in enumerate(pieces) if isinstance(piece, str) and piece.strip(_SPACE)]
    if not words:
        return Typed("", files)
    middle = pieces[words[0] : words[-1] + 1]
    if any(isinstance(piece, File) for piece in middle):
        return Typed("".join(piece.name if isinstance(piece, File) else piece for piece in pieces).strip(_SPACE), files)
    text = str(middle[0])
    return Typed((text.lstrip(_SPACE + ",;:.") if words[0] else text).strip(_SPACE), files)


def apart(pasted: str, before: str, kind_of: KindOf = kind_of_file) -> str:
    """What is pasted behind the text `before`: with blanks around it where it is nothing but files."""
    found = split(pasted, kind_of)
    if not found.files or found.text:
        return pasted
    start = " " if before and before[-1] not in _SPACE else ""
    return start + pasted + ("" if pasted[-1] in _SPACE else " ")


def starts_with_file(line: str, kind_of: KindOf = kind_of_file) -> bool:
    """Whether a line begins with a path to a file, so that it is no command although it begins with a slash."""
    return line.startswith("/") and _file_at(line, 0, kind_of) is not None


def arguments(text: str) -> list[str]:
    """The paths after `/image`: one if the whole text names a file or nothing there does, else word by word.

    Not looked up: a path that is not there must reach the reader, who says so.
    """
    text = text.strip(_SPACE)
    if not text or os.path.exists(whole := plain(text)):
        return [whole] if text else []
    words, at = [], 0
    while at < len(text):
        if text[at] in _SPACE:
            at += 1
            continue
        value, at = _shell_word(text, at)
        words.append(plain(value))
    quoted = any(mark in text for mark in "\\'\"")
    return words if quoted or any(os.path.exists(word) for word in words) or "://" in text else [whole]


def completions(typed: str, kind: str) -> list[str]:
    """How the last path of `typed` may go on: folders, and files of this kind; blanks escaped.

    Each is the whole of `typed` with its last word completed.
    """
    word, start, at = "", 0, 0
    while at < len(typed):
        if typed[at] in _SPACE:
            at += 1
            word, start = "", at
        else:
            start = at
            word, at = _shell_word(typed, at)
    folder, slash, begun = word.rpartition("/")
    try:
        found = sorted(os.scandir(Path(folder + slash or ".").expanduser()), key=lambda entry: entry.name)
    except OSError:
        return []
    out = []
    for entry in found:
        if not entry.name.startswith(begun) or (entry.name.startswith(".") and not begun):
            continue
        is_folder = entry.is_dir()
        if is_folder or _KIND_OF_SUFFIX.get(Path(entry.name).suffix.lower()) == kind:
            name = re.sub(r"([ \t\\'\"])", r"\\\1", folder + slash + entry.name)
            out.append(typed[:start] + name + ("/" if is_folder else ""))
    return out


def _nothing_but_files(line: str, kind_of: KindOf) -> list[str | File]:
    """The files of a line that holds nothing else, bare names included; empty for any other line."""
    pieces: list[str | File] = []
    at = 0
    while at < len(line):
        if line[at] in _SPACE:
            at += 1
        elif found := _file_at(line, at, kind_of, rooted=False):
            pieces.append(found[0])
            at = found[1]
        else:
            return []
    return pieces


def _pieces(line: str, kind_of: KindOf) -> list[str | File]:
    """The line cut into text and files; with each file as it was written they are the line again."""
    pieces: list[str | File] = []
    text = at = 0
    while at < len(line):
        # Also right behind a file: some terminals put nothing between two.
        begins = at == 0 or line[at - 1] in _SPACE or (text == at and bool(pieces))
        if begins and line[at] not in _SPACE and (found := _file_at(line, at, kind_of)):
            pieces += [line[text:at], found[0]] if line[text:at] else [found[0]]
            text = at = found[1]
        else:
            at += 1
    return [*pieces, line[text:]] if line[text:] else pieces


def _file_at(line: str, at: int, kind_of: KindOf, *, rooted: bool = True) -> tuple[File, int] | None:
    """The file whose path begins here, and where the path ends. rooted: bare names do not count."""
    if rooted and not line.startswith(_ROOTED, at + (line[at] in "'\"")):
        return None
    for written, end in _candidates(line, at):
        path = plain(written)
        if kind := kind_of(path):
            return File(kind, path), end
    return None


def _candidates(line: str, at: int) -> Iterator[tuple[str, int]]:
    """What may be meant by a path that begins here, and where each ends, the likeliest first."""
    value, end = _shell_word(line, at)
    yield value, end
    stop = _word_end(line, at)
    yield line[at:stop], stop
    if line[at] in "'\"" and (close := _closing(line, at)):  # what follows was typed right behind it
        yield line[at + 1 : close], close + 1
    for shorter, cut in ((value, end), (line[at:stop], stop)):
        while len(shorter) > 1 and line[cut - 1] == shorter[-1] in _AFTER_A_PATH:
            shorter, cut = shorter[:-1], cut - 1
            yield shorter, cut
    # Pasted with its blanks as they are, as macOS does with Shift held: up to any later word with a suffix we know.
    for found in _SUFFIX_ENDS.finditer(line, stop, at + _LONGEST_PATH):
        if "\n" in line[stop : found.end()]:
            return
        yield line[at : found.end()], found.end()


def _word_end(line: str, at: int) -> int:
    while at < len(line) and line[at] not in _SPACE:
        at += 1
    return at


def _shell_word(line: str, at: int) -> tuple[str, int]:
    """One word as a shell reads it, and where it ends. A quote that nobody closes is an ordinary character."""
    out = []
    while at < len(line) and line[at] not in _SPACE:
        mark = line[at]
        if mark == "\\" and at + 1 < len(line):
            out.append(line[at + 1])
            at += 2
        elif mark in "'\"" and (close := _closing(line, at)):
            inside = line[at + 1 : close]
            out.append(re.sub(r'\\([\\"$`])', r"\1", inside) if mark == '"' else inside)
            at = close + 1
        else:
            out.append(mark)
            at += 1
    return "".join(out), at


def _closing(line: str, at: int) -> int:
    """Where the quote that opens at `at` is closed on the same line; 0 where it is not."""
    pattern = r"'[^'\n]*'" if line[at] == "'" else r'"(?:[^"\\\n]|\\.)*"'
    found = re.compile(pattern).match(line, at)
    return found.end() - 1 if found else 0


def plain(written: str) -> str:
    """A path without what a terminal may have put around it: `file://`, percent signs, `~`."""
    if written.startswith("file:"):
        try:
            parts = urlsplit(written)
        except ValueError:
            return written
        if parts.netloc in ("", "localhost"):
            return os.fsdecode(unquote_to_bytes(parts.path))
        return written
    return os.path.expanduser(written) if written.startswith("~") else written
