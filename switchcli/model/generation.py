"""Step-by-step decoding with a key-value cache: greedy, sampling, or beam search, by the settings of `Decoding`.

Also the likelihood of given answers, for a choice between labels.

Legend: B inputs, S source, T steps, V vocabulary, D model, K beams per input, C candidates per input, M candidates per
beam, R rows of a step: the inputs, or the beams of all of them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from switchcli.model.attention import decoder_inputs
from switchcli.model.decoding import Decoding
from switchcli.model.init import keyed_generator
from switchcli.model.kernels import cpu_products
from switchcli.model.kv_cache import DecoderCache
from switchcli.model.layers import compute_dtype
from switchcli.model.moe.layer import sparse_layers
from switchcli.model.transformer import EncoderOutput, SwitchTransformer
from switchcli.model.vocabulary import at_least_float32
from switchcli.spec import EOS, PAD

MIN_TOKENS_TO_PACK = 8
"""Steps after which packed weights have saved the time to pack them."""
AllDone = Callable[[torch.Tensor], bool]
"""Returns whether to stop, given which inputs are done, bool [B]. Where a step has collectives, the answer must be the
same on all ranks: whether all inputs of all ranks are done."""


class UniformDraws:
    """Uniform random numbers of rows. Each row has a generator, keyed by the seed and the row's number."""

    def __init__(self, seed: int, first_row: int, num_rows: int) -> None:
        rows = range(first_row, first_row + num_rows)
        self._generators = [keyed_generator(seed, f"row {row}") for row in rows]

    def next(self) -> torch.Tensor:
        """Return the next number of each row: float64 [B] on the CPU."""
        return torch.cat([torch.rand(1, generator=generator, dtype=torch.float64) for generator in self._generators])


def pick(decoding: Decoding, logits_BV: torch.Tensor, draw_B: torch.Tensor | None) -> torch.Tensor:
    """Return the next token of each row, int64 [B]: the most probable one, or the one that `draw_B` selects.

    Args:
        decoding: the temperature and the nucleus.
        logits_BV: the logits of the next token.
        draw_B: numbers uniform on [0, 1); None takes the most probable tokens.
    """
    if draw_B is None:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV.double()  # less the largest, so that no quotient by a tiny temperature overflows upwards
    probability_BV = ((logits_BV - logits_BV.amax(-1, keepdim=True)) / decoding.temperature).softmax(-1)
    if decoding.top_p == 1.0:
        return _sample(probability_BV, draw_B)
    # The nucleus: a token belongs to it if the more probable ones sum to less than top_p.
    sorted_BV, token_BV = probability_BV.sort(dim=-1, descending=True, stable=True)
    sum_before_BV = sorted_BV.cumsum(-1) - sorted_BV
    rank_B = _sample(sorted_BV.where(sum_before_BV < decoding.top_p, 0.0), draw_B)
    return token_BV.gather(1, rank_B.unsqueeze(1)).squeeze(1)


def _sample(weight_BV: torch.Tensor, draw_B: torch.Tensor) -> torch.Tensor:
    """Return the index whose interval of the cumulative weights holds `draw_B` times their sum: int64 [B].

    An index with weight 0 has an empty interval and is never returned.
    """
    # Index i has the interval [end[i - 1], end[i]). right=True finds the first end that is greater than the draw.
    end_BV = weight_BV.cumsum(-1)
    total_B1 = end_BV[:, -1:]
    draw_B1 = draw_B.to(total_B1).unsqueeze(1) * total_B1
    # Rounding may make the product equal to the total, which is in no interval.
    largest_B1 = torch.nextafter(total_B1, torch.zeros_like(total_B1))
    return torch.searchsorted(end_BV, draw_B1.minimum(largest_B1), right=True).squeeze(1)


def all_done_locally(done_B: torch.Tensor) -> bool:
    """Return whether the inputs of this process are done."""
    return bool(done_B.all())


