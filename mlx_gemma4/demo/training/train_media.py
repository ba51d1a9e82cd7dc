"""Trains the small model with eyes and ears: the text model and both projectors, with the towers as they were taught.

    python grow.py TEXT_CHECKPOINT OUT
    python pretrain.py OUT & python pretrain_ears.py OUT; wait
    python train_media.py OUT --text TEXT_CHECKPOINT [--minutes 60]

Owns: the mixture (texts of `world.rows`, tool calls of `calls.rows`, and what `pool.py` has looked at), what is taught
besides the next token (`aim_losses`, and where heads look), the schedule, which runs by the clock, and the saving. Two
processes average their gradients, as in `train.py`. The towers stay as they are: what a tower makes of a picture then
need not be made again for every question.
"""

import argparse
import functools
import itertools
import json
import os
import random
import socket
import time
from collections.abc import Callable
from pathlib import Path

import calls
import copying
import judging
import media
import model as small
import muon
import pictures
import pool
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as nnf
import towers
import train
import world
from grow import VOCABULARY
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn
from transformers.models.gemma4.modeling_gemma4 import apply_rotary_pos_emb

WORKERS = 2
ROW = 512
TEXT_ROWS, CALL_ROWS = 2, 3  # of a step, of ROW tokens
PICTURE = {"picture": (6, 160), "picture-140": (5, 240), "picture-280": (3, 384)}  # rows of a step, their tokens
PAIRS = (4, 320)  # two pictures in a row
CLIP_ROWS, CLIP = 2, 336
LONG_CLIP = 2560
LONG = {1024: 4, 2048: 2, 4096: 1}
OTHERS_WEIGHT = 0.05
SOFT_CAP = small.TEXT["final_logit_softcapping"]
COUNTS = 5  # boxes of an answer: none to four
SIDES_WEIGHT, COUNT_WEIGHT, LOOK_WEIGHT, NAME_WEIGHT = 1.5, 0.2, 0.6, 0.15
LOOKING = (4, 6)  # global layers that share keys; some heads of each are shown where to look
SEEING_HEADS, COPYING_HEADS = slice(0, 2), slice(2, 4)
COPY_WEIGHT = 0.3
COPIED = (1.5, 4.0)  # weights of a token inside a copied word, and of the first, beside 1 for others
FAST = ("text", "picture", "clip", "sound")  # kinds whose shapes are worth compiling


