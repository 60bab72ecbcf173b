"""DataSpec: what a run reads, as the `data:` part of a recipe says it. It opens nothing; `prepare` does."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from switchcli.data.corpus import Corpus, PythonStdlib
from switchcli.data.filters import Filters
from switchcli.data.objectives import ObjectiveSpec
from switchcli.data.span_corruption import SpanCorruption
from switchcli.data.text_mixture import Joined, TextMixtureSpec
from switchcli.data.tokenizer import TokenizerSpec, TrainedTokenizer
from switchcli.spec import Spec


def texts_of(corpora: Sequence[Corpus], mixture: TextMixtureSpec) -> dict[str, tuple[Corpus, ...]]:
    """The corpora by what is mixed and measured apart; under an empty label where all are one text."""
    if mixture.kind == "joined":
        return {"": tuple(one for corpus in corpora for one in corpus.each())}
    found: dict[str, tuple[Corpus, ...]] = {}
    for number, corpus in enumerate(corpora, 1):
        for one in corpus.each():
            label = one.language or f"corpus-{number}"
            found[label] = (*found.get(label, ()), one)
    return found


class DataSpec(Spec):
    """Text, the vocabulary that cuts it into ids, and what is asked of them."""

    corpora: Annotated[tuple[Corpus, ...], Field(min_length=1)] = (PythonStdlib(),)
    """Each by its `kind`: python-stdlib, files, hub."""
    mixture: TextMixtureSpec = Joined()
    """By its `kind`: joined (one text), weighted, temperature."""
    filters: Filters = Filters()
    tokenizer: TokenizerSpec = TrainedTokenizer()
    """By its `kind`: train, file, hub."""
    objective: ObjectiveSpec = SpanCorruption()
    held_out_fraction: float = Field(default=0.02, gt=0.0, lt=1.0)
    """Share of the documents kept for evaluation, chosen by a hash of each document alone."""

    def texts(self) -> dict[str, tuple[Corpus, ...]]:
        """What is mixed and measured apart, by label: a language, or a corpus without one; all together if joined."""
        return texts_of(self.corpora, self.mixture)


class TextSpec(Spec):
    """Text to measure a model on: the held-out part of it, as `DataSpec` has it, cut by the model's own vocabulary."""

    corpora: Annotated[tuple[Corpus, ...], Field(min_length=1)] = (PythonStdlib(),)
    mixture: TextMixtureSpec = Joined()
    """Anything but joined: each language, or corpus without one, is measured by itself."""
    filters: Filters = Filters()
    held_out_fraction: float = Field(default=0.02, gt=0.0, lt=1.0)
    sequences: int = Field(default=512, ge=1)
    """Rows of each text that are looked at, at most as many as there are."""
