"""The bits of every matrix under a size: the choice that loses least.

Owns the choice (`choose`), the recipe it becomes (`Allocation`) and reading sizes such as 14GB. Leaves what a choice
loses to `sensitivity.py`.

Losses of different matrices add up, so the best choice for a size minimises loss + price * bytes matrix by matrix at
some one price. `choose` walks that price down: it starts from the smallest packing of each matrix and always takes the
step that saves most loss per byte, over the lower convex hull of each matrix's options; what fits in the rest is filled
with smaller steps. Source: Y. Shoham and A. Gersho, "Efficient bit allocation for an arbitrary set of quantizers", IEEE
Transactions on Acoustics, Speech, and Signal Processing 36 (1988) 1445.
"""

import heapq
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mlx_gemma4.config import TextConfig
from mlx_gemma4.conversions.recipe import Packing, Recipe
from mlx_gemma4.conversions.sensitivity import Option
from mlx_gemma4.errors import UsageError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


@dataclass(frozen=True)
class Allocation(Recipe):
    """A recipe that names every matrix. A path it does not name is an error: it was made for another model."""

    packings: Mapping[str, Packing | None] = field(default_factory=dict)
    loss: float = 0.0  # the sum of the losses measured, nats per token

    def choose(self, path: str, text: TextConfig) -> Packing | None:
        if path not in self.packings:
            raise UsageError(f"recipe {self.name} was measured on another model: it does not know {path}")
        return self.packings[path]


def choose(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]:
    """An option per matrix, `budget` bytes at most together, with the least sum of losses.

    Raises UsageError when the smallest options are above the budget.
    """
    hulls = {path: _hull(found) for path, found in options.items()}
    chosen = {path: 0 for path in hulls}
    left = budget - sum(hull[0].nbytes for hull in hulls.values())
    if left < 0:
        raise UsageError(
            f"the matrices take {budget - left:,} bytes at the least, and the size asked for leaves {budget:,} for "
            "them; ask for more"
        )
    queue = [(_slope(hull, 0), path) for path, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(queue)
    while queue:
        _, path = heapq.heappop(queue)
        hull, at = hulls[path], chosen[path]
        cost = hull[at + 1].nbytes - hull[at].nbytes
        if cost > left:
            continue  # another matrix's step may still fit
        left -= cost
        chosen[path] = at + 1
        if at + 2 < len(hull):
            heapq.heappush(queue, (_slope(hull, at + 1), path))
    out = {path: hulls[path][at] for path, at in chosen.items()}
    for path in sorted(out, key=lambda p: -out[p].loss):
        # Options off the hull, for the bytes that no whole step fits into.
        fitting = [o for o in options[path] if o.nbytes - out[path].nbytes <= left and o.loss < out[path].loss]
        if fitting:
            best = min(fitting, key=lambda o: (o.loss, o.nbytes))
            left -= best.nbytes - out[path].nbytes
            out[path] = best
    return out


def recipe_of(chosen: Mapping[str, Option], name: str, what: str) -> Allocation:
    """The recipe; its default is the packing that most bytes have. what: on which text it was measured."""
    weight: Counter[Packing] = Counter()
    for option in chosen.values():
        if option.packing is not None:
            weight[option.packing] += option.nbytes
    default = weight.most_common(1)[0][0] if weight else None
    packings = {path: option.packing for path, option in chosen.items()}
    description = f"Bits per matrix as measured on {what}."
    loss = sum(option.loss for option in chosen.values())
    return Allocation(name, default, description=description, packings=packings, loss=loss)


def parse_size(text: str) -> int:
    """`14GB`, `900 MB`, `1.5GiB` or bytes. Raises UsageError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmg]i?)?b?", text.strip().lower())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise UsageError(f"--target-size takes a size such as 14GB or 900MB, not {text!r}")
    return size


def _hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower convex hull of (bytes, loss): more bytes, less loss, less and less of it per byte."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.nbytes, o.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _rate(hull[-2], hull[-1]) <= _rate(hull[-2], option):
            hull.pop()
        hull.append(option)
    return hull


def _rate(a: Option, b: Option) -> float:
    return (a.loss - b.loss) / (b.nbytes - a.nbytes)


def _slope(hull: list[Option], at: int) -> float:
    return -_rate(hull[at], hull[at + 1])
