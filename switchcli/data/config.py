"""DataSpec: what a run reads, as the `data:` part of a recipe says it. It opens nothing; `prepare` does."""

from abc import ABC
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from switchcli.data.objectives.denoisers import ObjectiveSpec, TextObjective
from switchcli.data.objectives.packed_documents import WholeDocumentObjective
from switchcli.data.objectives.span_corruption import SpanCorruption
from switchcli.data.prepare.dedup import Duplicates
from switchcli.data.prepare.filters import Filters
from switchcli.data.sources.corpus import Corpus, PythonStdlib
from switchcli.data.text_mixture import JoinedTexts, TextMixture, TextMixtureSpec
from switchcli.data.tokenizer.tokenizer import TokenizerSpec, TrainedTokenizer
from switchcli.spec import MOST, Spec

RowObjective = TextObjective | WholeDocumentObjective
"""What a row of a batch is made by."""


class TextsSpec(Spec, ABC):
    """Which text, and what becomes of it before it is cut into ids."""

    corpora: Annotated[tuple[Corpus, ...], Field(min_length=1)] = (PythonStdlib(),)
    """Where the text comes from, each by its `kind`."""
    mixture: TextMixtureSpec = JoinedTexts()
    """How the corpora are mixed, by its `kind`; `joined` makes one text of them. Mixed texts are measured apart."""
    filters: Filters = Filters()
    duplicates: Duplicates | None = None
    """Leave out documents that an earlier one is the same as, or nearly; of prepared text. Of several texts of a
    mixture that hold the same document, the first keeps it."""
    access: Literal["prepared", "stream"] = "prepared"
    """Cut into ids once, before the first step; or read as training goes on: for text of which a run sees a part. What
    a stream is measured on is the beginning of its held-out part."""
    held_out_fraction: float = Field(default=0.02, gt=0.0, lt=1.0)
    """Share of the documents kept for evaluation, chosen by a hash of each document alone."""

    def texts(self) -> dict[str, tuple[Corpus, ...]]:
        """What is mixed and measured apart, by label: a language, or a corpus without one; all together if joined."""
        if self.mixture.kind == "joined":
            return {"": tuple(one for corpus in self.corpora for one in corpus.per_language())}
        found: dict[str, tuple[Corpus, ...]] = {}
        for number, corpus in enumerate(self.corpora, 1):
            for one in corpus.per_language():
                label = one.language or f"corpus-{number}"
                found[label] = (*found.get(label, ()), one)
        return found

    @model_validator(mode="after")
    def _can_be_a_stream(self) -> Self:
        if self.access == "prepared":
            return self
        if self.duplicates is not None:
            raise ValueError("duplicates are found among prepared text: leave them out, or take access=prepared")
        if self.mixture.kind != "joined" and self.mixture.max_epochs is not None:
            raise ValueError("mixture.max_epochs: how large a stream is nobody knows: leave it out, or access=prepared")
        return self

    @model_validator(mode="after")
    def _weights_count(self) -> Self:
        if not self.mixture.uses_weights and any(corpus.weight != 1.0 for corpus in self.corpora):
            raise ValueError(
                f"a weight of a corpus counts in a mixture of kind weighted alone, and it is {self.mixture.kind}: take "
                "mixture.kind=weighted, or leave the weight out"
            )
        return self


class DataSpec(TextsSpec):
    """Text, the vocabulary that cuts it into ids, and what is asked of them."""

    tokenizer: TokenizerSpec = TrainedTokenizer()
    """The vocabulary. `kind` is train, file or hub."""
    objective: ObjectiveSpec = SpanCorruption()
    """What a model is given of a text, and what it has to say of it, by its `kind`."""
    packing: Literal["windows", "documents"] = "windows"
    """Documents end to end, cut into rows; or rows of whole documents, which do not see one another."""
    stream_shards: int = Field(default=8, ge=1, le=MOST["ranks"])
    """How many parts of a batch a stream reads apart; at most so many ranks can share it."""

    @property
    def rows(self) -> RowObjective:
        if self.packing == "documents":
            assert isinstance(self.objective, SpanCorruption)
            return WholeDocumentObjective(self.objective)
        return self.objective

    def mixed(self, sizes: Sequence[int], rows_per_epoch: Sequence[int], rows: int, seed: int) -> TextMixture | None:
        """How the texts, of these sizes, are mixed in a run of so many rows; None for one text.

        Raises:
            RecipeError: they are too small for `max_epochs`, or a share is too small to be kept.
        """
        if self.mixture.kind == "joined":
            return None
        weights = [sum(corpus.weight for corpus in corpora) for corpora in self.texts().values()]
        shares = self.mixture.shares(sizes, weights, rows_per_epoch, rows)
        lanes = self.stream_shards if self.access == "stream" else 1
        return TextMixture(dict(zip(self.texts(), shares.tolist(), strict=True)), seed, lanes)

    @model_validator(mode="after")
    def _can_be_packed(self) -> Self:
        if self.packing == "documents" and not isinstance(self.objective, SpanCorruption):
            raise ValueError(
                f"packing (documents) needs objective.kind=span_corruption, and it is {self.objective.kind}: take "
                "packing=windows"
            )
        return self


class TextSpec(TextsSpec):
    """Text to measure a model on: the held-out part of it, as `DataSpec` has it, cut by the model's own vocabulary."""

    sequences: int = Field(default=512, ge=1, le=MOST["count"])
    """Rows of each text that are looked at, at most as many as there are."""
