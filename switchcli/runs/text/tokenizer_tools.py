"""Train and describe the tokenizers of files, folders and recipes. Imports torch only to read a recipe."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from switchcli.convert.tokenizer_files import find_tokenizer
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.errors import DataError, RecipeError, disk_errors
from switchcli.terminal.console import Console
from switchcli.terminal.metrics_file import publish_file


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
    from switchcli.recipe import resolve
    from switchcli.recipe.schema import validate_text_recipe

    data = validate_text_recipe(resolve.read(recipe, overrides), recipe).data
    if data.tokenizer.kind != "train":
        raise RecipeError(
            f"{recipe}: data.tokenizer.kind ({data.tokenizer.kind}) must be train to train one: set "
            "data.tokenizer={kind: train, vocab_size: N}"
        )
    tokenizer = data.tokenizer.load(lambda: iter_documents(data, console.track, held_out=False), console.waiting)
    with disk_errors(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    publish_file(out, tokenizer.to_json())
    return tokenizer_facts(out, tokenizer)
