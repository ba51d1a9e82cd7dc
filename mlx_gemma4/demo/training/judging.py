"""Whether an answer about a picture, a sound or a clip is right.

Owns: reading boxes and comparing them.
"""

import re


def iou(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """Overlap of two boxes [y1, x1, y2, x2] as a share of what they cover together."""
    inner = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    whole = sum(max(0, c[2] - c[0]) * max(0, c[3] - c[1]) for c in (a, b)) - inner
    return inner / whole if whole else 0.0


_BOX = re.compile(r'\{"box_2d": \[(\d+), (\d+), (\d+), (\d+)\], "label": "([a-z ]+)"\}')


def parse(said: str) -> list[tuple[tuple[int, ...], str]] | None:
    """(box, label) of every box of an answer; None for what is no list of boxes."""
    found = _BOX.findall(said)
    plain = _BOX.sub("", said)
    if plain not in ("[" + ", " * (len(found) - 1) + "]", "[]"):
        return None
    return [(tuple(map(int, f[:4])), f[4]) for f in found]


def right(kind: str, said: str, wanted: str) -> bool:
    """Whether an answer counts: words to the last character; boxes all there, IoU >= 0.5 each, labels right."""
    if not kind.startswith("detect"):
        return said == wanted
    got, true = parse(said), parse(wanted)
    if got is None or true is None or len(got) != len(true):
        return False
    left = list(true)
    for box, label in got:
        match = next((t for t in left if t[1] == label and iou(box, t[0]) >= 0.5), None)
        if match is None:
            return False
        left.remove(match)
    return True
