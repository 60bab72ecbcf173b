"""`switchcli generate`: a checkpoint's answers to texts with gaps."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from switchcli.commands.load import load
from switchcli.data.tokenizer import Tokenizer
from switchcli.errors import DataError, RecipeError
from switchcli.model.decoding import Decoding
from switchcli.model.generate import generate as decode
from switchcli.model.moe import evaluating
from switchcli.model.routing import Policy
from switchcli.model.transformer import SwitchTransformer
from switchcli.spec import EOS


class Answer(NamedTuple):
    """A text and what the model says to it."""

    input: str
    output: str


def generate(
    path: Path,
    texts: Iterable[str],
    max_tokens: int,
    device: Literal["auto", "cpu", "cuda"],
    policy: Policy,
    warn: Callable[[str], None],
) -> Iterator[Answer]:
    """Answer each text by greedy decoding, one after another; a blank one by nothing.

    `policy` is how the routers count capacity: `dropless` makes a step's answer that of the whole sequence.

    Raises:
        CheckpointError: as `load`.
        RecipeError: no CUDA device, and one was asked for.
        DataError: a text that is not UTF-8.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("--device is cuda and this machine shows no CUDA device: leave it out, or say cpu")
    name = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    loaded = load(path, torch.device(name), warn)
    longest = loaded.recipe.inputs_length
    for text in texts:
        if not text.strip():
            yield Answer(text, "")
            continue
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"the text is not UTF-8 (at its character {error.start}): convert it first") from error
        ids = [*loaded.tokenizer.encode(text), EOS]
        if len(ids) > longest:
            warn(f"the text has {len(ids)} tokens, the model was trained on {longest}: its end is cut off")
            ids = [*ids[: longest - 1], EOS]
        inputs_BS = torch.tensor([ids], device=name)
        yield Answer(text, answers(loaded.model, loaded.tokenizer, inputs_BS, max_tokens, policy)[0])


def answers(
    model: SwitchTransformer,
    tokenizer: Tokenizer,
    inputs_BS: torch.Tensor,
    max_tokens: int,
    policy: Policy = "dropless",
) -> list[str]:
    """The model's greedy answer to each row of ids, as text with the sentinels readable."""
    with evaluating(model, policy):
        rows_BT = decode(model, inputs_BS, Decoding(max_tokens=max_tokens))
    return [tokenizer.decode(row) for row in rows_BT.tolist()]
