"""A checkpoint's answers to texts with gaps, or to a task's inputs."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from switchcli.errors import DataError, RecipeError
from switchcli.model.decoding import Decoding
from switchcli.model.generation import generate as decode
from switchcli.model.generation import generate_columns
from switchcli.model.moe.layer import evaluating
from switchcli.model.moe.router import Policy
from switchcli.report.console import Console
from switchcli.runs.loading import LoadedModel, load_checkpoint
from switchcli.spec import EOS, PAD

HALF_A_CHARACTER = "\ufffd"
"""What a text ends in while bytes of its last character are still to come."""


class Answer(NamedTuple):
    """A text and what the model says to it."""

    input: str
    output: str


def load_on(path: Path, device: Literal["auto", "cpu", "cuda"], console: Console) -> LoadedModel:
    """Return the model at `path` on the device: `auto` is a CUDA device where there is one.

    Raises:
        CheckpointError: as `load`.
        RecipeError: no CUDA device, and one was asked for.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("--device is cuda and this machine shows no CUDA device: leave it out, or say cpu")
    name = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    return load_checkpoint(path, torch.device(name), console)


def generate(
    loaded: LoadedModel, texts: Iterable[str], decoding: Decoding, policy: Policy, batch_size: int, console: Console
) -> Iterator[Answer]:
    """Answer the texts in their order, as soon as a batch of them is there; a blank one by nothing.

    The routers count capacity by `policy`: `dropless` makes an answer independent of the texts beside it. What is drawn
    at random depends on the seed and on the number of a text, not on its batch.

    Raises:
        DataError: a text that is not UTF-8.
    """
    first = 0
    for batch in _batches(texts, batch_size):
        outputs = [""] * len(batch)
        if any(map(str.strip, batch)):
            inputs_BS = _inputs(loaded, batch, console, first)
            with evaluating(loaded.model, policy):
                rows_BT = decode(loaded.model, inputs_BS, decoding, first=first)
            outputs = [
                loaded.tokenizer.decode(row) if text.strip() else ""
                for text, row in zip(batch, rows_BT.tolist(), strict=True)
            ]
        yield from map(Answer, batch, outputs)
        first += len(batch)


def stream(loaded: LoadedModel, text: str, decoding: Decoding, policy: Policy, console: Console) -> Iterator[str]:
    """Yield the answer to one text in pieces, as the tokens come. Raises as `generate`."""
    inputs_BS = _inputs(loaded, [text], console)
    ids: list[int] = []
    shown = said = ""
    with evaluating(loaded.model, policy):
        for token_B in generate_columns(loaded.model, inputs_BS, decoding):
            ids += token_B.tolist()
            said = loaded.tokenizer.decode(ids)
            whole = said.rstrip(HALF_A_CHARACTER)
            if whole.startswith(shown) and whole != shown:
                yield whole.removeprefix(shown)
                shown = whole
    if said != shown:
        yield said.removeprefix(shown) if said.startswith(shown) else f"\n{said}"


def _inputs(loaded: LoadedModel, texts: Sequence[str], console: Console, first: int = 0) -> torch.Tensor:
    """int64 [texts, length of the longest], after `first` others; a blank text is a row of padding."""
    longest = loaded.recipe.inputs_length
    rows = []
    for number, text in enumerate(texts, first + 1):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"text {number} is not UTF-8 (at its character {error.start}): convert it first") from error
        ids = [*loaded.tokenizer.encode(text), EOS] if text.strip() else []
        if len(ids) > longest:
            console.warning(f"the text has {len(ids)} tokens, the model was trained on {longest}: its end is cut off")
            ids = [*ids[: longest - 1], EOS]
        rows.append(torch.tensor(ids, dtype=torch.int64))
    inputs_BS = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    return inputs_BS.to(loaded.model.embedding.device)


def _batches(texts: Iterable[str], size: int) -> Iterator[tuple[str, ...]]:
    """`size` texts at a time, and the rest; none waits for more than its own batch."""
    texts = iter(texts)
    while batch := tuple(islice(texts, size)):
        yield batch
