"""Text to measure a compressed cache on: a long one with facts told early, and what asks for them far behind.

Owns the built-in text, the prompts made from it or from a user's own file, and which of their positions count. Leaves
measuring to `kv_check.py` and the form of a conversation to the checkpoint's template.

The built-in text is plain sentences about nothing in particular with facts of three kinds between them, in words the
built-in model was trained to read; any larger model reads them with ease. The same tokens come out each time.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import UsageError
from .reuse import common_prefix
from .tokenizer import Tokenizer
from .turns import TURN_OPEN, render

DEFAULT_CONTEXT = 4096
# Below this most of what a scored position reads would be exact anyway: the first 16 positions and the last 64 to 127.
LEAST_CONTEXT = 1024
# Positions scored at the end of a text, at most a quarter of it: at 1,024 a share is known to about one in a hundred.
MOST_SCORED = 1024

_READ, _CONTINUE = "Read this text. ", "Continue this text.\n\n"

_COLOURS = "red blue green yellow black white brown grey pink purple orange silver golden".split()
_OBJECTS = "box door safe bag locker chest bike gate room drawer suitcase cupboard".split()
_NAMES = (
    "Ada Ben Cara Dan Eva Finn Gina Hugo Ida Jon Kira Leo Mia Nils Olga Paul Rosa Sam Tina Vera Will Yara Zoe Alma "
    "Bruno Clara David Emma Felix Greta Henry Iris Jacob Lena Max Nora Oscar Petra Ralf Sara Tom Ursula Victor Wanda"
).split()
_LIKES = (
    "plums tea chess music snow rain books bread cheese honey cats dogs horses boats trains maps stars songs roses "
    "apples pears cherries lemons soup rice coffee milk puzzles"
).split()
_CITIES = (
    "Paris Rome Berlin Madrid Vienna Oslo Lisbon Prague Dublin Athens Cairo Tokyo Lima Boston Denver Sydney Warsaw "
    "Helsinki Budapest Geneva"
).split()
_WHO = (
    "The old man|A young woman|The farmer|The teacher|A child|The baker|The captain|My neighbour|The doctor|"
    "A traveller|The gardener|The painter|An old friend|The driver|The miller|A quiet boy|The singer"
).split("|")
_DID = (
    "walked along|looked at|talked about|waited near|thought about|came back from|wrote about|drew|cleaned|passed|"
    "remembered|worked behind|sat beside|went past|told us about|dreamed of"
).split("|")
_WHAT = (
    "the river|the small town|the bridge|the wide field|the market|the forest|the station|the harbour|the hill|"
    "the garden|the long road|the lake|the church|the school|the old wall|the windmill|the shore|the kitchen"
).split("|")
_WHEN = (
    "in the morning|at noon|after lunch|in the evening|last night|all day|for an hour|before the rain|once more|"
    "without a word|with a smile|every week|in late summer|on the way home|while the birds sang"
).split("|")


@dataclass(frozen=True)
class Fact:
    """One thing said in a text. `stem` and `value` make up the answer, and the statement: "{stem} {value}."."""

    question: str
    stem: str
    value: str

    @property
    def statement(self) -> str:
        return f"{self.stem} {self.value}."

    def is_in(self, answer: str) -> bool:
        """Whether the answer names the value, as a word of its own."""
        return re.search(rf"\b{re.escape(self.value)}\b", answer, re.IGNORECASE) is not None


@dataclass(frozen=True)
class Passage:
    """Token ids to be predicted one by one, and which of the predictions count."""

    ids: list[int]
    head: int  # positions before this one are only read
    counts: list[bool]  # for each of ids[head:]: whether it was to be predicted

    @property
    def scored(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True)
class Questions:
    """Prompts that begin with the same `shared` ids; each asks for one fact."""

    shared: list[int]
    asked: list[tuple[list[int], Fact]]  # what follows the shared ids
    in_turns: bool  # whether the checkpoint's chat format is used


def facts(count: int, seed: int) -> list[Fact]:
    """`count` different facts; no two are about the same thing, and no two codes are equal."""
    rng = random.Random(f"facts/{seed}")
    things = rng.sample([f"{c} {o}" for c in _COLOURS for o in _OBJECTS], k=len(_COLOURS) * len(_OBJECTS))
    codes = rng.sample(range(1000, 10000), k=len(things))
    likers, residents = rng.sample(_NAMES, k=len(_NAMES)), rng.sample(_NAMES, k=len(_NAMES))
    kinds = (
        [
            Fact(f"What is the code of the {k}?", f"The code of the {k} is", str(v))
            for k, v in zip(things, codes, strict=True)
        ],
        [Fact(f"What does {k} like?", f"{k} likes", rng.choice(_LIKES)) for k in likers],
        [Fact(f"Where does {k} live?", f"{k} lives in", rng.choice(_CITIES)) for k in residents],
    )
    most = sum(map(len, kinds))
    if count > most:
        raise UsageError(f"there are {most} facts to plant, not {count}")
    mixed = [fact for three in zip(*kinds, strict=False) for fact in three]
    mixed += [fact for fact in kinds[0] if fact not in set(mixed)]
    return mixed[:count]


def filled(tokenizer: Tokenizer, told: Sequence[Fact], tokens: int, seed: int) -> str:
    """About `tokens` tokens of sentences with the facts spread over them, the first in the first sentences."""
    rng = random.Random(f"text/{seed}")
    statements = [fact.statement for fact in told]
    room = tokens - sum(len(tokenizer.encode(" " + s, add_special_tokens=False)) for s in statements)
    plain: list[str] = []
    while room > 0:
        when = f" {rng.choice(_WHEN)}" if rng.random() < 0.7 else ""
        plain.append(f"{rng.choice(_WHO)} {rng.choice(_DID)} {rng.choice(_WHAT)}{when}.")
        room -= len(tokenizer.encode(" " + plain[-1], add_special_tokens=False))
    out: list[str] = []
    for i, statement in enumerate(statements):
        begin, end = (len(plain) * j // len(statements) for j in (i, i + 1))
        at = rng.randrange(begin, end + 1)
        out += [*plain[begin:at], statement, *plain[at:end]]
    return " ".join(out or plain)


def sample_passage(tokenizer: Tokenizer, context: int = DEFAULT_CONTEXT, seed: int = 0) -> Passage:
    """`context` tokens: the built-in text, then its facts again.

    With a chat template the facts come back as a conversation about the text, and the model's turns count. Without one
    they are stated a second time in another order, and all of that counts.
    """
    _check_context(context)
    wanted = scored_of(context)
    told = facts(min(160, wanted // 8), seed)
    again = random.Random(f"order/{seed}").sample(told, k=len(told))
    if tokenizer.has_chat_template:
        asked, around = _fitting(tokenizer, again, wanted)
        text = filled(tokenizer, told, context - around, seed)
        ids = render(tokenizer, _conversation(text, asked), False, add_generation_prompt=False)
        counts = _model_turns(tokenizer, ids)
        head = counts.index(True) if True in counts else len(ids)
        return Passage(ids, head, counts[head:])
    tail = tokenizer.encode(" " + " ".join(fact.statement for fact in again), add_special_tokens=False)[:wanted]
    ids = tokenizer.encode(filled(tokenizer, told, context - len(tail), seed))
    return Passage(ids + tail, len(ids), [True] * len(tail))


def text_passage(tokenizer: Tokenizer, text: str, context: int | None = None) -> Passage:
    """The first `context` tokens of a user's text (default: up to 4,096 of them); the last quarter counts.

    With a chat template the model is asked to continue the first part, and the rest is what it is held to have said.
    Raises UsageError when the text is too short, saying how many tokens are needed.
    """
    _check_context(context or DEFAULT_CONTEXT)
    chat = tokenizer.has_chat_template
    around = len(render(tokenizer, [{"role": "user", "content": _CONTINUE + "x"}], False)) if chat else 1
    ids = tokenizer.encode(text, add_special_tokens=False)
    needed = (context or LEAST_CONTEXT) - around
    if len(ids) < needed:
        raise UsageError(f"the text has {len(ids):,} tokens; at least {needed:,} are needed")
    ids = ids[: (context or DEFAULT_CONTEXT) - around]
    wanted = scored_of(len(ids))
    before, tail = ids[:-wanted], ids[-wanted:]
    if chat:
        told = _CONTINUE + tokenizer.decode(before)
        head = render(tokenizer, [{"role": "user", "content": told}], False)
    else:
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        head = [*start, *before]
    return Passage(head + tail, len(head), [True] * len(tail))


def recall_questions(tokenizer: Tokenizer, context: int, count: int, seed: int = 1) -> Questions:
    """`count` questions about one built-in text; each prompt has about `context` tokens.

    With a chat template each is a user's turn with text and question. Without one the text is followed by the
    beginning of the answer.
    """
    _check_context(context)
    told = facts(count, seed)

    def prompt(text: str, fact: Fact) -> list[int]:
        if not tokenizer.has_chat_template:
            return tokenizer.encode(f"{text}\n\n{fact.stem}")
        return render(tokenizer, [{"role": "user", "content": f"{_READ}{text}\n\n{fact.question}"}], False)

    text = filled(tokenizer, told, context - max(len(prompt("", fact)) for fact in told), seed)
    prompts = [prompt(text, fact) for fact in told]
    same = min(common_prefix(prompts[0], p) for p in prompts)
    same = min(same, min(map(len, prompts)) - 1)
    asked = [(p[same:], fact) for p, fact in zip(prompts, told, strict=True)]
    return Questions(prompts[0][:same], asked, tokenizer.has_chat_template)


def scored_of(tokens: int) -> int:
    """How many positions of a text of this length are scored."""
    return min(MOST_SCORED, tokens // 4)


def _fitting(tokenizer: Tokenizer, told: Sequence[Fact], tokens: int) -> tuple[list[Fact], int]:
    """As many facts as can be asked about in about `tokens` tokens, at least one, and how many tokens that takes."""
    asked: list[Fact] = []
    taken = 0
    for fact in told:
        more = len(render(tokenizer, _conversation("", [*asked, fact]), False, add_generation_prompt=False))
        if asked and more > tokens:
            break
        asked, taken = [*asked, fact], more
    return asked, taken


def _check_context(context: int) -> None:
    if context < LEAST_CONTEXT:
        raise UsageError(
            f"a context of {context:,} tokens leaves too few that are compressed; at least {LEAST_CONTEXT:,} are needed"
        )


def _conversation(text: str, asked: Sequence[Fact]) -> list[dict[str, str]]:
    turns = []
    for i, fact in enumerate(asked):
        lead = f"{_READ}{text}\n\n" if i == 0 else ""
        turns += [
            {"role": "user", "content": lead + fact.question},
            {"role": "assistant", "content": fact.statement},
        ]
    return turns


def _model_turns(tokenizer: Tokenizer, ids: list[int]) -> list[bool]:
    """For each id whether the model writes it: what follows "<|turn>model\\n", up to and with the stop token."""
    turn, header = tokenizer.token_id(TURN_OPEN), tokenizer.encode("model\n", add_special_tokens=False)
    out, inside, skip = [], False, 0
    for i, token in enumerate(ids):
        if token == turn:
            inside = ids[i + 1 : i + 1 + len(header)] == header
            skip = 1 + len(header)
        out.append(inside and skip <= 0)
        skip -= 1
        if token in tokenizer.eos_token_ids:
            inside = False
    return out
