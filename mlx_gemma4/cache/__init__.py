"""Layer caches: one small class per way to remember. `base.py` says what they share.

| class          | layers                          | remembers                                   |
|----------------|---------------------------------|---------------------------------------------|
| SlidingCache   | sliding                         | the last `window` keys and values, a ring   |
| GlobalCache    | global, E2B/E4B                 | all keys and values                         |
| OneVectorCache | global, 26B-A4B/31B (K=V)       | one vector per position: half the bytes     |
| (none)         | the last layers of E2B/E4B      | nothing: they read their producer's         |

With `kv_bits` below 16 global layers keep codes, with `kv_bits_sliding` rings do (`blocks.py` says of which positions):

| class                    | instead of     |
|--------------------------|----------------|
| CompressedCache          | GlobalCache    |
| CompressedOneVectorCache | OneVectorCache |
| CompressedSlidingCache   | SlidingCache   |

The functions below act on a model's whole list of caches; `files.py` saves and loads one.
"""

from collections.abc import Sequence

from .base import LayerCache, Snapshot, View, WindowView
from .blocks import BlockSnapshot
from .compressed import CompressedCache
from .compressed_one_vector import CompressedOneVectorCache
from .compressed_sliding import CompressedSlidingCache
from .files import fill, load, open_saved, save
from .full import GlobalCache
from .one_vector import KeyForm, OneVectorCache
from .sliding import ChunkView, SlidingCache

__all__ = [
    "BlockSnapshot",
    "ChunkView",
    "CompressedCache",
    "CompressedOneVectorCache",
    "CompressedSlidingCache",
    "GlobalCache",
    "KeyForm",
    "LayerCache",
    "OneVectorCache",
    "SlidingCache",
    "Snapshot",
    "View",
    "WindowView",
    "can_trim",
    "cut_point",
    "fill",
    "load",
    "nbytes",
    "open_saved",
    "restore",
    "save",
    "snapshot",
    "status",
    "trim",
]


def nbytes(caches: Sequence[LayerCache]) -> int:
    return sum(c.nbytes for c in caches)


def can_trim(caches: Sequence[LayerCache], n: int) -> bool:
    return all(c.is_trimmable(n) for c in caches)


def cut_point(caches: Sequence[LayerCache], position: int) -> int:
    """The last position up to `position` to which every layer can be shortened; 0 when there is none."""
    while True:
        found = min((c.cut_point(position) for c in caches), default=position)
        if found == position:
            return found
        position = found


def trim(caches: Sequence[LayerCache], n: int) -> int:
    """Takes back the last n positions of every layer, or of none. Returns n or 0."""
    if n <= 0 or not can_trim(caches, n):
        return 0
    for c in caches:
        c.trim(n)
    return n


def snapshot(caches: Sequence[LayerCache]) -> list[Snapshot]:
    return [c.snapshot() for c in caches]


def restore(caches: Sequence[LayerCache], snapshots: Sequence[Snapshot]) -> None:
    """All layers back to their snapshots. Raises Gemma4Error, before anything moves, if one is gone."""
    for c, s in zip(caches, snapshots, strict=True):
        c._check_alive(s)
    for c, s in zip(caches, snapshots, strict=True):
        c.restore(s)


def status(caches: Sequence[LayerCache]) -> list[str]:
    """One line per kind: how many layers, what was applied, bytes."""
    lines: dict[str, list[LayerCache]] = {}
    for c in caches:
        lines.setdefault(c.status(), []).append(c)
    return [f"{len(group)} x {text}: {nbytes(group):,} bytes" for text, group in lines.items()]
