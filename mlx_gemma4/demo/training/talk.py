"""Conversation: names remembered over turns, words repeated, and an honest answer to what was never taught.

Owns: the texts of these three and their splits. Leaves small talk with fixed answers to `general.py`.
"""

import random
import zlib

from general import DONT_KNOW
from recall import CITIES, COLOURS, LIKES, NAMES
from rules import WORDS

HELD_NAMES = frozenset(n for n in NAMES if zlib.crc32(n.encode()) % 5 == 0)

TELL_NAME = (
    "My name is {n}.",
    "I am {n}.",
    "Hi, I am {n}.",
    "Hello, my name is {n}.",
    "You can call me {n}.",
    "Call me {n}.",
)
GREET = "Nice to meet you, {n}!"
ASK_NAME = ("What is my name?", "Do you remember my name?", "Who am I?", "Do you know my name?", "How am I called?")
NAME_IS = "Your name is {n}."
NO_NAME = "You have not told me your name yet."

TELL = (
    ("My favourite colour is {v}.", ("What is my favourite colour?", "Which colour do I like?"),
     "Your favourite colour is {v}.", COLOURS),
    ("I live in {v}.", ("Where do I live?", "In which city do I live?"), "You live in {v}.", CITIES),
    ("I like {v}.", ("What do I like?", "Do you remember what I like?"), "You like {v}.", LIKES),
)  # fmt: skip
NOTED = "Good, I will remember that."

REPEAT = ("Repeat after me: {x}", "Say this: {x}", "Repeat: {x}", "Copy this: {x}", "Please write: {x}")

_TOPICS = (
    "the capital of France|the weather|the weather in Rome|the time|the date|the price of gold|the president|the news|"
    "the moon|the sun|the speed of light|the largest ocean|the highest mountain|the oldest tree|the king of Spain|"
    "the population of Japan|the river in Vienna|the best film|the best pizza|the theory of relativity|gravity|"
    "the history of Rome|the French revolution|the recipe for bread|a black hole|the meaning of life|democracy|"
    "the stock market|the human heart|photosynthesis|the internet|electricity|the universe|Shakespeare|Mozart|"
    "Einstein|football|the world cup|the last election|a good book|the law|medicine|chemistry|the alphabet"
).split("|")
_UNKNOWN = (
    "What is {t}?", "Tell me about {t}.", "Explain {t}.", "What do you know about {t}?", "Can you tell me about {t}?",
    "Do you know {t}?", "Who knows more about {t}?", "What do you think of {t}?", "Write an essay about {t}.",
    "How is {t}?", "Why is {t} important?", "Where is {t}?", "When was {t}?", "How do I find {t}?", "Show me {t}.",
    "Is {t} good?", "How does {t} work?", "Who invented {t}?", "Which {t} is the best?", "Give me a list of {t}.",
    "Can I eat {t}?", "Where can I buy {t}?", "Write a story about {t}.", "How much does {t} cost?", "Do you like {t}?",
)  # fmt: skip
_SYLLABLES = "ba co de fi gu ha jo ka le mi no pu ra se ti vo wa xe yu zo an er is on um th ch st".split()
_MORE_UNKNOWN = (
    "Who wrote Hamlet?|Who painted the Mona Lisa?|When did the war end?|How old is the earth?|How far is the moon?|"
    "Will it rain tomorrow?|What should I cook tonight?|Who won the game?|How tall is the tower?|"
    "Translate this to French.|"
    "How do I fix my car?|What should I wear today?|Write a program for me.|Where can I eat well?|How do planes fly?|"
    "Why is the sky blue?|Who discovered America?|When was Mozart born?|How do I learn the piano?|Summarize the news."
).split("|")


def held_out(text: str) -> bool:
    """Whether this text (or combination) is kept for the test: one in six."""
    return zlib.crc32(text.encode()) % 6 == 0


def name(rng: random.Random, test: bool) -> str:
    """A name of the wanted side."""
    return rng.choice([n for n in NAMES if (n in HELD_NAMES) == test])


def _topic(rng: random.Random) -> str:
    """Anything under the sun: a subject, a thing, a made-up word."""
    roll = rng.random()
    if roll < 0.4:
        return rng.choice(_TOPICS)
    if roll < 0.6:
        return rng.choice(("a {}", "the {}", "{}s", "my {}")).format(rng.choice(WORDS))
    if roll < 0.7:
        return rng.choice(COLOURS) + " " + rng.choice(WORDS)
    made = "".join(rng.choice(_SYLLABLES) for _ in range(rng.randrange(2, 5)))
    return rng.choice(("{}", "{}", "the {}", "{} and {}")).format(made, rng.choice(WORDS))


def unknown(rng: random.Random, test: bool) -> tuple[str, str]:
    """A question the model was never taught the answer of, and what it says then."""
    while True:
        question = rng.choice(_MORE_UNKNOWN) if rng.random() < 0.1 else rng.choice(_UNKNOWN).format(t=_topic(rng))
        if held_out(question) == test:
            return question, DONT_KNOW


def repeat(rng: random.Random, test: bool) -> tuple[str, str]:
    """Words, names, digits in random order, to be said again."""
    while True:
        pool = (WORDS, NAMES, "0123456789", COLOURS, LIKES)
        parts = [rng.choice(rng.choice(pool)) for _ in range(rng.randrange(1, 13))]
        if rng.random() < 0.3:
            parts = [
                "".join(rng.choice("0123456789") for _ in range(rng.randrange(2, 7)))
                for _ in range(rng.randrange(1, 4))
            ]
        text = " ".join(parts)
        if held_out(text) == test:
            return rng.choice(REPEAT).format(x=text), text


def tell(rng: random.Random, test: bool) -> list[tuple[str, str]]:
    """Exchanges in which the user tells something and asks for it later: [(user, model), ...], the last one asks."""
    if rng.random() < 0.6:
        n = name(rng, test)
        return [(rng.choice(TELL_NAME).format(n=n), GREET.format(n=n)), (rng.choice(ASK_NAME), NAME_IS.format(n=n))]
    while True:
        statement, ways, reply, values = rng.choice(TELL)
        value = rng.choice(values)
        if held_out(statement + value) == test:
            return [(statement.format(v=value), NOTED), (rng.choice(ways), reply.format(v=value))]
