"""Attention on codes, the Metal source: against float32, what it reads, and what it leaves out."""

import math
from contextlib import nullcontext
from itertools import product

import metal_cpu
import mlx.core as mx
import numpy as np
import pytest
from coded_attention import Case, case, close

from mlx_gemma4.errors import UsageError
from mlx_gemma4.kernels import backend
from mlx_gemma4.kernels.reference.flash_attention import MASKED
from mlx_gemma4.kernels.turboquant import BITS, MODES, decode
from mlx_gemma4.kernels.turboquant_attention import DECODE_QUERIES, SPLIT_POSITIONS, TILE, CodedKeys

KERNEL = "gemma4_turboquant_attention"


def check(c: Case, metal) -> None:
    """The kernel ran, and its result is as near to float32 as that of plain operations."""
    found = c.attend()
    mx.eval(found)
    assert backend.status()["turboquant_attention"] == "metal"
    close(c, found)
    if metal is not None:
        assert [fault for report in metal.reports for fault in report.errors] == []
        assert all(report.unwritten == 0 for report in metal.reports)


def traffic(metal):
    return next(report for report in metal.reports if report.name == KERNEL).buffers


@pytest.mark.parametrize(("mode", "bits"), [*product(MODES, BITS), ("paper", 1)])
def test_every_format(metal, mode, bits):
    check(case(mode=mode, bits=bits), metal)


@pytest.mark.parametrize(
    ("bits", "value_bits"), [(3.5, 3.5), (4, 2), (2, 4)], ids=["one table", "narrower values", "wider values"]
)
def test_keys_and_values(metal, bits, value_bits):
    check(case(bits=bits, value_bits=value_bits, one_vector=False, kv_heads=2), metal)


