"""Figures as people read them."""

import io

import pytest

from mlx_gemma4.chat import Stats
from mlx_gemma4.cli.tui import status


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def stats(**changes: object) -> Stats:
    values: dict = {
        "prompt_tokens": 1200,
        "cached_tokens": 1000,
        "prompt_tps": 456.7,
        "generation_tokens": 88,
        "generation_tps": 31.25,
        "context_used": 1288,
        "context_limit": 131072,
        "cache_bytes": 12_345_678,
        "peak_memory": 1,
        "finish_reason": "stop",
    }
    return Stats(**(values | changes))


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (12_345_678, "12.3 MB"), (210e6, "210 MB"), (2.5e9, "2.5 GB")],
)
def test_size(count: float, text: str):
    assert status.size(count) == text


def test_turn_line_has_what_people_ask_for():
    assert status.turn_line(stats()) == (
        "prompt 1,200 tokens (1,000 re-used) at 457 tok/s · answer 88 tokens at 31.2 tok/s · "
        "context 1,288 of 131,072 · cache 12.3 MB"
    )
    short = status.turn_line(stats(), columns=80)
    assert len(short) < 80
    for part in ("1,200", "1,000 re-used", "457/s", "88", "31.2/s", "1,288/131,072", "12.3 MB"):
        assert part in short


def test_turn_line_says_how_it_ended():
    assert status.turn_line(stats(finish_reason="cancelled")).startswith("stopped · ")
    for columns in (None, 60):
        line = status.turn_line(stats(finish_reason="length"), columns)
        assert line.startswith("cut at the token limit · ")


def test_turn_line_without_reuse_or_limit():
    line = status.turn_line(stats(cached_tokens=0, context_limit=None))
    assert "re-used" not in line and "context 1,288 ·" in line
    one = status.turn_line(stats(generation_tokens=1, generation_tps=0.0))
    assert "answer 1 token · context" in one
    assert "at 457" not in status.turn_line(stats(cached_tokens=1200)), "no rate for nothing computed"


def test_prefill_meter_waits_a_second_and_cleans_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    now = [0.0]
    out = Terminal()
    meter = status.PrefillMeter(out, clock=lambda: now[0])
    meter(0, 8000)
    now[0] = 0.9
    meter(2000, 8000)
    assert out.getvalue() == ""
    now[0] = 1.1
    meter(4000, 8000)
    assert "4,000 of 8,000 tokens (50%)" in out.getvalue()
    meter.clear()
    assert out.getvalue().endswith("\r\x1b[2K")


def test_prefill_meter_is_silent_in_a_pipe():
    out = io.StringIO()
    meter = status.PrefillMeter(out, after=-1)
    meter(1, 2)
    meter.clear()
    assert out.getvalue() == ""
