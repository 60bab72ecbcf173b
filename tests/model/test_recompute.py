"""Blocks that are computed again on the way back give what they give without it."""

import shutil
import sys
from typing import NamedTuple

import pytest
import torch
from tiny_model import DENSE, NOISY, SPARSE, a_model, rows

from switchcli.model.attention import SegmentIds
from switchcli.model.block_execution import compile_blocks, recompute_blocks
from switchcli.model.config import ModelSpec
from switchcli.model.moe.router import ExpertChoiceRouter, NoTokenLeftBehindRouter, SwitchRouter, TopKRouter
from switchcli.model.transformer import ModelOutput, SwitchTransformer

NOISE = {"dropout": 0.2, "expert_dropout": 0.4, "sparse_every": 1}
SPECS: dict[str, ModelSpec] = {
    "dense": DENSE,
    "noisy": NOISY,
    "tokens at random": NOISY.model_copy(update={"router": SwitchRouter(overflow="random", sample_temperature=1.0)}),
    "dropless": NOISY.model_copy(update={"router": SwitchRouter(capacity_factor="dropless")}),
    "top_k, GEGLU": SPARSE.model_copy(update={**NOISE, "activation": "geglu", "router": TopKRouter(min_capacity=1)}),
    "no token left behind": SPARSE.model_copy(update={**NOISE, "router": NoTokenLeftBehindRouter(min_capacity=1)}),
    "expert choice": SPARSE.model_copy(
        update={**NOISE, "router": ExpertChoiceRouter(min_capacity=1), "decoder_router": SwitchRouter()}
    ),
    "Switch attention": NOISY.model_copy(update={**NOISE, "sparse": "both"}),
}


class Step(NamedTuple):
    output: ModelOutput
    gradients: dict[str, torch.Tensor | None]
    draw: float
    """The next number of torch's generator."""


def a_step(model: SwitchTransformer, again: bool, bfloat16: bool = False, segments: SegmentIds | None = None) -> Step:
    if again:
        recompute_blocks(model)
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        output = model.train()(*rows(0, 0, 4), segments)
        loss = output.logits_BTV.float().square().mean() + (0 if output.auxiliary is None else output.auxiliary.mean())
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return Step(output, gradients, float(torch.rand(())))


def assert_equal(one: Step, other: Step) -> None:
    assert one.draw == other.draw
    assert torch.equal(one.output.logits_BTV, other.output.logits_BTV)
    for ours, theirs in zip(one.output.router_stats, other.output.router_stats, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert one.gradients.keys() == other.gradients.keys()
    for name, gradient in one.gradients.items():
        theirs = other.gradients[name]
        assert (gradient is None) == (theirs is None), name
        assert gradient is None or torch.equal(gradient, theirs), name


@pytest.mark.parametrize(
    ("name", "bfloat16"), [*((name, False) for name in SPECS), ("dropless", True), ("Switch attention", True)]
)
def test_outputs_reports_and_gradients_are_the_same_bit_for_bit(name: str, bfloat16: bool) -> None:
    assert_equal(*(a_step(a_model(SPECS[name]), again, bfloat16) for again in (True, False)))


def test_of_packed_rows_too() -> None:
    segments, spec = SegmentIds(torch.arange(12).expand(4, 12) // 5, torch.arange(9).expand(4, 9) // 3), NOISY
    assert_equal(*(a_step(a_model(spec), again, segments=segments) for again in (True, False)))


@pytest.mark.nightly
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
@pytest.mark.skipif(not shutil.which("g++") or " " in sys.prefix, reason="torch cannot compile here")
def test_compiled_blocks_give_the_same() -> None:
    model = a_model(SPARSE)
    compile_blocks(model)
    ours, theirs = a_step(model, True), a_step(a_model(SPARSE), False)
    for name, gradient in theirs.gradients.items():
        torch.testing.assert_close(ours.gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
