"""The plain layers: dropout as T5 has it."""

import pytest
import torch

from switchcli.model.layers import dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [-2, -1])
def test_dropout_has_one_mask_for_all_positions_and_keeps_the_mean(dtype: torch.dtype, shared: int) -> None:
    x = torch.ones(40, 50, 60, dtype=dtype, requires_grad=True)
    torch.manual_seed(0)
    y = dropout(x, 0.2, training=True, shared=shared)
    assert y.dtype == dtype
    assert torch.equal(y, y.narrow(shared, 0, 1).expand_as(y))
    assert {round(value, 2) for value in y.unique().tolist()} == {0.0, 1.25}
    assert y.float().mean().item() == pytest.approx(1.0, abs=0.03)  # 2000 masks and more
    y.sum().backward()
    assert torch.equal(x.grad, y)
    torch.manual_seed(0)
    assert torch.equal(y, dropout(x, 0.2, training=True, shared=shared))


def test_dropout_leaves_alone_what_is_not_trained() -> None:
    x, state = torch.ones(2, 3, 4), torch.get_rng_state()
    assert dropout(x, 0.2, training=False) is x
    assert dropout(x, 0.0, training=True) is x
    assert torch.equal(torch.get_rng_state(), state)
