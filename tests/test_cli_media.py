"""Pictures and sound on the command line: options, commands, files dragged into the line, `gemma4 detect`."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_chat_media import TEMPLATES
from test_cli_app import Ran, gemma4, one_line  # noqa: F401
from test_cli_terminal import CTRL_C, CTRL_D, Terminal, start  # noqa: F401
from test_media_prompt import tone, wav
from tiny import make_tiny

from mlx_gemma4 import detect
from mlx_gemma4.chat import Chat

Run = Callable[..., Ran]
ROOT = Path(__file__).parents[1]


def tiny_folder(folder: Path, family: str, towers: bool = True, **overrides) -> str:
    make_tiny(folder, family, towers=towers, **overrides)
    template = ROOT / "tests" / "fixtures" / "chat_template" / f"chat_template.{TEMPLATES[family]}.jinja"
    shutil.copy(template, folder / "chat_template.jinja")
    return str(folder)


@pytest.fixture(scope="module")
def e2b(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_folder(tmp_path_factory.mktemp("e2b"), "e2b")


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_folder(tmp_path_factory.mktemp("moe"), "26b-a4b")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with files, and the process in it."""
    folder = tmp_path / "my files"
    folder.mkdir()
    monkeypatch.chdir(folder)
    Image.new("RGB", (300, 200), (200, 30, 40)).save("my cat.png")
    Image.new("RGB", (200, 300), (20, 130, 40)).save("dog.png")
    Path("speech.wav").write_bytes(wav(tone(0.5)))
    Path("long.wav").write_bytes(wav(tone(31)))
    Path("silent.wav").write_bytes(wav(np.zeros(16000, np.float32)))
    Path("empty.png").write_bytes(b"")
    Path("junk.png").write_bytes(b"no picture at all")
    Path("cut.png").write_bytes(Path("my cat.png").read_bytes()[:200])
    return folder


FEW = ("--max-tokens", "3", "--temperature", "0")


def record(ran: Ran) -> dict:
    assert ran.code == 0, ran.err
    return json.loads(ran.out)


def test_a_picture_is_part_of_the_prompt(gemma4: Run, here: Path, e2b: str):  # noqa: F811
    def tokens(*arguments: str) -> int:
        return record(gemma4("generate", "Hi", "-m", e2b, "--json", *FEW, *arguments))["prompt_tokens"]

    text = tokens()
    one = tokens("--image", "my cat.png")
    assert one == text + 60 + 2, "six by ten soft tokens and two marks"
    assert tokens("--image", "my cat.png", "--image", "dog.png") == text + 2 * (60 + 2)
    assert tokens("--image", "my cat.png", "--image-tokens", "140") > one
    assert tokens("--image", f"file://{here}/my%20cat.png".replace(" ", "%20")) == one
    sound = tokens("--audio", "speech.wav")
    assert text < sound < text + 20
    assert tokens("--audio", "speech.wav", "--image", "my cat.png") == one + sound - text


def test_generate_says_what_was_done_and_with_stats_what_it_costs(gemma4: Run, here: Path, e2b: str):  # noqa: F811
    ran = gemma4("generate", "Hi", "-m", e2b, "--image", "my cat.png", *FEW)
    assert (ran.code, ran.err) == (0, "")
    ran = gemma4("generate", "Hi", "-m", e2b, "--image", "my cat.png", "--stats", *FEW)
    assert ran.err.startswith("attached: my cat.png, 60 tokens\n")
    ran = gemma4("generate", "Hi", "-m", e2b, "--audio", "long.wav", *FEW)
    assert ran.code == 0 and ran.err.count("\n") == 1 and "2 windows" in ran.err, "never silently cut"


def test_chat_with_a_picture_answers_once(gemma4: Run, here: Path, e2b: str):  # noqa: F811
    ran = gemma4("chat", "Hi", "-m", e2b, "--image", "my cat.png", *FEW)
    assert ran.code == 0 and ran.out
    first, figures = ran.err.splitlines()
    assert first == "attached: my cat.png, 60 tokens" and "context" in figures
    piped = gemma4("chat", "-m", e2b, "--image", "my cat.png", *FEW, stdin=b"Hi\n")
    assert (piped.code, piped.out) == (0, ran.out)


def test_a_path_in_a_one_shot_prompt_is_text(gemma4: Run, here: Path, e2b: str):  # noqa: F811
    plain = gemma4("generate", f"{here}/dog.png", "-m", e2b, "--json", *FEW)
    assert record(plain)["prompt_tokens"] < 60 + len(str(here))
    assert gemma4("chat", f"{here}/dog.png", "-m", e2b, *FEW).err.count("attached") == 0


