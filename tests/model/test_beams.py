"""Beam search against a reference, against all answers there are, and against transformers'."""

import math

import pytest
import torch
from answers import (
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
from hypothesis import given
from hypothesis import strategies as st
from reference_search import T5X, TRANSFORMERS, best_answer, log_p_after

from switchcli.model.decoding import Decoding
from switchcli.model.generation import generate, generate_columns
from switchcli.model.moe.layer import SwitchLayer, evaluating
from switchcli.model.moe.router import SwitchRouter
from switchcli.model.transformer import SwitchTransformer
from switchcli.spec import EOS, PAD


def t5_score(log_probability: float, length: int, alpha: float) -> float:
    return log_probability / ((5 + length) / 6) ** alpha


@pytest.mark.unit("switch-3")
@pytest.mark.parametrize(("name", "beams"), [("switch", 3), ("t5-1.0", 2), ("t5-1.1", 8)])
def test_the_answers_are_those_of_transformers(name: str, beams: int) -> None:
    """Without a length penalty, of which theirs is another, and with theirs going on while a beam can still win.

    T5X's search differs from theirs in two rules (`Rules`). Where an answer differs, the reference has ours by T5X's
    rules and theirs by transformers'.
    """
    ours, theirs = twins(name, seed=5)
    inputs_BS = some_inputs(50, 1, 61)
    decoding = Decoding(max_tokens=15, beams=beams, length_penalty=0.0)
    found = [up_to_the_end(row) for row in generate(ours, inputs_BS, decoding).tolist()]
    assert len({len(row) for row in found}) > 5
    assert found != [up_to_the_end(row) for row in generate(ours, inputs_BS, Decoding(max_tokens=15)).tolist()]
    expected = their_answers(theirs, inputs_BS, 15, beams)
    differing = [row for row in range(50) if found[row] != expected[row]]
    assert len(differing) < 15
    for row in differing:
        after = log_p_after(ours, inputs_BS[row])
        assert found[row] == best_answer(after, beams, 0.0, 15, T5X)
        assert expected[row] == best_answer(after, beams, 0.0, 15, TRANSFORMERS)


@given(
    beams=st.integers(2, 5),
    max_tokens=st.integers(1, 7),
    length_penalty=st.sampled_from([0.0, 0.6, 1.0, 3.0]),
    seed=st.integers(0, 2**20),
)
def test_the_best_answer_by_t5s_penalty_is_the_references(
    beams: int, max_tokens: int, length_penalty: float, seed: int
) -> None:
    model, inputs_BS = a_model(SPEC, seed), some_inputs(2, seed)
    decoding = Decoding(max_tokens=max_tokens, beams=beams, length_penalty=length_penalty)
    for inputs_S, row in zip(inputs_BS, generate(model, inputs_BS, decoding).tolist(), strict=True):
        answer = best_answer(log_p_after(model, inputs_S), beams, length_penalty, max_tokens)
        found = up_to_the_end(row)
        if found != answer:  # a near tie
            scores = [scored(model, inputs_S, one, length_penalty) for one in (found, answer)]
            assert math.isclose(*scores, rel_tol=1e-5)


def scored(model: SwitchTransformer, inputs_S: torch.Tensor, answer: list[int], alpha: float) -> float:
    log_p_TV = log_p(model, inputs_S, [answer[:length] for length in range(len(answer))])
    return t5_score(float(log_p_TV.gather(1, torch.tensor(answer).unsqueeze(1)).sum()), len(answer), alpha)


def test_inputs_have_the_same_answers_alone_without_a_capacity() -> None:
    short = SwitchRouter(eval_capacity_factor=0.5, min_capacity=1, group_sequences=3)
    model, inputs_BS = a_model(SPEC.model_copy(update={"router": short}), 7), some_inputs(7, 3)
    inputs_BS[2] = PAD
    decoding = Decoding(max_tokens=12, beams=3)
    with evaluating(model, "dropless"):
        together = generate(model, inputs_BS, decoding).tolist()
        alone = [generate(model, inputs_BS[row, None], decoding)[0].tolist() for row in range(7)]
    assert [up_to_the_end(row) for row in together if any(row)] == [up_to_the_end(row) for row in alone if any(row)]
    assert not any(together[2] + alone[2])


def test_beams_are_filled_up_to_whole_groups_and_routed_while_they_can_win() -> None:
    grouped = ROOMY.model_copy(update={"group_sequences": 3})
    decoding = Decoding(max_tokens=30, beams=4, length_penalty=0.6)
    model, inputs_BS = model_and_inputs_that_end(4, decoding, SPEC.model_copy(update={"router": grouped}))
    inputs_BS = torch.cat([torch.full_like(inputs_BS[:1], PAD), inputs_BS])  # of 6 rows in 2 groups
    routed: list[tuple[int, int]] = []
    for module in model.decoder.modules():
        if isinstance(module, SwitchLayer):
            module.register_forward_hook(
                lambda _, inputs, output: routed.append((len(inputs[0]), int(output.stats.tokens)))
            )
    answers = generate(model, inputs_BS, decoding)
    rows, tokens = zip(*routed, strict=True)
    assert set(rows) == {6 * 4}
    assert len(routed) == answers.shape[1] < 30  # all are done: it stops
    assert tokens[0] == 4  # at first a beam stands for all of an input
    assert tokens[1] == 4 * 4
    assert sorted(tokens[1:], reverse=True) == list(tokens[1:])
    assert not answers[0].any()  # of no input


def test_there_may_be_more_beams_than_pieces() -> None:
    model, inputs_BS = a_model(SPEC.model_copy(update={"vocab_size": 3}), 3), some_inputs(2, 1, 3)
    found = generate(model, inputs_BS, Decoding(max_tokens=4, beams=50))
    assert found.shape[1] <= 4


def test_beams_have_no_steps_to_read_along() -> None:
    with pytest.raises(ValueError, match=r"beams \(2\).*\bbeams\b.*\b1\b"):
        next(generate_columns(a_model(), some_inputs(1, 1), Decoding(beams=2)))


def test_a_search_that_is_stopped_answers_as_if_it_had_so_many_tokens() -> None:
    steps = []

    def stop_after_two(done_B: torch.Tensor) -> bool:
        steps.append(bool(done_B.any()))
        return len(steps) == 2

    decoding = Decoding(max_tokens=12, beams=3, length_penalty=0.0)
    answers_BT = generate(a_model(SPEC, 3), some_inputs(8, 3), decoding, all_done=stop_after_two)
    short = decoding.model_copy(update={"max_tokens": 2})
    assert torch.equal(answers_BT, generate(a_model(SPEC, 3), some_inputs(8, 3), short))
    assert any(any(row) and EOS not in row for row in answers_BT.tolist())
