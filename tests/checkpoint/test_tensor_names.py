"""Stacked parameters and whole logical tensors: the names, the views, and that nothing is lost either way."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from switchcli.checkpoint.tensor_names import expert_numbers, logical_parts, split_experts
from switchcli.distributed.layout import ShardedDim
from switchcli.distributed.mesh import RankGroup

WI = "encoder.blocks.1.feed_forward.experts.wi"


def test_an_expert_weight_is_named_by_its_global_number() -> None:
    named = {
        WI: torch.arange(12.0).reshape(2, 3, 2),
        "encoder.embed.weight": torch.ones(4),
        f"{WI}/row": torch.ones(2, 3),
    }
    logical = split_experts(named, range(6, 8))
    assert set(logical) == {
        "encoder.blocks.1.feed_forward.experts.6.wi",
        "encoder.blocks.1.feed_forward.experts.7.wi",
        "encoder.blocks.1.feed_forward.experts.6.wi/row",
        "encoder.blocks.1.feed_forward.experts.7.wi/row",
        "encoder.embed.weight",
    }
    assert torch.equal(logical["encoder.blocks.1.feed_forward.experts.7.wi"], named[WI][1])
    assert expert_numbers(logical) == [6, 7]


def test_a_slot_that_is_not_stacked_keeps_the_stacked_name() -> None:
    state = {"a.experts.wi/step": torch.tensor(3), "a.experts.wi/other": torch.ones(5)}
    assert split_experts(state, range(4)) == state


@pytest.mark.parametrize("name", ["a.experts", "a.my_experts.wi", "a.experts_norm.weight", "router.weight/experts.x"])
def test_other_names_are_left_alone(name: str) -> None:
    assert list(split_experts({name: torch.ones(4, 2)}, range(4))) == [name]


PARTS = st.sampled_from(["encoder", "blocks", "0", "11", "feed_forward", "attention"])
PATHS = st.lists(PARTS, max_size=3).map(lambda parts: "".join(f"{part}." for part in parts))
TAILS = st.sampled_from(["wi", "wo", "wi.weight", "wi/row", "wo/column", "wi/step"])


@st.composite
def named_tensors(draw: st.DrawFn) -> tuple[dict[str, Tensor], int, int]:
    num_experts = draw(st.integers(1, 9))
    named: dict[str, Tensor] = {}
    for path, tail, sparse in draw(st.lists(st.tuples(PATHS, TAILS, st.booleans()), max_size=8)):
        shape = draw(st.lists(st.integers(0, 3), max_size=2))
        lead = [num_experts] if sparse and not tail.endswith("/step") else []
        named[f"{path}{'experts.' if sparse else ''}{tail}"] = torch.randn(
            [] if tail.endswith("/step") else lead + shape
        )
    return named, num_experts, draw(st.integers(0, 99))


@settings(deadline=None)
@given(named_tensors())
def test_what_is_written_into_logical_tensors_is_in_those_that_they_are_views_of(
    case: tuple[dict[str, Tensor], int, int],
) -> None:
    named, num_experts, first = case
    numbers = range(first, first + num_experts)
    logical = split_experts(named, numbers)
    assert sum(t.numel() for t in logical.values()) == sum(t.numel() for t in named.values())
    others = {name: torch.zeros_like(tensor) for name, tensor in named.items()}
    for name, part in logical_parts(others, {}, numbers).items():
        part.tensor.copy_(logical[name])
    assert all(torch.equal(others[name], named[name]) for name in named)


def test_the_cuts_of_a_stack_are_those_of_each_expert() -> None:
    ranks = RankGroup(None, 2, 1)
    cuts = {
        "a.experts.wi": (ShardedDim(1, ranks, (3, 3)),),
        "b": (ShardedDim(1, ranks, (2, 2)), ShardedDim(0, ranks, (3, 2))),
    }
    found = logical_parts({"a.experts.wi": torch.ones(2, 3, 5), "b": torch.ones(2, 2)}, cuts, range(4, 6))
    expert, dense = found["a.experts.5.wi"], found["b"]
    assert expert.full_shape == (6, 5)
    assert expert.slices == (slice(3, 6), slice(0, 5))
    assert dense.full_shape == (5, 4)
    assert dense.slices == (slice(3, 5), slice(2, 4))
