"""What the kernels `flash_decode` and `flash_prefill` ask of their inputs, and the arrays they are launched with.

Owns the list of shapes the Metal source serves (`refusal`) and the order of its inputs; sizes of blocks and grids are
the launchers'.
"""

import mlx.core as mx

from .key_form import KeyForm

# SIMD-groups own 64 dims each; a width of 512 takes 8 of them, 256 threads.
WIDTHS = (64, 128, 192, 256, 320, 384, 448, 512)
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
INPUTS = ("q", "keys", "values", "weight", "cosines", "sines", "first", "scale", "sizes")


def refusal(q: mx.array, keys: mx.array, values: mx.array | None, form: KeyForm | None) -> str | None:
    """Why the Metal kernels cannot take these arrays, in a few words; None when they can."""
    if q.shape[3] not in WIDTHS:
        return f"head width {q.shape[3]}"
    types = {x.dtype for x in (q, keys, values) if x is not None}
    if len(types) > 1 or q.dtype not in DTYPES:
        return "types " + ", ".join(sorted(str(t).removeprefix("mlx.core.") for t in types))
    if 0 in q.shape or 0 in keys.shape:
        return "no queries or no keys"
    if form is not None and form.rope.pairs % 8:
        return f"{form.rope.pairs} rotated pairs"
    return None


def kernel_inputs(
    q: mx.array,
    keys: mx.array,
    values: mx.array | None,
    form: KeyForm | None,
    first_visible: mx.array | None,
    scale: float,
    sizes: list[int],
    k_start: int,
) -> list[mx.array]:
    """The arrays named by INPUTS. Keys and values go in as they lie, strides and all: a cache is never copied.

    sizes are the kernel's, up to k_start.
    """
    if form is None:
        # Never read, but of a type: MLX passes arrays of 8 and more as `device`, as the real ones are.
        weight = cosines = sines = mx.array([0.0] * 8)
        pairs = 0
    else:
        weight, pairs = form.weight, form.rope.pairs
        cosines, sines = form.rope.table(keys.shape[2])
    # A segment may begin before position 0, and without padding all of it is seen.
    first = mx.array([min(k_start, 0)] * q.shape[0]) if first_visible is None else first_visible.astype(mx.int32)
    plain = keys if values is None else values
    return [q, keys, plain, weight, cosines, sines, first, mx.array(scale), mx.array([*sizes, k_start, pairs])]
