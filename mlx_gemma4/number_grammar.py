"""Numbers as templates write them, and between bounds, as regular expressions for llguidance's terminals.

Owns the forms. A number has at most 15 significant digits, so that it is written exactly as Python writes the float it
is read into; the template writes what Python writes. With bounds there are no exponents.

Terminals know `&` (both) and `~` (not); see llguidance's docs/syntax.md.
"""

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from .errors import UsageError

INTEGER = r"/0|-?[1-9][0-9]{0,99}/"
# Python's repr: a point and no trailing zeros, exponents below 1e-4 and from 1e16 on.
_SMALL = r"/-?0\.(0|0{0,3}[1-9]([0-9]{0,13}[1-9])?)/"
_LARGE = r"/-?[1-9][0-9]*\.([0-9]*[1-9]|0)/ & /-?([0-9.]{3,16}|[0-9]{15}\.0)/"
_DECIMAL = f"{_SMALL} | ({_LARGE})"
_TINY, _HUGE = "0[5-9]|[1-9][0-9]|[12][0-9][0-9]|30[0-7]", "1[6-9]|[2-9][0-9]|[12][0-9][0-9]|30[0-7]"
_EXPONENT = rf"/-?[1-9](\.[0-9]{{0,13}}[1-9])?e(-({_TINY})|\+({_HUGE}))/"
FLOAT = f"{_DECIMAL} | {_EXPONENT}"


def bounded(schema: Mapping[str, Any], whole: bool) -> str | None:
    """A terminal's body for numbers within the schema's bounds; None when it names none. Raises UsageError.

    whole: integers only.
    """
    names = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
    bounds = {n: schema[n] for n in names if isinstance(schema.get(n), int | float) and not isinstance(schema[n], bool)}
    if not bounds:
        return None
    low = max((bounds[n] for n in names[:2] if n in bounds), default=None)
    high = min((bounds[n] for n in names[2:] if n in bounds), default=None)
    if low is not None and high is not None and _empty(low, high, bounds, whole):
        raise UsageError(f"a tool's parameter is to be between {low} and {high}; no number is")
    form = INTEGER if whole else f"({INTEGER} | {_DECIMAL})"
    parts = [form]
    if low is not None:
        parts.append(_at_least(Decimal(repr(low))))
    if high is not None:
        parts.append(_at_most(Decimal(repr(high))))
    parts += [f"~/{_same(bounds[n])}/" for n in names if n.startswith("exclusive") and n in bounds]
    return " & ".join(parts)


def _empty(low: float, high: float, bounds: Mapping[str, float], whole: bool) -> bool:
    if whole:
        first = math.floor(low) + 1 if bounds.get("exclusiveMinimum") == low else math.ceil(low)
        last = math.ceil(high) - 1 if bounds.get("exclusiveMaximum") == high else math.floor(high)
        return first > last
    exclusive = low in (bounds.get("exclusiveMinimum"),) or high in (bounds.get("exclusiveMaximum"),)
    return low > high or (low == high and exclusive)


def _at_least(bound: Decimal) -> str:
    if bound > 0:
        return f"/{_larger(bound)}/"
    return f"(/[0-9.]+|-0\\.0/ | /-({_smaller(-bound)})/)"


def _at_most(bound: Decimal) -> str:
    if bound >= 0:
        return f"(/-[0-9.]+/ | /{_smaller(bound)}/)"
    return f"/-({_larger(-bound)})/"


def _parts(bound: Decimal) -> tuple[str, str]:
    """Digits before and after the point, no zeros around them."""
    before, _, after = f"{abs(bound):f}".partition(".")
    return before, after.rstrip("0")


def _larger(bound: Decimal) -> str:
    """Digits and perhaps a point that are at least `bound` (which is not negative)."""
    before, after = _parts(bound)
    fraction = r"(\.[0-9]+)?"
    out = [rf"[1-9][0-9]{{{len(before)},}}{fraction}"]
    for i, digit in enumerate(before):
        if digit < "9":
            out.append(f"{before[:i]}[{int(digit) + 1}-9][0-9]{{{len(before) - i - 1}}}{fraction}")
    for i, digit in enumerate(after):
        if digit < "9":
            out.append(rf"{before}\.{after[:i]}[{int(digit) + 1}-9][0-9]*")
    out.append(rf"{before}\.{after}[0-9]*" if after else f"{before}{fraction}")
    return "|".join(out)


def _smaller(bound: Decimal) -> str:
    """Digits and perhaps a point that are at most `bound` (which is not negative)."""
    before, after = _parts(bound)
    fraction = r"(\.[0-9]+)?"
    out = [rf"[0-9]{{1,{len(before) - 1}}}{fraction}"] if len(before) > 1 else []
    for i, digit in enumerate(before):
        if digit > "0":
            out.append(f"{before[:i]}[0-{int(digit) - 1}][0-9]{{{len(before) - i - 1}}}{fraction}")
    for i, digit in enumerate(after):
        out.append(rf"{before}\.{after[:i]}0*" if i else rf"{before}\.0*")
        if digit > "0":
            out.append(rf"{before}\.{after[:i]}[0-{int(digit) - 1}][0-9]*")
    out.append(rf"{before}(\.{after}0*)?" if after else rf"{before}(\.0*)?")
    return "|".join(out)


def _same(value: float) -> str:
    """The ways to write exactly this number."""
    bound = Decimal(repr(value))
    before, after = _parts(abs(bound))
    sign = "-" if bound < 0 else "-?" if bound == 0 else ""
    return rf"{sign}{before}" + (rf"\.{after}" if after else r"(\.0)?")
