"""System prompts and how they change an answer.

Owns: the rules, the words they are filled with, and which words and which (rule, question) pairs are kept for the
test. Leaves the questions themselves to its caller.
"""

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

WORDS = (
    "apple banana river stone cloud garden winter summer silver copper lemon honey button candle pocket rocket engine "
    "window basket hammer ladder mirror pepper pillow rabbit saddle ticket tunnel velvet walnut yellow zebra anchor "
    "bottle castle dragon feather guitar island jacket kettle lantern magnet needle ocean pencil quartz ribbon spider "
    "thunder umbrella violin wagon yogurt acorn bamboo cactus daisy eagle falcon ginger harbour iceberg jungle kitten "
    "lobster mango nutmeg olive panda raven salmon tiger turnip vanilla willow"
).split()
HELD_WORDS = frozenset(w for w in WORDS if zlib.crc32(w.encode()) % 5 == 0)


@dataclass(frozen=True)
class Rule:
    """One kind of instruction: ways to put it, with {w} for its word, and what it does to an answer."""

    name: str
    ways: tuple[str, ...]
    apply: Callable[[str, str], str]  # (answer, word) -> answer


def _end(answer: str, word: str) -> str:
    return f"{answer} {word}!"


def _begin(answer: str, word: str) -> str:
    return f"{word}! {answer}"


RULES = (
    Rule("end", ("End every answer with the word {w}.", "Always end with {w}.", "Finish each answer with the word {w}.",
                 "The last word of every answer is {w}."), _end),
    Rule("begin", ('Begin every answer with "{w}".', 'Always start with "{w}".', 'Start each answer with "{w}".',
                   'The first word of every answer is "{w}".'), _begin),
    Rule("pirate", ("You are a pirate who loves {w}.", "Talk like a pirate and shout {w}.",
                    "Answer as a pirate with the word {w}."),
         lambda a, w: f"Arrr! {a} Aye, {w}!"),
    Rule("quote", ("Put every answer in quotes.", "Write your answer between quotes."), lambda a, w: f'"{a}"'),
    Rule("upper", ("Answer in upper case.", "Write in capital letters only.", "Shout: use upper case only."),
         lambda a, w: a.upper()),
    Rule("bold", ("Write every answer in bold.", "Use bold text for your answers."), lambda a, w: f"**{a}**"),
)  # fmt: skip

YES_NO = ("Answer only with yes or no.", "Reply with yes or no, nothing else.", "Say only yes or no.")
NAMED = ("Your name is {n}.", "You are called {n}.", "You are an assistant named {n}.")
ASK_NAME = ("What is your name?", "Who are you?", "How are you called?", "Tell me your name.")
ABOUT = (
    ("The user is called {n}.", ("What is my name?", "Who am I?", "How am I called?"), "Your name is {n}."),
    ("The user comes from {c}.", ("Where do I come from?", "From which city am I?"), "You come from {c}."),
    ("The user likes {l}.", ("What do I like?", "Do you know what I like?"), "You like {l}."),
)  # fmt: skip


def held_pair(rule: str, question: str) -> bool:
    """Whether a rule is kept from this question in training (the pair may only be tested): one in six."""
    return zlib.crc32(f"{rule}/{question}".encode()) % 6 == 0


def draw_word(rng: random.Random, test: bool) -> str:
    """A word for a rule; the test side has its own words."""
    return rng.choice([w for w in WORDS if (w in HELD_WORDS) == test])


def compare(rng: random.Random, test: bool) -> tuple[str, str]:
    """A question with a yes or no as its answer: which number is larger."""
    while True:
        a, b = rng.randrange(100), rng.randrange(100)
        if a == b or (zlib.crc32(f"{a}>{b}".encode()) % 5 == 0) != test:
            continue
        if rng.random() < 0.5:
            return f"Is {a} larger than {b}?", "Yes." if a > b else "No."
        return f"Is {a} smaller than {b}?", "Yes." if a < b else "No."
