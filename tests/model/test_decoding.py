"""How answers are decoded: rules between settings, T5's penalty, and tokens drawn by probability."""

import math

import pytest
import torch
from answers import SPEC, a_model, some_inputs
from pydantic import ValidationError

from switchcli.model.decoding import Decoding
from switchcli.model.generation import UniformDraws, generate, pick
from switchcli.model.moe.layer import evaluating
from switchcli.model.moe.router import SwitchRouter
from switchcli.spec import PAD


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"beams": 4, "temperature": 0.7},
            r"beams \(4\).*temperature \(0\.7\)[^{]*\bbeams\b[^{]*\b1\b[^{]*\btemperature\b[^{]*\b0\b",
        ),
        ({"top_p": 0.9}, r"top_p \(0\.9\).*\btemperature\b.*\b1\.0\b.*\btop_p\b"),
        ({"max_tokens": 0}, "greater than or equal to 1"),
        ({"beams": 0}, "greater than or equal to 1"),
        ({"length_penalty": -1.0}, "greater than or equal to 0"),
        ({"temperature": math.inf}, "finite"),
        ({"top_p": 0.0, "temperature": 1.0}, "greater than 0"),
        ({"beams": 2, "length_penalty": 1e6}, r"length_penalty \(1e\+06\).*\bmax_tokens\b.*\b25\b"),
        ({"top_k": 5}, "not permitted"),
    ],
)
def test_what_contradicts_itself_is_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Decoding(**settings)


def test_the_penalty_is_t5s() -> None:
    assert Decoding(length_penalty=0.6).penalty(1) == 1.0
    assert Decoding(length_penalty=0.6).penalty(7) == pytest.approx(2**0.6)
    assert Decoding(length_penalty=0.0).penalty(50) == 1.0


PROBABILITY = torch.tensor([0.05, 0.4, 0.0, 0.25, 0.3])


def at(settings: Decoding, draw: float) -> int:
    return int(pick(settings, PROBABILITY.log().unsqueeze(0), torch.tensor([draw], dtype=torch.float64)))


@pytest.mark.parametrize(
    ("top_p", "token_at"),
    [
        (1.0, {0.0: 0, 0.049: 0, 0.051: 1, 0.449: 1, 0.451: 3, 0.699: 3, 0.701: 4, 1 - 2**-53: 4}),
        (0.9, {0.0: 1, 0.42: 1, 0.422: 4, 0.736: 4, 0.738: 3, 1 - 2**-53: 3}),  # 0.4, 0.3 and 0.25, of 0.95
        (0.7, {0.0: 1, 0.571: 1, 0.572: 4, 1 - 2**-53: 4}),
        (0.5, {0.571: 1, 0.572: 4}),  # the token that passes 0.5 belongs to it
        (0.39, {0.0: 1, 1 - 2**-53: 1}),
        (1e-9, {0.0: 1, 1 - 2**-53: 1}),
    ],
)
def test_a_draw_falls_on_the_token_that_has_its_share(top_p: float, token_at: dict[float, int]) -> None:
    # 0.7 in float32 is a little more than the sum of its two: of no interest here.
    settings = Decoding(temperature=1.0, top_p=top_p - 1e-6 if 1e-3 < top_p < 1.0 else top_p)
    assert {draw: at(settings, draw) for draw in token_at} == token_at


def test_a_draw_on_the_border_of_two_tokens_is_the_next_ones() -> None:
    """So a draw of 0 is never a token of probability 0."""
    one = Decoding(temperature=1.0)
    assert pick(one, torch.tensor([[0.0, 0.0]]), torch.tensor([0.5], dtype=torch.float64)).tolist() == [1]
    assert pick(one, torch.tensor([[-torch.inf, 0.0]]), torch.tensor([0.0], dtype=torch.float64)).tolist() == [1]


@pytest.mark.parametrize("temperature", [1e-3, 1e-308, 5e-324])
def test_a_tiny_temperature_takes_the_most_probable_token(temperature: float) -> None:
    logits_BV = torch.tensor([[1.0, 3.0, -2.0], [-1e4, -math.inf, -1e5]])
    draws = torch.tensor([0.5, 0.999], dtype=torch.float64)
    assert pick(Decoding(temperature=temperature), logits_BV, draws).tolist() == [1, 0]


