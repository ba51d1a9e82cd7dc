"""Chooses how one attention call of a global layer is computed, plain or one-vector, whole or partial.

| call | on Metal | elsewhere, and for other widths or types |
|---|---|---|
| one query, keys and values, a width MLX serves | MLX's fused single-query kernel | tiled reference |
| up to 64 query rows per KV head | `flash_decode`, split over the context | tiled reference |
| more | `flash_prefill` | tiled reference |
| a window, or positions hidden one by one | tiled reference | tiled reference |

Owns the choice; kernels are in `flash_decode.py` and `flash_prefill.py`, the reference's arithmetic in
`reference/flash_attention.py`, sliding layers in `sliding_attention.py`.
"""

from typing import Any

import mlx.core as mx

from . import backend, flash_decode, flash_prefill
from .flash_inputs import refusal
from .key_form import KeyForm, reader_of
from .reference.flash_attention import flash_attention, flash_attention_partial, plain_reader
from .sliding_attention import FUSED_DECODE_WIDTHS


def attend(
    q: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float = 1.0,
    q_start: int,
    k_start: int = 0,
    window: int | None = None,
    first_visible: mx.array | None = None,
) -> mx.array:
    """Causal attention of q [B, H, L, D] over keys, values [B, H_kv, T, D] -> [B, H, L, D].

    Arguments as in `reference.flash_attention.flash_attention`.
    """
    if uses_fused_decode(q):
        mask = None
        if first_visible is not None:
            mask = (mx.arange(k_start, k_start + keys.shape[2]) >= first_visible[:, None])[:, None, None, :]
        return mx.fast.scaled_dot_product_attention(q, keys, values, scale=scale, mask=mask)
    where = {"scale": scale, "q_start": q_start, "k_start": k_start, "first_visible": first_visible}
    if not _runs_on_metal(q, keys, values, None, window):
        return flash_attention(q, plain_reader(keys, values), window=window, **where)
    if q.shape[2] == 1:
        return _launch(q, keys, values, None, **where)
    return _differentiable(where)(q, keys, values)


def attend_one_vector(
    q: mx.array, vectors: mx.array, form: KeyForm, *, scale: float = 1.0, q_start: int, first_visible: mx.array | None
) -> mx.array:
    """As `attend`, over the vectors u [B, H_kv, T, D] of a one-vector cache, position 0 first."""
    where = {"scale": scale, "q_start": q_start, "first_visible": first_visible}
    if _runs_on_metal(q, vectors, None, form):
        return _launch(q, vectors, None, form, **where)
    return flash_attention(q, reader_of(q, vectors, None, form, first_visible), **where)


def attend_partial(
    q: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float = 1.0,
    q_start: int,
    k_start: int = 0,
    window: int | None = None,
    first_visible: mx.array | None = None,
    visible: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """As `attend`, over one of several segments of the keys, to be merged by their log-sum-exp.

    (out float32 [B, H, L, D] normalised over what was seen, lse float32 [B, H, L]); a query that sees nothing has out 0
    and lse MASKED. `visible`, boolean [B, T], hides stored positions from every query. T may be 0.
    """
    where = {"scale": scale, "q_start": q_start, "k_start": k_start, "first_visible": first_visible}
    if keys.shape[2] > 0 and _runs_on_metal(q, keys, values, None, window, visible):
        kernel = flash_decode.launch if _few_rows(q, keys) else flash_prefill.launch
        return kernel(q, keys, values, **where)
    return flash_attention_partial(q, plain_reader(keys, values), window=window, visible=visible, **where)


def uses_fused_decode(q: mx.array) -> bool:
    return q.shape[2] == 1 and q.shape[3] in FUSED_DECODE_WIDTHS and mx.metal.is_available()


def _few_rows(q: mx.array, keys: mx.array) -> bool:
    return q.shape[1] // keys.shape[1] * q.shape[2] <= flash_decode.MAX_ROWS


def _runs_on_metal(
    q: mx.array,
    keys: mx.array,
    values: mx.array | None,
    form: KeyForm | None,
    window: int | None = None,
    visible: mx.array | None = None,
) -> bool:
    why = refusal(q, keys, values, form)
    if window is not None:
        why = "a window"
    elif visible is not None:
        why = "positions hidden one by one"
    return backend.use_metal("flash_decode" if _few_rows(q, keys) else "flash_prefill", why)


def _launch(q: mx.array, keys: mx.array, values: mx.array | None, form: KeyForm | None, **where: Any) -> mx.array:
    if _few_rows(q, keys):
        return flash_decode.launch(q, keys, values, form, **where)[0].astype(q.dtype)
    return flash_prefill.launch(q, keys, values, form, dtype=q.dtype, **where)[0]


def _differentiable(where: dict[str, Any]) -> Any:
    """The Metal kernel, whose gradient, asked for in training only, is that of the reference."""

    @mx.custom_function
    def run(q: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        return _launch(q, keys, values, None, **where)

    @run.vjp
    def gradient(primals: tuple[mx.array, ...], cotangent: mx.array, _: mx.array) -> list[mx.array]:
        def plain(q: mx.array, keys: mx.array, values: mx.array) -> mx.array:
            return flash_attention(q, plain_reader(keys, values), **where)

        return mx.vjp(plain, list(primals), [cotangent])[1]

    return run
