"""Generate a checkpoint's answers to texts with gaps, or to the inputs of a task."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch

from switchcli.errors import DataError
from switchcli.model.decoding import Decoding
from switchcli.model.generation import generate as decode
from switchcli.model.generation import generate_columns
from switchcli.model.moe.layer import evaluating
from switchcli.model.moe.router import Policy
from switchcli.runs.inputs.loading import LoadedModel
from switchcli.spec import EOS, PAD
from switchcli.terminal.console import Console

_REPLACEMENT_CHARACTER = "\ufffd"
"""The end of a decoded text while further bytes of its last character are still to be generated."""


class Answer(NamedTuple):
    """A text and the answer of the model."""

    input: str
    output: str


def generate(
    model: LoadedModel, texts: Iterable[str], decoding: Decoding, policy: Policy, batch_size: int, console: Console
) -> Iterator[Answer]:
    """Yield the answers in the order of the texts, batch by batch. The answer to a blank text is empty.

    The routers count capacity by `policy`. `dropless` makes an answer independent of the other texts in the batch,
    except with the router `expert_choice`.
    Random sampling depends on the seed and on the number of a text, not on its batch.

    Raises:
        DataError: a text is not UTF-8.
    """
    encode = InputEncoder(model, console)
    for batch in _batches(texts, batch_size):
        outputs = [""] * len(batch)
        first = encode.num_texts  # in earlier batches
        inputs_BS = encode(batch)
        if any(map(str.strip, batch)):
            with evaluating(model.model, policy):
                rows_BT = decode(model.model, inputs_BS, decoding, first=first)
            outputs = [
                model.handle.tokenizer.decode(row) if text.strip() else ""
                for text, row in zip(batch, rows_BT.tolist(), strict=True)
            ]
        yield from map(Answer, batch, outputs)
    encode.sum_up()


def stream(model: LoadedModel, text: str, decoding: Decoding, policy: Policy, console: Console) -> Iterator[str]:
    """Yield the answer to one text in pieces, as its tokens are generated.

    Raises:
        DataError: the text is not UTF-8.
    """
    inputs_BS = InputEncoder(model, console)([text])
    ids: list[int] = []
    printed = answer = ""
    with evaluating(model.model, policy):
        for token_B in generate_columns(model.model, inputs_BS, decoding):
            ids += token_B.tolist()
            # Decoding all IDs again is needed because a character or a space may depend on several tokens.
            answer = model.handle.tokenizer.decode(ids)
            complete = answer.rstrip(_REPLACEMENT_CHARACTER)
            if complete.startswith(printed) and complete != printed:
                yield complete.removeprefix(printed)
                printed = complete
    if answer != printed:
        # If later tokens changed what is printed already, print the answer again on a line of its own.
        yield answer.removeprefix(printed) if answer.startswith(printed) else f"\n{answer}"


class InputEncoder:
    """Encodes texts as inputs of a model. It warns of the first one that is too long; `sum_up` tells of the others."""

    def __init__(self, model: LoadedModel, console: Console) -> None:
        self._model, self._console = model, console
        self.num_texts = 0
        """Number of texts so far."""
        self._num_cut_off = 0

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the token IDs of the texts, int64 [texts, length of the longest], padded at the end.

        A blank text is a row of padding.

        Raises:
            DataError: a text is not UTF-8.
        """
        max_length = self._model.handle.model_file.inputs_length
        rows = []
        for text in texts:
            self.num_texts += 1
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"text {self.num_texts} is not UTF-8 (at its character {error.start}): convert it first"
                ) from error
            ids = [*self._model.handle.tokenizer.encode(text), EOS] if text.strip() else []
            if len(ids) > max_length:
                self._num_cut_off += 1
                if self._num_cut_off == 1:
                    self._console.warning(
                        f"text {self.num_texts} has {len(ids)} tokens, the model was trained on {max_length}: its end "
                        "is cut off"
                    )
                ids = [*ids[: max_length - 1], EOS]
            rows.append(torch.tensor(ids, dtype=torch.int64))
        inputs_BS = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
        return inputs_BS.to(self._model.model.embedding.device)

    def sum_up(self) -> None:
        """Say how many texts were too long, if it was more than the one that the warning named."""
        if self._num_cut_off > 1:
            self._console.warning(f"{self._num_cut_off:,} of {self.num_texts:,} texts were cut off at their ends")


def _batches(texts: Iterable[str], size: int) -> Iterator[tuple[str, ...]]:
    """Yield `size` texts at a time, and the rest at the end. No text is read ahead of its batch."""
    texts = iter(texts)
    while batch := tuple(islice(texts, size)):
        yield batch
