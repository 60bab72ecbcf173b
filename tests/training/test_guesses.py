"""Guesses at hidden tokens: which count, how often they are right, and what is shown of them."""

import pytest
import torch
from tiny_model import SPARSE, a_model

from switchcli.data.batch import Batch
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.data.tokenizer.train import VocabSize, train_unigram
from switchcli.distributed.context import DistributedContext
from switchcli.model.transformer import SwitchTransformer
from switchcli.spec import EOS, PAD
from switchcli.training import guesses
from switchcli.training.guesses import measure_guesses, text_of, visible_tokens

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


def test_accuracy_is_counted_over_hidden_tokens_and_next_to_the_most_frequent_ones(
    tokenizer: Tokenizer, model: SwitchTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = a_batch(tokenizer)
    is_visible = visible_tokens(tokenizer, 160)
    hidden = [index for index in batch.targets_BT.flatten().tolist() if is_visible[index]]
    context = DistributedContext("cpu", "float32")

    measured = measure_guesses(model, [batch, batch], False, "dropless", tokenizer, context)
    assert measured is not None
    assert measured.tokens == 2 * len(hidden)
    most_frequent = max(hidden.count(index) for index in hidden)
    assert measured.most_frequent == most_frequent / len(hidden)
    assert 0 <= measured.first <= measured.first_five <= 1
    assert measured.to_json()["examples"][0]["guesses"] == measured.examples[0].guesses

    def perfect(model: object, batch: Batch, *_: object) -> torch.Tensor:
        own = batch.targets_BT[is_visible[batch.targets_BT]]
        return torch.stack([torch.full_like(own, PAD), own, *[torch.full_like(own, PAD)] * 3], dim=1)

    monkeypatch.setattr(guesses, "_guess", perfect)
    measured = measure_guesses(model, [batch], False, "dropless", tokenizer, context)
    assert measured is not None
    assert (measured.first, measured.first_five) == (0.0, 1.0)  # always the second guess


def test_guesses_are_the_most_probable_visible_tokens(tokenizer: Tokenizer, model: SwitchTransformer) -> None:
    batch = a_batch(tokenizer)
    is_visible = visible_tokens(tokenizer, 160)
    is_hidden = is_visible[batch.targets_BT]
    model.eval()
    guess = guesses._guess(model, batch, False, is_hidden, is_visible)
    with torch.no_grad():
        output = model(*batch)
    logits = output.hidden_BTD[is_hidden] @ output.vocabulary.weight_VD.T
    for row, own in zip(logits, guess.tolist(), strict=True):
        ranked = [index for index in row.argsort(descending=True).tolist() if is_visible[index]]
        assert own == ranked[: guesses.NUM_GUESSES]


@pytest.mark.parametrize("packed", [False, True])
def test_an_example_of_each_gap_shows_what_the_model_sees(
    packed: bool, tokenizer: Tokenizer, model: SwitchTransformer
) -> None:
    batch = a_batch(tokenizer)
    if packed:  # twice the same example in a row
        batch = Batch(torch.cat([batch.inputs_BS, batch.inputs_BS], 1), torch.cat([batch.targets_BT] * 2, 1))
    context = DistributedContext("cpu", "float32")
    measured = measure_guesses(model, [batch], packed, "dropless", tokenizer, context)
    assert measured is not None
    assert len(measured.examples) == (4 if packed else 2)
    first, second = measured.examples[-2:]
    assert (first.before + first.hidden).replace(" ", "") == "one"
    assert first.after.replace(" ", "") == "two_four"
    assert (second.before + second.hidden).replace(" ", "") == "_twothree"
    assert second.after.strip() == "four"
    assert len(first.guesses) == guesses.NUM_GUESSES


def test_without_a_hidden_token_nothing_is_measured(tokenizer: Tokenizer, model: SwitchTransformer) -> None:
    padding = torch.zeros(2, 8, dtype=torch.int64)
    context = DistributedContext("cpu", "float32")
    assert measure_guesses(model, [Batch(padding, padding)], False, "dropless", tokenizer, context) is None