def test_text_alone_loads_no_towers(gemma4: Run, here: Path, e2b: str, monkeypatch):  # noqa: F811
    from mlx_gemma4 import loading

    asked = []
    load = loading.load
    monkeypatch.setattr(loading, "load", lambda *a, **o: asked.append(o["towers"]) or load(*a, **o))
    gemma4("generate", "Hi", "-m", e2b, *FEW)
    gemma4("chat", "Hi", "-m", e2b, *FEW)
    gemma4("chat", "Hi", "-m", e2b, "--image", "dog.png", *FEW)
    assert asked == [False, False, "lazy"]


@pytest.mark.parametrize("command", ["chat", "generate"])
@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--image", "none.png"], 1, "there is no file none.png"),
        (["--image", "empty.png"], 1, "empty.png is empty (0 bytes)"),
        (["--image", "junk.png"], 1, "junk.png is not a picture, or damaged"),
        (["--image", "cut.png"], 1, "cut.png is damaged or cut off"),
        (["--image", "speech.wav"], 1, "speech.wav is not a picture"),
        (["--image", "."], 1, "is a folder"),
        (["--audio", "silent.wav"], 1, "silent.wav is silent"),
        (["--audio", "dog.png"], 1, "dog.png is no sound file"),
        (["--video", "dog.png"], 1, "dog.png"),
        (["--video", "speech.wav"], 1, "speech.wav"),
        (["--image", "dog.png", "--image", "none.png"], 1, "there is no file none.png"),
        (["--image", "dog.png", "--image-tokens", "100"], 2, "takes 70, 140, 280, 560, 1120 or auto, not 100"),
        (["--image", "dog.png", "--image-tokens", "many"], 2, "1120 or auto, not many"),
        (["--video", "dog.png", "--video-tokens", "71"], 2, "--video-tokens takes 70, 140, 280, 560 or 1120, not 71"),
        (["--video", "dog.png", "--fps", "0"], 2, "--fps takes a number above 0, not 0"),
        (["--video", "dog.png", "--fps", "nan"], 2, "--fps takes a number above 0, not nan"),
        (["--video", "dog.png", "--max-frames", "0"], 2, "--max-frames takes 1 or more, not 0"),
        (["--image", "dog.png", "--image", "dog.png", "--context", "100"], 1, "the context holds 100"),
    ],
)
def test_bad_input_is_one_line(gemma4: Run, here: Path, e2b: str, command, arguments, code, says):  # noqa: F811
    ran = gemma4(command, "Hi", "-m", e2b, *FEW, *arguments)
    line = ran.err.splitlines()[-1]
    assert line.startswith("gemma4: error: ") and says in line
    assert (ran.code, ran.out) == (code, "")
    assert all(other.startswith("attached: ") for other in ran.err.splitlines()[:-1])


def test_models_without_eyes_or_ears_say_which_have_them(gemma4: Run, here: Path, moe: str, tmp_path):  # noqa: F811
    ran = gemma4("generate", "Hi", "-m", moe, "--audio", "speech.wav")
    assert ran.code == 2 and "does not hear: E2B and E4B do" in one_line(ran)
    text = str(make_tiny(tmp_path / "text", "31b"))
    for command in (("generate", "Hi", "--image", "dog.png"), ("detect", "dog.png", "cat", "--no-picture")):
        ran = gemma4(*command, "-m", text)
        assert ran.code == 2 and "does not see: all four" in one_line(ran)
    ran = gemma4("generate", "Hi", "--raw", "--image", "dog.png")
    assert ran.code == 2 and "--raw" in one_line(ran)


