"""The texts that probes are made on: drawn ids, the same for every run.

Legend: B batch, S source, T target.

What fills a queue is known only from the model itself: a crowd is made of tokens that its router sends to one expert.
"""

from typing import Final

import torch
import torch.nn.functional as F

from switchcli.doctor.subject import ProbeText, Subject
from switchcli.spec import EOS, PAD

SHORT: Final = 32
"""Positions of a text where its length does not matter."""
LONGEST: Final = 512
"""Positions beyond which a capacity counts as one that never binds: T5's length."""
BROAD: Final = 512
"""Tokens that say how an average layer routes."""
TOKENS_AN_EXPERT: Final = 8
"""So many on average, so that an expert has none by chance once in exp(8) = 3,000 times."""
MOST: Final = 8192
"""Tokens that a probe may cost."""
_CANDIDATES: Final = 1024


def rows_of(subject: Subject, at_least: int) -> int:
    """The smallest batch that the model takes."""
    return -(-at_least // subject.rows) * subject.rows


def broad(subject: Subject) -> ProbeText:
    """Tokens from the whole vocabulary, enough to meet every expert."""
    tokens = min(max(BROAD, TOKENS_AN_EXPERT * subject.num_experts), MOST)
    rows = rows_of(subject, -(-tokens // (2 * SHORT)))
    return ProbeText(_drawn(subject, rows, 2 * SHORT, seed=1), _drawn(subject, rows, 2 * SHORT, seed=2))


def short(subject: Subject) -> ProbeText:
    rows = rows_of(subject, 2)
    return ProbeText(_drawn(subject, rows, SHORT, seed=3), _drawn(subject, rows, SHORT, seed=4))


def one_token(subject: Subject) -> ProbeText:
    """The same token all over: most experts have nothing to do."""
    rows = rows_of(subject, 1)
    ids = _drawn(subject, 1, 2, seed=5)
    return ProbeText(ids[:, :1].expand(rows, 4), ids[:, 1:].expand(rows, 4))


def crowded_source(subject: Subject) -> ProbeText:
    """Inputs whose tokens want the expert that padding wants, in the encoder's first sparse layer."""
    plain = short(subject)
    candidates = _candidates(subject)
    padded = ProbeText(F.pad(candidates.inputs_BS, (0, 1), value=PAD), candidates.targets_BT)
    logits_BSE = _first_logits(subject, padded, "encoder")
    if logits_BSE is None:
        return plain
    wanted = int(logits_BSE[:, -1].argmax(-1).mode().values)
    return plain._replace(inputs_BS=_crowd(candidates.inputs_BS, logits_BSE[:, :-1], wanted, 4, plain.inputs_BS.shape))


def crowded_target(subject: Subject) -> ProbeText:
    """Targets long enough to fill a queue, whose tokens want one expert in the decoder's first sparse layer."""
    length = min(LONGEST, SHORT + (subject.slots or SHORT))
    rows = rows_of(subject, 1)
    text = ProbeText(_drawn(subject, rows, SHORT, seed=6), _drawn(subject, rows, length, seed=7))
    candidates = _candidates(subject)
    logits_BTE = _first_logits(subject, candidates, "decoder")
    if logits_BTE is None:
        return text
    logits_BTE = logits_BTE[:, 1:]  # at position t the decoder is given target t - 1
    wanted = int(logits_BTE.argmax(-1).flatten().mode().values)
    shape = text.targets_BT.shape  # one token all over: then all positions want the same, whatever they want
    return text._replace(targets_BT=_crowd(candidates.targets_BT[:, :-1], logits_BTE, wanted, 1, shape))


def crowded_rows(subject: Subject) -> ProbeText:
    """Several sequences, all of whose tokens want one expert."""
    source, target = crowded_source(subject), crowded_target(subject)
    rows = rows_of(subject, 4)
    return ProbeText(source.inputs_BS[:1].expand(rows, -1), target.targets_BT[:1, :SHORT].expand(rows, -1))


def alone(text: ProbeText) -> ProbeText:
    """The last row with nothing but padding beside it."""
    return ProbeText(*(F.pad(ids[-1:], (0, 0, len(ids) - 1, 0), value=PAD) for ids in text))


def _drawn(subject: Subject, rows: int, length: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    first = min(EOS + 1, subject.vocab_size - 1)
    return torch.randint(first, subject.vocab_size, (rows, length), generator=generator)


def _candidates(subject: Subject) -> ProbeText:
    rows = rows_of(subject, _CANDIDATES // SHORT)
    return ProbeText(_drawn(subject, rows, SHORT, seed=8), _drawn(subject, rows, SHORT, seed=9))


def _first_logits(subject: Subject, text: ProbeText, stack: str) -> torch.Tensor | None:
    """What the router says to each position in the first sparse layer of a stack, if it has one."""
    first = next((place for place, layer in enumerate(subject.layers) if layer.startswith(stack)), None)
    if first is None:
        return None
    return subject.forward(text).calls[first].logits_GNE.view(len(text.inputs_BS), -1, subject.num_experts)


def _crowd(ids_BS: torch.Tensor, logits_BSE: torch.Tensor, wanted: int, few: int, shape: torch.Size) -> torch.Tensor:
    """The few ids that want the expert most, again and again: among their like they want what they wanted before."""
    ids_A = ids_BS.flatten()[logits_BSE.softmax(-1)[..., wanted].flatten().topk(few).indices]
    return ids_A.repeat(-(-shape.numel() // few))[: shape.numel()].view(shape)
