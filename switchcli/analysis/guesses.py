"""The guesses of a model at hidden tokens: the most probable ones, and how often they are right.

The model sees the text around a gap and, of the gap itself, the tokens before the hidden one (teacher forcing). Guesses
are tokens of text that show something: sentinels, EOS and blanks do not count, neither as hidden tokens nor as guesses.
So the accuracy says how well the model predicts what a gap holds, apart from where it ends.

Legend: B batch, S source, T target, V vocabulary, N hidden tokens of a batch, K guesses per token.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from switchcli.data.batch import Batch
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.data.tokenizer.train import SPACE
from switchcli.distributed.context import DistributedContext
from switchcli.model.attention import SegmentIds
from switchcli.model.moe.layer import evaluating
from switchcli.model.moe.router import Policy
from switchcli.model.transformer import SwitchTransformer
from switchcli.spec import EOS, PAD
from switchcli.training.loss import CHUNK, batch_segment_ids

NUM_GUESSES = 5
NUM_EXAMPLES = 8
"""Hidden tokens that are shown with their guesses."""


class GuessedToken(NamedTuple):
    """A hidden token with its text on both sides and the model's guesses. Written to JSON."""

    before: str
    hidden: str
    after: str
    guesses: tuple[str, ...]
    """The most probable one first."""


class Guesses(NamedTuple):
    """The accuracy of a model's guesses, and that of always naming the most frequent tokens. Written to JSON."""

    tokens: int
    """Hidden tokens that were guessed."""
    first: float
    """Fraction for which the first guess is right."""
    first_five: float
    """Fraction for which one of the first five guesses is right."""
    most_frequent: float
    """Fraction for which the token that is hidden most often here is right."""
    five_most_frequent: float
    """Fraction for which one of the five tokens that are hidden most often here is right."""
    examples: tuple[GuessedToken, ...]

    def to_json(self) -> dict[str, Any]:
        return {**self._asdict(), "examples": [example._asdict() for example in self.examples]}


def visible_tokens(tokenizer: Tokenizer, vocab_size: int) -> torch.Tensor:
    """Return which ids of the model's vocabulary are text that shows something: bool [V]."""
    is_visible_V = torch.zeros(vocab_size, dtype=torch.bool)
    ids = range(tokenizer.vocab_size)
    is_visible_V[: len(ids)] = torch.tensor([bool(text_of(piece)) for piece in tokenizer.pieces(ids)])
    is_visible_V[[PAD, EOS, tokenizer.unknown, *tokenizer.sentinels]] = False
    return is_visible_V


def text_of(piece: str) -> str:
    """Return the text of a piece of a vocabulary, without the blanks around it."""
    return piece.replace(SPACE, " ").strip()


def measure_guesses(
    model: SwitchTransformer,
    batches: Iterable[Batch],
    packed: bool,
    policy: Policy,
    tokenizer: Tokenizer,
    context: DistributedContext,
) -> Guesses | None:
    """Return how often the guesses are right in all batches, or None if these hide no token that shows something.

    All ranks take the same batches and have the same result.

    Args:
        model: the model itself, not one wrapped for training.
        batches: batches in the host's memory.
        packed: whether several examples share a row.
        policy: how routers count capacity.
        tokenizer: the vocabulary.
        context: the device and the precision.
    """
    is_visible_V = visible_tokens(tokenizer, model.spec.vocab_size).to(context.device)
    # For each token how often it is hidden, and for each number of guesses how often one of them is right.
    count_V = torch.zeros(len(is_visible_V), dtype=torch.int64, device=context.device)
    right_K = torch.zeros(NUM_GUESSES, dtype=torch.int64, device=context.device)
    examples: list[GuessedToken] = []
    with evaluating(model, policy):
        for batch in batches:
            on_device = Batch(*context.to_device(batch))
            is_hidden_BT = is_visible_V[on_device.targets_BT]
            with context.autocast():
                guess_NK = _guess(model, on_device, packed, is_hidden_BT, is_visible_V)
            hidden_N = on_device.targets_BT[is_hidden_BT]
            count_V += hidden_N.bincount(minlength=len(count_V))
            right_K += (guess_NK == hidden_N.unsqueeze(1)).sum(0).cumsum(0)
            if len(examples) < NUM_EXAMPLES:
                guess_BTK = guess_NK.new_zeros(*is_hidden_BT.shape, guess_NK.shape[1])
                guess_BTK[is_hidden_BT] = guess_NK
                examples += _examples(batch, packed, guess_BTK.cpu(), is_visible_V.cpu(), tokenizer)
    total = int(count_V.sum())
    if not total:
        return None
    most_frequent = count_V.topk(NUM_GUESSES).values.cumsum(0)
    return Guesses(
        tokens=total,
        first=int(right_K[0]) / total,
        first_five=int(right_K[-1]) / total,
        most_frequent=int(most_frequent[0]) / total,
        five_most_frequent=int(most_frequent[-1]) / total,
        examples=tuple(examples[:NUM_EXAMPLES]),
    )


