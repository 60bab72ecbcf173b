"""The model against transformers' T5 and SwitchTransformers with the same weights: logits, loss and every gradient."""

import pytest
import torch
import torch.nn.functional as F
from weights import OURS, copy_weights, pairs, slice_of, switch, t5

from switchcli.model.config import ModelSpec
from switchcli.model.init import initialize
from switchcli.model.moe.router import SwitchRouter
from switchcli.model.transformer import SwitchTransformer

RELATIVE = 1e-5


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    """Relative to the largest entry: of each single entry it would ask more than reordered float32 sums give."""
    scale = theirs.abs().max().clamp(min=1e-30)
    assert ((ours - theirs).abs().max() / scale) <= RELATIVE, what


CASES = {
    "t5-1.0": (lambda: t5("relu", True), {}),
    "t5-1.1": (lambda: t5("gated-gelu", False), {"activation": "geglu", "tie_embeddings": False}),
    "t5-geglu-tied": (lambda: t5("gated-gelu", True), {"activation": "geglu"}),
    "switch": (
        lambda: switch(5),
        {
            "num_layers": 4,
            "num_experts": 5,
            "router": SwitchRouter(jitter=0.0, capacity_factor=5.0, balance_loss_coef=0.0),
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_equal_transformers(case: str) -> None:
    build, changes = CASES[case]
    theirs = build().train()
    ours = SwitchTransformer(ModelSpec(**{**OURS, **changes})).train()
    initialize(ours, seed=3)
    copy_weights(ours, theirs)
    generator = torch.Generator().manual_seed(1)
    inputs_BS = torch.randint(2, 61, (3, 37), generator=generator)
    targets_BT = torch.randint(2, 61, (3, 11), generator=generator)
    inputs_BS[1, 30:] = 0
    targets_BT[2, 8:] = 0

    output = ours(inputs_BS, targets_BT)
    loss = F.cross_entropy(output.logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=0)
    loss.backward()
    labels = targets_BT.masked_fill(targets_BT == 0, -100)
    expected = theirs(input_ids=inputs_BS, attention_mask=(inputs_BS != 0).long(), labels=labels)
    cross_entropy = F.cross_entropy(expected.logits.flatten(0, 1), labels.flatten())
    cross_entropy.backward()

    real_BT = targets_BT != 0  # a padding position's logits are nobody's
    assert_close(output.logits_BTV[real_BT], expected.logits[real_BT], "logits")
    assert loss.item() == pytest.approx(cross_entropy.item(), rel=RELATIVE)
    for name, (parameter, expert), their in pairs(ours, theirs):
        assert parameter.grad is not None
        assert their.grad is not None or expert is not None, name
        their_gradient = torch.zeros_like(their) if their.grad is None else their.grad
        assert_close(slice_of(parameter.grad, expert), their_gradient, f"gradient of {name}")
