"""The data of a run: what it is trained on, what it is measured on, and what a vocabulary cannot express of it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

from switchcli.data.batch import Batch, BatchSource
from switchcli.data.prepare.prepared_text import HELD_OUT, PreparedText
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.distributed.context import DistributedContext
from switchcli.errors import DataError
from switchcli.tasks.tokens import ScoredExamples
from switchcli.terminal.console import Console
from switchcli.training.config import ScoringSpec
from switchcli.training.loss import Objective
from switchcli.training.measure import Evaluator
from switchcli.training.validation import HeldOutText

NUM_SAMPLES = 2
"""The number of held-out texts that are printed with the answers of the model."""


class TrainData(NamedTuple):
    """The training and evaluation data of a run."""

    identity: str
    """A digest of the training data. A run can only be resumed with the data that it began with."""
    source: BatchSource
    evaluator: Evaluator
    """Measures models on held-out text, and on the examples of tasks if there are some."""
    samples: Batch
    """A few held-out inputs with their targets, a row each, to print with the answers of the model."""

    @property
    def tokenizer(self) -> Tokenizer:
        return self.evaluator.tokenizer


class RunData(ABC):
    """What a run is trained and measured on: plain text or tasks."""

    objective: Objective
    """The loss on its rows."""
    scoring: ScoringSpec = ScoringSpec()
    num_metrics: int = 1
    """The number of metrics of an evaluation. The best checkpoint by each of them is kept."""

    def __init__(self, recipe: Any, context: DistributedContext, console: Console) -> None:
        self._recipe, self._context, self._console = recipe, context, console

    def _evaluator(
        self, tokenizer: Tokenizer, texts: Mapping[str, HeldOutText], tasks: tuple[ScoredExamples, ...] = ()
    ) -> Evaluator:
        capacity = self._recipe.eval.capacity
        rows = self._recipe.microbatch_rows(self._context.dp_size)
        return Evaluator(tokenizer, texts, tasks, self.scoring, capacity, rows, self._context, self._console)

    @classmethod
    def check(cls, recipe: Any) -> None:
        """Raise an error if the files that the recipe names cannot be trained on. None is read."""
        return

    @classmethod
    @abstractmethod
    def open_inputs(cls, recipe: Any, tokenizer: Tokenizer | None) -> float | None:
        """Open what the recipe names, for a dry run: the first document of each corpus, the first example of each task.

        Tasks of a hub are left out: reading one would download it.

        Returns:
            How many epochs the run is, by the bytes of its text; None if they are not known before it is read.

        Raises:
            RecipeError: the tokenizer does not fit the model.
            DataError: a file or an address cannot be read, or holds no text.
        """

    @abstractmethod
    def build(self, tokenizer: Tokenizer | None) -> TrainData:
        """Return the data. This may take hours. Without `tokenizer`, the recipe's own is read or trained. Collective.

        Raises:
            RecipeError: the tokenizer does not fit the model.
            DataError: the text or the tasks cannot be used, or the ranks read different ones.
        """


def check_same_data(digests: Mapping[str, str], context: DistributedContext) -> None:
    """Raise DataError if the ranks read different data, by digests of its content; OtherRankError on other ranks.

    Collective. The name of each digest says what it is of, for the message. Paths and times do not count: machines may
    hold copies.
    """
    if difference := context.first_difference(digests):
        name, rank = difference
        context.main_only(lambda: _raise_ranks_read_different(name, rank))


def _raise_ranks_read_different(name: str, rank: int) -> None:
    raise DataError(
        f"{name}: rank {rank} reads other content than rank 0, and all ranks must read the same: copy the files again "
        "from the machine of rank 0, or name files on a disk that all machines share"
    )


UNKNOWN_LIMIT = 0.03
"""The fraction of unknown tokens above which a vocabulary does not suit a text."""


def unknown_fraction(text: PreparedText, tokenizer: Tokenizer) -> float:
    """Return the fraction of unknown tokens at the beginning of the first shard of the held-out part."""
    shard = next(shard for shard in text.shards[HELD_OUT] if shard.num_tokens)
    return shard.open().fraction_of(tokenizer.unknown)


def warn_of_unknown(what: str, fraction: float, console: Console) -> None:
    """Print a warning if more than `UNKNOWN_LIMIT` of the tokens of `what` are unknown."""
    if fraction > UNKNOWN_LIMIT:
        console.warning(
            f"{what}: {fraction:.1%} of the tokens are characters that the vocabulary lacks, and look alike to the "
            "model: train a vocabulary on text of this kind, or one with byte_fallback"
        )
