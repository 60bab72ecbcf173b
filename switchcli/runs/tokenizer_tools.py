"""Train, describe and compare the tokenizers of files, folders and recipes. Imports torch only to read a recipe."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from switchcli.convert.tokenizer_files import find_tokenizer
from switchcli.data.sources.document import Document
from switchcli.data.sources.files import FilesCorpus
from switchcli.data.tokenizer.statistics import TokenCounts, measure_tokenizers
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.errors import DataError, RecipeError, disk_errors
from switchcli.report.console import Console
from switchcli.report.sinks import publish_file


def open_tokenizer(name: Path) -> Tokenizer:
    """Return the tokenizer of a file, or of the folder of a run, a checkpoint or a Hugging Face model.

    Raises:
        DataError: there is no tokenizer, or it cannot be read.
    """
    if not name.is_dir():
        return Tokenizer.read(name)
    file = find_tokenizer(name)
    if file is None:
        raise DataError(f"{name}: no tokenizer.json or spiece.model in this folder: name a run's, or a file")
    return Tokenizer.read(file)


def tokenizer_facts(name: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the numbers of IDs of each type, and the digest by which runs identify the tokenizer."""
    num_bytes = int(tokenizer.is_byte_V.sum())
    return {
        "tokenizer": str(name),
        "vocab_size": tokenizer.vocab_size,
        # The rest of the vocabulary are sentinels, byte tokens, and the three special IDs: padding, EOS and unknown.
        "pieces": tokenizer.vocab_size - len(tokenizer.sentinels) - num_bytes - 3,
        "sentinels": len(tokenizer.sentinels),
        "byte_fallback": num_bytes > 0,
        "sha256": tokenizer.sha256,
    }


def encode_texts(tokenizer: Tokenizer, texts: Iterable[str]) -> list[dict[str, Any]]:
    """Return the IDs and pieces of each text, which may hold sentinels like an input of `switchcli generate`."""
    encoded = ((text, tokenizer.encode(text)) for text in texts)
    return [{"text": text, "ids": ids, "pieces": tokenizer.pieces(ids)} for text, ids in encoded]


def check_free(out: Path, *, replace: bool) -> None:
    """Raise RecipeError if `out` is a folder, or an existing file without `replace`."""
    if out.is_dir():
        raise RecipeError(f"--out {out}: is a folder: name a file in it, such as {out / 'tokenizer.json'}")
    if out.exists() and not replace:
        raise RecipeError(f"--out {out}: is there already: give another name, or --force to replace it")


def train(recipe: str, overrides: Sequence[str], out: Path, console: Console) -> dict[str, Any]:
    """Train the recipe's data.tokenizer on its training documents, write it to `out`, and return facts about it.

    Raises:
        RecipeError: the recipe does not train on plain text, or names an existing tokenizer.
        DataError: the text cannot be read, or has too many different characters.
    """
    from switchcli.data.prepare.pipeline import iter_documents
    from switchcli.recipe.schema import resolve_text_recipe

    data = resolve_text_recipe(recipe, overrides).data
    if data.tokenizer.kind != "train":
        raise RecipeError(
            f"{recipe}: data.tokenizer.kind ({data.tokenizer.kind}) must be train to train one: set "
            "data.tokenizer={kind: train, vocab_size: N}"
        )
    tokenizer = data.tokenizer.load(lambda: iter_documents(data, console.track, held_out=False), console.waiting)
    with disk_errors(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    publish_file(out, tokenizer.to_json())
    return {**tokenizer_facts(out, tokenizer), "character_coverage": data.tokenizer.character_coverage}


class ComparedText(NamedTuple):
    """The counts of one text's tokens by several tokenizers."""

    name: str
    documents: int
    bytes: int
    counts: tuple[TokenCounts, ...]
    """One for each tokenizer."""

    def to_json(self) -> dict[str, Any]:
        measured = [
            {
                "tokens": counts.tokens,
                "tokens_per_byte": counts.tokens / self.bytes if self.bytes else None,
                "unknown": counts.unknown / max(counts.tokens, 1),
                "byte_fallback": counts.in_bytes / max(counts.tokens, 1),
            }
            for counts in self.counts
        ]
        return {"text": self.name, "documents": self.documents, "bytes": self.bytes, "measured": measured}


class TokenizerComparison(NamedTuple):
    """Several tokenizers, measured on the same texts."""

    tokenizers: tuple[Mapping[str, Any], ...]
    """Facts about each tokenizer, in the order of the counts of each text."""
    texts: tuple[ComparedText, ...]

    @property
    def total(self) -> ComparedText:
        """The sums over all texts."""
        sums = []
        for counts_by_text in zip(*(text.counts for text in self.texts), strict=True):  # for each tokenizer
            sums.append(TokenCounts(*map(sum, zip(*counts_by_text, strict=True))))
        documents, size = sum(text.documents for text in self.texts), sum(text.bytes for text in self.texts)
        return ComparedText("total", documents, size, tuple(sums))

    def to_json(self) -> dict[str, Any]:
        rows = [text.to_json() for text in self.texts]
        return {"tokenizers": list(self.tokenizers), "rows": rows, "total": self.total.to_json()}


def compare(
    arguments: Sequence[str], recipe: str | None, files: Sequence[str], console: Console
) -> TokenizerComparison:
    """Measure tokenizers on the held-out documents of the recipe, and on the files.

    `arguments` are paths of tokenizers, and KEY=VALUE overrides of the recipe.

    Raises:
        RecipeError: no tokenizer, or no text to measure on, is named.
        DataError: a tokenizer or a text cannot be read, or the recipe holds out no document.
    """
    overrides = [argument for argument in arguments if "=" in argument and not Path(argument).exists()]
    names = [Path(argument) for argument in arguments if argument not in overrides]
    if not names:
        raise RecipeError("compare: no TOKENIZER is named: name a tokenizer.json, a spiece.model or a run's folder")
    if recipe is None and (overrides or not files):
        raise RecipeError("compare: name the recipe to measure on by --on RECIPE, or files by --text FILE")
    tokenizers = [open_tokenizer(name) for name in names]
    documents = _documents_of_files(files)
    if recipe is not None:
        from switchcli.data.prepare.pipeline import iter_documents
        from switchcli.data.text_mixture import WeightedMixing
        from switchcli.recipe.schema import resolve_text_recipe

        # With a mixture, each corpus or language is a text of its own instead of a part of one text.
        data = resolve_text_recipe(recipe, overrides).data.model_copy(update={"mixture": WeightedMixing()})
        documents = {**iter_documents(data, console.track, held_out=True), **documents}
    texts = tuple(ComparedText(name, *measure_tokenizers(text, tokenizers)) for name, text in documents.items())
    comparison = TokenizerComparison(tuple(map(tokenizer_facts, names, tokenizers)), texts)
    if not comparison.total.bytes:
        raise DataError(f"{recipe}: no document is held out: take a larger data.held_out_fraction")
    return comparison


def _documents_of_files(paths: Sequence[str]) -> dict[str, Iterable[Document]]:
    """Return the lines of each file as documents, keyed by the file's stem, or by its path if the stem is not unique.

    Raises:
        DataError: a path is not a file.
    """
    if missing := [path for path in paths if not Path(path).is_file()]:
        raise DataError(f"--text {missing[0]}: no such file (from {Path.cwd()}): fix the path")
    stems = [Path(path).stem for path in paths]
    return {
        path if stems.count(stem) > 1 else stem: FilesCorpus(paths=(path,), sample_by="line").documents()
        for path, stem in zip(paths, stems, strict=True)
    }
