"""Prepare a recipe's text before its run, on one machine or several."""

import re
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from switchcli.data.prepare.pipeline import prepare_share
from switchcli.data.prepare.prepared_text import SPLITS, PreparedText
from switchcli.errors import RecipeError
from switchcli.recipe import resolve
from switchcli.recipe.schema import validate_text_recipe
from switchcli.report.console import Console
from switchcli.runs.inputs import text_sets
from switchcli.runs.inputs.loading import open_model
from switchcli.runs.inputs.text_data import check_tokenizer_fits
from switchcli.runs.inputs.unknown_tokens import unknown_fraction, warn_of_unknown


def prepare(
    name: str,
    overrides: Sequence[str],
    console: Console,
    *,
    model: str | None,
    processes: int | None,
    share: str | None,
    check: bool,
) -> dict[str, Any]:
    """Prepare the texts of a recipe that are not in the cache yet, and return facts about each as JSON.

    `model` is a checkpoint whose tokenizer replaces the recipe's. `share` I/N is the part that this machine prepares.
    `check` compares prepared text with its checksums.

    Raises:
        RecipeError: the recipe does not train on text, or the share is not valid.
        DataError: the text or the tokenizer cannot be used.
        CheckpointError: the disk cannot be written. Finished pieces stay.
    """
    source = resolve.read(name, overrides)
    recipe = validate_text_recipe(source, name)
    is_padded = resolve.has_auto_vocab_size(source.merge())
    index, count = _parse_share(share)
    model_tokenizer = None if model is None else open_model(Path(model), console).tokenizer
    if recipe.data.access == "stream":
        console.warning("data.access is stream: the run reads its text as it goes, and what is prepared is for others")
    context = text_sets.prepare_context(console)._replace(
        processes=processes,
        share=(index, count),
        check=check,
        accept=partial(check_tokenizer_fits, recipe, is_padded=is_padded),
    )
    started = time.monotonic()
    tokenizer, texts = prepare_share(recipe.data, context, model_tokenizer)
    for label, text in texts.items():
        if text is not None:
            warn_of_unknown(label or "text", unknown_fraction(text, tokenizer), console)
    is_complete = all(text is not None for text in texts.values())
    if not is_complete:
        console.message(
            f"share {index + 1} of {count} is done; the shards of other machines are not all there: the last to "
            "be done, or the run itself, puts them together"
        )
    return {
        "recipe": name,
        "tokenizer": {"sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size},
        "complete": is_complete,
        "texts": {label: None if text is None else _facts(text) for label, text in texts.items()},
        "seconds": time.monotonic() - started,
    }


def _facts(text: PreparedText) -> dict[str, Any]:
    counts = {part: text.counts[part]._asdict() for part in SPLITS}
    return {**counts, "dropped": text.dropped, "identity": text.identity, "folder": str(text.folder)}


def _parse_share(share: str | None) -> tuple[int, int]:
    """Return the index of this machine, from 0, and the number of machines. Raises RecipeError unless I/N is valid."""
    if share is None:
        return 0, 1
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", share)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise RecipeError(f"--share ({share}): which machine of how many, from 1: try 1/4 to 4/4 on four of them")
    return int(match[1]) - 1, int(match[2])
