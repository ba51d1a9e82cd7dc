"""The world the small model is trained on: examples of every kind, for training and for the test.

Owns: what an example is, how one is drawn per kind, how it becomes token ids with loss weights (in the words of
`model/chat_template.jinja`), and the stream of packed rows. The texts live in facts, general, sums, recall, rules and
talk; each of them also says what is kept for the test, so the two sides never share a question.
"""

import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import facts
import recall
import rules
import sums
import talk

BOS, TURN, END, THINK, OPEN, CLOSE = "<bos>", "<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>"
TOPICS = facts.all_topics()
SHORT = [t for t in TOPICS if len(t.answer) < 90 and "\n" not in t.answer]
SPEAKABLE = [t for t in SHORT if "`" not in t.answer and len(t.answer) < 70]
NOT_TAUGHT = "I was not taught this, so I will say so."
TAUGHT = "I was taught the answer to this."


@dataclass
class Example:
    """One conversation. `messages` alternate user and model; only the last model message may have a thought."""

    kind: str
    messages: list[dict[str, str]]
    thinking: bool = False
    system: str | None = None
    thought: str = ""
    notes: dict = field(default_factory=dict)

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]


def vary(question: str, rng: random.Random) -> str:
    """The same question as people type it: with a word in front, without its mark, without a capital."""
    if rng.random() < 0.2:
        question = (
            rng.choice(("Please: ", "Hi! ", "Quick question: ", "One more thing: ", "And ", "So, ", "Okay. "))
            + question
        )
    if rng.random() < 0.2:
        question = question.rstrip("?.")
    if rng.random() < 0.2:
        question = question[0].lower() + question[1:]
    return question


