"""The texts that probes are made on: drawn ids, the same for every run.

Legend: B batch, S source, T target.

What fills a queue is known only from the model itself: a crowd is made of tokens that its router sends to one expert.
"""

import torch
import torch.nn.functional as F

from switchcli.doctor.subject import Subject, Text
from switchcli.spec import EOS, PAD

SHORT: int = 32
"""Positions of a text where its length does not matter."""
LONGEST: int = 512
"""Positions beyond which a capacity counts as one that never binds: T5's length."""
BROAD: int = 512
"""Tokens that say how an average layer routes."""
TOKENS_AN_EXPERT: int = 8
"""So many on average, so that an expert has none by chance once in exp(8) = 3,000 times."""
MOST: int = 8192
"""Tokens that a probe may cost."""
_CANDIDATES: int = 1024


def rows_of(subject: Subject, at_least: int) -> int:
    """The smallest batch that the model takes."""
    return -(-at_least // subject.rows) * subject.rows


def broad(subject: Subject) -> Text:
    """Tokens from the whole vocabulary, enough to meet every expert."""
    tokens = min(max(BROAD, TOKENS_AN_EXPERT * subject.num_experts), MOST)
    rows = rows_of(subject, -(-tokens // (2 * SHORT)))
    return Text(_drawn(subject, rows, 2 * SHORT, seed=1), _drawn(subject, rows, 2 * SHORT, seed=2))


def short(subject: Subject) -> Text:
    rows = rows_of(subject, 2)
    return Text(_drawn(subject, rows, SHORT, seed=3), _drawn(subject, rows, SHORT, seed=4))


def one_token(subject: Subject) -> Text:
    """The same token all over: most experts have nothing to do."""
    rows = rows_of(subject, 1)
    ids = _drawn(subject, 1, 2, seed=5)
    return Text(ids[:, :1].expand(rows, 4), ids[:, 1:].expand(rows, 4))


def crowded_source(subject: Subject) -> Text:
    """Inputs whose tokens want the expert that padding wants, in the encoder's first sparse layer."""
    plain = short(subject)
    candidates = _candidates(subject)
    padded = Text(F.pad(candidates.inputs_BS, (0, 1), value=PAD), candidates.targets_BT)
    chosen_BS = _chosen(subject, padded, "encoder")
    if chosen_BS is None:
        return plain
    wanted = int(chosen_BS[:, -1].mode().values)
    pool = candidates.inputs_BS[chosen_BS[:, :-1] == wanted]
    return plain._replace(inputs_BS=_filled(pool, plain.inputs_BS))


def crowded_target(subject: Subject) -> Text:
    """Targets long enough to fill a queue, whose tokens want one expert in the decoder's first sparse layer."""
    length = min(LONGEST, SHORT + (subject.slots or SHORT))
    rows = rows_of(subject, 1)
    text = Text(_drawn(subject, rows, SHORT, seed=6), _drawn(subject, rows, length, seed=7))
    candidates = _candidates(subject)
    chosen_BT = _chosen(subject, candidates, "decoder")
    if chosen_BT is None:
        return text
    chosen_BT = chosen_BT[:, 1:]  # at position t the decoder is given target t - 1
    pool = candidates.targets_BT[:, :-1][chosen_BT == chosen_BT.flatten().mode().values]
    return text._replace(targets_BT=_filled(pool, text.targets_BT))


def crowded_rows(subject: Subject) -> Text:
    """Several sequences, all of whose tokens want one expert."""
    source, target = crowded_source(subject), crowded_target(subject)
    rows = rows_of(subject, 4)
    return Text(source.inputs_BS[:1].expand(rows, -1), target.targets_BT[:1, :SHORT].expand(rows, -1))


def alone(text: Text) -> Text:
    """The last row with nothing but padding beside it."""
    return Text(*(F.pad(ids[-1:], (0, 0, len(ids) - 1, 0), value=PAD) for ids in text))


def _drawn(subject: Subject, rows: int, length: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(EOS + 1, subject.vocab_size, (rows, length), generator=generator)


def _candidates(subject: Subject) -> Text:
    rows = rows_of(subject, _CANDIDATES // SHORT)
    return Text(_drawn(subject, rows, SHORT, seed=8), _drawn(subject, rows, SHORT, seed=9))


def _chosen(subject: Subject, text: Text, stack: str) -> torch.Tensor | None:
    """The expert that each position wants in the first sparse layer of a stack, if it has one."""
    first = next((place for place, layer in enumerate(subject.layers) if layer.startswith(stack)), None)
    if first is None:
        return None
    return subject.look(text).calls[first].logits_GNE.argmax(-1).view(len(text.inputs_BS), -1)


def _filled(pool: torch.Tensor, like_BS: torch.Tensor) -> torch.Tensor:
    """`like_BS` with ids of the pool instead, in their order and again; as it is when the pool is empty."""
    if not len(pool):
        return like_BS
    return pool.repeat(-(-like_BS.numel() // len(pool)))[: like_BS.numel()].view_as(like_BS)
