"""Files dragged into a line, as the terminals in use write them. Most cases need no file: what exists is told."""

import os
import time
from pathlib import Path
from urllib.parse import quote

import pytest

from mlx_gemma4.cli.tui.attachments import (
    File,
    apart,
    arguments,
    completions,
    kind_of_file,
    split,
    starts_with_file,
)

SPACED, CAT, DOG = "/Users/me/My Pictures/a cat (1).png", "/tmp/cat.png", "/tmp/dog.jpg"
# macOS puts a narrow no-break space before AM.
SHOT = "/Users/me/Desktop/Screenshot 2026-11-21 at 9.41.00\u202fAM.png"
APOSTROPHE = "/home/me/it's mine.wav"
EXISTING = {
    SPACED: "image",
    CAT: "image",
    DOG: "image",
    SHOT: "image",
    APOSTROPHE: "audio",
    "/tmp/clip.mp4": "video",
    "/tmp/what?.png": "image",
    "/tmp/back\\slash.png": "image",
    "/tmp/café.png": "image",
    "/tmp/recording": "audio",
    "/cat.png": "image",
    "cat.png": "image",
    "my cat.png": "image",
    "./cat.png": "image",
    "../up/cat.png": "image",
    os.path.expanduser("~/cat.png"): "image",
}


def typed(line: str) -> tuple[str, list[str]]:
    found = split(line, EXISTING.get)
    assert all(file.kind == EXISTING[file.path] for file in found.files)
    return found.text, [file.path for file in found.files]


@pytest.mark.parametrize(
    ("terminal", "line", "path"),
    [
        ("macOS Terminal, iTerm2", r"/Users/me/My\ Pictures/a\ cat\ \(1\).png ", SPACED),
        ("macOS Terminal with Shift", "/Users/me/My Pictures/a cat (1).png ", SPACED),
        ("GNOME Terminal", "'/Users/me/My Pictures/a cat (1).png' ", SPACED),
        ("Windows Terminal", '"/Users/me/My Pictures/a cat (1).png"', SPACED),
        ("a file manager's clipboard", "file:///Users/me/My%20Pictures/a%20cat%20(1).png\n", SPACED),
        ("with the machine's name", "file://localhost/tmp/cat.png", CAT),
        ("a screenshot, escaped", SHOT.replace(" ", "\\ "), SHOT),
        ("a screenshot, quoted", f"'{SHOT}'", SHOT),
        ("a screenshot as it is", SHOT, SHOT),
        ("an apostrophe, escaped", r"/home/me/it\'s\ mine.wav", APOSTROPHE),
        ("an apostrophe in single quotes", r"'/home/me/it'\''s mine.wav'", APOSTROPHE),
        ("an apostrophe in double quotes", '"/home/me/it\'s mine.wav"', APOSTROPHE),
        ("an apostrophe as it is", APOSTROPHE, APOSTROPHE),
        ("other letters", "/tmp/café.png", "/tmp/café.png"),
        ("other letters in a URL", "file://" + quote("/tmp/café.png"), "/tmp/café.png"),
        ("a question mark of the file", "'/tmp/what?.png'", "/tmp/what?.png"),
        ("a backslash of the file", "/tmp/back\\slash.png", "/tmp/back\\slash.png"),
        ("the home folder", "~/cat.png", "~/cat.png"),
        ("from here", "./cat.png", "./cat.png"),
        ("from above", "../up/cat.png", "../up/cat.png"),
        ("a name alone", "cat.png", "cat.png"),
        ("a quoted name alone", "'my cat.png'", "my cat.png"),
        ("blanks around", "   /tmp/cat.png  ", CAT),
        ("no suffix", "/tmp/recording", "/tmp/recording"),
        ("in the topmost folder", "/cat.png", "/cat.png"),
    ],
)
def test_a_path_alone(terminal: str, line: str, path: str):
    assert typed(line) == ("", [os.path.expanduser(path)]), terminal