@torch.no_grad()
def _guess(
    model: SwitchTransformer, batch: Batch, packed: bool, is_hidden_BT: torch.Tensor, is_visible_V: torch.Tensor
) -> torch.Tensor:
    """Return the most probable visible tokens of each hidden one, int64 [N, K]."""
    output = model(*batch, batch_segment_ids(batch, packed))
    hidden_ND, vocabulary = output.hidden_BTD[is_hidden_BT], output.vocabulary
    guesses = []
    for hidden_CD in hidden_ND.split(CHUNK):
        logits_CV = vocabulary.axis.all_gather(F.linear(hidden_CD, vocabulary.weight_VD))
        guesses.append(logits_CV.masked_fill(~is_visible_V, -torch.inf).topk(NUM_GUESSES).indices)
    return torch.cat(guesses) if guesses else is_hidden_BT.new_zeros(0, NUM_GUESSES, dtype=torch.int64)


def _examples(
    batch: Batch, packed: bool, guess_BTK: torch.Tensor, is_visible_V: torch.Tensor, tokenizer: Tokenizer
) -> Iterator[GuessedToken]:
    """Yield the last visible token of each gap, with its guesses, row by row; without gaps, each visible token."""
    sentinels = set(tokenizer.sentinels.tolist())
    segments = batch_segment_ids(batch, packed) or SegmentIds(*map(torch.zeros_like, batch))
    for inputs_S, targets_T, source_S, target_T, guess_TK in zip(*batch, *segments, guess_BTK, strict=True):
        for number in range(int((inputs_S == EOS).sum()) if packed else 1):
            is_own_T = target_T == number
            yield from _examples_of(
                [index for index in inputs_S[source_S == number].tolist() if index not in (PAD, EOS)],
                targets_T[is_own_T].tolist(),
                guess_TK[is_own_T].tolist(),
                is_visible_V,
                tokenizer,
                sentinels,
            )


def _examples_of(
    source: list[int],
    targets: list[int],
    guesses: list[list[int]],
    is_visible_V: torch.Tensor,
    tokenizer: Tokenizer,
    sentinels: set[int],
) -> Iterator[GuessedToken]:
    def decode(ids: Iterable[int]) -> str:
        """Return the text of ids, with `_` for each gap."""
        parts: list[list[int]] = [[]]
        for index in ids:
            if index in sentinels:
                parts.append([])
            else:
                parts[-1].append(index)
        return "_".join(map(tokenizer.decode, parts))

    start = 0  # of the gap's tokens among the targets
    before, after, has_gaps = source, list[int](), False  # without gaps the targets continue the source
    last: GuessedToken | None = None
    for position, target in enumerate(targets):
        if target in sentinels and target in source:
            if last is not None:
                yield last
            start, last, has_gaps = position + 1, None, True
            before, after = source[: source.index(target)], source[source.index(target) + 1 :]
        elif is_visible_V[target]:
            hidden, *guessed = map(text_of, tokenizer.pieces([target, *guesses[position]]))
            last = GuessedToken(decode([*before, *targets[start:position]]), hidden, decode(after), tuple(guessed))
            if not has_gaps:
                yield last
                last = None
    if last is not None:
        yield last
