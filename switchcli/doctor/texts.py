"""The texts of the probes: random ids, equal in every run.

Legend: B batch, S source, T target, E experts, A tokens.

Which tokens fill an expert's capacity depends on the model: a crowded text consists of tokens that its router sends to
one expert.
"""

from typing import Final

import torch
import torch.nn.functional as F

from switchcli.doctor.subject import ProbeText, Subject
from switchcli.spec import EOS, PAD

SHORT: Final = 32
"""Length of a text whose length does not matter, in positions."""
BROAD: Final = 512
"""Minimum number of tokens that show how an average layer routes."""
TOKENS_PER_EXPERT: Final = 8
"""Mean number of tokens per expert, so that an expert has none by chance only once in exp(8) = 3,000 times."""
MAX_TOKENS: Final = 8192
"""Maximum number of tokens of a probe."""
_NUM_CANDIDATES: Final = 1024


def batch_size(subject: Subject, at_least: int) -> int:
    """Return the smallest number of sequences from `at_least` on that the model accepts."""
    return -(-at_least // subject.batch_multiple) * subject.batch_multiple  # rounded up to a multiple


def broad(subject: Subject) -> ProbeText:
    """Return tokens from the full vocabulary, enough to reach every expert."""
    length = 2 * SHORT
    num_tokens = min(max(BROAD, TOKENS_PER_EXPERT * subject.num_experts), MAX_TOKENS)
    B = batch_size(subject, -(-num_tokens // length))
    return ProbeText(_random_ids(subject, B, length, seed=1), _random_ids(subject, B, length, seed=2))


def short(subject: Subject) -> ProbeText:
    """Return at least two short rows of random tokens."""
    B = batch_size(subject, 2)
    return ProbeText(_random_ids(subject, B, SHORT, seed=3), _random_ids(subject, B, SHORT, seed=4))


def one_token(subject: Subject) -> ProbeText:
    """Return one token repeated, so that most experts have nothing to do."""
    B = batch_size(subject, 1)
    ids = _random_ids(subject, 1, 2, seed=5)
    return ProbeText(ids[:, :1].expand(B, 4), ids[:, 1:].expand(B, 4))


def crowded_source(subject: Subject) -> ProbeText:
    """Return inputs that the encoder's first sparse layer routes to the expert to which it routes padding."""
    plain = short(subject)
    candidates = _candidates(subject)
    padded = ProbeText(F.pad(candidates.inputs_BS, (0, 1), value=PAD), candidates.targets_BT)
    score_BSE = _first_scores(subject, padded, "encoder")
    if score_BSE is None:
        return plain
    expert = int(score_BSE[:, -1].argmax(-1).mode().values)  # the usual choice of the padding, which is last
    return plain._replace(
        inputs_BS=_repeat_best(candidates.inputs_BS, score_BSE[:, :-1], expert, 4, plain.inputs_BS.shape)
    )


def crowded_target(subject: Subject) -> ProbeText:
    """Return targets that the decoder's first sparse layer routes to one expert, more of them than its capacity."""
    B = batch_size(subject, 1)
    text = ProbeText(_random_ids(subject, B, SHORT, seed=6), _random_ids(subject, B, 2 * SHORT, seed=7))
    candidates = _candidates(subject)
    score_BTE = _first_scores(subject, candidates, "decoder")
    if score_BTE is None:
        return text
    # The decoder's input at position t is target t - 1, so the scores at t are those of target t - 1.
    score_BTE, ids_BT = score_BTE[:, 1:], candidates.targets_BT[:, :-1]
    expert = int(score_BTE.argmax(-1).flatten().mode().values)
    # One token repeated: all positions then choose the same expert, whichever it is.
    return text._replace(targets_BT=_repeat_best(ids_BT, score_BTE, expert, 1, text.targets_BT.shape))


def crowded_rows(subject: Subject) -> ProbeText:
    """Return several equal sequences, all of whose tokens are routed to one expert."""
    source, target = crowded_source(subject), crowded_target(subject)
    B = batch_size(subject, 4)
    return ProbeText(source.inputs_BS[:1].expand(B, -1), target.targets_BT[:1, :SHORT].expand(B, -1))


def alone(text: ProbeText) -> ProbeText:
    """Return the last row in a batch whose other rows are padding."""
    num_others = len(text.inputs_BS) - 1
    return ProbeText(*(F.pad(ids[-1:], (0, 0, num_others, 0), value=PAD) for ids in text))


def _random_ids(subject: Subject, num_sequences: int, length: int, seed: int) -> torch.Tensor:
    """Return ids from the vocabulary without padding and EOS: int64 [num_sequences, length]."""
    generator = torch.Generator().manual_seed(seed)
    first = min(EOS + 1, subject.vocab_size - 1)
    return torch.randint(first, subject.vocab_size, (num_sequences, length), generator=generator)


def _candidates(subject: Subject) -> ProbeText:
    B = batch_size(subject, _NUM_CANDIDATES // SHORT)
    return ProbeText(_random_ids(subject, B, SHORT, seed=8), _random_ids(subject, B, SHORT, seed=9))


def _first_scores(subject: Subject, text: ProbeText, stack: str) -> torch.Tensor | None:
    """Return what the first sparse layer of a stack chooses by: [B, S, E]; None without such a layer."""
    first = next((index for index, layer in enumerate(subject.layers) if layer.startswith(stack)), None)
    if first is None:
        return None
    # Groups are full sequences one after another, so [G, N, E] is also [B, S, E].
    logits_BSE = subject.forward(text).calls[first].logits_GNE.view(len(text.inputs_BS), -1, subject.num_experts)
    return subject.choice_scores(subject.routers[first], logits_BSE)


def _repeat_best(
    ids_BS: torch.Tensor, score_BSE: torch.Tensor, expert: int, count: int, shape: torch.Size
) -> torch.Tensor:
    """Return a text of the `count` ids whose score of `expert` is furthest above all others, repeated to `shape`.

    In such a text they choose the expert that they chose among the candidates.
    """
    others_BSE = score_BSE.index_fill(-1, torch.tensor([expert]), -torch.inf)
    margin_A = (score_BSE[..., expert] - others_BSE.amax(-1)).flatten()
    best_ids = ids_BS.flatten()[margin_A.topk(count).indices]
    return best_ids.repeat(-(-shape.numel() // count))[: shape.numel()].view(shape)
