"""What the towers made of pictures and sounds, kept so that the same one is not computed twice.

Owns the byte budget and which entry goes first. Keys are content hashes (`prompt.Run.key`), so it does not matter where
a picture came from; one store serves one model.
"""

from collections import OrderedDict

import mlx.core as mx

DEFAULT_BYTES = 256 << 20  # some 90 pictures of 280 tokens for 31B in bfloat16


class FeatureStore:
    """Embeddings [n, E] by key; the least recently used go when there are more than `max_bytes`.

    >>> store = FeatureStore(64 << 20)
    >>> store.put(key, features)
    >>> store.get(key)        # None when it is not there any more
    """

    def __init__(self, max_bytes: int = DEFAULT_BYTES):
        self.max_bytes = max_bytes
        self._entries: OrderedDict[int, mx.array] = OrderedDict()

    def get(self, key: int) -> mx.array | None:
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, key: int, features: mx.array) -> None:
        """Keeps `features`, unless they alone are more than the budget."""
        if features.nbytes > self.max_bytes:
            return
        self._entries[key] = features
        self._entries.move_to_end(key)
        while self.nbytes > self.max_bytes:
            self._entries.popitem(last=False)

    def clear(self) -> None:
        self._entries.clear()

    @property
    def nbytes(self) -> int:
        return sum(features.nbytes for features in self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)