@pytest.mark.parametrize(
    ("line", "text", "paths"),
    [
        ("what is this? /tmp/cat.png", "what is this?", [CAT]),
        ("what is this /tmp/cat.png ", "what is this", [CAT]),
        ("/tmp/cat.png what is this?", "what is this?", [CAT]),
        ("/tmp/cat.png, what is this?", "what is this?", [CAT]),
        ("/tmp/cat.png: what is this?", "what is this?", [CAT]),
        (r"/Users/me/My\ Pictures/a\ cat\ \(1\).png how many?", "how many?", [SPACED]),
        ("'/Users/me/My Pictures/a cat (1).png' how many?", "how many?", [SPACED]),
        ("how many? /Users/me/My Pictures/a cat (1).png", "how many?", [SPACED]),
        ("/Users/me/My Pictures/a cat (1).png how many?", "how many?", [SPACED]),
        ("what's in '/tmp/cat.png'", "what's in", [CAT]),
        ('it\'s "/tmp/cat.png"', "it's", [CAT]),
        ("/tmp/cat.png /tmp/dog.jpg", "", [CAT, DOG]),
        ("/tmp/cat.png\n/tmp/dog.jpg\n", "", [CAT, DOG]),
        ("'/tmp/cat.png''/tmp/dog.jpg'", "", [CAT, DOG]),
        ("'/tmp/cat.png''/tmp/dog.jpg'which is older?", "which is older?", [CAT, DOG]),
        ("'/tmp/cat.png'what is this?", "what is this?", [CAT]),
        ('what is "/tmp/cat.png"?', "what is cat.png?", [CAT]),
        ("file:///tmp/cat.png\r\nfile:///tmp/dog.jpg\r\n", "", [CAT, DOG]),
        ("/tmp/dog.jpg '/tmp/cat.png' which is older?", "which is older?", [DOG, CAT]),
        ("which is older? /tmp/dog.jpg /tmp/cat.png", "which is older?", [DOG, CAT]),
        ("first line\nsecond line /tmp/cat.png", "first line\nsecond line", [CAT]),
        (f"{APOSTROPHE} /tmp/clip.mp4 same voice?", "same voice?", [APOSTROPHE, "/tmp/clip.mp4"]),
        # Between words the name stays, so that there still is a sentence.
        ("what is in /tmp/cat.png?", "what is in cat.png?", [CAT]),
        ("is /tmp/cat.png older than /tmp/dog.jpg", "is cat.png older than dog.jpg", [CAT, DOG]),
        ("compare /tmp/cat.png with '/tmp/dog.jpg'.", "compare cat.png with dog.jpg.", [CAT, DOG]),
        ("(see /tmp/cat.png) ok?", "(see cat.png) ok?", [CAT]),
    ],
)
def test_a_path_beside_text(line: str, text: str, paths: list[str]):
    assert typed(line) == (text, paths)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "   ",
        "and/or, w/o, 1/2, n/a",
        "/usr/bin/env is what?",
        "/etc/passwd",
        "/tmp/other.png what is it?",
        "what is cat.png about?",
        "rename 'cat.png' for me",
        "https://example.org/tmp/cat.png",
        "file://elsewhere/tmp/cat.png",
        "file://[broken/tmp/cat.png",
        "open('/tmp/cat.png')",
        "x=/tmp/cat.png",
        "see~/cat.png",
        "don't stop",
        "'unclosed /nothing",
        "/tmp/cat.pngx",
        "/tmp",
        "\\",
        "'",
        '"',
        "~",
        "/",
        "file:",
        " / ",
        "a\x00b /tmp/\x00.png",
    ],
)
def test_text_stays_text(line: str):
    assert typed(line) == (line, [])


def test_existing_files_of_other_kinds_are_text(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "empty").write_bytes(b"")
    for name in ("notes.txt", "folder.png", "empty", "missing.png"):
        assert split(f"{tmp_path}/{name} what?").files == ()


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"\x89PNG\r\n\x1a\n", "image"),
        (b"\xff\xd8\xff\xe0", "image"),
        (b"GIF89a", "image"),
        (b"RIFF\x00\x00\x00\x00WEBPVP8 ", "image"),
        (b"BM\x36\x00\x00\x00\x00\x00\x00\x00", "image"),
        (b"II*\x00", "image"),
        (b"\x00\x00\x00\x18ftypheic", "image"),
        (b"\x00\x00\x00\x18ftypavif", "image"),
        (b"RIFF\n\x00\x00\x00WAVEfmt ", "audio"),
        (b"FORM\x00\x00\x00\x00AIFF", "audio"),
        (b"fLaC", "audio"),
        (b"ID3\x04", "audio"),
        (b"\xff\xfb\x90", "audio"),
        (b"OggS", "audio"),
        (b"\x00\x00\x00\x18ftypM4A ", "audio"),
        (b"\x00\x00\x00\x18ftypisom", "video"),
        (b"\x00\x00\x00\x18ftypqt  ", "video"),
        (b"\x1aE\xdf\xa3", "video"),
        (b"RIFF\x00\x00\x00\x00AVI LIST", "video"),
        (b"hello", None),
        (b"BMW is a car maker", None),
        (b"\xff\xfeh\x00", None),
    ],
)
def test_kinds_by_first_bytes(tmp_path: Path, head: bytes, kind: str | None):
    (tmp_path / "unnamed").write_bytes(head)
    assert kind_of_file(str(tmp_path / "unnamed")) == kind


