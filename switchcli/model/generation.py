"""Answers of a model, decoded step by step with a key-value cache. How is said by `Decoding`.

Legend: B inputs, S source, T steps, V vocabulary, K beams of an input, C candidates of an input, R rows of a step: the
inputs, or the beams of all of them.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from switchcli.model.decoding import Decoding
from switchcli.model.kv_cache import DecoderCache
from switchcli.model.moe.layer import SwitchLayer
from switchcli.model.transformer import EncoderOutput, SwitchTransformer
from switchcli.spec import EOS, PAD

AllDone = Callable[[torch.Tensor], bool]
"""Whether to stop, given which inputs are done, bool [B]. Where a step holds collectives, all ranks must say the same:
all of them done on all of them."""


def all_done_locally(done_B: torch.Tensor) -> bool:
    """Stop when the inputs of this process are done."""
    return bool(done_B.all())


def generate(
    model: SwitchTransformer,
    inputs_BS: torch.Tensor,
    decoding: Decoding,
    *,
    first: int = 0,
    all_done: AllDone = all_done_locally,
) -> torch.Tensor:
    """The answer to each input: int64 [B, T], T <= max_tokens, ended by EOS unless cut off, then 0.

    The model must be in evaluation mode (`moe.evaluating`). An input of padding has no answer. Where routing counts
    capacity, the group of a step is one token of each of `group_sequences` sequences, or of beams.

    Args:
        first: the number of the first input, for the draws: rows 8 to 15 are answered alike alone and after 0 to 7.
        all_done: when to stop before `max_tokens`.
    """
    if decoding.beams > 1:
        return _search(model, inputs_BS, decoding, all_done)
    return torch.stack(list(generate_columns(model, inputs_BS, decoding, first=first, all_done=all_done)), dim=1)


@torch.no_grad()
def generate_columns(
    model: SwitchTransformer,
    inputs_BS: torch.Tensor,
    decoding: Decoding,
    *,
    first: int = 0,
    all_done: AllDone = all_done_locally,
) -> Iterator[torch.Tensor]:
    """The columns of `generate`'s answer as they come, int64 [B]: for who would read along.

    Raises:
        ValueError: of beam search, which knows its answer only at the end.
    """
    if decoding.beams > 1:
        raise ValueError(f"beams ({decoding.beams}) have no answer before the last step: set beams to 1 to read along")
    B = len(inputs_BS)
    source = _begin(model, inputs_BS)
    draws = decoding.draws(first, len(source.real_B))
    going_B = source.real_B
    last_B = torch.full_like(going_B, PAD, dtype=torch.int64)
    for _ in range(decoding.max_tokens):
        logits_BV = _step(model, source, last_B, going_B)
        last_B = decoding.pick(logits_BV, None if draws is None else draws.next()).masked_fill(~going_B, PAD)
        yield last_B[:B]
        going_B = going_B & (last_B != EOS)
        if all_done(~going_B):
            break


class _Source(NamedTuple):
    """Inputs as a step needs them, filled up to whole groups: padding takes no slot."""

    encoded: EncoderOutput
    cache: DecoderCache
    real_B: torch.Tensor
    """bool: not an input of padding alone."""


def _begin(model: SwitchTransformer, inputs_BS: torch.Tensor) -> _Source:
    layers = [module for module in model.modules() if isinstance(module, SwitchLayer)]
    group = math.lcm(*(layer.rule.group_size(layer.mode) for layer in layers))
    B = len(inputs_BS)
    rows = max(1, math.ceil(B / group)) * group
    inputs_BS = F.pad(inputs_BS, (0, 0, 0, rows - B), value=PAD)
    encoded = model.encode(inputs_BS)
    return _Source(encoded, model.decoder.cache(encoded), (inputs_BS != PAD).any(1))


def _step(model: SwitchTransformer, source: _Source, last_R: torch.Tensor, going_R: torch.Tensor) -> torch.Tensor:
    """Logits_RV of the token after the last one; a row that goes on no longer is not routed."""
    x_R1D = model.embed(last_R.unsqueeze(1))
    hidden_R1D, _ = model.decoder(x_R1D, going_R.unsqueeze(1), source.encoded, source.cache)
    hidden_R1D, vocabulary = model.vocabulary(hidden_R1D)
    return vocabulary.axis.all_gather(_few_rows(hidden_R1D.squeeze(1), vocabulary.weight_VD))


def _few_rows(hidden_RD: torch.Tensor, vocabulary_VD: torch.Tensor) -> torch.Tensor:
    """hidden @ vocabulary.T: a step's largest product.

    On a CPU a few rows go faster on the right: in 0.6 of the time in float32 and 0.4 in bfloat16, measured at 8 rows of
    768; at 4 and at 32 rows no more.
    """
    if hidden_RD.is_cpu and 8 <= len(hidden_RD) <= 16:
        return (vocabulary_VD @ hidden_RD.T).T.contiguous()
    return F.linear(hidden_RD, vocabulary_VD)


@torch.no_grad()
def _search(model: SwitchTransformer, inputs_BS: torch.Tensor, decoding: Decoding, all_done: AllDone) -> torch.Tensor:
    """Return the best answer that beam search finds for each input: T5X's search (t5x/decoding.py, `beam_search`).

    Each step looks at the 2 K best continuations of all live beams of an input. A continuation that ends with EOS is
    finished, whatever its place among them, with the score log p / ((5 + n) / 6)**alpha, where n counts its tokens,
    EOS included. The K best of the others are the next live beams. A live beam is an answer only when the input has no
    finished one after `max_tokens`; then the most probable live beam is, without a penalty.

    An input is done when no live beam can beat its best finished answer: log probabilities only fall, and the penalty
    is at most that of `max_tokens`. T5X keeps the K best finished answers, and waits until the worst of them passes
    this test with `max_tokens` + 1. The best one, which is all that is returned here, cannot change in between.
    """
    source = _begin(model, inputs_BS)
    real_B = source.real_B
    B, K = len(real_B), decoding.beams
    alive_BK = torch.full((B, K), -math.inf, device=real_B.device)
    alive_BK[:, 0] = 0.0  # the beams begin alike: one stands for all
    tokens_BKT = torch.empty(B, K, 0, dtype=torch.int64, device=real_B.device)
    answer_BT = tokens_BKT[:, 0]
    best_B = torch.full_like(alive_BK[:, 0], -math.inf)  # the score of `answer_BT`: -inf while nothing has finished
    last_BK = torch.full_like(alive_BK, PAD, dtype=torch.int64)
    done_B = ~real_B
    for length in range(1, decoding.max_tokens + 1):
        going_BK = ~done_B.unsqueeze(1) & (alive_BK > -math.inf)
        logits_RV = _step(model, source, last_BK.flatten(), going_BK.flatten())
        found = _continuations(logits_RV.float(), alive_BK, tokens_BKT)
        ended_BC = found.tokens_BCT[..., -1] == EOS

        finished_BC = (found.score_BC / decoding.penalty(length)).masked_fill(~ended_BC, -math.inf)
        score_B, which_B = finished_BC.max(1)
        better_B = (score_B > best_B) & ~done_B
        best_B = score_B.where(better_B, best_B)
        answer_BT = _row(found.tokens_BCT, which_B).where(better_B.unsqueeze(1), F.pad(answer_BT, (0, 1), value=PAD))

        alive_BK, which_BK = found.score_BC.masked_fill(ended_BC, -math.inf).topk(K)
        done_B = done_B | (best_B >= alive_BK[:, 0] / decoding.penalty(decoding.max_tokens))
        if all_done(done_B):
            break
        tokens_BKT = found.tokens_BCT.gather(1, which_BK.unsqueeze(2).expand(-1, -1, length))
        last_BK = tokens_BKT[..., -1]
        beam_BK = found.beam_BC.gather(1, which_BK)
        source.cache.reorder((beam_BK + K * torch.arange(B, device=beam_BK.device).unsqueeze(1)).flatten())
    else:
        unfinished_B = real_B & (best_B == -math.inf)
        # Live beams are sorted, the most probable first.
        answer_BT = tokens_BKT[:, 0].where(unfinished_B.unsqueeze(1), answer_BT)
    return answer_BT[: len(inputs_BS)]


class _Continuations(NamedTuple):
    """Of the beams of each input the best by one token, the best first: 2 K, of which at most K end."""

    score_BC: torch.Tensor
    """The sum of the log probabilities."""
    beam_BC: torch.Tensor
    tokens_BCT: torch.Tensor


def _continuations(logits_RV: torch.Tensor, alive_BK: torch.Tensor, tokens_BKT: torch.Tensor) -> _Continuations:
    B, K = alive_BK.shape
    most = min(2 * K, logits_RV.shape[1])  # more than these no beam can bring in
    logit_RC, token_RC = logits_RV.topk(most)
    log_p_RC = logit_RC - logits_RV.logsumexp(-1, keepdim=True)
    score_BA = (alive_BK.unsqueeze(2) + log_p_RC.view(B, K, most)).flatten(1)
    score_BC, place_BC = score_BA.topk(min(2 * K, K * most))
    beam_BC = place_BC // most
    before_BCT = tokens_BKT.gather(1, beam_BC.unsqueeze(2).expand(-1, -1, tokens_BKT.shape[2]))
    token_BC1 = token_RC.view(B, K * most).gather(1, place_BC).unsqueeze(2)
    return _Continuations(score_BC, beam_BC, torch.cat([before_BCT, token_BC1], dim=2))


def _row(tokens_BCT: torch.Tensor, which_B: torch.Tensor) -> torch.Tensor:
    return tokens_BCT.gather(1, which_B[:, None, None].expand(-1, 1, tokens_BCT.shape[2])).squeeze(1)
