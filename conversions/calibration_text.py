"""The text a calibration reads: the user's own, or a built-in sample of conversations.

Owns the sample and how a text becomes rows of tokens. Leaves the form of a conversation to the checkpoint's template.

The sample is written for this package: short turns of many kinds (facts, sums, code, lists, letters, tables, several
languages, thoughts about a text), because what matters is that every kind of activation comes up. Text like the one the
model will be used on measures better: `--calibrate FILE`.
"""

import random

import numpy as np

from mlx_gemma4.errors import UsageError
from mlx_gemma4.tokenizer import Tokenizer
from mlx_gemma4.turns import render

# Rows of a text and their length in tokens: enough for the losses of matrices to keep their order, and few enough that
# each matrix can be tried.
ROWS, LENGTH = 8, 256
# Below this the figures are chance.
LEAST = 256

_TURNS = [
    ("What is the capital of France?", "The capital of France is Paris, on the river Seine."),
    ("How much is 17 + 26?", "17 + 26 = 43."),
    ("What is 6 times 7?", "6 * 7 = 42."),
    ("Is 91 a prime number?", "No. 91 = 7 * 13, so it is not a prime number."),
    (
        "A train leaves at 9:40 and arrives at 12:05. How long does it take?",
        "From 9:40 to 12:00 are 2 hours and 20 minutes, and 5 minutes more make 2 hours and 25 minutes.",
    ),
    (
        "Write a Python function that reverses the words of a sentence.",
        '```python\ndef reverse_words(sentence: str) -> str:\n    """\'one two\' -> \'two one\'"""\n'
        '    return " ".join(reversed(sentence.split()))\n```\n`split()` also drops double spaces.',
    ),
    (
        "How do I find the ten largest files below a folder?",
        "```sh\nfind . -type f -exec du -k {} + | sort -rn | head -n 10\n```\n`du -k` prints sizes in kilobytes, "
        "`sort -rn` puts the largest first.",
    ),
    (
        "Give me a JSON object for a book with title, author and year.",
        '{"title": "The Sea Road", "author": "M. Elphinstone", "year": 2000, "tags": ["novel", "history"]}',
    ),
    (
        "Was ist der Unterschied zwischen Wetter und Klima?",
        "Wetter ist, was heute geschieht: Regen, Wind, Sonne. Klima ist der Durchschnitt davon über dreißig Jahre.",
    ),
    ("¿Cómo se dice «thank you» en español?", "Se dice «gracias». Más formal: «muchas gracias» o «se lo agradezco»."),
    (
        "Traduis en français : The children are playing in the garden.",
        "« Les enfants jouent dans le jardin. »",
    ),
    ("请用一句话解释什么是光合作用。", "光合作用是植物利用阳光、水和二氧化碳制造糖分并放出氧气的过程。"),
    ("日本で一番高い山は何ですか。", "富士山です。高さは3,776メートルあります。"),
    ("Что такое фотон?", "Фотон — это элементарная частица света, квант электромагнитного поля."),
    (
        "List three ways to save water at home.",
        "1. Repair dripping taps: one can lose 20 litres a day.\n2. Take a shower instead of a bath.\n"
        "3. Collect rain for the garden.",
    ),
    (
        "Explain recursion to a ten-year-old.",
        "Imagine a box that holds a smaller box, which holds a smaller one again. To find the toy inside, you do "
        "the same thing each time: open the box. You stop when there is no box left. A program "
        "that calls itself does just that.",
    ),
    (
        "Write a short, polite message to my landlord: the heating has been cold since Monday.",
        "Dear Ms. Ortega,\n\nsince Monday the radiators in our flat have stayed cold, although the thermostat is at "
        "its highest setting. Could you please send someone to look at them this week? We are at home after 4 p.m.\n\n"
        "Kind regards,\nJonas Lind",
    ),
    (
        "Compare cats and dogs in a table.",
        "| | cats | dogs |\n|---|---|---|\n| walk | alone | with you, daily |\n| noise | little | some |\n"
        "| training | slow | easy |",
    ),
    (
        "Begin a story in two sentences.",
        "The lighthouse had been dark for eleven years when Mara saw the lamp turn. She put down her net, counted the "
        "seconds between two flashes, and knew that someone was counting with her.",
    ),
    (
        "Summarize: Bees visit flowers for nectar. While they drink, pollen sticks to them and reaches the next "
        "flower. Without this, many fruits would not grow.",
        "Bees carry pollen from flower to flower while they drink nectar; many fruits depend on it.",
    ),
    (
        "Read this text. Ben likes tea. The key of the red box is 4417. Mia lives in Oslo. What is the key "
        "of the red box?",
        "The key of the red box is 4417.",
    ),
    ("My name is Vera and I live in Lisbon. What is my name?", "Your name is Vera."),
    ("What is mlx-gemma4?", "A Python package that runs Gemma 4 on Apple Silicon with MLX."),
    ("What is the boiling point of water in kelvin?", "At sea level 373.15 K, which is 100 °C or 212 °F."),
    (
        "Solve 2x + 3 = 11.",
        "Subtract 3 on both sides: 2x = 8. Divide by 2: x = 4. Check: 2 * 4 + 3 = 11.",
    ),
    (
        "Which is heavier, a kilogram of iron or a kilogram of feathers?",
        "Neither: both are one kilogram. The feathers only take up more room.",
    ),
    (
        "SELECT the names of customers with more than five orders.",
        "```sql\nSELECT c.name FROM customers c JOIN orders o ON o.customer_id = c.id\nGROUP BY c.id, c.name "
        "HAVING COUNT(*) > 5;\n```",
    ),
    ("Who will win the election next year?", "I cannot know that. I can explain how the vote is counted, if you like."),
    (
        "Fix the grammar: he don't has no time yesterday",
        "He didn't have any time yesterday.",
    ),
    ("What rhymes with night?", "Light, bright, sight, flight, kite and white."),
]


