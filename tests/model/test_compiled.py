"""Compiled parts give what they give uncompiled; sparse layers are left as they are."""

import copy
import shutil
import sys

import pytest
import torch
from tiny import DENSE, SPARSE, a_model, rows
from torch import nn

from switchcli.model.block_execution import compile_dense_sublayers
from switchcli.model.config import ModelSpec
from switchcli.model.moe.layer import SwitchLayer

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself

MIXED = SPARSE.model_copy(update={"num_layers": 4, "sparse": "both"})


def compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None


@pytest.mark.parametrize("spec", [SPARSE, MIXED, DENSE])
def test_every_part_without_experts_is_compiled_and_no_other(spec: ModelSpec) -> None:
    model = a_model(spec)
    names = [name for name, _ in model.named_parameters()]
    compile_dense_sublayers(model)
    assert [name for name, _ in model.named_parameters()] == names
    for block in [*model.encoder.blocks, *model.decoder.blocks]:
        for part in block.children():
            assert compiled(part) != any(isinstance(module, SwitchLayer) for module in part.modules())


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not shutil.which("g++") or " " in sys.prefix, reason="torch cannot compile here")
def test_loss_and_gradients_are_the_same() -> None:
    plain, fast = a_model(SPARSE), a_model(SPARSE)
    compile_dense_sublayers(fast)
    for model in (plain, fast):
        output = model.train()(*rows(0, 0, 4))
        (output.logits_BTV.float().square().mean() + output.auxiliary.mean()).backward()
    for (name, ours), theirs in zip(fast.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not shutil.which("g++") or " " in sys.prefix, reason="torch cannot compile here")
@torch.no_grad()
def test_in_bfloat16_a_position_bias_is_added_in_float32() -> None:
    """Biases near 200 that differ by tenths are one number in bfloat16, and their weights would all be equal."""
    fast = a_model(DENSE.model_copy(update={"num_layers": 1})).eval()
    generator = torch.Generator().manual_seed(0)
    for stack in (fast.encoder, fast.decoder):
        stack.position_bias.weight.copy_(200 + torch.randn(stack.position_bias.weight.shape, generator=generator) / 3)
    exact = copy.deepcopy(fast).double()
    compile_dense_sublayers(fast)
    with torch.autocast("cpu", torch.bfloat16):
        found_BTD = fast(*rows(0, 0, 4)).hidden_BTD
    exact_BTD = exact(*rows(0, 0, 4)).hidden_BTD
    error = (found_BTD - exact_BTD).norm() / exact_BTD.norm()
    assert error < 2**-7
