"""Tokenizers of files, folders and recipes: trained, described and compared. No torch until a recipe is read."""

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
        DataError: there is none, or it cannot be read.
    """
    if not name.is_dir():
        return Tokenizer.read(name)
    file = find_tokenizer(name)
    if file is None:
        raise DataError(f"{name}: no tokenizer.json or spiece.model in this folder: name a run's, or a file")
    return Tokenizer.read(file)


def tokenizer_facts(name: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return how many ids there are of what, and the digest by which runs know the tokenizer."""
    return {
        "tokenizer": str(name),
        "vocab_size": tokenizer.vocab_size,
        "pieces": tokenizer.vocab_size - len(tokenizer.sentinels) - int(tokenizer.is_byte_V.sum()) - 3,
        "sentinels": len(tokenizer.sentinels),
        "byte_fallback": bool(tokenizer.is_byte_V.any()),
        "sha256": tokenizer.sha256,
    }


def encode_texts(tokenizer: Tokenizer, texts: Iterable[str]) -> list[dict[str, Any]]:
    """Return the ids and pieces of each text, cut as a prompt is."""
    ids = ((text, tokenizer.encode(text)) for text in texts)
    return [{"text": text, "ids": found, "pieces": tokenizer.pieces(found)} for text, found in ids]


def check_free(out: Path, *, replace: bool) -> None:
    """Raise RecipeError where no new file can be."""
    if out.is_dir():
        raise RecipeError(f"--out {out}: is a folder: name a file in it, such as {out / 'tokenizer.json'}")
    if out.exists() and not replace:
        raise RecipeError(f"--out {out}: is there already: give another name, or --force to replace it")


def train(recipe: str, overrides: Sequence[str], out: Path, console: Console) -> dict[str, Any]:
    """Train by the recipe's data.tokenizer on its training documents, and write `out`, whole or not at all.

    Raises:
        RecipeError: the recipe is not of plain text, or has a tokenizer already.
        DataError: the text cannot be read, or has too many characters.
    """
    from switchcli.data.prepare.pipeline import iter_documents
    from switchcli.recipe.schema import resolve_text_recipe

    data = resolve_text_recipe(recipe, overrides).data
    if data.tokenizer.kind != "train":
        raise RecipeError(
            f"{recipe}: data.tokenizer.kind ({data.tokenizer.kind}) must be train to train one: set "
            "data.tokenizer={kind: train, vocab_size: N}"
        )
    tokenizer = data.tokenizer.load(lambda: iter_documents(data, console.track, held_out=False))
    with disk_errors(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    publish_file(out, tokenizer.to_json())
    return {**tokenizer_facts(out, tokenizer), "character_coverage": data.tokenizer.character_coverage}


class ComparedText(NamedTuple):
    """One text, and what each tokenizer makes of it."""

    name: str
    documents: int
    bytes: int
    measured: tuple[TokenCounts, ...]

    def to_json(self) -> dict[str, Any]:
        measured = [
            {
                "tokens": one.tokens,
                "tokens_per_byte": one.tokens / self.bytes if self.bytes else None,
                "unknown": one.unknown / max(one.tokens, 1),
                "byte_fallback": one.in_bytes / max(one.tokens, 1),
            }
            for one in self.measured
        ]
        return {"text": self.name, "documents": self.documents, "bytes": self.bytes, "measured": measured}


class TokenizerComparison(NamedTuple):
    """Tokenizers side by side."""

    tokenizers: tuple[Mapping[str, Any], ...]
    """Facts of each, in the order of each row's `measured`."""
    rows: tuple[ComparedText, ...]

    @property
    def total(self) -> ComparedText:
        columns = zip(*(row.measured for row in self.rows), strict=True)
        sums = tuple(TokenCounts(*map(sum, zip(*column, strict=True))) for column in columns)
        return ComparedText("total", sum(row.documents for row in self.rows), sum(row.bytes for row in self.rows), sums)

    def to_json(self) -> dict[str, Any]:
        rows = [row.to_json() for row in self.rows]
        return {"tokenizers": list(self.tokenizers), "rows": rows, "total": self.total.to_json()}


def compare(
    arguments: Sequence[str], recipe: str | None, files: Sequence[str], console: Console
) -> TokenizerComparison:
    """Measure the tokenizers that `arguments` name on the recipe's held-out documents, with its keys set as the other
    arguments say, and on the files.

    Raises:
        RecipeError: there is no text to measure on, or no tokenizer.
        DataError: a tokenizer or a text cannot be read, or no text is held out.
    """
    overrides = [one for one in arguments if "=" in one and not Path(one).exists()]
    names = [Path(one) for one in arguments if one not in overrides]
    if not names:
        raise RecipeError("compare: no TOKENIZER is named: name a tokenizer.json, a spiece.model or a run's folder")
    if recipe is None and (overrides or not files):
        raise RecipeError("compare: name the recipe to measure on by --on RECIPE, or files by --text FILE")
    tokenizers = [open_tokenizer(name) for name in names]
    texts = _files(files)
    if recipe is not None:
        from switchcli.data.prepare.pipeline import iter_documents
        from switchcli.data.text_mixture import WeightedMixing
        from switchcli.recipe.schema import resolve_text_recipe

        apart = resolve_text_recipe(recipe, overrides).data.model_copy(update={"mixture": WeightedMixing()})
        texts = {**iter_documents(apart, console.track, held_out=True), **texts}
    rows = tuple(ComparedText(name, *measure_tokenizers(documents, tokenizers)) for name, documents in texts.items())
    compared = TokenizerComparison(tuple(map(tokenizer_facts, names, tokenizers)), rows)
    if not compared.total.bytes:
        raise DataError(f"{recipe}: no document is held out: take a larger data.held_out_fraction")
    return compared


def _files(paths: Sequence[str]) -> dict[str, Iterable[Document]]:
    """By the files' names, in full where two have the same. Raises DataError for what is no file."""
    if none := [path for path in paths if not Path(path).is_file()]:
        raise DataError(f"--text {none[0]}: no such file (from {Path.cwd()}): fix the path")
    stems = [Path(path).stem for path in paths]
    return {
        path if stems.count(stem) > 1 else stem: FilesCorpus(paths=(path,), sample_by="line").documents()
        for path, stem in zip(paths, stems, strict=True)
    }
