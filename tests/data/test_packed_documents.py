"""Rows of whole documents: every piece once, in the rows of a slow packing; each corrupted as if it were alone."""

from itertools import pairwise

import numpy as np
import slow_span_corruption as slow
from hypothesis import example, given, settings
from hypothesis import strategies as st

from switchcli.data.objectives.example_packing import store_from_texts
from switchcli.data.objectives.packed_documents import WholeDocumentObjective
from switchcli.data.objectives.span_corruption import SpanCorruption

SENTINELS = 900 - np.arange(100)
OBJECTIVES = st.sampled_from(
    [
        SpanCorruption(inputs_length=12),
        SpanCorruption(inputs_length=128),
        SpanCorruption(inputs_length=40, noise_density=0.5, mean_span_length=1.5),
        SpanCorruption(inputs_length=16, noise_density=0.9, mean_span_length=20.0),
        # Short pieces of these two have fewer kept tokens than T5's count of spans.
        SpanCorruption(inputs_length=20, noise_density=0.5, mean_span_length=1.0),
        SpanCorruption(inputs_length=20, noise_density=0.6, mean_span_length=1.5),
    ]
)
LENGTHS = st.lists(st.integers(0, 70), max_size=40)


def share_of(length: int, objective: SpanCorruption) -> slow.Counts:
    """T5's counts; a short text has as many spans as it has tokens to part them."""
    share = slow.counts(length, objective.noise_density, objective.mean_span_length)
    return share._replace(spans=min(share.spans, share.kept))


def raw_length(objective: SpanCorruption) -> int:
    return slow.raw_length(objective.inputs_length, objective.noise_density, objective.mean_span_length)


def slowly_packed(lengths: list[int], objective: SpanCorruption) -> list[list[tuple[int, int, int]]]:
    """Rows of (document, start, length)."""
    rows: list[list[tuple[int, int, int]]] = []
    room, longest = (0, 0), raw_length(objective)
    for document, length in enumerate(lengths):
        for start in range(0, length, longest):
            piece = min(longest, length - start)
            if piece < 2:
                continue
            share = share_of(piece, objective)
            need = (share.kept + share.spans + 1, share.noise + share.spans + 1)
            if need[0] > room[0] or need[1] > room[1]:
                rows.append([])
                room = (objective.inputs_length, objective.targets_length)
            rows[-1].append((document, start, piece))
            room = (room[0] - need[0], room[1] - need[1])
    return rows


@example([3] * 20, SpanCorruption(inputs_length=20, noise_density=0.5, mean_span_length=1.0))
@given(LENGTHS, OBJECTIVES)
def test_rows_are_those_of_a_slow_packing(lengths: list[int], objective: SpanCorruption) -> None:
    pieces = WholeDocumentObjective(objective).pack(np.array(lengths, dtype=np.int64))
    found = list(zip(pieces.document_X.tolist(), pieces.start_X.tolist(), pieces.length_X.tolist(), strict=True))
    rows = [found[start:end] for start, end in pairwise([0, *pieces.end_R.tolist()])]
    assert rows == slowly_packed(lengths, objective)
    parts: dict[int, list[int]] = {}
    for document, start, length in found:
        parts.setdefault(document, []).extend(range(start, start + length))
    for document, length in enumerate(lengths):
        lost = length % raw_length(objective) == 1
        assert parts.get(document, []) == list(range(length - lost)), "but for a token that is left alone"


@settings(deadline=None)
@given(LENGTHS.filter(lambda lengths: max(lengths, default=0) > 1), OBJECTIVES, st.integers(0, 2**32), st.data())
def test_each_document_is_corrupted_as_if_it_were_alone(
    lengths: list[int], objective: SpanCorruption, seed: int, data: st.DataObject
) -> None:
    """The store's tokens say which they are: 1000 and on, one after another; its documents are taken backwards."""
    whole = WholeDocumentObjective(objective)
    store = store_from_texts([])._replace(
        tokens=(1000 + np.arange(sum(lengths))).astype(np.uint32), offsets=np.cumsum([0, *lengths], dtype=np.int64)
    )
    order = np.arange(len(lengths))[::-1]
    slow_rows = slowly_packed(lengths[::-1], objective)
    chosen = np.array(data.draw(st.lists(st.integers(0, len(slow_rows) - 1), min_size=1, max_size=6)))
    raw = whole.pack(np.diff(store.offsets)[order]).raw_rows(store, order, chosen, whole.raw_tokens_per_row)
    draws = np.random.Philox(seed).random_raw(len(chosen) * whole.num_draws).reshape(len(chosen), -1)
    inputs, targets = whole.corrupt(raw, draws, SENTINELS)
    for row, number in enumerate(chosen):
        expected: tuple[list[int], list[int]] = ([], [])
        at = 0
        for document, start, length in slow_rows[number]:
            first = 1000 + int(store.offsets[order[document]]) + start
            text = list(range(first, first + length))
            assert raw[row, at : at + length + 1].tolist() == [*text, slow.EOS]
            own = draws[row, at : at + length - 2].tolist()
            parts = slow.corrupted(text, share_of(length, objective), own, SENTINELS.tolist())
            assert slow.restored(parts[0][:-1], parts[1][:-1], SENTINELS.tolist()) == text
            expected[0].extend(parts[0])
            expected[1].extend(parts[1])
            at += length + 1
        assert inputs[row].tolist() == slow.padded(expected[0], objective.inputs_length)
        assert targets[row].tolist() == slow.padded(expected[1], objective.targets_length)
