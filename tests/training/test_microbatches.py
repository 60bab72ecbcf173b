"""Microbatches: each row of a step once, the same cuts on any number of ranks, and errors that say the way out."""

import re

import pytest
import torch
from doubles import Source
from hypothesis import given
from hypothesis import strategies as st

from switchcli.data.batch import Batch
from switchcli.distributed.parallel_spec import batch_problem
from switchcli.spec import PAD
from switchcli.training.microbatches import Microbatches


def numbered(step: int, first: int, count: int) -> Batch:
    rows_B1 = torch.arange(first, first + count).unsqueeze(1)
    return Batch(rows_B1, rows_B1 + 1000 * step)


@given(world=st.integers(1, 8), each=st.integers(1, 4), microbatch=st.integers(1, 4), step=st.integers(0, 9))
def test_ranks_share_the_same_microbatches_and_take_each_once(
    world: int, each: int, microbatch: int, step: int
) -> None:
    batch = world * each * microbatch
    alone = list(Microbatches(Source(numbered), batch, microbatch, 0, 1)(step))
    shared = [
        one for rank in range(world) for one in Microbatches(Source(numbered), batch, microbatch, rank, world)(step)
    ]
    assert [one.number for one in shared] == [one.number for one in alone] == list(range(world * each))
    for ours, theirs in zip(shared, alone, strict=True):
        assert torch.equal(ours.batch.inputs_BS, theirs.batch.inputs_BS)
    for one in shared:
        assert one.real == tuple(int((ids != PAD).sum()) for ids in one.batch)
    rows = torch.cat([one.batch.targets_BT for one in shared]).flatten().tolist()
    assert rows == list(range(1000 * step, 1000 * step + batch))


@pytest.mark.parametrize(
    ("batch", "microbatch", "group", "world", "words"),
    [
        (10, None, 1, 4, r"train\.batch_tokens\b.*\b10 sequences\b.*\b4 ranks\b.*\b12\b"),
        (2, None, 1, 4, r"train\.batch_tokens\b.*\b2 sequences\b.*\b4 ranks\b.*\b4\b"),
        (12, 4, 1, 2, r"train\.microbatch_tokens \(4\).*train\.batch_tokens \(12\).*\b2 ranks\b.*\b3\b"),
        (12, 3, 2, 2, r"train\.microbatch_tokens \(3\).*model\.router\.group_sequences: 2.*\b2\b"),
        (6, None, 2, 2, r"train\.batch_tokens \(6\).*\b3 sequences\b.*model\.router\.group_sequences: 2.*\b8\b"),
    ],
)
def test_a_batch_that_cannot_be_shared_evenly_has_a_problem_with_the_way_out(
    batch: int, microbatch: int | None, group: int, world: int, words: str
) -> None:
    assert re.search(words, batch_problem(batch, world, microbatch, group, 1) or "")


@given(st.integers(1, 24), st.integers(1, 4), st.integers(1, 24) | st.none(), st.integers(1, 4))
def test_whoever_follows_the_advice_has_no_problem(rows: int, ranks: int, microbatch: int | None, group: int) -> None:
    for _ in range(2):  # one for each key
        if (problem := batch_problem(rows, ranks, microbatch, group, 1)) is None:
            return
        tried = int(re.search(r"try (\d+)", problem)[1])
        if problem.startswith("train.batch_tokens"):
            rows = tried
        else:
            microbatch = tried
    assert batch_problem(rows, ranks, microbatch, group, 1) is None


def test_without_a_size_a_rank_takes_its_share_at_once() -> None:
    assert batch_problem(12, 3, None, 2, 1) is None