@pytest.mark.parametrize("width", [32, 64, 128, 256, 512])
def test_every_width(metal, width):
    check(case(width=width, rotary_width=max(32, width // 4)), metal)


@pytest.mark.parametrize("ratio", [1, 2, 4, 8, 16])
def test_query_heads_per_kv_head(metal, ratio):
    check(case(heads=2 * ratio, kv_heads=2), metal)


@pytest.mark.parametrize("queries", [2, 3, DECODE_QUERIES])
@pytest.mark.parametrize(("width", "heads"), [(64, 8), (512, 4)])
def test_several_queries(metal, width, heads, queries):
    """Up to 64 rows of one KV head, in one threadgroup at 64 coordinates and in two at 512."""
    check(case(queries=queries, heads=heads, width=width, rotary_width=width // 2), metal)


EDGES = {
    "one position": {"length": 1},
    "a whole tile": {"length": TILE},
    "one into the next tile": {"length": TILE + 1},
    "block boundary": {"start": 16, "length": 64},
    "one position after the sinks": {"start": 16, "length": 17},
    "capacity boundary": {"length": 64, "capacity": 64},
    "capacity of one": {"length": 1, "capacity": 1},
    "ragged batch": {"length": 70, "first": [0, 33, 69]},
    "ragged batch after the sinks": {"start": 16, "length": 70, "first": [3, 16, 40]},
    "a row sees nothing": {"length": 40, "first": [0, 40]},
    "ragged keys and values": {"length": 40, "first": [11, 0], "one_vector": False},
    "most threadgroup memory": {"queries": 8, "one_vector": False, "bits": 4, "value_bits": 2},
    "no rotary": {"length": 40, "rotary_width": None},
    "float16": {"length": 40, "dtype": mx.float16},
    "bfloat16": {"length": 40, "dtype": mx.bfloat16, "one_vector": False, "bits": 4},
}


@pytest.mark.parametrize("edge", EDGES.values(), ids=EDGES.keys())
def test_edges(metal, edge):
    check(case(**edge), metal)


@pytest.mark.parametrize("one_vector", [True, False], ids=["one vector", "keys and values"])
@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_splits_in_any_order(metal, order, one_vector):
    """Three splits, the first of them unseen by the second row, whatever order threads run in."""
    length = 3 * SPLIT_POSITIONS - 40
    c = case(heads=2, length=length, first=[7, SPLIT_POSITIONS + 60], one_vector=one_vector, width=32)
    with nullcontext(metal) if metal is None else metal_cpu.session(order=order) as session:
        check(c, session)
    if session is not None:
        assert [report.name for report in session.reports] == [KERNEL, "gemma4_merge_partials"]


# ---- bytes


@pytest.mark.parametrize(
    "shape",
    [{"heads": 8, "width": 512, "rotary_width": 128}, {"heads": 8, "width": 256, "one_vector": False, "kv_heads": 2}],
    ids=["one vector", "keys and values"],
)
def test_bytes_read(metal, shape):
    """Each byte of the codes seen, and hardly anything else: at most 1.05 times the codes, queries and output."""
    start, length = 16, 592
    c = case(start=start, length=length, capacity=700, dtype=mx.float16, **shape)
    check(c, metal)
    if metal is None:
        return
    rows = [rows for rows in (c.keys, c.values, c.rotary) if rows is not None]
    scales = 2 * sum(row.scales is not None for row in rows)
    per_position = sum(4 * row.codec.words for row in rows) + scales
    seen = c.keys.codes.shape[1] * (length - start) * per_position
    buffers = traffic(metal)
    codes = sum(buffers[name].read_unique for name in ("keys", "key_scales", "other", "other_scales"))
    assert codes == seen
    every = sum(buffer.read_unique for buffer in buffers.values())
    query_bytes = c.q.nbytes + (0 if c.q_rotary is None else c.q_rotary.nbytes)
    assert every <= 1.05 * (seen + query_bytes + buffers["out"].size)


# ---- values left out


def levels(scores: np.ndarray, width: int = 64) -> Case:
    """Keys and values such that the one query row has exactly these scores: one key row, with different scales."""
    c = case(heads=1, width=width, one_vector=False, length=len(scores), capacity=len(scores))
    codes = mx.broadcast_to(c.keys.codes[:, :, :1], c.keys.codes.shape)
    key = decode(c.keys.codec, codes[:, :, :1])
    c.q = key / (mx.square(key).sum() * c.keys.codec.key_gain)
    c.keys = CodedKeys(c.keys.codec, codes, mx.array(scores.astype(np.float16))[None, None])
    return c


def value_bytes_read(c: Case) -> int:
    with metal_cpu.session() as session:
        mx.eval(c.attend())
        return traffic(session)["other"].read_unique


NEGLIGIBLE = 1e-6  # as in the source
POSITIONS = 8 * TILE


@pytest.mark.parametrize(("share", "tiles_read"), [(0.8, 1), (1.25, 8)], ids=["just below", "just above"])
def test_negligible_tiles(metal, share, tiles_read):
    """One position holds nearly all weight; every other tile has this share of the limit. Left out or not, the result
    is right to the limit times the number of tiles, and the log-sum-exp counts every position."""
    scores = np.full(POSITIONS, 12.0 + math.log(share * NEGLIGIBLE / TILE))
    scores[0] = 12.0
    c = levels(scores)
    assert c.values is not None and c.keys.scales is not None
    out, lse = c.attend()
    # In float64: these weights would not change a sum of float32.
    weights = np.exp(np.array(c.keys.scales).astype(np.float64)[0, 0])
    values = np.array(decode(c.values.codec, c.values.codes, c.values.scales))[0, 0].astype(np.float64)
    truth = weights @ values / weights.sum() * c.values.codec.value_gain
    error = np.abs(np.array(out)[0, 0, 0] - truth).max() / np.abs(truth).max()
    assert error <= (POSITIONS / TILE * NEGLIGIBLE if tiles_read == 1 else 0) + 1e-6
    assert abs(lse.item() - np.log(weights.sum())) <= 2e-6
    if metal is not None:
        assert value_bytes_read(c) == tiles_read * TILE * 4 * c.values.codec.words


def test_a_later_peak_is_not_left_out(metal):
    """Tiles are weighed against the sum so far, so that a late heavy position takes over."""
    scores = np.full(POSITIONS, -8.0)
    scores[-1] = 12.0
    c = levels(scores)
    check(c, metal)
    if metal is not None:
        assert c.values is not None
        assert value_bytes_read(c) == POSITIONS * 4 * c.values.codec.words


def test_one_row_keeps_a_tile_for_all(metal):
    """Two query rows of one KV head, of which one has its weight at the start and the other at the end."""
    scores = np.full(POSITIONS, -8.0)
    scores[0] = 12.0
    c = levels(scores)
    c.q = mx.concatenate([c.q, -c.q], axis=1)
    check(c, metal)
    if metal is not None:
        assert c.values is not None
        assert value_bytes_read(c) == POSITIONS * 4 * c.values.codec.words


# ---- which way


@pytest.mark.parametrize(
    ("shape", "kernel"),
    [
        ({"queries": DECODE_QUERIES, "heads": 8}, "turboquant_attention"),
        ({"queries": DECODE_QUERIES, "heads": 9}, "turboquant_decode"),
        ({"queries": DECODE_QUERIES + 1, "heads": 1}, "turboquant_decode"),
    ],
    ids=["64 rows", "72 rows", "nine queries"],
)
def test_prefill_decodes_tiles(metal, shape, kernel):
    c = case(**shape)
    close(c, c.attend())
    if metal is not None:
        assert {report.name for report in metal.reports} == {f"gemma4_{kernel}"}


def test_nothing_to_see(metal):
    out, lse = case().attend(20, 20)
    assert not out.any() and (lse == MASKED).all()


def test_rotary_too_narrow_is_refused(metal):
    with pytest.raises(UsageError, match="rotary codes of width 32 beside keys of width 512"):
        case(width=512, rotary_width=32).attend()


def mutation_check() -> None:
    """One vector, and keys and values apart, over several tiles."""
    check(case(length=100), None)
    check(case(length=100, one_vector=False, kv_heads=2), None)