# gemma4 detect


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the model says, changed by the test."""
    said = ['[{"box_2d": [100, 200, 300, 400], "label": "cat"}]']
    monkeypatch.setattr(Chat, "send", lambda self, text, **options: said[0])
    return said


def test_detect_prints_pixels_and_draws_them(gemma4: Run, here: Path, moe: str, answers):  # noqa: F811
    before = Path("my cat.png").read_bytes()
    ran = gemma4("detect", "my cat.png", "cat", "-m", moe)
    assert ran.err == "" and ran.out.count("\n") == 1
    assert record(ran) == {
        "image": "my cat.png",
        "what": "cat",
        "width": 300,
        "height": 200,
        "boxes": [{"label": "cat", "x1": 60, "y1": 20, "x2": 120, "y2": 60}],
        "picture": "my cat-detected.png",
    }
    box = detect.Box("cat", 60, 20, 120, 60)
    with Image.open("my cat-detected.png") as drawn, Image.open("my cat.png") as picture:
        assert drawn.tobytes() == detect.draw(picture, [box]).tobytes() != picture.tobytes()
    assert gemma4("detect", "my cat.png", "cat", "-m", moe).code == 0, "its own older copy is written over"
    assert Path("my cat.png").read_bytes() == before
    answers[0] = "[]"
    assert record(gemma4("detect", "my cat.png", "dog", "-m", moe))["boxes"] == []


def test_detect_puts_the_copy_where_it_is_asked_to(gemma4: Run, here: Path, moe: str, answers):  # noqa: F811
    Path("out").mkdir()
    for out, made in (("x.jpg", "x.jpg"), ("out", "out/dog-detected.png"), ("out/y.webp", "out/y.webp")):
        assert record(gemma4("detect", "dog.png", "cat", "-m", moe, "--out", out))["picture"] == made
        with Image.open(made) as drawn:
            assert drawn.size == (200, 300)
    before = set(here.iterdir())
    assert record(gemma4("detect", "dog.png", "cat", "-m", moe, "--no-picture"))["picture"] is None
    assert set(here.iterdir()) == before
    url = f"file://{here}/dog.png".replace(" ", "%20")
    assert record(gemma4("detect", url, "cat", "-m", moe))["picture"] == "dog-detected.png"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["none.png", "cat"], 1, "there is no file none.png"),
        (["junk.png", "cat"], 1, "junk.png is not a picture"),
        (["dog.png", "  "], 2, "nothing to detect"),
        (["dog.png", "cat", "--out", "dog.png"], 2, "dog.png is the picture itself"),
        (["dog.png", "cat", "--out", "link-detected.png"], 2, "is the picture itself"),
        (["dog.png", "cat", "--out", "my cat.png"], 2, "my cat.png exists"),
        (["dog.png", "cat", "--out", "x.pdf"], 2, "--out takes a file that ends in .png"),
        (["dog.png", "cat", "--out", "no/x.png"], 2, "there is no folder no"),
        (["dog.png", "cat", "--out", "x.png", "--no-picture"], 2, "contradict each other"),
        (["dog.png", "cat", "--image-tokens", "7"], 2, "--image-tokens takes 70"),
    ],
)
def test_detect_refuses_before_it_loads(gemma4: Run, here: Path, monkeypatch, arguments, code, says):  # noqa: F811
    from mlx_gemma4.cli import loader

    monkeypatch.setattr(loader, "open_model", lambda *_, **__: pytest.fail("loaded"))
    Path("link-detected.png").symlink_to("dog.png")
    ran = gemma4("detect", *arguments)
    assert says in one_line(ran) and ran.code == code


def test_detect_shows_an_answer_without_boxes(gemma4: Run, here: Path, moe: str, answers):  # noqa: F811
    answers[0] = "I see\nno cat."
    ran = gemma4("detect", "dog.png", "cat", "-m", moe)
    assert ran.code == 1 and "answered without boxes: I see no cat." in one_line(ran)
    assert not Path("dog-detected.png").exists()


def test_detect_prints_the_boxes_also_where_it_cannot_draw(gemma4, here, moe, answers, monkeypatch):  # noqa: F811
    monkeypatch.setattr(Image.Image, "save", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
    ran = gemma4("detect", "dog.png", "cat", "-m", moe)
    assert ran.code == 1 and json.loads(ran.out)["picture"] is None and len(json.loads(ran.out)["boxes"]) == 1
    assert ran.err == "gemma4: error: dog-detected.png cannot be written (No space left); give --out another place\n"


# In a terminal; the model is fake_chat.py


@pytest.fixture
def chat(start, here: Path) -> Terminal:  # noqa: F811
    for name in ("broken.png", "slow.mp4", "clip.mp4"):
        Path(name).touch()
    terminal = start()
    terminal.wait("Ctrl-D leaves")
    return terminal


def paste(text: str) -> str:
    """As a terminal sends what is dragged into it."""
    return f"\x1b[200~{text}\x1b[201~"


def test_a_dragged_file_waits_for_the_question(chat: Terminal, here: Path):
    escaped = str(here / "my cat.png").replace(" ", "\\ ")
    chat.send(paste(escaped + " ") + "\r")
    chat.wait("attached: my cat.png, 256 tokens")
    chat.wait("now ask about it; /drop takes it away again")
    chat.wait("1 attached >")
    chat.send(paste(f"'{here}/dog.png' ") + "\r")
    chat.wait("2 attached >")
    chat.send("what is it?\r")
    chat.wait("you said '[my cat.png] [dog.png] what is it?'")
    chat.wait("12.3 MB\n\n>")
    chat.send("and now?\r")
    chat.wait("you said 'and now?'")
    chat.send(CTRL_D)
    assert chat.exit_code() == 0


def test_a_dragged_file_beside_text_goes_at_once(chat: Terminal, here: Path):
    chat.send("how many?" + paste(f'"{here}/my cat.png"') + "\r")
    chat.wait("attached: my cat.png, 256 tokens")
    chat.wait("you said '[my cat.png] how many?'")
    chat.send(f"{here}/clip.mp4 what happens?\r")
    chat.wait("attached: clip.mp4, 12 frames, 840 tokens")
    chat.wait("clip.mp4 is sampled sparser")
    chat.wait("you said '[clip.mp4] what happens?'")
    chat.send("and/or /usr/bin/env?\r")
    chat.wait("you said 'and/or /usr/bin/env?'")
    block = f'"""look at {here}/dog.png"""'
    chat.send(paste(block) + "\r")
    chat.wait("you said 'look at ")


def test_the_commands(chat: Terminal, here: Path):
    chat.send(f"/image {here}/my cat.png\r")
    chat.wait("attached: my cat.png, 256 tokens")
    chat.send(f"/video '{here}/clip.mp4'\r")
    chat.wait("2 attached >")
    chat.send("/attachments\r")
    chat.wait("  2  clip.mp4, 12 frames, 840 tokens")
    chat.send("/drop 1\r")
    chat.wait("taken away: my cat.png, 256 tokens")
    chat.wait("1 attached >")
    chat.send("well?\r")
    chat.wait("you said '[clip.mp4] well?'")


def test_what_cannot_be_read_leaves_the_conversation(chat: Terminal, here: Path):
    chat.send(f"/image {here}/none.png\r")
    chat.wait("gemma4: error: there is no file ")
    chat.send(f"what is this? {here}/broken.png\r")
    chat.wait("gemma4: error: broken.png is not a picture, or damaged")
    chat.wait("not sent")
    chat.send(f"{here}/speech.wav\r")
    chat.wait("this model does not hear")
    chat.send("count\r")
    chat.wait("1 messages")
    chat.send(f"{here}/slow.mp4\r")
    time.sleep(0.5)
    chat.send(CTRL_C)
    chat.wait("stopped", seconds=20)
    chat.send(f"{here}/dog.png full\r")
    chat.wait("make room?")
    chat.send("n")
    chat.wait("the prompt has 9 tokens")
    chat.wait("/drop takes away what is attached, /clear starts a new conversation")
    chat.wait("1 attached >")
    chat.send("mute\r")
    time.sleep(0.5)
    chat.send(CTRL_C)
    chat.wait("1 attached >")  # nothing was said, so the message was taken back
    chat.send("fail\r")
    chat.wait("the device has left")
    chat.wait("\n\n>")  # it is in the history, so it does not go again
    chat.send("/clear\r")
    chat.wait("a new conversation")
    chat.send("count\r")
    chat.wait("1 messages")
    assert "Traceback" not in chat.output


def test_the_real_command_on_a_real_model(start, here: Path, e2b: str):  # noqa: F811
    arguments = ("chat", "hi", "-m", e2b, "--image", str(here / "dog.png"), *FEW)
    chat = start(*arguments, program=("-m", "mlx_gemma4.cli.app"))
    chat.wait("> hi")
    chat.wait("attached: dog.png, ")
    chat.wait("3 out")
    chat.send(paste(f"'{here}/my cat.png'") + "and this?\r")
    chat.wait("attached: my cat.png, 60 tokens")
    chat.wait("3 out")
    chat.send(f"/audio {here}/silent.wav\r")
    chat.wait("silent.wav is silent")
    chat.send(CTRL_D)
    assert chat.exit_code() == 0


def test_nothing_of_media_is_loaded_for_help(clean_python):
    code = (
        "import sys\nfrom mlx_gemma4.cli.app import run\nrun(['detect', '--help'])\n"
        "print(sorted(n for n in ('PIL', 'av', 'miniaudio', 'numpy', 'mlx') if n in sys.modules))"
    )
    assert clean_python(code).splitlines()[-1] == "[]"