def _turns(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [m for q, a in pairs for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]


def _fact(rng: random.Random, test: bool, topics: list[facts.Topic] = TOPICS) -> tuple[str, str, str]:
    topic = rng.choice(topics)
    question = rng.choice(topic.held_out if test else topic.train)
    return (question if test else vary(question, rng)), topic.answer, TAUGHT


def _sum(rng: random.Random, test: bool) -> tuple[str, str, str]:
    op, a, b = sums.draw(rng, test)
    question = sums.question(rng, op, a, b, talk.name(rng, test))
    return question, sums.answer(op, a, b), sums.thought(op, a, b)


def _unknown(rng: random.Random, test: bool) -> tuple[str, str, str]:
    question, answer = talk.unknown(rng, test)
    return (question if test else vary(question, rng)), answer, NOT_TAUGHT


def _repeat(rng: random.Random, test: bool) -> tuple[str, str, str]:
    return *talk.repeat(rng, test), "I only have to repeat this."


def _one(kind: str, draw: Callable[..., tuple[str, str, str]]):
    def example(rng: random.Random, test: bool, thinking: bool | None = None) -> Example:
        on = rng.random() < 0.3 if thinking is None else thinking
        question, answer, thought = draw(rng, test)
        return Example(kind, _turns([(question, answer)]), on, None, thought if on else "")

    return example


fact = _one("facts", _fact)
unknown = _one("unknown", _unknown)
repeat = _one("repeat", _repeat)


def sum_example(rng: random.Random, test: bool, thinking: bool | None = None) -> Example:
    """A sum; two in three with a worked thought."""
    return _one("sums", _sum)(rng, test, rng.random() < 0.65 if thinking is None else thinking)


def _plain(rng: random.Random, test: bool) -> tuple[str, str]:
    """A question with a short answer, for rules and long conversations."""
    roll = rng.random()
    if roll < 0.25:
        a, b = rng.randrange(10), rng.randrange(10)
        return rng.choice(("What is {} + {}?", "{} + {}?", "How much is {} + {}?")).format(
            a, b
        ), f"{a} + {b} = {a + b}."
    topic = rng.choice(SPEAKABLE)
    return rng.choice(topic.train), topic.answer


def rule(rng: random.Random, test: bool, thinking: bool | None = None) -> Example:
    """A system prompt and a question or two. The test side: words and pairs of rule and question never trained."""
    on = rng.random() < 0.25 if thinking is None else thinking
    roll = rng.random()
    if roll < 0.12:
        question, answer = rules.compare(rng, test)
        return Example("rules", _turns([(question, answer)]), on, rng.choice(rules.YES_NO),
                       "I may only say yes or no." if on else "", {"rule": "yes or no"})  # fmt: skip
    if roll < 0.24:
        n = talk.name(rng, test)
        answer = f"My name is {n}. How can I help you?"
        return Example("rules", _turns([(rng.choice(rules.ASK_NAME), answer)]), on, rng.choice(rules.NAMED).format(n=n),
                       f"The system prompt says that my name is {n}." if on else "", {"rule": "name"})  # fmt: skip
    if roll < 0.34:
        statement, ways, reply = rng.choice(rules.ABOUT)
        values = {"n": talk.name(rng, test)}
        while True:
            values |= {"c": rng.choice(recall.CITIES), "l": rng.choice(recall.LIKES)}
            if "{n}" in statement or talk.held_out(statement.format(**values)) == test:
                break
        answer = reply.format(**values)
        return Example("rules", _turns([(rng.choice(ways), answer)]), on, statement.format(**values),
                       f"The system prompt says it: {statement.format(**values)}" if on else "",
                       {"rule": "about"})  # fmt: skip
    chosen = rng.choice(rules.RULES)
    way = rng.choice(chosen.ways)
    word = rules.draw_word(rng, test) if "{w}" in way else ""
    pairs = []
    for _ in range(1 if test else rng.choice((1, 1, 2, 3))):
        while True:
            question, answer = _plain(rng, test)
            if rules.held_pair(chosen.name, question) == test:
                break
        pairs.append((question, chosen.apply(answer, word)))
    system = way.format(w=word)
    return Example("rules", _turns(pairs), on, system, f"I must follow this: {system}" if on else "",
                   {"rule": chosen.name})  # fmt: skip


def conversation(rng: random.Random, test: bool, thinking: bool | None = None) -> Example:
    """Several turns; something told early is asked for at the end."""
    on = rng.random() < 0.2 if thinking is None else thinking
    if rng.random() < 0.06 and not test:
        return Example("talk", _turns([(rng.choice(talk.ASK_NAME), talk.NO_NAME)]), on, None, NOT_TAUGHT if on else "")
    told, asked = talk.tell(rng, test)
    between = []
    for _ in range(rng.choice((0, 0, 1, 2, 3))):
        draw = rng.choice((_plain, _plain, lambda r, t: _fact(r, False)[:2], lambda r, t: _unknown(r, False)[:2]))
        between.append(draw(rng, test)[:2])
    thought = f"The user said: {told[0]}" if on else ""
    return Example("talk", _turns([told, *between, asked]), on, None, thought)


@functools.lru_cache(200_000)
def _word_tokens(encode: Callable[[str], list[int]], word: str) -> int:
    return len(encode(word))


def recall_example(
    rng: random.Random, test: bool, tokens: int, encode: Callable[[str], list[int]], questions: int = 1,
    thinking: bool | None = None,
) -> Example:  # fmt: skip
    """A text with facts in it that makes the whole prompt about `tokens` long, and questions about them."""
    on = rng.random() < 0.2 if thinking is None else thinking

    def count(text: str) -> int:
        return sum(_word_tokens(encode, " " + word) for word in text.split())

    room = max(10, tokens - 45 - 30 * (questions - 1))
    text, asked = recall.draw(rng, test, room, count, questions)
    lead = rng.choice(("Read this text. ", "Here is a text: ", "Remember this: ", ""))
    pairs = [(question, answer) for question, answer, _ in asked]
    pairs[0] = (f"{lead}{text}\n\n{pairs[0][0]}", pairs[0][1])
    return Example("recall", _turns(pairs), on, None, f"The text says: {asked[-1][2]}" if on else "")


def recall_questions(rng: random.Random, tokens: int, encode: Callable[[str], list[int]]) -> list[Example]:
    """Ten unseen questions about one text, each a conversation of its own, so that a text need be read only once."""
    whole = recall_example(rng, True, tokens + 30 * 9, encode, 10, False)
    text, _, first = whole.messages[0]["content"].rpartition("\n\n")
    asked = [first, *(m["content"] for m in whole.messages[2::2])]
    answers = [m["content"] for m in whole.messages[1::2]]
    pairs = zip(asked, answers, strict=True)
    return [Example("recall", _turns([(f"{text}\n\n{q}", a)]), notes={"text": text}) for q, a in pairs]


def segments(example: Example) -> Iterator[tuple[str, bool]]:
    """The conversation as (text, whether the model writes it), in the words of the chat template."""
    yield BOS, False
    if example.thinking or example.system:
        think = f"{THINK}\n" if example.thinking else ""
        yield f"{TURN}system\n{think}{example.system or ''}{END}\n", False
    last = len(example.messages) - 1
    for i, message in enumerate(example.messages):
        if message["role"] == "user":
            yield f"{TURN}user\n{message['content']}{END}\n{TURN}model\n", False
        else:
            thought = f"{OPEN}thought\n{example.thought}\n{CLOSE}" if i == last and example.thought else ""
            yield f"{thought}{message['content']}{END}", True
            yield "\n", False


def encode_example(example: Example, encode: Callable[[str], list[int]]) -> tuple[list[int], list[int]]:
    """Token ids, and 1 for those the model writes (its thought, its answer, the end of its turn)."""
    ids: list[int] = []
    own: list[int] = []
    for text, model in segments(example):
        part = encode(text)
        ids += part
        own += [int(model)] * len(part)
    return ids, own


def draw(rng: random.Random, encode: Callable[[str], list[int]], longest: int) -> Example:
    """One training example of any kind, at most about `longest` tokens long."""
    roll = rng.random()
    if roll < 0.15:
        return fact(rng, False)
    if roll < 0.54:
        return sum_example(rng, False)
    if roll < 0.73:
        return rule(rng, False)
    if roll < 0.79:
        return conversation(rng, False)
    if roll < 0.83:
        return unknown(rng, False)
    if roll < 0.89:
        return repeat(rng, False)
    tokens = int(longest * rng.uniform(0.12, 0.97))
    return recall_example(rng, False, tokens, encode, questions=rng.randrange(1, 3 + tokens // 100))


def rows(
    seed: str, length: int, encode: Callable[[str], list[int]], longest: int = 512
) -> Iterator[tuple[list[int], list[int]]]:
    """Endless rows of `length` tokens, conversations packed one after the other; a cut one ends the row.

    `longest` bounds the recall texts. Rows longer than 512 begin with one long recall text.
    """
    rng = random.Random(f"{seed}/{length}/{longest}")
    while True:
        ids: list[int] = []
        own: list[int] = []
        if length > 512:
            target = int(length * rng.uniform(0.75, 0.97))
            first = recall_example(rng, False, target, encode, questions=10)
            ids, own = encode_example(first, encode)
        while len(ids) < length:
            part, mine = encode_example(draw(rng, encode, min(length, longest)), encode)
            if len(ids) + len(part) > length + 40 and len(ids) > length - 60:
                part, mine = [0] * (length - len(ids)), [0] * (length - len(ids))
            ids += part
            own += mine
        yield ids[:length], own[:length]


def test_set(kind: str, count: int, encode: Callable[[str], list[int]], seed: int = 1) -> list[Example]:
    """`count` different unseen questions of one kind: facts, sums, sums-short, rules, talk, unknown, recall-512 ..."""
    rng = random.Random(f"test/{seed}/{kind}")
    if kind == "facts":
        every = [Example("facts", _turns([(q, t.answer)])) for t in TOPICS for q in t.held_out]
        rng.shuffle(every)
        return every[:count]
    found: dict[str, Example] = {}
    for _ in range(count * 50):
        if kind == "sums":
            example = sum_example(rng, True, True)
        elif kind == "sums-short":
            example = sum_example(rng, True, False)
        elif kind == "rules":
            example = rule(rng, True, False)
        elif kind == "talk":
            example = conversation(rng, True, False)
        elif kind == "unknown":
            example = unknown(rng, True, False)
        elif kind == "repeat":
            example = repeat(rng, True, False)
        else:
            for example in recall_questions(rng, int(kind.removeprefix("recall-")), encode):
                found[str(example.messages)] = example
            if len(found) >= count:
                break
            continue
        found.setdefault(f"{example.system}/{[m['content'] for m in example.messages]}", example)
        if len(found) == count:
            break
    return list(found.values())[:count]


TEST_KINDS = (
    "facts", "sums", "sums-short", "rules", "talk", "unknown", "recall-512",
    "recall-1024", "recall-2048", "recall-4096",
)  # fmt: skip
