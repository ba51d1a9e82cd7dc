"""How far a download is: the progress bars of the Hub client turned into one number and one line on stderr.

Owns the class handed to the client as its `tqdm` and the line drawn from it. Leaves the download and its
errors to `hub.py`.
"""

import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

# Called with (bytes done, bytes in all) from a worker thread. An exception it raises ends the download.
Progress = Callable[[int, int], Any]


class Stopped(Exception):
    """Ends a transfer whose caller is gone."""


@dataclass
class Transfer:
    """One download in progress, shared by all bars and threads of the client."""

    total: int = 0
    report: Progress | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    # What `report` raised; comes out of the download unchanged.
    error: BaseException | None = None
    # Bytes by bar: the client counts the same bytes twice (received, written), so the largest is what is
    # done.
    counts: dict[int, float] = field(default_factory=dict)

    def advance(self, bar: int, count: float) -> None:
        """Sets the count of one bar and reports. Raises Stopped when the download was given up."""
        if self.stop.is_set():
            raise Stopped
        self.counts[bar] = count
        if self.report is None:
            return
        try:
            self.report(min(int(max(self.counts.values())), self.total), self.total)
        except BaseException as e:
            self.error = e
            self.stop.set()
            raise

    def bar_class(self) -> type:
        """A class the client takes for tqdm. It draws nothing and hands byte counts to `advance`."""
        from huggingface_hub.utils import tqdm

        transfer = self

        class Bar(tqdm):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                self._counts_bytes = kwargs.get("unit") == "B"
                super().__init__(*args, **{**kwargs, "disable": True})
                # A disabled tqdm leaves these two out, and the client reads them.
                self.n = kwargs.get("initial") or 0
                self.total = kwargs.get("total")

            def update(self, n: float | None = 1) -> None:
                self.n += n or 0
                if self._counts_bytes:
                    transfer.advance(id(self), self.n)

            @property
            def format_dict(self) -> dict[str, Any]:
                return {"n": self.n, "total": self.total, "rate": None, "elapsed": 0}

            def refresh(self, *args: Any, **kwargs: Any) -> None:
                """Nothing is drawn."""

            set_description = set_description_str = set_postfix = set_postfix_str = refresh

        return Bar


def default_line(name: str) -> "Line | None":
    """A `Line` on stderr, or None where that is no terminal or HF_HUB_DISABLE_PROGRESS_BARS is set."""
    from huggingface_hub.utils import are_progress_bars_disabled

    return None if are_progress_bars_disabled() or not sys.stderr.isatty() else Line(name)


class Line:
    """One line on stderr, rewritten at most five times a second: name, size, percent, speed, time left."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._start = time.monotonic()
        self._drawn = 0.0
        self._lock = threading.Lock()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        with self._lock:
            if now - self._drawn < 0.2 and done < total:
                return
            self._drawn = now
            rate = done / max(now - self._start, 1e-3)
            left = (total - done) / max(rate, 1)
            fields = [
                self._name,
                f"{size(done)} of {size(total)}",
                f"{100 * done // max(total, 1)} %",
                f"{size(rate)}/s",
                f"{left / 60:.0f} min left" if left >= 90 else f"{left:.0f} s left",
            ]
            text = "  ".join(fields)[: shutil.get_terminal_size().columns - 1]
            sys.stderr.write(f"\r{text}\x1b[K")
            sys.stderr.flush()

    def close(self) -> None:
        """Leaves the last state standing and goes to the next line."""
        if self._drawn:
            sys.stderr.write("\n")
            sys.stderr.flush()


def size(n: float) -> str:
    """Bytes the way the Hub's pages show them, in powers of 1,000: "512 B", "1.5 kB", "10.2 GB"."""
    if n < 1000:
        return f"{n:.0f} B"
    for unit in ("kB", "MB", "GB", "TB"):
        n /= 1000
        if n < 999.95 or unit == "TB":
            break
    return f"{n:.1f} {unit}"
