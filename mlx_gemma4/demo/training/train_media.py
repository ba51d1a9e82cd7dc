"""Trains the small model with eyes and ears: goes on from the text model and the towers taught alone.

    python grow.py TEXT_CHECKPOINT OUT
    python pretrain.py OUT & python pretrain_ears.py OUT; wait
    python train_media.py OUT --text TEXT_CHECKPOINT [--minutes 60]

Owns: the mixture (a third of the rows are `world.rows`), the schedule, which runs by the clock, and the saving. Two
processes average their gradients, as in `train.py`.
"""

import argparse
import json
import os
import random
import socket
import time
from pathlib import Path

import judging
import media
import model as small
import muon
import pictures
import pretrain
import pretrain_ears
import sounds
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as nnf
import towers
import world
from grow import VOCABULARY
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn

WORKERS = 2
ROW = 512
TEXT_ROWS = 2  # of six in a step
LONG = {1024: 4, 2048: 2, 4096: 1}
OTHERS_WEIGHT = 0.05
AIDS = 0.5  # weight of the labels that the towers were taught with
FRAMES = 5  # of a clip, at most, in ordinary rows
PATCHES = 70 * towers.PATCHES


class Whole(nn.Module):
    """Everything that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.text = small.build(0, VOCABULARY)
        self.eyes, self.ears = towers.Eyes(), towers.Ears()
        self.sees = pretrain.Heads(pictures.LABELS | {"sides": pictures.SIDES})
        self.hears = pretrain.Heads(sounds.LABELS)

    def forward(self, ids: torch.Tensor, soft: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Logits; where `soft` holds, `features` stand in place of embeddings and the per-layer ids are padding."""
        decoder = self.text.model
        known = torch.where(soft, 0, ids)
        embeds = torch.where(soft[..., None], features, decoder.embed_tokens(known))
        per_layer = decoder.get_per_layer_inputs(known, None)
        return self.text(inputs_embeds=embeds, per_layer_inputs=per_layer, use_cache=False).logits


def grown(folder: Path, out: Path, whole: Whole) -> None:
    """Puts the text checkpoint's weights into `whole`; new tokens begin as the mean of what they were spelled with."""
    old = Tokenizer.from_file(str(folder / "tokenizer.json"))
    new = Tokenizer.from_file(str(out / "tokenizer.json"))
    stored = load_file(folder / "model.safetensors")
    weights = {name.removeprefix("model.language_model."): value.float() for name, value in stored.items()}
    target = whole.text.model.state_dict()
    for name, value in weights.items():
        if target[name].shape == value.shape:
            continue
        rows = target[name].clone()
        rows[: len(value)] = value
        for number in range(len(value), len(rows)):
            token = new.id_to_token(number).replace("\u2581", " ")
            parts = [] if token.startswith("<") else old.encode(token, add_special_tokens=False).ids
            rows[number] = value[parts].mean(0) if parts else rows[number] * value.std() / rows.std()
        weights[name] = rows
    missing, unexpected = whole.text.model.load_state_dict(weights, strict=False)
    if missing or unexpected:
        raise ValueError(f"weights do not fit: missing {missing}, unexpected {unexpected}")
    for part, heads, file in ((whole.eyes, whole.sees, "eyes.pt"), (whole.ears, whole.hears, "ears.pt")):
        state = torch.load(out / file, weights_only=True)["model"]
        name = file.removesuffix(".pt")
        part.load_state_dict({k.removeprefix(name + "."): v for k, v in state.items() if k.startswith(name + ".")})
        heads.load_state_dict({k.removeprefix("heads."): v for k, v in state.items() if k.startswith("heads.")})


def schedule(at: float) -> float:
    """Share of the peak learning rate at progress 0..1."""
    return max(0.0, min(1.0, at / 0.02 + 0.05, (1.0 - at) / 0.5 + 0.005))


