"""The `gemma4` command: its subcommands and what happens when one fails.

Owns the list of commands, `--version`, `--debug` and the way from an exception to one line and an exit code.
Leaves each command to its own file and imports nothing heavy: `gemma4 --help` must not load MLX.
"""

import io
import os
import sys
from typing import Annotated

import typer

from mlx_gemma4 import __version__

from . import cache_size, chat, convert, detect, failures, generate, kv_check, models, verify

app = typer.Typer(
    name="gemma4",
    help="Gemma 4 on your machine: talk to it, use it in scripts, see what it costs.",
    epilog="The first step: gemma4 chat. It needs no download; a small model comes with the package.",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("chat")(chat.command)
app.command("generate")(generate.command)
app.command("detect")(detect.command)
app.command("convert")(convert.command)
app.command("verify")(verify.command)
app.command("cache-size")(cache_size.command)
app.command("kv-check")(kv_check.command)
app.command("info")(models.info)
app.command("list")(models.list_models)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"mlx-gemma4 {__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show tracebacks. Also: GEMMA4_DEBUG=1. Works after a command too."),
    ] = False,
) -> None:
    failures.set_debug(debug)
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def run(arguments: list[str]) -> int:
    """Runs one command line and returns its exit code; errors are reported on stderr."""
    arguments = _debug_first(arguments)
    try:
        # Not standalone: usage errors arrive here as exceptions, so that they too become one line.
        code = app(arguments, prog_name="gemma4", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        return failures.INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has left, as `| head` does: nothing more to say, to nobody.
        _drop_output()
        return 1
    except Exception as error:
        failures.report(error)
        return failures.exit_code(error)
    return code if isinstance(code, int) else 0


def main() -> None:
    """Entry point of the `gemma4` script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that is not UTF-8 shows a question mark rather than ending the answer.
            stream.reconfigure(errors="replace")
    sys.exit(run(sys.argv[1:]))


def _debug_first(arguments: list[str]) -> list[str]:
    """`gemma4 chat --debug` means `gemma4 --debug chat`."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    if "--debug" not in arguments[:end]:
        return arguments
    return ["--debug", *(a for a in arguments[:end] if a != "--debug"), *arguments[end:]]


def _drop_output() -> None:
    """Points stdout at nothing, so that Python's own flush at exit does not complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
