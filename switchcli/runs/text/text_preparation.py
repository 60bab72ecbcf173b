"""Prepare a recipe's text before its run."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from switchcli.data.prepare import pipeline
from switchcli.data.prepare.cache import ShowTokens
from switchcli.data.prepare.prepared_text import SPLITS, PreparedText
from switchcli.recipe import resolve
from switchcli.recipe.schema import validate_text_recipe
from switchcli.runs.inputs import text_sets
from switchcli.runs.inputs.loading import open_model
from switchcli.runs.inputs.text_data import check_tokenizer_fits
from switchcli.runs.inputs.train_data import unknown_fraction, warn_of_unknown
from switchcli.terminal.console import Console


def prepare(
    name: str,
    overrides: Sequence[str],
    console: Console,
    *,
    model: str | None,
    processes: int | None,
    check: bool,
) -> dict[str, Any]:
    """Prepare the texts of a recipe that are not in the cache yet, and return facts about each as JSON.

    `model` is a checkpoint whose tokenizer replaces the recipe's. `check` compares prepared text with its checksums.

    Raises:
        RecipeError: the recipe does not train on text.
        DataError: the text or the tokenizer cannot be used.
        CheckpointError: the disk cannot be written. Finished pieces stay.
    """
    source = resolve.read(name, overrides)
    recipe = validate_text_recipe(source, name)
    is_padded = resolve.has_auto_vocab_size(source.merge())
    model_tokenizer = None if model is None else open_model(Path(model), console).tokenizer
    if recipe.data.access == "stream":
        console.warning("data.access is stream: the run reads its text as it goes, and what is prepared is for others")
    tokenized: list[str] = []  # none if the cache holds all

    def show(label: str, total: int) -> AbstractContextManager[ShowTokens]:
        tokenized.append(label)
        return console.counting(label, total)

    context = text_sets.prepare_context(console)._replace(
        show=show,
        processes=processes,
        check=check,
        accept=partial(check_tokenizer_fits, recipe, is_padded=is_padded),
    )
    started = time.monotonic()
    prepared = pipeline.prepare(recipe.data, context, model_tokenizer)
    tokenizer = prepared.tokenizer
    for label, text in prepared.texts.items():
        warn_of_unknown(label or "text", unknown_fraction(text, tokenizer), console)
    return {
        "recipe": name,
        "tokenizer": {"sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size},
        "texts": {label: _facts(text) for label, text in prepared.texts.items()},
        "cached": not tokenized,
        "seconds": time.monotonic() - started,
    }


def _facts(text: PreparedText) -> dict[str, Any]:
    counts = {part: text.counts[part]._asdict() for part in SPLITS}
    return {**counts, "dropped": text.dropped, "identity": text.identity, "folder": str(text.folder)}
