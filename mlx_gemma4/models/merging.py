"""Pictures, sound and video among tokens: which positions of a step they fill, with what, and who sees whom.

Owns `Soft`, what one forward call is told about them, and `Media`, a prompt's features from which steps of any size are
cut. Leaves running the towers to `vision.py` and `audio.py`, prompts to `media/prompt.py`, attention to the kernels.

Source of truth: transformers 5.23 `modeling_gemma4.py: Gemma4Model.forward`, `create_masks_for_vision_model`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from ..errors import Gemma4Error, UsageError
from ..media.prompt import Run
from ..media.store import FeatureStore

if TYPE_CHECKING:
    from .gemma4 import Model


@dataclass(frozen=True)
class Soft:
    """What of one step's positions are no tokens. B rows of L positions, E the decoder's width."""

    positions: mx.array  # int32 [n], row * L + position within the step
    features: mx.array  # [n, E]; they are not scaled as token embeddings are
    # int32 [B, L]: the number of the picture or frame a position belongs to, negative elsewhere. None where pictures
    # are read like text, from left to right.
    blocks: mx.array | None = None

    def replace_ids(self, tokens: mx.array, neutral: int) -> mx.array:
        """tokens [B, L] with `neutral` at these positions: their per-layer embeddings are those of padding."""
        flat = tokens.reshape(-1)
        flat[self.positions] = neutral
        return flat.reshape(tokens.shape)

    def replace_embeddings(self, x: mx.array) -> mx.array:
        """x [B, L, E], already scaled, with the features at their positions."""
        flat = x.reshape(-1, x.shape[-1])
        flat[self.positions] = self.features.astype(x.dtype)
        return flat.reshape(x.shape)


class Media:
    """The features of a prompt, cut into steps.

    >>> media = encode(model, prompt.runs)
    >>> end = media.step_end(0, 2048)                   # at most 2,048 positions, no picture torn apart
    >>> model(tokens[None, :end], cache=cache, media=media.soft(0, end))

    runs: (first position, features [n, E], whether it is a picture), in order. bidirectional: whether a picture's
    positions see each other in both directions, so that no step may end inside one.
    """

    def __init__(self, runs: Sequence[tuple[int, mx.array, bool]], bidirectional: bool):
        self._runs = list(runs)
        self._bidirectional = bidirectional

    def soft(self, begin: int, end: int) -> Soft | None:
        """For a step over the prompt's positions begin .. end, one row; None where it is all tokens."""
        return batched([self], [(begin, end)])

    def step_end(self, begin: int, end: int) -> int:
        """Where a step from `begin` that should end at `end` is to end: not inside a picture that must stay whole.

        Before the picture if the step began before it, else after it, however long it is.
        """
        start, stop = self._whole_at(end)
        if start is None:
            return end
        return start if start > begin else stop

    def last_step(self, length: int) -> int:
        """Where the step that ends a prompt of `length` positions begins: at its last one, as a rule."""
        start, _ = self._whole_at(length - 1)
        return length - 1 if start is None else start

    def after(self, begin: int) -> "Media":
        """The same with positions counted from `begin` on; what lies before is left out."""
        kept = []
        for start, features, picture in self._runs:
            if start + len(features) > begin:
                cut = max(0, begin - start)
                kept.append((start + cut - begin, features[cut:], picture))
        return Media(kept, self._bidirectional)

    def _whole_at(self, position: int) -> tuple[int | None, int]:
        """(start, stop) of the picture that a cut before `position` would tear apart; (None, _) for none."""
        if self._bidirectional:
            for start, features, picture in self._runs:
                if picture and start < position < start + len(features):
                    return start, start + len(features)
        return None, position

    def _parts(self, begin: int, end: int) -> list[tuple[int, mx.array, int]]:
        """(position within the step, features, number of the picture or -1) of what lies in begin .. end."""
        out = []
        for number, (start, features, picture) in enumerate(self._runs):
            low, high = max(start, begin), min(start + len(features), end)
            if low < high:
                block = number if picture and self._bidirectional else -1
                out.append((low - begin, features[low - start : high - start], block))
        return out


def batched(rows: Sequence[Media | None], spans: Sequence[tuple[int, int]]) -> Soft | None:
    """One step of several prompts: row b covers positions spans[b] = (begin, end) of its prompt, all equally long once
    padded on the left. None for a row without media; None as a result when no row has any in its span."""
    L = max(end - begin for begin, end in spans)
    positions: list[np.ndarray] = []
    features: list[mx.array] = []
    blocks = np.full((len(rows), L), -1, np.int32)
    for b, (media, (begin, end)) in enumerate(zip(rows, spans, strict=True)):
        padding = L - (end - begin)
        for at, part, block in media._parts(begin, end) if media is not None else ():
            at += padding
            positions.append(np.arange(at, at + len(part), dtype=np.int32) + b * L)
            features.append(part)
            blocks[b, at : at + len(part)] = block
    if not positions:
        return None
    together = features[0] if len(features) == 1 else mx.concatenate(features)
    return Soft(mx.array(np.concatenate(positions)), together, mx.array(blocks) if blocks.max() >= 0 else None)


def encode(model: "Model", runs: Sequence[Run], store: FeatureStore | None = None, since: int = 0) -> Media:
    """The features of a prompt's runs, from `store` where it has them, else from the towers.

    since: what lies before this position is in the cache already and is not computed.

    Raises UsageError for a model without the tower that is needed.
    """
    from .audio import encode_clips
    from .vision import encode_images

    store = FeatureStore() if store is None else store
    needed = [run for run in runs if run.stop > since]
    known = {run.key: found for run in needed if (found := store.get(run.key)) is not None}
    for pictures, tower in ((True, encode_images), (False, encode_clips)):
        new = {run.key: run.part for run in needed if run.key not in known and run.is_picture == pictures}
        if new:
            # The towers check what they are given; items.py makes nothing else.
            found = tower(model, list(new.values()))  # type: ignore[arg-type]
            known |= zip(new, found, strict=True)
    for run in needed:
        if len(known[run.key]) != run.part.tokens:
            raise Gemma4Error(
                f"the tower made {len(known[run.key])} embeddings for {run.part.tokens} places in the prompt; "
                "the checkpoint's vision or audio config does not fit its processor"
            )
        store.put(run.key, known[run.key])
    bidirectional = model.config.text.use_bidirectional_attention == "vision"
    return Media([(run.start, known[run.key], run.is_picture) for run in needed], bidirectional)


def check_senses(model: "Model", kinds: set[str]) -> None:
    """Raises UsageError, in one line, when the model cannot take what `kinds` ("image", "audio", "video") names."""
    wanted = {"image": ("vision_tower", "see"), "video": ("vision_tower", "see"), "audio": ("audio_tower", "hear")}
    for kind in sorted(kinds):
        tower, verb = wanted[kind]
        if tower in model:
            continue
        declared = model.config.vision if tower == "vision_tower" else model.config.audio
        if declared:
            raise UsageError(f"the model was loaded without its towers; load it with towers=True so that it can {verb}")
        able = "E2B and E4B do" if verb == "hear" else "all four -it sizes do, unless converted without their tower"
        raise UsageError(f"this model does not {verb}: {able}; choose another with --model, or send text only")