def test_kinds_by_suffix(tmp_path: Path):
    for name, kind in (("a.PNG", "image"), ("b.m4a", "audio"), ("c.MOV", "video")):
        (tmp_path / name).write_bytes(b"")
        assert kind_of_file(str(tmp_path / name)) == kind
        assert split(str(tmp_path / name)).files == (File(kind, str(tmp_path / name)),)
    assert kind_of_file(f"/{'x' * 5000}.png") is None
    (tmp_path / "no").write_bytes(b"GIF89a")
    (tmp_path / "no").chmod(0)
    assert kind_of_file(str(tmp_path / "no")) is None or os.geteuid() == 0


def test_what_is_pasted_gets_blanks_around():
    assert apart(CAT, "what is this?", EXISTING.get) == f" {CAT} "
    assert apart(f"'{CAT}' ", "what is this? ", EXISTING.get) == f"'{CAT}' "
    assert apart(f"{CAT}\n{DOG}", "", EXISTING.get) == f"{CAT}\n{DOG} "
    for text in ("some text", "/tmp/none.png", f"see {CAT}", "", " "):
        assert apart(text, "before", EXISTING.get) == text


def test_a_command_is_told_from_a_path():
    for line in ("/cat.png", "/cat.png what?", r"/Users/me/My\ Pictures/a\ cat\ \(1\).png", SPACED):
        assert starts_with_file(line, EXISTING.get), line
    for line in ("/help", "/image /tmp/cat.png", "/set top_k 3", "cat.png", "", "/"):
        assert not starts_with_file(line, EXISTING.get), line


def test_a_long_pasted_text_costs_no_time():
    text = "word /and/or ~/x ./y 'z " * 8000
    started = time.perf_counter()
    assert split(text, EXISTING.get).files == ()
    assert time.perf_counter() - started < 5


def test_paths_after_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("my cat.png", "cat.png", "dog.png", "it's.png"):
        Path(name).touch()
    assert arguments("cat.png") == ["cat.png"]
    assert arguments("my cat.png") == ["my cat.png"]
    assert arguments(r"my\ cat.png ") == ["my cat.png"]
    assert arguments("'my cat.png'") == ["my cat.png"]
    assert arguments('"my cat.png" dog.png') == ["my cat.png", "dog.png"]
    assert arguments("cat.png dog.png") == ["cat.png", "dog.png"]
    assert arguments("it's.png") == ["it's.png"]
    assert arguments("no such.png") == ["no such.png"], "named whole in the error"
    assert arguments("~/x.png") == [os.path.expanduser("~/x.png")]
    assert arguments("file:///a%20b.png") == ["/a b.png"]
    assert arguments("https://example.org/a.png") == ["https://example.org/a.png"]
    assert arguments("  ") == []


def test_paths_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my pics").mkdir()
    for name in ("my pics/a b.png", "my cat.png", "mine.wav", "notes.txt", ".hidden.png"):
        Path(name).touch()
    assert completions("m", "image") == ["my\\ cat.png", "my\\ pics/"]
    assert completions("m", "audio") == ["mine.wav", "my\\ pics/"]
    assert completions("my\\ pics/", "image") == ["my\\ pics/a\\ b.png"]
    assert completions("", "image") == ["my\\ cat.png", "my\\ pics/"]
    assert completions("x.png my\\ c", "image") == ["x.png my\\ cat.png"]
    assert completions("x.png ", "audio") == ["x.png mine.wav", "x.png my\\ pics/"]
    assert completions(".h", "image") == [".hidden.png"]
    assert completions("no/such/", "image") == []
