"""Answers that have gone wrong. Owns the detection of endless repetition; what happens then is `chat.py`'s."""

import numpy as np

LONGEST_PERIOD = 128  # tokens of the phrase that is repeated
LEAST_TOKENS = 256  # of uninterrupted repetition; long tables and rows of zeros stay below
LEAST_TIMES = 6


class RepetitionGuard:
    """Looks at the raw tokens of an answer, thought included.

    >>> guard = RepetitionGuard()
    >>> guard.stuck(token)        # True once the last tokens are one phrase, over and over

    A phrase of p tokens counts when it has come at least LEAST_TIMES times and over LEAST_TOKENS tokens without a
    single exception.
    """

    def __init__(self) -> None:
        self._recent = np.full(LONGEST_PERIOD, -1, np.int64)  # the token p places back is at index p - 1
        self._run = np.zeros(LONGEST_PERIOD, np.int64)  # for each period: tokens in a row equal to the one p before
        periods = np.arange(1, LONGEST_PERIOD + 1)
        self._enough = np.maximum(LEAST_TOKENS, (LEAST_TIMES - 1) * periods)

    def stuck(self, token: int) -> bool:
        self._run = np.where(self._recent == token, self._run + 1, 0)
        self._recent = np.roll(self._recent, 1)
        self._recent[0] = token
        return bool((self._run >= self._enough).any())
