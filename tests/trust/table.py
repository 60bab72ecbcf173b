"""The table of `scripts/trust`: what was done to switchcli, how often, and what was lost by it.

A part is a file of this folder with a function `rows(folder, long)`: it works in `folder`, makes all of its trials when
`long` and those that take seconds when not, and yields a Row as soon as one is known. The tests of a part assert that
the rows of its short form have lost nothing.
"""

from typing import NamedTuple


class Row(NamedTuple):
    """One line of the table."""

    part: str
    """The letter of its row in README.md."""
    what: str
    """What was done: a few words."""
    trials: int
    lost: int
    """Trials whose promise was broken."""
    said: str = ""
    """Figures beside them, or the first of what was lost."""

    @property
    def figure(self) -> str:
        """`0 of 500`."""
        return f"{self.lost:,} of {self.trials:,}"


def every(stride: int, what: str) -> str:
    """`every file operation`, or `one file operation in 5`."""
    return f"every {what}" if stride == 1 else f"one {what} in {stride}"
