"""Guesses at hidden tokens: which count, how often they are right, and what is shown of them."""

from collections import Counter

import pytest
import torch
from tiny_model import SPARSE, a_model

from switchcli.analysis.guesses import NUM_GUESSES, measure_guesses, text_of, visible_tokens
from switchcli.data.batch import Batch
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.data.tokenizer.train import VocabSize, train_unigram
from switchcli.distributed.context import DistributedContext
from switchcli.model.transformer import SwitchTransformer
from switchcli.spec import EOS, PAD

CONTEXT = DistributedContext("cpu", "float32")
WORDS = "one two three four five six"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_unigram([WORDS], VocabSize(128)), "here")


@pytest.fixture(scope="module")
def model() -> SwitchTransformer:
    return a_model(SPARSE.model_copy(update={"vocab_size": 160}), seed=3)


def a_batch(tokenizer: Tokenizer) -> Batch:
    """`_ two _ four` with its gaps `one` and `three`, and a row of padding."""
    first, second = tokenizer.sentinels[:2].tolist()
    inputs = [first, *tokenizer.encode("two"), second, *tokenizer.encode("four"), EOS]
    targets = [first, *tokenizer.encode("one"), second, *tokenizer.encode("three"), EOS]
    return Batch(torch.tensor([inputs, [PAD] * len(inputs)]), torch.tensor([targets, [PAD] * len(targets)]))


def test_sentinels_blanks_and_rows_without_a_piece_are_no_guesses(tokenizer: Tokenizer) -> None:
    is_visible = visible_tokens(tokenizer, 160)
    assert not is_visible[[PAD, EOS, tokenizer.unknown, *tokenizer.sentinels.tolist()]].any()
    assert not is_visible[tokenizer.vocab_size :].any()
    pieces = tokenizer.pieces(range(tokenizer.vocab_size))
    assert [text_of(piece) != "" for piece in pieces if piece == "▁"] == [False]
    assert all(text_of(pieces[index]) for index in is_visible.nonzero().flatten().tolist())
    assert int(is_visible.sum()) > 5


def naive_guesses(model: SwitchTransformer, batch: Batch, is_visible: torch.Tensor) -> list[tuple[int, list[int]]]:
    """Each hidden token with the most probable visible ones there, the best first."""
    is_hidden = is_visible[batch.targets_BT]
    with torch.no_grad():
        logits = model.eval()(*batch).logits_BTV[is_hidden]
    ranked = (row.argsort(descending=True).tolist() for row in logits)
    best = [[index for index in row if is_visible[index]][:NUM_GUESSES] for row in ranked]
    return [*zip(batch.targets_BT[is_hidden].tolist(), best, strict=True)]


def test_accuracy_is_counted_over_hidden_tokens_and_next_to_the_most_frequent_ones(
    tokenizer: Tokenizer, model: SwitchTransformer
) -> None:
    is_visible = visible_tokens(tokenizer, 160)
    drawn = torch.randint(int(is_visible.sum()), (8, 12), generator=torch.Generator().manual_seed(0))
    at_random = is_visible.nonzero().flatten()[drawn]
    batches = [Batch(at_random, at_random), a_batch(tokenizer)]
    measured = measure_guesses(model, batches, False, "dropless", tokenizer, CONTEXT)
    assert measured is not None
    found = [one for batch in batches for one in naive_guesses(model, batch, is_visible)]
    frequent = [count for _, count in Counter(token for token, _ in found).most_common(5)]
    right, right_first = (sum(token in best[:most] for token, best in found) for most in (5, 1))
    assert 0 < right_first < right
    counted = (
        measured.tokens,
        measured.first,
        measured.first_five,
        measured.most_frequent,
        measured.five_most_frequent,
    )
    num = len(found)
    assert counted == (num, right_first / num, right / num, frequent[0] / num, sum(frequent) / num)
    assert measured.to_json()["examples"][0]["guesses"] == measured.examples[0].guesses


@pytest.mark.parametrize("packed", [False, True])
def test_an_example_of_each_gap_shows_what_the_model_sees(
    packed: bool, tokenizer: Tokenizer, model: SwitchTransformer
) -> None:
    batch = a_batch(tokenizer)
    if packed:  # twice the same example in a row
        batch = Batch(torch.cat([batch.inputs_BS, batch.inputs_BS], 1), torch.cat([batch.targets_BT] * 2, 1))
    measured = measure_guesses(model, [batch, batch], packed, "dropless", tokenizer, CONTEXT)
    assert measured is not None
    assert len(measured.examples) == 2 * (4 if packed else 2)
    first, second = measured.examples[-2:]
    assert (first.before + first.hidden).replace(" ", "") == "one"
    assert first.after.replace(" ", "") == "two_four"
    assert (second.before + second.hidden).replace(" ", "") == "_twothree"
    assert second.after.strip() == "four"
    if not packed:
        is_visible = visible_tokens(tokenizer, 160)
        best = [tuple(map(text_of, tokenizer.pieces(ids))) for _, ids in naive_guesses(model, batch, is_visible)]
        last_of_first = sum(is_visible[tokenizer.encode("one")].tolist()) - 1
        assert [first.guesses, second.guesses] == [best[last_of_first], best[-1]]


def test_a_gap_at_the_end_of_a_text_is_one_example(tokenizer: Tokenizer, model: SwitchTransformer) -> None:
    sentinel = int(tokenizer.sentinels[0])
    inputs = [*tokenizer.encode("two"), sentinel, EOS]
    targets = [sentinel, *tokenizer.encode("three four"), EOS]
    batch = Batch(torch.tensor([inputs]), torch.tensor([targets]))
    for tail in (batch, Batch(torch.tensor([inputs[:-1]]), batch.targets_BT)):
        measured = measure_guesses(model, [tail], False, "dropless", tokenizer, CONTEXT)
        assert measured is not None
        assert len(measured.examples) == 1


def test_without_a_hidden_token_nothing_is_measured(tokenizer: Tokenizer, model: SwitchTransformer) -> None:
    padding = torch.zeros(2, 8, dtype=torch.int64)
    assert measure_guesses(model, [Batch(padding, padding)], False, "dropless", tokenizer, CONTEXT) is None