def generate(
    model: SwitchTransformer,
    inputs_BS: torch.Tensor,
    decoding: Decoding,
    *,
    first: int = 0,
    all_done: AllDone = all_done_locally,
    may_pad: bool = True,
) -> torch.Tensor:
    """Return the answer to each input: int64 [B, T], T <= max_tokens. An answer ends with EOS, unless it is cut off.

    Padding fills the rest of a row. An input of padding only has no answer. The model must be in evaluation mode
    (`moe.layer.evaluating`). Where routing counts capacity, a group of a step is one token of each of `group_sequences`
    sequences, or of beams.

    Args:
        model: the model.
        inputs_BS: int64 token ids; 0 is padding.
        decoding: the settings.
        first: the number of the first input, for sampling: inputs 8 to 15 have the same answers alone as after 0 to 7.
        all_done: decides whether to stop before `max_tokens`.
        may_pad: whether padding can be chosen like any token. Of an answer to learn from it would be no part.
    """
    if decoding.beams > 1:
        return _beam_search(model, inputs_BS, decoding, all_done, may_pad)
    columns = generate_columns(model, inputs_BS, decoding, first=first, all_done=all_done, may_pad=may_pad)
    return torch.stack(list(columns), dim=1)


@torch.no_grad()
def generate_columns(
    model: SwitchTransformer,
    inputs_BS: torch.Tensor,
    decoding: Decoding,
    *,
    first: int = 0,
    all_done: AllDone = all_done_locally,
    may_pad: bool = True,
) -> Iterator[torch.Tensor]:
    """Yield the columns of the answer of `generate` as they are decoded, int64 [B], for streaming output.

    Weights must not change before the last column.

    Raises:
        ValueError: `decoding` is a beam search, whose answer is known only at the end.
    """
    if decoding.beams > 1:
        raise ValueError(f"beams ({decoding.beams}) have no answer before the last step: set beams to 1 to read along")
    num_inputs = len(inputs_BS)
    source = _encode(model, inputs_BS, decoding, may_pad)
    draws = UniformDraws(decoding.seed, first, len(source.real_B)) if decoding.temperature > 0.0 else None
    active_B = source.real_B  # rows whose answer has not ended
    last_B = torch.full_like(active_B, PAD, dtype=torch.int64)  # PAD starts the decoder
    for _ in range(decoding.max_tokens):
        logits_BV = _step(model, source, last_B, active_B)
        last_B = pick(decoding, logits_BV, None if draws is None else draws.next()).masked_fill(~active_B, PAD)
        yield last_B[:num_inputs]  # without the rows that fill the last group
        active_B = active_B & (last_B != EOS)
        if all_done(~active_B):
            break


class _Source(NamedTuple):
    """The encoded inputs and an empty cache. Rows of padding fill the last group; they take no expert slot."""

    encoded: EncoderOutput
    cache: DecoderCache
    real_B: torch.Tensor
    """bool: inputs that are not padding only."""
    packed: cpu_products.PackedWeights
    """The weights of a step that are packed for its rows."""
    may_pad: bool


def _encode(model: SwitchTransformer, inputs_BS: torch.Tensor, decoding: Decoding, may_pad: bool) -> _Source:
    encoded, real_B = encode_groups(model, inputs_BS)
    packed: cpu_products.PackedWeights = {}
    if decoding.max_tokens >= MIN_TOKENS_TO_PACK:
        _, vocabulary = model.vocabulary(encoded.hidden_BSD[:, :1])
        weights = [vocabulary.weight_VD, *model.decoder.decoding_weights()]
        packed = cpu_products.pack(weights, compute_dtype(encoded.hidden_BSD), decoding.beams * len(real_B))
    return _Source(encoded, model.decoder.cache(encoded), real_B, packed, may_pad)


def encode_groups(model: SwitchTransformer, inputs_BS: torch.Tensor) -> tuple[EncoderOutput, torch.Tensor]:
    """Return the encoded inputs with rows of padding that fill the last routing group, and which rows are real [B]."""
    group_size = math.lcm(*(layer.router_spec.group_size(layer.mode) for layer in sparse_layers(model).values()))
    # Add rows of padding up to a multiple of the groups of all routers, and at least one group.
    num_rows = max(1, math.ceil(len(inputs_BS) / group_size)) * group_size
    inputs_BS = F.pad(inputs_BS, (0, 0, 0, num_rows - len(inputs_BS)), value=PAD)
    return model.encode(inputs_BS), (inputs_BS != PAD).any(1)


