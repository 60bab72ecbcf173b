"""What a user can mend: each kind of error with its exit code.

A message is one line that says the rule, the numbers, where it was broken (file:line and key) and the way out.
`assert` is for our own mistakes; these are for a user's input, files and machines.
"""

from typing import ClassVar


class SwitchError(Exception):
    """A failure that the user is told about in one line, without a traceback."""

    exit_code: ClassVar[int] = 1


class RecipeError(SwitchError):
    """A recipe, an override or an option that breaks a rule."""

    exit_code: ClassVar[int] = 2


class DataError(SwitchError):
    """A corpus, a tokenizer or a text that cannot be used."""

    exit_code: ClassVar[int] = 3


class CheckpointError(SwitchError):
    """A checkpoint, a lock or a disk that cannot be used."""

    exit_code: ClassVar[int] = 4


class NumericsError(SwitchError):
    """NaN, infinity or divergence."""

    exit_code: ClassVar[int] = 5


class DistributedError(SwitchError):
    """A rank or the network between ranks."""

    exit_code: ClassVar[int] = 6


class Interrupted(SwitchError):
    """Stopped by a signal after saving: the same command goes on from there."""

    exit_code: ClassVar[int] = 75
