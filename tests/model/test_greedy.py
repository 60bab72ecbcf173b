"""Greedy decoding against re-running the decoder on the whole prefix, and against transformers' generate."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from answers import (
    NAMES,
    ROOMY,
    SPEC,
    a_model,
    log_p,
    model_and_inputs_that_end,
    some_inputs,
    their_answers,
    twins,
    up_to_the_end,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from switchcli.model.decoding import Decoding
from switchcli.model.generation import generate
from switchcli.model.kv_cache import INITIAL_CAPACITY
from switchcli.model.moe.layer import SwitchLayer, evaluating
from switchcli.model.transformer import SwitchTransformer
from switchcli.spec import EOS, PAD


def uncached(model: SwitchTransformer, inputs_S: torch.Tensor, max_tokens: int) -> list[int]:
    """The answer to one input, each token from a forward pass over all tokens before it."""
    answer: list[int] = []
    while len(answer) < max_tokens and EOS not in answer:
        answer.append(int(log_p(model, inputs_S, [answer])[0].argmax()))
    return answer + [PAD] * (max_tokens - len(answer))


@settings(max_examples=10)
@given(
    rows=st.integers(1, 3),
    group_sequences=st.integers(1, 3),
    tied=st.booleans(),
    dense=st.booleans(),
    max_tokens=st.integers(1, 9),
    seed=st.integers(0, 2**20),
)
def test_the_cache_changes_no_token(
    rows: int, group_sequences: int, tied: bool, dense: bool, max_tokens: int, seed: int
) -> None:
    changes = {
        "router": ROOMY.model_copy(update={"group_sequences": group_sequences}),
        "tie_embeddings": tied,
        "num_experts": 1 if dense else 4,
    }
    model = a_model(SPEC.model_copy(update=changes), seed)
    inputs_BS = some_inputs(rows, seed)
    found_BT = generate(model, inputs_BS, Decoding(max_tokens=max_tokens))
    assert found_BT.dtype == torch.int64
    alone = a_model(SPEC.model_copy(update={**changes, "router": ROOMY}), seed)
    expected = [uncached(alone, inputs_S, max_tokens) for inputs_S in inputs_BS]
    assert F.pad(found_BT, (0, max_tokens - found_BT.shape[1])).tolist() == expected


def test_answers_end_early_and_are_padded_after_their_end() -> None:
    """Over many models the answers have all lengths, and decoding takes the steps of the longest one."""
    lengths: set[int] = set()
    for seed in range(8):
        model = a_model(SPEC, seed)
        steps: list[int] = []
        model.decoder.register_forward_hook(lambda *_, steps=steps: steps.append(1))
        answers = generate(model, some_inputs(4, seed), Decoding(max_tokens=30)).tolist()
        ends = [row.index(EOS) + 1 if EOS in row else 30 for row in answers]
        assert len(steps) == len(answers[0]) == max(ends)
        for row, end in zip(answers, ends, strict=True):
            assert set(row[end:]) <= {PAD}
        lengths |= set(ends)
    assert len(lengths) > 3


def test_a_decoding_step_routes_no_row_that_has_ended_or_fills_a_group() -> None:
    grouped = ROOMY.model_copy(update={"group_sequences": 3})
    decoding = Decoding(max_tokens=30)
    model, inputs_BS = model_and_inputs_that_end(4, decoding, SPEC.model_copy(update={"router": grouped}))
    inputs_BS = torch.cat([torch.full_like(inputs_BS[:1], PAD), inputs_BS])  # of 6 rows in 2 groups
    routed: list[int] = []
    for module in model.decoder.modules():
        if isinstance(module, SwitchLayer):
            module.register_forward_hook(lambda _, __, output: routed.append(int(output.stats.tokens)))
    answers = generate(model, inputs_BS, decoding).tolist()[1:]
    ends = [row.index(EOS) + 1 if EOS in row else 30 for row in answers]
    assert len(set(ends)) > 1
    assert routed == [sum(step < end for end in ends) for step in range(max(ends))]


@pytest.mark.parametrize("name", NAMES)
def test_the_answers_are_those_of_transformers(name: str) -> None:
    ours, theirs = twins(name, seed=5)
    inputs_BS = some_inputs(100, 1, 61)
    found = [up_to_the_end(row) for row in generate(ours, inputs_BS, Decoding(max_tokens=15)).tolist()]
    assert len({len(row) for row in found}) > 5
    expected = their_answers(theirs, inputs_BS, 15, beams=1)
    assert [row + [PAD] * (15 - len(row)) for row in found] == [row + [PAD] * (15 - len(row)) for row in expected]


def test_the_cache_grows() -> None:
    model = a_model(SPEC, 13)
    with torch.no_grad():
        model.head.weight[EOS] = 0.0  # no answer ends
    inputs_BS = some_inputs(2, 1)
    length = 2 * INITIAL_CAPACITY + 3
    assert generate(model, inputs_BS, Decoding(max_tokens=length)).tolist() == [
        uncached(model, inputs_S, length) for inputs_S in inputs_BS
    ]


@pytest.mark.parametrize("beams", [1, 3])
def test_the_caller_may_say_when_to_stop(beams: int) -> None:
    """Ranks stop together, so some take a few steps more; these change no answer."""
    decoding = Decoding(max_tokens=30, beams=beams)
    model, inputs_BS = model_and_inputs_that_end(4, decoding)
    alone_BT = generate(model, inputs_BS, decoding)
    seen: list[torch.Tensor] = []

    def all_done(done_B: torch.Tensor) -> bool:
        seen.append(done_B)
        return bool(done_B.all()) and len(seen) > alone_BT.shape[1] + 3

    late_BT = generate(model, inputs_BS, decoding, all_done=all_done)
    assert late_BT.shape[1] == len(seen) == alone_BT.shape[1] + 4 < 30
    assert torch.equal(late_BT, F.pad(alone_BT, (0, 4)))
    assert all((before_B <= after_B).all() for before_B, after_B in pairwise(seen))


def test_without_a_capacity_one_sequence_is_decoded_alone_whatever_the_groups() -> None:
    grouped = ROOMY.model_copy(update={"group_sequences": 3})
    model = a_model(SPEC.model_copy(update={"router": grouped}), 7)
    rows: list[int] = []
    model.encoder.register_forward_hook(lambda _, arguments, __: rows.append(len(arguments[0])))
    inputs_BS = some_inputs(1, 7)
    with evaluating(model, "dropless"):
        alone = generate(model, inputs_BS, Decoding(max_tokens=5))
    with evaluating(model, "paper"):
        filled_up = generate(model, inputs_BS, Decoding(max_tokens=5))
    assert rows == [1, 3]
    assert torch.equal(alone, filled_up)