def token_rows(tokenizer: Tokenizer, text: str | None = None, rows: int = ROWS, length: int = LENGTH) -> np.ndarray:
    """int [N, T]: texts of equal length, each beginning with <bos>. text: None is the built-in sample.

    N is at most `rows`; T is `length`, or less where the text is too short for one row. A row that ends within the text
    is followed by the next; what is left over is not used. Raises UsageError for a text of less than 256 tokens.
    """
    ids = _sample(tokenizer) if text is None else tokenizer.encode(text, add_special_tokens=False)
    start = tokenizer.token_id(tokenizer.bos_token)
    begin = [] if start is None else [start]
    if len(ids) < LEAST:
        raise UsageError(
            f"the calibration text has {len(ids)} tokens; {LEAST} are the least, {rows * length:,} are used"
        )
    width = min(length, len(ids)) - len(begin)
    # Evenly spread over a long text.
    count = min(rows, len(ids) // width)
    stride = (len(ids) - width) // max(1, count - 1) if count > 1 else 0
    return np.array([begin + ids[i * stride : i * stride + width] for i in range(count)])


def _sample(tokenizer: Tokenizer) -> list[int]:
    """The sample, in an order that does not keep kinds together; two or three turns a conversation."""
    order = random.Random(0)
    turns = [pair for _ in range(3) for pair in order.sample(_TURNS, len(_TURNS))]
    ids: list[int] = []
    while turns:
        count = min(len(turns), order.choice((1, 2, 2, 3)))
        messages = []
        for question, answer in turns[:count]:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        del turns[:count]
        if tokenizer.chat_template is None:
            ids += tokenizer.encode("\n\n".join(m["content"] for m in messages) + "\n\n", add_special_tokens=False)
        else:
            ids += render(tokenizer, messages, thinking=False, add_generation_prompt=False)
    return ids
