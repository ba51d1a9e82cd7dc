"""`gemma4 kv-check`: what a compressed cache costs on a model and text of one's own, and which setting to take.

Owns the options, the table, the JSON and the plot. Leaves measuring and limits to `mlx_gemma4.kv_check`, the texts to
`mlx_gemma4.kv_sample`.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_gemma4.errors import Gemma4Error, UsageError
from mlx_gemma4.kv_bits import PLAIN, KvBits, number, request

from . import options
from .tui import status
from .tui.stream import wants_style

if TYPE_CHECKING:
    from mlx_gemma4.kv_check import Measured, Report

HEAD = ["bits", "stored", "cache", "KL mean", "KL p99", "top-1", "perplexity", "recall"]


def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", envvar="GEMMA4_MODEL", help="As --model of chat. Default: demo, the built-in model."
        ),
    ] = options.DEMO,
    revision: options.Revision = None,
    dtype: options.Dtype = None,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="UTF-8 text to compare on. Default: a story with facts that come back."),
    ] = None,
    bits: Annotated[
        str, typer.Option(metavar="B,B,...", help="Settings to compare; 4/3 is 4 bits for keys and 3 for values.")
    ] = "4,3.5,3,2.5,2",
    mode: Annotated[
        str | None,
        typer.Option("--mode", "--kv-mode", metavar="MODE", help="How codes are found. Default: trellis."),
    ] = None,
    context: Annotated[
        str | None, typer.Option(metavar="N", help="Tokens of the text, e.g. 8192 or 32k. Default: up to 4,096.")
    ] = None,
    questions: Annotated[
        int, typer.Option(metavar="N", min=0, help="Questions about facts told far back; 0: none.")
    ] = 20,
    prefill_step_size: options.PrefillStepSize = 2048,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the figures too; needs mlx-gemma4\\[plot].")
    ] = None,
) -> None:
    """Compare compressed caches with the exact one on your model, and recommend --kv-bits."""
    wanted = settings(bits, mode)
    length = options.token_count(context, "--context") if context is not None else None
    if plot is not None:
        check_plot(plot)
    written = _read(text) if text is not None else None

    from mlx_gemma4 import kv_check, kv_sample

    from . import loader

    loaded, tokenizer = loader.open_model(model, revision=revision, dtype=dtype)
    # Questions are about so long, give or take a sentence, and leave room for an answer.
    tokens = length or min(kv_sample.DEFAULT_CONTEXT, loaded.text_config.max_position_embeddings - 128)
    if written is None:
        passage = kv_sample.sample_passage(tokenizer, tokens)
    else:
        passage = kv_sample.text_passage(tokenizer, written, length)
    asked = kv_sample.recall_questions(tokenizer, tokens, questions) if questions else None
    with _progress() as tell:
        report = kv_check.check(loaded, tokenizer, wanted, passage, asked, step=prefill_step_size, progress=tell)
    if plot is not None:
        draw(report, model, plot)
    if as_json:
        print(json.dumps(record(report, model), ensure_ascii=False), flush=True)
        return
    show(report, model)


def settings(text: str, mode: str | None = None) -> dict[str, KvBits]:
    """ "4,3.5,4/3" -> what each asks for, in order; "4/3" is 4 bits for keys and 3 for values. Raises UsageError."""
    out = {}
    for part in text.split(","):
        name = part.strip()
        one, slash, other = name.partition("/")
        if not one or (slash and not other):
            raise UsageError(f"--bits takes numbers with commas between them, such as 4,3.5 or 4/3, not {text!r}")
        keys = number(one, "--bits")
        values = number(other, "--bits") if slash else keys
        if (keys == PLAIN) != (values == PLAIN):
            raise UsageError(f"--bits {name}: keys and values are compressed together; give both below {PLAIN}")
        out[name] = request(None, keys, values, None, mode, option="--kv-bits")
    return out


def check_plot(path: Path) -> None:
    """Refuses what could not be drawn, before any work is done."""
    if path.suffix.lower() != ".png":
        raise UsageError(f"--plot writes a PNG; name a file that ends in .png, not {path.name}")
    if not path.parent.is_dir():
        raise UsageError(f"--plot: there is no folder {path.parent}")
    if importlib.util.find_spec("matplotlib") is None:
        raise Gemma4Error("--plot needs matplotlib: pip install 'mlx-gemma4[plot]'")


def record(report: Report, model: str) -> dict[str, object]:
    """The report as JSON takes it: shares and nats as numbers, sizes in bytes."""
    from mlx_gemma4 import kv_check

    best = report.recommended
    limits = {"kl_mean": kv_check.MOST_KL, "top1": kv_check.LEAST_TOP1, "recall_lost": kv_check.MOST_LOST}
    return {
        "model": model,
        **{field.name: getattr(report, field.name) for field in dataclasses.fields(report) if field.name != "settings"},
        "settings": [dataclasses.asdict(m) | {"within_limits": report.within_limits(m)} for m in report.settings],
        "limits": limits,
        "recommended": None if best is None else best.name,
    }


def show(report: Report, model: str) -> None:
    """The table and the recommendation: with rich on a terminal, else as plain columns."""
    context = f"{report.context:,} tokens, of which {report.scored:,} are scored"
    lines = [f"{model}: {context}" + (f"; {report.questions} questions" if report.questions else "")]
    rows = [_exact_row(report), *(_row(report, m) for m in report.settings)]
    if wants_style(sys.stdout):
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, header_style="bold", pad_edge=False)
        for i, title in enumerate(HEAD):
            table.add_column(title, justify="left" if i == 0 else "right")
        best = report.recommended
        for row, m in zip(rows, [None, *report.settings], strict=True):
            table.add_row(*row, style="bold" if m is not None and m is best else "dim" if m is None else "")
        console = Console(highlight=False)
        console.print(lines[0])
        console.print(table)
        console.print(recommendation(report))
        return
    widths = [max(len(row[i]) for row in [HEAD, *rows]) for i in range(len(HEAD))]
    for row in [HEAD, *rows]:
        cells = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    print("\n".join([*lines, recommendation(report)]), flush=True)


def recommendation(report: Report) -> str:
    """One line: the setting to take and why, or that there is none."""
    from mlx_gemma4 import kv_check

    limits = f"KL mean at most {kv_check.MOST_KL:g}, top-1 at least {kv_check.LEAST_TOP1:.0%}"
    if report.questions:
        limits += f", recall at most {kv_check.MOST_LOST:.0%} below exact"
    best = report.recommended
    if best is None:
        return f"Recommendation: keep 16 bits; none of these settings is within the limits ({limits})."
    if best.bits.keys == best.bits.values:
        flags = f"--kv-bits {best.bits.keys:g}"
    else:
        flags = f"--kv-key-bits {best.bits.keys:g} --kv-value-bits {best.bits.values:g}"
    return f"Recommendation: {flags}, the smallest cache within the limits ({limits})."


def draw(report: Report, model: str, path: Path) -> None:
    """Two panels over the settings: divergence, and the shares of equal first choices and right answers."""
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [m.name for m in report.settings]
    at = range(len(names))
    for label, values in (
        ("mean", [m.agreement.kl_mean for m in report.settings]),
        ("99th percentile", [m.agreement.kl_p99 for m in report.settings]),
    ):
        left.plot(at, values, marker="o", label=label)
    # A setting of 16 bits has no divergence at all.
    left.set_yscale("symlog", linthresh=1e-5)
    left.set_ylabel("KL(exact || compressed), nats")
    right.plot(at, [100 * m.agreement.top1 for m in report.settings], marker="o", label="same first choice")
    if report.questions:
        recall = [100 * (m.recall or 0) / report.questions for m in report.settings]
        right.plot(at, recall, marker="s", label="facts recalled")
        right.axhline(100 * (report.exact_recall or 0) / report.questions, linestyle=":", label="recalled, exact cache")
    right.set_ylabel("percent")
    # A difference of one token in a thousand should not fill the panel.
    right.set_ylim(min(90, right.get_ylim()[0]), 101)
    for axes in (left, right):
        axes.set_xticks(list(at), [f"{m.name}\n{status.size(m.cache_bytes)}" for m in report.settings])
        axes.set_xlabel("bits, and the cache's size")
        axes.legend()
    figure.suptitle(f"{model}, {report.context:,} tokens")
    figure.savefig(path, dpi=150)


def _exact_row(report: Report) -> list[str]:
    perplexity = f"{report.settings[0].agreement.exact_perplexity:.3f}"
    right = "-" if report.exact_recall is None else f"{report.exact_recall}/{report.questions}"
    return ["exact", "", status.size(report.exact_bytes), "", "", "", perplexity, right]


def _row(report: Report, m: Measured) -> list[str]:
    a = m.agreement
    return [
        m.name,
        f"{m.real_bits:.2f}",
        status.size(m.cache_bytes),
        f"{a.kl_mean:.5f}",
        f"{a.kl_p99:.4f}",
        f"{a.top1:.1%}",
        f"{a.perplexity:.3f}",
        "-" if m.recall is None else f"{m.recall}/{report.questions}",
    ]


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A function that shows what is being done, on the last line of a terminal and nowhere else."""
    with ExitStack() as stack:

        def tell(what: str) -> None:
            stack.close()
            stack.enter_context(status.busy(what))

        yield tell


def _read(path: Path) -> str:
    """The text of a file. Raises UsageError when it is not UTF-8, OSError when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise UsageError(f"{path} is not UTF-8 text (byte {e.start}); convert it first") from None
