"""PrepareContext: the machine that prepares data: its cache, its processes, and what shows progress and warnings."""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from switchcli.data.prepare.prepared_text import SPLITS
from switchcli.data.tokenizer.tokenizer import Tokenizer, Wait

T = TypeVar("T")


class Track(Protocol):
    """A progress bar: yields the items and shows how many were yielded, and out of `total` if that is known."""

    def __call__(self, items: Iterable[T], label: str, total: int | None, /) -> Iterator[T]: ...


ShowTokens = Callable[[int, int], None]
"""Called with the numbers of complete source shards and of tokens written so far."""
ShowProgress = Callable[[str, int], AbstractContextManager[ShowTokens]]
"""Opens a progress display with a label, for a number of source shards."""


class PrepareContext(NamedTuple):
    """Settings that do not change what is prepared: any context gives the same ids."""

    cache: Path
    track: Track
    show: ShowProgress
    processes: int | None = None
    """Number of processes; None: one for each processor, or a single one if the text is small."""
    check: bool = False
    """Whether to compare all data in the cache with its digests, whatever was compared before."""
    warn: Callable[[str], None] = lambda text: None
    """Called with one line about each damaged folder."""
    wait: Wait = nullcontext
    """Shows that work goes on which tells no progress, such as training a vocabulary."""
    accept: Callable[[Tokenizer], None] = lambda tokenizer: None
    """Raises an error if the run cannot use a tokenizer. It is called before any text is tokenized."""
    needed: Collection[str] = SPLITS
    """The splits that may not be empty. An evaluation needs no text to train on."""
