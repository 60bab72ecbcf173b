"""Duplicates: found at the stated rates, as by comparing each with each, however the work is shared out."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from switchcli.data.prepare import dedup as module
from switchcli.data.prepare.dedup import Duplicates, first_occurrences

DOCUMENTS = st.lists(st.lists(st.integers(0, 3), max_size=12), min_size=1, max_size=12)


def joined(documents: list[list[int]]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    ids = np.array([token for document in documents for token in document], dtype=np.uint32)
    return ids, np.cumsum([0, *map(len, documents)])


def stays(keys: list[NDArray[np.uint64]]) -> list[bool]:
    return [bool(one) for mask in first_occurrences(keys) for one in mask]


@example(documents=[[0, 1], [1, 0]], cuts=set())
@given(documents=DOCUMENTS, cuts=st.sets(st.integers(0, 12)))
def test_exact_duplicates_and_no_others(documents: list[list[int]], cuts: set[int]) -> None:
    keys = Duplicates(kind="exact").signatures(*joined(documents))
    pieces = np.split(keys, sorted(cut for cut in cuts if cut <= len(documents)))
    assert stays(pieces) == [documents.index(document) == index for index, document in enumerate(documents)]


@given(documents=DOCUMENTS)
def test_near_duplicates_hold_the_exact_ones(documents: list[list[int]]) -> None:
    found = stays([Duplicates().signatures(*joined(documents))])
    assert not any(stay for index, stay in enumerate(found) if documents.index(documents[index]) < index)


@given(documents=DOCUMENTS)
def test_minima_are_those_of_the_set_of_n_grams(documents: list[list[int]]) -> None:
    """Against the definition: the least over the n-grams, each a document of its own."""
    minima = module._minima(*joined(documents))
    for index, document in enumerate(documents):
        grams = {tuple(document[start : start + 5]) for start in range(max(len(document) - 4, 1))}
        assert (minima[:, index] == module._minima(*joined([list(gram) for gram in grams])).min(axis=1)).all()


@pytest.mark.parametrize("kind", ["exact", "near"])
@given(documents=DOCUMENTS, at_once=st.integers(1, 20))
def test_a_document_has_its_keys_in_any_company(kind: str, documents: list[list[int]], at_once: int) -> None:
    duplicates = Duplicates.model_validate({"kind": kind})
    alone = [duplicates.signatures(*joined([document])) for document in documents]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_TOKENS_AT_ONCE", at_once)
        together = duplicates.signatures(*joined(documents))
    assert (together == np.concatenate(alone)).all()
    assert (together.dtype, together.shape) == (np.uint64, (len(documents), duplicates.num_keys))
    assert duplicates.num_keys == (14 if kind == "near" else 1)


@given(
    keys=st.lists(st.tuples(*[st.sampled_from([0, 1, 2, 2**63, 2**64 - 2, 2**64 - 1])] * 2), max_size=20),
    cuts=st.sets(st.integers(0, 20)),
    at_once=st.integers(1, 8),
)
def test_what_is_kept_is_as_by_comparing_each_with_each(
    tmp_path_factory: pytest.TempPathFactory, keys: list[tuple[int, int]], cuts: set[int], at_once: int
) -> None:
    naive = [
        not any(a == b for other in keys[:index] for a, b in zip(one, other, strict=True))
        for index, one in enumerate(keys)
    ]
    array = np.array(keys, dtype=np.uint64).reshape(-1, 2)
    pieces = []
    for index, piece in enumerate(np.split(array, sorted(cut for cut in cuts if cut <= len(keys)))):
        path = tmp_path_factory.mktemp("keys") / f"{index}.npy"
        np.save(path, piece)
        pieces.append(np.load(path, mmap_mode="r" if len(piece) else None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "KEYS_AT_ONCE", at_once)
        assert stays(pieces) == naive
        assert [len(mask) for mask in first_occurrences(pieces)] == [len(piece) for piece in pieces]


@pytest.mark.parametrize("similarity", [0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
def test_near_duplicates_are_found_at_the_stated_rate(similarity: float) -> None:
    """Pairs that share a beginning: of 100 n-grams each, as many are shared as the similarity asks for."""
    pairs, length = 2000, 104
    draw = np.random.default_rng(7)
    first = draw.integers(0, 2**31, (pairs, length), dtype=np.uint32)
    second = draw.integers(0, 2**31, (pairs, length), dtype=np.uint32)
    shared = round(200 * similarity / (1 + similarity))
    if shared:
        second[:, : shared + 4] = first[:, : shared + 4]
    true = shared / (200 - shared)
    ids = np.concatenate([first, second]).ravel()
    mask = first_occurrences([Duplicates().signatures(ids, np.arange(2 * pairs + 1) * length)])[0]
    assert mask[:pairs].all(), "distinct texts stay"
    rate = 1 - (1 - true**8) ** 14
    error = np.sqrt(rate * (1 - rate) / pairs)
    assert abs(np.mean(~mask[pairs:]) - rate) <= 4 * error


def test_there_may_be_nothing() -> None:
    assert first_occurrences([]) == []
    assert [len(mask) for mask in first_occurrences([np.zeros((0, 14), np.uint64)] * 2)] == [0, 0]
    assert Duplicates().signatures(np.zeros(0, np.uint32), np.zeros(1, np.int64)).shape == (0, 14)


def test_the_keys_of_a_band_lie_together() -> None:
    """So that reading one of 14 bands does not read them all."""
    keys = Duplicates().signatures(*joined([[1, 2, 3], [4]]))
    assert keys.flags.f_contiguous
