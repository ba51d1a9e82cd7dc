"""Metal source with one barrier deleted or weakened: what a test of that source must notice.

Owns the changes. Leaves running the changed source, and judging whether anybody noticed, to the caller.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .rewrite import without_comments

_BARRIER = re.compile(r"\b(?P<scope>threadgroup|simdgroup)_barrier\s*\((?P<flags>[^;{}]*)\)\s*;")


@dataclass(frozen=True)
class Mutant:
    """line: of the barrier in the original; change: what was done to it; source: the whole text after it."""

    line: int
    change: str
    source: str


def mutants(source: str) -> Iterator[Mutant]:
    """Every barrier of `source`: deleted, narrowed to its SIMD-group, and with each of its fences left out."""
    for match in _BARRIER.finditer(without_comments(source)):
        line = source.count("\n", 0, match.start()) + 1
        for change, statement in _weaker(match["scope"], match["flags"]):
            # The statement's own line ends stay, so that every other line keeps its number.
            statement += "\n" * match.group().count("\n")
            yield Mutant(line, change, source[: match.start()] + statement + source[match.end() :])


def _weaker(scope: str, flags: str) -> Iterator[tuple[str, str]]:
    yield "deleted", ";"
    if scope == "threadgroup":
        yield "for the SIMD-group only", f"simdgroup_barrier({flags.strip()});"
    fences = [flag.strip() for flag in flags.split("|")]
    for left_out in fences if len(fences) > 1 else ():
        kept = " | ".join(flag for flag in fences if flag != left_out)
        yield f"without {left_out.removeprefix('mem_flags::')}", f"{scope}_barrier({kept});"
