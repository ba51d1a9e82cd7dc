"""How a failure looks: one line on stderr and an exit code.

Owns the wording around an error and the `--debug` switch. Leaves what went wrong to the exceptions
themselves.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 model not found or not accessible, 4 will not fit, 130 Ctrl-C.
"""

import os
import sys
import traceback

from mlx_gemma4.errors import Gemma4Error

INTERRUPTED = 130

_debug = False


def set_debug(on: bool) -> None:
    global _debug
    _debug = on


def debug_asked() -> bool:
    """Whether tracebacks are wanted: --debug, or GEMMA4_DEBUG set to anything but 0."""
    return _debug or os.environ.get("GEMMA4_DEBUG", "0") not in ("", "0")


def one_line(error: BaseException) -> str:
    """What to tell the user, without line breaks."""
    # typer's own usage errors carry their wording in format_message() and their command in ctx.
    wording = getattr(error, "format_message", None)
    text = " ".join(str(wording() if callable(wording) else error).split())
    if isinstance(error, Gemma4Error):
        return text
    if callable(wording):
        command = getattr(getattr(error, "ctx", None), "command_path", "gemma4")
        return f"{text.rstrip('.')}; see {command} --help"
    if isinstance(error, OSError) and error.strerror:
        return text
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return f"{text}; run again with --debug for the traceback"


def exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return getattr(error, "exit_code", 1)


def report(error: BaseException) -> None:
    """Prints the line, and the traceback before it if that is wanted."""
    if debug_asked():
        traceback.print_exception(error)
    print(f"gemma4: error: {one_line(error)}", file=sys.stderr, flush=True)
