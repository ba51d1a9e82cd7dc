"""Small arithmetic: questions, worked thoughts and answers.

Owns: sums, differences and products, how they are worked out in a thought, and which pairs of numbers are kept for
the test. Pairs with a number below 10 (and the times tables) are always trained on: they are what the rest is built
from. Leaves the turn format to `world.py`.
"""

import random
import zlib

PLACES = ("ones", "tens", "hundreds", "thousands")
WORDS = {"+": "plus", "-": "minus", "x": "times"}

ASK = (
    "What is {e}?", "{e}", "{e} = ?", "Calculate {e}.", "How much is {e}?", "What is {w}?", "Compute {e}.", "{e}?",
    "Tell me what {w} is.", "Work out {e}.", "How much is {w}?", "What do you get for {e}?",
)  # fmt: skip
STORIES = {
    "+": ("I have {a} {t} and get {b} more. How many {t} do I have?",
          "There are {a} {t} in one box and {b} in another. How many {t} are there?",
          "{n} finds {a} {t} and then {b} more. How many {t} is that?"),
    "-": ("I have {a} {t} and give away {b}. How many {t} are left?",
          "There were {a} {t} and {b} are gone. How many {t} are left?",
          "{n} has {a} {t} and loses {b}. How many {t} are left?"),
    "x": ("There are {b} boxes with {a} {t} each. How many {t} are there?",
          "{n} buys {b} bags of {a} {t}. How many {t} is that?"),
}  # fmt: skip
THINGS = ("apples", "books", "stones", "coins", "cards", "pens", "shells", "stamps", "plums", "cups")


def held_out(op: str, a: int, b: int) -> bool:
    """Whether this pair is kept for the test: one in ten of those with two numbers of two or three digits
    (products: a number from 11 to 99 times a digit)."""
    if a < 10 or (b < 10 and op != "x"):
        return False
    return zlib.crc32(f"{op}/{a}/{b}".encode()) % 10 == 0


def result(op: str, a: int, b: int) -> int:
    """The number that `a op b` is."""
    return {"+": a + b, "-": a - b, "x": a * b}[op]


def _add(a: int, b: int) -> list[str]:
    lines, carry = [], 0
    for i in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**i % 10, b // 10**i % 10
        total = x + y + carry
        more = f" + {carry}" if carry else ""
        carry, digit = divmod(total, 10)
        lines.append(f"{PLACES[i]}: {x} + {y}{more} = {total}, write {digit}" + (f", carry {carry}" if carry else ""))
    if carry:
        lines.append(f"{PLACES[len(lines)]}: write {carry}")
    return lines


def _subtract(a: int, b: int) -> list[str]:
    lines, borrow = [], 0
    for i in range(len(str(a))):
        x, y = a // 10**i % 10, b // 10**i % 10
        less = f" - {borrow}" if borrow else ""
        need = y + borrow
        lend = 10 if x < need else 0
        digit = x + lend - need
        lines.append(f"{PLACES[i]}: {x + lend} - {y}{less} = {digit}, write {digit}" + (", borrow 1" if lend else ""))
        borrow = 1 if lend else 0
    return lines


def _multiply(a: int, b: int) -> list[str]:
    lines, carry = [], 0
    for i in range(len(str(a))):
        x = a // 10**i % 10
        product = x * b
        more = f" + {carry} = {product + carry}" if carry else ""
        carry, digit = divmod(product + carry, 10)
        lines.append(f"{PLACES[i]}: {x} x {b} = {product}{more}, write {digit}" + (f", carry {carry}" if carry else ""))
    if carry:
        lines.append(f"{PLACES[len(lines)]}: write {carry}")
    return lines


def thought(op: str, a: int, b: int) -> str:
    """The worked thought: digit by digit from the right, then the number."""
    work = {"+": _add, "-": _subtract, "x": _multiply}[op](a, b)
    return "\n".join([f"{a} {op} {b}", *work, f"So {a} {op} {b} = {result(op, a, b)}."])


def draw(rng: random.Random, test: bool) -> tuple[str, int, int]:
    """A random (operation, a, b) of the training or of the test side."""
    while True:
        op = rng.choice("++--x")
        if op == "x":
            a, b = rng.randrange(11, 100), rng.randrange(2, 10)
            if not test and rng.random() < 0.4:
                a, b = rng.randrange(0, 11), rng.randrange(0, 11)
                a, b = (a, b) if b < 10 else (b, a)
                if b == 10:
                    continue
        else:
            roll = rng.random()
            top = 1000 if roll < 0.4 else 100
            if not test and roll > 0.9:
                top = 10
            a, b = rng.randrange(top), rng.randrange(top if rng.random() < 0.8 else min(top, 100))
            if not test and rng.random() < 0.08:
                b = rng.randrange(10)
            if op == "-" and a < b:
                a, b = b, a
        if held_out(op, a, b) == test:
            return op, a, b


def question(rng: random.Random, op: str, a: int, b: int, name: str) -> str:
    """One way to ask for `a op b`; a short story now and then."""
    if rng.random() < 0.2 and a > 1 and b > 1:
        return rng.choice(STORIES[op]).format(a=a, b=b, t=rng.choice(THINGS), n=name)
    sign = rng.choice(("x", "x", "*")) if op == "x" else op
    space = "" if rng.random() < 0.15 else " "
    expression = f"{a}{space}{sign}{space}{b}"
    return rng.choice(ASK).format(e=expression, w=f"{a} {WORDS[op]} {b}")


def answer(op: str, a: int, b: int) -> str:
    """The short answer."""
    return f"{a} {op} {b} = {result(op, a, b)}."
