"""DataSpec: what a run reads, as the `data:` part of a recipe says it. It opens nothing; `prepare` does."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from switchcli.data.corpus import Corpus, PythonStdlib
from switchcli.data.objectives import Denoisers, ObjectiveSpec, PrefixLanguageModel
from switchcli.data.span_corruption import SpanCorruption
from switchcli.data.tokenizer import TokenizerSpec, TrainedTokenizer
from switchcli.data.whole_documents import WholeDocuments
from switchcli.spec import Spec

Rows = SpanCorruption | PrefixLanguageModel | Denoisers | WholeDocuments
"""What a row of a batch is made by."""


class DataSpec(Spec):
    """Text, the vocabulary that cuts it into ids, and what is asked of them."""

    corpora: Annotated[tuple[Corpus, ...], Field(min_length=1)] = (PythonStdlib(),)
    """Read one after another; each by its `kind`: python-stdlib, files, hub."""
    tokenizer: TokenizerSpec = TrainedTokenizer()
    """By its `kind`: train, file, hub."""
    objective: ObjectiveSpec = SpanCorruption()
    """By its `kind`: span_corruption, prefix_lm, denoisers."""
    packing: Literal["windows", "documents"] = "windows"
    """Documents end to end, cut into rows; or rows of whole documents, which do not see one another."""
    held_out_fraction: float = Field(default=0.02, gt=0.0, lt=1.0)
    """Share of the documents kept for evaluation, chosen by a hash of each document's name alone."""

    @model_validator(mode="after")
    def _can_be_packed(self) -> Self:
        if self.packing == "documents" and not isinstance(self.objective, SpanCorruption):
            raise ValueError(
                f"packing (documents) needs objective.kind=span_corruption, and it is {self.objective.kind}: take "
                "packing=windows"
            )
        return self

    @property
    def rows(self) -> Rows:
        if self.packing == "documents":
            assert isinstance(self.objective, SpanCorruption)
            return WholeDocuments(self.objective)
        return self.objective


class TextSpec(Spec):
    """Text to measure a model on: the held-out part of it, as `DataSpec` has it, cut by the model's own vocabulary."""

    corpora: Annotated[tuple[Corpus, ...], Field(min_length=1)] = (PythonStdlib(),)
    held_out_fraction: float = Field(default=0.02, gt=0.0, lt=1.0)
    sequences: int = Field(default=512, ge=1)
    """Rows of it that are looked at, at most as many as there are."""
