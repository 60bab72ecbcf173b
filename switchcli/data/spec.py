"""DataSpec: what a run reads, as the `data:` part of a recipe says it. It opens nothing; `prepare` does."""

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from switchcli.data.corpus import Corpus, PythonStdlib
from switchcli.data.duplicates import Duplicates
from switchcli.data.filters import Filters
from switchcli.data.objectives import Denoisers, ObjectiveSpec, PrefixLanguageModel
from switchcli.data.span_corruption import SpanCorruption
from switchcli.data.text_mixture import Joined, TextMixtureSpec
from switchcli.data.tokenizer import TokenizerSpec, TrainedTokenizer
from switchcli.data.whole_documents import WholeDocuments
from switchcli.spec import Spec

Rows = SpanCorruption | PrefixLanguageModel | Denoisers | WholeDocuments
"""What a row of a batch is made by."""


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
    duplicates: Duplicates | None = None
    """Leave out documents that an earlier one is the same as, or nearly; of prepared text."""
    tokenizer: TokenizerSpec = TrainedTokenizer()
    """By its `kind`: train, file, hub."""
    objective: ObjectiveSpec = SpanCorruption()
    """By its `kind`: span_corruption, prefix_lm, denoisers."""
    packing: Literal["windows", "documents"] = "windows"
    """Documents end to end, cut into rows; or rows of whole documents, which do not see one another."""
    access: Literal["prepared", "stream"] = "prepared"
    """Cut into ids once, before the first step; or read as training goes on: for text of which a run sees a part."""
    lanes: int = Field(default=8, ge=1)
    """Of a stream: how many parts of a batch are read apart; the most ranks that can share it."""
    held_out_fraction: float = Field(default=0.02, gt=0.0, lt=1.0)
    """Share of the documents kept for evaluation, chosen by a hash of each document alone."""

    def texts(self) -> dict[str, tuple[Corpus, ...]]:
        """What is mixed and measured apart, by label: a language, or a corpus without one; all together if joined."""
        return texts_of(self.corpora, self.mixture)

    @property
    def rows(self) -> Rows:
        if self.packing == "documents":
            assert isinstance(self.objective, SpanCorruption)
            return WholeDocuments(self.objective)
        return self.objective

    @model_validator(mode="after")
    def _can_be_packed(self) -> Self:
        if self.packing == "documents" and not isinstance(self.objective, SpanCorruption):
            raise ValueError(
                f"packing (documents) needs objective.kind=span_corruption, and it is {self.objective.kind}: take "
                "packing=windows"
            )
        return self

    @model_validator(mode="after")
    def _can_be_a_stream(self) -> Self:
        if self.access == "prepared":
            return self
        if self.duplicates is not None:
            raise ValueError("duplicates are found among prepared text: leave them out, or take access=prepared")
        if len(self.texts()) > 1 and self.mixture.kind != "joined" and self.mixture.max_epochs is not None:
            raise ValueError("mixture.max_epochs: how large a stream is nobody knows: leave it out, or access=prepared")
        return self

    @model_validator(mode="after")
    def _weights_count(self) -> Self:
        if self.mixture.kind != "weighted" and any(corpus.weight != 1.0 for corpus in self.corpora):
            raise ValueError(
                f"a weight of a corpus counts in a mixture of kind weighted alone, and it is {self.mixture.kind}: take "
                "mixture.kind=weighted, or leave the weight out"
            )
        return self


class TextSpec(Spec):
    """Text to measure a model on: the held-out part of it, as `DataSpec` has it, cut by the model's own vocabulary."""

    corpora: Annotated[tuple[Corpus, ...], Field(min_length=1)] = (PythonStdlib(),)
    mixture: TextMixtureSpec = Joined()
    """Anything but joined: each language, or corpus without one, is measured by itself."""
    filters: Filters = Filters()
    duplicates: Duplicates | None = None
    access: Literal["prepared", "stream"] = "prepared"
    """Look for the held-out part in all of it, or in its beginning."""
    held_out_fraction: float = Field(default=0.02, gt=0.0, lt=1.0)
    sequences: int = Field(default=512, ge=1)
    """Rows of each text that are looked at, at most as many as there are."""