@torch.no_grad()
def label_log_likelihoods(
    model: SwitchTransformer, inputs_BS: torch.Tensor, labels: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Return log p(label | input) of each input and label: float32 or float64, [B, number of labels].

    It is the sum over the label's tokens, by teacher forcing, and is not divided by their number: the probability that
    sampling answers with exactly this label. The model must be in evaluation mode (`moe.layer.evaluating`). The inputs
    are encoded once for all labels. The decoder processes one label at a time, so that its logits take the memory of
    B inputs.

    Args:
        model: the model.
        inputs_BS: int64 token ids; 0 is padding.
        labels: int64 token ids of each label, with its EOS; without padding.
    """
    encoded, real_B = encode_groups(model, inputs_BS)
    sums = []
    for label_T in labels:
        # Rows that fill the last group have padding as targets, which is not routed.
        targets_BT = label_T.expand(len(real_B), -1).masked_fill(~real_B.unsqueeze(1), PAD)
        hidden_BTD, _ = model.decoder(model.embed(decoder_inputs(targets_BT, None)), targets_BT != PAD, encoded)
        hidden_BTD, vocabulary = model.vocabulary(hidden_BTD)
        logits_BTV = vocabulary.axis.all_gather(F.linear(hidden_BTD, vocabulary.weight_VD))
        log_p_BTV = logits_BTV.log_softmax(-1, dtype=at_least_float32(logits_BTV))
        sums.append(log_p_BTV.gather(2, targets_BT.unsqueeze(2)).sum((1, 2)))
    return torch.stack(sums, dim=1)[: len(inputs_BS)]


def _step(model: SwitchTransformer, source: _Source, last_R: torch.Tensor, active_R: torch.Tensor) -> torch.Tensor:
    """Return the logits [R, V] of the token after the last one. Rows that are not active are not routed."""
    x_R1D = model.embed(last_R.unsqueeze(1))
    with cpu_products.using_packed(source.packed):
        hidden_R1D, _ = model.decoder(x_R1D, active_R.unsqueeze(1), source.encoded, source.cache)
        hidden_R1D, vocabulary = model.vocabulary(hidden_R1D)
        logits_RV = cpu_products.linear(hidden_R1D.squeeze(1), vocabulary.weight_VD)
    logits_RV = vocabulary.axis.all_gather(logits_RV)
    if not source.may_pad:
        logits_RV[:, PAD] = -math.inf
    return logits_RV


@torch.no_grad()
def _beam_search(
    model: SwitchTransformer, inputs_BS: torch.Tensor, decoding: Decoding, all_done: AllDone, may_pad: bool
) -> torch.Tensor:
    """Return the best answer that beam search finds for each input: T5X's search (t5x/decoding.py, `beam_search`).

    Each step considers the 2 K best continuations of all live beams of an input. A continuation that ends with EOS is
    finished, whatever its rank among them, with the score log p / ((5 + n) / 6)**alpha, where n counts its tokens,
    including EOS. The K best of the others are the next live beams. A live beam is an answer only when the input has no
    finished one after `max_tokens`; then the most probable live beam is, without a penalty.

    An input is done when no live beam can beat its best finished answer: log probabilities only fall, and the penalty
    is at most that of `max_tokens`. T5X keeps the K best finished answers, and waits until the worst of them passes
    this test with `max_tokens` + 1. The best one, which is all that is returned here, cannot change in between.
    """
    source = _encode(model, inputs_BS, decoding, may_pad)
    real_B = source.real_B
    B, K = len(real_B), decoding.beams
    # The sum of log probabilities of each live beam, the best beam first; -inf: no beam. All beams would begin equal,
    # so only the first one lives.
    live_BK = torch.full((B, K), -math.inf, device=real_B.device)
    live_BK[:, 0] = 0.0
    tokens_BKT = torch.empty(B, K, 0, dtype=torch.int64, device=real_B.device)  # the tokens of each live beam
    last_BK = torch.full_like(live_BK, PAD, dtype=torch.int64)  # PAD starts the decoder
    answer_BT = tokens_BKT[:, 0]  # the best finished answer
    best_B = torch.full_like(live_BK[:, 0], -math.inf)  # its score; -inf while nothing has finished
    done_B = ~real_B
    for length in range(1, decoding.max_tokens + 1):
        active_BK = ~done_B.unsqueeze(1) & (live_BK > -math.inf)
        # Row b * K + k of a step is beam k of input b.
        logits_RV = _step(model, source, last_BK.flatten(), active_BK.flatten())
        candidates = _extend_beams(logits_RV.float(), live_BK, tokens_BKT)
        ended_BC = candidates.tokens_BCT[..., -1] == EOS

        # Finished candidates: keep the best one if its score beats the best answer so far.
        finished_BC = (candidates.log_p_BC / decoding.penalty(length)).masked_fill(~ended_BC, -math.inf)
        score_B, index_B = finished_BC.max(1)
        improves_B = (score_B > best_B) & ~done_B
        best_B = score_B.where(improves_B, best_B)
        new_answer_BT = _select_row(candidates.tokens_BCT, index_B)
        # Answers so far are one step shorter: pad them to the length of the candidates.
        answer_BT = new_answer_BT.where(improves_B.unsqueeze(1), F.pad(answer_BT, (0, 1), value=PAD))

        # Unfinished candidates: the K best are the live beams. The best of them bounds any later score of the input.
        live_BK, index_BK = candidates.log_p_BC.masked_fill(ended_BC, -math.inf).topk(K)
        done_B = done_B | (best_B >= live_BK[:, 0] / decoding.penalty(decoding.max_tokens))
        tokens_BKT = candidates.tokens_BCT.gather(1, index_BK.unsqueeze(2).expand(-1, -1, length))
        if all_done(done_B):
            break
        last_BK = tokens_BKT[..., -1]
        # A new beam continues the cache of its parent beam: that is row b * K + parent of the last step.
        parent_BK = candidates.beam_BC.gather(1, index_BK)
        first_row_B1 = K * torch.arange(B, device=parent_BK.device).unsqueeze(1)
        source.cache.reorder((first_row_B1 + parent_BK).flatten())
    # Stopped by max_tokens or by `all_done`: an input without a finished answer gets its best live beam, the first.
    unfinished_B = real_B & (best_B == -math.inf)
    return tokens_BKT[:, 0].where(unfinished_B.unsqueeze(1), answer_BT)[: len(inputs_BS)]


class _Candidates(NamedTuple):
    """The best continuations of an input's beams by one token, the best first: C = 2 K, of which at most K end.

    C is smaller only where all beams together have fewer continuations.
    """

    log_p_BC: torch.Tensor
    """The sum of the log probabilities."""
    beam_BC: torch.Tensor
    """int64: the beam that is continued."""
    tokens_BCT: torch.Tensor
    """int64: the tokens of the beam and the new one."""


def _extend_beams(logits_RV: torch.Tensor, live_BK: torch.Tensor, tokens_BKT: torch.Tensor) -> _Candidates:
    B, K = live_BK.shape
    # Of one beam at most its 2 K best tokens can be among the 2 K best of all beams: M = min(2 K, V).
    M = min(2 * K, logits_RV.shape[1])
    logit_RM, token_RM = logits_RV.topk(M)
    log_p_RM = logit_RM - logits_RV.logsumexp(-1, keepdim=True)
    # All K * M candidates of an input side by side: column k * M + m is the m-th best token of beam k.
    total_BKM = live_BK.unsqueeze(2) + log_p_RM.view(B, K, M)
    log_p_BC, column_BC = total_BKM.flatten(1).topk(min(2 * K, K * M))
    beam_BC = column_BC // M
    prefix_BCT = tokens_BKT.gather(1, beam_BC.unsqueeze(2).expand(-1, -1, tokens_BKT.shape[2]))
    token_BC1 = token_RM.view(B, K * M).gather(1, column_BC).unsqueeze(2)
    return _Candidates(log_p_BC, beam_BC, torch.cat([prefix_BCT, token_BC1], dim=2))


def _select_row(tokens_BCT: torch.Tensor, index_B: torch.Tensor) -> torch.Tensor:
    """Return tokens[b, index[b]] for each b: [B, T]."""
    return tokens_BCT.gather(1, index_B[:, None, None].expand(-1, 1, tokens_BCT.shape[2])).squeeze(1)
