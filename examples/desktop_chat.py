"""A window that talks to Gemma 4: how an application uses the engine.

    python examples/desktop_chat.py                 # the model in the package
    python examples/desktop_chat.py --model e2b

Owns a window in tkinter, which comes with Python on macOS (on Debian: apt install python3-tk). The model runs on the
engine's thread. A toolkit wants its widgets touched by its own thread only, so a thread per question reads the events
into a queue, and the window empties that queue thirty times a second.
"""

import argparse
import queue
import threading
import tkinter as tk
from tkinter import ttk

from mlx_gemma4.engine import Engine
from mlx_gemma4.errors import Gemma4Error
from mlx_gemma4.events import Done, Text, Thought

POLL_MS = 33


class ChatWindow:
    """`engine` and `chat` are the model's side; everything else is the window."""

    def __init__(self, root: tk.Tk, model: str):
        self.root = root
        self.inbox: queue.SimpleQueue = queue.SimpleQueue()  # what other threads have to tell: (method, argument)
        self.engine = Engine(model, progress=lambda *stage: self.inbox.put((self.show_loading, stage)))
        self.chat = self.engine.chat()
        self.answering = False
        self._build(model)
        self._in_background(lambda: self.inbox.put((self.show_ready, self.engine.ready())))
        self.root.protocol("WM_DELETE_WINDOW", self.close)
        self._poll()

    def ask(self, _event: object = None) -> None:
        question = self.entry.get().strip()
        if not question or self.answering:
            return
        self.entry.delete(0, tk.END)
        self._write(f"{question}\n", "question")
        self._set_answering(True)

        def read() -> None:
            for event in self.chat.stream(question):
                self.inbox.put((self.show_event, event))

        self._in_background(read)

    def stop(self) -> None:
        self.chat.cancel()  # the answer ends within a token; its last event says so

    def close(self) -> None:
        """Also in mid-answer: the engine stops at the next token, then its thread ends."""
        self.root.after_cancel(self._next_poll)
        self.engine.close()
        self.root.destroy()

    # What other threads tell, shown by the window's own

    def show_loading(self, stage: tuple[str, int, int]) -> None:
        name, done, total = stage
        self.status.set(f"{name}: {done / 1e6:.1f} of {total / 1e6:.1f} MB")

    def show_ready(self, info) -> None:
        self.status.set(f"{info.source} · {info.weight_bytes / 1e6:.1f} MB · context {info.context_limit:,}")
        self.entry.focus_set()

    def show_event(self, event) -> None:
        match event:
            case Text(text):
                self._write(text)
            case Thought(text):
                self._write(text, "thought")
            case Done(stats, reason):
                self._write(" (stopped)\n\n" if reason == "cancelled" else "\n\n", "thought")
                self.status.set(
                    f"{stats.generation_tokens} tokens, {stats.generation_tps:.1f} tokens/s · "
                    f"{stats.cached_tokens} of {stats.prompt_tokens} prompt tokens remembered"
                )
                self._set_answering(False)

    def show_error(self, error: Gemma4Error) -> None:
        self._write(f"{error}\n\n", "thought")
        self._set_answering(False)

    def _in_background(self, work) -> None:
        def run() -> None:
            try:
                work()
            except Gemma4Error as e:
                self.inbox.put((self.show_error, e))

        threading.Thread(target=run, daemon=True).start()

    def _poll(self) -> None:
        while not self.inbox.empty():
            show, argument = self.inbox.get()
            show(argument)
        self._next_poll = self.root.after(POLL_MS, self._poll)

    def _write(self, text: str, tag: str = "") -> None:
        self.text.configure(state=tk.NORMAL)
        self.text.insert(tk.END, text, tag)
        self.text.configure(state=tk.DISABLED)
        self.text.see(tk.END)

    def _set_answering(self, answering: bool) -> None:
        self.answering = answering
        self.stop_button.configure(state=tk.NORMAL if answering else tk.DISABLED)
        self.send_button.configure(state=tk.DISABLED if answering else tk.NORMAL)

    def _build(self, model: str) -> None:
        self.root.title(f"Gemma 4 · {model}")
        self.root.minsize(480, 320)
        self.status = tk.StringVar(value="loading")
        ttk.Label(self.root, textvariable=self.status, padding=6).pack(side=tk.BOTTOM, fill=tk.X)
        row = ttk.Frame(self.root, padding=6)
        row.pack(side=tk.BOTTOM, fill=tk.X)
        self.entry = ttk.Entry(row)
        self.entry.pack(side=tk.LEFT, fill=tk.X, expand=True)
        self.entry.bind("<Return>", self.ask)
        self.send_button = ttk.Button(row, text="Send", command=self.ask)
        self.send_button.pack(side=tk.LEFT, padx=6)
        self.stop_button = ttk.Button(row, text="Stop", command=self.stop, state=tk.DISABLED)
        self.stop_button.pack(side=tk.LEFT)
        self.text = tk.Text(self.root, wrap=tk.WORD, state=tk.DISABLED, width=72, height=20, padx=10, pady=10)
        self.text.tag_configure("question", font=("TkDefaultFont", 11, "bold"))
        self.text.tag_configure("thought", foreground="gray50")
        self.text.pack(side=tk.TOP, fill=tk.BOTH, expand=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="demo", help="a name, folder or repository, as of `gemma4 chat --model`")
    model = parser.parse_args().model
    root = tk.Tk()
    ChatWindow(root, model)
    root.mainloop()


if __name__ == "__main__":
    main()
