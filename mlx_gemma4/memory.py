"""Bytes: what the caches of a given context take, from shapes alone, without weights.

Owns the arithmetic that `gemma4 cache-size` prints; tests hold it against the arrays the caches really allocate.
"""

from .config import TextConfig
from .models.rope import Rope, table_length

# Global caches allocate in steps of this many positions.
STEP = 256


def cache_bytes(config: TextConfig, context: int, dtype_bytes: int = 2) -> dict[str, int]:
    """Bytes by kind of cache after `context` positions of one sequence, plus "total".

    sliding  window positions at most, keys and values: 2 * min(context, window) * H_kv * D per layer
    global   keys and values, all positions (E2B, E4B): 2 * context * H_kv * D per layer
    one-vector   one vector per position (26B-A4B, 31B): context * H_kv * D per layer
    Global layers allocate in steps of 256 positions, rings likewise until the window is full; decoding past 4,096
    positions, global layers may be up to a sixteenth ahead of this. Layers that read another layer's keys and values
    have none.
    """
    rounded = -(-context // STEP) * STEP
    out = {"sliding": 0, "global": 0, "one-vector": 0}
    for i in range(config.first_shared_layer):
        row = config.kv_heads_of(i) * config.width_of(i) * dtype_bytes
        if config.is_sliding(i):
            out["sliding"] += 2 * min(rounded, config.sliding_window) * row
        elif config.k_is_v(i):
            out["one-vector"] += rounded * row
        else:
            out["global"] += 2 * rounded * row
    out["total"] = sum(out.values())
    return out


def plain_cache_bytes(config: TextConfig, context: int, dtype_bytes: int = 2) -> int:
    """The same with keys and values stored separately everywhere, as mlx-lm and mlx-vlm do."""
    ours = cache_bytes(config, context, dtype_bytes)
    return ours["total"] + ours["one-vector"]


def rotary_table_bytes(config: TextConfig, context: int) -> int:
    """Bytes of the cos/sin table that the one-vector layers of a model share, whatever the number of conversations.

    Float32 cos and sin of each rotated pair, for a power of two of positions; 0 for models that store keys.
    """
    if not config.attention_k_eq_v:
        return 0
    rope = Rope(config.rope_global, config.global_head_dim)
    return 2 * 4 * rope.pairs * table_length(context)
