"""T5X's beam search for one input, in lists and float64: the reference for `generate` with beams.

It follows the description of the algorithm (google-research/t5x, t5x/decoding.py, `beam_search`) and shares no code
with `generate`. `Rules` also lets it search as transformers does, so that the difference between the two is explicit.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from switchcli.model.transformer import EncoderOutput, SwitchTransformer

PAD, EOS = 0, 1
LogProbabilities = Callable[[list[list[int]]], Sequence[Sequence[float]]]
"""The log probabilities [prefixes, V] of the token after each prefix; the prefixes have equal length."""


class Rules(NamedTuple):
    """The two rules by which T5X's and transformers' searches differ, for K beams."""

    finish_from: int
    """A continuation may finish when it is among the best `finish_from` * K of a step."""
    cut_off_competes: bool
    """After the last step, an answer without EOS competes with the finished ones."""


T5X = Rules(finish_from=2, cut_off_competes=False)
TRANSFORMERS = Rules(finish_from=1, cut_off_competes=True)
"""transformers' with early_stopping="never"."""


def brevity_penalty(alpha: float, length: int) -> float:
    return ((5.0 + length) / 6.0) ** alpha


def best_answer(
    log_p_after: LogProbabilities, beams: int, alpha: float, max_tokens: int, rules: Rules = T5X
) -> list[int]:
    """Return the tokens of the best answer, its EOS included."""
    live = [(0.0, list[int]())]  # (log probability, tokens), the best first
    finished: list[tuple[float, list[int]]] = []  # (score, tokens), the best first
    for length in range(1, max_tokens + 1):
        rows = log_p_after([tokens for _, tokens in live])
        longer = [
            (log_p + float(more), [*tokens, token])
            for (log_p, tokens), row in zip(live, rows, strict=True)
            for token, more in enumerate(row)
        ]
        candidates = sorted(longer, key=first, reverse=True)[: 2 * beams]

        for rank, (log_p, tokens) in enumerate(candidates):
            is_cut_off = rules.cut_off_competes and length == max_tokens
            if rank < rules.finish_from * beams and (tokens[-1] == EOS or is_cut_off):
                finished.append((log_p / brevity_penalty(alpha, length), tokens))
        finished = sorted(finished, key=first, reverse=True)[:beams]
        live = [candidate for candidate in candidates if candidate[1][-1] != EOS][:beams]

        # T5X counts the start token in the longest length: the bound takes max_tokens + 1.
        most = live[0][0] / brevity_penalty(alpha, max_tokens + 1)
        if len(finished) == beams and finished[-1][0] > most:
            break
    return (finished or live)[0][1]


def first(pair: tuple[float, list[int]]) -> float:
    return pair[0]


def log_p_after(model: SwitchTransformer, inputs_S: torch.Tensor) -> LogProbabilities:
    """The model's log probabilities in float64, from its logits: by passes over whole prefixes, without a cache."""

    @cache
    def encoded(rows: int) -> EncoderOutput:
        return model.encode(inputs_S[inputs_S != PAD].expand(rows, -1))

    @torch.no_grad()
    def of(prefixes: list[list[int]]) -> list[list[float]]:
        hidden_P1D, vocabulary = model.vocabulary(last_hidden(model, encoded(len(prefixes)), prefixes))
        logits_PV = F.linear(hidden_P1D.squeeze(1), vocabulary.weight_VD)
        rows: list[list[float]] = logits_PV.double().log_softmax(-1).tolist()
        return rows

    return of


def last_hidden(model: SwitchTransformer, encoded: EncoderOutput, prefixes: list[list[int]]) -> torch.Tensor:
    """float32 [P, 1, D]: the decoder's output at the last position of each of P prefixes."""
    ids_PT = torch.tensor([[PAD, *prefix] for prefix in prefixes])
    hidden_PTD, _ = model.decoder(model.embed(ids_PT), torch.ones_like(ids_PT, dtype=torch.bool), encoded)
    return hidden_PTD[:, -1:]
