"""How many bits a cache keeps per number: what may be asked for, and what was asked for.

Owns the allowed values and the one line that refuses others. Leaves what the bits mean to
`kernels/turboquant.py` and the caches themselves to `cache/`. Loads nothing of weight, so that a command line refuses
a bad value at once.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import UsageError

if TYPE_CHECKING:
    from .config import TextConfig

PLAIN = 16
BITS = (16, 4, 3.5, 3, 2.5, 2)
MODES = ("trellis", "pairs", "paper")


@dataclass(frozen=True)
class KvBits:
    """Bits per stored coordinate; 16 keeps numbers as they are computed. Made by `request`, which checks."""

    keys: float = PLAIN  # global layers
    values: float = PLAIN  # global layers
    sliding: float = PLAIN  # keys and values of sliding layers
    mode: str = "trellis"

    @property
    def compresses_global(self) -> bool:
        return self.keys != PLAIN

    @property
    def compresses_sliding(self) -> bool:
        return self.sliding != PLAIN


EXACT = KvBits()


def number(value: float | str, name: str = "kv_bits") -> float:
    """`value` as one of BITS. Raises UsageError naming them; `name` is what the user calls the option."""
    try:
        bits = float(value)
    except (TypeError, ValueError):
        bits = None
    if bits not in BITS:
        raise UsageError(f"{name} takes {', '.join(f'{b:g}' for b in BITS[:-1])} or {BITS[-1]:g}, not {value!s}")
    return bits


def request(
    both: float | str | None = None,
    keys: float | str | None = None,
    values: float | str | None = None,
    sliding: float | str | None = None,
    mode: str | None = None,
    *,
    option: str = "kv_bits",
) -> KvBits:
    """The checked request. `both` is for keys and values of global layers, `keys` and `values` go over it.

    `option` is how the first argument is spelt for the user ("kv_bits" or "--kv-bits"); the others follow it.
    Raises UsageError.
    """
    dash = "-" if option.startswith("-") else "_"
    prefix = option.removesuffix("bits")
    common = PLAIN if both is None else number(both, option)
    key_bits = common if keys is None else number(keys, f"{prefix}key{dash}bits")
    value_bits = common if values is None else number(values, f"{prefix}value{dash}bits")
    ring = PLAIN if sliding is None else number(sliding, f"{option}{dash}sliding")
    if (key_bits == PLAIN) != (value_bits == PLAIN):
        raise UsageError(
            f"keys and values are compressed together: give {option}, or {prefix}key{dash}bits and "
            f"{prefix}value{dash}bits both below {PLAIN}"
        )
    mode = mode or MODES[0]
    if mode not in MODES:
        raise UsageError(f"{prefix}mode takes {', '.join(MODES[:-1])} or {MODES[-1]}, not {mode}")
    return KvBits(key_bits, value_bits, ring, mode)


def check_reach(bits: KvBits, config: "TextConfig") -> None:
    """Raises UsageError when `bits` asks for something that no layer of this model can have.

    Every Gemma 4 has global layers (`config.py` holds that), so their part of a request always reaches some.
    """
    from .cache.blocks import TAIL

    own = range(config.first_shared_layer)
    if bits.compresses_sliding:
        if not any(config.is_sliding(i) for i in own):
            raise UsageError("compressing sliding layers reaches none: this model has no sliding layers; use 16 bits")
        if config.sliding_window <= TAIL:
            raise UsageError(
                f"compressing sliding layers reaches none of this model: its window is {config.sliding_window}, and "
                f"{TAIL} positions stay exact; leave sliding layers at 16 bits"
            )
    if bits.keys != bits.values and any(config.k_is_v(i) for i in own):
        raise UsageError(
            f"keys at {bits.keys:g} and values at {bits.values:g} bits: the global layers of this model keep one "
            "vector for both; give one number with kv_bits"
        )
