"""Trains the small model on two CPU cores: two processes, one thread each, averaging their gradients.

    python tokenizer.py OUT
    python train.py OUT [--steps 1750]

Owns: the loop, the schedule, the loss weights and the saving. Deterministic for a given machine: the seeds are fixed,
each process draws its own rows. Two processes instead of two threads: with small matrices threads spend their time
waiting for one another. Matrix products run in bfloat16 (autocast), weights and everything else in float32.
"""

import argparse
import json
import os
import socket
import time
from pathlib import Path

import model as small
import muon
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as nnf
import world
from tokenizers import Tokenizer

WORKERS = 2
ROW = 512
ROWS = 6  # rows per worker and step
LONG = {1024: 4, 2048: 2, 4096: 1}  # row length -> rows per worker and step
EASY, EASY_UNTIL = 140, 0.25  # recall texts are at most this long in the first part of the training
OTHERS_WEIGHT = 0.05  # loss weight of tokens the model does not write itself
LEFT_OUT = ("unknown", "recall-1024", "recall-2048", "recall-4096")  # too slow to ask during the training


def schedule(at: float) -> float:
    """Share of the peak learning rate at progress `at` in 0..1: short warm-up, flat, to zero from the middle on."""
    return min(1.0, at / 0.02 + 0.01, (1.0 - at) / 0.5 + 0.01)


def row_length(step: int, steps: int) -> int:
    """Rows of 512 at first; from half-way on every fourth step a long one, in turn 1024, 2048 and 4096."""
    if step < steps // 2 or step % 4:
        return ROW
    return (1024, 2048, 4096)[step // 4 % 3]


def loss_of(model, rows, mixed: bool) -> torch.Tensor:
    ids = torch.tensor([r[0] for r in rows])
    own = torch.tensor([r[1] for r in rows])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        logits = model(input_ids=ids, use_cache=False).logits
    target, weight = ids[:, 1:].reshape(-1), own[:, 1:].reshape(-1).float()
    weight = weight + OTHERS_WEIGHT * (1 - weight) * (target != 0)
    losses = nnf.cross_entropy(logits[:, :-1].float().reshape(target.numel(), -1), target, reduction="none")
    return (losses * weight).sum() / weight.sum()


@torch.no_grad()
def teacher_forced(model, examples, encode) -> float:
    """Share of examples whose whole reply is the likeliest continuation token by token, which is greedy exactness."""
    right = 0
    for example in examples:
        ids, own = world.encode_example(example, encode)
        last = len(ids) - 1
        while not own[last]:
            last -= 1
        start = last
        while own[start - 1]:
            start -= 1
        likely = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].argmax(-1)
        right += likely[start - 1 : last].tolist() == ids[start : last + 1]
    return right / len(examples)


def worker(rank: int, args: argparse.Namespace) -> None:
    """One of the two processes."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(args.port))
    dist.init_process_group("gloo", rank=rank, world_size=WORKERS)
    out = Path(args.out)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    model = small.build(args.seed)
    params = list(model.parameters())
    fast = torch.compile(model) if args.compile else model
    optimiser = muon.Optimiser(model, args.matrix_lr, args.vector_lr, args.embed_lr)
    first, tokens, spent = 0, 0, 0.0
    if args.resume:
        state = torch.load(out / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        first, tokens, spent = state["step"], state["tokens"], state["seconds"]
    seed = f"{args.seed}/{first}/{rank}"
    streams = {n: world.rows(seed, n, encode) for n in (ROW, *LONG)}
    easy = world.rows(seed, ROW, encode, longest=EASY)
    tests = {k: world.test_set(k, 20, encode) for k in world.TEST_KINDS if k not in LEFT_OUT}
    start, smooth = time.time() - spent, None
    if rank == 0:
        print(f"{sum(p.numel() for p in params):,} weights, {args.steps} steps", flush=True)
    for step in range(first, args.steps):
        length = row_length(step, args.steps)
        source = easy if step < args.steps * EASY_UNTIL else streams[length]
        rows = [next(source) for _ in range(LONG.get(length, ROWS))]
        loss = loss_of(fast if length == ROW else model, rows, args.mixed)
        for p in params:
            p.grad = None
        loss.backward()
        flat = torch.cat([p.grad.reshape(-1) for p in params])
        dist.all_reduce(flat)
        flat /= WORKERS
        flat *= min(1.0, 1.0 / (float(flat.norm()) + 1e-6))
        for p, g in zip(params, flat.split([p.numel() for p in params]), strict=True):
            p.grad = g.view_as(p)
        optimiser.step(schedule(step / args.steps))
        tokens += length * len(rows) * WORKERS
        if length == ROW:
            value = float(loss.detach())
            smooth = value if smooth is None else 0.95 * smooth + 0.05 * value
        if rank == 0 and step % 20 == 0:
            print(f"step {step} loss {smooth:.4f} tokens {tokens:,} seconds {time.time() - start:.0f}", flush=True)
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            dist.barrier()
            mine = [k for i, k in enumerate(tests) if i % WORKERS == rank]
            model.eval()
            scores = {k: teacher_forced(model, tests[k], encode) for k in mine}
            model.train()
            gathered: list[dict | None] = [None] * WORKERS
            dist.all_gather_object(gathered, scores)
            if rank == 0:
                merged = {k: v for part in gathered if part for k, v in part.items()}
                print(f"step {step + 1} unseen {json.dumps(merged)} seconds {time.time() - start:.0f}", flush=True)
                small.save(model, out, torch.float32)
                state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": step + 1}
                state |= {"tokens": tokens, "seconds": time.time() - start}
                torch.save(state, out / "state.new")
                (out / "state.new").replace(out / "state.pt")
    if rank == 0:
        done = {"steps": args.steps, "tokens": tokens, "seconds": round(time.time() - start), "seed": args.seed}
        (out / "training.json").write_text(json.dumps(done, indent=2) + "\n")
        print("done", json.dumps(done), flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--steps", type=int, default=1750)
    parser.add_argument("--every", type=int, default=200, help="steps between looks at unseen questions, and saves")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--matrix-lr", type=float, default=0.012)
    parser.add_argument("--vector-lr", type=float, default=0.004)
    parser.add_argument("--embed-lr", type=float, default=0.004)
    parser.add_argument("--port", type=int, default=0, help="for the two processes to meet on; 0: any free one")
    parser.add_argument("--resume", action="store_true", help="go on from the last save")
    parser.add_argument("--mixed", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    if not args.port:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            args.port = s.getsockname()[1]
    mp.spawn(worker, args=(args,), nprocs=WORKERS)


if __name__ == "__main__":
    main()
