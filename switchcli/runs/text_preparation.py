"""A recipe's text as ids, before the run that reads them, by one machine or several."""

import re
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from switchcli.data.prepare.pipeline import prepare_share
from switchcli.data.prepare.prepared_text import SPLITS, PreparedText
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.errors import RecipeError
from switchcli.recipe.schema import resolve_text_recipe
from switchcli.report.console import Console
from switchcli.runs import text_sets
from switchcli.runs.loading import open_model
from switchcli.runs.pretraining import check_tokenizer_fits


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
    """Prepare the text that is not there yet, and return what there is of each.

    `model` is the checkpoint whose vocabulary is used instead of the recipe's. This machine makes the `share` I/N, and
    with `check` compares what is there with its checksums.

    Raises:
        RecipeError: the recipe is not one of text; the share is none.
        DataError: of the text or the tokenizer.
        CheckpointError: the disk refuses; what was whole by then stays.
    """
    recipe = resolve_text_recipe(name, overrides)
    number, of = _share(share)
    tokenizer = None if model is None else _of_model(model, console)
    if recipe.data.access == "stream":
        console.warning("data.access is stream: the run reads its text as it goes, and what is prepared is for others")
    means = text_sets.prepare_context(console)._replace(
        processes=processes, share=(number, of), check=check, accept=partial(check_tokenizer_fits, recipe)
    )
    started = time.monotonic()
    used, found = prepare_share(recipe.data, means, tokenizer)
    missing = [label for label, text in found.items() if text is None]
    if missing:
        console.message(
            f"share {number + 1} of {of} is done; the pieces of other machines are not all there: the last to "
            "be done, or the run itself, puts them together"
        )
    return {
        "recipe": name,
        "tokenizer": {"sha256": used.sha256, "vocab_size": used.vocab_size},
        "whole": not missing,
        "texts": {label: text and _facts(text) for label, text in found.items()},
        "seconds": time.monotonic() - started,
    }


def _facts(text: PreparedText) -> dict[str, Any]:
    counts = {part: text.counts[part]._asdict() for part in SPLITS}
    return {**counts, "dropped": text.dropped, "identity": text.identity, "folder": str(text.folder)}


def _share(said: str | None) -> tuple[int, int]:
    if said is None:
        return 0, 1
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", said)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise RecipeError(f"--share ({said}): which machine of how many, from 1: try 1/4 to 4/4 on four of them")
    return int(found[1]) - 1, int(found[2])


def _of_model(model: str, console: Console) -> Tokenizer:
    return open_model(Path(model), console).tokenizer
