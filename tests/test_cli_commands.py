"""Slash commands, on a conversation without a model."""

from pathlib import Path

import pytest
from fake_chat import FakeChat

from mlx_gemma4.cli.tui import commands
from mlx_gemma4.cli.tui.pending import Pending, attached
from mlx_gemma4.cli.tui.toolbox import Toolbox, from_file
from mlx_gemma4.errors import UsageError
from mlx_gemma4.kernels import backend
from mlx_gemma4.media.sources import MediaError


class Said:
    """A session that keeps what it was told to say."""

    def __init__(self):
        self.chat = FakeChat()
        self.title = ["a fake model", "cache: none"]
        self.pending = Pending()
        self.toolbox = Toolbox()
        self.file: str | None = None
        self.next_line = ""
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def load(self, path: str) -> None:
        self.chat = FakeChat.load(path)

    def attach(self, kind: str, source: str) -> None:
        self.lines += attached(self.pending.add(self.chat.senses, kind, source))  # type: ignore[arg-type]

    def run(self, line: str) -> bool:
        self.lines.clear()
        return commands.run(self, line)  # type: ignore[arg-type]


@pytest.fixture
def session() -> Said:
    return Said()


def test_what_is_a_command():
    assert commands.is_command("/help")
    assert commands.is_command("/set top_k 3")
    for line in ("", "  ", "hello", " /help", "/usr/bin/env is what?", "what is /help"):
        assert not commands.is_command(line), line


@pytest.mark.parametrize("line", ["/exit", "/bye", "/quit"])
def test_ways_out(session: Said, line: str):
    assert session.run(line) is True


def test_help_names_every_command(session: Said):
    for line in ("/help", "/?"):
        assert session.run(line) is False
        for command in commands.COMMANDS:
            assert any(command.usage in said for said in session.lines)
        assert all(len(said) < 80 for said in session.lines), "fits a plain terminal"


@pytest.mark.parametrize(
    ("line", "hint"),
    [("/stat", "/stats"), ("/systm x", "/system"), ("/hepl", "/help"), ("/xyzzy", "/help lists")],
)
def test_unknown_command_suggests(session: Said, line: str, hint: str):
    with pytest.raises(UsageError, match=hint):
        session.run(line)


def test_set_changes_one_value(session: Said):
    session.run("/set temperature 0.25")
    session.run("/set top-k 5")
    session.run("/set parameter seed 7")
    assert (session.chat.sampling.temperature, session.chat.sampling.top_k) == (0.25, 5)
    assert session.chat.sampling.seed == 7
    session.run("/set seed none")
    assert session.chat.sampling.seed is None
    session.run("/set")
    assert [line.split() for line in session.lines][:2] == [["temperature", "0.25"], ["top_p", "0.95"]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set tempratur 1", "did you mean temperature"),
        ("/set zzz 1", "there are temperature, top_p"),
        ("/set temperature hot", "takes a number, not 'hot'"),
        ("/set top_k 1.5", "takes a whole number, not '1.5'"),
        ("/set top_p 7", "between 0 and 1"),
        ("/set temperature none", "takes a number"),
        ("/set suppress_tokens 3", "no setting"),
        ("/set temperature", "a name and a value"),
        ("/think maybe", "/think takes off, on, low, medium, high or a number of tokens, not 'maybe'"),
        ("/think -5", "not '-5'"),
        ("/save", "/save takes a file"),
        ("/load", "/load takes a file"),
        ("/edit", "nothing was asked yet"),
        ("/model e2b", "gemma4 chat --model"),
        ("/image", "/image takes a file, for example /image ~/picture.png"),
        ("/audio  ", "/audio takes a file"),
        ("/audio speech.wav", "does not hear"),
        ("/drop", "nothing is attached"),
        ("/kv 3.3", "/kv takes 16, 4, 3.5, 3, 2.5 or 2, not 3.3"),
    ],
)
def test_bad_values_say_what_is_allowed(session: Said, line: str, message: str):
    before = session.chat.sampling
    with pytest.raises(UsageError, match=message):
        session.run(line)
    assert session.chat.sampling == before


def test_system_prompt(session: Said):
    session.run("/system")
    assert session.lines == ["no system prompt"]
    session.run('/system "Answer in verse."')
    assert session.chat.system == "Answer in verse."
    session.run("/system")
    assert "Answer in verse." in session.lines[0]
    session.run("/system off")
    assert session.chat.system is None


def test_clear_think_model_stats(session: Said):
    session.run("/stats")
    assert session.lines == ["no turn yet"]
    list(session.chat.stream("hello"))
    session.run("/stats")
    text = "\n".join(session.lines)
    assert "1,200 tokens: 1,000 re-used, 200 computed" in text
    assert "12.3 MB (12,345,678 bytes)" in text and "4 x ring: 10 bytes" in text
    session.run("/clear")
    assert session.chat.messages == []
    session.run("/think on")
    assert session.chat.thinking is True
    session.run("/think off")
    assert session.chat.thinking is False
    session.run("/think low")
    assert session.lines == ["thinking is low, at most 256 tokens"]
    session.run("/think 300")
    assert session.chat.thinking == 300
    assert session.lines == ["thinking is on, at most 300 tokens"]
    session.run("/model")
    assert session.lines == session.title


