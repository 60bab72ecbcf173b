"""Settings of the scoring of tasks, which scoring.py does."""

from typing import Literal

from switchcli.model.decoding import Search
from switchcli.spec import Count, Spec


class ScoringSpec(Spec):
    """How a model answers the examples of tasks, and how its answers are scored."""

    split: Literal["validation", "test"] = "validation"
    """Split of each task that is scored."""
    examples: Count | None = None
    """Examples of each task, at most: a random sample, the same in each evaluation, that keeps all answers to a
    question together; by default all examples."""
    batch_examples: Count = 32
    """Examples that one rank answers together."""
    by: Literal["generation", "likelihood"] = "generation"
    """`generation` decodes an answer. `likelihood` answers with the label of the task that has the highest probability,
    the first one of equals, so no answer is malformed; each task must have labels. The probability of a label is that
    of all its tokens and its EOS, without a correction for its length; `decoding` does not apply."""
    decoding: Search = Search()
    """How answers are decoded."""
