"""Held-out rows of a text: their bytes are those that the targets of these rows hide, not an average of the text."""

import argparse
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from doubles import NoWarnings

from switchcli.data.batch import Batch
from switchcli.data.config import DataSpec
from switchcli.data.objectives.prefix_lm import PrefixLanguageModel
from switchcli.data.objectives.span_corruption import SpanCorruption
from switchcli.data.prepare.pipeline import PreparedTexts
from switchcli.data.prepare.prepared_text import HELD_OUT, PreparedText, TextCounts
from switchcli.data.prepare.store import TokenShard, TokenStore
from switchcli.data.text_batches import num_hidden_bytes
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.data.tokenizer.train import VocabSize, train_unigram
from switchcli.runs.inputs.text_sets import held_out_rows
from switchcli.spec import EOS, PAD

DOCUMENTS = [
    Path(argparse.__file__).read_text(),
    "\n".join(f"{n} {n * n} = {n % 7} + {n % 3}" for n in range(2000)),
]
"""Words, and digits that are a token each: few rows are far from the average."""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("switchcli.data.tokenizer.train.COVERAGE", 1.0)  # no character is unknown
        return Tokenizer(train_unigram(DOCUMENTS, VocabSize(1500)), "trained")


def bytes_in_context(inputs: list[int], targets: list[int], tokenizer: Tokenizer) -> int:
    """Put the hidden tokens of a row back into its text, and count by how much each makes the decoded text longer."""
    sentinels = {*tokenizer.sentinels.tolist()}
    inputs, targets = ([index for index in ids if index not in (PAD, EOS)] for ids in (inputs, targets))
    spans: dict[int, list[int]] = {-1: []}  # by sentinel; targets without sentinels continue the inputs
    for index in targets:
        if index in sentinels:
            spans[index] = []
        else:
            spans[list(spans)[-1]].append(index)
    row: list[tuple[int, bool]] = []
    for index in [*inputs, -1]:
        row += [(hidden, True) for hidden in spans[index]] if index in spans else [(index, False)]
    lengths = [len(tokenizer.decode([index for index, _ in row[:end]]).encode()) for end in range(len(row) + 1)]
    return sum(after - before for (before, after), (_, hidden) in zip(pairwise(lengths), row, strict=True) if hidden)


@pytest.mark.parametrize(
    "objective",
    [SpanCorruption(inputs_length=64), PrefixLanguageModel(inputs_length=40, targets_length=40)],
    ids=lambda objective: objective.kind,
)
@pytest.mark.parametrize("sequences", [2, 8, 64])
def test_bytes_are_those_of_the_hidden_tokens_of_the_rows(
    objective: SpanCorruption | PrefixLanguageModel, sequences: int, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode_batch(DOCUMENTS)
    store = TokenStore(np.concatenate(ids).astype(np.uint16), np.cumsum([0, *map(len, ids)]))
    counts = TextCounts(len(ids), store.num_tokens, sum(len(text.encode()) for text in DOCUMENTS))
    text = PreparedText({HELD_OUT: (TokenShard.of(store),)}, {HELD_OUT: counts}, {}, "", Path())
    texts = held_out_rows(PreparedTexts(tokenizer, {"": text}), DataSpec(objective=objective), sequences, NoWarnings())
    batch = texts[""].rows(0, sequences)
    rows = zip(batch.inputs_BS.tolist(), batch.targets_BT.tolist(), strict=True)
    wanted = sum(bytes_in_context(inputs, targets, tokenizer) for inputs, targets in rows)
    assert wanted > 30
    # Of a line break and the space that the tokenizer puts behind it, only one may be hidden.
    assert texts[""].num_bytes == pytest.approx(wanted, abs=2)


def test_a_hidden_byte_of_a_character_is_one_byte_and_unknown_characters_are_none() -> None:
    inner = train_unigram(["some words " * 9], VocabSize(400, byte_fallback=True))
    tokenizer = Tokenizer(inner, "trained")
    first, second, _ = (index for index in tokenizer.encode("日") if tokenizer.is_byte_V[index])
    for hidden, num_bytes in (([first], 1), ([first, second], 2), ([tokenizer.unknown], 0), ([first] * 5, 5)):
        targets = torch.tensor([[int(tokenizer.sentinels[0]), *hidden, EOS, PAD]])
        assert num_hidden_bytes(Batch(targets, targets), tokenizer) == num_bytes
