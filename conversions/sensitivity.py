"""What packing each matrix does to a model's answers, measured: KL to the unpacked model, matrix by matrix.

Owns the measurement. Leaves running the decoder to `layers.py` and `bounded.py`, what is kept between layers to
`states.py`, the choice to `allocation.py`, texts to `calibration_text.py`.

Each matrix is packed alone at the reference packing, the text goes through the rest of the model unpacked, and the
distributions of the next token are compared: KL(plain || packed), mean over positions, in nats. Other packings of the
same matrix are scaled from there by the energy of their error in the matrix's own output, |(W - Q(W)) X|^2, because KL
is quadratic in a small error; matrices whose inputs are looked up or routed, by the energy of W - Q(W).

The decoder is read once, layer by layer; the state that each matrix packed alone leads to waits on disk between layers.
What is done is noted there, so that an interrupted measurement is taken up and gives the same figures.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gemma4.config import TextConfig
from mlx_gemma4.conversions.bounded import Layer, Rows
from mlx_gemma4.conversions.layers import LayerStream, State, rounded, row_blocks
from mlx_gemma4.conversions.plan import Item, stored_as
from mlx_gemma4.conversions.recipe import ROUTER_BITS, Packing
from mlx_gemma4.conversions.scratch import Scratch
from mlx_gemma4.conversions.states import States
from mlx_gemma4.models.fused import soft_cap

# Packed so, an error is large against rounding and still small against the signal.
REFERENCE_BITS = 3
# Bytes of final states whose distributions are compared in one reading of the head.
COMPARED = 160 << 20
# Rows of a table, or of experts, that stand for all of them where only the energy of an error is asked.
_SAMPLE = 8192

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (128, 64, 32)

Progress = Callable[[int, int, str], Any]


@dataclass(frozen=True)
class Option:
    """One way to store a matrix. packing None: as it is."""

    packing: Packing | None
    nbytes: int
    loss: float  # nats per token


def candidates(path: str, columns: int) -> list[Packing]:
    """The packings a matrix may get; none where no group divides its columns."""
    groups = [g for g in GROUPS if columns % g == 0]
    if path.endswith("router.proj"):
        # As every recipe has it: 64, or 32 in narrow streams.
        return [Packing(g, ROUTER_BITS) for g in (64, 32) if g in groups][:1]
    wide = [g for g in groups if g != 32] or groups
    return [Packing(g, b) for b in BITS for g in (groups if b < 8 else wide[-1:])]


def sizes(item: Item) -> list[tuple[Packing | None, int]]:
    """What a matrix may be stored as, with bytes; the router's packing is a rule, not a choice."""
    packings = candidates(item.path, item.columns)
    allowed: list[Packing | None] = [*packings] if len(packings) == 1 else [None, *packings]
    return [(p, sum(o.nbytes for o in stored_as(item.name, item.shape, item.dtype, p))) for p in allowed]


def scratch_bytes(text: TextConfig, matrices: int, tokens: int) -> int:
    """About what `measure` keeps on disk: a difference per matrix in 2 bytes, the plain stream twice in 4."""
    read_later = {p for i in range(text.num_hidden_layers) if (p := text.producer_of(i)) != i}
    views = sum(2 * text.kv_heads_of(i) * text.width_of(i) for i in read_later)
    # Keys and values that others read differ for the matrices in front of them only.
    width = text.hidden_size + views * text.first_shared_layer // text.num_hidden_layers
    inputs = text.num_hidden_layers * text.hidden_size_per_layer_input * (4 + 2 * 3)
    return tokens * (2 * width * matrices + 8 * (text.hidden_size + views) + inputs)


def measure(
    stream: LayerStream,
    tokens: np.ndarray,
    scratch: Scratch,
    progress: Progress = lambda done, total, what: None,
) -> dict[str, list[Option]]:
    """Options per module path, for every matrix of the text decoder. tokens: int [N, T], equally long texts.

    scratch: where a measurement on the same tokens may have begun; when this returns its states are gone and its
    figures stay. progress(done, total, path) follows each matrix; counts are bytes read. Raises WeightsError,
    DoesNotFitError.
    """
    return _Measurement(stream, tokens, scratch, progress).run()


