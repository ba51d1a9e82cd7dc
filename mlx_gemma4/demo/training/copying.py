"""Where what the model writes stands already: for each token of a copied word, the tokens it could be read from.

Owns: finding these places in a row of ids, whatever the row is about. Leaves to `train_media.py` what is taught with
them: which heads should look there.
"""

import re
from collections.abc import Sequence

BOS = 2
# Words of every sentence: copied only where the word before them is the same, too.
COMMON = frozenset("a an and answer are at did for in is it no not of on that the tool this to with work".split())
_WORD = re.compile(r"[A-Za-z]+|\d+(?:[.:]\d+)*")


def texts_of(tokens: Sequence[str]) -> list[str]:
    """What each token of the vocabulary looks like in a text; nothing letter-like for special ones."""
    return ["\n" if re.fullmatch(r"<.*>", t) else t.replace("\u2581", " ") for t in tokens]


def copies(ids: Sequence[int], own: Sequence[float], texts: Sequence[str]) -> dict[int, list[int]]:
    """{position before a copied token: positions of what it copies}, within each conversation of a row.

    own: above 0 where the model writes. Every earlier place of the same word counts; if the word before it is the same
    at some of them, only those.
    """
    found: dict[int, list[int]] = {}
    starts = [i for i, token in enumerate(ids) if token == BOS] or [0]
    for begin, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        token_at = [i for i in range(begin, end) for _ in texts[ids[i]]]
        text = "".join(texts[ids[i]] for i in range(begin, end))
        seen: dict[str, list[tuple[int, str]]] = {}
        before = ""
        for match in _WORD.finditer(text):
            word, at = match.group(), match.start()
            places = seen.setdefault(word, [])
            same = [place for place in places if place[1] == before]
            chosen = same or (places if word.lower() not in COMMON else [])
            last = -1
            for k in range(len(word)):
                token = token_at[at + k]
                if token != last and own[token] > 0 and chosen and token > begin:
                    found[token - 1] = sorted({token_at[place + k] for place, _ in chosen} - {token})
                last = token
            places.append((at, before))
            before = word
    return {at: places for at, places in found.items() if places and max(places) <= at}


def begins(found: dict[int, list[int]]) -> set[int]:
    """Those positions of `copies` before the first token of a word: where it must be chosen what to copy."""
    return {at for at, sources in found.items() if not any(s - 1 in found.get(at - 1, ()) for s in sources)}