def test_temperature_sharpens_and_flattens() -> None:
    draws = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    for temperature in (0.25, 0.5, 1.0, 2.0):
        logits_BV = PROBABILITY.log().expand(10_000, -1)
        found_V = pick(Decoding(temperature=temperature), logits_BV, draws).bincount(minlength=5) / 10_000
        sharpened_V = PROBABILITY.double() ** (1 / temperature)
        torch.testing.assert_close(found_V.double(), sharpened_V / sharpened_V.sum(), rtol=0.0, atol=2e-4)


def test_answers_are_drawn_by_the_models_probabilities() -> None:
    """Frequencies of all pairs of tokens, over many rows of one input, agree with the model's probabilities."""
    model, inputs_1S = a_model(SPEC, 3), some_inputs(1, 3)
    many = 4000
    decoding = Decoding(max_tokens=2, temperature=1.5, seed=1)
    pairs_BT = generate(model, inputs_1S.expand(many, -1), decoding)
    with torch.no_grad():
        first_1V = (model(inputs_1S, torch.tensor([[2]])).logits_BTV[:, 0] / 1.5).softmax(-1)
        targets_VT = torch.stack([torch.arange(8), torch.full((8,), 2)], dim=1)
        hidden = model(inputs_1S.expand(8, -1), targets_VT)
        second_VV = (hidden.logits_BTV[:, 1] / 1.5).softmax(-1)
    expected_VV = first_1V.T * second_VV
    expected_VV[1] = 0.0  # EOS is followed by padding
    expected_VV[1, PAD] = first_1V[0, 1]
    found_VV = (pairs_BT[:, 0] * 8 + pairs_BT[:, 1]).bincount(minlength=64).view(8, 8) / many
    sigma_VV = (expected_VV * (1 - expected_VV) / many).sqrt()
    assert ((found_VV - expected_VV).abs() <= 5 * sigma_VV + 1e-9).all()
    assert (found_VV > 0).sum() > 20


def test_the_same_seed_gives_the_same_answers_whatever_is_beside_a_row() -> None:
    grouped = SwitchRouter(eval_capacity_factor=0.5, min_capacity=1, group_sequences=3)
    model, inputs_BS = a_model(SPEC.model_copy(update={"router": grouped}), 7), some_inputs(7, 3)
    decoding = Decoding(max_tokens=9, temperature=1.0, top_p=0.9, seed=4)
    before = torch.random.get_rng_state()
    with evaluating(model, "dropless"):
        together = generate(model, inputs_BS, decoding).tolist()
        assert together == generate(model, inputs_BS, decoding).tolist()
        for row in range(7):
            alone = generate(model, inputs_BS[row, None], decoding, first=row)[0].tolist()
            assert alone + [PAD] * (len(together[row]) - len(alone)) == together[row]
        another = generate(model, inputs_BS, decoding.model_copy(update={"seed": 5})).tolist()
    assert another != together
    assert torch.equal(before, torch.random.get_rng_state())


def test_nearly_no_temperature_is_greedy() -> None:
    model, inputs_BS = a_model(SPEC, 7), some_inputs(7, 3)
    coldest = Decoding(max_tokens=9, temperature=1e-30, top_p=0.5)
    assert torch.equal(generate(model, inputs_BS, coldest), generate(model, inputs_BS, Decoding(max_tokens=9)))


def test_the_draws_are_uniform_and_each_rows_own() -> None:
    draws = UniformDraws(3, 0, 300)
    drawn_TB = torch.stack([draws.next() for _ in range(100)])
    assert drawn_TB.min() >= 0.0
    assert drawn_TB.max() < 1.0
    share_10 = (drawn_TB * 10).long().flatten().bincount(minlength=10) / drawn_TB.numel()
    assert (share_10 - 0.1).abs().max() < 0.01  # six sigma
    assert (torch.corrcoef(drawn_TB[:, :20].T) - torch.eye(20)).abs().max() < 0.5
    assert len(drawn_TB.unique()) == drawn_TB.numel()
    later = UniformDraws(3, 7, 2)
    assert torch.equal(later.next(), drawn_TB[0, 7:9])
