"""Random bits by counter: a pure function of (seed, index, purpose), so that nothing is replayed when a run resumes."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

# The last word of Philox's counter: streams of numbers with the same key that never meet.
SPANS: Final = 0
DOCUMENTS: Final = 1
CHUNKS: Final = 2
ROW_SOURCES: Final = 3
TASKS: Final = 4
"""The first of a purpose for each task."""
SHARDS: Final = 2**20

WORDS: Final = 4
"""64-bit words that Philox gives for one count."""


def philox(seed: int, index: int, purpose: int, part: int = 0) -> np.random.Philox:
    """Random bits that are the same in every version, as numpy promises."""
    return np.random.Philox(key=[seed, index], counter=[0, 0, part, purpose])


def permutation(size: int, seed: int, index: int, purpose: int, part: int = 0) -> NDArray[np.int64]:
    """A random order of `size` things."""
    return np.argsort(philox(seed, index, purpose, part).random_raw(size), kind="stable")