class Worker:
    """One of the two processes: its streams of rows, and the loss of a step."""

    def __init__(self, whole: Whole, encode, seed: str, rank: int, compiled: bool) -> None:
        self.whole, self.encode, self.rank = whole, encode, rank
        self.rng = random.Random(f"media/{seed}/{rank}")
        self.texts = {n: world.rows(f"{seed}/{rank}", n, encode) for n in (ROW, *LONG)}
        self.fast_text = torch.compile(whole, dynamic=False) if compiled else whole
        self.fast_eyes = torch.compile(whole.eyes, dynamic=False) if compiled else whole.eyes

    def rows(self, step: int) -> list[media.Row]:
        """Six rows of 512, or fewer longer ones."""
        rng, encode = self.rng, self.encode
        if step % 20 == 13:
            length = (1024, 2048, 4096)[step // 20 % 3]
            return [media.text_row(next(self.texts[length])) for _ in range(LONG[length])]
        if step % 60 == 39:
            return [media.clip_row(rng, encode, 2560, rng.randrange(8, 33))]
        rows = [media.text_row(next(self.texts[ROW])) for _ in range(TEXT_ROWS)]
        if step % 24 == 5:
            return rows + [media.picture_row(rng, encode, ROW, 280, 1) for _ in range(3)]
        if step % 24 == 11:
            return rows + [media.picture_row(rng, encode, ROW, 140, 1) for _ in range(4)]
        rows += [media.picture_row(rng, encode, ROW, 70, 2) for _ in range(3)]
        if (step + self.rank) % 2:
            return [*rows, media.sound_row(rng, encode, ROW)]
        return [*rows, media.clip_row(rng, encode, ROW, rng.randrange(2, FRAMES))]

    def loss(self, rows: list[media.Row]) -> tuple[torch.Tensor, dict[str, float]]:
        whole, runs = self.whole, [(b, *run) for b, row in enumerate(rows) for run in row.runs]
        features = torch.zeros(len(rows), len(rows[0].ids), towers.WIDTH)
        soft = torch.zeros(features.shape[:2], dtype=torch.bool)
        aids, said = torch.zeros(()), {}
        places, values = [], []
        pictures_ = [(b, at, item, i) for b, at, item, i in runs if item.kind == "image"]
        frames = [(b, at, item, i) for b, at, item, i in runs if item.kind == "video"]
        clips = [(b, at, item, i) for b, at, item, i in runs if item.kind == "audio"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if pictures_:
                images = [item.parts[i] for *_, item, i in pictures_]
                patches = next(b for b in (70, 140, 280) if b * 9 >= max(len(p.patches) for p in images)) * 9
                eyes = self.fast_eyes if patches == PATCHES else whole.eyes
                scenes = [item.source for *_, item, _ in pictures_]
                made = eyes(*towers.batch_images(images, patches))
                targets = pretrain.picture_targets(scenes, images, patches // towers.PATCHES)
                part, said = pretrain.picture_loss(whole.sees(made), targets)
                aids = aids + part
                places += [(b, at, p.tokens) for (b, at, _, _), p in zip(pictures_, images, strict=True)]
                values += [f[: p.tokens] for f, p in zip(made, images, strict=True)]
            for start in range(0, len(frames), FRAMES):
                some = frames[start : start + FRAMES]
                images = [item.parts[i] for *_, item, i in some]
                filled = images + images[:1] * (FRAMES - len(images))  # one shape, so that it is compiled once
                with torch.no_grad():
                    made = self.fast_eyes(*towers.batch_images(filled, PATCHES))
                places += [(b, at, p.tokens) for (b, at, _, _), p in zip(some, images, strict=True)]
                values += [f[: p.tokens] for f, p in zip(made, images, strict=False)]
            if clips:
                mels = [item.parts[i] for *_, item, i in clips]
                longest = -(-max(map(len, mels)) // 48) * 48
                made = whole.ears(*towers.batch_mel(mels, longest))
                targets = pretrain_ears.sound_targets([item.source for *_, item, _ in clips], longest // 4)
                part, heard = pretrain_ears.sound_loss(whole.hears(made), targets)
                aids, said = aids + part, said | heard
                places += [(b, at, media.tokens_of(m)) for (b, at, _, _), m in zip(clips, mels, strict=True)]
                values += [f[: media.tokens_of(m)] for f, m in zip(made, mels, strict=True)]
            if places:
                row = torch.cat([torch.full((n,), b) for b, _, n in places])
                column = torch.cat([torch.arange(at, at + n) for _, at, n in places])
                features = features.index_put((row, column), torch.cat(values).float())
                soft[row, column] = True
            ids = torch.tensor([r.ids for r in rows])
            text = self.fast_text if ids.shape == (6, ROW) else whole
            logits = text(ids, soft, features)
        own = torch.tensor([r.own for r in rows])
        target, weight = ids[:, 1:].reshape(-1), own[:, 1:].reshape(-1)
        weight = torch.where(weight == 0, OTHERS_WEIGHT, weight).clamp(min=0)
        losses = nnf.cross_entropy(logits[:, :-1].float().reshape(target.numel(), -1), target, reduction="none")
        by_row = (losses * weight).reshape(len(rows), -1).sum(1).detach() / weight.reshape(len(rows), -1).sum(1)
        if len(rows) == 6:
            kinds = {i.kind for _, i, _ in rows[-1].runs}
            last = "140" if kinds == {"image"} else "clip" if "video" in kinds else "sound"
            said |= {"text": float(by_row[:2].mean()), "see": float(by_row[2:5].mean()), last: float(by_row[5])}
        return (losses * weight).sum() / weight.sum() + AIDS * aids, said


@torch.no_grad()
def predict(whole: Whole, talk: media.Dialog, encode) -> tuple[list[int], list[int]]:
    """(what the model finds likeliest, what it should say) over the reply, each token given the right ones before."""
    row = media.Row()
    media.add(row, talk, encode)
    features = torch.zeros(1, len(row.ids), towers.WIDTH)
    soft = torch.zeros(1, len(row.ids), dtype=torch.bool)
    for at, item, i in row.runs:
        part = item.parts[i]
        if item.kind == "audio":
            made = whole.ears(*towers.batch_mel([part], len(part)))
        else:
            made = whole.eyes(*towers.batch_images([part], len(part.patches)))
        n = media.tokens_of(part)
        features[0, at : at + n], soft[0, at : at + n] = made[0, :n], True
    ids = torch.tensor([row.ids])
    likely = whole(ids, soft, features)[0].argmax(-1).tolist()
    mine = [i for i, w in enumerate(row.own) if w > 0]
    return [likely[i - 1] for i in mine], [row.ids[i] for i in mine]


def teacher_forced(whole: Whole, kind: str, count: int, tokenizer, encode, seed: int) -> float:
    """Share of right answers when each token follows the right ones; for boxes a little kinder than the truth."""
    good = 0
    for talk in media.test_set(kind, count, seed):
        said, wanted = predict(whole, talk, encode)
        text = tokenizer.decode(said, skip_special_tokens=False).removesuffix(world.END)
        good += said == wanted or (kind.startswith("detect") and judging.right(kind, text, talk.example.answer))
    return good / count


def worker(rank: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(args.port))
    dist.init_process_group("gloo", rank=rank, world_size=WORKERS)
    out = Path(args.out)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    whole = Whole()
    first, tokens, before = 0, 0, 0.0
    texts = muon.Optimiser(whole.text, args.text_lr, args.text_lr / 3, args.text_lr / 3)
    others = nn.ModuleDict({"eyes": whole.eyes, "ears": whole.ears, "sees": whole.sees, "hears": whole.hears})
    sensing = muon.Optimiser(others, args.tower_lr, args.tower_lr / 4, args.tower_lr / 4)
    if args.resume:
        state = torch.load(out / "state.pt", weights_only=True)
        whole.load_state_dict(state["model"])
        texts.load_state_dict(state["texts"])
        sensing.load_state_dict(state["sensing"])
        first, tokens, before = state["step"], state["tokens"], state["seconds"]
    else:
        grown(Path(args.text), out, whole)
    params = list(whole.parameters())
    mine = Worker(whole, encode, f"{args.seed}/{first}", rank, args.compile)
    begin, smooth, step, saved, looked = time.time() - before, {}, first, before, before
    limit, seconds = args.minutes * 60, before
    if rank == 0:
        print(f"{sum(p.numel() for p in params):,} weights", flush=True)
    while seconds < limit:
        rows = mine.rows(step)
        loss, said = mine.loss(rows)
        for p in params:
            p.grad = None
        loss.backward()
        clock = torch.tensor([time.time() - begin if rank == 0 else 0.0])
        flat = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.reshape(-1) for p in params] + [clock])
        dist.all_reduce(flat)
        seconds, flat = float(flat[-1]), flat[:-1] / WORKERS
        flat *= min(1.0, 1.0 / (float(flat.norm()) + 1e-6))
        for p, g in zip(params, flat.split([p.numel() for p in params]), strict=True):
            p.grad = g.view_as(p)
        share = schedule(seconds / limit)
        texts.step(share)
        sensing.step(share)
        tokens += sum(len(r.ids) for r in rows) * WORKERS
        step += 1
        for name, value in said.items():
            if value == value:
                smooth[name] = 0.95 * smooth.get(name, value) + 0.05 * value
        if rank == 0 and step % 20 == 0:
            shown = ("text", "see", "140", "clip", "sound", "off", "shape", "colour", "rank", "x1a", "x1b", "ordinal")
            line = " ".join(f"{k} {smooth[k]:.3f}" for k in shown if k in smooth)
            print(f"step {step} {line} tokens {tokens:,} seconds {seconds:.0f}", flush=True)
        done = seconds >= limit
        if done or seconds - looked > args.look * 60:
            looked = seconds
            whole.eval()
            kinds = [k for i, k in enumerate(media.KINDS) if i % WORKERS == rank]
            scores = {k: teacher_forced(whole, k, args.look_at, tokenizer, encode, 1) for k in kinds}
            whole.train()
            gathered: list[dict | None] = [None] * WORKERS
            dist.all_gather_object(gathered, scores)
            if rank == 0:
                merged = {k: round(v, 2) for part in gathered if part for k, v in part.items()}
                print(f"step {step} unseen {json.dumps(merged)} seconds {seconds:.0f}", flush=True)
        if rank == 0 and (done or seconds - saved > 180):
            saved = seconds
            state = {"model": whole.state_dict(), "texts": texts.state_dict(), "sensing": sensing.state_dict()}
            torch.save(state | {"step": step, "tokens": tokens, "seconds": seconds}, out / "state.new")
            (out / "state.new").replace(out / "state.pt")
    if rank == 0:
        report = {"steps": step, "tokens": tokens, "seconds": round(seconds), "seed": args.seed}
        (out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
        print("done", json.dumps(report), flush=True)
    dist.destroy_process_group()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--text", help="the text model's checkpoint, of train.py")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--look", type=float, default=8, help="minutes between looks at unseen questions")
    parser.add_argument("--look-at", type=int, default=24, help="how many of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text-lr", type=float, default=0.006)
    parser.add_argument("--tower-lr", type=float, default=0.01)
    parser.add_argument("--port", type=int, default=0, help="for the two processes to meet on; 0: any free one")
    parser.add_argument("--resume", action="store_true", help="go on from the last save")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    if not args.port:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            args.port = s.getsockname()[1]
    return args


if __name__ == "__main__":
    mp.spawn(worker, args=(arguments(),), nprocs=WORKERS)
