"""A model that says what a test tells it to, over caches that remember every id they were fed.

Owns the stand-in for tests about bookkeeping: what was computed, what is in the cache, who says what when. Numbers
of the real graph are other tests' business.
"""

from types import SimpleNamespace

import mlx.core as mx

from mlx_gemma4.cache import LayerCache, Snapshot
from mlx_gemma4.errors import Gemma4Error


class Recorder(LayerCache):
    """Holds ids. window: how many positions can be trimmed from, as in a sliding ring; None: all."""

    kind = "recorder"
    _ARRAYS = ()

    def __init__(self, window=None):
        super().__init__()
        self.ids: list[int] = []
        self.window = window

    def append(self, ids):
        self.ids += ids
        self.offset = len(self.ids)

    def is_trimmable(self, n=1):
        return self.window is None or self.offset <= self.window

    def trim(self, n):
        done = super().trim(n)
        self.ids = self.ids[: self.offset]
        return done

    def snapshot(self):
        return Snapshot(self.offset, 0, (mx.array(self.ids, mx.int32),))

    def _check_alive(self, snapshot):
        pass

    def restore(self, snapshot):
        self.ids = snapshot.arrays[0].tolist()
        self.offset = len(self.ids)


class ScriptedModel:
    """Answers turn n with `replies[n]` (text, special tokens allowed), then <turn|>.

    fed: every call's ids, in order. before: called with the number of the call about to be computed.
    """

    def __init__(self, tokenizer, replies, window=8, context=100_000):
        self.tokenizer = tokenizer
        self.replies = replies
        self.window = window
        self.text_config = SimpleNamespace(max_position_embeddings=context)
        self.fed: list[list[int]] = []
        self.caches: list[list[Recorder]] = []
        self.before = lambda call: None

    def make_cache(self, kv_bits=None):
        self.kv_bits = kv_bits
        self.caches.append([Recorder(self.window), Recorder()])
        return self.caches[-1]

    def __call__(self, tokens, cache):
        self.before(len(self.fed))
        ids = tokens[0].tolist()
        self.fed.append(ids)
        for c in cache:
            c.append(ids)
        if cache[0].ids != cache[1].ids:
            raise Gemma4Error("layers disagree")
        logits = mx.full((1, len(ids), 512), -20.0)
        logits[:, -1, self._next(cache[0].ids)] = 20.0
        return logits

    def _next(self, ids):
        encode = lambda text: self.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
        turn, empty = encode("<|turn>model\n"), encode("<|channel>thought\n<channel|>")
        starts = [i for i in range(len(ids)) if ids[i : i + len(turn)] == turn]
        if not starts:
            return 0
        said = ids[starts[-1] + len(turn) :]
        if said[: len(empty)] == empty:
            said = said[len(empty) :]
        reply = [*encode(self.replies[min(len(starts), len(self.replies)) - 1]), 106]
        return reply[len(said)] if len(said) < len(reply) else 0