class Whole(nn.Module):
    """The model, and the linear maps that `aim_losses` reads it with."""

    def __init__(self) -> None:
        super().__init__()
        self.text = small.build(0, VOCABULARY)
        self.eyes, self.ears = towers.Eyes(), towers.Ears()
        self.read: dict[int, torch.Tensor] = {}
        for number in LOOKING:
            attention = self.text.model.layers[number].self_attn
            attention.register_forward_pre_hook(functools.partial(self._note, number), with_kwargs=True)
        # For `aim_losses`; used in training only.
        self.probe = nn.Linear(towers.WIDTH, 4 + COUNTS)
        self.names = nn.Linear(towers.WIDTH, len(pictures.COLOURS) + len(pictures.SHAPES))

    def forward(
        self, ids: torch.Tensor, soft: torch.Tensor, features: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """(logits, last hidden state, what the attention of the LOOKING layers reads); where `soft` holds, `features`
        stand in place of embeddings and the per-layer ids are padding."""
        decoder = self.text.model
        known = torch.where(soft, 0, ids)
        embeds = torch.where(soft[..., None], features, decoder.embed_tokens(known))
        per_layer = decoder.get_per_layer_inputs(known, None)
        hidden = decoder(inputs_embeds=embeds, per_layer_inputs=per_layer, use_cache=False).last_hidden_state
        logits = self.text.lm_head(hidden)
        return SOFT_CAP * torch.tanh(logits / SOFT_CAP), hidden, [self.read[number] for number in LOOKING]

    def _note(self, number: int, _module: nn.Module, _args: tuple, kwargs: dict) -> None:
        self.read[number] = kwargs["hidden_states"]

    def looks(self, read: list[torch.Tensor], where: list[tuple[int, int]], heads: slice) -> list[torch.Tensor]:
        """Scores of some heads, [N, heads, L], of the LOOKING layers at N places (row, position).

        read: of `forward`. As in transformers' Gemma4TextAttention; these layers share the keys of the first.
        """
        decoder = self.text.model
        row, position = torch.tensor(where).T
        length = read[0].shape[1]
        cos, sin = decoder.rotary_emb(read[0], torch.arange(length)[None], "full_attention")
        first = decoder.layers[LOOKING[0]].self_attn
        keys = apply_rotary_pos_emb(first.k_norm(first.k_proj(read[0])[:, :, None]), cos, sin, unsqueeze_dim=2)
        future = torch.arange(length)[None, None] > position[:, None, None]
        out = []
        for number, x in zip(LOOKING, read, strict=True):
            attention = decoder.layers[number].self_attn
            queries = attention.q_norm(attention.q_proj(x[row, position]).view(len(row), -1, attention.head_dim))
            queries = apply_rotary_pos_emb(queries[:, heads], cos[0, position], sin[0, position], 1)
            scores = torch.einsum("nhd,nld->nhl", queries, keys[row, :, 0]) * attention.scaling
            out.append(scores.float().masked_fill(future, -torch.inf))
        return out

    def taught(self) -> list[nn.Module]:
        """What is trained here."""
        return [self.text, self.eyes.embed_vision, self.ears.embed_audio, self.probe, self.names]


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


def towers_of(out: Path, whole: Whole) -> None:
    """The towers that were taught alone, with their projectors, into `whole`."""
    for part, name in ((whole.eyes, "eyes"), (whole.ears, "ears")):
        state = torch.load(out / f"{name}.pt", weights_only=True)["model"]
        part.load_state_dict({k.removeprefix(name + "."): v for k, v in state.items() if k.startswith(name + ".")})


def encoder(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """Texts to ids, with nothing put in front."""
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def schedule(at: float) -> float:
    """Share of the peak learning rate at progress 0..1."""
    return max(0.0, min(1.0, at / 0.02 + 0.05, (1.0 - at) / 0.5 + 0.005))


class Worker:
    """One of the two processes: its streams of rows, and the loss of a step."""

    def __init__(self, whole: Whole, tokenizer: Tokenizer, seed: str, rank: int, compiled: bool) -> None:
        self.whole, self.rank, self.encode = whole, rank, encoder(tokenizer)
        self.token_texts = copying.texts_of([tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())])
        encode = self.encode
        self.rng = random.Random(f"media/{seed}/{rank}")
        self.texts = {n: world.rows(f"{seed}/{rank}", n, encode) for n in (ROW, *LONG)}
        self.calls = calls.rows(f"{seed}/{rank}", ROW, encode)
        self.pool = pool.Pool(whole.eyes, whole.ears, self.rng, compiled)
        self.fast = torch.compile(whole, dynamic=False) if compiled else whole

    def groups(self, step: int) -> dict[str, list[media.Row]]:
        """The rows of a step by kind; those of a kind are equally long."""
        rng, encode, take = self.rng, self.encode, self.pool.take
        if step % 24 == 13:
            length = (1024, 2048, 4096)[step // 24 % 3]
            return {"long": [media.text_row(next(self.texts[length])) for _ in range(LONG[length])]}
        if step % 48 == 37:
            return {"long": [media.clip_row(rng, encode, LONG_CLIP, take("long-clip"))]}
        out = {"text": [media.text_row(row) for row in itertools.islice(self.texts[ROW], TEXT_ROWS)]}
        out["text"] += [self._call_row(row) for row in itertools.islice(self.calls, CALL_ROWS)]
        if step % 12 == 5:
            out["pair"] = [
                media.picture_row(rng, encode, PAIRS[1], [take("picture"), take("picture")]) for _ in range(PAIRS[0])
            ]
        else:
            kind = {3: "picture-140", 9: "picture-280"}.get(step % 12, "picture")
            count, length = PICTURE[kind]
            out[kind] = [media.picture_row(rng, encode, length, [take(kind)]) for _ in range(count)]
        if (step + self.rank) % 3 == 0:
            out["sound"] = [media.sound_row(rng, encode, CLIP, lambda: take("sound")) for _ in range(CLIP_ROWS)]
        else:
            out["clip"] = [self._clip_row() for _ in range(CLIP_ROWS)]
        return out

    def _call_row(self, pair: tuple[list[int], list[int]]) -> media.Row:
        """Tool calls and JSON, with where their words stand already."""
        row = media.text_row(pair)
        row.copied = copying.copies(row.ids, row.own, self.token_texts)
        first = copying.begins(row.copied)
        for at in row.copied:
            row.own[at + 1] = COPIED[at in first]
        return row

    def _clip_row(self) -> media.Row:
        """A clip short enough to leave room for questions."""
        while True:
            items = self.pool.take("clip")
            if sum(media.tokens_of(part) + 8 for item in items for part in item.parts) < CLIP - 40:
                return media.clip_row(self.rng, self.encode, CLIP, items)

    def loss(self, groups: dict[str, list[media.Row]]) -> tuple[torch.Tensor, dict[str, float]]:
        """The weighted mean over all tokens of a step, and the mean of each kind."""
        total, weights, aims, said = torch.zeros(()), 0.0, torch.zeros(()), {}
        for kind, rows in groups.items():
            one, weight, aim = self._sum(rows, self.fast if kind in FAST else self.whole)
            total, weights = total + one, weights + weight
            if kind != "long":
                said[kind] = float(one.detach()) / weight
            for name, value in aim.items():
                aims, said[name] = aims + value, float(value.detach())
        return total / weights + aims, said

    def _sum(self, rows: list[media.Row], run) -> tuple[torch.Tensor, float, dict[str, torch.Tensor]]:
        """(weighted sum of losses, sum of weights, losses of aims if there are any) of equally long rows."""
        ids = torch.tensor([r.ids for r in rows])
        features, soft = torch.zeros(*ids.shape, towers.WIDTH), torch.zeros(ids.shape, dtype=torch.bool)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for projector, heard in ((self.whole.eyes.embed_vision, False), (self.whole.ears.embed_audio, True)):
                runs = [(b, at, item.parts[i].features) for b, row in enumerate(rows) for at, item, i in row.runs
                        if (item.kind == "audio") == heard]  # fmt: skip
                if not runs:
                    continue
                row = torch.cat([torch.full((len(part),), b) for b, _, part in runs])
                column = torch.cat([torch.arange(at, at + len(part)) for _, at, part in runs])
                made = projector(torch.cat([part for *_, part in runs]))
                features = features.index_put((row, column), made.float())
                soft[row, column] = True
            logits, hidden, read = run(ids, soft, features)
        own = torch.tensor([r.own for r in rows])
        target, weight = ids[:, 1:].reshape(-1), own[:, 1:].reshape(-1)
        weight = torch.where(weight == 0, OTHERS_WEIGHT, weight).clamp(min=0)
        losses = nnf.cross_entropy(logits[:, :-1].float().reshape(target.numel(), -1), target, reduction="none")
        said = self._aimed(rows, hidden, read) | self._copied(rows, read)
        return (losses * weight).sum(), float(weight.sum()), said

    def _copied(self, rows: list[media.Row], read: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """How far the copying heads are from looking at what is to be copied."""
        where = [(b, at) for b, row in enumerate(rows) for at in row.copied]
        if not where:
            return {}
        mine = torch.zeros(len(where), 1, len(rows[0].ids), dtype=torch.bool)
        for n, (b, at) in enumerate(where):
            mine[n, 0, rows[b].copied[at]] = True
        weights = torch.tensor([rows[b].own[at + 1] for b, at in where])
        return {"copy": COPY_WEIGHT * missed(self.whole.looks(read, where, COPYING_HEADS), mine, weights)}

    def _aimed(self, rows: list[media.Row], hidden: torch.Tensor, read: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """`aim_losses`, and how far the seeing heads are from looking at what is asked for."""
        where = [(b, at) for b, row in enumerate(rows) for at in row.aimed]
        if not where:
            return {}
        aims = [aim for row in rows for aim in row.aimed.values()]
        row, position = torch.tensor(where).T
        known, names = self.whole.probe(hidden[row, position].float()), self.whole.names(read[0][row, position].float())
        said = aim_losses(known, names, aims)
        # Once one side is written it says which thing is meant.
        asked = [
            (place, aim) for place, aim in zip(where, aims, strict=True)
            if aim.things and (aim.sides[0] >= 0 or (max(aim.sides) < 0 and aim.count < 1))
        ]  # fmt: skip
        if asked:
            mine = torch.zeros(len(asked), 2, hidden.shape[1], dtype=torch.bool)
            for n, ((b, _), aim) in enumerate(asked):
                at, item, i = rows[b].runs[aim.run]
                part = item.parts[i]
                owner, _ = pictures.owners(item.source, part.rows, part.columns)
                for head, thing in enumerate(aim.things):
                    mine[n, head, at : at + len(owner)] = torch.from_numpy(owner == thing)
            looks = self.whole.looks(read, [place for place, _ in asked], SEEING_HEADS)
            said["look"] = LOOK_WEIGHT * missed(looks, mine, torch.ones(len(asked)))
        return said


def missed(scores: list[torch.Tensor], mine: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean, weighted by [N], of the negative logarithm of the attention that falls on `mine` [N, heads or 1, L].

    scores: of one layer each, [N, heads, L].
    """
    each = [s.logsumexp(-1) - s.masked_fill(~mine, -torch.inf).logsumexp(-1) for s in scores]
    return (sum(each).mean(-1) * weights).sum() / weights.sum() / len(each)


def aim_losses(known: torch.Tensor, names: torch.Tensor, aims: list[media.Aim]) -> dict[str, torch.Tensor]:
    """How far the model is from knowing, before it writes a box, its sides, how many there are and what was asked for.

    known: [N, 4 + COUNTS]. names: [N, colours + shapes], of what the first LOOKING layer reads. The digits alone teach
    where to look in the picture only a few positions at a time.
    """
    out, sides, counts = {}, torch.tensor([a.sides for a in aims]), torch.tensor([a.count for a in aims])
    first = (sides[:, 0] >= 0) | (counts < 1)
    if (asked := sides >= 0).any():
        out["sides"] = SIDES_WEIGHT * nnf.smooth_l1_loss(known[:, :4][asked], sides[asked], beta=0.02)
    if (asked := counts >= 0).any():
        out["count"] = COUNT_WEIGHT * nnf.cross_entropy(known[asked, 4:], counts[asked])
    colours, shapes = torch.tensor([a.asked for a in aims]).T
    n = len(pictures.COLOURS)
    for part, target in ((names[:, :n], colours), (names[:, n:], shapes)):
        if (asked := (target >= 0) & first).any():
            out["name"] = out.get("name", 0.0) + NAME_WEIGHT * nnf.cross_entropy(part[asked], target[asked])
    return out


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
    likely = whole(ids, soft, features)[0][0].argmax(-1).tolist()
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

    encode, whole = encoder(tokenizer), Whole()
    first, tokens, before = 0, 0, 0.0
    taught = nn.ModuleList(whole.taught())
    optimiser = muon.Optimiser(taught, args.rate, args.rate / 3, args.rate / 3)
    if args.resume:
        state = torch.load(out / "state.pt", weights_only=True)
        whole.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        first, tokens, before = state["step"], state["tokens"], state["seconds"]
    else:
        grown(Path(args.text), out, whole)
        towers_of(out, whole)
        if args.start:
            state = torch.load(args.start, weights_only=True)["model"]
            whole.text.load_state_dict({k[5:]: v for k, v in state.items() if k.startswith("text.")})
    params = list(taught.parameters())
    mine = Worker(whole, tokenizer, f"{args.seed}/{first}", rank, args.compile)
    looking = time.time()
    for _ in range(args.fill):
        mine.pool.refresh()
    if rank == 0:
        kept = {kind: len(items) for kind, items in mine.pool.kept.items()}
        print(f"{sum(p.numel() for p in whole.parameters()):,} weights; looked at {kept} in", end=" ")
        print(f"{time.time() - looking:.0f} s", flush=True)
    dist.barrier()
    begin, smooth, step, saved, looked = time.time() - before, {}, first, before, before
    limit, seconds = args.minutes * 60, before
    texts = {k: world.test_set(k, args.look_at, encode) for k in ("facts", "sums", "rules", "talk")}
    while seconds < limit:
        mine.pool.refresh()
        groups = mine.groups(step)
        loss, said = mine.loss(groups)
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
        optimiser.step(schedule(seconds / limit))
        tokens += sum(len(r.ids) for rows in groups.values() for r in rows) * WORKERS
        step += 1
        for name, value in said.items():
            smooth[name] = 0.95 * smooth.get(name, value) + 0.05 * value
        if rank == 0 and step % 20 == 0:
            line = " ".join(f"{k} {v:.3f}" for k, v in sorted(smooth.items()))
            print(f"step {step} {line} tokens {tokens:,} seconds {seconds:.0f}", flush=True)
        done = seconds >= limit
        if done or seconds - looked > args.look * 60:
            looked = seconds
            whole.eval()
            kinds = [k for i, k in enumerate(media.KINDS) if i % WORKERS == rank]
            scores = {k: teacher_forced(whole, k, args.look_at, tokenizer, encode, 1) for k in kinds}
            kinds = [k for i, k in enumerate(texts) if i % WORKERS == rank]
            scores |= {k: train.teacher_forced(whole.text, texts[k], encode) for k in kinds}
            whole.train()
            gathered: list[dict | None] = [None] * WORKERS
            dist.all_gather_object(gathered, scores)
            if rank == 0:
                merged = {k: round(v, 2) for part in gathered if part for k, v in part.items()}
                print(f"step {step} unseen {json.dumps(merged)} seconds {seconds:.0f}", flush=True)
        if rank == 0 and (done or seconds - saved > 180):
            saved = seconds
            state = {"model": whole.state_dict(), "optimiser": optimiser.state_dict()}
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
    parser.add_argument("--rate", type=float, default=0.008, help="peak learning rate of matrices")
    parser.add_argument("--start", help="the text model of another run's state.pt, instead of the checkpoint's")
    parser.add_argument("--fill", type=int, default=300, help="refreshes of the pool before the first step")
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
