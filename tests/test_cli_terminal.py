"""`gemma4 chat` on a real pseudo-terminal: keys, interruptions, history. The model is `fake_chat.py`."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny import make_tiny

ROOT = Path(__file__).parents[1]
SEQUENCE = re.compile(r"\x1b(\[[?0-9;]*[A-Za-z]|\][^\x07]*\x07|[=>])")
CTRL_C, CTRL_D, ALT_ENTER, UP = "\x03", "\x04", "\x1b\r", "\x1b[A"


class Terminal:
    """A program on a pseudo-terminal: `send` keys, `wait` for text, look at all `output` without its colours."""

    def __init__(self, command: list[str], env: dict[str, str]):
        controller, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))

        def own_terminal() -> None:
            # Without a controlling terminal Ctrl-C would be a character, not a signal.
            os.setsid()
            fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            command, stdin=terminal, stdout=terminal, stderr=terminal, env=env, preexec_fn=own_terminal, cwd=ROOT
        )
        os.close(terminal)
        self._controller = controller
        self._raw = b""
        self._seen = 0

    @property
    def output(self) -> str:
        return SEQUENCE.sub("", self._raw.decode("utf-8", "replace")).replace("\r\n", "\n")

    def send(self, keys: str) -> None:
        self._seen = len(self.output)
        os.write(self._controller, keys.encode())

    def wait(self, text: str, seconds: float = 60) -> None:
        """Until `text` appears after the last keys sent."""
        end = time.monotonic() + seconds
        while text not in self.output[self._seen :]:
            assert time.monotonic() < end, f"no {text!r} in {self.output[self._seen :]!r}"
            self._read(0.2)

    def _read(self, seconds: float) -> bool:
        ready, _, _ = select.select([self._controller], [], [], seconds)
        try:
            data = os.read(self._controller, 65536) if ready else b""
        except OSError:  # Linux: the other side has closed
            data = b""
        self._raw += data
        return bool(data)

    def exit_code(self, seconds: float = 60) -> int:
        end = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < end, f"still running: {self.output!r}"
            self._read(0.1)
        while self._read(0.1):
            pass
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        os.close(self._controller)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*arguments: str, program: tuple[str, ...] = ("tests/fake_chat.py",), **env: str) -> Terminal:
        base = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "GEMMA4_DEBUG")}
        base |= {"TERM": "xterm", "PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(tmp_path / "state")}
        # The test does not answer prompt_toolkit's question where the cursor is.
        base |= {"PROMPT_TOOLKIT_NO_CPR": "1"}
        terminal = Terminal([sys.executable, *program, *arguments], base | env)
        opened.append(terminal)
        return terminal

    yield start
    for terminal in opened:
        terminal.close()


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(start: Callable[..., Terminal]):
    chat = start()
    chat.wait("Ctrl-D leaves")
    chat.send("slow\r")
    chat.wait("word5")
    chat.send(CTRL_C)
    chat.wait("stopped · ")
    chat.send("slow\r")
    chat.wait("word5")
    for _ in range(5):
        chat.send(CTRL_C)
        time.sleep(0.02)
    chat.wait("stopped · ")
    chat.send("count\r")
    chat.wait("5 messages")
    chat.send("fail\r")
    chat.wait("RuntimeError: the device has left")
    chat.wait("--debug")
    chat.send("full\r")
    chat.wait("make room?")
    chat.send("n")
    chat.wait("gemma4: error: the prompt has 9 tokens")
    chat.send("count\r")
    chat.wait("8 messages")
    chat.wait("12.3 MB\n\n>")
    assert "Traceback" not in chat.output
    chat.send(CTRL_C)
    chat.wait("Ctrl-D or /exit leaves")
    hints = chat.output.count("Ctrl-D or /exit leaves")
    chat.send("half a line")
    chat.wait("half a line")
    chat.send(CTRL_C + CTRL_D)
    assert chat.exit_code() == 0
    assert chat.output.count("Ctrl-D or /exit leaves") == hints, "no hint when there was a line to drop"


def test_several_lines_in_three_ways(start: Callable[..., Terminal]):
    chat = start()
    chat.wait("Ctrl-D leaves")
    chat.send(f"one{ALT_ENTER}two\r")
    chat.wait(r"you said 'one\ntwo'")
    chat.send('"""three\r')
    chat.send('four"""\r')
    chat.wait(r"you said 'three\nfour'")
    chat.send("\x1b[200~five\nsix\x1b[201~\r")
    chat.wait(r"you said 'five\nsix'")
    chat.send("/exit\r")
    assert chat.exit_code() == 0


def test_history_survives_and_belongs_to_its_owner(start: Callable[..., Terminal], tmp_path: Path):
    chat = start()
    chat.wait("Ctrl-D leaves")
    chat.send("remember me\r")
    chat.wait("you said")
    chat.send(CTRL_D)
    assert chat.exit_code() == 0
    history = tmp_path / "state" / "mlx-gemma4" / "history"
    assert "+remember me\n" in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600
    again = start()
    again.wait("Ctrl-D leaves")
    again.send(f"{UP}\r")
    again.wait("you said 'remember me'")


def test_history_that_cannot_be_kept_is_said(start: Callable[..., Terminal], tmp_path: Path):
    (tmp_path / "file").write_text("")
    chat = start(XDG_STATE_HOME=str(tmp_path / "file"))
    chat.wait("history is not kept")
    chat.send("hello\r")
    chat.wait("you said 'hello'")


def test_a_prompt_is_answered_first_and_commands_work(start: Callable[..., Terminal]):
    chat = start("md")
    chat.wait("> md")
    chat.wait("The end.")
    chat.wait("1,200 in (1,000 re-used)")
    assert "# A title" not in chat.output and "A title" in chat.output, "rendered"
    chat.send("/hepl\r")
    chat.wait("did you mean /help?")
    chat.send("/set temperature 0.5\r")
    chat.wait("temperature is 0.5")
    chat.send("/bye\r")
    assert chat.exit_code() == 0


def test_no_color_shows_the_source(start: Callable[..., Terminal]):
    chat = start("md", NO_COLOR="1")
    chat.wait("# A title")
    chat.wait("| bb   |    22 |")


def test_keys_pressed_during_an_answer_wait_for_the_prompt(start: Callable[..., Terminal]):
    chat = start()
    chat.wait("Ctrl-D leaves")
    chat.send("prefill\r")
    chat.wait("reading the prompt")
    chat.send("typed ahead")
    chat.wait("typed ahead")
    assert chat.output.index("read it") < chat.output.index("typed ahead"), "not echoed into the answer"
    chat.send("\r")
    chat.wait("you said 'typed ahead'")


def test_the_real_command_on_a_real_model(start: Callable[..., Terminal], tmp_path: Path):
    model = make_tiny(tmp_path / "tiny", "26b-a4b", max_position_embeddings=200)
    chat = start("chat", "hi", "-m", str(model), "--max-tokens", "5", program=("-m", "mlx_gemma4.cli.app"))
    chat.wait("context 200 tokens")
    chat.wait("2 x global, one vector for key and value")
    chat.wait("> hi")
    chat.wait("200 · ")
    chat.send(f"{'word ' * 60}\r")
    chat.wait("make room?")
    chat.send("n")
    chat.wait("gemma4: error: ")
    chat.wait("/clear starts a new conversation")
    chat.send("/clear\r")
    chat.wait("a new conversation")
    chat.send("/set max_tokens 1\r")
    chat.wait("max_tokens is 1")
    chat.send("again\r")
    chat.wait("1 out · ")
    chat.send(CTRL_D)
    assert chat.exit_code() == 0
