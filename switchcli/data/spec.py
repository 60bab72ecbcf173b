"""DataSpec: what a run reads, as the `data:` part of a recipe says it. It opens nothing; `prepare` does."""

from typing import Annotated

from pydantic import Field

from switchcli.data.corpus import Corpus, PythonStdlib
from switchcli.data.objectives import ObjectiveSpec
from switchcli.data.span_corruption import SpanCorruption
from switchcli.data.tokenizer import TokenizerSpec, TrainedTokenizer
from switchcli.spec import Spec


class DataSpec(Spec):
    """Text, the vocabulary that cuts it into ids, and what is asked of them."""

    corpora: Annotated[tuple[Corpus, ...], Field(min_length=1)] = (PythonStdlib(),)
    """Read one after another; each by its `kind`: python-stdlib, files, hub."""
    tokenizer: TokenizerSpec = TrainedTokenizer()
    """By its `kind`: train, file, hub."""
    objective: ObjectiveSpec = SpanCorruption()
    held_out_fraction: float = Field(default=0.02, gt=0.0, lt=1.0)
    """Share of the documents kept for evaluation, chosen by a hash of each document's name alone."""


class TextSpec(Spec):
    """Text to measure a model on: the held-out part of it, as `DataSpec` has it, cut by the model's own vocabulary."""

    corpora: Annotated[tuple[Corpus, ...], Field(min_length=1)] = (PythonStdlib(),)
    held_out_fraction: float = Field(default=0.02, gt=0.0, lt=1.0)
    sequences: int = Field(default=512, ge=1)
    """Rows of it that are looked at, at most as many as there are."""
