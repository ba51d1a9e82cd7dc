"""Images in sliding layers: an image's positions see each other in both directions, no further back than the window."""

from contextlib import nullcontext

import metal_cpu
import mlx.core as mx
import numpy as np
import pytest
from optional import optional
from sliding_truth import check, draw, seen

from mlx_gemma4.kernels import backend
from mlx_gemma4.kernels.reference import sliding_prefill as reference
from mlx_gemma4.kernels.sliding_attention import attend_chunk, block_reach

WINDOW = 20


def positions(*runs: tuple[int, int]) -> list[int]:
    """Block numbers from (number, length) pairs."""
    return [number for number, length in runs for _ in range(length)]


def run(blocks: list[list[int]], *, past=0, window=WINDOW, first=None, dtype=mx.float32, G=2) -> None:
    """The positions after `past` as one chunk, the ones before as keys."""
    numbers = np.array(blocks)
    B, T = numbers.shape
    L = T - past
    q, keys, values = draw(T, dtype, (B, G, L, 64), (B, 1, T, 64), (B, 1, T, 64))
    k_start = max(0, past - window + 1)
    found = attend_chunk(
        q,
        keys[:, :, k_start:],
        values[:, :, k_start:],
        scale=0.2,
        q_start=past,
        k_start=k_start,
        window=window,
        first_visible=None if first is None else mx.array(first),
        reach=block_reach(mx.array(numbers[:, past:]), past),
    )
    mask = seen(np.arange(past, T), np.arange(T), window, first, numbers[:, past:], numbers)
    check(found, [q, keys, values], mask, 0.2)


CASES = {
    "text only": ([positions((-1, 30))], {}),
    "image in the middle": ([positions((-1, 9), (0, 12), (-1, 9))], {}),
    "image is all there is": ([positions((0, 30))], {}),
    "two images side by side": ([positions((-1, 3), (0, 10), (1, 12), (-1, 5))], {}),
    "image longer than the window": ([positions((-1, 5), (0, 45), (-1, 5))], {}),
    "image ends at the window's edge": ([positions((0, 20), (-1, 25))], {}),
    "image crosses the window's edge": ([positions((-1, 3), (0, 21), (-1, 25))], {}),
    "image crosses the chunk's start": ([positions((-1, 10), (0, 25), (-1, 5))], dict(past=20)),
    "image of the chunk before": ([positions((-1, 10), (0, 10), (-1, 15))], dict(past=20)),
    "image ends the chunk": ([positions((-1, 10), (0, 20))], dict(past=5)),
    "short chunk": ([positions((-1, 10), (0, 12), (-1, 1))], dict(past=18)),
    "rows with different images": (
        [positions((-1, 9), (0, 12), (-1, 14)), positions((0, 30), (-1, 5)), positions((-1, 35))],
        {},
    ),
    "padding before an image": (
        [positions((-1, 9), (0, 12), (-1, 9)), positions((-1, 2), (0, 20), (-1, 8))],
        dict(first=[4, 2]),
    ),
}


@pytest.mark.parametrize(("blocks", "options"), CASES.values(), ids=CASES.keys())
def test_kernel(metal, blocks, options):
    run(blocks, **options)
    if metal is not None:
        assert metal.last.name.endswith("sliding_prefill")
        assert metal.last.errors == [] and metal.last.unwritten == 0


@pytest.mark.parametrize("tile", [1 << 22, 300], ids=["one tile", "tiles of a few queries"])
@pytest.mark.parametrize(("blocks", "options"), CASES.values(), ids=CASES.keys())
def test_reference(monkeypatch, blocks, options, tile):
    monkeypatch.setattr(reference, "TILE_ELEMENTS", tile)
    with backend.forced("reference"):
        run(blocks, **options)


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_execution_order(metal, order):
    with nullcontext() if metal is None else metal_cpu.session(order=order, seed=4):
        run([positions((-1, 9), (0, 25), (-1, 9))], G=4)


def test_half_precision(metal):
    run([positions((-1, 9), (0, 25), (-1, 9))], dtype=mx.bfloat16)


def test_keys_ahead_of_a_text_tile_are_not_read(metal):
    """Sixteen positions of text before an image: their tile stops at the text."""
    run([positions((-1, 16), (0, 16))])
    if metal is not None:
        assert metal.last.buffers["keys"].read == (16 + 32) * 64 * 4


REACH = {
    "text": ([-1, -1, -1], [1, 2, 3]),
    "image": ([-1, 0, 0, 0, -1], [1, 4, 4, 4, 5]),
    "number 0 is an image, as in transformers": ([0, 0], [2, 2]),
    "neighbours": ([3, 3, 4, 4], [2, 2, 4, 4]),
    "one number twice is two images": ([7, 7, -1, 7], [2, 2, 3, 4]),
    "one position": ([5], [1]),
}


@pytest.mark.parametrize(("blocks", "ends"), REACH.values(), ids=REACH.keys())
def test_reach(blocks, ends):
    assert block_reach(mx.array([blocks]), 0).tolist() == [ends]
    assert block_reach(mx.array([blocks, [-1] * len(blocks)]), 100).tolist() == [
        [100 + end for end in ends],
        [101 + i for i in range(len(blocks))],
    ]


# transformers 5.23, create_masks_for_vision_model(...)["sliding_attention"] for window 4 and the token types below.
TYPES = [0, 0, 1, 1, 1, 1, 1, 1, 0, 1, 1, 0]
THEIRS = """
1...........
11..........
11111111....
11111111....
.1111111....
..111111....
...11111....
....1111....
.....1111...
......11111.
.......1111.
........1111
""".split()


def rows_of(mask) -> list[str]:
    return ["".join(".1"[int(x)] for x in row) for row in np.asarray(mask)]


def ours() -> list[str]:
    """The same mask from `block_reach` and the kernels' rule."""
    blocks = np.cumsum([a == 1 and (i == 0 or TYPES[i - 1] != 1) for i, a in enumerate(TYPES)]) - 1
    blocks = np.where(np.array(TYPES) == 1, blocks, -1)
    reach = np.array(block_reach(mx.array(blocks[None]), 0))[0]
    p, t = np.arange(12)[:, None], np.arange(12)[None]
    return rows_of((t > p - 4) & (t < reach[:, None]))


def test_mask_of_transformers():
    assert ours() == THEIRS


def test_mask_of_transformers_live():
    torch = optional("torch")
    theirs = optional("transformers.models.gemma4.modeling_gemma4")
    configuration = optional("transformers.models.gemma4.configuration_gemma4")
    config = configuration.Gemma4TextConfig(
        num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], sliding_window=4
    )
    config._attn_implementation = "eager"
    blocks = theirs.get_block_sequence_ids_for_mask(torch.tensor([TYPES]), "cpu")
    masks = theirs.create_masks_for_vision_model(
        config, torch.zeros(1, 12, 8), torch.ones(1, 12, dtype=torch.long), None, torch.arange(12)[None], blocks
    )
    assert ours() == rows_of(masks["sliding_attention"][0, 0] == 0)
