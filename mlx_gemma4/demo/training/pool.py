"""Pictures, sounds and clips as the towers see them, ready to be asked about.

Owns: drawing them, running the finished towers over them, and keeping some thousands of the results, of which a few
are replaced at each step: a picture is asked about a few times, in other words each time, and costs its tower pass
once. Leaves the towers' own training to `pretrain.py` and `pretrain_ears.py`, the conversations to `media.py`.
"""

import dataclasses
import random

import clips
import media
import pictures
import sounds
import torch
import towers

from mlx_gemma4.media.images import process_image
from mlx_gemma4.media.mel import log_mel

BATCH = 6  # frames or pictures of a tower pass
SPACE = {"picture": 1800, "picture-140": 150, "picture-280": 80, "sound": 500, "clip": 500, "long-clip": 24}
# What each kind gets in one refresh of `BATCH` frames, and how often.
TURN = ("picture",) * 9 + ("picture-140", "picture-280") + ("clip",) * 4 + ("sound",) * 2


class Pool:
    """Items whose parts are seen already, in float32."""

    def __init__(self, eyes: towers.Eyes, ears: towers.Ears, rng: random.Random, compiled: bool) -> None:
        self.eyes, self.ears, self.rng = eyes, ears, rng
        self.look = torch.compile(eyes.look, dynamic=False) if compiled else eyes.look
        self.kept: dict[str, list[media.Item]] = {kind: [] for kind in SPACE}
        self.turn = 0

    def take(self, kind: str) -> media.Item | list[media.Item]:
        return self.rng.choice(self.kept[kind])

    def _put(self, kind: str, item) -> None:
        kept = self.kept[kind]
        if len(kept) < SPACE[kind]:
            kept.append(item)
        else:
            kept[self.rng.randrange(len(kept))] = item

    @torch.no_grad()
    def _seen(self, images: list, budget: int) -> list[media.Seen]:
        parts = [process_image(image, budget) for image in images]
        out = []
        for start in range(0, len(parts), BATCH):
            some = parts[start : start + BATCH]
            filled = some + some[:1] * (BATCH - len(some)) if budget == 70 else some
            look = self.look if budget == 70 else self.eyes.look
            with torch.autocast("cpu", dtype=torch.bfloat16):
                made = look(*towers.batch_images(filled, budget * towers.PATCHES))
            out += [
                media.Seen(made[i, : part.tokens].float(), part.rows // 3, part.columns // 3)
                for i, part in enumerate(some)
            ]
        return out

    @torch.no_grad()
    def _heard(self, sound: sounds.Sound) -> media.Item:
        mel = log_mel(sound.samples)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            made = self.ears.listen(*towers.batch_mel([mel], -(-len(mel) // 48) * 48))
        return media.Item("audio", [media.Seen(made[0, : media.tokens_of(mel)].float())], sound)

    def refresh(self) -> None:
        """Draws, looks at and keeps a few new items of one kind."""
        rng, kind = self.rng, TURN[self.turn % len(TURN)]
        self.turn += 1
        if kind == "sound":
            for _ in range(BATCH):
                self._put(kind, self._heard(sounds.draw(rng, rng.choice((2.0, 2.4, 3.0, 5.0)))))
        elif kind == "clip":
            self._clips("clip", [clips.draw(rng, n) for n in rng.choice(((2, 2, 2), (3, 3), (2, 4)))])
            if self.turn % 120 < len(TURN):
                self._clips("long-clip", [clips.draw(rng, rng.randrange(8, 33))])
        else:
            budget = int(kind.partition("-")[2] or 70)
            scenes = [pictures.draw(rng) for _ in range(BATCH * 70 // budget)]
            for scene, made in zip(scenes, self._seen([s.image for s in scenes], budget), strict=True):
                self._put(kind, media.Item("image", [made], dataclasses.replace(scene, image=None)))

    def _clips(self, kind: str, some: list[clips.Clip]) -> None:
        seen = iter(self._seen([frame for clip in some for frame in clip.frames], 70))
        for clip in some:
            parts = [next(seen) for _ in clip.frames]
            items = [media.Item("video", parts, dataclasses.replace(clip, frames=()), media.stamps(clip))]
            self._put(kind, items if clip.sound is None else [*items, self._heard(clip.sound)])
