"""Teaches the audio tower, before it meets the text model, to say of each soft token what is heard in it.

    python pretrain_ears.py OUT --minutes 8

Owns: the loop on `sounds.labels`. One process, one thread.
"""

import argparse
import random
import time
from pathlib import Path

import muon
import sounds
import torch
import torch.nn.functional as nnf
import towers
from pretrain import Heads
from torch import nn

from mlx_gemma4.media.mel import log_mel

CLIPS = 8  # of a step


def sound_targets(drawn: list, tokens: int) -> dict[str, torch.Tensor]:
    """Labels [B, tokens], -100 behind the end of shorter sounds."""
    out = {name: torch.full((len(drawn), tokens), -100) for name in sounds.LABELS}
    for i, sound in enumerate(drawn):
        own = -(-((len(sound.samples) - 161) // 160 + 1) // 4)
        for name, value in sounds.labels(sound, own).items():
            out[name][i, :own] = torch.from_numpy(value)
    return out


def sound_loss(said: dict[str, torch.Tensor], asked: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict]:
    """Summed cross-entropies and accuracies (on asked tokens that are not of class 0)."""
    total, right = torch.zeros(()), {}
    for name, logits in said.items():
        use = asked[name] >= 0
        total = total + nnf.cross_entropy(logits[use], asked[name][use])
        some = asked[name] > 0
        right[name] = float((logits.argmax(-1) == asked[name])[some].float().mean())
    return total, right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    ears, heads = towers.Ears(), Heads(sounds.LABELS)
    towers.start(ears, args.seed)
    whole = nn.ModuleDict({"ears": ears, "heads": heads})
    optimiser = muon.Optimiser(whole, 0.02, 0.004, 0.004)
    rng = random.Random(f"ears/{args.seed}")
    begin, smooth, step = time.time(), {}, 0
    while (seconds := time.time() - begin) < args.minutes * 60:
        drawn = [sounds.draw(rng) for _ in range(CLIPS)]
        mels = [log_mel(s.samples) for s in drawn]
        frames = -(-max(map(len, mels)) // 48) * 48
        with torch.autocast("cpu", dtype=torch.bfloat16):
            said = heads(ears(*towers.batch_mel(mels, frames)))
        loss, right = sound_loss(said, sound_targets(drawn, frames // 4))
        for p in whole.parameters():
            p.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
        optimiser.step(min(1.0, step / 40 + 0.02, 1.15 - seconds / (args.minutes * 60)))
        step += 1
        for name, value in {"loss": float(loss.detach()), **right}.items():
            if value == value:
                smooth[name] = 0.95 * smooth.get(name, value) + 0.05 * value
        if step % 20 == 0:
            print(step, f"{seconds:.0f}s", " ".join(f"{k} {v:.3f}" for k, v in smooth.items()), flush=True)
            state = {"model": whole.state_dict(), "step": step, "seconds": time.time() - begin}
            torch.save(state, args.out / "ears.pt")


if __name__ == "__main__":
    main()
