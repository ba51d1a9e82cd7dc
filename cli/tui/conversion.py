"""How a conversion shows itself while it runs: one bar on a terminal, plain lines elsewhere, JSON lines for programs.

Owns the three forms of the same `Step`s and how often each speaks. Leaves what is done to
`conversions/convert.py`.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

from .status import size
from .stream import wants_style

if TYPE_CHECKING:
    from mlx_gemma4.conversions.convert import Step

_STAGES = {
    "download": "waiting for the download",
    "lattice": "looking for the Q4_0 lattice",
    "measure": "measuring what bits count for",
    "compensate": "packing with GPTQ",
    "convert": "converting",
    "verify": "checking what was written",
    "upload": "uploading",
}


class Silent:
    """--quiet: nothing but the error, if there is one."""

    def __call__(self, step: Step) -> None: ...

    def close(self) -> None: ...


class _Pace:
    """Rate and remaining time of the stage at work, over what this run did itself."""

    def __init__(self) -> None:
        self.stage = ""
        self._start, self._first = 0.0, 0

    def update(self, step: Step) -> tuple[float, float | None]:
        """(bytes per second, seconds left or None)"""
        now = time.monotonic()
        if step.stage != self.stage:
            self.stage, self._start, self._first = step.stage, now, step.bytes_done
        rate = (step.bytes_done - self._first) / max(now - self._start, 1e-6)
        return rate, (step.bytes_total - step.bytes_done) / rate if rate > 0 else None


class JsonLines:
    """One JSON object per line on stdout: at each change of stage, at each note, and at most five times a second."""

    def __init__(self) -> None:
        self._pace, self._last = _Pace(), 0.0

    def __call__(self, step: Step) -> None:
        if step.stage == "note":
            print(json.dumps({"stage": "note", "text": step.text}), flush=True)
            return
        new = step.stage != self._pace.stage
        rate, left = self._pace.update(step)
        now = time.monotonic()
        if not new and now - self._last < 0.2 and step.bytes_done < step.bytes_total:
            return
        self._last = now
        record: dict[str, Any] = {
            "stage": step.stage,
            "bytes": step.bytes_done,
            "of": step.bytes_total,
            "tensors": step.tensors_done,
            "of_tensors": step.tensors_total,
            "bytes_per_second": round(rate),
            "seconds_left": None if left is None else round(left, 1),
        }
        if step.text:
            record["at"] = step.text
        print(json.dumps(record), flush=True)

    def close(self) -> None: ...


class Lines:
    """Plain lines on stderr: at each change of stage, and every ten seconds."""

    def __init__(self, every: float = 10.0) -> None:
        self._pace, self._last, self._every = _Pace(), 0.0, every

    def __call__(self, step: Step) -> None:
        if step.stage == "note":
            print(f"gemma4: {step.text}", file=sys.stderr, flush=True)
            return
        new = step.stage != self._pace.stage
        rate, left = self._pace.update(step)
        now = time.monotonic()
        if not new and now - self._last < self._every:
            return
        self._last = now
        print(f"gemma4: {_text(step, rate, left)}", file=sys.stderr, flush=True)

    def close(self) -> None: ...


class Bar:
    """One bar on a terminal's stderr, of the stage at work."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"))
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._pace, self._last = _Pace(), 0.0
        self._task: Any = None

    def __call__(self, step: Step) -> None:
        if step.stage == "note":
            self._progress.console.print(step.text, highlight=False, style="dim")
            return
        new = step.stage != self._pace.stage
        rate, left = self._pace.update(step)
        now = time.monotonic()
        if not new and now - self._last < 0.1 and step.bytes_done < step.bytes_total:
            return
        self._last = now
        if self._task is None:
            self._progress.start()
            self._task = self._progress.add_task("", figures="")
        self._progress.update(
            self._task,
            description=_STAGES[step.stage],
            completed=step.bytes_done,
            total=step.bytes_total or None,
            figures=_figures(step, rate, left),
        )
        if new:
            self._progress.refresh()

    def close(self) -> None:
        self._progress.stop()


def meter(quiet: bool, as_json: bool) -> Silent | JsonLines | Lines | Bar:
    """The form that suits the options and stderr."""
    if quiet:
        return Silent()
    if as_json:
        return JsonLines()
    return Bar() if wants_style(sys.stderr) else Lines()


def _text(step: Step, rate: float, left: float | None) -> str:
    figures = _figures(step, rate, left)
    return f"{_STAGES[step.stage]}: {figures}" if figures else f"{_STAGES[step.stage]} {step.text}".rstrip()


def _figures(step: Step, rate: float, left: float | None) -> str:
    if not step.bytes_total:
        return ""
    parts = [f"{size(step.bytes_done)} of {size(step.bytes_total)}"]
    if step.tensors_total:
        parts.append(f"{step.tensors_done:,} of {step.tensors_total:,} tensors")
    if rate > 0 and left is not None:
        parts.append(f"{size(rate)}/s")
        parts.append(f"{left / 60:.0f} min left" if left >= 90 else f"{left:.0f} s left")
    return " · ".join(parts)