class _Measurement:
    def __init__(self, stream: LayerStream, tokens: np.ndarray, scratch: Scratch, progress: Progress) -> None:
        self.stream, self.tokens, self.progress = stream, tokens, progress
        self.scratch, self.states = scratch, States(scratch, stream)
        self.layers = stream.config.num_hidden_layers
        self.matrices = [stream.matrices(i) for i in range(self.layers)]
        paths = [path for i in range(self.layers) for path in self._paths(i)]
        # A state's name is the number of its matrix.
        self.names = {path: f"state-{n:04d}" for n, path in enumerate((*stream.tables, *paths))}
        self.total = sum(stream.item(path).source_bytes for path in self.names)
        self.done = 0
        self.energies: dict[str, list[float]] = {}
        for found in scratch.found("energies"):
            self.energies |= found
        self.losses: dict[str, float] = {}
        for found in scratch.found("losses"):
            self.losses |= found

    def run(self) -> dict[str, list[Option]]:
        measured = [path for path in self.names if self._reference(path) is not None]
        if any(path not in self.losses for path in measured):
            begun = next((i for i in range(self.layers + 1) if self.states.has("plain", i)), None)
            if begun is None:
                self._start()
            else:
                self._skip([*self.stream.tables, *(p for i in range(begun) for p in self._paths(i))])
            for index in range(begun or 0, self.layers):
                self._layer(index)
            self._compare(measured)
        for path in self.names:
            self.states.drop(self.names[path], self.layers)
        for path in self.stream.tables:
            self.states.drop_inputs(self.names[path])
        self.states.drop("plain", self.layers)
        self.states.drop_inputs("plain")
        return {path: self._options(path) for path in self.names}

    def _paths(self, index: int) -> list[str]:
        return [self.stream.path(index, matrix) for matrix in self.matrices[index]]

    def _reference(self, path: str) -> Packing | None:
        return _reference(candidates(path, self.stream.item(path).columns))

    def _count(self, path: str) -> None:
        self.done += self.stream.item(path).source_bytes
        self.progress(self.done, self.total, path)

    def _skip(self, paths: list[str]) -> None:
        """Counts what an earlier run has done."""
        for path in paths:
            self._count(path)

    def _start(self) -> None:
        """The plain state and those of the matrices outside layers, in front of the first layer."""
        plain = self.stream.start(self.tokens)
        for path in self.stream.tables:
            self._count(path)
            reference = self._reference(path)
            if reference is None or self.states.has(self.names[path], 0):
                continue
            item = self.stream.item(path)
            # Rows spread over the table: frequent and rare tokens.
            sample = self.stream.sample(item.name, _SAMPLE)
            energies = [_energy(sample, rounded(sample, p, item.dtype), None) for p in candidates(path, item.columns)]
            self._note(path, energies)

            def change(other: str, weight: mx.array, path: str = path, packing: Packing = reference) -> mx.array:
                return rounded(weight, packing, self.stream.item(path).dtype) if other == path else weight

            state = self.stream.start(self.tokens, change)
            self.states.save_inputs(self.names[path], state, plain)
            self.states.save(self.names[path], 0, state, plain)
        self.states.save_inputs("plain", plain)
        self.states.save("plain", 0, plain)

    def _note(self, path: str, energies: list[float]) -> None:
        if path not in self.energies:
            self.energies[path] = energies
            self.scratch.note(energies={path: energies})

    def _layer(self, index: int) -> None:
        """Takes every state through a layer, and begins those of its own matrices."""
        layer, names = Layer(self.stream, index), self.names
        plain = self.states.load("plain", index)
        if self.states.has("plain", index + 1):
            after = self.states.load("plain", index + 1)
            self._skip(self._paths(index))
        else:
            after = self._plain(layer, plain)
            self.states.save("plain", index + 1, after)

        def advance(path: str, state: State | None, rows: Rows | None = None) -> None:
            if not self.states.has(names[path], index + 1):
                before = state or self.states.load(names[path], index, plain)
                self.states.save(names[path], index + 1, layer.run(before, rows), after)
            self.states.drop(names[path], index)

        earlier = [path for i in range(index) for path in self._paths(i)]
        for path in (*self.stream.tables, *earlier):
            if self._reference(path) is not None:
                advance(path, None)
        for matrix in self.matrices[index]:
            path = self.stream.path(index, matrix)
            reference = self._reference(path)
            if reference is not None:
                advance(path, plain, self._packed(layer, matrix, reference))
        self.states.drop("plain", index)
        mx.clear_cache()

    def _packed(self, layer: Layer, matrix: str, packing: Packing) -> Rows:
        """A layer's rows with one matrix packed."""
        dtype = self.stream.item(self.stream.path(layer.index, matrix)).dtype

        def rows(name: str, begin: int, end: int) -> mx.array:
            found = layer.rows(name, begin, end)
            return rounded(found, packing, dtype) if name == matrix else found

        return rows

    def _plain(self, layer: Layer, plain: State) -> State:
        """The plain state behind a layer; energies of its matrices."""

        def visit(matrix: str, x: mx.array) -> None:
            path = self.stream.path(layer.index, matrix)
            item = self.stream.item(path)
            packings = candidates(path, item.columns)
            energies = [0.0] * len(packings)
            for begin, end in row_blocks(item.rows, item.columns):
                rows = layer.rows(matrix, begin, end)
                for n, packing in enumerate(packings):
                    energies[n] += _energy(rows, rounded(rows, packing, item.dtype), x)
            self._note(path, energies)
            self._count(path)

        after = layer.run(plain, visit=visit)
        for matrix in self.matrices[layer.index]:
            path = self.stream.path(layer.index, matrix)
            if path not in self.energies:  # experts: a token meets few of them
                item = self.stream.item(path)
                sample = self.stream.sample(item.name, _SAMPLE)
                packings = candidates(path, item.columns)
                self._note(path, [_energy(sample, rounded(sample, p, item.dtype), None) for p in packings])
                self._count(path)
        return after

    def _compare(self, measured: list[str]) -> None:
        """The KL of every state behind the last layer, as many at a time as `COMPARED` allows."""
        plain = self.states.load("plain", self.layers)
        count = max(1, COMPARED // plain.hidden.nbytes)
        for first in range(0, len(measured), count):
            paths = measured[first : first + count]
            if all(path in self.losses for path in paths):
                continue
            ends = {p: self.states.load(self.names[p], self.layers, plain).hidden for p in paths}
            losses = self._divergences(plain.hidden, ends)
            self.losses |= losses
            self.scratch.note(losses=losses)

    def _divergences(self, plain: mx.array, hidden: dict[str, mx.array]) -> dict[str, float]:
        """KL per state, the head in row blocks: softmax and KL are summed up block by block around running maxima."""
        cap = self.stream.config.final_logit_softcapping
        truth = self.stream.final(plain)
        ends = {path: self.stream.final(h) for path, h in hidden.items()}
        head_path = self.stream.head
        p = _Softmax()
        others = {path: _Softmax() for path in ends}
        crosses = {path: mx.zeros((truth.shape[0],)) for path in ends}
        for block in self.stream.head_blocks():
            logits = _logits(truth, block, cap)
            previous = p.top
            p.add(logits)
            weights = mx.exp(logits - p.top[:, None])
            shrink = mx.zeros_like(p.top) if previous is None else mx.exp(previous - p.top)
            mx.eval(p.top, p.sum, weights, shrink)
            for path, end in ends.items():
                own = block
                if path == head_path:
                    reference = self._reference(path)
                    assert reference is not None
                    own = rounded(block, reference, self.stream.item(path).dtype)
                other = _logits(end, own, cap)
                others[path].add(other)
                crosses[path] = crosses[path] * shrink + mx.sum(weights * (logits - other), axis=-1)
                mx.eval(crosses[path], others[path].top, others[path].sum)
        out = {}
        for path, cross in crosses.items():
            kl = cross / p.sum - p.log_total + others[path].log_total
            out[path] = max(0.0, float(mx.mean(kl).item()))  # pyright: ignore[reportArgumentType]
        return out

    def _options(self, path: str) -> list[Option]:
        item = self.stream.item(path)
        packings, loss = candidates(path, item.columns), self.losses.get(path, 0.0)
        energies = dict(zip(packings, self.energies.get(path, []), strict=True))
        reference = _reference(packings)
        unit = loss / energies[reference] if reference is not None and energies[reference] else 0.0
        return [Option(p, size, unit * energies[p] if p is not None else 0.0) for p, size in sizes(item)]


class _Softmax:
    """A softmax's normaliser over blocks of logits [M, V']: running maximum and sum, [M] each."""

    def __init__(self) -> None:
        self.top: Any = None
        self.sum: Any = None

    def add(self, logits: mx.array) -> None:
        top = mx.max(logits, axis=-1)
        if self.top is None:
            self.top, self.sum = top, mx.sum(mx.exp(logits - top[:, None]), axis=-1)
            return
        new = mx.maximum(self.top, top)
        self.sum = self.sum * mx.exp(self.top - new) + mx.sum(mx.exp(logits - new[:, None]), axis=-1)
        self.top = new

    @property
    def log_total(self) -> mx.array:
        return self.top + mx.log(self.sum)


def _logits(hidden: mx.array, head: mx.array, cap: float | None) -> mx.array:
    logits = hidden @ head.T
    return logits if cap is None else soft_cap(cap, logits)


def _reference(packings: Sequence[Packing]) -> Packing | None:
    """Of the candidates the one that is measured; the others are scaled from it."""
    fitting = [p for p in packings if p.bits == REFERENCE_BITS] or list(packings)
    return next((p for p in fitting if p.group_size == 64), fitting[0] if fitting else None)


def _energy(weight: mx.array, packed: mx.array, inputs: mx.array | None) -> float:
    error = weight - packed
    if inputs is not None:
        error = inputs @ error.T
    return float(mx.sum(mx.square(error)).item())  # pyright: ignore[reportArgumentType]
