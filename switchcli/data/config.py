"""DataSpec: the `data:` section of a recipe, which says what a run reads. It opens no file; `data.prepare` does."""

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from switchcli.data.objectives.packed_documents import WholeDocumentObjective
from switchcli.data.objectives.prefix_lm import PrefixLanguageModel
from switchcli.data.objectives.span_corruption import SpanCorruption
from switchcli.data.prepare.filters import Filters
from switchcli.data.sources.corpus import Corpus, PythonStdlib
from switchcli.data.text_mixture import JoinedTexts, TextMixture, TextMixtureSpec
from switchcli.data.tokenizer.tokenizer import TokenizerSpec, TrainedTokenizer
from switchcli.spec import Count, Size, Spec

TextObjective = SpanCorruption | PrefixLanguageModel
"""The objectives that a recipe can name by `kind`."""
RowObjective = TextObjective | WholeDocumentObjective
"""An objective that turns raw rows into the rows of a batch."""
Corpora = Annotated[tuple[Corpus, ...], Field(min_length=1)]


class DataSpec(Spec):
    """The text of a run, the tokenizer that encodes it, and the objective that makes examples of it."""

    corpora: Corpora = (PythonStdlib(),)
    """Where the text comes from: corpora, each chosen by its `kind`."""
    mixture: TextMixtureSpec = JoinedTexts()
    """How the corpora are mixed, chosen by `kind`. `joined` makes one text of them; mixed texts are also evaluated
    separately."""
    filters: Filters = Filters()
    """Which documents, and which of their lines, are left out."""
    duplicates: Literal["keep", "drop"] = "keep"
    """Whether a document that repeats an earlier one token by token is kept. Only prepared text can drop them. If
    several texts of a mixture hold the same document, the first text keeps it."""
    access: Literal["prepared", "stream"] = "prepared"
    """`prepared` encodes all text before the first step; `stream` reads it during training, for text of which a run
    sees only a part. A stream is evaluated on the beginning of its held-out documents."""
    held_out_fraction: float = Field(default=0.02, gt=0.0, lt=1.0)
    """Fraction of the documents that is kept for evaluation, chosen by a hash of each document alone."""
    tokenizer: TokenizerSpec = TrainedTokenizer()
    """The tokenizer, chosen by `kind`: train, file or hub."""
    objective: TextObjective = Field(default=SpanCorruption(), discriminator="kind")
    """The objective, chosen by `kind`: what the model sees of a text, and what it has to predict."""
    packing: Literal["windows", "documents"] = "windows"
    """`windows` joins documents end to end and cuts rows from them; `documents` packs whole documents into rows, masked
    from each other."""
    stream_shards: Size = 8
    """Number of parts of a batch that a stream reads independently. It is the largest number of ranks that can share a
    batch."""

    def texts(self) -> dict[str, tuple[Corpus, ...]]:
        """Return the corpora of each text by its label: a language, or the number of a corpus without one.

        A text is what is mixed and evaluated separately. If the corpora are joined there is one, labeled "".
        """
        if self.mixture.kind == "joined":
            return {"": tuple(single for corpus in self.corpora for single in corpus.per_language())}
        texts: dict[str, tuple[Corpus, ...]] = {}
        for number, corpus in enumerate(self.corpora, 1):
            for single in corpus.per_language():
                label = single.language or f"corpus-{number}"
                texts[label] = (*texts.get(label, ()), single)
        return texts

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.access == "stream" and self.duplicates == "drop":
            raise ValueError("duplicates are found only in prepared text: keep them, or take access=prepared")
        if self.access == "stream" and self.mixture.kind != "joined" and self.mixture.max_epochs is not None:
            raise ValueError(
                "mixture.max_epochs: the size of a stream is not known: leave it out, or take access=prepared"
            )
        if not self.mixture.uses_weights and any(corpus.weight != 1.0 for corpus in self.corpora):
            raise ValueError(
                "the weight of a corpus counts only in a mixture of kind weighted, and this one is of kind "
                f"{self.mixture.kind}: take mixture.kind=weighted, or leave the weight out"
            )
        if self.packing == "documents" and not isinstance(self.objective, SpanCorruption):
            raise ValueError(
                f"packing (documents) needs objective.kind=span_corruption, and it is {self.objective.kind}: take "
                "packing=windows"
            )
        alpha = self.tokenizer.alpha if isinstance(self.tokenizer, TrainedTokenizer) else None
        if alpha is not None and self.mixture.kind == "joined":
            raise ValueError(
                f"tokenizer.alpha ({alpha:g}): has no effect on corpora that are joined into one text: "
                "leave it out, or take mixture.kind=temperature or another mixture"
            )
        return self

    @property
    def rows(self) -> RowObjective:
        """The objective, in the form that `packing` needs."""
        if self.packing == "documents":
            assert isinstance(self.objective, SpanCorruption)
            return WholeDocumentObjective(self.objective)
        return self.objective

    def build_mixture(
        self, sizes: Sequence[int], rows_per_epoch: Sequence[int], num_rows: int, seed: int
    ) -> TextMixture | None:
        """Return the mixture of texts with these sizes in a run of `num_rows` rows, or None for joined texts.

        `sizes` are tokens, or bytes of a stream; they and `rows_per_epoch` are in the order of `texts()`.

        Raises:
            RecipeError: the texts are too small for `max_epochs`, or a fraction is too small for a schedule.
        """
        if self.mixture.kind == "joined":
            return None
        texts = self.texts()
        weights = [sum(corpus.weight for corpus in corpora) for corpora in texts.values()]
        fractions = self.mixture.row_fractions(sizes, weights, rows_per_epoch, num_rows)
        stream_shards = self.stream_shards if self.access == "stream" else 1
        return TextMixture(dict(zip(texts, fractions.tolist(), strict=True)), seed, stream_shards)


class TextSpec(Spec):
    """Text to evaluate a model on: its held-out documents, read, mixed and encoded as the text of the model's run."""

    corpora: Corpora = (PythonStdlib(),)
    """Where the text comes from: corpora, each chosen by its `kind`."""
    held_out_fraction: float = Field(default=0.02, gt=0.0, le=1.0)
    """Fraction of the documents that is evaluated, chosen by a hash of each document alone. 1 is all of them."""
    sequences: Count = 512
    """Rows of each text to evaluate, or all if there are fewer."""
