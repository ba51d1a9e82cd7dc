"""Teaches the vision tower, before it meets the text model, to say of each soft token what it belongs to.

    python pretrain.py OUT --minutes 20

Owns: the loop on `pictures.labels`. One process, one thread; two of them share the machine's two cores.
"""

import argparse
import random
import time
from pathlib import Path

import muon
import pictures
import torch
import torch.nn.functional as nnf
import towers
from torch import nn

SIZES = {30: 16, 70: 8, 140: 4, 280: 2}  # budget of soft tokens -> pictures of a step


class Heads(nn.Module):
    """Linear readings of soft tokens, one per label; used in training only."""

    def __init__(self, sizes: dict[str, int]) -> None:
        super().__init__()
        self.sizes = sizes
        self.heads = nn.Linear(towers.WIDTH, sum(sizes.values()))

    def forward(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip(self.sizes, self.heads(features).float().split(list(self.sizes.values()), -1), strict=True))


def picture_targets(scenes: list, images: list, tokens: int) -> dict[str, torch.Tensor]:
    """Labels [B, tokens] of a batch, -100 behind the end of smaller pictures, and the numbers as "sides"."""
    out = {name: torch.full((len(scenes), tokens), -100) for name in pictures.LABELS}
    out["sides"] = torch.zeros(len(scenes), tokens, pictures.SIDES)
    for i, (scene, image) in enumerate(zip(scenes, images, strict=True)):
        classes, sides = pictures.labels(scene, image.rows // 3, image.columns // 3)
        for name, value in (classes | {"sides": sides}).items():
            out[name][i, : len(value)] = torch.from_numpy(value)
    return out


def picture_loss(said: dict[str, torch.Tensor], asked: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict]:
    """Summed cross-entropies, things weighing more than their ground, and accuracies on tokens of things."""
    thing = asked["shape"] > 0
    total, right = torch.zeros(()), {}
    for name, logits in said.items():
        target = asked[name]
        if name == "sides":
            off = nnf.smooth_l1_loss(logits[thing], target[thing], reduction="none", beta=0.05)
            total = total + 16 * off[:, :4].mean() + 4 * off[:, 4:].mean()
            right["off"] = float((logits - target)[thing][:, :4].abs().mean().detach())
            continue
        use = thing | (torch.zeros_like(thing) if name == "count" else target >= 0)
        if not use.any():
            continue
        loss = nnf.cross_entropy(logits[use], target[use], reduction="none")
        weight = torch.where(thing[use], 1.0, 0.2)
        share = pictures.WEIGHT[name if name in pictures.WEIGHT else name[-1]]
        total = total + share * (loss * weight).sum() / weight.sum()
        right[name] = float((logits.argmax(-1) == target)[thing].float().mean())
    return total, right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--planned", type=float, help="minutes the learning rate is planned for; default: --minutes")
    parser.add_argument("--rate", type=float, default=0.016, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--start", type=Path, help="an eyes.pt to go on from, with a clock of its own")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    eyes, heads = towers.Eyes(), Heads(pictures.LABELS | {"sides": pictures.SIDES})
    towers.start(eyes, args.seed)
    whole = nn.ModuleDict({"eyes": eyes, "heads": heads})
    optimiser = muon.Optimiser(whole, args.rate, args.rate / 5, args.rate / 5)
    before, step = 0.0, 0
    if args.resume:
        state = torch.load(args.out / "eyes.pt", weights_only=True)
        whole.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        before, step = state["seconds"], state["step"]
    elif args.start:
        whole.load_state_dict(torch.load(args.start, weights_only=True)["model"])
    fast = torch.compile(eyes, dynamic=False)
    rng = random.Random(f"pretrain/{args.seed}/{step}")
    begin, smooth, saved = time.time() - before, {}, time.time()
    limit, planned = args.minutes * 60, (args.planned or args.minutes) * 60
    while (seconds := time.time() - begin) < limit:
        part = max(seconds / planned, 0.4 if args.start else 0.0)
        budget = rng.choices(list(SIZES), (100, 0, 0, 0) if part < 0.4 else (0, 88, 8, 4))[0]
        scenes = [pictures.draw(rng, most=1 if part < 0.1 else 3 if part < 0.3 else 4) for _ in range(SIZES[budget])]
        images = [towers.small_image(s.image, budget) for s in scenes]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            said = heads(fast(*towers.batch_images(images, budget * towers.PATCHES)))
        loss, right = picture_loss(said, picture_targets(scenes, images, budget))
        for p in whole.parameters():
            p.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
        optimiser.step(min(1.0, step / 40 + 0.02, 1.15 - seconds / planned))
        step += 1
        for name, value in {"loss": float(loss.detach()), **right}.items():
            if value == value:
                smooth[name] = 0.95 * smooth.get(name, value) + 0.05 * value
        if step % 20 == 0:
            print(step, f"{seconds:.0f}s", " ".join(f"{k} {v:.3f}" for k, v in smooth.items()), flush=True)
        if time.time() - saved > 120 or seconds + 2 > limit:
            saved = time.time()
            state = {"model": whole.state_dict(), "optimiser": optimiser.state_dict(), "step": step}
            torch.save(state | {"seconds": time.time() - begin}, args.out / "eyes.new")
            (args.out / "eyes.new").replace(args.out / "eyes.pt")
    torch.save(state | {"model": whole.state_dict(), "seconds": time.time() - begin}, args.out / "eyes.pt")


if __name__ == "__main__":
    main()
