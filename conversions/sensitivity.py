"""What packing each matrix does to a model's answers, measured: KL to the unpacked model, matrix by matrix.

Owns the measurement. Leaves running the decoder to `layers.py`, the choice to `allocation.py`, texts to
`calibration_text.py`.

Each matrix is packed alone at `REFERENCE`, the text goes through the rest of the model unpacked, and the distributions
of the next token are compared: KL(plain || packed), mean over positions, in nats. Other packings of the same matrix are
scaled from there by the energy of their error in the matrix's own output, |(W - Q(W)) X|^2, because KL is quadratic in
a small error; matrices whose inputs are looked up or routed, by the energy of W - Q(W).

The decoder passes through memory once per wave, a wave being as many matrices as `STATES` bytes of residual streams
allow.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gemma4.conversions.layers import (
    EMBED,
    PROJECTION,
    TABLE,
    LayerStream,
    State,
    rounded,
    tap_linear,
    untap,
)
from mlx_gemma4.conversions.plan import stored_as
from mlx_gemma4.conversions.recipe import ROUTER_BITS, Packing
from mlx_gemma4.models.fused import soft_cap

# Packed so, an error is large against rounding and still small against the signal.
REFERENCE_BITS = 3
STATES = 2_000_000_000
# Rows of a table that stand for all of them where only the energy of its error is asked.
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


def measure(
    stream: LayerStream, tokens: np.ndarray, progress: Progress = lambda done, total, what: None
) -> dict[str, list[Option]]:
    """Options per module path, for every matrix of the text decoder. tokens: int [N, T], equally long texts.

    progress(done, total, path) follows each matrix; counts are bytes read. Raises WeightsError.
    """
    return _Measurement(stream, tokens, progress).run()


class _Measurement:
    def __init__(self, stream: LayerStream, tokens: np.ndarray, progress: Progress) -> None:
        self.stream, self.tokens, self.progress = stream, tokens, progress
        self.layers = stream.config.num_hidden_layers
        self.matrices = [stream.matrices(i) for i in range(self.layers)]
        tables = [EMBED] + ([TABLE, PROJECTION] if stream.config.hidden_size_per_layer_input else [])
        self.tables = tables + ([] if stream.head == EMBED else [stream.head])
        paths = [stream.path(i, m) for i, found in enumerate(self.matrices) for m in found]
        self.total = sum(stream.item(path).source_bytes for path in (*paths, *self.tables))
        self.done = 0
        self.energies: dict[str, dict[Packing, float]] = {}
        self.losses: dict[str, float] = {}

    def run(self) -> dict[str, list[Option]]:
        start = self.stream.start(self.tokens)
        per_wave = max(1, STATES // (start.nbytes * max(map(len, self.matrices))))
        waves = [range(a, min(a + per_wave, self.layers)) for a in range(0, self.layers, per_wave)]
        plain = start
        for wave in waves:
            plain = self._wave(plain, wave, self._tables() if wave.start == 0 else {})
        return {path: self._options(path) for path in self.losses}

    def _tables(self) -> dict[str, State]:
        """States of the matrices in front of the first layer, each packed alone."""
        out: dict[str, State] = {}
        for path in self.tables:
            reference = self._note_table(path)
            self._count(path)
            if reference is None:
                continue

            def change(other: str, weight: mx.array, path: str = path, packing: Packing = reference) -> mx.array:
                return rounded(weight, packing, self.stream.item(path).dtype) if other == path else weight

            out[path] = self.stream.start(self.tokens, change)
        return out

    def _wave(self, plain: State, wave: range, states: dict[str, State]) -> State:
        """Adds the wave's matrices to `states` and compares all at the end; the plain state behind the wave."""
        after = plain
        for index in range(wave.start, self.layers):
            layer = self.stream.layer(index)
            for path in states:
                states[path] = self.stream.advance(layer, index, states[path])
            if index in wave:
                plain = self._layer(layer, index, plain, states)
                after = plain
            else:
                plain = self.stream.advance(layer, index, plain)
            del layer
            mx.clear_cache()
        losses = self._compare(plain, states)
        self.losses |= losses
        return after

    def _count(self, path: str) -> None:
        self.done += self.stream.item(path).source_bytes
        self.progress(self.done, self.total, path)

    def _layer(self, layer: Any, index: int, plain: State, states: dict[str, State]) -> State:
        matrices = self.matrices[index]
        taps = tap_linear(layer, matrices)
        after = self.stream.advance(layer, index, plain)
        untap(layer, taps)
        modules = dict(layer.named_modules())
        for matrix in matrices:
            path, module = self.stream.path(index, matrix), modules[matrix]
            weight, dtype = module.weight, self.stream.item(path).dtype
            inputs = taps[matrix].inputs if matrix in taps else None
            packings = candidates(path, weight.shape[-1])
            self.energies[path] = {p: _energy(weight, rounded(weight, p, dtype), inputs) for p in packings}
            self._count(path)
            reference = _reference(packings)
            if reference is None:
                self.losses[path] = 0.0
                continue
            module.weight = rounded(weight, reference, dtype)
            states[path] = self.stream.advance(layer, index, plain)
            module.weight = weight
        return after

    def _note_table(self, path: str) -> Packing | None:
        item = self.stream.item(path)
        packings = candidates(path, item.columns)
        # Rows spread over the table: frequent and rare tokens.
        step = max(1, item.rows // _SAMPLE)
        if step == 1:
            sample = self.stream.tensor(item.name)
        else:
            begins = range(0, item.rows - 64, step * 64)
            sample = mx.concatenate([self.stream.rows(item.name, b, b + 64) for b in begins])
        self.energies[path] = {p: _energy(sample, rounded(sample, p, item.dtype), None) for p in packings}
        reference = _reference(packings)
        if reference is None:
            self.losses[path] = 0.0
        return reference

    def _compare(self, plain: State, states: dict[str, State]) -> dict[str, float]:
        """KL per state, the head in row blocks: softmax and KL are summed up block by block around running maxima."""
        cap = self.stream.config.final_logit_softcapping
        truth = self.stream.final(plain)
        ends = {path: self.stream.final(state) for path, state in states.items()}
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
            for path, hidden in ends.items():
                own = block
                if path == head_path:
                    reference = _reference(list(self.energies[path]))
                    assert reference is not None
                    own = rounded(block, reference, self.stream.item(path).dtype)
                other = _logits(hidden, own, cap)
                others[path].add(other)
                crosses[path] = crosses[path] * shrink + mx.sum(weights * (logits - other), axis=-1)
                mx.eval(crosses[path], others[path].top, others[path].sum)
            mx.eval(p.top, p.sum)
        out = {}
        for path, cross in crosses.items():
            kl = cross / p.sum - p.log_total + others[path].log_total
            out[path] = max(0.0, float(mx.mean(kl).item()))  # pyright: ignore[reportArgumentType]
        return out

    def _options(self, path: str) -> list[Option]:
        item = self.stream.item(path)
        energies = self.energies[path]
        reference = _reference(list(energies))
        options = [Option(None, _nbytes(item, None), 0.0)]
        if reference is None:
            return options
        unit = self.losses[path] / energies[reference] if energies[reference] else 0.0
        packed = [Option(p, _nbytes(item, p), unit * energy) for p, energy in energies.items()]
        # The router's packing is a rule, not a choice.
        return packed if len(packed) == 1 else options + packed


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


def _nbytes(item: Any, packing: Packing | None) -> int:
    return sum(o.nbytes for o in stored_as(item.name, item.shape, item.dtype, packing))
