"""Beam search against T5X's, token for token, by an independent reference.

The numbers come from NumPy's RandomState, so that models and inputs are the same with every version of torch.
"""

from functools import cache
from itertools import islice
from typing import NamedTuple

import numpy as np
import pytest
import torch
from answers import SPEC, up_to_the_end
from reference_search import T5X, TRANSFORMERS, Rules, best_answer, last_hidden, log_p_after

from switchcli.model.decoding import Decoding
from switchcli.model.generation import generate
from switchcli.model.transformer import SwitchTransformer
from switchcli.spec import EOS, PAD

VOCABULARY, INPUTS, MAX_TOKENS = 40, 100, 12
BEAMS, ALPHAS = (2, 3, 4, 8), (0.0, 0.6, 1.0, 2.0)
EOS_SHIFT = {"rare": 0.0, "usual": 0.6, "frequent": 1.1}
"""The amount added to EOS's logit where the decoder's output is what it is on average."""


class Case(NamedTuple):
    """One input and how it is decoded."""

    eos: str
    beams: int
    alpha: float
    number: int


CASES = [Case(eos, BEAMS[number % 4], ALPHAS[number // 4 % 4], number) for eos in EOS_SHIFT for number in range(INPUTS)]
SAMPLE = [case for case in CASES if (case.beams, case.alpha) in ((3, 0.6), (4, 1.0))]


@cache
@torch.no_grad()
def a_model(eos: str) -> SwitchTransformer:
    model = SwitchTransformer(SPEC.model_copy(update={"vocab_size": VOCABULARY})).eval()
    assert model.head is not None
    draw = np.random.RandomState(11)
    for name, parameter in sorted(model.named_parameters()):
        values = draw.standard_normal(tuple(parameter.shape))
        if "norm" in name:
            values = np.ones(parameter.shape)
        elif name != "embedding":
            values *= (0.9 if name.startswith("head") else 1.5) / parameter.shape[-1] ** 0.5
        parameter.copy_(torch.from_numpy(values))
    prefixes = draw.randint(2, VOCABULARY, size=(INPUTS, 4)).tolist()
    hidden = [
        last_hidden(model, model.encode(inputs_S[inputs_S != PAD].unsqueeze(0)), [prefix]).flatten()
        for inputs_S, prefix in zip(inputs(), prefixes, strict=True)
    ]
    mean_D = torch.stack(hidden).mean(0)
    model.head.weight[EOS] += EOS_SHIFT[eos] * mean_D / mean_D.square().sum()
    return model


@cache
def inputs() -> torch.Tensor:
    """int64 [INPUTS, 9]: rows of 1 to 9 tokens, padded."""
    draw = np.random.RandomState(12)
    inputs_BS = draw.randint(2, VOCABULARY, size=(INPUTS, 9))
    lengths_B = draw.randint(1, 10, size=INPUTS)
    return torch.from_numpy(np.where(np.arange(9) < lengths_B[:, None], inputs_BS, PAD)).long()


def reference(case: Case, rules: Rules = T5X) -> list[int]:
    after = log_p_after(a_model(case.eos), inputs()[case.number])
    return best_answer(after, case.beams, case.alpha, MAX_TOKENS, rules)


def ours(cases: list[Case]) -> list[list[int]]:
    """The answers of all cases, those of one setting in one batch."""
    answers = {}
    for eos, beams, alpha in sorted({case[:3] for case in cases}):
        same = [case for case in cases if case[:3] == (eos, beams, alpha)]
        decoding = Decoding(max_tokens=MAX_TOKENS, beams=beams, length_penalty=alpha)
        rows = generate(a_model(eos), inputs()[[case.number for case in same]], decoding).tolist()
        answers |= dict(zip(same, map(up_to_the_end, rows), strict=True))
    return [answers[case] for case in cases]


def test_answers_are_those_of_t5xs_search() -> None:
    assert len(SAMPLE) == 36
    assert ours(SAMPLE) == [reference(case) for case in SAMPLE]


@pytest.mark.integration  # 100 searches without a cache
@pytest.mark.parametrize(
    ("eos", "cut_off"), [("rare", range(80, 100)), ("usual", range(20, 80)), ("frequent", range(1, 20))]
)
def test_300_of_300_answers_are_those_of_t5xs_search(eos: str, cut_off: range) -> None:
    cases = [case for case in CASES if case.eos == eos]
    expected = [reference(case) for case in cases]
    assert len(cases) == 100
    assert [case for case, *pair in zip(cases, ours(cases), expected, strict=True) if pair[0] != pair[1]] == []

    # The inputs can tell: answers have many lengths, some are cut off, and transformers' search has others.
    assert sum(EOS not in answer for answer in expected) in cut_off
    assert len({len(answer) for answer in expected}) > 4
    pairs = zip(cases, expected, strict=True)
    differing = (case for case, answer in pairs if reference(case, TRANSFORMERS) != answer)
    assert len([*islice(differing, 3)]) == 3


def test_a_search_that_is_stopped_has_no_answer_yet() -> None:
    """Live beams are answers only after the last step."""
    decoding = Decoding(max_tokens=MAX_TOKENS, beams=3)
    steps = []

    def stop_after_two(done_B: torch.Tensor) -> bool:
        steps.append(bool(done_B.any()))
        return len(steps) == 2

    answers_BT = generate(a_model("rare"), inputs()[:8], decoding, all_done=stop_after_two)
    assert answers_BT.shape[1] == 2
    assert not any(any(row) and EOS not in row for row in answers_BT.tolist())
