"""Random bits from a counter: a pure function of (seed, index, purpose), so a resumed run replays nothing."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

# Purposes are the last word of Philox's counter, so that numbers for different purposes never coincide.
SPANS: Final = 0
EXAMPLES: Final = SPANS
"""The order of a task's examples. It has the same number because a run on tasks draws no spans."""
DOCUMENTS: Final = 1
CHUNKS: Final = 2
ROW_SOURCES: Final = 3
TASKS: Final = 4
"""The purpose of the first task; the next tasks have the next numbers."""
SHARDS: Final = 2**20

WORDS: Final = 4
"""64-bit words that Philox generates for each value of its counter."""


def philox(seed: int, index: int, purpose: int, part: int = 0) -> np.random.Philox:
    """Return a generator of random bits. NumPy guarantees the same bits in every version.

    The first two words of the counter are 0 and count the bits that are generated.
    """
    return np.random.Philox(key=[seed, index], counter=[0, 0, part, purpose])


def uniform(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Return the upper 53 bits of each random word as a number in [0, 1)."""
    return (words >> np.uint64(11)) * np.float64(2.0**-53)


def permutation(size: int, seed: int, index: int, purpose: int, part: int = 0) -> NDArray[np.int64]:
    """Return the numbers 0 to size - 1 in a random order."""
    # Sorting random words depends on no algorithm of NumPy's that a version may change. Stable, as words may be equal.
    return np.argsort(philox(seed, index, purpose, part).random_raw(size), kind="stable")
