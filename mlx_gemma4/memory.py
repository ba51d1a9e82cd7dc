"""Bytes: what the caches of a given context take, from shapes alone, without weights.

Owns the arithmetic that `gemma4 cache-size` prints; tests hold it against the arrays the caches really allocate.
"""

from .cache.blocks import SINKS, TAIL, coded_positions
from .cache.compressed_one_vector import rotated_width
from .cache.compressed_sliding import ring_capacity
from .config import TextConfig
from .kernels.turboquant import codec
from .kv_bits import EXACT, KvBits, check_reach
from .models.rope import Rope, table_length

# Global caches allocate in steps of this many positions.
STEP = 256
# Bytes of the scale of a coded row.
SCALE = 2


def cache_bytes(config: TextConfig, context: int, dtype_bytes: int = 2, bits: KvBits = EXACT) -> dict[str, int]:
    """Bytes by kind of cache after `context` prefilled positions of one sequence, plus "total".

    sliding  window positions at most, keys and values: 2 * min(context, window) * H_kv * D per layer
    global   keys and values, all positions (E2B, E4B): 2 * context * H_kv * D per layer
    one-vector   one vector per position (26B-A4B, 31B): context * H_kv * D per layer
    Global layers allocate in steps of 256 positions, rings likewise until the window is full; decoding past 4,096
    positions, global layers may be up to a sixteenth ahead of this. Layers that read another layer's keys and values
    have none.

    With `bits` below 16: the codes of whole blocks (a ring: of its window), and room for what stays exact. Codes are
    allocated as they come; decoding, they may be 256 positions or a 128th ahead. Raises UsageError as `make_cache`.
    """
    check_reach(bits, config)
    rounded = -(-context // STEP) * STEP
    coded = coded_positions(context)
    out = {"sliding": 0, "global": 0, "one-vector": 0}
    for i in range(config.first_shared_layer):
        heads, width = config.kv_heads_of(i), config.width_of(i)
        row = width * dtype_bytes
        if config.is_sliding(i):
            if bits.compresses_sliding:
                one = 2 * _code_bytes(width, bits.sliding, bits.mode) + SCALE
                slots = ring_capacity(config.sliding_window) if coded else 0
                out["sliding"] += heads * (slots * one + 2 * TAIL * row)
            else:
                out["sliding"] += heads * 2 * min(rounded, config.sliding_window) * row
        elif config.k_is_v(i):
            if bits.compresses_global:
                turned = rotated_width(Rope(config.rope_global, width).pairs)
                one = sum(_code_bytes(w, bits.values, bits.mode) for w in (width, turned)) + SCALE
                out["one-vector"] += heads * (coded * one + (SINKS + TAIL) * row)
            else:
                out["one-vector"] += heads * rounded * row
        elif bits.compresses_global:
            one = sum(_code_bytes(width, b, bits.mode) for b in (bits.keys, bits.values)) + SCALE
            out["global"] += heads * (coded * one + 2 * (SINKS + TAIL) * row)
        else:
            out["global"] += heads * 2 * rounded * row
    out["total"] = sum(out.values())
    return out


def _code_bytes(width: int, bits: float, mode: str) -> int:
    return 4 * codec(width, bits, mode).words


def plain_cache_bytes(config: TextConfig, context: int, dtype_bytes: int = 2) -> int:
    """The same at 16 bits with keys and values stored separately everywhere, as mlx-lm and mlx-vlm do."""
    ours = cache_bytes(config, context, dtype_bytes)
    return ours["total"] + ours["one-vector"]


def rotary_table_bytes(config: TextConfig, context: int, bits: KvBits = EXACT) -> int:
    """Bytes of the cos/sin table that the one-vector layers of a model share, whatever the number of conversations.

    Float32 cos and sin of each rotated pair, for a power of two of positions; 0 for models that store keys. Compressed
    layers use it for their first chunk only.
    """
    if not config.attention_k_eq_v:
        return 0
    rope = Rope(config.rope_global, config.global_head_dim)
    return 2 * 4 * rope.pairs * table_length(1 if bits.compresses_global else context)