def test_kv_shows_and_changes_what_the_cache_keeps(session: Said, monkeypatch):
    monkeypatch.setattr(backend, "_ran", {"merge_partials": "metal", "turboquant_attention": "reference"})
    session.run("/kv")
    assert session.lines == [
        "  4 x ring: 10 bytes",
        "  1 x global: 20 bytes",
        "  merge partials: metal",
        "  turboquant attention: reference",
    ]
    session.run("/kv 3.5")
    assert session.chat.kv == {"kv_bits": 3.5}
    assert session.lines[0] == "3.5 bits from the next turn on, which reads the conversation again"
    assert session.lines[1:3] == ["  4 x ring: 10 bytes", "  1 x global: 20 bytes"]


def test_what_is_attached(session: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("my cat.png", "dog.png", "broken.png", "clip.mp4"):
        (tmp_path / name).touch()
    session.run("/attachments")
    assert session.lines == ["nothing is attached"]
    session.run("/image 'my cat.png' dog.png")
    assert session.lines == ["attached: my cat.png, 256 tokens", "attached: dog.png, 256 tokens"]
    session.run("/video clip.mp4")
    assert session.lines == ["attached: clip.mp4, 12 frames, 840 tokens", "  clip.mp4 is sampled sparser"]
    for line in ("/image broken.png", "/image none.png"):
        with pytest.raises(MediaError):
            session.run(line)
    session.run("/attachments")
    assert session.lines[:2] == ["  1  my cat.png, 256 tokens", "  2  dog.png, 256 tokens"]
    parts = session.pending.message("well?")
    assert [part["type"] for part in parts] == ["image", "image", "video", "text"]  # type: ignore[index]
    for number in ("0", "4", "x"):
        with pytest.raises(UsageError, match="a number from 1 to 3"):
            session.run(f"/drop {number}")
    session.run("/drop 2")
    assert session.lines == ["taken away: dog.png, 256 tokens"]
    session.run("/drop")
    assert len(session.lines) == 2 and session.pending.message("well?") == "well?"
    session.run("/image dog.png")
    session.run("/clear")
    assert session.pending.items == []


def test_tools_are_listed(session: Said):
    session.run("/tools")
    assert session.lines == ["no tools; start with gemma4 chat --tools FILE or --mcp COMMAND"]
    session.toolbox = Toolbox(from_file(str(Path(__file__).parent / "fixtures" / "tools_example.py")))
    session.toolbox.allowed.add("nap")
    session.run("/tools")
    assert session.lines[0] == "  weather(city, days?, unit?): The forecast."
    assert session.lines[1] == "  nap() (runs without asking): Sleeps."


def test_save_and_load(session: Said, tmp_path: Path):
    list(session.chat.stream("hello"))
    session.run(f"/save {tmp_path}/a talk")
    file = tmp_path / "a talk.safetensors"
    assert session.file == str(file) and f"gemma4 chat --resume '{file}' goes on" in session.lines[0]
    list(session.chat.stream("more"))
    session.run("/save")  # to the same file
    (tmp_path / "other.safetensors").touch()
    with pytest.raises(UsageError, match="is there already"):
        session.run(f"/save {tmp_path}/other")
    session.run("/clear")
    session.run(f'/load "{file}"')
    assert [m["content"] for m in session.chat.messages if m["role"] == "user"] == ["hello", "more"]


def test_edit_takes_back_questions(session: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dog.png").touch()
    for text in ("one", "two", "weather"):
        list(session.chat.stream(text))
    session.run("/edit")
    assert session.next_line == "weather" and len(session.chat.messages) == 4
    with pytest.raises(UsageError, match="from 1 to 2, not '3'"):
        session.run("/edit 3")
    session.run("/undo 2")
    assert session.next_line == "one" and session.chat.messages == []
    session.run("/image dog.png")
    list(session.chat.stream(session.pending.message("what is it?")))
    session.run("/edit")
    assert session.next_line == "what is it?" and [item.name for item in session.pending.items] == ["dog.png"]


def test_paths_complete_after_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my cat.png").touch()
    (tmp_path / "clip.mp4").touch()
    assert commands.completions("/image ") == ["/image my\\ cat.png"]
    assert commands.completions("/video c") == ["/video clip.mp4"]
    assert commands.completions("/im") == ["/image"]


def test_completion():
    assert commands.completions("/kv 3") == ["/kv 3.5", "/kv 3"]
    assert commands.completions("/s") == ["/system", "/set", "/save", "/stats"]
    assert commands.completions("/set te") == ["/set temperature"]
    assert "/set min_p" in commands.completions("/set ")
    assert commands.completions("/think o") == ["/think on", "/think off"]
    assert "/think low" in commands.completions("/think ")
    assert commands.completions("hello /s") == []
    assert commands.completions("") == []
