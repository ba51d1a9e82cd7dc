"""The errors a user can meet, each with the exit code the command line ends with.

Every message is one line that says what is wrong and what to do next; nothing here prints. The command line
(`cli/app.py`) turns any `Gemma4Error` into that line on stderr and the exit code; a Python caller catches the class.
"""


class Gemma4Error(Exception):
    """Something the user can act on. `exit_code` 1: the work failed."""

    exit_code = 1


class UsageError(Gemma4Error):
    """An option or argument outside what is allowed."""

    exit_code = 2


class ConfigError(Gemma4Error):
    """config.json is missing, not Gemma 4, or asks for something this graph does not compute."""


class WeightsError(Gemma4Error):
    """A shard is truncated, missing or holds tensors that do not fit; the message names file and tensor."""


class TokenizerError(Gemma4Error):
    """tokenizer.json or the chat template is missing or cannot be used."""


class ContextError(Gemma4Error):
    """The prompt does not fit the context; the message gives both lengths."""


class ModelNotFoundError(Gemma4Error):
    """No such folder, repository or revision; gated without access; offline and not in the cache."""

    exit_code = 3


class DoesNotFitError(Gemma4Error):
    """Not enough memory or disk; the message gives the figures."""

    exit_code = 4
