"""A conversation without a model, for tests of the terminal: the answer depends on the words of the question.

Owns scripted events of the same classes as `mlx_gemma4.chat`. Run as a script it is `gemma4 chat` on a fake; the
variables TOOLS (a file) and YES are its options.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_gemma4.errors import ContextError, UsageError
from mlx_gemma4.events import ChatEvent, Done, Malformed, Shortened, Stats, Text, Thought, ToolCall
from mlx_gemma4.media.content import text_of
from mlx_gemma4.media.items import Item
from mlx_gemma4.media.sources import MediaError
from mlx_gemma4.sampling import Sampling
from mlx_gemma4.tool_calls import call_message, result_message

MARKDOWN = """# A title

Some *words* and `code`,
on two lines.

1. one
2. two
   - inner

| name | value |
|------|------:|
| a    |     1 |
| bb   |    22 |

```python
def f(x):
    return x + 1
```

The end.
"""


@dataclass(frozen=True)
class FakePart:
    tokens: int


class FakeSenses:
    """Sees whatever exists and hears nothing; what it becomes depends on the name alone."""

    def items(self, kind: str, source: Any) -> list[Item]:
        name = Path(source).name
        if kind == "audio":
            raise UsageError("this model does not hear: E2B and E4B do")
        if not Path(source).exists():
            raise MediaError(f"there is no file {source}")
        if "broken" in name:
            raise MediaError(f"{name} is not a picture, or damaged")
        if "slow" in name:
            time.sleep(30)
        if kind == "video":
            frames = (FakePart(70),) * 12  # type: ignore[assignment]
            return [Item("video", name, frames, ("00:00",) * 12, (f"{name} is sampled sparser",))]  # type: ignore[arg-type]
        return [Item("image", name, (FakePart(256),))]  # type: ignore[arg-type]


class FakeChat:
    """The public surface of `mlx_gemma4.chat.Chat` that the command line uses."""

    def __init__(self, pause: float = 0.0):
        self.messages: list[dict[str, Any]] = []
        self.system: str | None = None
        self.thinking: Any = False
        self.on_full = "stop"
        self.sampling = Sampling()
        self.stats: Stats | None = None
        self.pause = pause
        self.senses = FakeSenses()
        self._cancelled = False

    def cancel(self) -> None:
        self._cancelled = True

    context_used = 77

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.messages))

    @classmethod
    def load(cls, path: str) -> "FakeChat":
        chat = cls()
        chat.messages = json.loads(Path(path).read_text())
        return chat

    def clear(self) -> None:
        self.messages = []
        self.stats = None

    def set_system(self, system: str | None) -> None:
        self.system = system

    def set_kv(self, **options: Any) -> None:
        self.kv = options

    @property
    def cache_status(self) -> list[str]:
        return ["4 x ring: 10 bytes", "1 x global: 20 bytes"]

    def stream(
        self,
        message: str | list[dict[str, Any]],
        *,
        progress: Callable[[int, int], Any] | None = None,
        tools: Any = None,
    ) -> Iterator[ChatEvent]:
        self._cancelled = False
        text = text_of(message)
        if text.endswith("full"):
            if self.on_full == "stop":
                raise ContextError("the prompt has 9 tokens and the context holds 8")
            gone = len(self.messages)
            self.messages.clear()
            yield Shortened(gone, "we talked" if self.on_full == "summarize" else None)
        self.messages.append({"role": "user", "content": message})
        yield from self._answer(text, progress)

    def stream_results(
        self, results: Any, *, progress: Callable[[int, int], Any] | None = None, tools: Any = None
    ) -> Iterator[ChatEvent]:
        self._cancelled = False
        for call, result in results:
            call = call if isinstance(call, ToolCall) else ToolCall("unknown", {}, call.raw)
            self.messages.append(result_message(call, result))
        told = " and ".join(json.dumps(result) for _, result in results)
        asked = next(m["content"] for m in reversed(self.messages) if m["role"] == "user")
        yield from self._answer(asked if asked == "again and again" else f"told {told}", progress)

    def _answer(self, text: str, progress: Callable[[int, int], Any] | None) -> Iterator[ChatEvent]:
        said, calls = "", []
        if "mute" in text:
            while not self._cancelled:
                time.sleep(0.01)
            self.messages.pop()
            yield Done(Stats(1200, 0, 0.0, 0, 0.0, 0, 131072, 0, 0, "cancelled"), "cancelled")
            return
        reason = "stop"
        for event in self._events(text, progress):
            if self._cancelled:
                reason = "cancelled"
                break
            if isinstance(event, Text):
                said += event.text
            if isinstance(event, ToolCall | Malformed):
                calls.append(event if isinstance(event, ToolCall) else ToolCall("unknown", {}, event.raw))
                reason = "tool_calls"
            yield event
            time.sleep(self.pause)
        if text == "loop":
            reason = "repetition"
        self.messages.append(call_message(calls, said))
        self.stats = Stats(1200, 1000, 456.7, 88, 31.25, 1288, 131072, 12_345_678, 23_456_789, reason)
        yield Done(self.stats, reason)

    def _events(self, text: str, progress: Callable[[int, int], Any] | None) -> Iterator[ChatEvent]:
        if progress:
            progress(0, 200)
            progress(200, 200)
        if text == "slow":
            for i in range(2000):
                time.sleep(0.02)
                yield Text(f"word{i} ")
        elif text == "prefill":
            for i in range(10):
                time.sleep(0.2)
                if progress:
                    progress(20 * i, 200)
            yield Text("read it")
        elif text == "md":
            for i in range(0, len(MARKDOWN), 3):
                yield Text(MARKDOWN[i : i + 3])
        elif text == "weather":
            yield Text("Let me look.")
            yield ToolCall("weather", {"city": "Paris", "days": 2}, "", "call_0")
        elif text == "twice":
            yield ToolCall("weather", {"city": "Oslo\x1b[2J"}, "", "call_0")
            yield ToolCall("weather", {"city": "Rome", "days": "soon"}, "", "call_1")
        elif text in ("nap", "oops", "again and again"):
            yield ToolCall(text.split()[0], {}, "", f"call_{len(self.messages)}")
        elif text == "broken call":
            yield Malformed("<|tool_call>call:weather{", "the call of weather ends in its middle")
        elif text == "think":
            yield Thought("let me ")
            yield Thought("see")
            yield Text("done **thinking**")
        elif text.endswith("fail"):
            raise RuntimeError("the device\nhas left")
        elif text == "escape":
            yield Text("a\x1b]0;owned\x07b\x1b[2Jc")
        elif text == "table":
            yield Text("| n | square |\n|---|---|\n")
            for i in range(100):
                yield Text(f"| {i} | {i * i} |\n")
        elif text == "code":
            yield Text("```python\n")
            for i in range(100):
                yield Text(f"print('line {i}')\n")
            yield Text("```\nafter the code\n")
        elif text == "count":
            yield Text(f"{len(self.messages)} messages")
        else:
            yield Text(f"you said {text!r}")


if __name__ == "__main__":
    from mlx_gemma4.cli.tui.session import ChatSession
    from mlx_gemma4.cli.tui.toolbox import open_toolbox

    files = [os.environ["TOOLS"]] if "TOOLS" in os.environ else None
    with open_toolbox(files, None, "YES" in os.environ) as toolbox:
        session = ChatSession(
            FakeChat(pause=0.005),  # type: ignore[arg-type]
            ["a fake model", "cache: none"],
            toolbox=toolbox,
            open_file=FakeChat.load,  # type: ignore[arg-type]
        )
        sys.exit(session.talk(sys.argv[1] if len(sys.argv) > 1 else None))
