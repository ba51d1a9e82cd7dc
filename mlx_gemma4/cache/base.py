"""What every layer cache offers, and the views through which layers attend.

A layer computes what is to be remembered, hands it to its cache and gets a view; the view answers the queries of this
step:

    view = cache.append(keys, values)      # [B, H_kv, L, D] each
    out = view.attend(q)                   # [B, H, L, D] -> same

A sharing layer keeps its producer's view and attends to it with its own queries, so it has no cache. Each class owns
its format, its bytes and its worked example; the arithmetic of attention is in `mlx_gemma4.kernels`.

Positions count tokens fed since the start, padding included. Rows of a batch may begin with padding
(`left_padding`, one int per row): padded positions are stored but never seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, Protocol

import mlx.core as mx

from ..errors import Gemma4Error


class View(Protocol):
    """What the queries of one step may see."""

    def attend(self, q: mx.array, scale: float = 1.0) -> mx.array:
        """q [B, H, L, D], the step's positions in order -> [B, H, L, D]."""
        ...


class WindowView(View, Protocol):
    """What a step of several positions may see in a sliding layer, where a picture's positions see each other."""

    def attend(self, q: mx.array, scale: float = 1.0, reach: mx.array | None = None) -> mx.array:
        """As `View.attend`; reach int32 [B, L] from `sliding_attention.block_reach`."""
        ...


@dataclass(frozen=True)
class Snapshot:
    """A point one cache can go back to. Holds references, no copies."""

    offset: int
    stamp: int
    arrays: tuple[mx.array, ...] = ()


class LayerCache:
    """Common to all kinds. Subclasses name their arrays in `_ARRAYS`: [B, H_kv, capacity, D] each, None when empty."""

    kind: ClassVar[str]
    _ARRAYS: ClassVar[tuple[str, ...]]

    def __init__(self, left_padding: Sequence[int] | None = None):
        self.offset = 0
        self.left_padding = tuple(left_padding) if left_padding is not None and any(left_padding) else None
        # Truncations since the start as (stamp, position): a snapshot beyond a later truncation is gone.
        self._truncations: list[tuple[int, int]] = []

    @property
    def first_visible(self) -> mx.array | None:
        return None if self.left_padding is None else mx.array(self.left_padding)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for what is remembered."""
        return sum(a.nbytes for a in self._arrays())

    def contents(self) -> dict[str, mx.array]:
        """The arrays allocated, by the names they have in a file."""
        named = ((name, getattr(self, name)) for name in self._ARRAYS)
        return {name: a for name, a in named if a is not None}

    def _arrays(self) -> list[mx.array]:
        return list(self.contents().values())

    def saved(self) -> dict[str, mx.array]:
        """As `contents`, without what lies beyond the last position."""
        return self.contents()

    def settings(self) -> dict[str, Any]:
        """What a saved cache and the one it is loaded into must agree on."""
        return {"kind": self.kind}

    def place(self) -> dict[str, Any]:
        """Where the cache stands, beside its arrays; what `settle` takes."""
        return {"offset": self.offset, "left_padding": self.left_padding}

    def settle(self, contents: dict[str, mx.array], place: dict[str, Any]) -> None:
        """Becomes the cache whose `contents` and `place` these are; for a cache that is still empty."""
        for name in self._ARRAYS:
            setattr(self, name, contents.get(name))
        self._stand_at(place)

    def take_over(self, other: "LayerCache") -> None:
        """Becomes what `other`, of the same settings, is; for a cache that is still empty. Its snapshots serve both."""
        self.settle(other.contents(), other.place())
        self._truncations = list(other._truncations)

    def _stand_at(self, place: dict[str, Any]) -> None:
        self.offset = place["offset"]
        self.left_padding = tuple(place["left_padding"]) if place["left_padding"] else None

    @property
    def state(self) -> list[mx.array]:
        """What must be evaluated before the next chunk; the name mlx-lm's generation loop asks for."""
        return self._arrays()

    def empty(self) -> bool:
        return self.offset == 0

    def size(self) -> int:
        """Positions held."""
        raise NotImplementedError

    def is_trimmable(self, n: int = 1) -> bool:
        """Whether the last n positions can be taken back."""
        raise NotImplementedError

    def cut_point(self, position: int) -> int:
        """The last position up to `position` to which the cache can be shortened; 0 when there is none."""
        if position >= self.offset:
            return self.offset
        return position if self.is_trimmable(self.offset - position) else 0

    def trim(self, n: int) -> int:
        """Takes back the last n positions. Returns n, or 0 if they cannot be taken back (nothing is changed then)."""
        n = min(n, self.offset)
        if n <= 0 or not self.is_trimmable(n):
            return 0
        self.offset -= n
        self._truncations.append((len(self._truncations), self.offset))
        return n

    def snapshot(self) -> Snapshot:
        """A point to come back to; O(1)."""
        raise NotImplementedError

    def restore(self, snapshot: Snapshot) -> None:
        """Back to `snapshot`, exactly. Raises Gemma4Error if what it held has been overwritten since."""
        raise NotImplementedError

    def _check_alive(self, snapshot: Snapshot) -> None:
        later = self._truncations[snapshot.stamp :]
        if snapshot.offset > self.offset or any(position < snapshot.offset for _, position in later):
            self._gone(snapshot)

    def _gone(self, snapshot: Snapshot) -> NoReturn:
        raise Gemma4Error(f"the snapshot at position {snapshot.offset} was overwritten; prefill the prompt again")

    def status(self) -> str:
        """What was applied, for people: precision, form and size."""
        arrays = self._arrays()
        dtype = str(arrays[0].dtype).removeprefix("mlx.core.") if arrays else "empty"
        return f"{self.kind}, {dtype}"


def room_for(old: mx.array | None, shape: tuple[int, ...], dtype: mx.Dtype, capacity: int) -> mx.array:
    """`old` [B, H, T, ...] enlarged along T to `capacity`, zeros beyond what it held; `shape` is that of new rows."""
    if old is None:
        return mx.zeros((*shape[:2], capacity, *shape[3:]), dtype)
    extra = mx.zeros((*old.shape[:2], capacity - old.shape[2], *old.shape[3:]), old.dtype)
    return mx.concatenate([old, extra], axis=2)


def write_at(buffer: mx.array, values: mx.array, start: int) -> mx.array:
    """`buffer` with `values` [B, H, L, ...] at positions start .. start+L; in place when nothing else holds it."""
    # A new name for the same array: assigning to the one passed in would change it for a snapshot that holds it, too.
    buffer = buffer[:]
    buffer[:, :, start : start + values.shape[2]] = values
    return buffer
